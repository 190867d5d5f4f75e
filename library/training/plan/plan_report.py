"""The plan that ``--dry_run`` prints: facts in, plain ASCII lines out (but for names of files)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.console import size_text
from library.memory.simulation import Effort
from library.training.plan.planned_files import PlannedFiles, kept
from library.training.report.wording import (
    StartFacts,
    counted,
    length_lines,
    network_lines,
    part_lines,
    table,
    time_text,
)


@dataclass(frozen=True)
class CachePlan:
    """One cache before it is filled."""

    name: str
    """Latent cache or text encoder cache, and of which data."""
    in_memory: bool
    states: Mapping[str, int]
    """Entries by state: valid, missing, stale, damaged, not finite."""
    bytes: int | None
    """Size of the entries that will be made; None where shapes are not known ahead."""


@dataclass(frozen=True)
class MemoryPhase:
    """What is held at once at the peak of a phase, in bytes; ``activations`` holds the gradients too."""

    name: str
    weights: Mapping[str, int]
    """Of the base model on the device, by part; streamed blocks have a ring there."""
    network: int
    optimizer: int
    activations: int | None
    """None when they could not be found."""
    host: Mapping[str, int]
    """What is kept in system RAM beside it, by what it is."""
    reason: str = ""
    """Why activations are not known."""
    effort: Effort | None = None
    """Of a training step with the largest batch."""

    @property
    def total(self) -> int:
        """All of it on the device, without activations that are not known."""
        return sum(self.weights.values()) + self.network + self.optimizer + (self.activations or 0)


@dataclass(frozen=True)
class Plan:
    """Everything that ``--dry_run`` tells."""

    start: StartFacts | None
    """None when the network or the optimizer could not be built without values; ``problem`` says why."""
    problem: str
    length: Mapping[str, int]
    """Steps, epochs, steps per epoch, first step: known in any case."""
    rates: Mapping[str, Sequence[tuple[int, float]]]
    """Learning rate by group at some steps; empty where the optimizer finds its own."""
    rate_note: str
    caches: Sequence[CachePlan]
    files: PlannedFiles
    network_bytes: int | None
    """Of one file of the trained network."""
    state_bytes: int | None
    """Of one resumable state."""
    sample_prompts: int
    sample_folder: Path
    other_files: Sequence[str]
    free_bytes: int
    """On the disk of the output folder."""
    shortage: str | None
    """Why the files do not fit there; None: they do."""
    phases: Sequence[MemoryPhase]
    device: str
    processes: int
    memory_notes: Sequence[str]
    seconds: float
    """From the start of the program to here."""
    time: str
    """How long the training will take."""
    verdict: str
    """Whether it fits."""


def plan_lines(plan: Plan) -> list[str]:
    """The whole plan."""
    sections = [
        ("What is trained", _training_lines(plan)),
        ("Learning rate", _rate_lines(plan)),
        ("Caches", _cache_lines(plan.caches)),
        ("Files", _files_lines(plan)),
        ("Expected memory", _memory_lines(plan)),
    ]
    lines = ["Plan of the run (dry run: no model was loaded, nothing was written)"]
    for title, body in sections:
        lines += [f"{title}:", *(f"  {line}" for line in body)]
    if not plan.shortage:
        lines.append(f"All checks passed in {time_text(plan.seconds)}.")
    return [*lines, f"Expected time: {plan.time}", f"Verdict: {plan.verdict}"]


def _training_lines(plan: Plan) -> list[str]:
    if plan.start is not None:
        return [*part_lines(plan.start), *network_lines(plan.start), *length_lines(plan.start)]
    length = ", ".join(f"{name} {count:,}" for name, count in plan.length.items())
    return [f"network: unknown ({plan.problem})", length]


def _rate_lines(plan: Plan) -> list[str]:
    if not plan.rates:
        return [plan.rate_note]
    steps = [step for step, _ in next(iter(plan.rates.values()))]
    head = ("step", *(f"{step:,}" for step in steps))
    rows = [(name, *(f"{rate:.3g}" for _, rate in points)) for name, points in plan.rates.items()]
    return [*table([head, *rows]), *([plan.rate_note] if plan.rate_note else [])]


def _cache_lines(caches: Sequence[CachePlan]) -> list[str]:
    if not caches:
        return ["none: images and captions are encoded at every step"]
    lines = []
    for cache in caches:
        total = sum(cache.states.values())
        others = ", ".join(f"{count:,} {state}" for state, count in cache.states.items() if state != "valid" and count)
        made = total - cache.states.get("valid", 0)
        size = f", about {size_text(cache.bytes)}" if cache.bytes else ""
        work = f"; {made:,} are made ({others}{size})" if made else "; nothing to make"
        place = "in memory" if cache.in_memory else "in files beside the images"
        lines.append(f"{cache.name} {place}: {cache.states.get('valid', 0):,} of {total:,} entries valid{work}")
    return lines


def _files_lines(plan: Plan) -> list[str]:
    files = plan.files
    lines = _paths_lines("network file", files.networks, files.removed, plan.network_bytes)
    lines += _paths_lines("state", files.states, files.removed, plan.state_bytes)
    if plan.sample_prompts and files.sample_moments:
        count = plan.sample_prompts * files.sample_moments
        times = counted(files.sample_moments, "time")
        prompts = counted(plan.sample_prompts, "prompt")
        lines.append(f"{counted(count, 'sample image')} ({prompts}, {times}) in {plan.sample_folder}")
    lines += plan.other_files
    kept_bytes = sum(
        size * len(kept(paths, files.removed))
        for paths, size in ((files.networks, plan.network_bytes), (files.states, plan.state_bytes))
        if size
    )
    peak = files.peak_bytes(plan.network_bytes or 0, plan.state_bytes or 0)
    most = f", at most {size_text(peak)} at a time" if peak > kept_bytes else ""
    short = " - NOT ENOUGH" if plan.shortage else ""
    free = f"{size_text(plan.free_bytes)} free on that disk{short}"
    return [*lines, f"about {size_text(kept_bytes)} at the end{most}; {free}"]


def _paths_lines(what: str, paths: Sequence[Path], removed: set[Path], size: int | None) -> list[str]:
    """The first, the last but one and the last of the paths."""
    if not paths:
        return []
    each = "" if size is None else f", about {size_text(size)}{' each' if len(paths) > 1 else ''}"
    gone = len([path for path in paths if path in removed])
    count = f"{counted(len(paths), what)}{each}{f', {gone:,} of them removed again' if gone else ''}:"
    shown = list(paths) if len(paths) <= 5 else [*paths[:2], None, *paths[-2:]]
    return [count, *("  ..." if path is None else f"  {path}" for path in shown)]


def _memory_lines(plan: Plan) -> list[str]:
    parts = list(dict.fromkeys(part for phase in plan.phases for part in phase.weights))
    head = ("", *parts, "network", "optimizer", "activations, gradients", "together", "system RAM")
    rows = [
        (
            phase.name,
            *(_size_or_dash(phase.weights.get(part, 0)) for part in parts),
            _size_or_dash(phase.network),
            _size_or_dash(phase.optimizer),
            "unknown" if phase.activations is None else size_text(phase.activations),
            f"{size_text(phase.total)}{' and more' if phase.activations is None else ''}",
            _size_or_dash(sum(phase.host.values())),
        )
        for phase in plan.phases
    ]
    held = {name: max(p.host.get(name, 0) for p in plan.phases) for phase in plan.phases for name in phase.host}
    hosted = ", ".join(f"{name} {size_text(size)}" for name, size in held.items() if size)
    reasons = [f"{phase.name}: unknown because of {phase.reason}" for phase in plan.phases if phase.activations is None]
    each = f" of each of {plan.processes} processes" if plan.processes > 1 else ""
    return [
        f"an estimate: tensors{each} on {plan.device} at the peak of each phase, with the largest batch;",
        "libraries, the driver, fragmentation and what kernels need inside them come on top",
        *(table([head, *rows]) if rows else [f"unknown ({plan.problem})"]),
        *reasons,
        *([f"in system RAM beside libraries: {hosted}"] if hosted else []),
        *plan.memory_notes,
    ]


def _size_or_dash(size: int) -> str:
    return size_text(size) if size else "-"
