"""Where a model is that is named by a path, by a pattern, or by its id on the Hugging Face hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path

from library.checkpoints import is_hub_id
from library.console import say
from library.errors import UserError

WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
)
"""Names of Diffusers' weights, without those in a half format or of another framework."""
TEXT_FILES = ("json", "txt", "model")


def find_model(name: str, option: str, part: str | None = None) -> Path:
    """The file or folder that ``name`` stands for.

    That is a path, a pattern that one path matches, or an id on the hub, whose Diffusers folder is fetched with a line
    that says so; where only a ``part`` is needed, such as ``vae``, no other. Raises UserError, beginning with
    ``option``, when there are several or none.
    """
    if Path(name).exists():
        return Path(name)
    matches = sorted(glob.glob(name))
    if len(matches) > 1:
        raise UserError(f"{option}: {name} matches {len(matches)} files ({', '.join(matches[:5])}); name one of them.")
    if matches:
        return Path(matches[0])
    if is_hub_id(name):
        return _fetched(Path(name).as_posix(), option, part)
    return Path(name)


def _fetched(name: str, option: str, part: str | None) -> Path:
    """The folder of a model on the hub, after its files have been fetched, or the one that was fetched before."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    say(f"{option}: there is no file or folder {name}; asking the Hugging Face hub, or its local cache, for it")
    try:
        try:
            repository = huggingface_hub.model_info(name, revision="main")
        except (HfHubHTTPError, ValueError):
            raise
        except Exception:  # the network's own errors have no common kind
            return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
        files = wanted_files((sibling.rfilename for sibling in repository.siblings or ()), part)
        if not files:
            raise UserError(f"{option}: {name} on the Hugging Face hub is not in the layout of Diffusers.")
        paths = [Path(huggingface_hub.hf_hub_download(name, file)) for file in files]
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"{option}: there is no file or folder {name}, and the Hugging Face hub has no model of that name for you, "
            f"or cannot be reached ({reason})."
        ) from None
    return paths[0].parents[files[0].count("/")]


def wanted_files(files: Iterable[str], part: str | None = None) -> list[str]:
    """Those files of a Diffusers folder that make the model: weights in one format, configurations, vocabularies.

    With a ``part``, only those in the folder of that name, if there is one, or beside such folders.
    """
    by_folder: dict[str, list[str]] = {}
    for file in files:
        by_folder.setdefault(file.rpartition("/")[0], []).append(file)
    if part is not None:
        by_folder = {
            folder: names for folder, names in by_folder.items() if folder == (part if part in by_folder else "")
        }
    wanted = []
    for folder, names in by_folder.items():
        weights = [name for name in names if WEIGHTS.fullmatch(name.rpartition("/")[2])]
        safetensors = [name for name in weights if ".safetensors" in name]
        texts = [name for name in names if name.rpartition(".")[2] in TEXT_FILES and ".index." not in name]
        wanted += (safetensors or weights) + (texts if folder else [name for name in texts if name == "config.json"])
    return wanted if any(name.endswith((".safetensors", ".bin")) for name in wanted) else []
