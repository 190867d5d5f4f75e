"""Which files a run will write, found by going through its steps without training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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
    """How often all sample prompts are used."""
    heights: set[tuple[int, int]] = field(default_factory=set)
    """How many network files and how many states are there at once, at each moment when there are most."""

    def peak_bytes(self, network: int, state: int) -> int:
        """The most that all of them take at once, for the bytes of one network file and of one state."""
        return max((networks * network + states * state for networks, states in self.heights), default=0)


def plan_files(plan: RunPlan, start: Position, output: OutputFolder, samples: Samples) -> PlannedFiles:
    """The files of a run from ``start`` to its end, as ``NetworkTrainer`` writes and removes them."""
    found = PlannedFiles(sample_moments=int(start.step == 0 and samples.due_at_start()))
    options = output.options
    there: dict[Path, bool] = {}

    def write(network: Path, state: Path | None, old: Sequence[Path]) -> None:
        for path in output.with_average(network):
            there[path] = False
            found.networks.append(path)
        if state is not None:
            there[state] = True
            found.states.append(state)
        states = sum(there.values())
        found.heights.add((len(there) - states, states))
        found.removed.update(old)
        for path in old:
            there.pop(path, None)

    step, epoch, batch = start.step, start.epoch, start.batch
    while step < plan.max_steps:
        left = plan.steps_per_epoch - batch // plan.accumulation
        for _ in range(min(left, plan.max_steps - step)):
            step += 1
            found.sample_moments += samples.due_after_step(step)
            if output.step_is_due(step):
                state = output.step_state(step) if options.save_state else None
                write(output.step_file(step), state, output.old_after_step(step))
        epoch, batch = epoch + 1, 0
        found.sample_moments += samples.due_after_epoch(epoch)
        if output.epoch_is_due(epoch, plan.epochs):
            state = output.epoch_state(epoch) if options.save_state else None
            write(output.epoch_file(epoch), state, output.old_after_epoch(epoch))
    last = options.save_state or options.save_state_on_train_end
    write(output.final_file(), output.final_state() if last else None, [])
    found.removed &= {*found.networks, *found.states}
    return found


def kept(paths: list[Path], removed: set[Path]) -> list[Path]:
    """Those of ``paths`` that are still there at the end, each once."""
    return [path for path in Counter(paths) if path not in removed]
