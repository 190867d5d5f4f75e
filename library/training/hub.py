"""Uploads to Hugging Face, when they are asked for; and states fetched from there."""

from __future__ import annotations

import threading
from pathlib import Path

from library.console import say, warn
from library.errors import UserError
from library.training.run_options import HubOptions


class Uploads:
    """The uploads of a run; does nothing without ``--huggingface_repo_id``."""

    def __init__(self, options: HubOptions) -> None:
        self.options = options
        self._threads: list[threading.Thread] = []

    def prepare(self) -> None:
        """Make the repository if it does not exist. Raises UserError when the hub refuses."""
        options = self.options
        if not options.huggingface_repo_id:
            return
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            HfApi(token=options.huggingface_token).create_repo(
                options.huggingface_repo_id,
                repo_type=options.huggingface_repo_type,
                private=options.huggingface_repo_visibility != "public",
                exist_ok=True,
            )
        except (HfHubHTTPError, OSError) as error:
            raise UserError(f"--huggingface_repo_id {options.huggingface_repo_id}: {error}") from None

    def upload(self, path: Path, wait: bool = False) -> None:
        """Upload a file, or a state folder where ``--save_state_to_huggingface`` asks for it."""
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
        target = "/".join(filter(None, [options.huggingface_path_in_repo, path.name]))
        api = HfApi(token=options.huggingface_token)
        kind = options.huggingface_repo_type
        try:
            if path.is_dir():
                api.upload_folder(
                    repo_id=options.huggingface_repo_id, folder_path=path, path_in_repo=target, repo_type=kind
                )
            else:
                api.upload_file(
                    path_or_fileobj=path, path_in_repo=target, repo_id=options.huggingface_repo_id, repo_type=kind
                )
            say(f"uploaded {path.name} to {options.huggingface_repo_id}")
        except Exception as error:  # an upload that fails must not end a training run
            warn(f"{path.name} could not be uploaded: {error}")

    def finish(self) -> None:
        """Wait for every upload that is under way."""
        for thread in self._threads:
            thread.join()


def fetch_state(options: HubOptions, resume: str) -> Path:
    """Fetch the state ``owner/name/path[:revision[:type]]`` and return its folder. Raises UserError when that fails."""
    from huggingface_hub import snapshot_download

    address, *rest = resume.split(":")
    parts = address.split("/")
    if len(parts) < 3:
        raise UserError(f"--resume {resume}: a state on the hub is named owner/name/path[:revision[:type]].")
    say(f"fetching {resume} from Hugging Face")
    try:
        folder = snapshot_download(
            "/".join(parts[:2]),
            revision=rest[0] if rest else None,
            repo_type=rest[1] if len(rest) > 1 else None,
            allow_patterns="/".join(parts[2:]) + "/*",
            token=options.huggingface_token,
        )
    except Exception as error:  # the hub library raises many kinds; each is the user's to mend
        raise UserError(f"--resume {resume}: {error}") from None
    return Path(folder, *parts[2:])
