"""Train a network such as a LoRA inside a frozen base model.

``NetworkTrainer`` is the loop that every model family shares. A family's script subclasses it and gives its options,
its pipeline, how a noisy input and its target are made, how its model is called, and what its metadata says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from library.console import messages_above_progress, run_script, say, warn
from library.data.debug import show_dataset
from library.data.loader import BatchLoader
from library.devices import parse_dtype
from library.errors import UserError
from library.options import parse_options
from library.randomness import seed_global_torch
from library.training import validation
from library.training.distribution import average_gradients, mean_over_processes
from library.training.flow_matching import per_item
from library.training.interruption import Interruption
from library.training.losses import (
    apply_mask,
    batch_loss,
    elementwise_loss,
    huber_threshold,
    item_losses,
    loss_mask,
)
from library.training.lr_schedulers import scheduler_state, step_scheduler
from library.training.network_saving import save_network
from library.training.optimizers import set_eval_mode, set_train_mode
from library.training.state import Position, save_state
from library.training.step_inputs import ItemDraws, NoisyInput
from library.training.tracking import learning_rate_scalars, norm_scalars
from library.training.training_options import TrainingOptions
from library.training.training_run import TrainingRun

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.batch import Batch


class NetworkTrainer(TrainingRun):
    """Trains a network inside a frozen base model. ``train()`` is the whole run; families override the hooks."""

    def train(self) -> None:
        """Run the training from checks to the final file. Raises UserError for mistakes, before models load."""
        self.check_options()
        self.prepare_output()
        self.start_processes()
        self.build_datasets()
        if self.options.dataset.debug_dataset:
            return show_dataset(self.train_group, seed=self.seed, max_train_steps=self.options.length.max_train_steps)
        self.open_pipeline()
        self.cache_latents()
        self.cache_text_outputs()
        self.load_models()
        self.build_network()
        self.build_optimizer()
        self.resume()
        self.start_tracking()
        with Interruption() as interruption, self.batch_loader() as self.loader:
            self.look_before_training()
            self.run_epochs(interruption)
        self.finish()

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def run_epochs(self, interruption: Interruption) -> None:
        """Train until the last step, or until someone wishes to end."""
        from tqdm import tqdm

        self.progress = tqdm(
            total=self.plan.max_steps,
            initial=self.position.step,
            disable=not self.accelerator.is_local_main_process,
            smoothing=0.1,
            desc="steps",
            ascii=True,
        )
        with self.progress, messages_above_progress():
            while self.position.step < self.plan.max_steps and not self.interrupted:
                self.train_epoch(interruption)

    def train_epoch(self, interruption: Interruption) -> None:
        """Train the rest of the present epoch and do what is due at its end."""
        epoch = self.position.epoch
        self.network.train()
        self.network.on_epoch_start(self.text_encoders, self.transformer)
        for index, batch in self.epoch_batches(epoch, self.position.batch):
            loss = self.train_batch(epoch, index, batch)
            self.position.batch = index + 1
            if self.plan.ends_step(index):
                self.update()
            self.log_batch(index, loss)
            if self.plan.ends_step(index):
                self.after_step(interruption)
            if self.position.step >= self.plan.max_steps or self.interrupted:
                break
        if not self.interrupted:
            self.after_epoch(epoch)

    def batch_loader(self) -> BatchLoader:
        """The threads that prepare training batches; they live as long as the run."""
        pin_memory = self.accelerator.device.type == "cuda"
        return BatchLoader(
            self.train_group, workers=self.options.dataset.max_data_loader_n_workers, pin_memory=pin_memory
        )

    def epoch_batches(self, epoch: int, first: int) -> Iterator[tuple[int, Batch]]:
        """The micro-batches of an epoch from number ``first`` on, prepared ahead by the loader's threads."""
        accelerator, accumulation = self.accelerator, self.plan.accumulation
        plans = self.train_group.plan(epoch + 1, self.seed, accelerator.process_index, accelerator.num_processes)
        start = self.position.step - first // accumulation
        return self.loader.batches(
            plans,
            epoch=epoch + 1,
            seed=self.seed,
            max_train_steps=self.plan.max_steps,
            step_of=lambda index: start + index // accumulation,
            start=first,
        )

    def train_batch(self, epoch: int, index: int, batch: Batch) -> float:
        """Forward and backward of one micro-batch; returns its loss, the mean over all processes."""
        if hasattr(self.network, "on_step_start"):
            self.network.on_step_start(self.text_encoders, self.transformer)
        self.network.set_multiplier(float(batch.network_multipliers[0]))
        seed_global_torch(self.seed, "modules", epoch, index, self.accelerator.process_index)
        draws = ItemDraws(self.seed, epoch, batch.item_ids)
        losses = self.item_losses(batch, draws)
        loss = batch_loss(losses, batch.loss_weights, batch.group_size, self.accelerator.num_processes)
        self.accelerator.backward(loss / self.plan.batches_in_step(index))
        return mean_over_processes(loss.item(), self.accelerator)

    def item_losses(self, batch: Batch, draws: ItemDraws, timestep: int | None = None) -> Tensor:
        """The loss of each item, [batch] float32; ``timestep`` (0..1000) fixes the noise level."""
        options = self.options
        noisy = self.noisy_input(self.clean_latents(batch, draws), draws, timestep)
        conditioning = self.conditioning(batch)
        with self.accelerator.autocast():
            prediction = self.predict(noisy, conditioning)
        target = self.preserve_base_output(batch, noisy, conditioning)
        threshold = huber_threshold(options.loss, noisy.sigmas, noisy.noise_to_signal)
        loss = elementwise_loss(options.loss, prediction.float(), target, threshold)
        loss = loss * per_item(noisy.weights, loss)
        mask = loss_mask(options.dataset.masked_loss, batch.conditioning_images, batch.alpha_masks)
        return item_losses(loss if mask is None else apply_mask(loss, mask.to(loss.device)))

    def clean_latents(self, batch: Batch, draws: ItemDraws) -> Tensor:
        """The batch's latents on the device, float32, from the cache or from the autoencoder."""
        import torch

        if batch.latents is not None:
            return batch.latents.to(self.accelerator.device, torch.float32, non_blocking=True)
        assert batch.images is not None
        latents = self.encode_images(batch.images, draws.generators("latents"))
        if not torch.isfinite(latents).all():
            warn("The autoencoder gave NaN latents, which were replaced by 0; try --no_half_vae.")
            latents = latents.nan_to_num(0.0, 0.0, 0.0)
        return latents

    def preserve_base_output(self, batch: Batch, noisy: NoisyInput, conditioning: dict[str, Tensor]) -> Tensor:
        """The target, replaced by the base model's own prediction for items marked ``diff_output_preservation``."""
        import torch

        marked = [i for i, a in enumerate(batch.custom_attributes) if a.get("diff_output_preservation")]
        if not marked:
            return noisy.target
        self.network.set_multiplier(0.0)
        with torch.no_grad(), self.accelerator.autocast():
            prediction = self.predict(noisy, conditioning).float()
        self.network.set_multiplier(float(batch.network_multipliers[0]))
        target = noisy.target.clone()
        target[marked] = prediction[marked]
        return target

    def update(self) -> None:
        """One optimizer step with the gradients of all micro-batches and processes."""
        import torch

        if self.fused is None:
            average_gradients(self.parameters, self.accelerator)
            self.accelerator.unscale_gradients(self.optimizer)
            limit = self.options.optimizer.max_grad_norm
            if limit > 0:
                torch.nn.utils.clip_grad_norm_(self.parameters, limit)
            for name in ("update_grad_norms", "update_norms"):
                if hasattr(self.network, name):
                    getattr(self.network, name)()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        step_scheduler(self.scheduler, self.record.average)
        limit = self.options.network.scale_weight_norms
        self.norms = self.network.apply_max_norm_regularization(limit, self.accelerator.device) if limit else None
        self.position.step += 1
        self.progress.update(1)

    def log_batch(self, index: int, loss: float) -> None:
        """Note a micro-batch's loss and log it with the learning rates and norms."""
        self.record.add(index, loss)
        average = self.record.average
        self.progress.set_postfix(avr_loss=f"{average:.4f}", refresh=False)
        if self.tracker.active:
            scalars = {"loss/current": loss, "loss/average": average}
            unet_only = self.options.network.network_train_unet_only
            scalars |= learning_rate_scalars(self.optimizer, self.scheduler, self.group_names, unet_only)
            scalars |= norm_scalars(self.network, self.norms)
            self.tracker.log(scalars, self.position.step, epoch=self.position.epoch + 1)

    def after_step(self, interruption: Interruption) -> None:
        """What is due after an optimizer step: samples, files, validation, and a wish to end."""
        step = self.position.step
        self.interrupted = interruption.wished(self.accelerator) and step < self.plan.max_steps
        due_samples = self.samples.due_after_step(step)
        due_file = self.output.step_is_due(step) or self.interrupted
        due_validation = self.validation_group is not None and validation.due_after_step(self.options.validation, step)
        if not (due_samples or due_file or due_validation):
            return
        with self.evaluating():
            if due_samples:
                self.draw_samples(step, None)
            if due_file:
                self.save_model(self.output.step_file(step), self.position.epoch)
            if due_validation:
                self.validate("step", step)
        if due_file:
            if self.options.saving.save_state:
                self.save_state(self.output.step_state(step))
            self.output.remove_old_step(step)
        if self.interrupted:
            say(f"ended at step {step}: {interruption.reason}")

    def after_epoch(self, epoch: int) -> None:
        """What is due at the end of an epoch (or of the run inside one): validation, files, samples."""
        number = epoch + 1
        if self.position.batch >= self.plan.batches_per_epoch:
            self.position = Position(number, 0, self.position.step)
        average = {"loss/epoch_average": self.record.average}
        self.tracker.log(average, number, epoch=number, global_step=self.position.step)
        due_validation = self.validation_group is not None and validation.due_after_epoch(
            self.options.validation, number
        )
        due_file = self.output.epoch_is_due(number, self.plan.epochs)
        due_samples = self.samples.due_after_epoch(number)
        if not (due_validation or due_file or due_samples):
            return
        with self.evaluating():
            if due_validation:
                self.validate("epoch", number)
            if due_file:
                self.save_model(self.output.epoch_file(number), number)
            if due_samples:
                self.draw_samples(self.position.step, number)
        if due_file:
            if self.options.saving.save_state:
                self.save_state(self.output.epoch_state(number))
            self.output.remove_old_epoch(number)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The network and its optimizer as they are saved and shown; training mode comes back afterwards."""
        import torch

        self.network.eval()
        set_eval_mode(self.optimizer)
        try:
            with torch.no_grad():
                yield
        finally:
            set_train_mode(self.optimizer)
            self.network.train()

    def validate(self, kind: str, x: int) -> None:
        """Log the mean loss over the validation items at fixed noise levels; ``kind`` is step or epoch."""
        accelerator, noise, seed = self.accelerator, self.options.noise, self.validation_seed
        group = self.validation_group
        assert group is not None
        plans = group.plan(0, seed, accelerator.process_index, accelerator.num_processes)
        plans = plans[: self.options.validation.max_validation_steps]
        with BatchLoader(group, workers=self.options.dataset.max_data_loader_n_workers) as loader:
            batches = loader.batches(plans, epoch=0, seed=seed, max_train_steps=1, step_of=lambda _: 0)
            timesteps = validation.validation_timesteps(noise.min_timestep, noise.max_timestep)
            sums = validation.validation_loss((batch for _, batch in batches), self.item_losses, timesteps, seed)
        total, count = (mean_over_processes(number, accelerator) for number in sums)
        average = total / max(count, 1e-12)
        name = f"loss/validation/{kind}"
        values = {f"{name}_average": average}
        if self.record.losses:
            values[f"{name}_divergence"] = average - self.record.average
        self.tracker.log(values, x, epoch=self.position.epoch + 1, global_step=self.position.step)
        say(f"{kind} {x}: validation loss {average:.5f}")

    # ---- samples and files ------------------------------------------------------------------------------------------

    def look_before_training(self) -> None:
        """The samples of ``--sample_at_first``, and the validation loss that step validations are compared with."""
        self.norms = None
        if self.position.step > 0:
            return
        with self.evaluating():
            if self.samples.due_at_start():
                self.draw_samples(0, 0)
            if self.validation_group is not None and self.options.validation.validate_every_n_steps:
                self.validate("step", 0)

    def draw_samples(self, step: int, epoch: int | None) -> None:
        """Draw the sample prompts, dealt to the processes, with the network at full strength."""
        self.network.set_multiplier(1.0)
        with self.accelerator.autocast():
            self.samples.draw(
                self.sample_image,
                step,
                epoch,
                self.accelerator.process_index,
                self.accelerator.num_processes,
                self.tracker.log_image,
            )
        if self.latents_are_cached:
            self.pipeline.unload("autoencoder")
        self.accelerator.wait_for_everyone()

    def save_model(self, path: Path, epoch: int, wait: bool = False) -> None:
        """Write the network's file with its metadata (main process)."""
        if self.accelerator.is_main_process:
            precision = self.options.saving.save_precision
            dtype = None if precision is None else parse_dtype(precision)
            save_network(self.network, path, dtype, self.file_metadata(epoch))
            say(f"saved {path}")
            self.uploads.upload(path, wait)

    def save_state(self, folder: Path) -> None:
        """Write a resumable state (main process)."""
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            try:
                save_state(
                    folder,
                    self.network.state_dict(),
                    self.optimizer.state_dict(),
                    self.position,
                    self.identity(),
                    {
                        "lr_scheduler": scheduler_state(self.scheduler),
                        "losses": self.record.state(),
                        "scaler": None if scaler is None else scaler.state_dict(),
                        "session": {"id": self.session_id, "started_at": self.started_at},
                    },
                )
            except TypeError as error:  # a third party's optimizer; its training must not end for that
                warn(f"{folder} cannot be saved: {error}.")
                return
            say(f"saved {folder}")
            self.uploads.upload(folder)

    def finish(self) -> None:
        """Write the final file and state, close the trackers, wait for uploads."""
        if not self.interrupted:
            saving = self.options.saving
            with self.evaluating():
                self.save_model(self.output.final_file(), self.plan.epochs, wait=True)
            if saving.save_state or saving.save_state_on_train_end:
                self.save_state(self.output.final_state())
        self.tracker.finish()
        self.uploads.finish()
        self.accelerator.end_training()


def main() -> None:
    """Stable Diffusion is the family that this script will train; the options are those that all families share."""
    parse_options(TrainingOptions, __doc__ or "")
    raise UserError("train_network.py trains no model yet; use flux_train_network.py for FLUX.1.")


if __name__ == "__main__":
    run_script(main)
