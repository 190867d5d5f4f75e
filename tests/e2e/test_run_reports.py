"""What a run says of itself at its start and its end is so, also when it is interrupted."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from flux_train_network import FluxNetworkTrainer, FluxTrainingOptions
from library.options import parse_options
from library.training.report.description import end_facts, start_facts
from library.training.training_loop import TrainingLoop
from tests.e2e.test_flux_training_options import SMALL
from tests.running import forget_accelerator


@pytest.fixture
def train(flux_command, dataset_toml, tmp_path):
    """Train a few steps; returns the trainer when it is done."""

    def run(*arguments: object, trainer_class: type = FluxNetworkTrainer, steps: int = 4, **dataset: object) -> Any:
        forget_accelerator()
        given = [*flux_command, "--max_train_steps", steps, "--output_dir", tmp_path / "out", *arguments]
        given += ["--dataset_config", dataset_toml(**(SMALL | dataset)), "--max_data_loader_n_workers", "0"]
        trainer = trainer_class(parse_options(FluxTrainingOptions, "test", [str(value) for value in given]))
        trainer.train()
        return trainer

    return run


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat --w 64 --h 64 --s 1\n", encoding="utf-8")
    return path


def test_the_reports_of_a_run(train, prompts, tmp_path, caplog):
    caplog.set_level("INFO")
    begin = time.time()
    arguments = ["--sample_prompts", prompts, "--sample_every_n_steps", "2", "--validation_split", "0.2"]
    trainer = train(
        *arguments, "--save_state", "--save_every_n_steps", "2", "--cache_latents", "--lowram", batch_size=3
    )
    wall = time.time() - begin

    start = start_facts(trainer.facts())
    assert (
        "computing in float32, attention sdpa" in caplog.text
        and f"4 steps: 1 epoch of {trainer.plan.steps_per_epoch} steps" in caplog.text
    )
    assert sum(group.parameters for group in start.groups) == sum(p.numel() for p in trainer.network.parameters())
    assert "autoencoder" in start.absent and {part.name for part in start.parts} >= {"transformer", "clip_l"}
    assert start.effective_batches == [3]

    end = end_facts(trainer.facts(), trainer.clock, trainer.report.path)
    assert end.steps == 4 and end.interrupted is None
    assert end.images == sum(len(plan.samples) for plan in first_batches(trainer, 4))
    assert 0.5 * wall < sum(end.parts.values()) <= wall + 1
    for part in ("training", "waiting for data", "validation", "sample images", "saving", "caching", "loading"):
        assert end.parts[part] > 0
    assert set(end.losses) == {"average", "validation (epoch)"}
    out = tmp_path / "out"
    written = {file.path: file.bytes for file in end.files}
    assert set(written) == {path for path in out.iterdir() if path.name != "sample"}
    assert written[out / "last.safetensors"] == (out / "last.safetensors").stat().st_size
    assert {file.path for file in end.samples} == set((out / "sample").iterdir())
    assert re.search(r"finished after [\d.]+ s: 4 steps, \d+ images; [\d.]+ steps/s, [\d.]+ images/s", caplog.text)
    assert str(out / "last.safetensors") in caplog.text


def first_batches(trainer: Any, count: int) -> list[Any]:
    plans = [plan for epoch in (1, 2, 3) for plan in trainer.data.train.plan(epoch, trainer.seed)]
    return plans[:count]


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")], ids=["SIGINT", "SIGTERM"]
)
def test_an_interrupted_run_reports_too(train, caplog, number, reason):
    caplog.set_level("INFO")

    class InterruptedLoop(TrainingLoop):
        def count_step(self) -> None:
            super().count_step()
            if self.progress.step == 2:
                signal.raise_signal(number)

    class Interrupted(FluxNetworkTrainer):
        loop_class = InterruptedLoop

    trainer = train(trainer_class=Interrupted, steps=50)
    assert trainer.progress.step == 2
    images = sum(len(plan.samples) for plan in first_batches(trainer, 2))
    assert f"ended early ({reason}) after" in caplog.text and f": 2 steps, {images} images" in caplog.text
    assert "at-step00000002.safetensors" in caplog.text.split("written")[-1]


def test_a_resumed_run_counts_only_its_own_steps(train, tmp_path, caplog):
    train("--save_state", steps=3)
    trainer = train("--resume", tmp_path / "out" / "last-state", steps=5)
    facts = end_facts(trainer.facts(), trainer.clock, trainer.report.path)
    assert facts.steps == 2 and trainer.progress.first_step == 3
    assert facts.images == sum(len(plan.samples) for plan in first_batches(trainer, 5)[3:])


def test_parts_whose_work_is_done_leave_the_memory_also_with_highvram(train, prompts):
    arguments = ["--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only", "--highvram"]
    arguments += ["--sample_prompts", prompts, "--sample_every_n_steps", "1"]
    assert set(train(*arguments, steps=1).pipeline.modules) == {"transformer"}
