"""The state of a run: what identifies it, what is written, and how a run continues from it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from library.console import say, warn
from library.errors import UserError
from library.options import declared_options, option_value
from library.training.data import TrainingData
from library.training.network.contract import restore_training_state, training_state
from library.training.optim.ema import MovingAverage
from library.training.optim.lr_schedulers import load_scheduler_state, scheduler_state
from library.training.output.state import AVERAGE_FILE, Position, RunIdentity, SavedState, save_state
from library.training.run_facts import RunFacts
from library.training.tracking import PATH_OPTIONS

SAME_RESULT_GROUPS = frozenset(
    "config console preflight model saving resume length distribution obsolete_distribution nonfinite samples sampler "
    "validation report logging metadata hub cache text_cache".split()
)
"""Option groups that don't shape the result of training, or whose part in it is compared by what it leads to."""
SAME_RESULT_OPTIONS = PATH_OPTIONS | set(
    "max_data_loader_n_workers persistent_data_loader_workers debug_dataset mem_eff_attn".split()
)


def run_identity(run: RunFacts) -> RunIdentity:
    """What a saved state must share with this run, and what must be equal for exactness."""
    options, pipeline = run.options, run.pipeline
    shapes = {name: list(tensor.shape) for name, tensor in training_state(run.network).items()}
    fixed = {
        "model family": run.family,
        "network module": options.network.network_module,
        "number of network tensors": len(shapes),
        "network structure": hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:16],
        "optimizer": run.optimization.created.name,
    }
    exact = {
        "seed": run.seed,
        "base model": pipeline.identity(*pipeline.parts),
        "data": run.data.train.fingerprint(),
        "gradient_accumulation_steps": run.plan.accumulation,
        "processes": run.processes,
    }
    for name, option in declared_options(type(options)).items():
        if option.group not in SAME_RESULT_GROUPS and name not in SAME_RESULT_OPTIONS:
            exact[f"--{name}"] = option_value(options, option)
    return RunIdentity(fixed, exact)


def check_saved_state(run: RunFacts, saved: SavedState) -> bool:
    """Compare the state of ``--resume`` with this run; returns whether its data goes by in the same order.

    A state that an earlier version wrote is taken to have the defaults of the options that came later. Raises UserError
    when the state belongs to another run.
    """
    defaults = {f"--{name}": option.default for name, option in declared_options(type(run.options)).items()}
    changed = saved.check_belongs_to(run_identity(run), defaults)
    of_order = {"data", "seed", "gradient_accumulation_steps", "processes"} & set(changed)
    same_batches = has_same_batches(run.data, run.seed, run.processes, saved)
    if of_order and of_order == set(changed) and of_order <= {"data", "processes"} and same_batches:
        warn(
            f"--resume: {' and '.join(sorted(of_order))} changed since the state was saved, but each batch has the same"
            " images as before: the run continues to the same result, up to rounding."
        )
    elif changed:
        anew = " The current epoch starts over." if of_order and not same_batches and saved.position.batch else ""
        warn(
            f"--resume: {', '.join(changed)} changed since the state was saved: the run continues, but results "
            f"will differ. Learning rates stay those of the state.{anew}"
        )
    return not of_order or same_batches


def has_same_batches(data: TrainingData, seed: int, processes: int, saved: SavedState) -> bool:
    """Whether each batch of the epoch that a state stands in has the same images as when it was saved.

    So it is with half as many images for each of twice as many processes, if the buckets divide evenly.
    """
    return saved.rest.get("order") == order_of_epoch(data, seed, processes, saved.position.epoch)


def earlier_position(data: TrainingData, seed: int, processes: int, saved: SavedState) -> Position | None:
    """Where a run stood when it had other epochs, with another number of processes; None: it always had the same."""
    if saved.identity.exact.get("processes") != processes and not has_same_batches(data, seed, processes, saved):
        return saved.position
    earlier = saved.rest.get("earlier")
    return None if earlier is None else Position(epoch=earlier["epoch"], step=earlier["step"])


def order_of_epoch(data: TrainingData, seed: int, processes: int, epoch: int) -> str:
    """What a state says of the batches of an epoch, counted from 0."""
    return data.train.order_fingerprint(epoch + 1, seed, processes)


def write_run_state(run: RunFacts, folder: Path, scaler: Any) -> None:
    """Write a resumable state; ``scaler`` is the gradient scaler, if there is one. Raises TypeError for an optimizer
    whose state is more than data and tensors."""
    progress, optimization = run.progress, run.optimization
    average = optimization.average
    save_state(
        folder,
        training_state(run.network),
        optimization.optimizer.state_dict(),
        progress.position,
        run_identity(run),
        {
            "lr_scheduler": scheduler_state(optimization.scheduler),
            "losses": progress.record.state(),
            "left_out": progress.left_out,
            "order": order_of_epoch(run.data, run.seed, run.processes, progress.position.epoch),
            "scaler": None if scaler is None else scaler.state_dict(),
            "earlier": {"epoch": run.plan.earlier_epochs, "step": run.plan.earlier_steps},
            "session": {"id": progress.session_id, "started_at": progress.started_at},
            "average_updates": 0 if average is None else average.updates,
        },
        None if average is None else average.tensors(),
    )


def restore_average(average: MovingAverage, saved: SavedState) -> None:
    """Let the average of the weights continue from a state, or begin with the state's weights where it has none.

    Raises UserError for a state that has lost it.
    """
    tensors, updates = saved.average(), saved.rest.get("average_updates", 0)
    if tensors is None and not updates:
        average.begin()
        say(f"{saved.folder} holds no moving average: it begins here, at step {saved.position.step}")
        return
    if tensors is None:
        raise UserError(f"--resume: {saved.folder} is incomplete: {AVERAGE_FILE} is missing.")
    average.restore(tensors, updates)


def restore_run_state(run: RunFacts, saved: SavedState, scaler: Any) -> None:
    """Let the network, the optimizer, the schedule and the record continue from a state of this run."""
    progress, optimization, rest = run.progress, run.optimization, saved.rest
    restore_training_state(run.network, saved.network_state())
    optimization.optimizer.load_state_dict(saved.optimizer_state())
    load_scheduler_state(optimization.scheduler, rest["lr_scheduler"])
    if optimization.average is not None:
        restore_average(optimization.average, saved)
    progress.record.load_state(rest["losses"])
    progress.left_out = rest.get("left_out", 0)
    progress.session_id, progress.started_at = rest["session"]["id"], rest["session"]["started_at"]
    if scaler is not None and rest["scaler"]:
        scaler.load_state_dict(rest["scaler"])
    position = progress.position
    say(f"resuming from {saved.folder}: step {position.step}, epoch {position.epoch + 1}")
