"""The arithmetic of a low-rank addition: y = W x + b + scale * up (mask * (down x)), and norms of up @ down.

Matrices: ``down`` [rank, in], ``up`` [out, rank]. Nothing of the size [out, in] is ever made here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.memory.stored_linear import matmul, matmul_t


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of ``x`` runs: autocast's where it is on (it leaves float64 alone)."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which takes ten times as long where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale * (a @ b)`` in one kernel, so that a small scale acts before float16 could overflow."""
    return a.new_empty((a.shape[0], b.shape[1])).addmm_(a, b, beta=0, alpha=scale)


class _LinearPlusLowRank(torch.autograd.Function):
    """A frozen Linear and its low-rank addition as one operation on ``x`` [..., in].

    Composed of single operations, the addition costs several passes over tensors of the output's size and one over the
    input's gradient. Here both are accumulated inside the matrix product that computes them (BLAS beta = 1), ``x`` is
    cast once for both products, and frozen weights that are stored in another dtype are cast again in the backward
    pass instead of being kept. ``x`` is kept only where ``down`` is trained.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        mask: Tensor | None,
        linear: nn.Linear,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        bias, shape = linear.bias, x.shape
        rows = as_dtype(x.reshape(-1, shape[-1]), dtype)
        down_cast, up_cast = as_dtype(down, dtype), as_dtype(up, dtype)
        y = matmul(linear, rows, None if bias is None else as_dtype(bias, dtype))
        hidden = F.linear(rows, down_cast)
        if mask is not None:
            hidden = hidden * mask
        y.addmm_(hidden, up_cast.t(), alpha=scale)
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, down_cast, up_cast, hidden, mask)
        # Kept as an object: block swapping may have moved its weight, and moves it back before the backward pass.
        ctx.linear = linear
        ctx.scale, ctx.shape, ctx.dtypes = scale, shape, (dtype, x.dtype, down.dtype, up.dtype)
        # The result of a custom operation must not be a view, or nobody could work on it in place.
        return torch.ops.aten._unsafe_view.default(y, (*shape[:-1], y.shape[-1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # what once_differentiable is for, at a tenth of its cost
            raise RuntimeError("a LoRA module has no second derivative")
        rows, down, up, hidden, mask = ctx.saved_tensors
        dtype, x_dtype, down_dtype, up_dtype = ctx.dtypes
        needs_x, needs_down, needs_up = ctx.needs_input_grad[:3]
        grad = as_dtype(grad.reshape(-1, grad.shape[-1]), dtype)
        grad_x = grad_down = grad_up = None
        if needs_x or needs_down:
            grad_hidden = scaled_product(grad, up, ctx.scale)
            if mask is not None:
                grad_hidden = grad_hidden * mask
        if needs_x:
            grad_x = matmul_t(ctx.linear, grad)
            grad_x = as_dtype(grad_x.addmm_(grad_hidden, down), x_dtype).view(ctx.shape)
        if needs_down:
            grad_down = as_dtype(grad_hidden.t().mm(rows), down_dtype)
        if needs_up:
            grad_up = as_dtype(scaled_product(hidden.t(), grad, ctx.scale).t(), up_dtype)
        return grad_x, grad_down, grad_up, None, None, None, None


def linear_plus_low_rank(
    linear: nn.Linear, x: Tensor, down: Tensor, up: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """``linear(x) + scale * ((x @ down.T) * mask) @ up.T`` for a frozen ``linear`` with unscaled weights of any dtype.

    ``x`` [..., in]; ``mask`` [..., rank] with ``x``'s leading dimensions. Computes and returns [..., out] in autocast's
    dtype where autocast is on, else in ``x``'s. Gradients reach ``x``, ``down`` and ``up`` in their own dtypes.
    """
    dtype = compute_dtype(x)
    if mask is not None:
        mask = mask.to(dtype).reshape(-1, mask.shape[-1])
    return _LinearPlusLowRank.apply(x, down, up, mask, linear, scale, dtype)


def add_low_rank(y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """``y + scale * ((x @ down.T) * mask) @ up.T`` for a ``y`` [..., out] from a layer of any kind."""
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):  # a float32 y must stay float32
        hidden = x.to(dtype).reshape(-1, x.shape[-1]) @ down.to(dtype).t()
        if mask is not None:
            hidden = hidden * mask.to(dtype).reshape(-1, mask.shape[-1])
        rows = y.reshape(-1, y.shape[-1])
        return torch.addmm(rows, hidden.to(y.dtype), up.to(y.dtype).t(), alpha=scale).view(y.shape)


def _product_squares(down: Tensor, up: Tensor) -> Tensor:
    """The squared norms [out] of the rows of ``up @ down``: u_i (D D^T) u_i^T, in float32 at least.

    Errors are relative to |U|^2 |D|^2: enough for a limit or a noise level, at a cost that a step does not notice.
    """
    dtype = torch.promote_types(down.dtype, torch.float32)
    down, up = down.to(dtype), up.to(dtype)
    return ((up @ (down @ down.t())) * up).sum(dim=1).clamp_min(0)


def product_norm(down: Tensor, up: Tensor) -> Tensor:
    """The Frobenius norm of ``up @ down`` (0-dim)."""
    return _product_squares(down, up).sum().sqrt()


def product_row_norms(down: Tensor, up: Tensor) -> Tensor:
    """The norms [out] of the rows of ``up @ down``."""
    return _product_squares(down, up).sqrt()


def gradient_row_norms(down: Tensor, up: Tensor, grad_down: Tensor, grad_up: Tensor) -> Tensor:
    """The norms [out] of the rows of ``up @ grad_down + grad_up @ down``, the first-order change of ``up @ down``."""
    return product_row_norms(torch.cat([grad_down, down]), torch.cat([up, grad_up], dim=1))
