"""Options that several LoRA tools share, and the checks that come before any work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

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


@dataclass
class ModelMergeNumbers:
    """Numbers and metadata"""

    precision: Precision = "float"
    """Dtype that results are rounded to; sums are computed in at least float32 whatever it is."""
    save_precision: str | None = None
    """Dtype of the files: float, fp16, bf16, for models also fp8; unset: --precision, models keep theirs."""
    working_device: str = "cpu"
    """Device to compute on, such as cuda."""
    no_metadata: bool = False
    """Write only the metadata that is needed to use the file."""


@dataclass
class ExtractOptions:
    """Models and LoRA"""

    model_org: str | None = None
    """Original transformer: a file in any layout, one of its shards, or a Diffusers folder."""
    model_tuned: str | None = None
    """Transformer that was made from it; the LoRA leads from the original to this one."""
    save_to: str | None = None
    """File to write."""
    save_precision: Precision | None = None
    """Dtype of the file; unset means float."""
    dim: int = 4
    """Rank, where a layer is not smaller; alpha is the same."""
    device: str | None = None
    """Device to compute on, such as cuda; unset means the CPU."""
    clamp_quantile: float = 0.99
    """Cut off values of the result beyond this quantile; 1 cuts nothing off."""
    no_metadata: bool = False
    """Write only the metadata that is needed to use the file."""


@dataclass
class ConversionFiles:
    """Files"""

    src_path: str | None = None
    """LoRA file to convert."""
    dst_path: str | None = None
    """File to write."""
    save_precision: Precision | None = None
    """Dtype of the file; unset keeps that of each matrix."""
    no_metadata: bool = False
    """Write only the metadata that is needed to use the file."""


class ModelOption(NamedTuple):
    """A model that a command line names, and the file to write."""

    option: str
    path: str | None
    save_option: str
    save_to: str | None


def check_model_options(transformer: ModelOption, *encoders: ModelOption) -> None:
    """Raises UserError unless every model has a file to write, and every file of a text encoder a model."""
    for encoder in encoders:
        if bool(encoder.path) != bool(encoder.save_to):
            missing, given = (
                (encoder.save_option, encoder.option) if encoder.path else (encoder.option, encoder.save_option)
            )
            raise UserError(f"{given} needs {missing} too.")
    if not transformer.path and any(encoder.path for encoder in encoders) and transformer.save_to:
        raise UserError(
            f"{transformer.save_option} is for the merged transformer; give {transformer.option} too, or leave"
            f" {transformer.save_option} out."
        )
    if transformer.path and not transformer.save_to:
        raise UserError(f"{transformer.option} needs {transformer.save_option} too.")


def check_conversion(files: ConversionFiles) -> Path:
    """The file to write. Raises UserError unless both files are named and the second can be written."""
    if not files.src_path:
        raise UserError("--src_path needs the LoRA file to convert.")
    if not files.dst_path:
        raise UserError("--dst_path needs the name of the file to write.")
    return check_output(files.dst_path, [files.src_path], (".safetensors",), "--dst_path")


def check_extraction(options: ExtractOptions, models: str) -> Path:
    """The file to write. Raises UserError for what the options alone show to be wrong; ``models``: which are needed."""
    for value, option in ((options.model_org, "--model_org"), (options.model_tuned, "--model_tuned")):
        if not value:
            raise UserError(f"{option} needs a {models} transformer.")
    check_rank(options.dim, "--dim")
    check_clamp_quantile(options.clamp_quantile)
    return check_output(options.save_to, [options.model_org, options.model_tuned])


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
    """Raises UserError when a number became infinite in the dtype it is saved in, or is NaN or infinite itself."""
    import torch

    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor.float()).all()):
            if save_precision in ("float", "fp32", "float32") or bool(torch.isnan(tensor.float()).any()):
                raise UserError(
                    f'"{key}" holds NaN or infinity; a given LoRA file is damaged, or a ratio is far too large.'
                )
            raise UserError(
                f'"{key}" holds numbers too large for {save_precision}; use --save_precision bf16 or float.'
            )
