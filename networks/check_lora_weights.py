"""Print the tensors of a LoRA file: shape, mean and smallest absolute value; and what looks wrong with it."""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

from library.console import run_script, show


def main(arguments: list[str] | None = None) -> None:
    """Print the lines; a line of the list is ``key,shape,mean,minimum``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="LoRA file")
    parser.add_argument("-s", "--show_all_keys", action="store_true", help="list alphas and other tensors too")
    options = parser.parse_args(arguments)
    from library.checkpoints import open_checkpoint
    from networks.adapters.lora_formats import KEY

    checkpoint = open_checkpoint(options.file)
    roles = {key: match.lastgroup if (match := KEY.match(key)) else None for key in checkpoint}
    matrices = [key for key, role in roles.items() if role in ("down", "up")]
    show(f"number of LoRA modules: {len(matrices)}")
    listed = list(matrices)
    if options.show_all_keys:
        listed += [key for key in checkpoint if key not in set(matrices)]
        show(f"number of all modules: {len(listed)}")
    not_finite, zeros = [], []
    for key in listed:
        tensor = checkpoint.load(key)
        sizes = tensor.abs().double() if tensor.is_complex() else tensor.double().abs()
        shape = str(tuple(sizes.shape)).replace(", ", "-")
        if not sizes.numel():
            show(f"{key},{shape},empty,empty")
            continue
        show(f"{key},{shape},{float(sizes.mean())},{float(sizes.min())}")
        if not bool(sizes.isfinite().all()):
            not_finite.append(key)
        elif not bool(sizes.any()) and roles[key] == "up":
            zeros.append(key)
    for keys, meaning in ((not_finite, "hold infinity or NaN: the file is damaged"), (zeros, "are 0: without effect")):
        if keys:
            show(f"{len(keys)} tensors {meaning}, such as {keys[0]}")


if __name__ == "__main__":
    run_script(main)
