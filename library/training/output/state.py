"""Resumable state: a folder from which a run continues to the same bits.

Version 1 of the format::

    model.safetensors       the network as trained (its state_dict)
    optimizer.safetensors   every tensor of the optimizer's state
    average.safetensors     with --ema_decay: the moving average of the weights, in float32
    train_state.json        everything else: position, schedule, optimizer numbers, loss record, what the run was

No random state is stored: every draw is derived from the seed and the position (``library.randomness``). The folder
appears under its name only when it is complete.

Where a folder replaces one of the same name, the old one has to make room first. A process that is killed in that
moment leaves no folder of the name, but a complete one beside it that knows its name (``finish_replacements``).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.files import explaining_full_disk, stale_temporaries, temporary_path, write_text
from library.safetensors_io import read_header
from library.text_files import parse_json, read_text

FORMAT = "lora-training-state"
VERSION = 1


AVERAGE_FILE = "average.safetensors"
LARGEST_DOCUMENT = 1 << 30
"""Bytes of train_state.json; the numbers of an optimizer take a few for each of its tensors."""
NOT_WHAT_WAS_PACKED = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What unpacking something else raises."""


@dataclass
class ResumeOptions:
    """Resuming"""

    resume: str | None = None
    """State folder to continue from, to the same result as an uninterrupted run. `latest`: the newest whole state of
    this --output_name in --output_dir; `auto`: the same, and a new run if there is none."""
    initial_epoch: int | None = None
    """Number (from 1) of the first epoch, when the earlier ones were trained elsewhere."""
    initial_step: int | None = None
    """Number of steps that count as done at the start; overrides --initial_epoch."""
    skip_until_initial_step: bool = False
    """With --initial_step or --initial_epoch: also pass over the data of the steps that count as done."""


@dataclass
class Position:
    """Where in a run: epochs and steps done, and how far the present epoch's data is used."""

    epoch: int = 0
    """Finished epochs."""
    batch: int = 0
    """Micro-batches of the present epoch that were used."""
    step: int = 0
    """Optimizer updates done."""


@dataclass
class RunIdentity:
    """What must be the same for a state to belong to a run (``fixed``), and what only costs exactness (``exact``)."""

    fixed: dict[str, Any] = field(default_factory=dict)
    exact: dict[str, Any] = field(default_factory=dict)


