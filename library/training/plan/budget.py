"""``--vram_budget`` and ``--blocks_to_swap auto``: the options with which a run fits into the device's memory.

Activations depend neither on how weights are stored nor on where they wait, so a training step is simulated once with
and, only if that could fit, once without gradient checkpointing; weights are added by arithmetic. Of all that fits, the
fastest is taken, in this order: everything as it is; gradient checkpointing; streaming, as long as copies hide behind
the computation; 8 bits; 8 bits and streaming; and 4 bits only where nothing else fits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.console import silence, size_text
from library.errors import UserError
from library.memory.budget import GIB, budget_bytes, least_budget, usable
from library.memory.simulation import Peak, module_bytes
from library.memory.streaming_options import pins
from library.training.plan.memory_estimate import checkpointing_is, optimizer_state_bytes, run_phases
from library.training.plan.rehearsal import Rehearsal, build, cache_plans, without_values
from library.training.plan.step_time import COPYING
from library.training.report.timing import process_memory
from library.training.report.wording import Forecast

if TYPE_CHECKING:
    from library.memory.stream_choice import BlockSizes, StreamedBlocks

ASSUMED_FLOPS = 100e12
"""Products per second of a fast consumer GPU, as it is reached in training (an RTX 4090)."""

Changes = dict[str, Any]
"""Values of options, by name."""


@dataclass(frozen=True)
class PhaseNeeds:
    """A phase of a run, without the weights of the base model."""

    parts: frozenset[str]
    fixed: int
    """Bytes of the network and of the optimizer's state."""
    peak: Callable[[bool], Peak]
    """Of activations and gradients, with gradient checkpointing or without."""


@dataclass(frozen=True)
class StoredModel:
    """The base model in one storage format."""

    changes: Changes
    """The options that say so."""
    bytes: Mapping[str, int]
    """Of each part."""
    dense: int
    """The largest weight that is made dense for a product."""
    sizes: BlockSizes
    """Of the denoiser's blocks."""
    encoders: Mapping[str, StreamedBlocks]
    """All blocks of each text encoder."""
    swap: Callable[[int], StreamedBlocks]
    """The blocks that are streamed for a number of ``--blocks_to_swap``."""
    most: int
    """The largest such number."""


@dataclass(frozen=True)
class Candidate:
    """Options that may fit."""

    changes: Changes
    device: int
    host: int


class Needs:
    """What a run needs in memory, phase by phase, with any of the options that change it."""

    def __init__(
        self, phases: list[PhaseNeeds], denoiser: str, held: int, on_host: frozenset[str] = frozenset()
    ) -> None:
        self.phases, self.denoiser, self.held = phases, denoiser, held
        self.on_host = on_host
        """Parts that work on the CPU."""

    def of(self, model: StoredModel, checkpointing: bool, count: int, encoders: bool) -> tuple[int, int]:
        """Bytes on the device and in system RAM at the peak of the run; ``encoders``: whether they are streamed."""
        streamed = dict(model.encoders) if encoders else {}
        if count:
            streamed[self.denoiser] = model.swap(count)
        device = host = 0
        for phase in self.phases:
            peak = phase.peak(checkpointing)
            on_device = phase.parts - self.on_host
            weights = sum(model.bytes[part] for part in on_device)
            moved = [streamed[part] for part in on_device if part in streamed]
            beside = sum(model.bytes[part] for part in phase.parts & self.on_host)
            weights -= sum(blocks.bytes - blocks.ring_bytes for blocks in moved)
            dense = model.dense if self.denoiser in phase.parts else 0
            device = max(device, weights + phase.fixed + peak.device + dense)
            host = max(host, self.held + beside + sum(blocks.bytes for blocks in moved) + peak.host)
        return device, host


class Fitting:
    """The search for options with which a run fits; the run has to open its pipeline again afterwards."""

    def __init__(self, run: Rehearsal, only_streams: bool = False) -> None:
        """``only_streams``: no options but those of streaming. Raises UserError where the run cannot be simulated."""
        self.run, self.only_streams = run, only_streams
        no_effect = list(run.no_effect)
        self.needs = needs_of(run)
        run.no_effect[:] = no_effect

    def options_for(self, limit: int) -> tuple[Candidate | None, Candidate]:
        """The fastest options that fit into ``limit`` bytes, if any do, and those that need least."""
        least = None
        no_effect = list(self.run.no_effect)
        try:
            for candidate in _candidates(self.run, self.needs, self.only_streams, limit):
                least = candidate if least is None or candidate.device < least.device else least
                if candidate.device <= limit:
                    return candidate, least
        finally:
            self.run.no_effect[:] = no_effect
        assert least is not None
        return None, least


