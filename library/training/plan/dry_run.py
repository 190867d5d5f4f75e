"""``--dry_run``: the plan of a run that has passed its checks.

What it says is what the run does, because the run's own code builds it (``rehearsal.py``).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from library.console import size_text
from library.training.optim.lr_schedulers import ReportedLearningRate, load_scheduler_state
from library.training.plan.disk_space import file_sizes, free_bytes, shortage
from library.training.plan.memory_estimate import largest_batch, memory_phases, optimizer_state_bytes
from library.training.plan.plan_report import MemoryPhase, Plan
from library.training.plan.planned_files import plan_files
from library.training.plan.rehearsal import Rehearsal, build, cache_plans
from library.training.plan.step_time import mean_share, measure_speed, step_seconds, time_line
from library.training.plan.verdict import verdict_of
from library.training.report.description import start_facts
from library.training.report.report_options import report_is_wanted

if TYPE_CHECKING:
    from library.training.run_facts import RunFacts

RATE_POINTS = 5
MOST_SCHEDULER_STEPS = 20_000
"""A schedule that is no formula is followed so far."""


def plan_of(run: Rehearsal) -> Plan:
    """The plan. Raises UserError for mistakes that show when the network and the optimizer are built.

    The run is not to be used afterwards.
    """
    caches, missing, encoders = cache_plans(run)
    samples, outputs, device = run.outputs.samples, run.outputs, run.accelerator.device
    simulation, problem = build(run, encoders)
    if not problem:
        run.check_saved_state()
    facts = None if problem else run.facts()
    rates, rate_note = learning_rates(facts) if facts else ({}, "unknown")
    network_bytes, state_bytes, phases, lacking = None, None, [], None
    files = plan_files(run.plan, run.progress.position, outputs.files, samples)
    notes = [_free_memory(device)]
    if facts:
        optimizer_bytes, note = optimizer_state_bytes(run.options.optimizer, facts.optimization.parameters)
        network_bytes, state_bytes = file_sizes(run.network, run.options, optimizer_bytes)
        lacking = shortage(files, network_bytes, state_bytes, outputs.files.folder)
        notes += [note] if note else []
        with simulation.running():
            held = {plan.name: plan.bytes for plan in caches if plan.in_memory and plan.bytes}
            phases = memory_phases(facts, run.step_loss, optimizer_bytes, missing[0], missing[1], held)
    length = run.plan
    passed = [phase for phase in phases if not phase.name.startswith("(")]
    seconds = time.time() - run.progress.process_started_at
    return Plan(
        start=start_facts(facts) if facts else None,
        problem=problem,
        length={"steps": length.max_steps, "epochs": length.epochs, "steps per epoch": length.steps_per_epoch},
        rates=rates,
        rate_note=rate_note,
        caches=caches,
        files=files,
        network_bytes=network_bytes,
        state_bytes=state_bytes,
        sample_prompts=len(samples.prompts),
        sample_folder=samples.folder,
        other_files=_other_files(run),
        free_bytes=free_bytes(outputs.files.folder),
        shortage=lacking,
        phases=phases,
        device=str(device),
        processes=run.accelerator.num_processes,
        memory_notes=notes,
        seconds=seconds,
        time=_expected_time(run, passed),
        verdict=verdict_of(run, passed, problem),
    )


def _expected_time(run: Rehearsal, phases: Sequence[MemoryPhase]) -> str:
    """How long the steps that are left take, by a short measurement on the device."""
    training = next((phase for phase in phases if phase.effort is not None), None)
    if training is None or training.effort is None:
        return "unknown"
    device, largest = run.accelerator.device, largest_batch(run.latents.data.train)
    try:
        speed = measure_speed(device, run.weight_dtype, training.effort.product)
    except RuntimeError as error:  # a device without room for it
        return f"unknown ({str(error).splitlines()[0]})"
    copied = 0 if device.type == "cpu" else 2 * training.host.get("streamed blocks", 0)
    share = mean_share(run.latents.data.train, largest.width * largest.height * largest.count)
    batch = step_seconds(training.effort, speed, share, copied)
    length = run.plan
    step = batch * length.batches_per_epoch / length.steps_per_epoch
    return time_line(step, length.max_steps - run.progress.step, str(device))


def learning_rates(run: RunFacts) -> tuple[dict[str, list[tuple[int, float]]], str]:
    """The rate of each group at some steps (the first is 1), or a remark why they are not known ahead."""
    from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

    scheduler, first, last = run.optimization.scheduler, run.progress.step, run.plan.max_steps
    steps = sorted({first + 1 + (last - first - 1) * point // (RATE_POINTS - 1) for point in range(RATE_POINTS)})
    if isinstance(scheduler, ReportedLearningRate):
        return {}, "the optimizer finds its own, or follows no schedule"
    if isinstance(scheduler, ReduceLROnPlateau) or not hasattr(scheduler, "get_last_lr"):
        return {}, "depends on the loss"
    saved = run.outputs.saved
    if saved is not None:
        load_scheduler_state(scheduler, saved.rest["lr_scheduler"])
    rates: dict[int, list[float]]
    if isinstance(scheduler, LambdaLR):
        begin, formulas = scheduler.last_epoch - first, list(zip(scheduler.base_lrs, scheduler.lr_lambdas))
        rates = {step: [float(base) * formula(begin + step - 1) for base, formula in formulas] for step in steps}
    elif last - first > MOST_SCHEDULER_STEPS:
        return {}, f"not followed for more than {MOST_SCHEDULER_STEPS:,} steps"
    else:
        rates = _followed(scheduler, first, steps)
    names = [group.name for group in start_facts(run).groups]
    return {name: [(step, rates[step][i]) for step in steps] for i, name in enumerate(names)}, ""


def _followed(scheduler: Any, first: int, steps: list[int]) -> dict[int, list[float]]:
    """The rates at ``steps`` by stepping the scheduler."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of schedulers that are stepped without their optimizer
        for step in range(first + 1, steps[-1] + 1):
            if step in steps:
                found[step] = list(scheduler.get_last_lr())
            scheduler.step()
    return found


def _free_memory(device: Any) -> str:
    """What the device has, and how much of that is free now."""
    import psutil
    import torch

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    return f"{device} has {size_text(total)}, {size_text(free)} free"


def _other_files(run: Rehearsal) -> list[str]:
    """Lines about whatever else is written."""
    options, saving = run.options, run.options.saving
    lines = []
    data, outputs = run.latents.data, run.outputs
    if report_is_wanted(options.report, bool(outputs.samples.prompts), data.validation is not None):
        lines.append(f"report {outputs.files.folder / (saving.output_name or 'last')}.report.html")
    if options.logging.logging_dir and options.logging.log_with != "wandb":
        lines.append(f"training curves in {options.logging.logging_dir}")
    subsets = [subset for dataset in data.train.datasets for subset in dataset.settings.subsets]
    folders = dict.fromkeys(str(subset.image_dir) for subset in subsets if subset.cache_info)
    lines += [f"metadata_cache.json in {folder}" for folder in folders]
    if options.hub.huggingface_repo_id:
        lines.append(f"uploads to {options.hub.huggingface_repo_id}")
    return lines
