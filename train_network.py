"""Train a network such as a LoRA inside a frozen Stable Diffusion 1.x or 2.x model.

``NetworkTrainer`` is the loop that every model family shares. A family's script subclasses it and gives its options,
its pipeline, how a noisy input and its target are made, how its model is called, and what its metadata says. Stable
Diffusion's own such subclass stands below it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from library.console import messages_above_progress, run_script, say, set_up_console, warn
from library.data.debug import show_dataset
from library.data.loader import BatchLoader
from library.data.options import TextCacheOptions
from library.errors import UserError
from library.modelspec import standard_entries
from library.options import parse_options
from library.prompt_options import PromptOptions
from library.randomness import seed_global_torch
from library.training import validation
from library.training.distribution import average_gradients, mean_over_processes
from library.training.finiteness import gradient_norm
from library.training.interruption import Interruption
from library.training.objective.losses import batch_loss
from library.training.objective.noise_options import NEEDS, check_stable_diffusion_noise_options
from library.training.objective.step_inputs import ItemDraws, NoisyInput
from library.training.optim.lr_schedulers import step_scheduler
from library.training.output.state import Position
from library.training.report.description import end_facts
from library.training.report.timing import timed
from library.training.report.wording import end_lines
from library.training.run_outputs import RunOutputs
from library.training.tracking import learning_rate_scalars, norm_scalars
from library.training.training_options import TrainingOptions

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from library.data.batch import Batch
    from library.data.cache import LatentFormat, TextFormat
    from library.models.stable_diffusion.pipeline import StableDiffusionPipeline
    from library.training.objective.ddpm import Ddpm


class NetworkTrainer(RunOutputs):
    """Trains a network inside a frozen base model. ``train()`` is the whole run; families override the hooks."""

    def train(self) -> None:
        """Run the training from checks to the final file. Raises UserError for mistakes, before models load."""
        self.check_options()
        self.prepare_output()
        self.check_network()
        self.start_processes()
        self.build_datasets()
        if self.options.dataset.debug_dataset:
            return self.show_dataset()
        self.open_pipeline()
        if self.options.preflight.dry_run:
            return self.show_plan()
        self.check_network_files()
        self.prepare_uploads()
        with self.clock.part("caching"):
            self.cache_latents()
            self.cache_text_outputs()
        with self.clock.part("loading"):
            self.load_models()
            self.build_network()
            self.build_optimizer()
            self.resume()
        self.start_tracking()
        with self.report:
            with Interruption() as interruption, self.batch_loader() as self.loader, self.saving_on_error():
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
        with self.progress, messages_above_progress(), self.clock.part("training"):
            while self.position.step < self.plan.max_steps and not self.interrupted:
                self.train_epoch(interruption)

    def train_epoch(self, interruption: Interruption) -> None:
        """Train the rest of the present epoch and do what is due at its end."""
        epoch = self.position.epoch
        self.network.train()
        self.network.on_epoch_start(self.text_encoders, self.transformer)
        self.step_watch.begin()
        for index, batch in self.epoch_batches(epoch, self.position.batch):
            loss = self.train_batch(epoch, index, batch)
            self.position.batch = index + 1
            if self.plan.ends_step(index):
                self.update()
            self.log_batch(index, loss)
            if self.plan.ends_step(index):
                self.resumable = replace(self.position)
                self.step_watch.begin()
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
        batches = self.loader.batches(
            plans,
            epoch=epoch + 1,
            seed=self.seed,
            max_train_steps=self.plan.max_steps,
            step_of=lambda index: start + index // accumulation,
            start=first,
        )
        return self.clock.each("waiting for data", batches)

    def train_batch(self, epoch: int, index: int, batch: Batch) -> float:
        """Forward and backward of one micro-batch; returns its loss, the mean over all processes."""
        seed_global_torch(self.seed, "modules", epoch, index, self.accelerator.process_index)
        if hasattr(self.network, "on_step_start"):
            self.network.on_step_start(self.text_encoders, self.transformer)
        self.network.set_multiplier(float(batch.network_multipliers[0]))
        draws = ItemDraws(self.seed, epoch, batch.item_ids)
        losses = self.item_losses(batch, draws)
        loss = batch_loss(losses, batch.loss_weights, batch.group_size, self.accelerator.num_processes)
        self.step_watch.add(batch.image_keys)
        if self.fused is not None:  # its updates happen during the backward pass
            self.require_finite_loss(loss.item())
            self.resumable = None
        self.accelerator.backward(loss / self.plan.batches_in_step(index))
        self.images_trained += batch.group_size
        mean = mean_over_processes(loss.item(), self.accelerator)
        self.require_finite_loss(mean)
        return mean

    def require_finite_loss(self, loss: float) -> None:
        """Raises UserError for a loss that must not be learned from."""
        first = self.position.step == self.first_step
        self.step_watch.require(math.isfinite(loss), f"the loss is {loss}", self.position.step + 1, first)

    def update(self) -> None:
        """One optimizer step with the gradients of all micro-batches and processes."""
        import torch

        first, step = self.position.step == self.first_step, self.position.step + 1
        if self.fused is not None:
            self.step_watch.require(self.fused.was_finite(), "a gradient is not finite", step, first)
        else:
            average_gradients(self.parameters, self.accelerator)
            self.accelerator.unscale_gradients(self.optimizer)
            limit = self.options.optimizer.max_grad_norm
            clipped = torch.nn.utils.clip_grad_norm_(self.parameters, limit) if limit > 0 else None
            if self.accelerator.scaler is None:  # a scaler passes over steps whose scaled gradients overflow
                norm = float(gradient_norm(self.parameters) if clipped is None else clipped)
                self.step_watch.require(math.isfinite(norm), f"the gradients' norm is {norm}", step, first)
            self.resumable = None
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
        average, ends_step = self.record.average, self.plan.ends_step(index)
        self.report.add_loss(self.position.step, loss, ends_step, self.learning_rates)
        self.progress.set_postfix(avr_loss=f"{average:.4f}", refresh=False)
        if self.tracker.active:
            scalars = {"loss/current": loss, "loss/average": average, **self.learning_rates()}
            scalars |= norm_scalars(self.network, self.norms)
            self.tracker.log(scalars, self.position.step, epoch=self.position.epoch + 1)

    def learning_rates(self) -> dict[str, float]:
        """The learning rate of every parameter group, by the name it is logged under."""
        unet_only = self.options.network.network_train_unet_only
        return learning_rate_scalars(self.optimizer, self.scheduler, self.group_names, unet_only)

    def after_step(self, interruption: Interruption) -> None:
        """What is due after an optimizer step: files, then samples and validation, and a wish to end."""
        step = self.position.step
        self.interrupted = interruption.wished(self.accelerator) and step < self.plan.max_steps
        due_samples = self.samples.due_after_step(step)
        due_file = self.output.step_is_due(step) or self.interrupted
        due_validation = self.validation_group is not None and validation.due_after_step(self.options.validation, step)
        if not (due_samples or due_file or due_validation):
            return
        if due_file:
            state = self.output.step_state(step) if self.options.saving.save_state else None
            self.save_due(self.output.step_file(step), state, self.position.epoch)
            self.output.remove_old_step(step)
        if due_samples or due_validation:
            with self.evaluating(exact=due_file):
                if due_samples:
                    self.draw_samples(step, None)
                if due_validation:
                    self.validate("step", step)
        if self.interrupted:
            self.ended_by = interruption.reason or "asked by another process"
            say(f"ended at step {step}: {self.ended_by}")
            self.report.end("interrupted", interruption.reason or "")
        else:
            self.report.write()

    def after_epoch(self, epoch: int) -> None:
        """What is due at the end of an epoch (or of the run inside one): files, then validation and samples."""
        number = epoch + 1
        if self.position.batch >= self.plan.batches_per_epoch:
            self.position = Position(number, 0, self.position.step)
            if self.resumable is not None:
                self.resumable = replace(self.position)
        average = {"loss/epoch_average": self.record.average}
        self.report.add_epoch_average(self.position.step, self.record.average)
        self.tracker.log(average, number, epoch=number, global_step=self.position.step)
        due_validation = self.validation_group is not None and validation.due_after_epoch(
            self.options.validation, number
        )
        due_file = self.output.epoch_is_due(number, self.plan.epochs)
        due_samples = self.samples.due_after_epoch(number)
        if not (due_validation or due_file or due_samples):
            return
        if due_file:
            state = self.output.epoch_state(number) if self.options.saving.save_state else None
            self.save_due(self.output.epoch_file(number), state, number)
            self.output.remove_old_epoch(number)
        if due_samples or due_validation:
            with self.evaluating(exact=due_file):
                if due_validation:
                    self.validate("epoch", number)
                if due_samples:
                    self.draw_samples(self.position.step, number)
        self.report.write()

    @timed("validation")
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
        self.report.add_validation(kind, self.position.step, average)
        self.last_losses[f"validation ({kind})"] = average
        say(f"{kind} {x}: validation loss {average:.5f}")

    # ---- looking at plan and data -----------------------------------------------------------------------------------

    def show_plan(self) -> None:
        """``--dry_run``: what would be trained, in which time and memory, and which files would be written."""
        from library.training.plan.dry_run import plan_of
        from library.training.plan.plan_report import plan_lines

        plan = plan_of(self)
        if self.accelerator.is_main_process:
            say("\n".join(plan_lines(plan)))

    def check_network_files(self) -> None:
        """See that the LoRA files which training begins with fit the model. Raises UserError."""
        from library.training.plan.dry_run import try_network_files

        try_network_files(self)

    def show_dataset(self) -> None:
        """``--debug_dataset``: the contact sheet ``{output_name}.dataset.html``, lines, windows where there are any."""
        if self.accelerator.is_main_process:
            page = self.output.folder / f"{self.options.saving.output_name or 'dataset'}.dataset.html"
            steps = self.options.length.max_train_steps
            show_dataset(self.train_group, seed=self.seed, max_train_steps=steps, page=page)

    # ---- before and after the loop ----------------------------------------------------------------------------------

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

    def finish(self) -> None:
        """Write the final file and state, close the trackers, wait for uploads, and say where time and memory went."""
        if not self.interrupted:
            saving = self.options.saving
            with self.evaluating():
                self.save_model(self.output.final_file(), self.plan.epochs, wait=True)
            if saving.save_state or saving.save_state_on_train_end:
                self.save_state(self.output.final_state())
            self.report.end("finished")
        self.tracker.finish()
        self.uploads.finish()
        self.accelerator.end_training()
        if self.accelerator.is_main_process:
            say("\n".join(end_lines(end_facts(self))))


@dataclass
class StableDiffusionTrainingOptions(TrainingOptions):
    """All options of this script."""

    text_cache: TextCacheOptions = field(default_factory=TextCacheOptions)


class StableDiffusionNetworkTrainer(NetworkTrainer):
    """Stable Diffusion 1.x and 2.x: noise or v prediction on scaled latents, one CLIP text encoder."""

    options_class = StableDiffusionTrainingOptions
    family = "Stable Diffusion"
    bucket_divisor = 64
    options: StableDiffusionTrainingOptions
    encoders: tuple[str, ...] = ("text_encoder",)
    sample_side = 512
    """Pixels of a sample image's sides where the prompt says nothing."""

    # ---- checks -----------------------------------------------------------------------------------------------------

    def check_family_options(self) -> None:
        """Forbidden combinations, and options without effect."""
        from library.models.stable_diffusion.sampling import require_sampler

        options, noise = self.options, self.options.stable_diffusion_noise
        is_v = options.stable_diffusion.v_parameterization
        check_stable_diffusion_noise_options(noise, is_v)
        if noise.zero_terminal_snr and not is_v:
            warn("--zero_terminal_snr is meant for v-prediction: noise cannot be predicted from pure noise.")
        require_sampler(options.sampler.sample_sampler)
        unet_only = options.network.network_train_unet_only
        self.take_text_options(options.text_cache, () if unet_only else self.encoders)
        if self.cache_text and self.trained_encoders:
            raise UserError(
                "--cache_text_encoder_outputs needs --network_train_unet_only: a text encoder that is trained encodes "
                "its captions anew at every step."
            )
        for name, needed in NEEDS.items():
            group = options.noise if hasattr(options.noise, needed) else noise
            if not getattr(group, needed):
                self.report_unused([name], f"without --{needed}")
        if options.stable_diffusion.mem_eff_attn:
            self.report_unused(["xformers", "sdpa"], "beside --mem_eff_attn")

    def prepare_output(self) -> None:
        """As for every family; the samplers of prompts are checked, prompt options of other families are named."""
        from library.models.stable_diffusion.sampling import require_sampler

        super().prepare_output()
        prompts = self.samples.prompts
        for number, prompt in enumerate(prompts, 1):
            if prompt.sample_sampler is not None:
                require_sampler(prompt.sample_sampler, f"{self.options.samples.sample_prompts}, prompt {number}")
        unused = ("guidance_scale", "controlnet_image", "cfg_trunc_ratio", "renorm_cfg", "flow_shift")
        given = [name for name in unused if any(getattr(prompt, name) is not None for prompt in prompts)]
        if given:
            say(f"no effect in sample prompts for {self.family}: {', '.join(given)}")

    # ---- models and caches ------------------------------------------------------------------------------------------

    def make_pipeline(self) -> StableDiffusionPipeline:
        """Open the checkpoint by its headers and find the tokenizers. Raises UserError when it is another model."""
        from library.models.stable_diffusion.pipeline import StableDiffusionFiles, StableDiffusionPipeline

        options, model = self.options, self.options.model
        sd, noise = options.stable_diffusion, options.stable_diffusion_noise
        files = StableDiffusionFiles(
            model=model.pretrained_model_name_or_path or "",
            vae=sd.vae,
            tokenizer_cache_dir=model.tokenizer_cache_dir,
            disable_mmap=model.disable_mmap_load_safetensors,
        )
        pipeline = StableDiffusionPipeline(
            files,
            dtype=self.weight_dtype,
            device=self.accelerator.device,
            dtypes=self.part_dtypes("unet", self.encoders),
            v_parameterization=sd.v_parameterization,
            zero_terminal_snr=noise.zero_terminal_snr,
            clip_skip=options.clip_skip.clip_skip,
            max_token_length=sd.max_token_length,
            weighted_captions=sd.weighted_captions,
            attention_backend="split" if sd.mem_eff_attn else "xformers" if model.xformers else "sdpa",
        )
        self.check_model(pipeline)
        if not options.text_cache.cache_text_encoder_outputs_to_disk:  # with it, there may be nothing to tokenize
            pipeline.load_tokenizers()
        return pipeline

    def check_model(self, pipeline: StableDiffusionPipeline) -> None:
        """Raises UserError when the file is not the model that the options say; warns about what it says of itself."""
        options = self.options.stable_diffusion
        path = self.options.model.pretrained_model_name_or_path
        self.require_variant(pipeline)
        self.prediction_type = "v" if options.v_parameterization else "epsilon"
        if pipeline.predicts_v is not None and pipeline.predicts_v != options.v_parameterization:
            kind, other = ("v", "noise") if pipeline.predicts_v else ("noise", "v")
            advice = "add" if pipeline.predicts_v else "leave out"
            warn(f"{path} predicts {kind}, but will be trained to predict {other}; {advice} --v_parameterization.")
        if pipeline.model.zero_terminal_snr and not self.options.stable_diffusion_noise.zero_terminal_snr:
            warn(f"{path} was trained with a noise schedule that ends in pure noise; add --zero_terminal_snr.")

    def require_variant(self, pipeline: StableDiffusionPipeline) -> None:
        """Raises UserError unless the file is of this script's kind."""
        path = self.options.model.pretrained_model_name_or_path
        if pipeline.variant == "sdxl":
            raise UserError(f"{path} is a Stable Diffusion XL model; {self.how_else('sdxl_train_network.py')}.")
        if pipeline.variant == "sd1" and self.options.stable_diffusion.v2:
            raise UserError(f"--v2: {path} is a Stable Diffusion 1.x model; leave --v2 out.")
        if pipeline.variant == "sd2" and not self.options.stable_diffusion.v2:
            say(f"{path} is a Stable Diffusion 2.x model: --v2 is taken as given")
        is_v = self.options.stable_diffusion.v_parameterization
        self.default_resolution = 768 if pipeline.variant == "sd2" and is_v else 512

    def latent_format(self) -> LatentFormat:
        """``<stem>_WWWWxHHHH_sd.npz``; an old ``<stem>.npz`` comes first."""
        return self.unscaled_latents("_sd.npz")

    def unscaled_latents(self, suffix: str) -> LatentFormat:
        """The files of Stable Diffusion: one set of arrays each, not yet multiplied by the latent scale."""
        from library.data.cache import LatentFormat

        channels, stride = self.pipeline.latent_channels, self.pipeline.latent_stride
        return LatentFormat(suffix=suffix, channels=channels, stride=stride, sized_keys=False, plain_name=True)

    def text_format(self) -> TextFormat:
        """``<stem>_sd_te.npz``."""
        width = self.pipeline.files.text_encoder.hidden_size
        return self.text_outputs("_sd_te.npz", {"hidden_state": (self.text_length(), width)})

    def text_length(self) -> int:
        """Positions in the outputs of a text encoder."""
        return 75 * self.pipeline.chunks + 2

    def text_outputs(self, suffix: str, arrays: dict[str, tuple[int | None, ...]]) -> TextFormat:
        """Files whose arrays are marked when their tokens are weighted; unmarked ones of other programs are not."""
        from library.data.cache import TextFormat

        weighted = self.options.stable_diffusion.weighted_captions
        return TextFormat(suffix=suffix, arrays=arrays, flags={"weighted_captions": True} if weighted else {})

    def text_identity(self) -> str:
        """Encoders and the options that change their outputs (the length of captions shows in the shapes)."""
        skip = None if self.pipeline.variant == "sdxl" else self.options.clip_skip.clip_skip
        weighted = self.options.stable_diffusion.weighted_captions
        return f"{super().text_identity()} clip_skip={skip} weighted_captions={weighted}"

    def network_text_encoders(self, encoders: Collection[str]) -> Any:
        """One text encoder is not given as a list: its modules are then named ``lora_te``, without a number."""
        return next(iter(self.pipeline.load_text_encoders(encoders)), None)

    # ---- the training step ------------------------------------------------------------------------------------------

    def make_objective(self) -> Ddpm:
        """Noise at a timestep of the DDPM schedule; the target is the noise, or v with ``--v_parameterization``."""
        from library.training.objective.ddpm import Ddpm, noise_schedule

        options, noise = self.options, self.options.stable_diffusion_noise
        schedule = noise_schedule(noise.zero_terminal_snr)
        is_v = options.stable_diffusion.v_parameterization
        return Ddpm(options.noise, noise, is_v, schedule, self.pipeline.latent_scale)

    def predict(self, noisy: NoisyInput, conditioning: dict[str, Tensor]) -> Tensor:
        """The U-Net's output."""
        from library.training.objective.ddpm import timesteps_of

        return self.pipeline.predict(noisy.latents, timesteps_of(noisy), conditioning)

    # ---- samples and metadata ---------------------------------------------------------------------------------------

    def sample_image(self, index: int, prompt: PromptOptions) -> Image:
        """A sample image; sides are rounded down to multiples of 8, at least 64."""
        width, height = (side or self.sample_side for side in (prompt.width, prompt.height))
        sampler = prompt.sample_sampler or self.options.sampler.sample_sampler
        return self.draw_sample(self.pipeline.request(prompt, width=width, height=height, sampler=sampler))

    def model_version(self) -> str:
        """``ss_base_model_version``."""
        version = "sd_v2" if self.pipeline.variant == "sd2" else "sd_v1"
        return f"{version}_v" if self.options.stable_diffusion.v_parameterization else version

    def family_metadata(self) -> dict[str, Any]:
        """The base model's version."""
        return {"ss_base_model_version": self.model_version(), "ss_v2": self.pipeline.variant == "sd2"}

    def architecture(self) -> tuple[str, str]:
        """``stable-diffusion-v1``, ``stable-diffusion-v2-512`` and the like."""
        entries = standard_entries(self.model_version())
        return entries["modelspec.architecture"], entries["modelspec.implementation"]


def main() -> None:
    """Read the options and train."""
    options = parse_options(StableDiffusionTrainingOptions, __doc__ or "")
    set_up_console(options.console)
    StableDiffusionNetworkTrainer(options).train()


if __name__ == "__main__":
    run_script(main)
