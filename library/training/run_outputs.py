"""What a run leaves behind on its way: sample images, LoRA files, resumable states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from library.console import say, warn
from library.devices import parse_dtype
from library.errors import in_one_line
from library.training.finiteness import require_finite
from library.training.network.contract import training_state
from library.training.network.saving import save_network
from library.training.optim.lr_schedulers import scheduler_state
from library.training.optim.optimizers import has_eval_mode, set_eval_mode, set_train_mode
from library.training.output.state import save_state
from library.training.report.timing import timed
from library.training.training_step import TrainingStep


class RunOutputs(TrainingStep):
    """A run that can show and save what it has trained so far."""

    @contextlib.contextmanager
    def evaluating(self, exact: bool = False) -> Iterator[None]:
        """The network and its optimizer as they are saved and shown; training mode comes back afterwards.

        An optimizer with an evaluation mode computes its training weights back, with rounding. A state that is saved
        holds them so; what is drawn after it comes with ``exact``, which leaves them to the bit.
        """
        import torch

        kept = [p.detach().clone() for p in self.parameters] if exact and has_eval_mode(self.optimizer) else []
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

    def save_due(self, path: Path, folder: Path | None, epoch: int) -> None:
        """Write the network's file, and the state ``folder`` where one is given."""
        with self.evaluating():
            self.save_model(path, epoch)
        if folder is not None:
            self.save_state(folder)

    @contextlib.contextmanager
    def saving_on_error(self) -> Iterator[None]:
        """Around the loop: an error saves what was trained, as Ctrl-C does, before it goes on its way."""
        try:
            yield
        except Exception:
            step = self.position.step
            path, folder = self.output.step_file(step), self.output.step_state(step)
            if step > self.first_step and path not in self.written:
                warn(f"an error ends the training at step {step}; what it has trained is saved first")
                resumable = self.options.saving.save_state and self.resumable is not None
                try:
                    self.position = self.resumable or self.position
                    self.save_due(path, folder if resumable else None, self.position.epoch)
                except Exception as second:
                    warn(f"{path} could not be saved: {in_one_line(second)}")
            raise

    @timed("sample images")
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
            self.release("autoencoder")
        self.accelerator.wait_for_everyone()
        self.report.add_samples(step, epoch, self.samples)
        self.sample_files += self.samples.images(step, epoch).values()

    @timed("saving")
    def save_model(self, path: Path, epoch: int, wait: bool = False) -> None:
        """Write the network's file with its metadata (main process)."""
        if self.accelerator.is_main_process:
            precision = self.options.saving.save_precision
            dtype = None if precision is None else parse_dtype(precision)
            require_finite(self.network, path, dtype)
            save_network(self.network, path, dtype, self.file_metadata(epoch))
            say(f"saved {path}")
            self.report.add_file(path, self.position.step)
            self.written.append(path)
            self.uploads.upload(path, wait)

    @timed("saving")
    def save_state(self, folder: Path) -> None:
        """Write a resumable state (main process)."""
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            require_finite(self.network, folder)
            try:
                save_state(
                    folder,
                    training_state(self.network),
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
            self.report.add_file(folder, self.position.step)
            self.written.append(folder)
            self.uploads.upload(folder)