def fit(run: Rehearsal) -> tuple[Forecast, str]:
    """Set the options that let the run fit; returns its expected memory and a line that names them.

    Options that were given stay. Raises UserError, before any model is loaded, when nothing fits.
    """
    options, device = run.options, run.accelerator.device
    only_streams = options.streaming.blocks_to_swap == "auto"
    why = "--blocks_to_swap auto" if only_streams else f"--vram_budget {options.precision.vram_budget:g}"
    budget = budget_bytes(options.precision.vram_budget, device)
    with silence(), without_values():
        found, least = Fitting(run, only_streams).options_for(usable(budget))
    before = process_memory()  # with the libraries that the run works with
    if found is None:
        with_them = f" ({command_words(least.changes)})" if least.changes else ""
        raise UserError(
            f"{why}: the run does not fit into {budget / GIB:g} GiB; --vram_budget {least_budget(least.device):g} is "
            f"the least that its options allow{with_them}, unless it has fewer pixels or images in a batch."
        )
    set_options(options, found.changes)
    shared = found.device if device.type == "cpu" else 0
    forecast = Forecast(None if shared else found.device, before + found.host + shared)
    chosen = f"chooses {command_words(found.changes)}" if found.changes else "needs no other options"
    memory = f"{size_text(found.device)} of {budget / GIB:g} GiB"
    return forecast, f"{why} {chosen}: {memory} on the device at the peak, {size_text(found.host)} in system RAM"


# ---- what a run needs ------------------------------------------------------------------------------------------------


def needs_of(run: Rehearsal) -> Needs:
    """Build the run without values, and simulate its phases when they are needed."""
    options = run.options
    given = (options.precision.gradient_checkpointing, options.streaming.blocks_to_swap)
    options.precision.gradient_checkpointing, options.streaming.blocks_to_swap = True, None
    try:
        run.open_pipeline()
        run.pipeline.dtypes = {part: getattr(dtype, "compute", dtype) for part, dtype in run.pipeline.dtypes.items()}
        caches, missing, encoders = cache_plans(run)
        simulation, problem = build(run, encoders)
    finally:
        options.precision.gradient_checkpointing, options.streaming.blocks_to_swap = given
    if problem:
        raise UserError(f"--vram_budget: the memory of this run cannot be planned ({problem}); choose its options.")
    facts, pipeline = run.facts(), run.pipeline
    optimizer, _ = optimizer_state_bytes(options.optimizer, facts.optimization.parameters)
    trained = module_bytes(run.network) + optimizer
    phases = []
    for work in run_phases(facts, run.step_loss, *missing):

        @functools.cache
        def peak(checkpointing: bool, work: Any = work) -> Peak:
            with silence(), simulation.running(), checkpointing_is(pipeline, checkpointing):
                return work.peak()

        once: Callable[[bool], Peak] = peak if work.is_step else functools.partial(_of_checkpointing, peak)
        phases.append(PhaseNeeds(work.parts, trained if work.trains else 0, once))
    held = sum(plan.bytes for plan in caches if plan.in_memory and plan.bytes)
    return Needs(phases, pipeline.denoiser, held, frozenset(pipeline.on_host))


def _of_checkpointing(peak: Callable[[bool], Peak], checkpointing: bool) -> Peak:
    """For phases without a backward pass."""
    return peak(True)


