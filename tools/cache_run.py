"""What the caching tools share: a training run that ends where training would begin.

The tools take the options of a family's training script and call the steps by which that script fills its caches, so
that the caches are those which the training then finds.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any, Literal

from library import families
from library.console import say, set_up_console
from library.devices import parse_dtype
from library.errors import UserError
from library.families import Family
from library.options import configured_value, parse_options
from library.training.checks import require_model
from library.training.run_options import check_precision

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


@functools.cache
def caching_options(family: Family) -> type:
    """The options of the family's script and of caching."""
    groups: list[Any] = [
        ("caching", CachingOptions, field(default_factory=CachingOptions)),
        ("switches", switches := family_switches(), field(default_factory=switches)),
    ]
    options = make_dataclass(f"{family.script}_caching_options", groups, bases=(family.options_class(),))
    options.__doc__ = f"The options of {family.file} and of caching."
    return options


class CachingRun:
    """A family's trainer, taken as far as its caches, without anything that only training needs."""

    def __init__(self, family: Family, options: Any, subject: Subject) -> None:
        """Caches lie on disk; which encoders are trained makes no difference to what is in them."""
        self.family, self.options, self.subject = family, options, subject
        options.network.network_train_unet_only = True
        options.network.network_train_text_encoder_only = False
        if subject == "latents":
            options.cache.cache_latents_to_disk = True
        else:
            options.text_cache.cache_text_encoder_outputs_to_disk = True
        self.trainer = family.trainer_class().of(options)
        self.trainer.how_else = self.how_else

    def run(self) -> list[CacheReport]:
        """Fill the caches; what became of this process' entries. Raises UserError."""
        trainer = self.trainer
        self.check_options()
        trainer.start_processes()
        trainer.read_data()
        trainer.open_pipeline(trainer.cache_parts.get(self.subject, ()))
        self.take_t5xxl_dtype()
        caches = trainer.latents if self.subject == "latents" else trainer.text
        if not self.options.preflight.dry_run:
            return caches.fill_caches(trainer.load_in_turn)
        for cache in caches.open_caches():
            say(f"{cache.missing} of {len(cache.entries)} entries would be made")
        return []

    def check_options(self) -> None:
        """Only what caches depend on. Raises UserError."""
        trainer = self.trainer
        check_precision(self.options.precision)
        require_model(self.options.model)
        trainer.report_unused(["skip_existing"], "since valid files are kept anyway")
        if self.subject == "latents":
            trainer.report_unused(["t5xxl_dtype"], "on latents")
        trainer.check_family()

    def take_t5xxl_dtype(self) -> None:
        """T5-XXL computes in ``--t5xxl_dtype`` where it is given."""
        if "t5xxl" not in self.trainer.pipeline.encoders:
            self.trainer.report_unused(["t5xxl_dtype"])
        elif self.options.caching.t5xxl_dtype:
            self.trainer.pipeline.dtypes["t5xxl"] = parse_dtype(self.options.caching.t5xxl_dtype)

    def how_else(self, script: str) -> str:
        """The tools' switch for the family of ``script``."""
        other = next(family for family in families.FAMILIES if family.file == script)
        return f"leave out --{self.family.key}" if other.is_default else f"add --{other.key}"


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
    family = chosen_family(arguments)
    options: Any = parse_options(caching_options(family), description, arguments)
    set_up_console(options.console)
    run = CachingRun(family, options, subject)
    made = run.run()
    accelerator = run.trainer.accelerator

    from accelerate.utils import gather_object

    from library.data.cache import CacheReport

    reports = gather_object(made)
    total = CacheReport(f"finished; {reports[0].subject if reports else subject}")
    for report in reports:
        total.kept += report.kept
        total.made += report.made
        total.rebuilt += report.rebuilt
    if accelerator.is_main_process and reports:
        say(total.line())
    accelerator.end_training()
    return total
