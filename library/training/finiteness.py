"""NaN and infinity end a run before they reach the network, and never reach a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.training.distribution import mean_over_processes

if TYPE_CHECKING:
    import torch

MOST_NAMES = 4
"""Images that a message names."""


class StepWatch:
    """The losses of the step in hand, and the images that they came from.

    Losses stay on the device until the step's last micro-batch: the program waits for the device once a step, before
    the update, which a number that is not finite prevents.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A new step begins."""
        self.losses: list[torch.Tensor] = []
        self.images: list[Sequence[str]] = []
        self.values: list[float] = []
        """The losses, if they were read."""

    def add(self, loss: torch.Tensor, images: Sequence[str]) -> None:
        """A micro-batch of this process: its loss, a scalar, and the names of its images."""
        self.losses.append(loss.detach())
        self.images.append(images)

    def read(self, norm: torch.Tensor | None, accelerator: Any, step: int, first: bool) -> list[float]:
        """The loss of each micro-batch, the mean over all processes; ``norm`` is that of the step's gradients.

        Raises UserError when one of these numbers is not finite. ``step`` counts from 1; ``first``: nothing was trained
        before it.
        """
        import torch

        if norm is None and self.values:
            return self.values
        losses = mean_over_processes(torch.stack(self.losses), accelerator)
        norms = [] if norm is None else [norm.reshape(1).to(losses)]
        *values, last = torch.cat([losses, *norms]).tolist()
        self.values = values if norms else [*values, last]
        for number, value in enumerate(self.values, 1):
            self.require(math.isfinite(value), f"the loss is {value}", step, first, number)
        if norms:
            self.require(math.isfinite(last), f"the gradients' norm is {last}", step, first)
        return self.values

    def require(self, finite: bool, what: str, step: int, first: bool, batches: int | None = None) -> None:
        """Raises UserError unless ``finite``; ``what`` is e.g. ``the loss is nan``, ``step`` counts from 1.

        The images are those of the first ``batches`` micro-batches of this process, or of all.
        """
        if finite:
            return
        names = list(dict.fromkeys(name for images in self.images[:batches] for name in images))
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
