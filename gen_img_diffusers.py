"""The same program as ``gen_img.py``, under a name that command lines of kohya-ss/sd-scripts use."""

from gen_img import main
from library.console import run_script

if __name__ == "__main__":
    run_script(main)
