"""NaN and infinity end a run before they reach the network, and never reach a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from library.console import warn
from library.errors import UserError
from library.training.distribution import mean_over_processes

if TYPE_CHECKING:
    import torch

    from library.training.progress import Progress

MOST_NAMES = 4
"""Images that a message names."""


@dataclass
class NonfiniteOptions:
    """Numbers that are not finite"""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When a step's loss or gradients are NaN or infinite: end the run, or go on without this step's update."""
    max_nonfinite_steps: int = 20
    """With --on_nonfinite skip: most steps of the run whose updates are left out; one more ends it."""


def check_nonfinite_options(options: NonfiniteOptions) -> None:
    """Raises UserError for a negative limit."""
    if options.max_nonfinite_steps < 0:
        raise UserError(f"--max_nonfinite_steps must not be negative, but is {options.max_nonfinite_steps}.")


@dataclass(frozen=True)
class StepNumbers:
    """What a step's losses and gradients came to, the same in every process."""

    losses: Sequence[float]
    """Of each micro-batch, the mean over all processes."""
    problem: str = ""
    """What is not finite, e.g. ``the loss is nan``; empty: nothing, so that the update may follow."""


class StepWatch:
    """The losses of the step in hand, and the images that they came from.

    Losses stay on the device until the step's last micro-batch: the program waits for the device once a step, before
    the update, which a number that is not finite prevents.
    """

    def __init__(self, options: NonfiniteOptions) -> None:
        self.options = options
        self.begin()

    def begin(self) -> None:
        """A new step begins."""
        self.losses: list[torch.Tensor] = []
        self.images: list[Sequence[str]] = []
        self.values: list[float] = []
        """The losses, if they were read."""
        self.own: list[float] = []
        """Those of this process alone."""

    def add(self, loss: torch.Tensor, images: Sequence[str]) -> None:
        """A micro-batch of this process: its loss, a scalar, and the names of its images."""
        self.losses.append(loss.detach())
        self.images.append(images)

    def read(self, norm: torch.Tensor | None, accelerator: Any) -> StepNumbers:
        """The losses, and what is not finite in them or in ``norm``, that of the step's gradients."""
        import torch

        if norm is not None or not self.values:
            own = torch.stack(self.losses)
            norms = [] if norm is None else [norm.reshape(1).to(own)]
            count = len(own)
            read = torch.cat([mean_over_processes(own, accelerator), own, *norms]).tolist()
            self.values, self.own, rest = read[:count], read[count : 2 * count], read[2 * count :]
            bad_norm = [value for value in rest if not math.isfinite(value)]
        else:
            bad_norm = []
        bad_losses = [value for value in self.values if not math.isfinite(value)]
        if bad_losses:
            return StepNumbers(self.values, f"the loss is {bad_losses[0]}")
        return StepNumbers(self.values, f"the gradients' norm is {bad_norm[0]}" if bad_norm else "")

    def leave_out(self, problem: str, progress: Progress) -> None:
        """Say that the update of the step in hand is left out because of ``problem``, and count it.

        Raises UserError where the run has to end: without ``--on_nonfinite skip``, and when
        ``--max_nonfinite_steps`` updates were left out already.
        """
        what = f"step {progress.step + 1}: {problem}, {self._place()}"
        skips, most = self.options.on_nonfinite == "skip", self.options.max_nonfinite_steps
        if skips and progress.left_out < most:
            progress.left_out += 1
            warn(f"{what}. Its update is left out ({progress.left_out} of at most {most}).")
            return
        first = not progress.has_updated
        advice = (
            "before anything was trained: look for NaN in the model's files, or compute in another --mixed_precision"
            if first
            else "lower the learning rate, or set --max_grad_norm"
        )
        count = f", because {progress.left_out} were left out already (--max_nonfinite_steps)" if skips else ""
        or_skip = "" if skips or first else "; --on_nonfinite skip continues without such updates"
        raise UserError(f"{what}. The training ends before this update{count}; {advice}{or_skip}.")

    def _place(self) -> str:
        """The images of this process that the step was computed from, those of bad losses if there are any."""
        bad = [images for images, loss in zip(self.images, self.own) if not math.isfinite(loss)]
        if not bad and any(not math.isfinite(value) for value in self.values):
            return "in another process"
        names = list(dict.fromkeys(name for images in bad or self.images for name in images))
        more = f" and {len(names) - MOST_NAMES} more" if names[MOST_NAMES:] else ""
        return f"with the images {', '.join(names[:MOST_NAMES])}{more}"


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
