"""NaN and infinity never reach the network unnoticed, nor any file: named with step and images, or left out."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import flux_train_network
from library.errors import UserError
from library.safetensors_io import read_header
from library.training.finiteness import NonfiniteOptions, StepWatch
from library.training.optim.optimization import Optimization
from library.training.output.state import SavedState
from library.training.progress import Progress
from tests.families.families import TINY
from tests.running import no_weights_are_read, run_in_process


def is_finite(path: Path) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())


@pytest.fixture
def broken_steps(monkeypatch):
    """Let the model's output be NaN (or of no gradient at all) in the steps whose numbers are put in, from 1."""
    steps: dict[int, str] = {}
    real = flux_train_network.FluxNetworkTrainer.predict

    def predict(self, *values: object) -> torch.Tensor:
        how = steps.get(self.progress.step + 1)
        output = real(self, *values)
        return output * math.nan if how == "nan" else output * 0 if how == "no gradient" else output

    monkeypatch.setattr(flux_train_network.FluxNetworkTrainer, "predict", predict)
    return steps


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "lora.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- a loss or a gradient ------------------------------------------------------------------------------------------


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


def test_the_run_ends_with_the_last_good_state_and_says_where_it_is(train, broken_steps, tmp_path, capsys):
    broken_steps[3] = "nan"
    assert train("--max_train_steps", 4, "--save_state", "--gradient_accumulation_steps", 2) == 2
    said = capsys.readouterr().err
    assert "error: step 3: the loss is nan, with the images " in said and "--on_nonfinite skip" in said
    state = tmp_path / "out" / "lora-step00000002-state"
    assert SavedState(state).position.step == 2 and f"--resume {state}" in said
    assert is_finite(tmp_path / "out" / "lora-step00000002.safetensors")


def test_a_step_that_is_skipped_leaves_the_network_and_its_optimizer_alone(train, broken_steps, tmp_path, capsys):
    common = ["--max_train_steps", 4, "--optimizer_type", "SGD", "--learning_rate", "1", "--max_grad_norm", 0]
    common += ["--gradient_accumulation_steps", 2, "--lr_scheduler", "linear"]
    broken_steps[2] = "no gradient"
    assert train(*common, output="reference") == 0
    broken_steps[2] = "nan"
    log = tmp_path / "log"
    arguments = ["--on_nonfinite", "skip", "--logging_dir", log, "--ema_decay", "0.9"]
    assert train(*common, *arguments, output="skipped") == 0
    assert equal(weights(tmp_path / "skipped"), weights(tmp_path / "reference"))
    assert read_header(tmp_path / "skipped" / "lora-ema.safetensors").metadata["ss_ema_updates"] == "3"
    said = capsys.readouterr().err
    assert "step 2: the loss is nan, with the images " in said and "Its update is left out (1 of at most 20)" in said
    assert "updates left out: 1 step whose loss or gradients were not finite" in said
    averages = [value for tag, _, value in scalars(log) if tag == "loss/average"]
    assert averages and all(map(math.isfinite, averages))
    assert sum(math.isnan(value) for tag, _, value in scalars(log) if tag == "loss/current") == 2


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    (path,) = folder.rglob("events.*")
    events = [Event.FromString(record) for record in RawEventFileLoader(str(path)).Load()]
    return [(value.tag, event.step, value.simple_value) for event in events for value in event.summary.value]


def test_a_run_that_left_out_updates_is_resumed_to_the_same_bytes_and_the_same_count(train, broken_steps, tmp_path):
    common = ["--max_train_steps", 5, "--on_nonfinite", "skip", "--save_state", "--save_every_n_steps", 1]
    broken_steps.update({2: "nan", 4: "nan"})
    assert train(*common, output="whole") == 0
    resumed = [*common, "--resume", tmp_path / "whole" / "lora-step00000003-state"]
    assert train(*resumed, output="resumed") == 0
    assert equal(weights(tmp_path / "resumed"), weights(tmp_path / "whole"))
    assert train(*resumed, "--max_nonfinite_steps", 1, output="limited") == 2
    assert not (tmp_path / "limited" / "lora.safetensors").exists()


