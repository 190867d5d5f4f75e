"""Encode every image of a dataset into latent cache files, so that a training finds them.

The command line is that of the training script, with ``--sdxl`` or ``--flux`` for those families.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.console import run_script
from tools.cache_run import run_tool


def main() -> None:
    """Read the options and fill the cache."""
    run_tool("latents", __doc__ or "")


if __name__ == "__main__":
    run_script(main)
