"""The loop: epochs of micro-batches, of which every ``--gradient_accumulation_steps`` end in an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from library.console import messages_above_progress, warn
from library.data.loader import BatchLoader
from library.randomness import seed_global_torch
from library.training.finiteness import StepNumbers, StepWatch
from library.training.interruption import Interruption
from library.training.objective.losses import batch_loss
from library.training.objective.step_inputs import ItemDraws
from library.training.report.timing import RunClock
from library.training.spilling import SpillWatch, used_share
from library.training.tracking import learning_rate_scalars, norm_scalars

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.batch import Batch
    from library.training.milestones import Milestones
    from library.training.report.page import RunReport
    from library.training.run_facts import RunFacts
    from library.training.step_loss import StepLoss
    from library.training.tracking import Tracker


class TrainingLoop:
    """Trains from the run's position to its last step, or until someone wishes to end."""

    def __init__(
        self,
        run: RunFacts,
        step_loss: StepLoss,
        milestones: Milestones,
        text_encoders: Any,
        accelerator: Any,
        report: RunReport,
        tracker: Tracker,
        clock: RunClock,
    ) -> None:
        self.run, self.step_loss, self.milestones, self.text_encoders = run, step_loss, milestones, text_encoders
        self.accelerator, self.report, self.tracker, self.clock = accelerator, report, tracker, clock
        self.plan, self.progress, self.network, self.optimization = (
            run.plan,
            run.progress,
            run.network,
            run.optimization,
        )
        self.step_watch = StepWatch(run.options.nonfinite)
        self.spill_watch = SpillWatch(lambda: used_share(run.device))
        self.norms: Any = None
        """What ``--scale_weight_norms`` last found."""

    def train(self, interruption: Interruption) -> None:
        """Train the epochs that are left."""
        from tqdm import tqdm

        progress = self.progress
        self.bar = tqdm(
            total=self.plan.max_steps,
            initial=progress.step,
            disable=not self.accelerator.is_local_main_process,
            smoothing=0.1,
            desc="steps",
            ascii=True,
        )
        with self.batch_loader() as loader, self.bar, messages_above_progress(), self.clock.part("training"):
            if progress.step == self.plan.max_steps and progress.position.batch:
                self.milestones.after_epoch(progress.position.epoch)  # was due when the run was killed
            while progress.step < self.plan.max_steps and not progress.ended_by:
                self.train_epoch(loader, interruption)

    def train_epoch(self, loader: BatchLoader, interruption: Interruption) -> None:
        """Train the rest of the present epoch and do what is due at its end."""
        progress, epoch = self.progress, self.progress.position.epoch
        self.network.train()
        self.network.on_epoch_start(self.text_encoders, self.run.pipeline.load_transformer())
        self.step_watch.begin()
        for index, batch in self.epoch_batches(loader):
            self.train_batch(epoch, index, batch)
            progress.position.batch = index + 1
            if self.plan.ends_step(index):
                self.end_step(index)
                progress.mark_resumable()
                self.step_watch.begin()
                self.after_step(interruption)
            if progress.step >= self.plan.max_steps or progress.ended_by:
                break
        if not progress.ended_by:
            self.milestones.after_epoch(epoch)

    def batch_loader(self) -> BatchLoader:
        """The threads that prepare training batches; they live as long as the loop."""
        workers = self.run.options.dataset.max_data_loader_n_workers
        return BatchLoader(self.run.data.train, workers=workers, pin_memory=self.run.device.type == "cuda")

    def epoch_batches(self, loader: BatchLoader) -> Iterator[tuple[int, Batch]]:
        """The micro-batches of the present epoch, prepared ahead by the loader's threads."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        batches = self.run.data.batches(loader, self.plan, self.progress, process, processes)
        return self.clock.each("waiting for data", batches)

    def train_batch(self, epoch: int, index: int, batch: Batch) -> None:
        """Forward and backward of one micro-batch; nothing here waits for the device."""
        run = self.run
        seed_global_torch(run.seed, "modules", epoch, index, self.accelerator.process_index)
        if hasattr(self.network, "on_step_start"):
            self.network.on_step_start(self.text_encoders, run.pipeline.load_transformer())
        self.network.set_multiplier(batch.network_multipliers[0])
        noise_device = run.device if run.options.noise.noise_on_device else "cpu"
        losses = self.step_loss(batch, ItemDraws(run.seed, epoch, batch.item_ids, noise_device))
        loss = batch_loss(losses, batch.loss_weights, batch.group_size, self.accelerator.num_processes)
        self.step_watch.add(loss, batch.image_keys)
        if self.optimization.fused is not None:  # its updates happen during the backward pass
            if self.read_step(None).problem:
                return
            self.progress.resumable = None
        self.accelerator.backward(loss / self.plan.batches_in_step(index))
        self.progress.images += batch.group_size

    def read_step(self, norm: Tensor | None) -> StepNumbers:
        """The losses of the step in hand, and what is not finite in them or in its gradients' ``norm``."""
        return self.step_watch.read(norm, self.accelerator)

    def end_step(self, index: int) -> None:
        """The update that follows micro-batch ``index``, if every number of the step is finite, and its log.

        Raises UserError when one is not and the run has to end for that, with the damaged tensor of the model's files
        where that is the reason.
        """
        optimization, pipeline = self.optimization, self.run.pipeline
        numbers = self.read_step(None if optimization.fused is not None else optimization.clip_gradients())
        problem = numbers.problem
        if not problem and optimization.fused is not None and not optimization.fused.was_finite():
            problem = "a gradient is not finite (weights with finite ones were updated)"
        if problem and not self.progress.has_updated:
            pipeline.require_finite_files(*pipeline.parts)
        if problem:
            self.step_watch.leave_out(problem, self.progress)
        *earlier, last = numbers.losses
        for number, loss in enumerate(earlier, index - len(earlier)):
            self.log_batch(number, loss)
        if problem:
            optimization.leave_out()
        else:
            self.update()
        self.count_step()
        if not problem:
            optimization.update_average()
        self.log_batch(index, last)

    def update(self) -> None:
        """One optimizer step with the gradients of all micro-batches and processes."""
        self.progress.has_updated = True
        if self.optimization.fused is None:
            self.progress.resumable = None
            self.optimization.step()

    def count_step(self) -> None:
        """Go on to the next step, whose learning rates are taken."""
        progress = self.progress
        self.optimization.step_schedule(progress.record.average)
        limit = self.run.options.network.scale_weight_norms
        self.norms = self.network.apply_max_norm_regularization(limit, self.run.device) if limit else None
        progress.position.step += 1
        self.bar.update(1)
        slow = self.spill_watch.step()
        if slow is not None:
            warn(slow)

    def after_step(self, interruption: Interruption) -> None:
        """What is due after the step."""
        self.milestones.after_step(interruption)

    def log_batch(self, index: int, loss: float) -> None:
        """Note a micro-batch's loss and log it with the learning rates and norms."""
        progress = self.progress
        progress.record.add(index, loss)
        average, ends_step = progress.record.average, self.plan.ends_step(index)
        self.report.add_loss(progress.step, loss, ends_step, self.learning_rates)
        self.bar.set_postfix(avr_loss=f"{average:.4f}", refresh=False)
        if self.tracker.active:
            scalars = {"loss/current": loss, "loss/average": average, **self.learning_rates()}
            scalars |= norm_scalars(self.network, self.norms)
            self.tracker.log(scalars, progress.step, epoch=progress.position.epoch + 1)

    def learning_rates(self) -> dict[str, float]:
        """The learning rate of every parameter group, by the name it is logged under."""
        optimization, unet_only = self.optimization, self.run.options.network.network_train_unet_only
        return learning_rate_scalars(
            optimization.optimizer, optimization.scheduler, optimization.group_names, unet_only
        )
