"""Frozen Linear layers whose weights lie in memory in another form than they compute in: what others know of them.

A storage format is a subclass that gives ``stored_weight`` and ``quantise``, and its own products if it has them.
LoRA modules and tools use this module only, so that none of them knows a format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class StoredWeight(Protocol):
    """A weight as it lies in memory, as a tensor or in another form."""

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""

    def to(self, dtype: torch.dtype, /) -> Tensor:
        """The weight [out, in] in ``dtype``."""


class StoredLinear(nn.Linear, ABC):
    """A frozen ``nn.Linear`` that reconstructs its weight for each product and frees it at once.

    Its tensors but the bias are buffers that no file holds: those named by ``bulk``, which take nearly all memory, and
    small ones. A product reads them when it is made, and nothing of them is kept for the backward pass: between two
    products, the bulk may lie elsewhere.
    """

    bulk: ClassVar[tuple[str, ...]] = ()
    """Names of the buffers that hold nearly all bytes of the weight."""
    compute_dtype: torch.dtype
    """The dtype of ``weight``; products are in their input's or autocast's."""

    @property
    @abstractmethod
    def stored_weight(self) -> Any:
        """The weight as it lies in memory, a ``StoredWeight`` whose tensors are named as the layer's buffers."""

    @property
    def format_name(self) -> str:
        """The name of the format, by default that of the dtype of its codes."""
        return str(getattr(self, self.bulk[0]).dtype).removeprefix("torch.")

    @abstractmethod
    def quantise(self, weight: Tensor) -> Any:
        """A tensor [out, in] in this layer's form, a ``StoredWeight``."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in] in ``compute_dtype``, made at each access; ``set_weight`` replaces it."""
        return self.dense(self.compute_dtype)

    @torch.no_grad()
    def set_weight(self, weight: Any) -> None:
        """Store another weight of the same shape: a tensor, or what ``stored_weight`` gave.

        Buffers keep their place in memory where the new ones have the same shape.
        """
        for name, new in _tensors(self.quantise(weight) if isinstance(weight, Tensor) else weight):
            own = getattr(self, name)
            if new.shape == own.shape and new.dtype == own.dtype:
                own.copy_(new)
            else:
                setattr(self, name, new.to(own.device))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in ``dtype``, in memory of its own."""
        return self.stored_weight.to(dtype)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b [..., out] of ``x`` [..., in], in the dtype of ``x`` (the bias's too) and memory of its own."""
        return F.linear(x, self.dense(x.dtype), bias)

    def matmul_t(self, grad: Tensor) -> Tensor:
        """grad W [..., in] of ``grad`` [..., out], in its dtype and memory of its own."""
        return grad @ self.dense(grad.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Linear``, in autocast's dtype where autocast is on."""
        is_autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype(x.device.type) if is_autocast else x.dtype
        return _FrozenProduct.apply(x, self, self.bias, dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves between devices move each buffer; a cast to another dtype leaves them as they are."""
        buffers = dict(self._buffers)
        self._buffers.clear()
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(buffers)
        for name, buffer in buffers.items():
            if buffer is not None:  # where fn leads is seen on a tensor of no size, wherever the others lie
                probe = fn(torch.empty(0, dtype=self.compute_dtype, device=buffer.device))
                self._buffers[name] = buffer.to(probe.device)
                self.compute_dtype = probe.dtype
        return self


def store(layer: nn.Linear, weight: Any, kind: type[StoredLinear], compute_dtype: torch.dtype) -> None:
    """Turn ``layer`` into a ``kind`` with ``weight``, in place, so that whoever holds the layer keeps it.

    ``weight`` is what ``stored_weight`` of that kind gives. Raises ValueError for a layer that is not exactly an
    ``nn.Linear``, or a weight of another shape.
    """
    if type(layer) is not nn.Linear:
        raise ValueError(f"a {type(layer).__name__} cannot be stored in another format")
    if weight.shape != layer.weight.shape:
        raise ValueError(f"the weight has the shape {tuple(weight.shape)}, the layer {tuple(layer.weight.shape)}")
    del layer.weight
    layer.__class__ = kind
    assert isinstance(layer, StoredLinear)
    layer.compute_dtype = compute_dtype
    for name, tensor in _tensors(weight):
        layer.register_buffer(name, tensor, persistent=False)


def _tensors(weight: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a stored weight, by the names that they have as buffers."""
    return [(name, value) for name, value in vars(weight).items() if isinstance(value, Tensor)]


class _FrozenProduct(torch.autograd.Function):
    """x W^T + b for a weight that is made for each product; only its stored form lives between the two passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: StoredLinear, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.layer, ctx.dtype, ctx.x_dtype = layer, dtype, x.dtype
        return layer.matmul(x.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.layer.matmul_t(grad.to(ctx.dtype)).to(ctx.x_dtype), None, None, None


def matmul(layer: nn.Linear, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``StoredLinear.matmul`` of a layer of any kind."""
    if isinstance(layer, StoredLinear):
        return layer.matmul(x, bias)
    return F.linear(x, _weight_as(layer, x.dtype), bias)


def matmul_t(layer: nn.Linear, grad: Tensor) -> Tensor:
    """``StoredLinear.matmul_t`` of a layer of any kind."""
    if isinstance(layer, StoredLinear):
        return layer.matmul_t(grad)
    return grad @ _weight_as(layer, grad.dtype)


def _weight_as(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    weight = layer.weight
    return weight if weight.dtype == dtype else weight.to(dtype)


def stored_weight(layer: nn.Linear | nn.Conv2d) -> StoredWeight:
    """A layer's weight as it lies in memory; ``.to(dtype)`` gives the numbers."""
    return layer.stored_weight if isinstance(layer, StoredLinear) else layer.weight


def write_weight(layer: nn.Linear | nn.Conv2d, weight: StoredWeight) -> None:
    """Replace a layer's weight, in the form in which the layer keeps it."""
    if isinstance(layer, StoredLinear):
        layer.set_weight(weight)
    else:
        assert isinstance(weight, Tensor)
        with torch.no_grad():
            layer.weight.copy_(weight)
