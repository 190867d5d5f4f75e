"""A run built ahead: its parts, network and optimizer on tensors without values, for plans, budgets and checks.

The run's own code builds them, so that what is found is what the run does. Nothing is loaded and nothing is written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from library.console import LOGGER, silence
from library.errors import UserError
from library.memory.simulation import Simulation, forget_values
from library.training.plan.disk_space import file_sizes, free_bytes, shortage
from library.training.plan.plan_report import CachePlan
from library.training.plan.planned_files import PlannedFiles, plan_files

if TYPE_CHECKING:
    import torch

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
    weight_dtype: torch.dtype
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


def try_network(run: Rehearsal) -> None:
    """Build the network before any model is loaded, where that can show that something does not fit.

    That is where it takes the files of ``--network_weights`` and ``--base_weights``, and where there is little room for
    its own. Raises UserError. What can only be seen with values shows when the network is really built.
    """
    network, outputs = run.options.network, run.outputs
    files = plan_files(run.plan, run.progress.position, outputs.files, outputs.samples)
    little_room = _has_little_room(run, files)
    if not network.network_weights and not network.base_weights and not little_room:
        return
    encoders = run.text.encoders_at_steps if network.base_weights else run.text.trained
    run.pipeline.load_tokenizers(encoders)
    simulation = Simulation(run.pipeline)
    try:
        with silence():
            with simulation.running():
                run.load_models()
                run.pipeline.load_text_encoders(encoders)
            with without_values():
                run.make_network()
    except UserError:
        raise
    except Exception as error:  # as in build
        LOGGER.debug("the network was not tried: %s", error)
        return
    finally:
        run.pipeline.modules.clear()
    if little_room:  # the optimizer's part of a state is not known yet
        lacking = shortage(files, *file_sizes(run.network, run.options, 0), outputs.files.folder)
        if lacking:
            raise UserError(lacking)


def _has_little_room(run: Rehearsal, files: PlannedFiles) -> bool:
    """Whether files as large as the denoiser would not fit: then it is worth knowing how large they will be."""
    processes = run.accelerator.num_processes
    if not run.accelerator.is_main_process or (processes > 1 and run.options.model.lowram):  # they load in turn
        return False
    free, denoiser = free_bytes(run.outputs.files.folder), run.pipeline.denoiser
    most = run.pipeline.most_part_bytes(denoiser)
    if files.peak_bytes(most, most) <= free:  # the exact size takes building the module
        return False
    size = run.pipeline.part_bytes(denoiser)
    return files.peak_bytes(size, size) > free


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
