"""Whether a run fits: on its device, into ``--vram_budget``, or, planned on a machine without a GPU, on usual ones.

The yardstick is that of ``--vram_budget``: what tensors may take of a device's memory. Where the run does not fit, the
options are named that ``--vram_budget`` would choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from library.console import silence, size_text
from library.errors import UserError
from library.memory.budget import GIB, budget_bytes, usable
from library.training.plan.budget import Fitting, command_words
from library.training.plan.plan_report import MemoryPhase
from library.training.plan.rehearsal import Rehearsal, without_values

if TYPE_CHECKING:
    import torch

GPUS = (8, 12, 16, 24)
"""GB of usual GPUs."""


def verdict_of(run: Rehearsal, phases: Sequence[MemoryPhase], problem: str) -> str:
    """``fits ...``, ``does not fit ...`` or ``unknown: ...``, and why.

    ``phases``: those that the run goes through. The run has to open its pipeline again afterwards.
    """
    unknown = problem or next((phase.reason for phase in phases if phase.activations is None), "")
    if unknown:
        return f"unknown: the memory of this run cannot be planned ({unknown})"
    needed, budget, device = (
        max(phase.total for phase in phases),
        run.options.precision.vram_budget,
        run.accelerator.device,
    )
    if budget is None and device.type != "cuda":
        return _on_usual_gpus(run, needed)
    size = budget_bytes(budget, device)
    where = f"on {device}" if budget is None else f"into --vram_budget {budget:g}"
    limit = usable(size)
    found = f"{size_text(needed)} expected, {size_text(max(limit, 0))} of {size_text(size)} usable"
    if needed <= limit:
        return f"fits {where} ({found}{_lacking_now(needed, device) if budget is None else ''})"
    advice = _advice([size / GIB], run)[0][1]
    return f"does not fit {where} ({found}); it does with {advice}"


def _lacking_now(needed: int, device: torch.device) -> str:
    """A remark when other programs hold memory that the run needs."""
    import torch

    free = torch.cuda.mem_get_info(device)[0]
    return f", but only {size_text(free)} are free now" if free < needed else ""


def _on_usual_gpus(run: Rehearsal, needed: int) -> str:
    fitting = [size for size in GPUS if needed <= usable(size * GIB)]
    others = [size for size in GPUS if size not in fitting]
    how = (
        f"fits on GPUs of {_listed(fitting, 'and')} GB"
        if fitting
        else f"does not fit on GPUs of {_listed(GPUS, 'or')} GB"
    )
    advice = "".join(f"; on {size:g} GB with {words}" for size, words in _advice(others[::-1], run))
    return f"{how} ({size_text(needed)} expected){advice}"


def _listed(sizes: Sequence[float], word: str) -> str:
    *first, last = (f"{size:g}" for size in sizes)
    return f"{', '.join(first)} {word} {last}" if first else last


def _advice(sizes: Sequence[float], run: Rehearsal) -> list[tuple[float, str]]:
    """The options with which the run fits into devices of this many GiB, the largest first."""
    if not sizes:
        return []
    no_way = "fewer pixels or images in a batch"
    if run.options.precision.mixed_precision == "no":
        no_way = "--mixed_precision bf16 at the best"
    with silence(), without_values():
        try:
            fitting = Fitting(run)
            chosen = [fitting.options_for(usable(round(size * GIB)))[0] for size in sizes]
        except UserError:
            return [(size, no_way) for size in sizes]
    return [(size, no_way if found is None else command_words(found.changes)) for size, found in zip(sizes, chosen)]