@pytest.mark.parametrize("limit", [0, 2])
def test_more_steps_than_the_limit_end_the_run(train, broken_steps, tmp_path, capsys, limit):
    broken_steps.update(dict.fromkeys(range(2, 7), "nan"))
    arguments = ["--max_train_steps", 6, "--on_nonfinite", "skip", "--max_nonfinite_steps", limit]
    assert train(*arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"error: step {limit + 2}: the loss is nan, with the images ")
    assert f"because {limit} were left out already (--max_nonfinite_steps)" in said[-1]
    assert sum("Its update is left out" in line for line in said) == limit
    assert is_finite(tmp_path / "out" / f"lora-step{limit + 1:08d}.safetensors")


def test_the_fused_backward_pass_leaves_out_a_step_whose_loss_is_not_finite(train, broken_steps, tmp_path):
    common = ["--optimizer_type", "Adafactor", "--fused_backward_pass", "--max_train_steps", 3]
    common += ["--optimizer_args", "relative_step=False", "scale_parameter=False", "--learning_rate", "1e-2"]
    broken_steps[3] = "nan"
    assert train(*common, "--on_nonfinite", "skip", "--save_every_n_steps", 2) == 0
    before = load_file(tmp_path / "out" / "lora-step00000002.safetensors")
    assert equal(weights(tmp_path / "out"), before)


def test_a_negative_limit_is_refused(train, capsys):
    assert train("--on_nonfinite", "skip", "--max_nonfinite_steps", -1) == 2
    assert "--max_nonfinite_steps must not be negative, but is -1." in capsys.readouterr().err


def test_the_limit_without_skipping_is_said_to_have_no_effect(train, capsys):
    assert train("--max_nonfinite_steps", 3, "--max_train_steps", 1) == 0
    assert "no effect without --on_nonfinite skip: --max_nonfinite_steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("own", "other", "said"), [(math.nan, 1.0, "images a.png"), (1.0, math.nan, "another process")]
)
def test_of_two_processes_each_leaves_out_the_step_and_one_names_its_images(caplog, own, other, said):
    """Each process sees the mean over both, and of its own images only what they came to."""
    mean = (own + other) / 2
    both = SimpleNamespace(num_processes=2, reduce=lambda values, reduction: torch.full_like(values, mean))
    watch, progress = StepWatch(NonfiniteOptions("skip", 1)), Progress()
    watch.add(torch.tensor(own), ["a.png"])
    problem = watch.read(torch.tensor(mean), both).problem
    assert problem == "the loss is nan"
    watch.leave_out(problem, progress)
    assert progress.left_out == 1 and said in caplog.text
    with pytest.raises(UserError):
        watch.leave_out(problem, progress)


# ---- in files ------------------------------------------------------------------------------------------------------


def with_nan(source: Path, target: Path, part: str) -> str:
    """Copy a safetensors file with NaN in the first tensor whose name has ``part`` in it; returns that name."""
    tensors = load_file(source)
    name = next(name for name in tensors if part in name and tensors[name].is_floating_point())
    tensors[name].view(-1)[0] = math.nan
    save_file(tensors, target, read_header(source).metadata)
    return name


