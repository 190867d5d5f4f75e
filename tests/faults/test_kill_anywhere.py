"""Training that is killed at random moments and started again with ``--resume auto`` ends in the same bytes."""

from __future__ import annotations

import random
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.killing import broken_files, kill_somewhere, leftovers
from tests.faults.lora_files import contents
from tests.processes import ForkServer, Started

SEED = 14


@dataclass
class Training:
    """A training in folders of its own, which each process begins or continues with the same command line."""

    server: ForkServer
    script: str
    command: list[object]
    folder: Path
    images: Path

    def __post_init__(self) -> None:
        shutil.copytree(self.images, self.folder / "images")
        (self.folder / "dataset.toml").write_text(
            "[general]\nresolution = 64\nbatch_size = 2\nenable_bucket = true\nmin_bucket_reso = 64\n"
            "max_bucket_reso = 128\nvalidation_split = 0.2\nvalidation_seed = 3\n"
            f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{(self.folder / "images").as_posix()}"\n'
            'caption_extension = ".txt"\nflip_aug = true\n',
            encoding="utf-8",
        )
        (self.folder / "prompts.txt").write_text("a red circle --w 64 --h 64 --d 1 --s 1\n", encoding="utf-8")

    @property
    def output(self) -> Path:
        return self.folder / "out"

    @property
    def places(self) -> list[Path]:
        """Where files are written."""
        return [self.output, self.output / "sample", self.folder / "images", self.folder / "log"]

    def start(self) -> Started:
        return self.server.start(
            self.script,
            *self.command,
            *("--dataset_config", self.folder / "dataset.toml", "--output_dir", self.output, "--output_name", "lora"),
            *("--logging_dir", self.folder / "log", "--sample_prompts", self.folder / "prompts.txt"),
            *("--max_train_epochs", 2, "--gradient_accumulation_steps", 2, "--network_dropout", 0.1, "--seed", 7),
            *("--save_every_n_epochs", 1, "--save_last_n_epochs", 1),
            *("--save_every_n_steps", 2, "--save_last_n_steps", 2, "--save_state", "--sample_every_n_steps", 4),
            *(
                "--sample_at_first",
                "--validate_every_n_steps",
                4,
                "--max_validation_steps",
                1,
                "--cache_latents_to_disk",
                "--resume",
                "auto",
            ),
        )

    def names(self) -> set[str]:
        """What stands in the output folder; of sample images, the moment and the prompt."""
        names = {path.name for path in self.output.iterdir()}
        samples = {re.sub(r"_\d{14}", "", path.name) for path in (self.output / "sample").iterdir()}
        return names | {f"sample/{name}" for name in samples}


@pytest.mark.parametrize("family", ["flux", "sd1"])
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes(
    request, family, fork_server, thorough, image_folder, tmp_path
):
    kills = 100 if thorough else 5
    script = "flux_train_network.py" if family == "flux" else "train_network.py"
    command = [*request.getfixturevalue(f"{family}_command"), "--network_train_unet_only"]
    command += ["--cache_text_encoder_outputs_to_disk", "--optimizer_type", "AdamW"]

    def training(name: str) -> Training:
        (tmp_path / name).mkdir()
        return Training(fork_server, script, command, tmp_path / name, image_folder)

    whole = training("whole")
    start = time.monotonic()
    process = whole.start()
    assert process.wait() == 0, process.output[-3000:]
    length = time.monotonic() - start
    expected, names = contents(whole.output / "lora.safetensors"), whole.names()
    assert broken_files(whole.folder) == leftovers(whole.folder) == []

    chance, made, number, moments = random.Random(f"{SEED} {family}"), 0, 0, []
    broken = training("0")
    while made < kills or moments:
        process = broken.start()
        moment = kill_somewhere(process, chance, length, broken.places) if made < kills else None
        assert broken_files(broken.folder) == [], f"killed after {moments}, {moment}"
        if moment is not None:
            made += 1
            moments.append(moment)
            continue
        said = f"killed after {moments}:\n{process.output[-3000:]}" if process.wait() else ""
        assert process.returncode == 0, said
        assert contents(broken.output / "lora.safetensors") == expected, f"killed after {moments}"
        assert broken.names() == names, f"killed after {moments}"
        assert leftovers(broken.folder) == [], f"killed after {moments}"
        shutil.rmtree(broken.folder)
        number, moments = number + 1, []
        broken = training(str(number))
