"""How many epochs and steps a run has, and where it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from library.errors import UserError
from library.training.output.state import Position, ResumeOptions
from library.training.run_options import LengthOptions


@dataclass(frozen=True)
class RunPlan:
    """The arithmetic of a run. A step is one optimizer update; the last one of an epoch may average fewer batches."""

    batches_per_epoch: int
    """Micro-batches of one process in an epoch."""
    accumulation: int
    """Micro-batches averaged for one step."""
    max_steps: int
    """Steps when the run ends."""
    earlier_epochs: int = 0
    """Finished epochs that had another number of steps, when a run goes on with other processes."""
    earlier_steps: int = 0
    """The steps until the epoch after them starts over."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer updates in an epoch."""
        return math.ceil(self.batches_per_epoch / self.accumulation)

    @property
    def epochs(self) -> int:
        """Epochs begun when the run ends."""
        return self.earlier_epochs + math.ceil((self.max_steps - self.earlier_steps) / self.steps_per_epoch)

    def batches_in_step(self, batch: int) -> int:
        """How many micro-batches are averaged in the step that micro-batch ``batch`` of an epoch belongs to."""
        first = batch - batch % self.accumulation
        return min(self.accumulation, self.batches_per_epoch - first)

    def ends_step(self, batch: int) -> bool:
        """Whether micro-batch ``batch`` of an epoch is the last one of its step."""
        return (batch + 1) % self.accumulation == 0 or batch + 1 == self.batches_per_epoch

    def position_of(self, step: int) -> Position:
        """Where an uninterrupted run stands when ``step`` updates are done."""
        epoch, steps = divmod(step, self.steps_per_epoch)
        return Position(epoch, steps * self.accumulation, step)


def check_lengths(options: LengthOptions) -> None:
    """Raises UserError for lengths below 1."""
    for name in ("max_train_steps", "max_train_epochs", "gradient_accumulation_steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}.")


def plan_run(options: LengthOptions, batches_per_epoch: int, earlier: Position | None = None) -> RunPlan:
    """The plan of a run over a data set of ``batches_per_epoch`` micro-batches for each process.

    ``earlier``: where the run stood when its epochs had another number of steps; that epoch starts over.
    """
    done = earlier or Position()
    plan = RunPlan(
        batches_per_epoch, options.gradient_accumulation_steps, options.max_train_steps, done.epoch, done.step
    )
    if options.max_train_epochs is not None:
        plan = replace(plan, max_steps=done.step + (options.max_train_epochs - done.epoch) * plan.steps_per_epoch)
    return plan


def start_position(
    plan: RunPlan, options: ResumeOptions, saved: Position | None, same_data: bool, may_be_done: bool = False
) -> Position:
    """Where the run begins.

    ``--initial_step``, then ``--initial_epoch``, count steps as done; with ``--skip_until_initial_step`` their data is
    passed over, otherwise the epoch that holds the first new step begins with its first batch. Without them a state's
    own position (``saved``) counts; if the data has changed since (``same_data`` false) its epoch is restarted.
    Raises UserError when nothing is left to train; with ``may_be_done``, the position may be that of the last step.
    """
    if options.skip_until_initial_step and not (options.initial_step or options.initial_epoch or saved):
        raise UserError("--skip_until_initial_step needs --initial_step or --initial_epoch.")
    if options.initial_step is not None or options.initial_epoch is not None:
        step = options.initial_step
        if step is None:
            step = ((options.initial_epoch or 1) - 1) * plan.steps_per_epoch
        if step < 0:
            raise UserError("--initial_step must not be negative and --initial_epoch must be at least 1.")
        position = plan.position_of(step)
        if not options.skip_until_initial_step:
            position.batch = 0
    elif saved is not None:
        position = Position(saved.epoch, saved.batch if same_data else 0, saved.step)
    else:
        position = Position()
    if position.step > plan.max_steps or (position.step == plan.max_steps and not may_be_done):
        raise UserError(
            f"The run starts at step {position.step} and ends at step {plan.max_steps}: nothing is left to train; "
            "raise --max_train_steps or --max_train_epochs."
        )
    return position
