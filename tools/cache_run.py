"""What the caching tools share: a training run that ends where training would begin.

The tools take the options of a family's training script and call the steps by which that script fills its caches, so
that the caches are those which the training then finds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from flux_train_network import FluxNetworkTrainer, FluxTrainingOptions
from library.console import say, set_up_console
from library.devices import parse_dtype
from library.errors import UserError
from library.options import configured_value, parse_options
from library.training.output.sample_images import SampleOptions, Samples
from library.training.run_options import check_precision
from sdxl_train_network import SdxlNetworkTrainer, SdxlTrainingOptions
from train_network import NetworkTrainer, StableDiffusionNetworkTrainer, StableDiffusionTrainingOptions

if TYPE_CHECKING:
    from library.data.cache import CacheReport
    from library.models.stable_diffusion.pipeline import StableDiffusionPipeline

Subject = Literal["latents", "text"]


@dataclass
class CachingOptions:
    """Caching"""

    sdxl: bool = False
    """The model is Stable Diffusion XL; the options are those of sdxl_train_network.py."""
    flux: bool = False
    """The model is FLUX.1; the options are those of flux_train_network.py."""
    skip_existing: bool = False
    """Deprecated and without effect: valid files are kept anyway; --skip_cache_check keeps them unread."""
    t5xxl_dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Dtype in which T5-XXL computes; unset means that of --mixed_precision."""


@dataclass
class StableDiffusionCachingOptions(StableDiffusionTrainingOptions):
    """The options of train_network.py and of caching."""

    caching: CachingOptions = field(default_factory=CachingOptions)


@dataclass
class SdxlCachingOptions(SdxlTrainingOptions):
    """The options of sdxl_train_network.py and of caching."""

    caching: CachingOptions = field(default_factory=CachingOptions)


@dataclass
class FluxCachingOptions(FluxTrainingOptions):
    """The options of flux_train_network.py and of caching."""

    caching: CachingOptions = field(default_factory=CachingOptions)


class CachingRun(NetworkTrainer):
    """A trainer that goes as far as its caches, and asks for nothing that only training needs."""

    def __init__(self, options: Any, subject: Subject) -> None:
        """Caches lie on disk; which encoders are trained makes no difference to what is in them."""
        super().__init__(options)
        self.subject = subject
        options.network.network_train_unet_only = True
        options.network.network_train_text_encoder_only = False
        if subject == "latents":
            options.cache.cache_latents_to_disk = True
        else:
            options.text_cache.cache_text_encoder_outputs_to_disk = True

    def run(self) -> None:
        """Fill the caches; ``cache_reports`` then tells what became of this process' entries. Raises UserError."""
        self.check_options()
        self.prepare_output()
        self.start_processes()
        self.build_datasets()
        self.open_pipeline()
        if self.options.preflight.dry_run:
            self.say_what_is_missing()
        elif self.subject == "latents":
            self.cache_latents()
        else:
            self.cache_text_outputs()

    def check_options(self) -> None:
        """Only what caches depend on."""
        check_precision(self.options.precision)
        if not self.options.model.pretrained_model_name_or_path:
            raise UserError("--pretrained_model_name_or_path is missing; name the base model's file.")
        self.report_unused(["skip_existing"], "since valid files are kept anyway")
        if self.subject == "latents":
            self.report_unused(["t5xxl_dtype"], "on latents")
        self.check_family_options()

    def prepare_output(self) -> None:
        """There is no output folder, no sample prompt and nothing to resume."""
        self.samples = Samples(SampleOptions(), None, None)
        self.saved = None

    def plan_steps(self) -> None:
        """There are no steps."""

    def say_what_is_missing(self) -> None:
        """``--dry_run``: how many entries would be made; nothing is written."""
        caches = self.open_latent_caches() if self.subject == "latents" else self.open_text_caches()
        for cache in caches:
            say(f"{cache.missing} of {len(cache.entries)} entries would be made")


class StableDiffusionCaching(CachingRun, StableDiffusionNetworkTrainer):
    """Stable Diffusion 1.x and 2.x."""

    options_class = StableDiffusionCachingOptions

    def require_variant(self, pipeline: StableDiffusionPipeline) -> None:
        """Raises UserError for an SDXL model."""
        if pipeline.variant == "sdxl":
            path = self.options.model.pretrained_model_name_or_path
            raise UserError(f"{path} is a Stable Diffusion XL model; add --sdxl.")
        super().require_variant(pipeline)


class SdxlCaching(CachingRun, SdxlNetworkTrainer):
    """Stable Diffusion XL."""

    options_class = SdxlCachingOptions

    def require_variant(self, pipeline: StableDiffusionPipeline) -> None:
        """Raises UserError for a model of 1.x or 2.x."""
        if pipeline.variant != "sdxl":
            path = self.options.model.pretrained_model_name_or_path
            raise UserError(f"{path} is not a Stable Diffusion XL model; leave out --sdxl.")


class FluxCaching(CachingRun, FluxNetworkTrainer):
    """FLUX.1: of its four files only those are needed that the cache is made with (and the transformer's sizes)."""

    options_class = FluxCachingOptions
    options: FluxCachingOptions

    def open_pipeline(self) -> None:
        """With ``--t5xxl_dtype`` where it is given."""
        self.opened_parts = ("transformer", *(("autoencoder",) if self.subject == "latents" else ("clip_l", "t5xxl")))
        super().open_pipeline()
        if self.options.caching.t5xxl_dtype:
            self.pipeline.dtypes["t5xxl"] = parse_dtype(self.options.caching.t5xxl_dtype)


def family_class(arguments: Sequence[str]) -> type[CachingRun]:
    """The run that ``--sdxl`` or ``--flux`` chooses, on the command line or in the configuration file."""
    chosen = [name for name in FAMILIES if f"--{name}" in arguments or configured_value(arguments, name) is True]
    if len(chosen) > 1:
        raise UserError("--sdxl and --flux exclude each other.")
    return FAMILIES[chosen[0]] if chosen else StableDiffusionCaching


FAMILIES: dict[str, type[CachingRun]] = {"sdxl": SdxlCaching, "flux": FluxCaching}
"""By the switch that chooses them."""


def run_tool(subject: Subject, description: str, arguments: Sequence[str] | None = None) -> CacheReport:
    """Read the options, fill the caches, and say what became of their entries in all processes together."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    run_class = family_class(arguments)
    options: Any = parse_options(run_class.options_class, description, arguments)
    set_up_console(options.console)
    run = run_class(options, subject)
    run.run()

    from accelerate.utils import gather_object

    from library.data.cache import CacheReport

    reports = gather_object(run.cache_reports)
    total = CacheReport(f"finished; {reports[0].subject if reports else subject}")
    for report in reports:
        total.kept += report.kept
        total.made += report.made
        total.rebuilt += report.rebuilt
    if run.accelerator.is_main_process and reports:
        say(total.line())
    run.accelerator.end_training()
    return total
