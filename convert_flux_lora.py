"""The same program as ``networks/convert_flux_lora.py``, under the name that guides use."""

from library.console import run_script
from networks.convert_flux_lora import main

if __name__ == "__main__":
    run_script(main)
