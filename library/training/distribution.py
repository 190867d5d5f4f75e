"""Several processes: gradients averaged in one flat buffer, models loaded one process after another."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.training.run_options import DistributionOptions, PrecisionOptions

if TYPE_CHECKING:
    import torch

    from library.training.output.state import SavedState

LoadInTurn = Callable[[], contextlib.AbstractContextManager[None]]
"""What parts of the model are loaded in: with ``--lowram`` the processes take turns."""


def make_accelerator(precision: PrecisionOptions, distribution: DistributionOptions) -> Any:
    """Start accelerate: device, processes, mixed precision.

    Raises UserError when the device cannot compute in the requested precision.
    """
    from datetime import timedelta

    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    if precision.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed_precision fp16 needs a CUDA device; use bf16 or no on this machine.")
    handlers = []
    if distribution.ddp_timeout:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(minutes=distribution.ddp_timeout)))
    # Several processes without accelerators talk through gloo, which accelerate only sets up when told so.
    several_on_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    return Accelerator(mixed_precision=precision.mixed_precision, kwargs_handlers=handlers, cpu=several_on_cpu)


@contextlib.contextmanager
def in_turn(accelerator: Any) -> Iterator[None]:
    """Let the processes run the block one after another; every process must come here.

    After an error in one of them the others wait for it in vain, until the launcher ends them.
    """
    for _ in range(accelerator.process_index):
        accelerator.wait_for_everyone()
    yield
    for _ in range(accelerator.process_index, accelerator.num_processes):
        accelerator.wait_for_everyone()


def average_gradients(parameters: Sequence[torch.nn.Parameter], accelerator: Any) -> None:
    """Replace every gradient by its mean over all processes (one all-reduce for all of them).

    A parameter that has a gradient in some processes counts as zero in the others. One that has none in any of them
    stays without, so that an optimizer leaves it alone as it does in a single process.
    """
    import torch

    if accelerator.num_processes == 1:
        return
    lacking = [parameter.grad is None for parameter in parameters]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    present = torch.tensor([float(not lacks) for lacks in lacking], device=gradients[0].device)
    flat = torch.cat([*(gradient.reshape(-1).float() for gradient in gradients), present])
    flat = accelerator.reduce(flat, reduction="mean")
    for gradient, mean in zip(gradients, flat.split([*map(torch.numel, gradients), len(present)])):
        gradient.copy_(mean.view_as(gradient))
    if any(lacking):
        for parameter, share in zip(parameters, flat[-len(present) :].tolist()):
            if not share:
                parameter.grad = None


def mean_over_processes(values: torch.Tensor, accelerator: Any) -> torch.Tensor:
    """The mean of each of the values over all processes."""
    return values if accelerator.num_processes == 1 else accelerator.reduce(values, reduction="mean")


def choose_seed(given: int | None, saved: SavedState | None) -> int:
    """``--seed``, else the resumed state's, else a random one that all processes share."""
    if given is not None:
        return given
    if saved is not None:
        return saved.identity.exact["seed"]
    return of_main_process(secrets.randbits(32))


def of_main_process(value: Any) -> Any:
    """What the main process has given; every process must come here."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def require_same_state(saved: SavedState | None, accelerator: Any) -> None:
    """Raises UserError, in every process, unless all processes are to continue the same state.

    ``--resume auto`` finds different ones on machines that do not share the output folder.
    """
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import gather_object

    mine = "none" if saved is None else f"{saved.folder.name} (step {saved.position.step})"
    found = gather_object([mine])
    if len(set(found)) > 1:
        raise UserError(
            f"--resume: the processes found different states: {', '.join(dict.fromkeys(found))}; share the output "
            "folder between the machines, or copy the state to each."
        )
