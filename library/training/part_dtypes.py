"""In which dtype each part of the base model is kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from library.devices import parse_dtype
from library.training.run_options import ModelOptions, PrecisionOptions

if TYPE_CHECKING:
    import torch

    from library.memory.storage import Storage


def part_dtypes(
    model: ModelOptions, precision: PrecisionOptions, compute: torch.dtype, denoiser: str, encoders: Iterable[str]
) -> dict[Any, Any]:
    """The dtypes of parts that are not kept in ``compute``; ``denoiser`` is the part that is trained."""
    from library.memory.storage import BlocksStoredAs

    dtypes: dict[Any, Any] = {"autoencoder": parse_dtype("fp32")} if model.no_half_vae else {}
    storage = denoiser_storage(precision)
    if storage is not None:
        dtypes[denoiser] = BlocksStoredAs(compute, storage)
    if precision.fp8_base and not precision.fp8_base_unet:
        dtypes |= {encoder: BlocksStoredAs(compute) for encoder in encoders}
    return dtypes


def denoiser_storage(precision: PrecisionOptions) -> Storage | None:
    """How the weights of the denoiser's blocks are stored; None as tensors."""
    from library.memory.storage import Storage

    if precision.base_format is not None:
        return Storage(precision.base_format)
    if precision.fp8_scaled:
        granularity = precision.fp8_scaled_granularity or ("tensor" if precision.fp8_fast else "block")
        return Storage("fp8", granularity, precision.fp8_fast)
    if precision.fp8_base or precision.fp8_base_unet:
        return Storage("fp8", fast=precision.fp8_fast)
    return None
