"""Print the metadata of a safetensors file, or the text in a PNG, WebP or JPEG image, as JSON, sorted by key."""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
from pathlib import Path

from library.console import run_script, show
from library.errors import UserError
from library.generation.image_files import SUFFIXES, text_in_image
from library.safetensors_io import read_header


def main(arguments: list[str] | None = None) -> None:
    """Print the metadata; the tensors are not read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", help="safetensors file or image")
    parser.add_argument("--model", help="the same, as kohya-ss/sd-scripts names it")
    options = parser.parse_args(arguments)
    if bool(options.file) == bool(options.model):
        raise UserError("name one safetensors file, as in: show_metadata.py my_lora.safetensors")
    path = options.file or options.model
    image = Path(path).suffix.lower() in SUFFIXES
    metadata = text_in_image(Path(path)) if image else read_header(path).metadata
    if not metadata:
        raise UserError(f"{path} has no metadata.")
    show(json.dumps(metadata, indent=4, sort_keys=True))


if __name__ == "__main__":
    run_script(main)
