"""--ema_decay: the average of the weights, in files, samples, validation and states; training goes on as without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flux_train_network import FluxNetworkTrainer
from library.errors import UserError
from library.safetensors_io import read_header
from library.training.training_loop import TrainingLoop
from tests.e2e.test_flux_training_options import SMALL
from tests.running import make_trainer


@pytest.fixture
def train(flux_command, dataset_toml, few_images, tmp_path):
    """Train the transformer's network into a folder; ``watch`` is called with the trainer before and after steps."""

    def run(output: str, *arguments: object, steps: int = 4, watch=lambda trainer: None) -> FluxNetworkTrainer:
        given = [*flux_command, "--output_dir", tmp_path / output, "--output_name", "cat", "--max_train_steps", steps]
        given += ["--dataset_config", dataset_toml(few_images, **SMALL), "--max_data_loader_n_workers", 0]
        given += ["--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only"]
        given += ["--learning_rate", "1e-2", "--no_report"]
        trainer = make_trainer(FluxNetworkTrainer, *given, *arguments)

        class WatchedLoop(TrainingLoop):
            def train_epoch(self, *values) -> None:
                if self.progress.step == 0:
                    watch(trainer)
                super().train_epoch(*values)

            def after_step(self, *values) -> None:
                watch(trainer)
                super().after_step(*values)

        trainer.loop_class = WatchedLoop
        trainer.train()
        return trainer

    return run


def tensors(*parts: object) -> dict[str, torch.Tensor]:
    return load_file(Path(*map(str, parts)))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


FUSED = "--optimizer_type adafactor --optimizer_args relative_step=False scale_parameter=False --fused_backward_pass"


@pytest.mark.parametrize(
    "arguments",
    [
        "--gradient_accumulation_steps 2 --scale_weight_norms 0.1 --max_grad_norm 0",
        FUSED,
        pytest.param("--mixed_precision bf16 --full_bf16", marks=pytest.mark.thorough),
        pytest.param("--network_module lycoris.kohya --network_args algo=lokr", marks=pytest.mark.thorough),
    ],
)
def test_the_file_holds_the_average_that_float64_gives(train, tmp_path, arguments):
    seen: list[list[torch.Tensor]] = []

    def note(trainer) -> None:
        seen.append([parameter.detach().double().clone() for parameter in trainer.optimization.parameters])

    trainer = train("out", "--ema_decay", 0.24, *arguments.split(), watch=note)
    expected, *steps = seen
    assert len(steps) == 4
    for number, weights in enumerate(steps, 1):
        decay = min(0.24, (1 + number) / (10 + number))  # 0.18 in the first step
        expected = [decay * average + (1 - decay) * weight for average, weight in zip(expected, weights)]
    names = {id(parameter): name for name, parameter in trainer.network.named_parameters()}
    if "lycoris" in arguments:
        found = [value.double() for value in trainer.optimization.average.values]
    else:
        file = tensors(tmp_path, "out", "cat-ema.safetensors")
        found = [file[names[id(parameter)]].double() for parameter in trainer.optimization.parameters]
    close = {"rtol": 8e-3, "atol": 1e-6} if "bf16" in arguments else {"rtol": 1e-5, "atol": 1e-8}
    for average, value in zip(expected, found):
        torch.testing.assert_close(value, average, **close)
    plain = tensors(tmp_path, "out", "cat.safetensors")
    assert all(not torch.equal(plain[name], weight) for name, weight in zip(names.values(), expected) if name in plain)
    assert same(
        {names[id(p)]: p.detach() for p in trainer.optimization.parameters if names[id(p)] in plain},
        {name: tensor for name, tensor in plain.items() if name in names.values()},
    )


@pytest.fixture
def prompts(tmp_path) -> list[object]:
    """Arguments for a sample image with fixed noise after every second step, and at the start."""
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 5\n", encoding="utf-8")
    return ["--sample_prompts", tmp_path / "prompts.txt", "--sample_every_n_steps", 2, "--sample_at_first"]


