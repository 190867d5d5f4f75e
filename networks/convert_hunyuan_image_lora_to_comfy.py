"""Give a LoRA file for HunyuanImage-2.1 the names that ComfyUI looks for, or with --reverse those of sd-scripts."""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

from library.console import ConsoleOptions, run_script, set_up_console
from networks.lora_tools.options import check_output


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, check the files, convert."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("src_path", help="LoRA file to convert; the names of any program are read")
    parser.add_argument("dst_path", help="file to write")
    parser.add_argument("--reverse", action="store_true", help="write the names of sd-scripts instead of ComfyUI's")
    options = parser.parse_args(arguments)
    set_up_console(ConsoleOptions())
    save_to = check_output(options.dst_path, [options.src_path], (".safetensors",), "dst_path")
    from networks.lora_tools.hunyuan_image_conversion import convert

    convert(options.src_path, save_to, reverse=options.reverse)


if __name__ == "__main__":
    run_script(main)
