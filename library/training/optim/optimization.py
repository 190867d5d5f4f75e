"""The optimizer of a run with its schedule: from gradients to new weights."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.training.distribution import average_gradients
from library.training.finiteness import gradient_norm
from library.training.network.contract import optimizer_groups
from library.training.optim.ema import MovingAverage
from library.training.optim.lr_schedulers import LRSchedulerOptions, create_lr_scheduler, step_scheduler
from library.training.optim.optimizers import (
    FusedBackward,
    OptimizerOptions,
    create_optimizer,
    has_eval_mode,
    set_eval_mode,
    set_train_mode,
)

if TYPE_CHECKING:
    import torch


class Optimization:
    """Everything that changes a network's parameters."""

    def __init__(
        self, network: Any, accelerator: Any, options: OptimizerOptions, schedule: LRSchedulerOptions, max_steps: int
    ) -> None:
        """Raises UserError for options that this network or this optimizer cannot be trained with."""
        self.network, self.accelerator, self.options = network, accelerator, options
        groups, self.group_names = optimizer_groups(
            network, options.text_encoder_lr, options.unet_lr, options.learning_rate
        )
        self.created = create_optimizer(options, groups, schedule.lr_scheduler)
        self.optimizer = accelerator.prepare_optimizer(self.created.optimizer, device_placement=False)
        self.fused = FusedBackward(self.optimizer, options.max_grad_norm) if options.fused_backward_pass else None
        """With it the updates happen during the backward pass."""
        if self.fused and getattr(network, "weight_norms", lambda: None)() is not None:
            raise UserError("ggpo_sigma and ggpo_beta need all gradients at once; leave out --fused_backward_pass.")
        self.scheduler = create_lr_scheduler(schedule, self.created, max_steps)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if options.ema_decay is not None and has_eval_mode(self.created.optimizer):
            raise UserError(f"--ema_decay: {self.created.name} averages the weights itself; leave it out.")
        self.average = None if options.ema_decay is None else MovingAverage(self.parameters, options.ema_decay)
        """The average of the weights, with ``--ema_decay``."""

    def clip_gradients(self) -> torch.Tensor | None:
        """Average the gradients over the processes and clip them; returns their norm before that, a scalar.

        None with a gradient scaler, which passes over steps whose scaled gradients overflow.
        """
        import torch

        average_gradients(self.parameters, self.accelerator)
        self.accelerator.unscale_gradients(self.optimizer)
        limit = self.options.max_grad_norm
        clipped = torch.nn.utils.clip_grad_norm_(self.parameters, limit) if limit > 0 else None
        if self.accelerator.scaler is not None:
            return None
        return gradient_norm(self.parameters) if clipped is None else clipped

    def step(self) -> None:
        """Update the weights with the gradients, and forget these."""
        for name in ("update_grad_norms", "update_norms"):
            if hasattr(self.network, name):
                getattr(self.network, name)()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def update_average(self) -> None:
        """Take the weights that a step has led to into their average, if there is one."""
        if self.average is not None and not getattr(self.optimizer, "step_was_skipped", False):
            self.average.update()

    def leave_out(self) -> None:
        """Forget the gradients without an update."""
        # torch warns of a schedule whose first step comes before any update.
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before", UserWarning)
        if self.accelerator.scaler is not None:  # it has looked at the gradients, and waits for the end of the step
            self.accelerator.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def step_schedule(self, average_loss: float) -> None:
        """Take the learning rates of the next step."""
        step_scheduler(self.scheduler, average_loss)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The network with the average of its weights, if there is one."""
        with contextlib.nullcontext() if self.average is None else self.average.in_place():
            yield

    @contextlib.contextmanager
    def evaluating(self, exact: bool = False) -> Iterator[None]:
        """The network and its optimizer as they are saved; training mode comes back afterwards.

        An optimizer with an evaluation mode computes its training weights back, with rounding. A state that is saved
        holds them so; what is drawn after it comes with ``exact``, which leaves them to the bit.
        """
        import torch

        kept = [p.detach().clone() for p in self.parameters] if exact and has_eval_mode(self.created.optimizer) else []
        self.network.eval()
        set_eval_mode(self.optimizer)
        try:
            with torch.no_grad():
                yield
        finally:
            set_train_mode(self.optimizer)
            self.network.train()
            with torch.no_grad():
                for parameter, values in zip(self.parameters, kept):
                    parameter.copy_(values)
