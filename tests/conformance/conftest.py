"""Runs of a family's tiny model over a few small images; tests of a folder share what each family needs once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.families.families import FAMILIES
from tests.families.family import Family
from tests.running import run_in_process, toml_value


@pytest.fixture(scope="session")
def tiny_files(request) -> Callable[[Family], Any]:
    """The files of a family's tiny model."""

    def of(family: Family) -> Any:
        prefix = "few_blocks" if family.name.startswith("sd") else "tiny"
        return request.getfixturevalue(f"{prefix}_{family.name}")

    return of


FAMILY_NAMES = {family.name for family in FAMILIES}
ALIKE = {"sd2": "sd1", "chroma": "flux"}
"""Models that go the way of another through the same script; what is slow is shown of both with ``--thorough``."""
IN_TURN = [
    pytest.param(family, id=family.name, marks=[pytest.mark.thorough] if family.name in ALIKE else [])
    for family in FAMILIES
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to ``--thorough`` the rows of a table that a module shows of some families (its ``SHOWN_OF``) only."""
    for item in items:
        shown_of = getattr(getattr(item, "module", None), "SHOWN_OF", None)
        params = item.callspec.params if shown_of and hasattr(item, "callspec") else {}
        if "rows" in params and params["family"].name not in shown_of.get(params["rows"][0].group, FAMILY_NAMES):
            item.add_marker(pytest.mark.thorough)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request) -> Family:
    """Each family in turn."""
    return request.param


@pytest.fixture(scope="module")
def images(family, image_folder, tmp_path_factory) -> Path:
    """Four images with captions, beside which caches may be written."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(4):
        for suffix in (".png", ".txt"):
            shutil.copy(image_folder / f"{number:02d}{suffix}", folder)
    return folder


@pytest.fixture(scope="module")
def command(family, tiny_files, images, tmp_path_factory) -> list[object]:
    """The command line of a short run of the family, without its output folder and length."""
    path = tmp_path_factory.mktemp("dataset") / "dataset.toml"
    path.write_text(
        "[[datasets]]\nresolution = 64\nbatch_size = 2\nenable_bucket = true\nbucket_reso_steps = 64\n"
        'min_bucket_reso = 64\nmax_bucket_reso = 128\ncaption_extension = ".txt"\nflip_aug = true\n'
        f"[[datasets.subsets]]\nimage_dir = {toml_value(images.as_posix())}\n",
        encoding="utf-8",
    )
    given = [*family.command(tiny_files(family)), "--dataset_config", path, "--max_data_loader_n_workers", "0"]
    return [*given, "--no_report", "--output_name", "lora"]


@pytest.fixture(scope="module")
def train(family, command) -> Callable[..., CompletedProcess[str]]:
    """Run the family's script into a folder; returns how it ended, which must be well."""

    def run(folder: Path, *arguments: object) -> CompletedProcess[str]:
        done = run_in_process(family.script, *command, "--output_dir", folder, *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    return run
