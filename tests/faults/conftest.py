"""What tests of faults share: a training of the tiny FLUX.1 in this process."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

import flux_train_network
from library.console import run_script
from tests.running import forget_accelerator


@pytest.fixture
def train(flux_command, dataset_toml, image_folder, tmp_path, monkeypatch):
    """Run the FLUX script over a folder of images in this process as ``python`` would; returns its exit code."""

    def run(
        *arguments: object,
        output: Path | str = "out",
        command: list[object] = flux_command,
        folder: Path = image_folder,
    ) -> int:
        given = [*command, "--output_dir", tmp_path / output]
        if "--dataset_config" not in arguments:
            given += ["--dataset_config", dataset_toml(folder)]
        given += ["--output_name", "lora", "--no_report", "--max_data_loader_n_workers", "0", *arguments]
        monkeypatch.setattr(sys, "argv", ["flux_train_network.py", *map(str, given)])
        forget_accelerator()
        try:
            run_script(flux_train_network.main)
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            forget_accelerator()
        return 0

    handlers = logging.getLogger("library").handlers[:]
    yield run
    logging.getLogger("library").handlers[:] = handlers


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a circle --w 64 --h 64 --s 1 --d 3\na square --w 64 --h 64 --s 1\n", encoding="utf-8")
    return path
