"""--fused_backward_pass: the run is that of ordinary steps, to the bit, and gradients never lie in memory together."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from flux_train_network import FluxNetworkTrainer, FluxTrainingOptions
from library.options import parse_options
from library.training.training_loop import TrainingLoop
from tests.e2e.test_flux_training_options import SMALL
from tests.running import forget_accelerator

DOCUMENTED = (
    "--optimizer_type adafactor --optimizer_args relative_step=False scale_parameter=False warmup_init=False "
    "--max_grad_norm 0.0 --lr_scheduler linear --lr_warmup_steps 2"
).split()


@pytest.fixture
def train(flux_command, dataset_toml, tmp_path):
    """Train for some steps with more options into a folder; ``watch`` is called with the trainer after each backward
    pass. Returns the trainer when it is done."""

    def run(output: str, *arguments: object, watch=lambda trainer: None) -> FluxNetworkTrainer:
        forget_accelerator()
        given = [
            *flux_command,
            "--output_dir",
            tmp_path / output,
            "--dataset_config",
            dataset_toml(**SMALL),
            *arguments,
        ]
        given += ["--max_train_steps", "4", "--max_data_loader_n_workers", "0", "--cache_latents"]
        trainer = FluxNetworkTrainer(parse_options(FluxTrainingOptions, "test", [str(value) for value in given]))

        class WatchedLoop(TrainingLoop):
            def update(self) -> None:
                watch(trainer)
                super().update()

        trainer.loop_class = WatchedLoop
        trainer.train()
        return trainer

    return run


def weights(folder):
    return load_file(folder / "last.safetensors")


@pytest.mark.parametrize(
    "more", [pytest.param([], marks=pytest.mark.thorough), ["--gradient_checkpointing", "--scale_weight_norms", "0.1"]]
)
def test_the_weights_are_those_of_ordinary_steps(train, tmp_path, more):
    """CLIP-L trains, too; the learning rate warms up and decays."""
    gradients: dict[str, set[bool]] = {"plain": set(), "fused": set()}

    def watched(name):
        def note(trainer):
            gradients[name] |= {parameter.grad is None for parameter in trainer.optimization.parameters}

        return note

    train("plain", *DOCUMENTED, *more, watch=watched("plain"))
    train("fused", *DOCUMENTED, *more, "--fused_backward_pass", watch=watched("fused"))
    plain, fused = weights(tmp_path / "plain"), weights(tmp_path / "fused")
    assert plain.keys() == fused.keys()
    assert all(torch.equal(plain[name], fused[name]) for name in plain)
    assert gradients == {"plain": {False}, "fused": {True}}


def test_a_resumed_run_ends_at_the_same_weights(train, tmp_path):
    arguments = [*DOCUMENTED, "--fused_backward_pass", "--save_state", "--save_every_n_steps", "2"]
    train("whole", *arguments)
    train("again", *arguments, "--resume", tmp_path / "whole" / "at-step00000002-state")
    whole, again = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert any(
        not torch.equal(whole[name], load_file(tmp_path / "whole" / "at-step00000002.safetensors")[name])
        for name in whole
    )
