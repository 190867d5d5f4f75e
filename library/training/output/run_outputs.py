"""What a run leaves behind: sample images, LoRA files, resumable states."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from library.console import say, warn
from library.devices import parse_dtype
from library.training.finiteness import require_finite
from library.training.network.saving import save_network
from library.training.output.checkpoints import OutputFolder
from library.training.output.hub import Uploads, fetch_state
from library.training.output.name_lock import NameLock
from library.training.output.newest_state import AUTOMATIC, choose_state
from library.training.output.sample_images import Samples
from library.training.output.state import SavedState
from library.training.training_options import TrainingOptions


class RunOutputs:
    """The output folder, the sample images, the uploads, and the state that a run resumes."""

    def __init__(self, options: TrainingOptions) -> None:
        """Open the output folder, the prompt file and the state of ``--resume``; only the folder is made.

        Raises UserError where one of them cannot be used.
        """
        read_only = options.preflight.dry_run
        self.save_precision = options.saving.save_precision
        averages = options.optimizer.ema_decay is not None
        self.files = OutputFolder(options.saving, read_only=read_only, averages=averages)
        self.samples = Samples(options.samples, options.saving.output_dir, options.saving.output_name)
        self.uploads = Uploads(options.hub)
        self.saved: SavedState | None = None
        """The state that is resumed."""
        self.written: list[Path] = []
        """Files and folders that this run has written, without sample images."""
        self.sample_files: list[Path] = []
        self.problems: list[str] = []
        """What became of the run's last files where they are not in their places."""
        from_hub = options.hub.resume_from_huggingface
        resume = options.resume.resume
        self.chosen = resume in AUTOMATIC
        """Whether the state was chosen by this run, and not by its user."""
        if self.chosen:
            assert resume is not None
            self.saved = choose_state(resume, self.files)
        elif resume and not (from_hub and read_only):
            folder = fetch_state(options.hub, resume) if from_hub else Path(resume)
            self.saved = SavedState(folder)
        is_main = os.environ.get("RANK", "0") == "0"  # a launcher's name for it
        name = options.saving.output_name or "last"
        self.name_lock = NameLock(self.files.folder, name) if is_main and not read_only else None

    def are_complete(self, max_steps: int) -> bool:
        """Whether the state that was chosen is the one with which a run of this length has ended."""
        saved, files = self.saved, self.files
        if not self.chosen or saved is None or saved.folder != files.final_state():
            return False
        if not all(path.is_file() for path in files.with_average(files.final_file())):
            return False
        return saved.position.step == max_steps

    def write_network(self, network: Any, path: Path, metadata: dict[str, str], wait: bool = False) -> None:
        """Write the network's file and upload it, if requested; ``wait`` for the upload. Raises UserError for NaN."""
        dtype = None if self.save_precision is None else parse_dtype(self.save_precision)
        require_finite(network, path, dtype)
        save_network(network, path, dtype, metadata)
        self._note(path, wait)

    def write_state(self, network: Any, folder: Path, write: Callable[[Path], None]) -> bool:
        """Let ``write`` write a state of the network; False if its optimizer cannot be saved. Raises UserError."""
        require_finite(network, folder)
        try:
            write(folder)
        except TypeError as error:  # a third party's optimizer; its training must not end for that
            warn(f"{folder} cannot be saved: {error}.")
            return False
        self._note(folder)
        return True

    def _note(self, path: Path, wait: bool = False) -> None:
        say(f"saved {path}")
        self.written.append(path)
        self.uploads.upload(path, wait)
