"""Uploads to Hugging Face, if requested; and states fetched from there."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

from library.console import say, warn
from library.errors import UserError
from library.training.output.newest_state import AUTOMATIC
from library.training.run_options import HubOptions

KINDS = ("model", "dataset", "space")


def check_hub_options(options: HubOptions, resume: str | None) -> None:
    """Check what can be known without the hub: names and kinds. Raises UserError."""
    repository, kind = options.huggingface_repo_id, options.huggingface_repo_type
    if repository and not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"--huggingface_repo_id must be owner/name, not {repository}.")
    if kind is not None and kind not in KINDS:
        raise UserError(f"--huggingface_repo_type must be one of {', '.join(KINDS)}, not {kind}.")
    if repository and options.huggingface_repo_visibility not in (None, "public", "private"):
        warn(f"--huggingface_repo_visibility {options.huggingface_repo_visibility}: a new repository is made private.")
    if options.resume_from_huggingface:
        if not resume:
            raise UserError("--resume_from_huggingface needs --resume: the state's name on the hub.")
        if resume in AUTOMATIC:
            raise UserError(
                f"--resume {resume} chooses a state in --output_dir; with --resume_from_huggingface, name one on the "
                "hub: owner/name/path[:revision[:type]]."
            )
        _parts_of_state(resume)


class Uploads:
    """The uploads of a run; does nothing without ``--huggingface_repo_id``."""

    def __init__(self, options: HubOptions) -> None:
        self.options = options
        self._threads: list[threading.Thread] = []
        self._turn = threading.Lock()  # the hub refuses a commit while another one is under way

    def prepare(self) -> None:
        """Make the repository if it does not exist. Raises UserError when the hub refuses."""
        options = self.options
        if not options.huggingface_repo_id:
            return
        from huggingface_hub import HfApi

        kind = options.huggingface_repo_type
        try:
            HfApi(token=options.huggingface_token).create_repo(
                options.huggingface_repo_id,
                repo_type=kind,
                private=options.huggingface_repo_visibility != "public",
                exist_ok=True,
                space_sdk="static" if kind == "space" else None,
            )
        except Exception as error:  # the hub library raises many kinds; each is the user's to mend
            raise UserError(f"--huggingface_repo_id {options.huggingface_repo_id}: {_in_one_line(error)}") from None

    def upload(self, path: Path, wait: bool = False) -> None:
        """Upload a file, or a state folder with ``--save_state_to_huggingface``."""
        options = self.options
        if not options.huggingface_repo_id or (path.is_dir() and not options.save_state_to_huggingface):
            return
        thread = threading.Thread(target=self._upload, args=(path,), daemon=True)
        thread.start()
        self._threads.append(thread)
        if wait or not options.async_upload:
            thread.join()

    def _upload(self, path: Path) -> None:
        from huggingface_hub import HfApi

        options = self.options
        assert options.huggingface_repo_id
        target = "/".join(filter(None, [(options.huggingface_path_in_repo or "").strip("/"), path.name]))
        api = HfApi(token=options.huggingface_token)
        place: dict[str, Any] = {"repo_id": options.huggingface_repo_id, "repo_type": options.huggingface_repo_type}
        try:
            with self._turn:
                if path.is_dir():
                    api.upload_folder(folder_path=path, path_in_repo=target, **place)
                else:
                    api.upload_file(path_or_fileobj=path, path_in_repo=target, **place)
            say(f"uploaded {path.name} to {options.huggingface_repo_id}")
        except Exception as error:  # an upload that fails must not end a training run
            warn(f"{path.name} could not be uploaded: {_in_one_line(error)}")

    def finish(self) -> None:
        """Wait for every upload that is under way."""
        for thread in self._threads:
            thread.join()


def fetch_state(options: HubOptions, resume: str) -> Path:
    """Fetch the state ``owner/name/path[:revision[:type]]`` and return its folder. Raises UserError when that fails."""
    from huggingface_hub import snapshot_download

    repository, path, revision, kind = _parts_of_state(resume)
    say(f"fetching {resume} from Hugging Face")
    try:
        snapshot = snapshot_download(
            repository,
            revision=revision,
            repo_type=kind,
            allow_patterns=f"{path}/*",
            token=options.huggingface_token,
        )
    except Exception as error:  # the hub library raises many kinds; each is the user's to mend
        raise UserError(f"--resume {resume}: {_in_one_line(error)}") from None
    folder = Path(snapshot, *path.split("/"))
    if not folder.is_dir():
        raise UserError(f"--resume {resume}: there is no folder {path} in {repository}.")
    return folder


def _parts_of_state(resume: str) -> tuple[str, str, str | None, str | None]:
    """Repository, path in it, revision and kind. Raises UserError."""
    match = re.fullmatch(r"([^/:]+/[^/:]+)/([^:]+?)/?(?::([^:]*))?(?::(\w+))?", resume)
    if match is None or match[4] not in (None, *KINDS):
        raise UserError(f"--resume {resume}: a state on the hub is named owner/name/path[:revision[:type]].")
    return match[1], match[2], match[3] or None, match[4]


def _in_one_line(error: Exception) -> str:
    """An error's text without line breaks, and without the advice to read about HTTP."""
    text = re.sub(r"For more information check: \S+", "", str(error)) or type(error).__name__
    return " ".join(text.split())