def pack(value: Any, tensors: dict[str, Any], name: str) -> Any:
    """A JSON-able image of nested Python data; tensors are put into ``tensors`` under names that begin with ``name``.

    Raises TypeError for objects that are neither data nor tensors.
    """
    import torch

    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[pack(k, tensors, f"{name}.key"), pack(v, tensors, f"{name}.{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [pack(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name}: cannot store a {type(value).__name__}")


def unpack(value: Any, tensors: dict[str, Any]) -> Any:
    """The data that ``pack`` was given."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {unpack(k, tensors): unpack(v, tensors) for k, v in content}
    parts = [unpack(v, tensors) for v in content]
    return parts if kind == "list" else tuple(parts)


def save_state(
    folder: Path,
    network_state: dict[str, Any],
    optimizer_state: Any,
    position: Position,
    identity: RunIdentity,
    rest: Any,
    average: Mapping[str, Any] | None = None,
) -> None:
    """Write a state folder, complete or not at all; one of the same name is replaced.

    ``network_state`` maps names to tensors, ``optimizer_state`` is the optimizer's ``state_dict()``, ``rest`` is nested
    data without tensors (schedule, loss record, gradient scaler), ``average`` the tensors of the weights' average.
    """
    from library.safetensors_io import save_file

    tensors: dict[str, Any] = {}
    packed = pack(optimizer_state, tensors, "optimizer")
    averages = {} if average is None else {name: tensor.cpu().contiguous() for name, tensor in average.items()}
    size = sum(tensor.nbytes for tensor in (*network_state.values(), *tensors.values(), *averages.values()))
    aside = temporary_path(folder)
    with explaining_full_disk(folder, size):
        try:
            aside.mkdir(parents=True)
            save_file({k: v.detach().cpu().contiguous() for k, v in network_state.items()}, aside / "model.safetensors")
            save_file(tensors, aside / "optimizer.safetensors")
            if average is not None:
                save_file(averages, aside / AVERAGE_FILE)
            document = {
                "format": FORMAT,
                "version": VERSION,
                "name": folder.name,
                "saved_at": time.time(),
                "current_epoch": position.epoch + 1,
                "current_step": position.step,
                "position": asdict(position),
                "identity": asdict(identity),
                "optimizer": packed,
                "rest": pack(rest, {}, "rest"),
            }
            write_text(aside / "train_state.json", json.dumps(document, indent=1))
            _take_name(aside, folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def _take_name(aside: Path, folder: Path) -> None:
    """Rename ``aside`` to ``folder``; an older folder of that name vanishes only after the new one stands."""
    if not folder.exists():
        os.replace(aside, folder)
        return
    old = temporary_path(folder)
    os.replace(folder, old)
    os.replace(aside, folder)
    shutil.rmtree(old)


def finish_replacements(folder: Path) -> None:
    """Give the states in ``folder`` their names that were about to replace others when their processes were killed.

    To be called before stale temporaries are removed. Another process may do the same at the same time.
    """
    found: dict[str, SavedState] = {}
    for path in stale_temporaries(folder):
        try:
            saved = SavedState(path)
        except UserError:
            continue
        name = saved.document.get("name")
        if isinstance(name, str) and Path(name).name == name and not (folder / name).exists():
            found[name] = max(found.get(name, saved), saved, key=lambda one: one.age_key)
    for name, saved in found.items():
        with contextlib.suppress(OSError):  # whoever was quicker has renamed it
            os.replace(saved.folder, folder / name)


class SavedState:
    """A state folder that was opened; tensors are read on request."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError when ``folder`` holds no complete state of this format."""
        self.folder = folder
        path = folder / "train_state.json"
        if not folder.is_dir():
            raise UserError(f"--resume: there is no state folder {folder}.")
        try:
            document = parse_json(read_text(path, byte_limit=LARGEST_DOCUMENT), path)
        except UserError:
            raise UserError(f"--resume: {folder} has no readable train_state.json; it is not a state folder.") from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise UserError(
                f"--resume: {folder} was written by another program; continue from its LoRA file with "
                "--network_weights."
            )
        if document.get("version") != VERSION:
            raise UserError(f"--resume: {folder} was written by a newer version of these scripts.")
        for name in ("model.safetensors", "optimizer.safetensors"):
            if not (folder / name).is_file():
                raise UserError(f"--resume: {folder} is incomplete: {name} is missing.")
            try:
                read_header(folder / name)
            except UserError as error:
                raise UserError(f"--resume: {folder} is incomplete: {error}") from None
        self.document = document
        try:
            self.position = Position(**document["position"])
            self.identity = RunIdentity(**document["identity"])
            self.rest = unpack(document["rest"], {})
            self.saved_at = float(document.get("saved_at", path.stat().st_mtime))
            if not all(type(count) is int and count >= 0 for count in vars(self.position).values()):
                raise ValueError("positions are numbers of epochs, batches and steps")
        except (*NOT_WHAT_WAS_PACKED, OSError):
            raise self._damaged() from None
        """When it was written, in seconds since 1970."""

    @property
    def age_key(self) -> tuple[float, int]:
        """Greater for a newer state."""
        return self.saved_at, self.position.step

    def check_belongs_to(self, identity: RunIdentity, unrecorded: Mapping[str, Any] | None = None) -> list[str]:
        """The properties of the run that changed since the state was saved and end exactness.

        ``unrecorded`` has what stands for properties that the state, being older, does not know. Raises UserError when
        the state belongs to another run.
        """
        for name, value in identity.fixed.items():
            saved = self.identity.fixed.get(name)
            if saved != value:
                raise UserError(
                    f"--resume: {self.folder} belongs to another run: its {name} is {saved}, this run's is {value}."
                )
        saved_exact = {**(unrecorded or {}), **self.identity.exact}
        return [name for name, value in identity.exact.items() if saved_exact.get(name) != value]

    def network_state(self) -> dict[str, Any]:
        """The network's tensors by name."""
        return self._tensors("model.safetensors")

    def optimizer_state(self) -> Any:
        """The optimizer's ``state_dict()`` as it was."""
        tensors = self._tensors("optimizer.safetensors")
        try:
            return unpack(self.document["optimizer"], tensors)
        except NOT_WHAT_WAS_PACKED:
            raise self._damaged() from None

    def average(self) -> dict[str, Any] | None:
        """The tensors of the weights' average; None: the run had none."""
        return self._tensors(AVERAGE_FILE) if (self.folder / AVERAGE_FILE).exists() else None

    def _damaged(self) -> UserError:
        return UserError(f"--resume: {self.folder} is damaged: its train_state.json is not what was written.")

    def _tensors(self, name: str) -> dict[str, Any]:
        from library.checkpoints import open_checkpoint

        source = open_checkpoint(self.folder / name)
        return {key: source.load(key) for key in source.keys()}  # noqa: SIM118
