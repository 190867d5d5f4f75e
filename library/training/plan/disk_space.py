"""Whether the disk has room for the files that a run will write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.console import size_text
from library.devices import parse_dtype
from library.errors import UserError
from library.files import free_bytes
from library.training.optim.ema import BYTES_PER_VALUE
from library.training.plan.memory_estimate import optimizer_state_bytes
from library.training.plan.planned_files import PlannedFiles, plan_files
from library.training.report.description import module_counts, size_on_disk
from library.training.report.wording import counted

if TYPE_CHECKING:
    from library.training.run_facts import RunFacts
    from library.training.training_options import TrainingOptions

BYTES_PER_MODULE = 400
"""Overhead of a network file beyond its weights: names and alphas."""
MOST_PER_VALUE = 16 + BYTES_PER_VALUE
"""Bytes of optimizer state and moving average per trained value that no run exceeds."""


def file_sizes(network: Any, options: TrainingOptions, optimizer_bytes: int) -> tuple[int, int]:
    """Bytes of a file of ``network`` and of a state, from the weights that go into them."""
    precision = options.saving.save_precision
    parameters = list(network.parameters())
    width = None if precision is None else parse_dtype(precision).itemsize
    modules = sum(module_counts(network, "").values()) or len(parameters) // 2
    weights = sum(parameter.numel() * (width or parameter.element_size()) for parameter in parameters)
    as_trained = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    names = modules * BYTES_PER_MODULE
    return weights + names, as_trained + optimizer_bytes + 2 * names


def shortage(files: PlannedFiles, network_bytes: int, state_bytes: int, folder: Path) -> str | None:
    """The sentence that refuses a run whose LoRA files and states do not fit into ``folder``; None: they fit.

    Files that are there and will be replaced make room.
    """
    replaced = sum(size_on_disk(path) for path in {*files.networks, *files.states} if path.exists())
    needed, free = files.peak_bytes(network_bytes, state_bytes) - replaced, free_bytes(folder)
    if needed <= free:
        return None
    parts = [f"{counted(len(files.networks), 'network file')} of {size_text(network_bytes)}"]
    parts += [f"{counted(len(files.states), 'state')} of {size_text(state_bytes)}"] if files.states else []
    return (
        f"--output_dir: {folder} has no room for the files of this run: {' and '.join(parts)} take up to "
        f"{size_text(needed)} at a time, {size_text(free)} are free, {size_text(needed - free)} are missing; save "
        "fewer, keep only the last ones (--save_last_n_steps, --save_last_n_epochs), or choose another disk."
    )


def check_disk_space(run: RunFacts) -> None:
    """Before the first step, on the process that writes. Raises UserError as ``shortage`` says."""
    outputs, options = run.outputs, run.options
    files = plan_files(run.plan, run.progress.position, outputs.files, outputs.samples)
    values = sum(parameter.numel() for parameter in run.optimization.parameters)
    sizes = file_sizes(run.network, options, MOST_PER_VALUE * values)
    if shortage(files, *sizes, outputs.files.folder) is None:
        return
    if files.states:  # the optimizer's state is measured only where it matters
        optimizer_bytes = optimizer_state_bytes(options.optimizer, run.optimization.parameters)[0]
        sizes = file_sizes(run.network, options, optimizer_bytes)
    problem = shortage(files, *sizes, outputs.files.folder)
    if problem:
        raise UserError(problem)
