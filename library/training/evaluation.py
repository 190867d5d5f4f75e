"""Looking at the network while it is trained: sample images and the validation loss. Neither changes anything."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from library.console import say
from library.prompt_options import PromptOptions
from library.training import validation
from library.training.report.timing import RunClock, timed

if TYPE_CHECKING:
    from library.models.pipeline import ImageRequest
    from library.training.latents import Latents
    from library.training.report.page import RunReport
    from library.training.run_facts import RunFacts
    from library.training.step_loss import StepLoss
    from library.training.text_conditioning import TextConditioning
    from library.training.tracking import Tracker


class SampledModel(Protocol):
    """What sample images need of a run beside its facts, and the hooks by which a family says how they are drawn."""

    accelerator: Any
    latents: Latents
    text: TextConditioning
    step_loss: StepLoss
    sharding: Any
    """How the base model is spread over the processes, or None."""

    def sample_request(self, prompt: PromptOptions) -> ImageRequest:
        """The image that a sample prompt asks for."""

    def while_sampling(self) -> AbstractContextManager[Any]:
        """Around the drawing of sample images."""


class Evaluation:
    """Draws sample images and computes validation losses, which report and trackers are given."""

    def __init__(
        self, model: SampledModel, run: RunFacts, report: RunReport, tracker: Tracker, clock: RunClock
    ) -> None:
        self.model, self.run, self.report, self.tracker, self.clock = model, run, report, tracker, clock

    @timed("validation")
    def validate(self, kind: str, x: int) -> None:
        """Log the mean loss over the validation items at fixed noise levels; ``kind`` is step or epoch."""
        options, progress = self.run.options, self.run.progress
        timesteps = validation.validation_timesteps(options.noise.min_timestep, options.noise.max_timestep)
        average = validation.average_loss(
            self.run.data,
            self.model.step_loss,
            timesteps,
            options.validation.max_validation_steps,
            options.dataset.max_data_loader_n_workers,
            self.model.accelerator,
        )
        name = f"loss/validation/{kind}"
        values = {f"{name}_average": average}
        if progress.record.losses:
            values[f"{name}_divergence"] = average - progress.record.average
        self.tracker.log(values, x, epoch=progress.position.epoch + 1, global_step=progress.step)
        self.report.add_validation(kind, progress.step, average)
        progress.validation_losses[f"validation ({kind})"] = average
        say(f"{kind} {x}: validation loss {average:.5f}")

    @timed("sample images")
    def draw_samples(self, step: int, epoch: int | None) -> None:
        """Draw the sample prompts, dealt to the processes, with the network at full strength.

        A base model that is spread works in all processes at once: each draws all of them, and the main one writes.
        """
        model, samples, accelerator = self.model, self.run.outputs.samples, self.model.accelerator
        process, processes = (0, 1) if model.sharding else (accelerator.process_index, accelerator.num_processes)
        self.run.network.set_multiplier(1.0)
        with model.while_sampling(), accelerator.autocast():
            samples.draw(
                self.draw_batch,
                step,
                epoch,
                process,
                processes,
                self.tracker.log_image,
                lambda prompt: model.sample_request(prompt).common(),
                writes=accelerator.is_main_process or not model.sharding,
            )
        if model.latents.caching:
            self.run.pipeline.release("autoencoder")
        accelerator.wait_for_everyone()
        self.report.add_samples(step, epoch, samples)
        self.run.outputs.sample_files += samples.images(step, epoch).values()

    def draw_batch(self, prompts: Sequence[PromptOptions]) -> Sequence[Any]:
        """The PIL images of sample prompts that are generated together; their texts are encoded as in training."""
        requests = [self.model.sample_request(prompt) for prompt in prompts]
        for request in requests:
            self.model.text.add_to(request)
        return self.run.pipeline.generate_batch(requests)
