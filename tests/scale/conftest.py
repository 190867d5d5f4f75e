"""Runs of a tiny model in several processes, which talk to each other as ``accelerate launch`` would have them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from tests.conformance.conftest import tiny_files  # noqa: F401
from tests.families.family import Family
from tests.processes import ForkServer, Started
from tests.running import free_port, toml_value

Together = Callable[..., list[Started]]


@pytest.fixture
def together(fork_server: ForkServer) -> Together:
    """Start a script in ``count`` processes on each of ``machines``; returns them in the order of their ranks.

    A machine is what the environment says: with ``folders``, each works in a folder of its own. ``only``: arguments
    that some ranks alone are given.
    """

    def start(
        script: str,
        *arguments: object,
        count: int = 2,
        machines: int = 1,
        folders: list[Path] | None = None,
        only: Mapping[int, Sequence[object]] | None = None,
        **environment: str,
    ) -> list[Started]:
        shared = {
            "WORLD_SIZE": str(count * machines),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            **environment,
        }
        started = []
        for rank in range(count * machines):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank % count)}
            where = {"cwd": folders[rank // count]} if folders else {}
            words = [*arguments, *(only or {}).get(rank, ())]
            started.append(fork_server.start(script, *words, environment={**shared, **own}, **where))
        return started

    return start


@pytest.fixture
def run_together(together: Together) -> Together:
    """The same, waiting for the end of all, which must be well."""

    def run(script: str, *arguments: object, **how: object) -> list[Started]:
        started = together(script, *arguments, **how)
        codes = [process.wait(240) for process in started]
        said = "\n".join(process.output[-3000:] for process, code in zip(started, codes) if code)
        assert not any(codes), said
        return started

    return run


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What ``accelerate launch --use_fsdp --fsdp_version 2`` tells its processes."""


def make_dataset(folder: Path, images: Path, batch_size: int, relative: bool = False) -> Path:
    """A dataset file in ``folder`` over the images; ``relative``: their folder is named from where a run works."""
    path = folder / f"dataset_{batch_size}.toml"
    named = images.name if relative else images.as_posix()
    path.write_text(
        f"[[datasets]]\nresolution = 64\nbatch_size = {batch_size}\nenable_bucket = true\nbucket_reso_steps = 64\n"
        'min_bucket_reso = 64\nmax_bucket_reso = 128\ncaption_extension = ".txt"\nflip_aug = true\n'
        f"[[datasets.subsets]]\nimage_dir = {toml_value(named)}\nnum_repeats = 4\n",
        encoding="utf-8",
    )
    return path


def few_images(image_folder: Path, folder: Path, count: int = 4) -> Path:
    """The first of the images, in a folder where caches may be written."""
    folder.mkdir(parents=True)
    for number in range(count):
        for suffix in (".png", ".txt"):
            shutil.copy(image_folder / f"{number:02d}{suffix}", folder)
    return folder


def run_options(family: Family, files: object) -> list[object]:
    """The family's command line, for steps whose rounding stays small."""
    given = [*family.command(files), "--optimizer_type", "SGD", "--max_grad_norm", "0", "--learning_rate", "0.1"]
    return [*given, "--max_data_loader_n_workers", "0", "--seed", "7", "--save_precision", "float"]
