"""``--dry_run``: the plan of a run that has passed its checks.

The run's own code builds network, optimizer and schedule, on tensors without values; so what the plan says is what
the run does. Nothing is loaded and nothing is written.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from library.console import LOGGER, silence, size_text
from library.errors import UserError
from library.memory.simulation import Simulation, forget_values
from library.training.optim.lr_schedulers import ReportedLearningRate, load_scheduler_state
from library.training.plan.disk_space import file_sizes, free_bytes, shortage
from library.training.plan.memory_estimate import memory_phases, optimizer_state_bytes
from library.training.plan.plan_report import CachePlan, Plan
from library.training.plan.planned_files import plan_files
from library.training.report.description import start_facts
from library.training.report.report_options import report_is_wanted

if TYPE_CHECKING:
    from library.data.cache import LatentCache, TextCache
    from library.models.pipeline import Pipeline
    from library.training.latents import Latents
    from library.training.output.run_outputs import RunOutputs
    from library.training.plan.lengths import RunPlan
    from library.training.progress import Progress
    from library.training.run_facts import RunFacts
    from library.training.step_loss import StepLoss
    from library.training.text_conditioning import TextConditioning
    from library.training.training_options import TrainingOptions

RATE_POINTS = 5
MOST_SCHEDULER_STEPS = 20_000
"""A schedule that is no formula is followed so far."""


class Rehearsal(Protocol):
    """A run that has passed its checks and can build what it trains, for a plan without values."""

    options: TrainingOptions
    accelerator: Any
    plan: RunPlan
    progress: Progress
    outputs: RunOutputs
    pipeline: Pipeline
    latents: Latents
    text: TextConditioning
    step_loss: StepLoss
    network: Any
    no_effect: list[str]

    def open_pipeline(self) -> None:
        """Open the base model's files as the options say. Raises UserError."""

    def load_models(self) -> None:
        """Load what is frozen."""

    def make_network(self) -> None:
        """Create the network in the base model."""

    def place_network(self) -> None:
        """Put the network on the device."""

    def build_optimizer(self) -> None:
        """Make optimizer and schedule."""

    def check_saved_state(self) -> None:
        """Compare a resumed state with the run. Raises UserError."""

    def facts(self) -> RunFacts:
        """The run, once it is built."""


def plan_of(run: Rehearsal) -> Plan:
    """The plan. Raises UserError for mistakes that show when the network and the optimizer are built."""
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
        network_bytes, state_bytes = file_sizes(facts, optimizer_bytes)
        lacking = shortage(files, network_bytes, state_bytes, outputs.files.folder)
        notes += [note] if note else []
        with simulation.running():
            held = {plan.name: plan.bytes for plan in caches if plan.in_memory and plan.bytes}
            phases = memory_phases(facts, run.step_loss, optimizer_bytes, missing[0], missing[1], held)
    length = run.plan
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
        no_effect=run.no_effect,
        seconds=time.time() - run.progress.process_started_at,
    )


def build(run: Rehearsal, encoders: Collection[str]) -> tuple[Simulation, str]:
    """Load the parts of a run, and make network, optimizer and schedule, without values.

    Returns what they live in, and what kept them from being made, if anything did.
    """
    run.pipeline.load_tokenizers(encoders)  # their files are real
    simulation = Simulation(run.pipeline)
    with simulation.running():
        run.load_models()
        run.pipeline.load_autoencoder()
        run.pipeline.load_text_encoders(encoders)
    try:
        run.make_network()  # outside, because it may read files of its own
        with simulation.running():
            forget_values(run.network)
            run.place_network()
        run.build_optimizer()  # outside, because it may make look-up tables
    except UserError:
        raise
    except Exception as error:  # a network of others may look at numbers of the base model
        return simulation, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return simulation, ""


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Around what builds a run ahead: random draws of the run itself stay what they are."""
    import torch

    with torch.random.fork_rng(devices=[]):
        yield


def try_network_files(run: Rehearsal) -> None:
    """Let the network take the files of ``--network_weights`` and ``--base_weights`` before any model is loaded.

    Raises UserError when they don't fit. What can only be seen with values shows when the network is really built.
    """
    network = run.options.network
    if not network.network_weights and not network.base_weights:
        return
    encoders = run.text.encoders_at_steps if network.base_weights else run.text.trained
    run.pipeline.load_tokenizers(encoders)
    simulation = Simulation(run.pipeline)
    try:
        with silence():
            with simulation.running():
                run.load_models()
                run.pipeline.load_text_encoders(encoders)
            run.make_network()
    except UserError:
        raise
    except Exception as error:  # as in _build
        LOGGER.debug("the files of the network were not tried: %s", error)
    finally:
        run.pipeline.modules.clear()


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


def cache_plans(run: Rehearsal) -> tuple[list[CachePlan], tuple[bool, bool], Collection[str]]:
    """The caches, whether latents and texts are missing in them, and the text encoders that the run needs at all."""
    latents, texts = run.latents.open_caches(), run.text.open_caches()
    caches = [*_cache_plans("latent cache", latents), *_cache_plans("text encoder cache", texts)]
    missing = (any(cache.missing for cache in latents), any(cache.missing for cache in texts))
    encodes_text = not run.text.caching or missing[1] or bool(run.outputs.samples.prompts)
    return caches, missing, run.pipeline.encoders if encodes_text else run.text.trained


def _cache_plans(name: str, caches: Sequence[LatentCache | TextCache]) -> list[CachePlan]:
    """Of the training data and, as the second one, of the validation data."""
    return [
        CachePlan(
            name=f"{name}{' of validation data' if number else ''}",
            in_memory=not cache.to_disk,
            states=cache.states,
            bytes=cache.missing_bytes,
        )
        for number, cache in enumerate(caches)
    ]


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
