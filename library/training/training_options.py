"""The option groups that every training script has."""

from __future__ import annotations

from dataclasses import dataclass, field

from library.data.options import CacheOptions, DatasetOptions
from library.options import ConfigOptions, ConsoleOptions
from library.training.checkpoints import SavingOptions
from library.training.hub import HubOptions
from library.training.losses import LossOptions
from library.training.lr_schedulers import LRSchedulerOptions
from library.training.metadata import MetadataOptions
from library.training.network_contract import NetworkOptions
from library.training.noise_options import NoiseOptions, StableDiffusionNoiseOptions
from library.training.optimizers import OptimizerOptions
from library.training.report_page import ReportOptions
from library.training.run_options import (
    DistributionOptions,
    LengthOptions,
    ModelOptions,
    PrecisionOptions,
    PreflightOptions,
    StableDiffusionModelOptions,
)
from library.training.sample_images import SampleOptions
from library.training.state import ResumeOptions
from library.training.tracking import LoggingOptions
from library.training.validation import ValidationOptions


@dataclass
class TrainingOptions:
    """The option groups that every training script has."""

    config: ConfigOptions = field(default_factory=ConfigOptions)
    console: ConsoleOptions = field(default_factory=ConsoleOptions)
    preflight: PreflightOptions = field(default_factory=PreflightOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    stable_diffusion: StableDiffusionModelOptions = field(default_factory=StableDiffusionModelOptions)
    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    saving: SavingOptions = field(default_factory=SavingOptions)
    resume: ResumeOptions = field(default_factory=ResumeOptions)
    length: LengthOptions = field(default_factory=LengthOptions)
    precision: PrecisionOptions = field(default_factory=PrecisionOptions)
    distribution: DistributionOptions = field(default_factory=DistributionOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    lr_scheduler: LRSchedulerOptions = field(default_factory=LRSchedulerOptions)
    network: NetworkOptions = field(default_factory=NetworkOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    noise: NoiseOptions = field(default_factory=NoiseOptions)
    stable_diffusion_noise: StableDiffusionNoiseOptions = field(default_factory=StableDiffusionNoiseOptions)
    samples: SampleOptions = field(default_factory=SampleOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    report: ReportOptions = field(default_factory=ReportOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)
    metadata: MetadataOptions = field(default_factory=MetadataOptions)
    hub: HubOptions = field(default_factory=HubOptions)
