"""Names of dtypes, and the device that work runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from library.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

DTYPE_NAMES = {
    "float": "float32",
    "fp32": "float32",
    "float32": "float32",
    "fp16": "float16",
    "float16": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3fn": "float8_e4m3fn",
    "float8_e4m3fn": "float8_e4m3fn",
    "fp8_e4m3fnuz": "float8_e4m3fnuz",
    "float8_e4m3fnuz": "float8_e4m3fnuz",
    "fp8_e5m2": "float8_e5m2",
    "float8_e5m2": "float8_e5m2",
    "fp8_e5m2fnuz": "float8_e5m2fnuz",
    "float8_e5m2fnuz": "float8_e5m2fnuz",
}


def parse_dtype(name: str, option: str = "") -> torch.dtype:
    """The torch dtype of a name such as ``bf16`` or ``fp8``. Raises UserError that lists the known names."""
    import torch

    known = DTYPE_NAMES.get(name.lower().removeprefix("torch."))
    if known is None:
        prefix = f"{option}: " if option else ""
        raise UserError(
            f'{prefix}"{name}" is not a dtype; known are {", ".join(DTYPE_NAMES)}.{did_you_mean(name, DTYPE_NAMES)}'
        )
    return getattr(torch, known)


def is_fp8(dtype: torch.dtype | None) -> bool:
    """Whether ``dtype`` is an 8-bit floating-point format: for storage only, torch cannot compute in it."""
    return dtype is not None and dtype.itemsize == 1 and dtype.is_floating_point


def default_device() -> torch.device:
    """The accelerator where there is one (CUDA, ROCm, Apple, XPU), else the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")


def named_device(name: str, option: str = "--device") -> torch.device:
    """The device of that name. Raises UserError for one that this machine does not have."""
    import torch

    problem = f'{option}: "{name}" is not a device of this machine'
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f'{problem}; "cpu" always is.') from None
    try:
        probe = torch.ones((), device=device)
        float(probe)  # "meta" and the like hold no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises each of them
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f'{problem} ({reason}); "cpu" always is.') from None
    return probe.device


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``tensor.to(device, dtype)``; the program does not wait for a copy from system RAM to a GPU."""
    import torch

    if dtype is not None:
        tensor = tensor.to(dtype)  # before the copy, as torch does
    if device.type == "cuda" and type(tensor) is torch.Tensor and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def place(module: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
    """``module.to(device, dtype)``, also for the simulation's tensors, which torch cannot move."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    parameters = {id(parameter): parameter for parameter in module.parameters()}
    if not any(isinstance(parameter, FakeTensor) for parameter in parameters.values()):
        module.to(device, dtype=dtype)
        return
    placed = {
        key: torch.nn.Parameter(parameter.detach().to(device, dtype), parameter.requires_grad)
        for key, parameter in parameters.items()
    }
    for part in module.modules():
        for name, own in part._parameters.items():
            if own is not None:
                part._parameters[name] = placed[id(own)]


def empty_cache(device: torch.device | None = None) -> None:
    """Give unused memory back: unreachable objects first, then what the accelerator's allocator holds."""
    import gc

    import torch

    gc.collect()
    device = device or default_device()
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


def move_module(module: Any, *target: Any, **settings: Any) -> Any:
    """``module`` itself after ``nn.Module.to`` with these arguments.

    diffusers' models have a ``to`` of their own, which imports every quantizer, for seconds, to see that none is used.
    """
    from torch import nn

    return nn.Module.to(module, *target, **settings)
