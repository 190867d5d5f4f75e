"""Train a network such as a LoRA inside a frozen Stable Diffusion 1.x or 2.x model.

``NetworkTrainer`` is the run that every model family shares: it builds the parts of a run, which stand in
``library/training/``, in their order, and lets the loop train. A family's script subclasses it and gives its options,
its pipeline, its objective, how its model is called, and what its metadata says. Stable Diffusion's own such subclass
stands below it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from library.console import run_script, say, set_up_console, warn
from library.data.debug import show_dataset
from library.data.options import TextCacheOptions
from library.devices import parse_dtype
from library.errors import UnsavedError, UserError
from library.models.streamed_parts import spread_blocks, stream_blocks
from library.modelspec import standard_entries
from library.options import all_values, changed_options, parse_options
from library.prompt_options import PromptOptions
from library.randomness import seed_global_torch
from library.training.adjustments import adjust_options
from library.training.caching import caches_text, latent_caching, text_caching
from library.training.checks import check_training_options
from library.training.data import read_training_data
from library.training.distribution import (
    choose_seed,
    fingerprint_of,
    in_turn,
    make_accelerator,
    naming_lost_processes,
    processes_per_machine,
    require_agreement,
    require_same_state,
    shared_facts,
)
from library.training.evaluation import Evaluation
from library.training.family_hooks import FamilyHooks
from library.training.interruption import Interruption
from library.training.latents import Latents
from library.training.launch import requested_sharding, unused_answers
from library.training.milestones import Milestones
from library.training.network.building import build_network, place_network
from library.training.network.contract import import_network_module, merge_base_weights
from library.training.objective.noise_options import NEEDS, check_stable_diffusion_noise_options
from library.training.objective.step_inputs import NoisyInput
from library.training.optim.optimization import Optimization
from library.training.output.file_metadata import FileMetadata, ModelFacts
from library.training.output.name_lock import gives_back_the_name
from library.training.output.run_outputs import RunOutputs
from library.training.output.run_state import check_saved_state, earlier_position, restore_run_state
from library.training.output.saver import Saver
from library.training.output.state import Position, SavedState
from library.training.part_dtypes import part_dtypes
from library.training.plan.lengths import plan_run, start_position
from library.training.plan.unused_options import unused_options
from library.training.progress import Progress
from library.training.report.description import end_facts, start_facts
from library.training.report.page import open_report
from library.training.report.timing import RunClock
from library.training.report.wording import Forecast, end_lines, start_lines
from library.training.run_facts import RunFacts
from library.training.run_options import memory_plans
from library.training.step_loss import StepLoss
from library.training.text_conditioning import TextConditioning
from library.training.tracking import Tracker
from library.training.training_loop import TrainingLoop
from library.training.training_options import TrainingOptions

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.cache import CacheReport, LatentFormat, TextFormat
    from library.models.pipeline import ImageRequest
    from library.models.stable_diffusion.pipeline import StableDiffusionPipeline
    from library.training.objective.ddpm import Ddpm


class NetworkTrainer(FamilyHooks):
    """Trains a network inside a frozen base model. ``train()`` is the whole run; families override the hooks."""

    loop_class: ClassVar[type[TrainingLoop]] = TrainingLoop

    def __init__(self, options: Any) -> None:
        self.options = options
        self.how_else: Callable[[str], str] = "train it with {}".format
        """What to do with a model that is another script's, by that script's file."""
        self.no_effect: list[str] = []
        """Names of the given options that change nothing in this run."""
        self.progress = Progress()
        self.clock = RunClock()
        self.saved: SavedState | None = None
        """The state of ``--resume``."""
        self.forecast: Forecast | None = None
        """The memory that the run is expected to take, where options were chosen by it."""

    # ---- the run ----------------------------------------------------------------------------------------------------

    @gives_back_the_name
    @naming_lost_processes()
    def train(self) -> None:
        """Run the training from checks to the final file. Raises UserError for mistakes, before models load."""
        self.check_options()
        self.prepare_output()
        self.check_network()
        self.start_processes()
        self.read_data()
        self.plan_steps()
        if self.options.dataset.debug_dataset:
            return self.show_dataset()
        if self.outputs.are_complete(self.plan.max_steps):
            return self.say_complete()
        self.fit_memory()
        self.open_pipeline()
        if self.options.preflight.dry_run:
            return self.show_plan()
        self.text.prepare(self.outputs.samples.prompts)
        self.check_network_files()
        self.prepare_uploads()
        with self.clock.part("caching"):
            self.fill_caches()
        with self.clock.part("loading"):
            self.load_models()
            self.make_network()
            self.place_network()
            self.build_optimizer()
            self.resume()
            self.check_disk_space()
        self.start_reports()
        with self.report:
            self.run_loop()
            self.finish()

    # ---- before anything heavy --------------------------------------------------------------------------------------

    def check_options(self) -> None:
        """Everything that is known from the options alone. Raises UserError."""
        adjust_options(self.options)
        check_training_options(self.options)
        self.check_family()
        for reason, names in unused_options(self.options):
            self.report_unused(names, reason)

    def check_family(self) -> None:
        """What the family forbids or does not use. Raises UserError."""
        cache: TextCacheOptions = self.options.text_cache
        if cache.text_encoder_batch_size is not None and cache.text_encoder_batch_size < 1:
            raise UserError(f"--text_encoder_batch_size must be at least 1, not {cache.text_encoder_batch_size}.")
        self.check_family_options()
        self.report_unused_groups()

    def report_unused_groups(self) -> None:
        """Say which given options stand in a group that the family does not use."""
        self.report_unused(name for group in self.unused_groups for name in vars(group()))

    def report_unused(self, names: Iterable[str], reason: str = "") -> None:
        """Of the options ``names``, say and remember those that were given: they change nothing (for this family)."""
        idle = [name for name in changed_options(self.options, names) if name not in self.no_effect]
        self.no_effect += idle
        if idle:
            say(f"no effect {reason or f'for {self.family}'}: {', '.join(f'--{name}' for name in idle)}")

    def prepare_output(self) -> None:
        """Open output folder, prompt file and the state to resume; nothing is written yet but the folder."""
        self.outputs = RunOutputs(self.options)
        self.saved = self.outputs.saved
        prompts = self.outputs.samples.prompts
        unused = self.prompt_options_without_effect()
        given = [name for name in unused if any(getattr(prompt, name) is not None for prompt in prompts)]
        if given:
            say(f"no effect in sample prompts for {self.family}: {', '.join(given)}")
        for number, prompt in enumerate(prompts, 1):
            width, height = (side or self.sample_side for side in (prompt.width, prompt.height))
            if (width, height) != (drawn := self.sample_size(prompt)):
                place = f"{self.options.samples.sample_prompts}, prompt {number}"
                rounded = f"{drawn[0]}x{drawn[1]}, multiples of {self.sample_step} pixels"
                say(f"{place}: {width}x{height} is rounded to {rounded}")

    def check_network(self) -> None:
        """Import the network's module, which checks its own arguments. Raises UserError.

        One that says ``TRAINS_TEXT_ENCODERS = False`` is given no text encoder.
        """
        self.network_module = import_network_module(self.options.network)
        if getattr(self.network_module, "TRAINS_TEXT_ENCODERS", True) or not self.trained_encoders:
            return
        name = self.options.network.network_module
        if self.options.network.network_train_text_encoder_only:
            raise UserError(f"--network_train_text_encoder_only: {name} trains no text encoder; leave it out.")
        say(f"{name} trains no text encoder")
        self.trained_encoders = ()
        self.report_unused(["text_encoder_lr"], f"with {name}")

    def start_processes(self) -> None:
        """Start accelerate, find device and dtypes, and agree on the seed."""
        only_plans = self.options.preflight.dry_run
        self.accelerator = make_accelerator(self.options.precision, self.options.distribution, only_plans)
        if not self.accelerator.is_main_process:
            set_up_console(self.options.console, main_process=False)
        require_same_state(self.saved, self.accelerator)
        if self.options.optimizer.fused_backward_pass and self.accelerator.num_processes > 1:
            raise UserError("--fused_backward_pass works with one process only.")
        if self.accelerator.num_processes == 1:
            self.report_unused(["ddp_timeout", "lowram"], "with one process")
        self.sharding = requested_sharding(processes_per_machine(self.accelerator))
        for words in unused_answers():
            say(f"no effect: accelerate launch {words}")
        if self.accelerator.device.type == "cpu":
            self.report_unused(["noise_on_device"], "on a CPU")
        precision = self.options.precision.mixed_precision
        self.weight_dtype = parse_dtype("fp32" if precision == "no" else precision)
        self.seed = choose_seed(self.options.length.seed, self.saved)
        seed_global_torch(self.seed, "start")

    def read_data(self) -> None:
        """Read the dataset description, list images and captions, and say what was found. Raises UserError."""
        self.data = read_training_data(
            self.options,
            seed=self.seed,
            processes=self.accelerator.num_processes,
            bucket_divisor=self.bucket_divisor,
            size_divisor=self.size_divisor,
            control_images=self.takes_control_images,
        )
        if self.data.validation is None:
            names = ["validation_seed", "validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"]
            self.report_unused(names, "without validation images")
        if caches_text(self.options.text_cache):
            from library.data.cache import check_text_cacheable

            for group in self.data.groups:
                check_text_cacheable(group)
        data = {"training data": self.data.train.fingerprint()}
        require_agreement(self.accelerator, {**shared_facts(self.options), **data})

    def plan_steps(self) -> None:
        """The arithmetic of the run, the position where it starts, and its sample prompts. Raises UserError."""
        processes = self.accelerator.num_processes
        earlier = None if self.saved is None else earlier_position(self.data, self.seed, processes, self.saved)
        self.plan = plan_run(self.options.length, self.data.train.batches_per_epoch(processes), earlier)
        self.outputs.files.resolve_epoch_ratio(self.plan.epochs)
        self.progress.position = self.first_position()
        self.outputs.samples.name_trigger(self.options.dataset.trigger_word, self.data.train.trigger_words)

    def first_position(self, same_data: bool = True) -> Position:
        """Where training starts. Raises UserError when nothing is left to train."""
        saved = None if self.saved is None else self.saved.position
        return start_position(self.plan, self.options.resume, saved, same_data, may_be_done=self.outputs.chosen)

    def say_complete(self) -> None:
        """There is nothing to do: the state that was found is that of the finished run."""
        say(f"{self.outputs.files.final_file()} is complete: its run has ended at step {self.plan.max_steps}")
        self.accelerator.end_training()

    def fit_memory(self) -> None:
        """Set the options that ``--vram_budget`` and ``--blocks_to_swap auto`` leave open, as if they had been given.

        Otherwise, where the device has memory of its own, say how much the run is expected to take. Raises UserError
        when a budget is given that the run does not fit.
        """
        if self.options.precision.vram_budget is not None or self.options.streaming.blocks_to_swap == "auto":
            from library.training.plan.budget import fit

            self.forecast, line = fit(self)
            say(line)
        elif self.accelerator.device.type != "cpu" and not self.options.preflight.dry_run:
            from library.training.plan.expected_memory import expected_memory

            if found := expected_memory(self):
                self.forecast, line = found
                say(line)

    def open_pipeline(self, parts: tuple[Any, ...] = ()) -> None:
        """Open the checkpoint files by their headers, so that a wrong one is named before anything is loaded.

        ``parts``: those whose files are needed; all of them if empty.
        """
        options = self.options
        self.pipeline = self.make_pipeline(parts)
        self.pipeline.require_storable()
        self.pipeline.plans = memory_plans(
            self.pipeline, options.precision, self.trained_encoders, len(self.data.sizes)
        )
        for lines in (stream_blocks(self.pipeline, options.streaming), spread_blocks(self.pipeline, self.sharding)):
            for line in lines:
                say(line)
        self.pipeline.kept, self.pipeline.empties_cache = self.control_parts(), not options.model.highvram
        self.objective = self.make_objective()
        opened, latents, texts = set(self.pipeline.parts), None, None
        if "autoencoder" in opened:
            latents = latent_caching(options.cache, self.latent_format, lambda: self.pipeline.identity("autoencoder"))
        if opened.issuperset(self.pipeline.encoders):
            texts = text_caching(options.text_cache, options.cache, self.data, self.text_format, self.text_identity)
        self.latents = Latents(self.pipeline, self.data, self.accelerator, latents)
        self.text = TextConditioning(self.pipeline, self.data, self.accelerator, texts, self.trained_encoders)
        self.step_loss = StepLoss(self, options.loss, options.dataset.masked_loss and not self.takes_control_images)

    def prepare_uploads(self) -> None:
        """Make the repository that files are uploaded to. Raises UserError when the hub refuses."""
        if self.accelerator.is_main_process:
            self.outputs.uploads.prepare()

    # ---- looking at plan and data -----------------------------------------------------------------------------------

    def show_plan(self) -> None:
        """``--dry_run``: what would be trained, in which time and memory, and which files would be written.

        Raises UserError, after that, when the files do not fit on their disk.
        """
        from library.training.plan.dry_run import plan_of
        from library.training.plan.plan_report import plan_lines

        plan = plan_of(self)
        if self.accelerator.is_main_process:
            say("\n".join(plan_lines(plan)))
            if plan.shortage:
                raise UserError(plan.shortage)

    def check_network_files(self) -> None:
        """See that the LoRA files which training begins with fit the model, and its own the disk. Raises UserError."""
        from library.training.plan.rehearsal import try_network

        try_network(self)

    def show_dataset(self) -> None:
        """``--debug_dataset``: the contact sheet ``{output_name}.dataset.html``, lines, windows where there are any."""
        if self.accelerator.is_main_process:
            page = self.outputs.files.folder / f"{self.options.saving.output_name or 'dataset'}.dataset.html"
            steps = self.options.length.max_train_steps
            show_dataset(self.data.train, seed=self.seed, max_train_steps=steps, page=page)

    # ---- caches, models, network, optimizer -------------------------------------------------------------------------

    def load_in_turn(self) -> AbstractContextManager[None]:
        """Around the loading of a part: with ``--lowram`` the processes load one after another."""
        return in_turn(self.accelerator) if self.options.model.lowram else nullcontext()

    def fill_caches(self) -> list[CacheReport]:
        """Encode images, captions and sample prompts ahead, if requested."""
        reports = self.latents.fill_caches(self.load_in_turn)
        return reports + self.text.fill_caches(self.load_in_turn, self.outputs.samples.prompts)

    def load_models(self) -> None:
        """Load the frozen transformer and what control images need; other parts come when they are first used."""
        with self.load_in_turn():
            self.pipeline.load_transformer()
        for part in sorted(self.control_parts()):
            with self.load_in_turn():
                self.pipeline.load(part)

    def load_network_encoders(self, encoders: Iterable[str]) -> Any:
        """These text encoders, loaded, as network modules take them."""
        names = tuple(encoders)
        return self.network_text_encoders(dict(zip(names, self.pipeline.load_text_encoders(names))))

    def make_network(self) -> None:
        """Create the network, put it into the base model, and load its first weights."""
        options, trained = self.options, self.trained_encoders
        base = self.network_base()
        if options.network.base_weights:
            if self.text.caching:
                warn(
                    "--base_weights: captions were encoded ahead, so what these files change in text encoders is used "
                    "only where an encoder is trained."
                )
            encoders = self.load_network_encoders(self.text.encoders_at_steps)
            merge_base_weights(self.network_module, options.network, None, encoders, base)
        self.text_encoders = self.load_network_encoders(trained)
        seed_global_torch(self.seed, "network")
        self.network = build_network(self.network_module, options, self.text_encoders, base, bool(trained))

    def place_network(self) -> None:
        """Put the network on the device, in the dtype that it is trained in; with FSDP the base model is spread now."""
        precision = self.options.precision
        dtype = self.weight_dtype if precision.full_fp16 or precision.full_bf16 else parse_dtype("fp32")
        place_network(self.network, self.text_encoders, self.network_base(), self.accelerator.device, dtype)
        self.pipeline.shard()

    def build_optimizer(self) -> None:
        """Optimizer and schedule. Raises UserError where they don't fit the network."""
        options, steps = self.options, self.plan.max_steps
        self.optimization = Optimization(self.network, self.accelerator, options.optimizer, options.lr_scheduler, steps)

    def facts(self) -> RunFacts:
        """The run, for all that only looks at it."""
        return RunFacts(
            family=self.family,
            options=self.options,
            seed=self.seed,
            device=self.accelerator.device,
            dtype=self.weight_dtype,
            processes=self.accelerator.num_processes,
            is_main=self.accelerator.is_main_process,
            control_parts=frozenset(self.control_parts()),
            sample_side=self.sample_side,
            data=self.data,
            plan=self.plan,
            progress=self.progress,
            pipeline=self.pipeline,
            network=self.network,
            optimization=self.optimization,
            outputs=self.outputs,
        )

    def check_saved_state(self) -> None:
        """Compare the state of ``--resume`` with this run. Raises UserError when it belongs to another one."""
        if self.saved is not None:
            self.progress.position = self.first_position(check_saved_state(self.facts(), self.saved))

    def resume(self) -> None:
        """Take over the state of ``--resume`` and find the position where training starts."""
        self.check_saved_state()
        if self.saved is not None:
            restore_run_state(self.facts(), self.saved, self.accelerator.scaler)
        if self.accelerator.num_processes > 1:
            model = self.pipeline.identity(*self.pipeline.parts)
            facts = {"base model": model, "network": fingerprint_of(self.optimization.parameters)}
            require_agreement(self.accelerator, facts)

    def check_disk_space(self) -> None:
        """Compare the free space with the files that will be written. Raises UserError where it cannot be enough."""
        from library.training.plan.disk_space import check_disk_space

        if self.accelerator.is_main_process:
            check_disk_space(self.facts())

    def start_reports(self) -> None:
        """Open the trackers, gather the metadata, and say what will be trained."""
        options, run = self.options, self.facts()
        self.tracker = Tracker(options.logging, all_values(options), is_main=run.is_main)
        model = ModelFacts(self.family_metadata(), *self.architecture(), self.prediction_type, self.default_resolution)
        self.progress.first_step = self.progress.step
        say("\n".join(start_lines(start_facts(run))))
        self.report = open_report(run, self.clock)
        self.saver = Saver(run, FileMetadata(run, model), self.report, self.clock, self.accelerator.scaler)

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def run_loop(self) -> None:
        """Train, with everything that is due before, between and after the steps.

        An error in it saves what was trained, as Ctrl-C does, before it goes on its way.
        """
        run, report, tracker, clock = self.facts(), self.report, self.tracker, self.clock
        evaluation = Evaluation(self, run, report, tracker, clock)
        milestones = Milestones(run, self.saver, evaluation, report, tracker, self.accelerator)
        loop = self.loop_class(
            run, self.step_loss, milestones, self.text_encoders, self.accelerator, report, tracker, clock
        )
        with Interruption() as interruption, self.saver.saving_on_error():
            milestones.at_start()
            loop.train(interruption)

    def finish(self) -> None:
        """Write the final file and state, close the trackers, wait for uploads, and say where time and memory went.

        Raises UnsavedError when the last files of the run are not in their places.
        """
        if not self.progress.ended_by:
            saving, files = self.options.saving, self.outputs.files
            state = files.final_state() if saving.save_state or saving.save_state_on_train_end else None
            self.saver.save_last(files.final_file(), state, self.plan.epochs, wait=True)
            self.report.end("finished")
        self.tracker.finish()
        self.outputs.uploads.finish()
        self.accelerator.end_training()
        if self.accelerator.is_main_process:
            say("\n".join(end_lines(end_facts(self.facts(), self.clock, self.report.path, self.forecast))))
        if self.outputs.problems:
            raise UnsavedError(" ".join(self.outputs.problems))


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
    pipeline: StableDiffusionPipeline
    encoders: tuple[str, ...] = ("text_encoder",)

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
        self.trained_encoders = () if unet_only else self.encoders
        if caches_text(options.text_cache) and self.trained_encoders:
            raise UserError(
                "--cache_text_encoder_outputs needs --network_train_unet_only: a text encoder that is trained "
                "re-encodes its captions at every step."
            )
        for name, needed in NEEDS.items():
            group = options.noise if hasattr(options.noise, needed) else noise
            if not getattr(group, needed):
                self.report_unused([name], f"without --{needed}")
        if options.stable_diffusion.mem_eff_attn:
            self.report_unused(["xformers", "sdpa"], "beside --mem_eff_attn")

    def prompt_options_without_effect(self) -> Iterable[str]:
        """Those of FLUX.1 and Lumina."""
        return ("guidance_scale", "controlnet_image", "cfg_trunc_ratio", "renorm_cfg", "flow_shift")

    def prepare_output(self) -> None:
        """As for every family; the samplers of prompts are checked. Raises UserError."""
        from library.models.stable_diffusion.sampling import require_sampler

        super().prepare_output()
        for number, prompt in enumerate(self.outputs.samples.prompts, 1):
            if prompt.sample_sampler is not None:
                require_sampler(prompt.sample_sampler, f"{self.options.samples.sample_prompts}, prompt {number}")

    # ---- models and caches ------------------------------------------------------------------------------------------

    def make_pipeline(self, parts: tuple[Any, ...] = ()) -> StableDiffusionPipeline:
        """Open the checkpoint, which holds every part, by its headers.

        Raises UserError when it is another model.
        """
        from library.models.stable_diffusion.pipeline import StableDiffusionFiles, StableDiffusionPipeline

        options, model = self.options, self.options.model
        sd, noise = options.stable_diffusion, options.stable_diffusion_noise
        files = StableDiffusionFiles(
            model=model.pretrained_model_name_or_path or "",
            vae=options.vae.vae,
            tokenizer_cache_dir=model.tokenizer_cache_dir,
            disable_mmap=model.disable_mmap_load_safetensors,
        )
        pipeline = StableDiffusionPipeline(
            files,
            dtype=self.weight_dtype,
            device=self.accelerator.device,
            dtypes=part_dtypes(model, options.precision, self.weight_dtype, "unet", self.encoders),
            v_parameterization=sd.v_parameterization,
            zero_terminal_snr=noise.zero_terminal_snr,
            clip_skip=options.clip_skip.clip_skip,
            max_token_length=sd.max_token_length,
            weighted_captions=sd.weighted_captions,
            attention_backend="split" if sd.mem_eff_attn else "xformers" if model.xformers else "sdpa",
        )
        self.check_model(pipeline)
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

    def network_text_encoders(self, encoders: Mapping[str, Any]) -> Any:
        """One text encoder is not given as a list: its modules are then named ``lora_te``, without a number."""
        return next(iter(encoders.values()), None)

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

    def sample_request(self, prompt: PromptOptions) -> ImageRequest:
        """The sampler is the prompt's own, or the run's."""
        width, height = self.sample_size(prompt)
        sampler = prompt.sample_sampler or self.options.sampler.sample_sampler
        return self.pipeline.request(prompt, width=width, height=height, sampler=sampler)

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
    StableDiffusionNetworkTrainer.of(options).train()


if __name__ == "__main__":
    run_script(main)
