"""The memory that a run will take, as a line at its start: what holds it at its peak, on the device and beside it."""

from __future__ import annotations

from library.console import LOGGER, silence, size_text
from library.training.plan.memory_estimate import memory_phases, optimizer_state_bytes
from library.training.plan.plan_report import MemoryPhase
from library.training.plan.rehearsal import Rehearsal, build, cache_plans, without_values
from library.training.report.timing import process_memory
from library.training.report.wording import Forecast


def expected_memory(run: Rehearsal) -> tuple[Forecast, str] | None:
    """The run's memory as its options stand, and a line that says so; None where it cannot be found.

    The run is built without values. It has to open its pipeline again afterwards.
    """
    no_effect = list(run.no_effect)
    try:
        with silence(), without_values():
            run.open_pipeline()
            caches, (latents, texts), encoders = cache_plans(run)
            simulation, problem = build(run, encoders)
            if problem:
                raise ValueError(problem)
            facts = run.facts()
            optimizer, _ = optimizer_state_bytes(run.options.optimizer, facts.optimization.parameters)
            held = {plan.name: plan.bytes for plan in caches if plan.in_memory and plan.bytes}
            with simulation.running():
                phases = memory_phases(facts, run.step_loss, optimizer, latents, texts, held, both_ways=False)
    except Exception as error:  # a mistake of the user comes out of the run itself
        LOGGER.debug("the memory of the run is not known ahead: %s", error)
        return None
    finally:
        run.no_effect[:] = no_effect
    largest = max(phases, key=lambda phase: phase.total)
    if largest.activations is None:
        return None
    host = max(sum(phase.host.values()) for phase in phases)
    shared = largest.total if run.accelerator.device.type == "cpu" else 0
    forecast = Forecast(None if shared else largest.total, process_memory() + host + shared)
    return forecast, expected_line(largest, host, str(run.accelerator.device))


def expected_line(phase: MemoryPhase, host: int, device: str) -> str:
    """What holds the memory at the peak of ``phase``; ``host``: bytes in system RAM."""
    parts = {**phase.weights, "network": phase.network, "optimizer": phase.optimizer}
    parts["activations and gradients"] = phase.activations or 0
    listed = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size)
    return (
        f"expected memory on {device}: {size_text(phase.total)} at the peak, while {phase.name} ({listed}); "
        f"{size_text(host)} in system RAM beside libraries"
    )
