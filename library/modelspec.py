"""The ``modelspec.*`` entries of a model file, version 1.0.1: what programs show a user about it.

https://github.com/Stability-AI/ModelSpec
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from pathlib import Path

from library.families import STABLE_DIFFUSION, version_of

IMPLEMENTATION_VERSION = "lora-training-scripts/0.1.0"


def modelspec_entries(
    *,
    architecture: str,
    implementation: str,
    title: str,
    resolution: tuple[int, int],
    date: datetime.datetime | None = None,
    **others: str | None,
) -> dict[str, str]:
    """The entries of a file made now (or at ``date``, local time); ``resolution`` is (width, height).

    ``others`` are further entries by name (``prediction_type``, ``merged_from``); None leaves one out.
    """
    entries: dict[str, str | None] = {
        "sai_model_spec": "1.0.1",
        "architecture": architecture,
        "implementation": implementation,
        "title": title,
        "resolution": f"{resolution[0]}x{resolution[1]}",
        "date": (date or datetime.datetime.now()).replace(microsecond=0, tzinfo=None).isoformat(),
        "implementation_version": IMPLEMENTATION_VERSION,
        **others,
    }
    return {f"modelspec.{key}": value for key, value in entries.items() if value is not None}


def standard_entries(base_model_version: str) -> dict[str, str]:
    """Architecture, implementation, resolution and (of Stable Diffusion) prediction type that follow from
    ``ss_base_model_version``.

    Empty for a version that tells nothing.
    """
    found = version_of(base_model_version)
    if found is None:
        return {}
    family, version = found
    entries = {
        "modelspec.architecture": version.architecture,
        "modelspec.implementation": version.implementation,
        "modelspec.resolution": f"{version.side}x{version.side}",
    }
    if family.room == STABLE_DIFFUSION.room:
        entries["modelspec.prediction_type"] = "v" if base_model_version.endswith("_v") else "epsilon"
    return entries


def merged_from(files: Iterable[tuple[Path, Mapping[str, str]]]) -> str:
    """The titles of models that became one, each (path, metadata): the file's own title, or its name."""
    return ", ".join(metadata.get("modelspec.title", path.stem) for path, metadata in files)
