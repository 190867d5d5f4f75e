"""Writing what a run has trained: the network's file and the state that it can be resumed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.console import say, warn
from library.errors import in_one_line
from library.training.output.attempts import write_at_any_cost, write_or_warn
from library.training.output.run_state import write_run_state
from library.training.report.timing import RunClock, timed

if TYPE_CHECKING:
    from library.training.output.file_metadata import FileMetadata
    from library.training.report.page import RunReport
    from library.training.run_facts import RunFacts

Attempt = Callable[[Callable[[Path], None], Path], "str | None"]
"""Lets a function write a path, and says what is wrong if that fails."""


class Saver:
    """Writes files and states of a run; in other processes than the main one it writes nothing.

    ``scaler``: the gradient scaler of fp16, whose state belongs to the run's, or None.
    """

    def __init__(
        self, run: RunFacts, metadata: FileMetadata, report: RunReport, clock: RunClock, scaler: Any = None
    ) -> None:
        self.run, self.metadata, self.report, self.clock, self.scaler = run, metadata, report, clock, scaler

    def save_due(self, path: Path, folder: Path, epoch: int) -> bool:
        """Write the network's file, and with ``--save_state`` the state ``folder``; returns whether both are there.

        What cannot be written, as on a full disk, is named in a warning: the run goes on to the next saving.
        """
        state = folder if self.run.options.saving.save_state else None
        return not self._try_saving(write_or_warn, path, state, epoch)

    def save_last(self, path: Path, folder: Path | None, epoch: int, wait: bool = False) -> bool:
        """As ``save_due``, for what is not saved again: what cannot be written is tried again, and then elsewhere.

        ``folder`` None: no state; ``wait`` for the upload. What is elsewhere is noted in ``outputs.problems``.
        """
        problems = self._try_saving(write_at_any_cost, path, folder, epoch, wait)
        self.run.outputs.problems += problems
        return not problems

    def remove_old(self, old: Sequence[Path], saved: bool) -> None:
        """Remove files and states that are due to go; ``saved``: whether those that replace them are there."""
        if self.run.is_main:
            self.run.outputs.files.remove_old(old, saved)

    @contextmanager
    def saving_on_error(self) -> Iterator[None]:
        """Around the loop: an error saves what was trained, as Ctrl-C does, before it goes on its way."""
        try:
            yield
        except Exception:
            progress, outputs = self.run.progress, self.run.outputs
            step = progress.step
            path = outputs.files.step_file(step)
            if step > progress.first_step and path not in outputs.written:
                warn(f"an error ends the training at step {step}; what it has trained is saved first")
                try:
                    progress.position = progress.resumable or progress.position
                    can_resume = self.run.options.saving.save_state and progress.resumable is not None
                    state = outputs.files.step_state(step) if can_resume else None
                    if self.save_last(path, state, progress.position.epoch) and state is not None:
                        say(f"continue from there with --resume {state}")
                except Exception as second:
                    warn(f"{path} could not be saved: {in_one_line(second)}")
            raise

    def _try_saving(
        self, attempt: Attempt, path: Path, folder: Path | None, epoch: int, wait: bool = False
    ) -> list[str]:
        optimization = self.run.optimization
        with optimization.evaluating():
            problems = [attempt(lambda place: self._save_network(place, epoch, wait), path)]
            if optimization.average is not None:
                with optimization.averaged():
                    beside = self.run.outputs.files.average_file(path)
                    problems.append(attempt(lambda place: self._save_network(place, epoch, wait, True), beside))
        if folder is not None:
            problems.append(attempt(self._save_state, folder))
        return [problem for problem in problems if problem]

    @timed("saving")
    def _save_network(self, path: Path, epoch: int, wait: bool, averaged: bool = False) -> None:
        if self.run.is_main:
            step = self.run.progress.step
            metadata = self.metadata.at(step, epoch, self.run.optimization.average if averaged else None)
            self.run.outputs.write_network(self.run.network, path, metadata, wait)
            self.report.add_file(path, step)

    @timed("saving")
    def _save_state(self, folder: Path) -> None:
        if self.run.is_main:
            run, scaler = self.run, self.scaler
            if run.outputs.write_state(run.network, folder, lambda path: write_run_state(run, path, scaler)):
                self.report.add_file(folder, run.progress.step)
