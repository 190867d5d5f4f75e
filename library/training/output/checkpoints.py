"""When and under which names LoRA files and states are written, and which old ones are removed.

Names and retention follow kohya-ss/sd-scripts, so that front ends find the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.errors import UserError
from library.files import remove_stale_temporaries, remove_whole, require_writable_folder
from library.training.output.state import finish_replacements


@dataclass
class SavingOptions:
    """Output"""

    output_dir: str | None = None
    """Folder for the trained files; made when missing."""
    output_name: str | None = None
    """Base name of the trained files, without suffix."""
    save_model_as: Literal["safetensors", "ckpt", "pt"] = "safetensors"
    """File format of the trained network."""
    save_precision: Literal["float", "fp16", "bf16"] | None = None
    """Dtype in the file; unset means as trained."""
    save_every_n_epochs: int | None = None
    """Save a file every N epochs."""
    save_every_n_steps: int | None = None
    """Save a file every N steps."""
    save_n_epoch_ratio: int | None = None
    """Save at least N files, evenly over the epochs."""
    save_last_n_epochs: int | None = None
    """Keep only the files of the last N epochs."""
    save_last_n_steps: int | None = None
    """Keep only the files of the last N steps."""
    save_last_n_epochs_state: int | None = None
    """Keep only the states of the last N epochs; unset means as for files."""
    save_last_n_steps_state: int | None = None
    """Keep only the states of the last N steps; unset means as for files."""
    save_state: bool = False
    """Save a resumable state with every file."""
    save_state_on_train_end: bool = False
    """Save a resumable state at the end of training."""


class OutputFolder:
    """The files of one run: names, due times and retention.

    ``save_every_n_epochs`` is resolved from ``save_n_epoch_ratio`` once the number of epochs is known
    (``resolve_epoch_ratio``).
    """

    def __init__(self, options: SavingOptions, read_only: bool = False, averages: bool = False) -> None:
        """Raises UserError when there is no output folder or nothing can be written in it.

        With ``read_only`` the folder is neither made nor tidied; with ``averages`` each LoRA file has one beside it.
        """
        if not options.output_dir:
            raise UserError("--output_dir is missing; name the folder for the trained files.")
        for name in ("save_every_n_epochs", "save_every_n_steps", "save_n_epoch_ratio"):
            value = getattr(options, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, not {value}.")
        self.folder = Path(options.output_dir)
        self.options = options
        self.averages = averages
        _require_usable_name(options.output_name)
        self.every_n_epochs = options.save_every_n_epochs
        self._overdue: list[Path] = []
        if not read_only:
            finish_replacements(self.folder)
        require_writable_folder(self.folder, "--output_dir", read_only)
        if self.final_file().is_dir():
            raise UserError(f"--output_name: {self.final_file()} is to be written, but is a folder.")
        if self.final_state().is_file():
            raise UserError(f"--output_name: {self.final_state()} is to be a folder, but is a file.")
        if not read_only:
            remove_stale_temporaries(self.folder / "sample")  # where a killed run was drawing samples

    def resolve_epoch_ratio(self, epochs: int) -> None:
        """``--save_n_epoch_ratio N``: every floor(epochs / N) epochs, at least every epoch."""
        if self.options.save_n_epoch_ratio:
            self.every_n_epochs = max(epochs // self.options.save_n_epoch_ratio, 1)

    def epoch_file(self, epoch: int) -> Path:
        """The LoRA file of a finished epoch (1-based)."""
        return self._file(f"{self._name('epoch')}-{epoch:06d}")

    def step_file(self, step: int) -> Path:
        """The LoRA file of a step."""
        return self._file(f"{self._name('at')}-step{step:08d}")

    def final_file(self) -> Path:
        """The LoRA file of the finished run."""
        return self._file(self._name("last"))

    def average_file(self, path: Path) -> Path:
        """The file with the moving average of the weights that stand in ``path``."""
        return path.with_name(f"{path.stem}-ema{path.suffix}")

    def with_average(self, path: Path) -> list[Path]:
        """A LoRA file and the one beside it, if there is one."""
        return [path, self.average_file(path)] if self.averages else [path]

    def epoch_state(self, epoch: int) -> Path:
        """The state folder of a finished epoch (1-based)."""
        return self.folder / f"{self._name('epoch')}-{epoch:06d}-state"

    def step_state(self, step: int) -> Path:
        """The state folder of a step."""
        return self.folder / f"{self._name('at')}-step{step:08d}-state"

    def final_state(self) -> Path:
        """The state folder of the finished run."""
        return self.folder / f"{self._name('last')}-state"

    def states(self) -> list[Path]:
        """What stands in the folder under a name that a state of this run could have, whole or not, in no order."""
        step, epoch, last = (re.escape(self._name(default)) for default in ("at", "epoch", "last"))
        name = re.compile(rf"{step}-step\d{{8,}}-state|{epoch}-\d{{6,}}-state|{last}-state")
        return [path for path in self.folder.iterdir() if name.fullmatch(path.name)] if self.folder.is_dir() else []

    def _name(self, default: str) -> str:
        return self.options.output_name or default

    def _file(self, stem: str) -> Path:
        return self.folder / f"{stem}.{self.options.save_model_as}"

    def epoch_is_due(self, epoch: int, epochs: int) -> bool:
        """Whether the file of ``epoch`` (1-based) is written; the last epoch's is the final file instead."""
        return bool(self.every_n_epochs) and epoch % self.every_n_epochs == 0 and epoch < epochs  # type: ignore[operator]

    def step_is_due(self, step: int) -> bool:
        """Whether the file of ``step`` is written."""
        every = self.options.save_every_n_steps
        return bool(every) and step % every == 0  # type: ignore[operator]

    def old_after_epoch(self, epoch: int) -> list[Path]:
        """The files and the state that are due to go once ``epoch`` was saved."""
        every = self.every_n_epochs or 0
        keep = self.options.save_last_n_epochs
        keep_states = self.options.save_last_n_epochs_state or keep
        old = self.with_average(self.epoch_file(epoch - every * keep)) if keep and epoch >= every * keep else []
        if keep_states and epoch >= every * keep_states:
            old.append(self.epoch_state(epoch - every * keep_states))
        return old

    def old_after_step(self, step: int) -> list[Path]:
        """The files and the state that are due to go once ``step`` was saved."""
        every = self.options.save_every_n_steps or 1
        keep = self.options.save_last_n_steps
        keep_states = self.options.save_last_n_steps_state or keep
        old = []
        if keep and (number := _step_to_remove(step, keep, every)) > 0:
            old += self.with_average(self.step_file(number))
        if keep_states and (number := _step_to_remove(step, keep_states, every)) > 0:
            old.append(self.step_state(number))
        return old

    def remove_old(self, old: Iterable[Path], saved: bool) -> None:
        """After a saving, remove the files and states that are due to go.

        Unless it ``saved`` all: the old ones are the newest then, and go after the next saving that succeeds.
        """
        self._overdue += old
        while saved and self._overdue:
            remove_whole(self._overdue.pop())


LONGEST_ENDING = len("_e000001_00_20260101000000_18446744073709551615.png")
"""Characters that the names of a run's files have after ``--output_name``: those of a sample image."""
LONGEST_NAME = 255
"""Bytes of a file's name on the file systems in use."""


def _require_usable_name(name: str | None) -> None:
    """Raises UserError for an ``--output_name`` that some file of the run could not have."""
    if name is None:
        return
    if {"/", "\\"} & set(name) or name in (".", ".."):
        raise UserError(
            f'--output_name is the base name of the files, without folders, but is "{name}"; --output_dir names the '
            "folder."
        )
    if not name.isprintable() or not name.strip():
        raise UserError(f"--output_name must consist of printable characters, not {name!r}.")
    length = len(name.encode(errors="surrogatepass"))
    if length > LONGEST_NAME - LONGEST_ENDING:
        raise UserError(
            f"--output_name has {length} bytes; with the endings of sample images and states, at most "
            f"{LONGEST_NAME - LONGEST_ENDING} fit into a file's name."
        )


def _step_to_remove(step: int, keep: int, every: int) -> int:
    """The newest saved step that is more than ``keep`` steps old."""
    old = step - keep - 1
    return old - old % every