def sample(folder: Path, moment: str) -> bytes:
    (path,) = (folder / "sample").glob(f"cat_{moment}_*.png")
    return path.read_bytes()


def test_files_samples_and_validation_have_it_and_training_does_not(train, prompts, tmp_path):
    validation = ["--validation_split", 0.3, "--validate_every_n_steps", 2]
    kept = ["--save_every_n_steps", 1, "--save_last_n_steps", 1, "--save_state"]
    averaged = train("out", *prompts, *validation, *kept, "--ema_decay", 0.9)
    train("plain", *validation, "--save_state_on_train_end")
    out, plain = tmp_path / "out", tmp_path / "plain"
    last = [f"cat-step0000000{step}" for step in (3, 4)]
    assert {path.name for path in out.glob("cat*")} == {
        *(f"{name}{end}" for name in (*last, "cat") for end in (".safetensors", "-ema.safetensors", "-state")),
    }
    assert same(tensors(out, "cat.safetensors"), tensors(plain, "cat.safetensors"))
    assert same(tensors(out, "cat-state/optimizer.safetensors"), tensors(plain, "cat-state/optimizer.safetensors"))
    told = read_header(out / "cat-ema.safetensors").metadata
    assert (told["ss_ema_decay"], told["ss_ema_updates"], told["ss_steps"]) == ("0.9", "4", "4")
    assert told["modelspec.title"] == "cat (moving average)"
    assert "ss_ema_decay" not in read_header(out / "cat.safetensors").metadata
    # What a run draws and computes at its start from a file is what this one drew and computed from its weights.
    for file, alike in (("cat-ema.safetensors", True), ("cat.safetensors", False)):
        first = [*prompts, *validation, "--network_weights", out / file]
        again = train(file, *first, "--max_train_steps", 1, "--learning_rate", 1e-30)
        assert (sample(tmp_path / file, "e000000") == sample(out, "000004")) is alike
        losses = [run.progress.validation_losses["validation (step)"] for run in (averaged, again)]
        assert (losses[0] == pytest.approx(losses[1], rel=1e-6)) is alike


def test_a_resumed_run_ends_with_the_same_average(train, tmp_path, caplog):
    caplog.set_level("INFO")
    saving = ["--save_every_n_steps", 2, "--save_state"]
    train("whole", *saving, "--ema_decay", 0.9)
    state = tmp_path / "whole" / "cat-step00000002-state"
    train("again", "--ema_decay", 0.9, "--resume", state)
    whole, again = (tensors(tmp_path, name, "cat-ema.safetensors") for name in ("whole", "again"))
    assert same(whole, again)
    (state / "average.safetensors").unlink()
    with pytest.raises(UserError, match=r"is incomplete: average\.safetensors is missing"):
        train("lost", "--ema_decay", 0.9, "--resume", state)

    train("without", *saving, steps=2)
    caplog.clear()
    train("late", "--ema_decay", 0.9, "--resume", tmp_path / "without" / "cat-state", steps=4)
    assert "holds no moving average: it begins here, at step 2" in caplog.text
    assert read_header(tmp_path / "late" / "cat-ema.safetensors").metadata["ss_ema_updates"] == "2"
    assert same(tensors(tmp_path, "late", "cat.safetensors"), tensors(tmp_path, "whole", "cat.safetensors"))
    assert not same(tensors(tmp_path, "late", "cat-ema.safetensors"), whole)

    beside = tmp_path / "without" / "cat-ema.safetensors"  # the run is complete but for this file
    train("without", *saving, "--ema_decay", 0.9, "--resume", "auto", steps=2)
    assert same(load_file(beside), tensors(tmp_path, "without", "cat.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--ema_decay 1.0", r"--ema_decay must be above 0 and below 1, such as 0\.999, not 1"),
        ("--ema_decay 0.9 --optimizer_type AdamWScheduleFree", "--ema_decay: AdamWScheduleFree averages the weights"),
        ("--ema_decay 0.9 --optimizer_type schedulefree.SGDScheduleFree", "averages the weights itself"),
    ],
)
def test_what_makes_no_sense_is_refused(train, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        train("out", *arguments.split())
