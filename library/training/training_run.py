"""A training run up to its first step: checks, data, models, network, optimizer, resumed state.

``TrainingRun`` holds everything that a run is made of, and the hooks that a model family answers. The loop over it is
``NetworkTrainer`` in ``train_network.py``.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from library.console import say, set_up_console, warn
from library.data.build import build_dataset_groups
from library.data.metadata import dataset_metadata
from library.data.summary import summarize
from library.devices import parse_dtype, place
from library.errors import UserError
from library.models.fingerprint import fingerprint
from library.options import changed_options, declared_options, option_value
from library.prompt_options import PromptOptions
from library.randomness import seed_global_torch
from library.training.distribution import in_turn, make_accelerator
from library.training.finiteness import StepWatch
from library.training.loss_record import LossRecord
from library.training.network.contract import (
    check_network_options,
    create_network,
    import_network_module,
    load_first_weights,
    merge_base_weights,
    optimizer_groups,
    parse_network_args,
    restore_training_state,
    training_state,
)
from library.training.objective.losses import check_loss_options
from library.training.objective.noise_options import check_noise_options
from library.training.objective.objective import Objective
from library.training.objective.step_inputs import NoisyInput
from library.training.optim.lr_schedulers import check_lr_scheduler_options, create_lr_scheduler, load_scheduler_state
from library.training.optim.optimizers import FusedBackward, check_optimizer_options, create_optimizer
from library.training.output.checkpoints import OutputFolder
from library.training.output.hub import Uploads, check_hub_options, fetch_state
from library.training.output.metadata import (
    BackgroundHashes,
    RunFacts,
    at_step,
    modelspec_metadata,
    modelspec_resolution,
    training_metadata,
)
from library.training.output.sample_images import Samples
from library.training.output.state import Position, RunIdentity, SavedState
from library.training.plan.lengths import check_lengths, plan_run, start_position
from library.training.plan.unused_options import unused_options
from library.training.report.description import start_facts
from library.training.report.page import open_report
from library.training.report.timing import RunClock
from library.training.report.wording import start_lines
from library.training.run_options import ObsoleteDistributionOptions, check_compiler, check_precision, memory_plan
from library.training.tracking import PATH_OPTIONS, Tracker, check_logging_options
from library.training.training_options import TrainingOptions
from library.training.validation import check_validation_options

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.batch import Batch
    from library.data.cache import CacheReport, LatentCache


SAME_RESULT_GROUPS = frozenset(
    "config console preflight model saving resume length distribution obsolete_distribution samples sampler validation "
    "report logging metadata hub cache text_cache".split()
)
"""Option groups that don't shape the result of training, or whose part in it is compared by what it leads to."""
SAME_RESULT_OPTIONS = PATH_OPTIONS | set(
    "max_data_loader_n_workers persistent_data_loader_workers debug_dataset mem_eff_attn".split()
)


