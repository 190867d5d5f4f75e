"""--vram_budget and --blocks_to_swap auto choose options that fit, keep those that were given, and change no result."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from flux_train_network import FluxNetworkTrainer
from library.checkpoints import load_tensors
from library.console import size_text
from library.errors import UserError
from library.memory.simulation import Simulation, module_bytes
from library.training.plan import budget, verdict
from library.training.plan.dry_run import plan_of
from library.training.plan.expected_memory import expected_memory
from tests.e2e.test_flux_training_options import SMALL
from tests.running import make_trainer, no_weights_are_read, train

GIB = 1 << 30
CHANGED = "gradient_checkpointing fp8_scaled base_format blocks_to_swap stream_text_encoders".split()


@pytest.fixture
def words(flux_command, dataset_toml, tmp_path) -> list[object]:
    """A command line whose captions and latents are cached, and whose data lie in a folder of the test's own."""
    given = [*flux_command, "--network_train_unet_only", "--cache_latents", "--cache_text_encoder_outputs"]
    given += ["--mixed_precision", "bf16", "--output_dir", tmp_path, "--max_train_steps", "2"]
    return [*given, "--dataset_config", dataset_toml(), "--max_data_loader_n_workers", "0"]


@pytest.fixture(autouse=True)
def nothing_is_reserved(monkeypatch):
    """The models of these tests are smaller than what is left to the libraries of a real device."""
    monkeypatch.setattr("library.memory.budget.RESERVED_BYTES", 0)
    monkeypatch.setattr("library.memory.budget.RESERVED_SHARE", 0.0)


def ready(words: list[object]) -> Any:
    trainer = make_trainer("flux", *words)
    for step in ("check_options", "prepare_output", "check_network", "start_processes", "read_data", "plan_steps"):
        getattr(trainer, step)()
    return trainer


def fitted(words: list[object], size: float, *given: object) -> tuple[Any, dict[str, Any]]:
    """The trainer, and the options that were chosen for ``size`` bytes."""
    trainer = ready([*words, "--vram_budget", size / GIB, *given])
    before = {name: budget.option_of(trainer.options, name) for name in CHANGED}
    with no_weights_are_read():
        trainer.fit_memory()
    values = {name: budget.option_of(trainer.options, name) for name in CHANGED}
    return trainer, {name: value for name, value in values.items() if value != before[name]}


def opened(words: list[object]) -> Any:
    trainer = ready(words)
    trainer.open_pipeline()
    return trainer


def peak(trainer: Any) -> int:
    """What the plan of the run expects on the device."""
    trainer.open_pipeline()
    phases = [phase for phase in plan_of(trainer).phases if not phase.name.startswith("(")]
    assert all(phase.activations is not None for phase in phases)
    return max(phase.total for phase in phases)


PLANNED: list[int] = []


def plain_peak(words: list[object]) -> int:
    """``peak`` of the run as it is, found once."""
    if not PLANNED:
        PLANNED.append(peak(ready(words)))
    return PLANNED[0]


def test_a_smaller_budget_saves_more_and_always_fits(words):
    size, before = plain_peak(words), None
    ranks = []
    while True:
        try:
            trainer, chosen = fitted(words, size)
        except UserError as error:
            refused = str(error)
            break
        planned = peak(trainer)
        assert planned <= size
        ranks.append((bool(chosen), "fp8_scaled" in chosen or "base_format" in chosen, "base_format" in chosen))
        assert chosen != before
        before, size = chosen, min(planned - 1, round(0.7 * size))
    assert ranks[0] == (False, False, False) and ranks == sorted(ranks) and len(ranks) >= 3
    least = float(re.search(r"--vram_budget ([\d.]+) is the least", refused)[1])
    assert fitted(words, least * GIB)


@pytest.mark.parametrize("given", ["--fp8_base", "--fp8_scaled", "--base_format nf4"])
def test_the_bytes_of_parts_by_arithmetic(words, given):
    trainer = ready([*words, *given.split()])
    trainer.open_pipeline()
    pipeline = trainer.pipeline
    with Simulation(pipeline).running():
        for part in ("transformer", "t5xxl"):
            assert pipeline.part_bytes(part) == pytest.approx(module_bytes(pipeline.load(part)), rel=1e-3)
            assert pipeline.part_bytes(part) <= pipeline.most_part_bytes(part)


