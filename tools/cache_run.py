"""What the caching tools share: a training run that ends where training would begin.

The tools take the options of a family's training script and call the steps by which that script fills its caches, so
that the caches are those which the training then finds.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from library import families
from library.console import say, set_up_console
from library.devices import parse_dtype
from library.errors import UserError
from library.families import Family
from library.options import configured_value, parse_options
from library.training.output.sample_images import SampleOptions, Samples
from library.training.run_options import check_precision
from train_network import NetworkTrainer

if TYPE_CHECKING:
    from library.data.cache import CacheReport

Subject = Literal["latents", "text"]


@dataclass
class CachingOptions:
    """Caching"""

    skip_existing: bool = False
    """Deprecated and without effect: valid files are kept anyway; --skip_cache_check keeps them unread."""
    t5xxl_dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Dtype in which T5-XXL computes; unset means that of --mixed_precision."""


def family_switches() -> type:
    """The option group of the switches that choose a family, one for each row that needs one."""
    switches: list[Any] = []
    for name, family in families.switches().items():
        meaning = f"The model is {family.name}; the options are those of {family.file}."
        switches.append((name, bool, field(default=False, metadata={"help": meaning})))
    group = make_dataclass("FamilySwitches", switches)
    lines = [f"    {name}: {declared.metadata['help']}" for name, _, declared in switches]
    group.__doc__ = "\n".join(["Model family", "", "Attributes:", *lines])
    return group


class CachingRun(NetworkTrainer):
    """A trainer that goes as far as its caches, and asks for nothing that only training needs."""

    row: ClassVar[Family]

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
        self.report_unused_groups()

    def open_pipeline(self) -> None:
        """Only the parts that the cache is made with; T5-XXL with ``--t5xxl_dtype`` where it is given."""
        self.opened_parts = self.cache_parts.get(self.subject, ())
        super().open_pipeline()
        if "t5xxl" not in self.pipeline.encoders:
            self.report_unused(["t5xxl_dtype"])
        elif self.options.caching.t5xxl_dtype:
            self.pipeline.dtypes["t5xxl"] = parse_dtype(self.options.caching.t5xxl_dtype)

    def how_else(self, script: str) -> str:
        """The switch by which the tools are told the family of ``script``."""
        other = next(family for family in families.FAMILIES if family.file == script)
        return f"leave out --{self.row.key}" if other.is_default else f"add --{other.key}"

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


@functools.cache
def caching_class(family: Family) -> type[CachingRun]:
    """A caching run with the family's trainer, whose options are those of its script and of caching."""
    groups: list[Any] = [
        ("caching", CachingOptions, field(default_factory=CachingOptions)),
        ("switches", switches := family_switches(), field(default_factory=switches)),
    ]
    options = make_dataclass(f"{family.script}_caching_options", groups, bases=(family.options_class(),))
    options.__doc__ = f"The options of {family.file} and of caching."
    return type(
        f"{family.trainer}Caching", (CachingRun, family.trainer_class()), {"options_class": options, "row": family}
    )


def chosen_family(arguments: Sequence[str]) -> Family:
    """What a switch chooses, on the command line or in the configuration file. Raises UserError for two of them."""
    switches = families.switches()
    chosen = [name for name in switches if f"--{name}" in arguments or configured_value(arguments, name) is True]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(f'--{name}' for name in chosen)} are mutually exclusive.")
    default = next(family for family in families.FAMILIES if family.is_default)
    return switches[chosen[0]] if chosen else default


def run_tool(subject: Subject, description: str, arguments: Sequence[str] | None = None) -> CacheReport:
    """Read the options, fill the caches, and say what became of their entries in all processes together."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    run_class: Any = caching_class(chosen_family(arguments))
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