class TrainingRun(ABC):
    """What a run is made of. A family overrides the hooks; the steps below them are called in order."""

    options_class: ClassVar[type] = TrainingOptions
    family: ClassVar[str] = "Stable Diffusion"
    unused_groups: ClassVar[tuple[type, ...]] = (ObsoleteDistributionOptions,)
    """Option groups without effect for this family."""
    bucket_divisor: ClassVar[int] = 64
    size_divisor: ClassVar[int] = 8

    cache_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """The parts of the pipeline whose files the caches of ``latents`` and ``text`` need; all of them unless named."""
    opened_parts: tuple[str, ...] = ()
    """The parts whose files are needed; all of them if empty."""
    takes_control_images: bool = False
    """Whether a ControlNet takes part, to which the images of conditioning_data_dir go."""
    trained_encoders: tuple[str, ...] = ()
    """The text encoders that the network is put into, by the pipeline's names."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.position = Position()
        self.record = LossRecord()
        self.interrupted = False
        self.session_id = secrets.randbits(32)
        self.started_at = self.process_started_at = time.time()
        self.cache_reports: list[CacheReport] = []
        self.no_effect: list[str] = []
        """Names of the given options that change nothing in this run."""
        self.ended_by: str | None = None
        """What ended the run before its last step."""
        self.first_step = 0
        """Steps that were done before this process began to train."""
        self.resumable: Position | None = None
        """The end of the last step, as long as network and optimizer stand there."""
        self.step_watch = StepWatch()
        self.clock = RunClock()
        self.images_trained = 0
        """By all processes of this run, repeats counted."""
        self.last_losses: dict[str, float] = {}
        """The last validation losses by name."""
        self.written: list[Path] = []
        """Files and folders that this run has written, without sample images."""
        self.sample_files: list[Path] = []

    # ---- what a family gives ----------------------------------------------------------------------------------------

    def check_family_options(self) -> None:
        """Refuse what this family forbids (UserError) and say which given options have no effect."""

    @abstractmethod
    def make_pipeline(self) -> Any:
        """The family's pipeline over the checkpoint files; only headers are read. Raises UserError."""

    @abstractmethod
    def latent_format(self) -> Any:
        """How this family's latents are cached (``library.data.cache.LatentFormat``)."""

    @abstractmethod
    def cache_text_outputs(self) -> None:
        """Encode every caption and sample prompt ahead, if requested, and let the text encoders go."""

    @abstractmethod
    def text_encoders_to_train(self) -> Any:
        """The trained text encoders as ``create_network`` takes them."""

    @abstractmethod
    def text_encoders_to_merge(self) -> Any:
        """The text encoders that ``--base_weights`` are merged into, as ``create_network_from_weights`` takes them."""

    def control_parts(self) -> set[str]:
        """The parts of the pipeline that control images need at every step."""
        return set()

    def network_base(self) -> Any:
        """The transformer or U-Net as network modules take it: with the module names that their files have."""
        return self.transformer

    @abstractmethod
    def conditioning(self, batch: Batch) -> dict[str, Tensor]:
        """The text conditioning of a batch on the device, with gradients where a text encoder is trained."""

    @abstractmethod
    def make_objective(self) -> Objective:
        """What is trained; the pipeline is open by now."""

    @abstractmethod
    def predict(self, noisy: NoisyInput, conditioning: dict[str, Tensor]) -> Tensor:
        """The model's output, which ``objective.read_prediction`` makes comparable with ``noisy.target``."""

    @abstractmethod
    def sample_image(self, index: int, prompt: PromptOptions) -> Any:
        """Draw a sample prompt as a PIL image."""

    @abstractmethod
    def family_metadata(self) -> dict[str, Any]:
        """The ``ss_*`` entries that only this family writes, ``ss_base_model_version`` among them."""

    @abstractmethod
    def architecture(self) -> tuple[str, str]:
        """``modelspec.architecture`` without ``/lora``, and ``modelspec.implementation``."""

    prediction_type: str | None = None
    """``modelspec.prediction_type``."""
    default_resolution: int = 1024
    """Side of the square that a file is said to be made for when ``--resolution`` is not given."""
    sample_side: int = 512
    """Side of a sample image whose prompt says nothing, in pixels."""

    # ---- before anything heavy --------------------------------------------------------------------------------------

    def check_options(self) -> None:
        """Everything that is known from the options alone. Raises UserError."""
        options = self.options
        check_precision(options.precision)
        check_compiler(options.precision)
        check_lengths(options.length)
        check_network_options(options.network)
        check_optimizer_options(
            options.optimizer, options.length.gradient_accumulation_steps, options.precision.mixed_precision
        )
        check_lr_scheduler_options(options.lr_scheduler)
        check_loss_options(options.loss)
        check_noise_options(options.noise)
        check_validation_options(options.validation)
        check_logging_options(options.logging, read_only=options.preflight.dry_run)
        check_hub_options(options.hub, options.resume.resume)
        if options.distribution.deepspeed:
            raise UserError("--deepspeed is not available in these scripts; leave it out.")
        if not options.model.pretrained_model_name_or_path:
            raise UserError("--pretrained_model_name_or_path is missing; name the base model's file.")
        if options.preflight.dry_run and options.dataset.debug_dataset:
            raise UserError("--dry_run writes nothing and --debug_dataset writes a page: leave out one of them.")
        self.check_family_options()
        self.report_unused_groups()
        for reason, names in unused_options(options):
            self.report_unused(names, reason)

    def how_else(self, script: str) -> str:
        """What to do with a model that is another script's."""
        return f"train it with {script}"

    def report_unused_groups(self) -> None:
        """Say which given options stand in a group that the family does not use."""
        self.report_unused(name for group in self.unused_groups for name in vars(group()))

    def report_unused(self, names: Iterable[str], reason: str = "") -> None:
        """Of the options ``names``, say and remember those that were given: they change nothing (for this family)."""
        given = changed_options(self.options)
        idle = [name for name in names if name in given and name not in self.no_effect]
        self.no_effect += idle
        if idle:
            say(f"no effect {reason or f'for {self.family}'}: {', '.join(f'--{name}' for name in idle)}")

    def prepare_output(self) -> None:
        """Output folder, prompt files and the state to resume are opened; nothing is written yet but the folder."""
        options = self.options
        self.output = OutputFolder(options.saving, read_only=options.preflight.dry_run)
        self.samples = Samples(options.samples, options.saving.output_dir, options.saving.output_name)
        self.uploads = Uploads(options.hub)
        self.saved: SavedState | None = None
        from_hub = options.hub.resume_from_huggingface
        if options.resume.resume and not (from_hub and options.preflight.dry_run):
            folder = fetch_state(options.hub, options.resume.resume) if from_hub else Path(options.resume.resume)
            self.saved = SavedState(folder)

    def check_network(self) -> None:
        """Import the network's module, which checks its own arguments. Raises UserError."""
        self.network_module = import_network_module(self.options.network)

    def start_processes(self) -> None:
        """Start accelerate, find device and dtypes, and agree on the seed."""
        self.accelerator = make_accelerator(self.options.precision, self.options.distribution)
        if not self.accelerator.is_main_process:
            set_up_console(self.options.console, main_process=False)
        if self.options.optimizer.fused_backward_pass and self.accelerator.num_processes > 1:
            raise UserError("--fused_backward_pass works with one process only.")
        if self.accelerator.num_processes == 1:
            self.report_unused(["ddp_timeout", "lowram"], "with one process")
        precision = self.options.precision.mixed_precision
        self.weight_dtype = parse_dtype("fp32" if precision == "no" else precision)
        self.seed = self.choose_seed()
        seed_global_torch(self.seed, "start")

    def choose_seed(self) -> int:
        """``--seed``, else the resumed state's, else a random one that all processes share."""
        if self.options.length.seed is not None:
            return self.options.length.seed
        if self.saved is not None:
            return self.saved.identity.exact["seed"]
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([secrets.randbits(32)])[0]

    def build_datasets(self) -> None:
        """Read the dataset description, list images and captions, and say what was found. Raises UserError."""
        options = self.options
        seed = options.validation.validation_seed
        self.validation_seed = self.seed if seed is None else seed
        self.train_group, self.validation_group = build_dataset_groups(
            options.dataset,
            bucket_divisor=self.bucket_divisor,
            size_divisor=self.size_divisor,
            cache=options.cache,
            validation_split=options.validation.validation_split,
            validation_seed=self.validation_seed,
            seed=self.seed,
            control_images=self.takes_control_images,
            read_only=options.preflight.dry_run,
        )
        processes = self.accelerator.num_processes
        say(summarize(self.train_group, "Training data", processes))
        if self.validation_group is not None:
            say(summarize(self.validation_group, "Validation data", processes))
        else:
            names = ["validation_seed", "validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"]
            self.report_unused(names, "without validation images")
        self.plan_steps()

    def plan_steps(self) -> None:
        """The arithmetic of the run, and the position where it starts. Raises UserError."""
        batches = self.train_group.batches_per_epoch(self.accelerator.num_processes)
        self.plan = plan_run(self.options.length, batches)
        self.output.resolve_epoch_ratio(self.plan.epochs)
        self.position = self.first_position()

    def open_pipeline(self) -> None:
        """Open the checkpoint files by their headers, so that a wrong one is named before anything is loaded."""
        from library.memory.fp8 import BlocksInFp8

        self.pipeline = self.make_pipeline()
        self.objective = self.make_objective()
        for part in self.pipeline.parts:
            if isinstance(self.pipeline.dtypes[part], BlocksInFp8):
                getattr(self.pipeline.files, part).source.require_e4m3fn()

    def prepare_uploads(self) -> None:
        """Make the repository that files are uploaded to. Raises UserError when the hub refuses."""
        if self.accelerator.is_main_process:
            self.uploads.prepare()

    # ---- models, network, optimizer ---------------------------------------------------------------------------------

    @property
    def latents_are_cached(self) -> bool:
        """Whether every image is encoded before training begins."""
        return self.options.cache.cache_latents or self.options.cache.cache_latents_to_disk

    def open_latent_caches(self) -> list[LatentCache]:
        """The latent caches of training and validation data, looked through but not yet filled; none if not wanted."""
        if not self.latents_are_cached:
            return []
        from library.data.cache import LatentCache

        options = self.options.cache
        return [
            LatentCache(
                group,
                self.latent_format(),
                to_disk=options.cache_latents_to_disk,
                skip_check=options.skip_cache_check,
                identity=self.part_identity("autoencoder"),
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
            )
            for group in filter(None, (self.train_group, self.validation_group))
        ]

    def cache_latents(self) -> None:
        """Encode every image ahead, if requested; the autoencoder is loaded only when an entry is missing."""
        if not self.latents_are_cached:
            return
        caches = self.open_latent_caches()
        with self.load_in_turn():
            if any(cache.missing for cache in caches):
                self.pipeline.load_autoencoder()
        size = self.options.cache.vae_batch_size
        self.cache_reports += [cache.fill(self.encode_images, batch_size=size, seed=self.seed) for cache in caches]
        self.accelerator.wait_for_everyone()
        self.release("autoencoder")

    def load_in_turn(self) -> AbstractContextManager[None]:
        """Around the loading of a part: with ``--lowram`` the processes load one after another."""
        return in_turn(self.accelerator) if self.options.model.lowram else nullcontext()

    def release(self, part: str) -> None:
        """Give a part's memory back until it is needed again; with ``--highvram`` it stays."""
        if not self.options.model.highvram:
            self.pipeline.release(part)

    def part_dtypes(self, image_model: str, encoders: Iterable[str]) -> dict[Any, Any]:
        """Formats of parts that are not kept in the computation's own; ``image_model`` is the part that is trained."""
        from library.memory.fp8 import BlocksInFp8

        precision = self.options.precision
        formats: dict[Any, Any] = {"autoencoder": parse_dtype("fp32")} if self.options.model.no_half_vae else {}
        if precision.fp8_base or precision.fp8_base_unet:
            formats[image_model] = BlocksInFp8(self.weight_dtype)
        if precision.fp8_base and not precision.fp8_base_unet:
            formats |= {encoder: BlocksInFp8(self.weight_dtype) for encoder in encoders}
        return formats

    def part_identity(self, *parts: str) -> str:
        """Text that changes with the files of these parts of the pipeline, and with weights being kept in 8 bits."""
        from library.memory.fp8 import BlocksInFp8

        files = fingerprint(
            file for part in parts for file in getattr(self.pipeline.files, part).source.checkpoint.files
        )
        in_fp8 = [part for part in parts if isinstance(self.pipeline.dtypes[part], BlocksInFp8)]
        return " ".join([files, *(f"{part} in 8 bits" for part in in_fp8)])

    def encode_images(self, pixels: Tensor, generators: list[Any]) -> Tensor:
        """Latents of pixels [batch, 3, height, width] in -1..1."""
        return self.pipeline.encode_images(pixels.to(self.accelerator.device), generators)

    def load_models(self) -> None:
        """Load the frozen transformer; other parts come when they are first used."""
        from library.memory.apply import apply_memory_plan

        with self.load_in_turn():
            self.transformer = self.pipeline.load_transformer()
        self.transformer.requires_grad_(False)
        self.transformer.eval()
        plan = memory_plan(self.options.precision, compiles=not self.options.preflight.dry_run)
        self.memory = apply_memory_plan(self.pipeline.block_lists(), plan)

    def build_network(self) -> None:
        """Create the network in the base model and put it on the device."""
        self.make_network()
        self.place_network()

    def make_network(self) -> None:
        """Create the network, put it into the base model, and load its first weights."""
        options = self.options.network
        module = self.network_module
        vae, base = None, self.network_base()
        if options.base_weights:
            merge_base_weights(module, options, vae, self.text_encoders_to_merge(), base)
        text_encoders = self.text_encoders_to_train()
        seed_global_torch(self.seed, "network")
        self.network = create_network(module, options, vae, text_encoders, base)
        if hasattr(self.network, "prepare_network"):
            values = {name: option_value(self.options, o) for name, o in declared_options(type(self.options)).items()}
            self.network.prepare_network(SimpleNamespace(**values))
        train_transformer = not options.network_train_text_encoder_only
        self.network.apply_to(text_encoders, base, bool(self.trained_encoders), train_transformer)
        if options.network_weights:
            say(f"loaded {options.network_weights}: {load_first_weights(self.network, options.network_weights)}")
        if self.options.precision.gradient_checkpointing and hasattr(self.network, "enable_gradient_checkpointing"):
            self.network.enable_gradient_checkpointing()
        self.text_encoders = text_encoders

    def place_network(self) -> None:
        """Give the network the dtype that it is trained in, on the device, and let its weights be trained."""
        precision = self.options.precision
        dtype = self.weight_dtype if precision.full_fp16 or precision.full_bf16 else parse_dtype("fp32")
        place(self.network, self.accelerator.device, dtype)
        self.network.prepare_grad_etc(self.text_encoders, self.network_base())

    def build_optimizer(self) -> None:
        """Optimizer and schedule."""
        options = self.options
        rates = options.optimizer
        groups, self.group_names = optimizer_groups(
            self.network, rates.text_encoder_lr, rates.unet_lr, rates.learning_rate
        )
        self.created = create_optimizer(rates, groups, options.lr_scheduler.lr_scheduler)
        self.optimizer = self.accelerator.prepare_optimizer(self.created.optimizer, device_placement=False)
        self.fused = FusedBackward(self.optimizer, rates.max_grad_norm) if rates.fused_backward_pass else None
        if self.fused and getattr(self.network, "weight_norms", lambda: None)() is not None:
            raise UserError("ggpo_sigma and ggpo_beta need all gradients at once; leave out --fused_backward_pass.")
        self.scheduler = create_lr_scheduler(options.lr_scheduler, self.created, self.plan.max_steps)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def identity(self) -> RunIdentity:
        """What a saved state must share with this run, and what must be equal for exactness."""
        options = self.options
        shapes = {name: list(tensor.shape) for name, tensor in training_state(self.network).items()}
        fixed = {
            "model family": self.family,
            "network module": options.network.network_module,
            "number of network tensors": len(shapes),
            "network structure": hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:16],
            "optimizer": self.created.name,
        }
        exact = {
            "seed": self.seed,
            "base model": self.part_identity(*self.pipeline.parts),
            "data": self.train_group.fingerprint(),
            "gradient_accumulation_steps": self.plan.accumulation,
            "processes": self.accelerator.num_processes,
        }
        for name, option in declared_options(type(options)).items():
            if option.group not in SAME_RESULT_GROUPS and name not in SAME_RESULT_OPTIONS:
                exact[f"--{name}"] = option_value(options, option)
        return RunIdentity(fixed, exact)

    def first_position(self, same_data: bool = True) -> Position:
        """Where training starts. Raises UserError when nothing is left to train."""
        saved = self.saved.position if self.saved is not None else None
        return start_position(self.plan, self.options.resume, saved, same_data)

    def check_saved_state(self) -> None:
        """Compare the state of ``--resume`` with this run. Raises UserError when it belongs to another one."""
        if self.saved is None:
            return
        changed = self.saved.check_belongs_to(self.identity())
        if changed:
            warn(
                f"--resume: {', '.join(changed)} changed since the state was saved: the run continues, but not to the "
                "same result. Learning rates stay those of the state."
            )
        same_data = not {"data", "seed", "gradient_accumulation_steps", "processes"} & set(changed)
        self.position = self.first_position(same_data)

    def resume(self) -> None:
        """Take over the state of ``--resume`` and find the position where training starts."""
        self.check_saved_state()
        if self.saved is not None:
            restore_training_state(self.network, self.saved.network_state())
            self.optimizer.load_state_dict(self.saved.optimizer_state())
            rest = self.saved.rest
            load_scheduler_state(self.scheduler, rest["lr_scheduler"])
            self.record.load_state(rest["losses"])
            self.session_id, self.started_at = rest["session"]["id"], rest["session"]["started_at"]
            if self.accelerator.scaler is not None and rest["scaler"]:
                self.accelerator.scaler.load_state_dict(rest["scaler"])
            say(f"resuming from {self.saved.folder}: step {self.position.step}, epoch {self.position.epoch + 1}")

    def start_tracking(self) -> None:
        """Open the trackers, gather the metadata, and say what will be trained."""
        options = self.options
        values = {name: option_value(options, option) for name, option in declared_options(type(options)).items()}
        self.tracker = Tracker(options.logging, values, is_main=self.accelerator.is_main_process)
        self.hashes = BackgroundHashes(
            sd_model=options.model.pretrained_model_name_or_path, vae=options.stable_diffusion.vae
        )
        self.metadata = training_metadata(
            values,
            self.run_facts(),
            dataset_metadata(self.train_group, options.dataset, world_size=self.accelerator.num_processes),
            self.family_metadata(),
        )
        self.first_step = self.position.step
        say("\n".join(start_lines(start_facts(self))))
        self.report = open_report(self)

    def run_facts(self) -> RunFacts:
        """What the metadata says about the run beyond its options."""
        network = self.options.network
        validation_group = self.validation_group
        return RunFacts(
            session_id=self.session_id,
            started_at=self.started_at,
            seed=self.seed,
            optimizer=self.created,
            max_train_steps=self.plan.max_steps,
            num_batches_per_epoch=self.plan.batches_per_epoch,
            num_epochs=self.plan.epochs,
            num_train_images=self.train_group.train_image_count,
            num_reg_images=self.train_group.reg_image_count,
            num_validation_images=0 if validation_group is None else validation_group.train_image_count,
            network_args=parse_network_args(network) if network.network_args else None,
        )

    def file_metadata(self, epoch: int) -> dict[str, str]:
        """The metadata of a file that is saved now."""
        options = self.options
        architecture, implementation = self.architecture()
        modelspec = modelspec_metadata(
            options.metadata,
            architecture=architecture,
            implementation=implementation,
            output_name=options.saving.output_name,
            resolution=modelspec_resolution(options.dataset.resolution, self.default_resolution),
            prediction_type=self.prediction_type,
            timestep_range=(options.noise.min_timestep, options.noise.max_timestep),
            clip_skip=options.clip_skip.clip_skip,
        )
        metadata = {**self.metadata, **self.hashes.entries()}
        return at_step(metadata, self.position.step, epoch, options.metadata.no_metadata, modelspec)
