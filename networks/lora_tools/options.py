"""Options that several LoRA tools share, and the checks that come before any work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from library.console import say
from library.devices import named_device, parse_dtype
from library.errors import UserError
from library.files import require_writable_folder

if TYPE_CHECKING:
    import torch

    from networks.adapters.lora_file import LoRAWeights

Precision = Literal["float", "fp16", "bf16"]
LORA_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")


@dataclass
class MergeFiles:
    """Files"""

    models: list[str] = field(default_factory=list)
    """LoRA files to merge."""
    ratios: list[float] = field(default_factory=list)
    """Strength of each file in the result, as many numbers as files; a negative one takes the file away."""
    save_to: str | None = None
    """File to write."""


@dataclass
class MergeForm:
    """Form of a merged LoRA"""

    concat: bool = False
    """Put the ranks of the files side by side as they are; unset computes the smallest rank that holds the same sum."""
    shuffle: bool = False
    """Put the ranks of each module in another order, which changes nothing in what the file does."""


@dataclass
class BlockWeightOptions:
    """Block weights"""

    lbws: list[str] = field(default_factory=list)
    """A JSON list of factors on the blocks for each file: 12 or 20 for Stable Diffusion XL, 17 or 26 for 1.x, 2.x."""


@dataclass
class MergeNumbers:
    """Numbers and metadata"""

    precision: Precision = "float"
    """Dtype that results are rounded to; sums are computed in at least float32 whatever it is."""
    save_precision: Precision | None = None
    """Dtype of the file; unset means that of --precision, for --sd_model that of each of its tensors."""
    no_metadata: bool = False
    """Write only the metadata that is needed to use the file."""


def check_merge_files(files: MergeFiles) -> None:
    """Raises UserError for missing files and ratios, and for counts that do not match."""
    if not files.models:
        raise UserError("--models needs the LoRA files to merge.")
    if len(files.ratios) != len(files.models):
        raise UserError(
            f"--ratios needs one number for each file of --models ({len(files.models)}); {len(files.ratios)} given."
        )
    if not all(map(math.isfinite, files.ratios)):
        raise UserError(f"--ratios must be finite numbers, not {files.ratios}.")


def check_output(
    save_to: str | None,
    inputs: Iterable[str | None],
    suffixes: Sequence[str] = LORA_SUFFIXES,
    option: str = "--save_to",
) -> Path:
    """The path to write to. Raises UserError unless it is given, ends as it must, is no input and can be written."""
    if not save_to:
        raise UserError(f"{option} needs the name of the file to write.")
    path = Path(save_to)
    if path.suffix.lower() not in suffixes:
        allowed = ", ".join(suffix or "no suffix (a folder)" for suffix in suffixes)
        raise UserError(f"{option}: {path} must end in one of {allowed}.")
    for name in inputs:
        if name and path.exists() and Path(name).exists() and path.samefile(name):
            raise UserError(f"{option}: {path} is one of the inputs; choose another name.")
    if path.suffix and path.is_dir():
        raise UserError(f"{option}: {path} is a folder; name a file.")
    require_writable_folder(path.parent, option)
    return path


def check_rank(rank: int | None, option: str) -> None:
    """Raises UserError for a rank below 1."""
    if rank is not None and rank < 1:
        raise UserError(f"{option} must be at least 1, not {rank}.")


def check_clamp_quantile(quantile: float) -> None:
    """Raises UserError unless the quantile lies in 0.5..1."""
    if not 0.5 < quantile <= 1:
        raise UserError(f"--clamp_quantile must be above 0.5 and at most 1 (nothing is cut off), not {quantile:g}.")


def parse_device(name: str | None, option: str = "--device") -> torch.device:
    """The device of that name; the CPU for None. Raises UserError for one that this machine does not have."""
    return named_device("cpu" if name is None else name, option)


def save_modules(
    path: Path,
    modules: Mapping[str, LoRAWeights],
    metadata: Mapping[str, str],
    save_precision: str,
    precision: Precision = "float",
) -> None:
    """Write a LoRA file with its hashes, and say what is in it. Appears complete or not at all."""
    from networks.adapters.lora_file import state_dict_of, write_file
    from networks.lora_tools.arithmetic import with_storable_alpha

    dtype, rounded = parse_dtype(save_precision), parse_dtype(precision)
    stored = {}
    for name, weights in modules.items():
        weights = with_storable_alpha(weights, dtype)
        stored[name] = weights._replace(down=weights.down.to(rounded), up=weights.up.to(rounded))
    tensors = state_dict_of(stored, dtype)
    refuse_overflow(tensors, save_precision)
    write_file(path, tensors, metadata)
    tell_saved(path, [len(weights.down) for weights in modules.values()])


def tell_saved(path: Path, ranks: Sequence[int]) -> None:
    """Say what a written LoRA file holds; ``ranks`` are those of its modules."""
    span = f"rank {min(ranks)}" + (f" to {max(ranks)}" if min(ranks) < max(ranks) else "")
    say(f"saved {path}: {len(ranks)} modules, {span}, {path.stat().st_size / 1e6:.1f} MB")


def refuse_overflow(tensors: Mapping[str, torch.Tensor], save_precision: str) -> None:
    """Raises UserError when a number became infinite in the format it is saved in."""
    import torch

    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f'"{key}" holds numbers too large for {save_precision}; use --save_precision bf16 or float.'
            )
