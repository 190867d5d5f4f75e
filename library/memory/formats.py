"""Weights brought into the storage format that a description names: the one place that knows every format."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from library.memory import fp8_compute, nf4, scaled
from library.memory.storage import Storage
from library.memory.stored_linear import StoredLinear, StoredWeight, store


def quantise(weight: Tensor, storage: Storage) -> StoredWeight:
    """``weight`` [out, in] in the format. Raises ValueError where values are not finite."""
    if storage.kind == "nf4":
        return nf4.quantise(weight)
    if storage.kind == "int8":
        return scaled.quantise(weight, torch.int8, "channel")
    return scaled.quantise(weight, scaled.FP8, storage.granularity)


def empty(shape: tuple[int, ...], storage: Storage, device: torch.device | str) -> StoredWeight:
    """What ``quantise`` would give for a weight of that shape, with undefined values."""
    if storage.kind == "nf4":
        return nf4.empty_nf4(shape, device)
    if storage.kind == "int8":
        return scaled.empty_scaled(shape, device, torch.int8, "channel")
    return scaled.empty_scaled(shape, device, scaled.FP8, storage.granularity)


def stored_bytes(shape: tuple[int, ...], storage: Storage, with_scales: bool) -> int:
    """Bytes of a weight of that shape in the format."""
    kind = nf4.Nf4Linear if storage.kind == "nf4" else scaled.ScaledLinear
    weight = empty(shape, storage, "meta")
    names = vars(weight) if with_scales else kind.bulk
    return sum(part.nbytes for name in names if isinstance(part := getattr(weight, name), Tensor))


def store_as(layer: nn.Linear, weight: StoredWeight, storage: Storage, compute_dtype: torch.dtype) -> None:
    """Turn ``layer`` into one that keeps ``weight``, which is in the format; see ``store``."""
    kind: type[StoredLinear] = fp8_compute.FastScaledLinear if storage.fast else scaled.ScaledLinear
    store(layer, weight, nf4.Nf4Linear if storage.kind == "nf4" else kind, compute_dtype)


def require(storage: Storage, device: torch.device) -> None:
    """Raises UserError where the device cannot work with the format."""
    if storage.kind == "nf4":
        nf4.require_nf4(device)
    if storage.fast:
        fp8_compute.require_fp8_products(device)
