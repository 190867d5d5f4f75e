"""NaN and infinity end a run before they reach the network, and never reach a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from library.errors import UserError

if TYPE_CHECKING:
    import torch

MOST_NAMES = 4
"""Images that a message names."""


class StepWatch:
    """Remembers which images the step in hand works on, so that a number that is not finite can be traced to them."""

    def __init__(self) -> None:
        self.images: list[str] = []

    def begin(self) -> None:
        """A new step begins."""
        self.images = []

    def add(self, images: Sequence[str]) -> None:
        """A micro-batch of this process with the images of these names."""
        self.images += images

    def require(self, finite: bool, what: str, step: int, first: bool) -> None:
        """Raises UserError unless ``finite``; ``what`` is e.g. ``the loss is nan``, ``step`` counts from 1."""
        if finite:
            return
        names = list(dict.fromkeys(self.images))
        shown = ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if names[MOST_NAMES:] else "")
        advice = (
            "before anything was trained: look for NaN in the model's files, or compute in another --mixed_precision"
            if first
            else "lower the learning rate, or set --max_grad_norm"
        )
        raise UserError(
            f"step {step}: {what}, with the images {shown}. The training ends before this update; {advice}."
        )


def gradient_norm(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """The norm of all gradients together, a scalar."""
    import torch

    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def not_finite(tensors: Mapping[str, Any], dtype: torch.dtype | None = None) -> list[str]:
    """The names of floating-point tensors that hold NaN or infinity, or would as ``dtype``."""
    import torch

    floating = {name: t for name, t in tensors.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    if not floating:
        return []
    flags = [(t if dtype is None else t.to(dtype)).float().isfinite().all() for t in floating.values()]
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    return [name for name, flag in zip(floating, finite) if not flag]


def require_finite(network: Any, where: object, dtype: torch.dtype | None = None) -> None:
    """Raises UserError when the network's weights are not finite (as ``dtype``), so that ``where`` is not written."""
    bad = not_finite(network.state_dict(), dtype)
    if bad:
        form = "" if dtype is None else f" as {str(dtype).removeprefix('torch.')}"
        raise UserError(
            f"{where} is not written: {len(bad)} of the network's tensors are not finite{form}, such as {bad[0]}; "
            "lower the learning rate."
        )
