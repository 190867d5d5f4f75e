"""The option groups that every training script has."""

from __future__ import annotations

from dataclasses import dataclass, field

from library.console import ConsoleOptions
from library.data.options import CacheOptions, DatasetOptions
from library.memory.streaming_options import StreamingOptions
from library.options import ConfigOptions
from library.training.finiteness import NonfiniteOptions
from library.training.network.contract import NetworkOptions
from library.training.objective.losses import LossOptions
from library.training.objective.noise_options import NoiseOptions, StableDiffusionNoiseOptions
from library.training.optim.lr_schedulers import LRSchedulerOptions
from library.training.optim.optimizers import OptimizerOptions
from library.training.output.checkpoints import SavingOptions
from library.training.output.hub import HubOptions
from library.training.output.metadata import MetadataOptions
from library.training.output.sample_images import SampleOptions, SamplerOptions
from library.training.output.state import ResumeOptions
from library.training.report.report_options import ReportOptions
from library.training.run_options import (
    ClipSkipOptions,
    DistributionOptions,
    LengthOptions,
    ModelOptions,
    ObsoleteDistributionOptions,
    PrecisionOptions,
    PreflightOptions,
    StableDiffusionModelOptions,
    VaeOptions,
)
from library.training.tracking import LoggingOptions
from library.training.validation_options import ValidationOptions


@dataclass
class TrainingOptions:
    """The option groups that every training script has."""

    config: ConfigOptions = field(default_factory=ConfigOptions)
    console: ConsoleOptions = field(default_factory=ConsoleOptions)
    preflight: PreflightOptions = field(default_factory=PreflightOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    stable_diffusion: StableDiffusionModelOptions = field(default_factory=StableDiffusionModelOptions)
    vae: VaeOptions = field(default_factory=VaeOptions)
    clip_skip: ClipSkipOptions = field(default_factory=ClipSkipOptions)
    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    saving: SavingOptions = field(default_factory=SavingOptions)
    resume: ResumeOptions = field(default_factory=ResumeOptions)
    length: LengthOptions = field(default_factory=LengthOptions)
    precision: PrecisionOptions = field(default_factory=PrecisionOptions)
    streaming: StreamingOptions = field(default_factory=StreamingOptions)
    distribution: DistributionOptions = field(default_factory=DistributionOptions)
    obsolete_distribution: ObsoleteDistributionOptions = field(default_factory=ObsoleteDistributionOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    lr_scheduler: LRSchedulerOptions = field(default_factory=LRSchedulerOptions)
    nonfinite: NonfiniteOptions = field(default_factory=NonfiniteOptions)
    network: NetworkOptions = field(default_factory=NetworkOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    noise: NoiseOptions = field(default_factory=NoiseOptions)
    stable_diffusion_noise: StableDiffusionNoiseOptions = field(default_factory=StableDiffusionNoiseOptions)
    samples: SampleOptions = field(default_factory=SampleOptions)
    sampler: SamplerOptions = field(default_factory=SamplerOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    report: ReportOptions = field(default_factory=ReportOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)
    metadata: MetadataOptions = field(default_factory=MetadataOptions)
    hub: HubOptions = field(default_factory=HubOptions)
