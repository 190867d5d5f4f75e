"""Samples that fail, numbers that are not finite and errors that nobody foresaw cost no trained file."""

from __future__ import annotations

import logging
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import flux_train_network
from library.console import run_script
from library.training.output.state import SavedState


@pytest.fixture
def train(flux_command, dataset_toml, tmp_path, monkeypatch):
    """Run the FLUX script in this process as ``python`` would; returns its exit code."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def run(*arguments: object, output: str = "out", command: list[object] = flux_command) -> int:
        given = [*command, "--dataset_config", dataset_toml(), "--output_dir", tmp_path / output]
        given += ["--output_name", "lora", "--no_report", "--max_data_loader_n_workers", "0", *arguments]
        monkeypatch.setattr(sys, "argv", ["flux_train_network.py", *map(str, given)])
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        try:
            run_script(flux_train_network.main)
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            AcceleratorState._reset_state()
        return 0

    handlers = logging.getLogger("library").handlers[:]
    yield run
    logging.getLogger("library").handlers[:] = handlers


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a circle --w 64 --h 64 --s 1 --d 3\na square --w 64 --h 64 --s 1\n", encoding="utf-8")
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def is_finite(path: Path) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())


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


# ---- numbers that are not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["1.0", "0"])
def test_a_rate_that_tears_the_network_apart_ends_the_run(train, tmp_path, capsys, limit):
    arguments = ["--learning_rate", "1e30", "--max_train_steps", 6, "--max_grad_norm", limit]
    (tmp_path / "out").mkdir()
    earlier = {"weight": torch.ones(3)}
    save_file(earlier, tmp_path / "out" / "lora.safetensors")
    assert train(*arguments) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("error: step 2: ") and ".png" in sentence
    assert torch.equal(load_file(tmp_path / "out" / "lora.safetensors")["weight"], earlier["weight"])
    assert all(is_finite(path) for path in (tmp_path / "out").glob("*.safetensors"))


def test_a_rate_that_tears_the_network_apart_in_the_fused_backward_pass_ends_the_run(train, tmp_path, capsys):
    arguments = ["--optimizer_type", "Adafactor", "--fused_backward_pass", "--learning_rate", "1e30"]
    arguments += ["--optimizer_args", "relative_step=False", "scale_parameter=False", "--max_train_steps", 6]
    assert train(*arguments) == 2
    assert "error: step " in capsys.readouterr().err
    assert all(is_finite(path) for path in (tmp_path / "out").glob("*.safetensors"))


def test_weights_that_overflow_in_the_file_are_not_written(train, tmp_path, capsys):
    arguments = ["--learning_rate", "1e6", "--max_train_steps", 1, "--save_precision", "fp16"]
    assert train(*arguments) == 2
    assert "not finite as float16" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_nan_in_the_base_model_ends_the_run_at_its_first_step(train, tiny_flux, flux_command, tmp_path, capsys):
    broken = tmp_path / "broken.safetensors"
    tensors = load_file(tiny_flux.transformer)
    name = next(name for name in tensors if name.startswith("double_blocks.0.img_attn"))
    tensors[name].view(-1)[0] = math.nan
    save_file(tensors, broken)
    command = [broken if str(part) == str(tiny_flux.transformer) else part for part in flux_command]
    assert train("--max_train_steps", 3, "--save_every_n_steps", 1, command=command) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("error: step 1: the loss is nan") and "look for NaN in the model's files" in sentence
    assert not list((tmp_path / "out").glob("*.safetensors"))


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
