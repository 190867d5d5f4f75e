"""What is due between the steps of a run: files and states, then sample images and validation losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from library.console import say
from library.training import validation
from library.training.distribution import of_main_process
from library.training.interruption import Interruption
from library.training.output.state import Position

if TYPE_CHECKING:
    from library.training.evaluation import Evaluation
    from library.training.output.saver import Saver
    from library.training.report.page import RunReport
    from library.training.run_facts import RunFacts
    from library.training.tracking import Tracker


class Milestones:
    """Does what is due at the start, after a step and after an epoch; a due file comes before a due image."""

    def __init__(
        self,
        run: RunFacts,
        saver: Saver,
        evaluation: Evaluation,
        report: RunReport,
        tracker: Tracker,
        accelerator: Any,
    ) -> None:
        self.run, self.saver, self.evaluation = run, saver, evaluation
        self.report, self.tracker, self.accelerator = report, tracker, accelerator

    def at_start(self) -> None:
        """The samples of ``--sample_at_first``, and the validation loss that step validations are compared with.

        A run that goes on does instead what was due at its state and was cut off.
        """
        run = self.run
        if run.progress.step > 0:
            return self.catch_up()
        due_samples = run.outputs.samples.due_at_start()
        due_validation = run.data.validation is not None and run.options.validation.validate_every_n_steps
        if not (due_samples or due_validation):
            return
        with run.optimization.evaluating(), run.optimization.averaged():
            if due_samples:
                self.evaluation.draw_samples(0, 0)
            if due_validation:
                self.evaluation.validate("step", 0)

    def catch_up(self) -> None:
        """What the resumed run was to do after it had saved the state: remove old files, draw."""
        progress, files, samples = self.run.progress, self.run.outputs.files, self.run.outputs.samples
        step = progress.step
        epoch = progress.position.epoch if progress.position.batch == 0 else None
        if files.step_is_due(step):
            self.saver.remove_old(files.old_after_step(step), files.step_file(step).exists())
        if epoch is not None and files.epoch_is_due(epoch, self.run.plan.epochs):
            self.saver.remove_old(files.old_after_epoch(epoch), files.epoch_file(epoch).exists())
        moments: list[tuple[int, int | None]] = [(step, None)] if samples.due_after_step(step) else []
        moments += [(step, epoch)] if epoch is not None and samples.due_after_epoch(epoch) else []
        missing = [moment for moment in moments if len(samples.images(*moment)) < len(samples.prompts)]
        for moment in of_main_process(missing):
            with self.run.optimization.evaluating(exact=True), self.run.optimization.averaged():
                self.evaluation.draw_samples(*moment)

    def after_step(self, interruption: Interruption) -> None:
        """What is due after an optimizer step: files, then samples and validation, and a wish to end."""
        run, progress, files, step = self.run, self.run.progress, self.run.outputs.files, self.run.progress.step
        if interruption.wished(self.accelerator) and step < run.plan.max_steps:
            progress.ended_by = interruption.reason or "asked by another process"
        due_samples = run.outputs.samples.due_after_step(step)
        due_file = files.step_is_due(step) or bool(progress.ended_by)
        due_validation = bool(run.data.validation) and validation.due_after_step(run.options.validation, step)
        if not (due_samples or due_file or due_validation):
            return
        if due_file:
            save = self.saver.save_last if progress.ended_by else self.saver.save_due
            saved = save(files.step_file(step), files.step_state(step), progress.position.epoch)
            self.saver.remove_old(files.old_after_step(step), saved)
        if due_samples or due_validation:
            with run.optimization.evaluating(exact=due_file), run.optimization.averaged():
                if due_samples:
                    self.evaluation.draw_samples(step, None)
                if due_validation:
                    self.evaluation.validate("step", step)
        if progress.ended_by:
            say(f"ended at step {step}: {progress.ended_by}")
            self.report.end("interrupted", interruption.reason or "")
        else:
            self.report.write()

    def after_epoch(self, epoch: int) -> None:
        """What is due at the end of an epoch (or of the run inside one): files, then validation and samples."""
        run, progress, files, number = self.run, self.run.progress, self.run.outputs.files, epoch + 1
        if progress.position.batch >= run.plan.batches_per_epoch:
            progress.position = Position(number, 0, progress.step)
            if progress.resumable is not None:
                progress.mark_resumable()
        average = progress.record.average
        self.report.add_epoch_average(progress.step, average)
        self.tracker.log({"loss/epoch_average": average}, number, epoch=number, global_step=progress.step)
        due_validation = bool(run.data.validation) and validation.due_after_epoch(run.options.validation, number)
        due_file = files.epoch_is_due(number, run.plan.epochs)
        due_samples = run.outputs.samples.due_after_epoch(number)
        if not (due_validation or due_file or due_samples):
            return
        if due_file:
            saved = self.saver.save_due(files.epoch_file(number), files.epoch_state(number), number)
            self.saver.remove_old(files.old_after_epoch(number), saved)
        if due_samples or due_validation:
            with run.optimization.evaluating(exact=due_file), run.optimization.averaged():
                if due_validation:
                    self.evaluation.validate("epoch", number)
                if due_samples:
                    self.evaluation.draw_samples(progress.step, number)
        self.report.write()
