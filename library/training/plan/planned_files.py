"""Which files a run will write, found by going through its steps without training."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from library.training.output.checkpoints import OutputFolder
from library.training.output.sample_images import Samples
from library.training.output.state import Position
from library.training.plan.lengths import RunPlan


@dataclass
class PlannedFiles:
    """Files and folders by path, in the order in which they are written."""

    networks: list[Path] = field(default_factory=list)
    states: list[Path] = field(default_factory=list)
    removed: set[Path] = field(default_factory=set)
    """Those of both that are removed again before the run ends."""
    sample_moments: int = 0
    """How often all sample prompts are drawn."""


def plan_files(plan: RunPlan, start: Position, output: OutputFolder, samples: Samples) -> PlannedFiles:
    """The files of a run from ``start`` to its end, as ``NetworkTrainer`` writes and removes them."""
    found = PlannedFiles(sample_moments=int(start.step == 0 and samples.due_at_start()))
    options = output.options
    step, epoch, batch = start.step, start.epoch, start.batch
    while step < plan.max_steps:
        left = plan.steps_per_epoch - batch // plan.accumulation
        for _ in range(min(left, plan.max_steps - step)):
            step += 1
            found.sample_moments += samples.due_after_step(step)
            if output.step_is_due(step):
                _add(found, output.step_file(step), output.step_state(step) if options.save_state else None)
                found.removed.update(output.old_after_step(step))
        epoch, batch = epoch + 1, 0
        found.sample_moments += samples.due_after_epoch(epoch)
        if output.epoch_is_due(epoch, plan.epochs):
            _add(found, output.epoch_file(epoch), output.epoch_state(epoch) if options.save_state else None)
            found.removed.update(output.old_after_epoch(epoch))
    last = options.save_state or options.save_state_on_train_end
    _add(found, output.final_file(), output.final_state() if last else None)
    found.removed &= {*found.networks, *found.states}
    return found


def _add(found: PlannedFiles, network: Path, state: Path | None) -> None:
    found.networks.append(network)
    if state is not None:
        found.states.append(state)


def kept(paths: list[Path], removed: set[Path]) -> list[Path]:
    """Those of ``paths`` that are still there at the end, each once."""
    return [path for path in Counter(paths) if path not in removed]
