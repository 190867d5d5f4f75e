"""Samples that fail and errors that nobody foresaw cost no trained file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import flux_train_network
from library.training.output.state import SavedState


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- samples -------------------------------------------------------------------------------------------------------


def test_a_sample_folder_that_is_a_file_costs_the_samples_alone(train, prompts, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sample").write_text("in the way")
    samples = ["--sample_prompts", prompts, "--sample_every_n_steps", 1, "--sample_at_first"]
    assert train(*samples, "--max_train_steps", 2, "--save_every_n_steps", 1) == 0
    assert names(tmp_path / "out") >= {"lora-step00000001.safetensors", "lora.safetensors"}
    assert capsys.readouterr().err.count("sample image 1 failed") == 3


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory for it"), OSError(28, "No space left on device")])
def test_files_and_states_are_saved_before_samples_that_fail(train, prompts, tmp_path, monkeypatch, capsys, error):
    seen: list[set[str]] = []

    def fail(self, *arguments: object, **keywords: object) -> None:
        seen.append(names(tmp_path / "out"))
        raise error

    monkeypatch.setattr("library.models.flux.pipeline.FluxPipeline.decode_latents", fail)
    samples = ["--sample_prompts", prompts, "--sample_every_n_steps", 2]
    assert train(*samples, "--max_train_steps", 2, "--save_every_n_steps", 2, "--save_state") == 0
    assert {"lora-step00000002.safetensors", "lora-step00000002-state"} <= seen[0]
    assert "sample image 2 failed" in capsys.readouterr().err and "lora.safetensors" in names(tmp_path / "out")


def test_samples_after_a_state_leave_no_trace_in_a_schedule_free_run(train, prompts, tmp_path):
    common = ["--optimizer_type", "AdamWScheduleFree", "--max_train_steps", 3, "--save_every_n_steps", 1]
    common += ["--save_state", "--learning_rate", "1e-2"]
    assert train(*common, output="plain") == 0
    assert train(*common, "--sample_prompts", prompts, "--sample_every_n_steps", 1, output="drawn") == 0
    resumed = ["--resume", tmp_path / "drawn" / "lora-step00000002-state"]
    assert train(*common, *resumed, output="resumed") == 0
    plain = load_file(tmp_path / "plain" / "lora.safetensors")
    for folder in ("drawn", "resumed"):
        other = load_file(tmp_path / folder / "lora.safetensors")
        assert all(torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (f"a circle --d {2**66}", "does not fit into 64 bits"),
        ("a circle --w 0", "--width must be at least 1"),
        ("a circle --h -64", "--height must be at least 1"),
        ("a circle --l nan", "--l must be a number"),
    ],
)
def test_a_prompt_that_cannot_be_drawn_is_named_before_anything_is_loaded(train, prompts, capsys, line, problem):
    prompts.write_text(f"a cat\n{line}\n", encoding="utf-8")
    assert train("--sample_prompts", prompts, "--sample_every_n_epochs", 1, "--max_train_steps", 1) == 2
    said = capsys.readouterr().err.splitlines()
    assert any(f"{prompts}, {place} 2: " in said[-1] for place in ("line", "prompt")) and problem in said[-1]
    assert not any("base model" in line for line in said)


# ---- errors --------------------------------------------------------------------------------------------------------


def test_an_error_in_the_middle_saves_a_state_that_goes_on_to_the_same_bits(train, tmp_path, monkeypatch):
    arguments = ["--max_train_steps", 4, "--gradient_accumulation_steps", 2, "--save_state"]
    assert train(*arguments, output="whole") == 0
    real, calls = flux_train_network.FluxNetworkTrainer.predict, []

    def predict(self, *values: object):
        calls.append(1)
        if len(calls) == 6:  # the second half of the third step
            raise ZeroDivisionError("somewhere deep inside")
        return real(self, *values)

    with monkeypatch.context() as patch:
        patch.setattr(flux_train_network.FluxNetworkTrainer, "predict", predict)
        with pytest.raises(ZeroDivisionError):
            train(*arguments, output="broken")
    assert names(tmp_path / "broken") == {"lora-step00000002.safetensors", "lora-step00000002-state"}
    assert SavedState(tmp_path / "broken" / "lora-step00000002-state").position.step == 2
    shutil.move(tmp_path / "broken" / "lora-step00000002-state", tmp_path / "state")
    assert train(*arguments, "--resume", tmp_path / "state", output="resumed") == 0
    whole, resumed = (load_file(tmp_path / folder / "lora.safetensors") for folder in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_tracker_that_fails_is_named_once(caplog):
    from library.training.tracking import LoggingOptions, Tracker

    class Offline:
        def log(self, *arguments: object, **keywords: object) -> None:
            raise ConnectionError("the server is gone")

        finish = log

    tracker = Tracker(LoggingOptions(), {})
    tracker._wandb = Offline()
    tracker.log({"loss": 1.0}, 1, 1)
    tracker.log_image(0, "a circle", object())
    tracker.finish()
    assert caplog.text.count("logging to W&B failed") == 1