def stored_model(run: Rehearsal, changes: Changes, parts: frozenset[str]) -> StoredModel | None:
    """The model of the run with other options; None where the device or the files do not allow them."""
    given = {name: option_of(run.options, name) for name in (*changes, "blocks_to_swap", "stream_text_encoders")}
    simulated = dict(vars(run))
    set_options(run.options, {**changes, "blocks_to_swap": None, "stream_text_encoders": False})
    try:
        run.open_pipeline()
        pipeline = run.pipeline
    except UserError:
        return None
    finally:
        set_options(run.options, given)
        vars(run).update(simulated)
    slots = run.options.streaming.block_swap_ring_size
    sizes = pipeline.block_sizes()
    return StoredModel(
        changes=changes,
        bytes={part: pipeline.part_bytes(part, spread=True) for part in parts},
        dense=pipeline.dense_bytes(pipeline.denoiser),
        sizes=sizes,
        encoders={part: pipeline.every_block(part, slots) for part in pipeline.encoders if part in parts},
        swap=functools.cache(lambda count: pipeline.blocks_for(count, sizes, slots)),
        most=pipeline.most_to_swap(sizes),
    )


# ---- candidates, the fastest first -----------------------------------------------------------------------------------


def _candidates(run: Rehearsal, needs: Needs, only_streams: bool, limit: int) -> Iterator[Candidate]:
    """Options in the order of preference, those that were given among them. The last ones need the least memory."""
    options = run.options
    precision, streaming = options.precision, options.streaming
    parts = frozenset(part for phase in needs.phases for part in phase.parts)
    spread = bool(run.pipeline.sharded)  # FSDP takes neither streamed blocks nor other formats
    keeps_format = only_streams or spread or precision.mixed_precision == "no" or _format_is_given(precision)
    plain = stored_model(run, {}, parts)
    if plain is None:
        run.open_pipeline()  # which says why
        raise AssertionError("the options that were given cannot be used")
    fixed = streaming.blocks_to_swap if isinstance(streaming.blocks_to_swap, int) else None
    streams = fixed is None and not spread and not precision.cpu_offload_checkpointing
    given = {"gradient_checkpointing": True} if not (only_streams or precision.gradient_checkpointing) else {}

    def candidates(model: StoredModel, changes: Changes, most: int) -> Iterator[Candidate]:
        checkpointing = precision.gradient_checkpointing or bool(changes)
        for count in range(most + 1):
            for encoders in dict.fromkeys((streaming.stream_text_encoders, True)):
                device, host = needs.of(model, checkpointing, fixed or count, encoders)
                more = {**changes, **model.changes, **({"blocks_to_swap": count} if count else {})}
                if encoders and not streaming.stream_text_encoders:
                    more["stream_text_encoders"] = True
                yield Candidate(more, device, host)

    if given and _may_fit(needs, plain, limit, fixed or 0):
        yield from candidates(plain, {}, 0)
    hidden = plain.most if keeps_format else _hidden(run, needs, plain)
    yield from candidates(plain, given, hidden if streams else 0)
    smaller: list[Changes] = [] if keeps_format else [{"fp8_scaled": True}, {"base_format": "nf4"}]
    for changes in smaller:
        model = stored_model(run, changes, parts)
        if model is not None:
            yield from candidates(model, given, model.most if streams else 0)


def _may_fit(needs: Needs, model: StoredModel, limit: int, count: int) -> bool:
    """Whether a run without checkpointing is worth simulating: with it, it takes less."""
    return needs.of(model, True, count, True)[0] <= limit


def _format_is_given(precision: Any) -> bool:
    return precision.fp8_base or precision.fp8_base_unet or precision.fp8_scaled or precision.base_format is not None


def _hidden(run: Rehearsal, needs: Needs, model: StoredModel) -> int:
    """The largest ``--blocks_to_swap`` whose copies hide behind a forward pass, from memory that is pinned."""
    seconds = max(phase.peak(True).forward_flops for phase in needs.phases) / ASSUMED_FLOPS
    streaming = run.options.streaming
    fitting = (
        count
        for count in range(1, model.most + 1)
        if model.swap(count).bytes <= seconds * COPYING and pins(streaming, model.swap(count).bytes)
    )
    return max(fitting, default=0)


# ---- options by name -------------------------------------------------------------------------------------------------


def option_of(options: Any, name: str) -> Any:
    """The value of an option of precision or streaming."""
    return getattr(_group(options, name), name)


def set_options(options: Any, values: Changes) -> None:
    """Set options of precision or streaming, as if they had been given."""
    for name, value in values.items():
        setattr(_group(options, name), name, value)


def _group(options: Any, name: str) -> Any:
    return options.streaming if hasattr(options.streaming, name) else options.precision


def command_words(values: Changes) -> str:
    """Options as they are typed."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in values.items())
