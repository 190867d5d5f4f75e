"""What is printed when a run begins and when it ends: facts in, plain ASCII lines out (but for names of files)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from library.console import size_text

MOST_FILES = 12
"""Files that the end report names; of more, the last ones."""


@dataclass(frozen=True)
class PartFacts:
    """One part of the base model."""

    name: str
    parameters: int
    dtype: str
    """The dtype of most of it."""
    bytes: int


@dataclass(frozen=True)
class GroupFacts:
    """One group of trained parameters."""

    name: str
    tensors: int
    parameters: int
    learning_rate: float | None
    """None: the optimizer finds its own."""


@dataclass(frozen=True)
class StartFacts:
    """A run before its first step."""

    family: str
    device: str
    processes: int
    dtype: str
    """The format of the computation."""
    attention: str
    gradient_checkpointing: bool
    parts: Sequence[PartFacts]
    """Those in memory now."""
    absent: Sequence[str]
    """Those that are not, because what they give is cached or because they come later."""
    network: str
    network_dtype: str
    modules: Mapping[str, int]
    """Number of network modules in each model; empty when the network doesn't tell."""
    groups: Sequence[GroupFacts]
    optimizer: str
    schedule: str
    batch_sizes: Sequence[int]
    """Of the data sets, each once."""
    accumulation: int
    images_per_epoch: int
    """With repeats."""
    steps: int
    epochs: int
    steps_per_epoch: int
    start_step: int
    """Steps that count as done."""
    seed: int
    average_decay: float | None = None
    """Of the moving average of the weights, if there is one."""

    @property
    def effective_batches(self) -> list[int]:
        """Images per step for each batch size."""
        return [size * self.accumulation * self.processes for size in self.batch_sizes]


@dataclass(frozen=True)
class Forecast:
    """The most memory that a run is expected to take, in bytes."""

    device: int | None
    """Of tensors on a device with memory of its own; None where there is none."""
    process: int
    """In system RAM, libraries among it."""


@dataclass(frozen=True)
class FileFacts:
    """A file or folder that the run wrote."""

    path: Path
    bytes: int


@dataclass(frozen=True)
class EndFacts:
    """A run after its last step."""

    steps: int
    """Done by this process and those beside it, without the steps of a resumed state."""
    images: int
    seconds: float
    """From the start of the program."""
    parts: Mapping[str, float]
    """Seconds by kind of work (``run_timing.RunClock``)."""
    peak_process_bytes: int
    peak_device_bytes: int | None
    losses: Mapping[str, float]
    """Last value by name."""
    left_out: int = 0
    """Steps without their update."""
    forecast: Forecast | None = None
    """What was expected of both peaks, where it was."""
    files: Sequence[FileFacts] = field(default_factory=list)
    """Those that still exist, in the order in which they were written, without sample images."""
    samples: Sequence[FileFacts] = field(default_factory=list)
    interrupted: str | None = None
    """Why the run ended before its last step."""


def start_lines(facts: StartFacts) -> list[str]:
    """Device, base model, network, optimizer, batches and length."""
    processes = f", {facts.processes} processes" if facts.processes > 1 else ""
    checkpointing = ", gradient checkpointing" if facts.gradient_checkpointing else ""
    decay = facts.average_decay
    average = f", moving average of the weights with decay {decay:g}" if decay is not None else ""
    return [
        f"device {facts.device}{processes}, computing in {facts.dtype}, attention {facts.attention}{checkpointing}",
        *part_lines(facts),
        *network_lines(facts),
        f"optimizer {facts.optimizer}, schedule {facts.schedule}{average}",
        *length_lines(facts),
    ]


def part_lines(facts: StartFacts) -> list[str]:
    """The base model's parts as a table."""
    rows = [(part.name, f"{part.parameters:,} parameters", part.dtype, size_text(part.bytes)) for part in facts.parts]
    absent = f", unloaded: {', '.join(facts.absent)}" if facts.absent else ""
    return [f"base model {facts.family}{absent}", *table(rows, left=(0, 2))]


def network_lines(facts: StartFacts) -> list[str]:
    """Modules and parameter groups."""
    modules = " and ".join(f"{count} {model}" for model, count in facts.modules.items())
    rows = [
        (
            group.name,
            f"{group.tensors} tensors",
            f"{group.parameters:,} parameters",
            "learning rate of its own" if group.learning_rate is None else f"learning rate {group.learning_rate:g}",
        )
        for group in facts.groups
    ]
    total = sum(group.parameters for group in facts.groups)
    kind = f"network {facts.network} in {facts.network_dtype}"
    return [f"{kind}: {modules + ' modules, ' if modules else ''}{total:,} parameters", *table(rows, left=(0, 3))]