def test_given_options_stay(words):
    size = peak(ready([*words, "--fp8_base", "--gradient_checkpointing"]))
    trainer, chosen = fitted(words, size - 1, "--fp8_base", "--gradient_checkpointing")
    assert chosen.keys() <= {"blocks_to_swap", "stream_text_encoders"} and chosen
    assert trainer.options.precision.fp8_base and peak(trainer) < size
    with pytest.raises(UserError, match="does not fit into"):
        fitted(words, size - 1, "--fp8_base", "--gradient_checkpointing", "--blocks_to_swap", "0", "--highvram")


def test_auto_only_streams(words):
    trainer, chosen = fitted(words, plain_peak(words) - 1, "--blocks_to_swap", "auto")
    assert chosen.keys() <= {"blocks_to_swap", "stream_text_encoders"} and trainer.options.streaming.blocks_to_swap > 0
    with pytest.raises(UserError, match="cpu has no memory of its own; give a number or --vram_budget"):
        ready([*words, "--blocks_to_swap", "auto"]).fit_memory()


def test_what_the_verdict_of_a_plan_advises_lets_it_fit(words, monkeypatch):
    sizes = tuple(share * plain_peak(words) / GIB for share in (0.01, 0.6))
    monkeypatch.setattr(verdict, "GPUS", sizes)

    def said(*given: object) -> list[str]:
        trainer = ready([*words, *given])
        trainer.open_pipeline()
        return plan_of(trainer).verdict.split("; ")

    whole, larger, smaller = said()
    assert whole.startswith(f"does not fit on GPUs of {sizes[0]:g} or {sizes[1]:g} GB (")
    assert smaller == f"on {sizes[0]:g} GB with fewer pixels or images in a batch"
    advice = larger.removeprefix(f"on {sizes[1]:g} GB with ").split()
    monkeypatch.setattr(verdict, "GPUS", sizes[1:])
    assert advice[0].startswith("--") and said(*advice)[0].startswith(f"fits on GPUs of {sizes[1]:g} GB (")


def test_a_budget_changes_no_result_and_the_end_compares(words, tmp_path, caplog):
    size = plain_peak(words) - 1
    caplog.set_level("INFO")
    chosen = train("flux", *words, "--vram_budget", size / GIB, "--output_name", "chosen")
    line = re.search(r"--vram_budget \S+ chooses (--.*?):", caplog.text)[1]
    assert re.search(r"peak memory: .* of system RAM \(.* predicted\)", caplog.text)
    assert chosen.forecast.device is None and chosen.forecast.process > 100 << 20
    train("flux", *words, *line.split(), "--output_name", "typed")
    one, other = (load_tensors(Path(tmp_path) / f"{name}.safetensors")[0] for name in ("chosen", "typed"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class TellsOnTheCpu(FluxNetworkTrainer):
    """Says at its start what runs on a GPU say."""

    def fit_memory(self) -> None:
        found = expected_memory(self)
        assert found is not None
        self.forecast, self.line = found


def test_what_a_run_expects_at_its_start_is_what_its_plan_says_and_changes_no_result(words, dataset_toml, tmp_path):
    given = [*words, "--dataset_config", dataset_toml(**SMALL), "--gradient_checkpointing", "--blocks_to_swap", "2"]
    with no_weights_are_read():
        phases = plan_of(opened(given)).phases
        phase = max((phase for phase in phases if not phase.name.startswith("(")), key=lambda phase: phase.total)
        trainer = make_trainer(TellsOnTheCpu, *given, "--output_name", "told")
    trainer.train()
    assert f"at the peak, while {phase.name} (" in trainer.line
    for name, size in {
        **phase.weights,
        "network": phase.network,
        "activations and gradients": phase.activations,
    }.items():
        assert f"{name} {size_text(size)}" in trainer.line
    train("flux", *given, "--output_name", "plain")
    one, other = (load_tensors(Path(tmp_path) / f"{name}.safetensors")[0] for name in ("told", "plain"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("value", ["0", "-3"])
def test_a_budget_is_above_zero(words, value):
    with pytest.raises(UserError, match="--vram_budget must be above 0 GiB"):
        make_trainer("flux", *words, "--vram_budget", value).check_options()
