"""Several processes: averaged gradients, models loaded in turn, folders that machines share, lost processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.console import say, warn
from library.errors import UserError, in_one_line
from library.files import temporary_path
from library.torch_build import missing_cuda
from library.training.launch import without_engine
from library.training.run_options import DistributionOptions, PrecisionOptions

if TYPE_CHECKING:
    import torch

    from library.training.output.state import SavedState

LoadInTurn = Callable[[], contextlib.AbstractContextManager[None]]
"""What parts of the model are loaded in: with ``--lowram`` the processes take turns."""


def make_accelerator(precision: PrecisionOptions, distribution: DistributionOptions, only_plans: bool = False) -> Any:
    """Start accelerate: device, processes, mixed precision.

    Raises UserError when the device cannot compute in the requested precision; a run that is only planned needs not.
    """
    from datetime import timedelta

    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    if os.environ.get("RANK", "0") == "0" and (message := missing_cuda()):
        warn(message)
    lacks_fp16 = precision.mixed_precision == "fp16" and not torch.cuda.is_available()
    if lacks_fp16 and not only_plans:
        raise UserError("--mixed_precision fp16 needs a CUDA device; use bf16 or no on this machine.")
    handlers = []
    if distribution.ddp_timeout:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(minutes=distribution.ddp_timeout)))
    # Several processes without accelerators talk through gloo, which accelerate only sets up when told so.
    several_on_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    started = "no" if lacks_fp16 else precision.mixed_precision
    with without_engine():
        accelerator = Accelerator(mixed_precision=started, kwargs_handlers=handlers, cpu=several_on_cpu)
    if lacks_fp16:
        say("--mixed_precision fp16 is planned as for a CUDA device; training on this machine needs bf16 or no")
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    return accelerator


def processes_per_machine(accelerator: Any) -> int:
    """The processes on this machine; those of a machine have consecutive ranks."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))


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


# ---- processes that must be alike ------------------------------------------------------------------------------------


UNSHARED_GROUPS = frozenset("config console logging hub report metadata saving".split())
"""Option groups that only concern the process which reads or writes something."""


def shared_facts(options: Any) -> dict[str, Any]:
    """The options, by their words, that every process of a run must have been given alike."""
    from library.options import declared_options, option_value
    from library.training.tracking import PATH_OPTIONS

    declared = declared_options(type(options)).items()
    alike = ((name, option) for name, option in declared if option.group not in UNSHARED_GROUPS)
    return {f"--{name}": option_value(options, option) for name, option in alike if name not in PATH_OPTIONS}


def fingerprint_of(tensors: Iterable[torch.Tensor]) -> str:
    """A short hash of the values of tensors."""
    import torch

    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def require_agreement(accelerator: Any, facts: Mapping[str, Any]) -> None:
    """Raises UserError, in every process, when one of them has another value of one of ``facts`` than the first one.

    Every process must come here, with the same names.
    """
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import gather_object

    first, *others = gather_object([{name: str(value) for name, value in facts.items()}])
    for number, other in enumerate(others, 1):
        for name, value in first.items():
            if other.get(name) != value:
                raise UserError(
                    f"process {number} has another value of {name} ({_short(other.get(name))}) than process 0 "
                    f"({_short(value)}): all processes, on all machines, need the same command and the same files."
                )


def _short(value: str | None) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:80]}..."


# ---- folders on several machines -------------------------------------------------------------------------------------


def shares_of_folders(accelerator: Any, folders: Sequence[Path]) -> list[tuple[int, int]]:
    """For each folder this process's number and the count of those that share it: all, or those of this machine.

    Machines share a folder if a file that the first one puts there is seen by all. Every process must come here, with
    its own folders in the same order.
    """
    everywhere = (accelerator.process_index, accelerator.num_processes)
    machine = (accelerator.local_process_index, processes_per_machine(accelerator))
    if machine[1] >= accelerator.num_processes:
        return [everywhere] * len(folders)
    from accelerate.utils import broadcast_object_list, gather_object

    with contextlib.ExitStack() as marks:
        names: list[str] = []
        if accelerator.is_main_process:
            names = [marks.enter_context(_marked(folder)) for folder in folders]
        (names,) = broadcast_object_list([names])
        seen = gather_object([[bool(name) and (folder / name).exists() for folder, name in zip(folders, names)]])
        accelerator.wait_for_everyone()
    return [everywhere if all(each) else machine for each in zip(*seen)]


@contextlib.contextmanager
def _marked(folder: Path) -> Iterator[str]:
    """A hidden file in ``folder`` for a while: its name, or "" where none can be made."""
    mark = temporary_path(folder / "mark")
    try:
        mark.touch()
    except OSError:
        yield ""
        return
    try:
        yield mark.name
    finally:
        mark.unlink(missing_ok=True)


# ---- processes that are lost -----------------------------------------------------------------------------------------


LOST = ("connection closed", "connection reset", "broken pipe", "timed out", "timeout", "remote process exited")
"""What errors of the communication between processes say when another one does not answer."""


@contextlib.contextmanager
def naming_lost_processes() -> Iterator[None]:
    """What is inside ends with UserError when another process of the run has ended or does not answer."""
    try:
        yield
    except RuntimeError as error:
        import torch.distributed as dist

        lost = type(error).__name__.startswith("Dist") or any(sign in str(error).lower() for sign in LOST)
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and lost):
            raise
        raise UserError(
            f"process {dist.get_rank()} ends because another process of this run has ended or does not answer; what "
            f"that one said last is the cause ({in_one_line(error)})."
        ) from None


def choose_seed(given: int | None, saved: SavedState | None) -> int:
    """``--seed``, else the resumed state's, else a random one; all processes have the first one's."""
    own = saved.identity.exact["seed"] if given is None and saved is not None else given
    return of_main_process(secrets.randbits(32) if own is None else own)


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