def length_lines(facts: StartFacts) -> list[str]:
    """How many images make a step, and how many steps the run."""
    sizes = " or ".join(str(size) for size in facts.batch_sizes)
    effective = " or ".join(str(size) for size in facts.effective_batches)
    factors = [f"{count} {what}" for count, what in ((facts.accumulation, "batches"), (facts.processes, "processes"))]
    shown = [factor for factor in factors if not factor.startswith("1 ")]
    batch = f"batch size {sizes}" + "".join(f" x {factor}" for factor in shown)
    images = f" = {effective} images per step" if shown else ""
    begin = f" from step {facts.start_step:,} on" if facts.start_step else ""
    return [
        f"{batch}{images}, {facts.images_per_epoch:,} images per epoch",
        f"{counted(facts.steps, 'step')}{begin}: {counted(facts.epochs, 'epoch')} of "
        f"{counted(facts.steps_per_epoch, 'step')}, seed {facts.seed}",
    ]


def end_lines(facts: EndFacts) -> list[str]:
    """Time, speed, memory, losses and files."""
    how = f"ended early ({facts.interrupted})" if facts.interrupted else "finished"
    lines = [
        f"{how} after {time_text(facts.seconds)}: {counted(facts.steps, 'step')}, {counted(facts.images, 'image')}"
        f"{_speed(facts)}",
        f"time: {_shares(facts.parts)}",
        f"peak memory: {_memory(facts)}",
    ]
    if facts.losses:
        lines.append("loss: " + ", ".join(f"{name} {value:.5f}" for name, value in facts.losses.items()))
    if facts.left_out:
        lines.append(f"updates left out: {left_out_text(facts.left_out)}")
    return lines + _file_lines(facts)


def left_out_text(count: int) -> str:
    """The line about steps whose update was left out."""
    return f"{counted(count, 'step')} whose loss or gradients were not finite"


def _speed(facts: EndFacts) -> str:
    """Rates while training, the waiting for data included, all else left out."""
    seconds = facts.parts.get("training", 0.0) + facts.parts.get("waiting for data", 0.0)
    if seconds <= 0 or not facts.steps:
        return ""
    return f"; {rate_text(facts.steps / seconds)} steps/s, {rate_text(facts.images / seconds)} images/s while training"


def _shares(parts: Mapping[str, float]) -> str:
    total = sum(parts.values()) or 1.0
    largest_first = sorted(parts.items(), key=lambda entry: -entry[1])
    return ", ".join(f"{name} {time_text(seconds)} ({seconds / total:.0%})" for name, seconds in largest_first)


def _memory(facts: EndFacts) -> str:
    expected = facts.forecast
    main = f"{size_text(facts.peak_process_bytes)} of system RAM"
    main += "" if expected is None else f" ({size_text(expected.process)} predicted)"
    if facts.peak_device_bytes is None:
        return main
    predicted = "" if expected is None or expected.device is None else f" ({size_text(expected.device)} predicted)"
    return f"{size_text(facts.peak_device_bytes)} on the device{predicted}, {main}"


def _file_lines(facts: EndFacts) -> list[str]:
    """The newest files by name, sample images as one line."""
    shown = facts.files[-MOST_FILES:]
    rows = [(str(file.path), size_text(file.bytes)) for file in shown]
    total = size_text(sum(file.bytes for file in facts.files))
    newest = f" (the newest {MOST_FILES} of them)" if len(shown) < len(facts.files) else ""
    lines = [f"{counted(len(facts.files), 'file')} written, {total}{newest}", *table(rows)]
    if facts.samples:
        folder, size = facts.samples[0].path.parent, size_text(sum(file.bytes for file in facts.samples))
        lines.append(f"{counted(len(facts.samples), 'sample image')} in {folder}, {size}")
    return lines


# ---- numbers and tables ------------------------------------------------------------------------------------------


def table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Rows with aligned columns, indented; columns in ``left`` begin together, the others end together."""
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def counted(number: int, noun: str) -> str:
    """``1 step``, ``1,600 steps``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def time_text(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min 5 s``, ``2 h 10 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def rate_text(rate: float) -> str:
    """Three significant digits."""
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"
