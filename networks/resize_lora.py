"""Make a LoRA file smaller by lowering its rank, for every module alike or by what each module needs."""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass, field
from typing import Literal

from library.console import ConsoleOptions, run_script, set_up_console, show
from library.devices import parse_dtype
from library.errors import UserError
from library.options import parse_options
from networks.lora_tools.options import Precision, check_output, check_rank, parse_device, refuse_overflow, tell_saved


@dataclass
class ResizeFiles:
    """Files"""

    model: str | None = None
    """LoRA file to resize."""
    save_to: str | None = None
    """File to write."""
    save_precision: Precision | None = None
    """Dtype of the new file; unset means float."""


@dataclass
class ResizeOptions:
    """Rank"""

    new_rank: int = 4
    """New rank; with --dynamic_method the largest that a module gets."""
    new_conv_rank: int | None = None
    """The same for convolutions, 1x1 included; unset means --new_rank."""
    dynamic_method: Literal["sv_ratio", "sv_fro", "sv_cumulative"] | None = None
    """Let each module's singular values choose its rank: by size, by norm or by sum; unset gives all --new_rank."""
    dynamic_param: float | None = None
    """sv_ratio: keep what is larger than the largest divided by this; sv_fro, sv_cumulative: share to keep, up to 1."""
    device: str | None = None
    """Device to compute on, such as cuda; unset means the CPU."""
    verbose: bool = False
    """Print each module's rank and what is kept of it."""


@dataclass
class ResizeLoraOptions:
    """Options of resize_lora.py"""

    files: ResizeFiles = field(default_factory=ResizeFiles)
    resize: ResizeOptions = field(default_factory=ResizeOptions)


def main(arguments: list[str] | None = None) -> None:
    """Read the options, check the file, resize."""
    options = parse_options(ResizeLoraOptions, __doc__ or "", arguments)
    set_up_console(ConsoleOptions())
    files, resize = options.files, options.resize
    check_resize(resize)
    if not files.model:
        raise UserError("--model needs the LoRA file to resize.")
    save_to = check_output(files.save_to, [files.model])
    from networks.adapters.lora_file import write_file
    from networks.lora_tools.named_lora import NamedLoRA
    from networks.lora_tools.resizing import NewRank, module_report, resized, resized_metadata, resized_tensors

    lora = NamedLoRA(files.model, "--model")
    new_rank = NewRank(
        resize.new_rank, resize.new_conv_rank or resize.new_rank, resize.dynamic_method, resize.dynamic_param or 0.0
    )
    modules = resized(lora, new_rank, parse_device(resize.device))
    if resize.verbose:
        show(module_report(modules))
    save_precision = files.save_precision or "float"
    tensors = resized_tensors(lora, modules, parse_dtype(save_precision))
    refuse_overflow(tensors, save_precision)
    write_file(save_to, tensors, resized_metadata(lora, modules, new_rank))
    tell_saved(save_to, [len(module.weights.down) for module in modules.values()])


def check_resize(options: ResizeOptions) -> None:
    """Raises UserError for ranks below 1, and for a method without its number or with one that it cannot have."""
    check_rank(options.new_rank, "--new_rank")
    check_rank(options.new_conv_rank, "--new_conv_rank")
    method, parameter = options.dynamic_method, options.dynamic_param
    if method is None:
        if parameter is not None:
            raise UserError("--dynamic_param has a meaning only with --dynamic_method.")
        return
    if parameter is None:
        raise UserError(f"--dynamic_method {method} needs --dynamic_param.")
    if method == "sv_ratio" and not parameter >= 1:
        raise UserError(f"--dynamic_param of sv_ratio must be at least 1, not {parameter:g}.")
    if method != "sv_ratio" and not 0 < parameter <= 1:
        raise UserError(f"--dynamic_param of {method} must be above 0 and at most 1, not {parameter:g}.")


if __name__ == "__main__":
    run_script(main)