@pytest.mark.parametrize(
    ("model", "part", "caches"),
    [
        pytest.param(model, part, caches, marks=[pytest.mark.thorough] if bool(caches) == (model != "t5xxl") else [])
        for model, part in (
            ("transformer", "double_blocks.0.img_attn"),
            ("autoencoder", "encoder.conv_in.weight"),
            ("clip_l", "layers.0.mlp.fc1"),
            ("t5xxl", "SelfAttention.q"),
        )
        for caches in ([], ["--cache_latents", "--cache_text_encoder_outputs"])
    ],
)
def test_nan_in_a_part_of_the_base_model_is_named_before_an_update(
    train, tiny_flux, flux_command, tmp_path, capsys, model, part, caches
):
    folder, sound = tmp_path / "model", getattr(tiny_flux, model)
    shutil.copytree(sound.parent, folder)  # with the tokenizers
    broken = folder / sound.name
    name = with_nan(sound, broken, part)
    command = [broken if str(word) == str(sound) else word for word in flux_command]
    command += ["--max_train_steps", 1, "--network_train_unet_only"]
    assert train(*caches, "--on_nonfinite", "skip", command=command) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert said.endswith(f'{broken}: "{name}" holds numbers that are not finite; the file is damaged.')
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(("suffix", "array"), [("_flux.npz", "latents"), ("_flux_te.npz", "t5_out")])
def test_nan_in_a_cache_on_disk_is_named_and_a_cache_without_identity_is_made_anew(
    train, image_folder, tmp_path, monkeypatch, capsys, suffix, array
):
    """Named where it is trusted unread (--skip_cache_check); that of another program is looked through."""
    folder = tmp_path / "images"
    shutil.copytree(
        image_folder, folder, ignore=lambda _, names: [name for name in names if name[:2] not in ("00", "01")]
    )
    arguments = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--network_train_unet_only"]
    arguments += ["--max_train_steps", 1]
    assert train(*arguments, folder=folder) == 0
    path = next(path for path in sorted(folder.iterdir()) if path.name.endswith(suffix))
    arrays = dict(numpy.load(path))
    name = next(name for name in arrays if name.startswith(array))
    arrays[name].reshape(-1)[0] = math.nan
    numpy.savez(path, **arrays)
    assert train(*arguments, "--skip_cache_check", folder=folder) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f'error: {path}: the cache file holds numbers that are not finite in "{name}"')
    numpy.savez(path, **{key: value for key, value in arrays.items() if not key.startswith("identity")})
    assert train(*arguments, folder=folder) == 0
    assert "1 rebuilt (1 not finite)" in capsys.readouterr().err
    assert all(numpy.isfinite(value).all() for value in dict(numpy.load(path)).values() if value.dtype.kind == "f")


def test_nan_in_a_given_lora_file_is_named_before_a_model_is_loaded(train, tmp_path, capsys):
    assert train("--max_train_steps", 1) == 0
    for part in ("lora_down", "lora_up", "alpha"):
        name = with_nan(tmp_path / "out" / "lora.safetensors", tmp_path / "broken.safetensors", part)
        for option in ("--network_weights", "--base_weights"):
            with no_weights_are_read():
                assert train("--max_train_steps", 1, option, tmp_path / "broken.safetensors", output="other") == 2
            said = capsys.readouterr().err.splitlines()[-1]
            assert f"{tmp_path / 'broken.safetensors'}: " in said and name.split(".")[0] in said
            assert "not finite" in said


@pytest.mark.parametrize(
    ("model", "part"), [("transformer", "double_blocks.0.img_attn"), ("autoencoder", "decoder.conv_in")]
)
def test_nan_in_the_base_model_is_named_when_an_image_is_drawn(tiny_flux, tmp_path, model, part):
    sound = getattr(tiny_flux, model)
    shutil.copytree(sound.parent, tmp_path / "model")
    broken = tmp_path / "model" / sound.name
    name = with_nan(sound, broken, part)
    command = [broken if str(word) == str(sound) else word for word in TINY["flux"].drawing(tiny_flux)]
    command += ["--prompt", "a circle", "--width", 64, "--height", 64, "--steps", 1, "--output_dir", tmp_path / "out"]
    done = run_in_process("flux_minimal_inference.py", *command)
    assert done.returncode == 2
    said = done.stderr.splitlines()[-1]
    assert said.endswith(f'{broken}: "{name}" holds numbers that are not finite; the file is damaged.')


def test_a_gradient_scaler_goes_on_after_a_step_without_update():
    """That of fp16, which waits for the end of each step whose gradients it has seen."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), torch.amp.GradScaler("cpu")
    optimization = Optimization.__new__(Optimization)
    optimization.optimizer, optimization.accelerator = optimizer, SimpleNamespace(scaler=scaler)
    scaler.scale((weight * math.nan).sum()).backward()
    scaler.unscale_(optimizer)
    optimization.leave_out()
    assert torch.equal(weight, torch.ones(2)) and weight.grad is None
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert torch.equal(weight, torch.zeros(2))
