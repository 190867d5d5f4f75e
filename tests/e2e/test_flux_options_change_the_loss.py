"""What only the FLUX.1 script has: an option changes the loss of the same draws, is refused, or said to be unused."""

from __future__ import annotations

import numpy
import pytest
import torch

from flux_train_network import FluxNetworkTrainer, FluxTrainingOptions
from library.errors import UserError
from library.options import parse_options
from library.training.objective.step_inputs import ItemDraws
from tests.running import forget_accelerator


@pytest.fixture
def make(tiny_flux, dataset_toml, tmp_path):
    """A trainer of the transformer with FLUX.1's options as they are when nothing is said."""

    def run(arguments: str, *files: object) -> FluxNetworkTrainer:
        forget_accelerator()
        given = ["--pretrained_model_name_or_path", tiny_flux.transformer, "--clip_l", tiny_flux.clip_l]
        given += ["--t5xxl", tiny_flux.t5xxl, "--ae", tiny_flux.autoencoder, "--network_module", "networks.lora_flux"]
        given += ["--network_train_unet_only", "--output_dir", tmp_path, "--seed", "7"]
        given += ["--dataset_config", dataset_toml(resolution=64), *arguments.split(), *files]
        return FluxNetworkTrainer.of(parse_options(FluxTrainingOptions, "test", [str(value) for value in given]))

    return run


@pytest.fixture(scope="module")
def loaded():
    """The parts of the model that earlier tests have loaded."""
    return {}


@pytest.fixture
def loss_of(make, loaded):
    """The loss of a first batch of the base model, which depends on the options and on nothing else."""

    def run(arguments: str) -> float:
        trainer = make(f"--t5xxl_max_token_length 16 {arguments}")
        trainer.check_options()
        trainer.prepare_output()
        trainer.start_processes()
        trainer.read_data()
        trainer.open_pipeline()
        trainer.pipeline.modules.update(loaded)
        trainer.fill_caches()
        batch = trainer.data.train.load(trainer.data.train.plan(1, 7)[0], epoch=1, step=0, max_train_steps=1, seed=7)
        with torch.no_grad():
            loss = trainer.step_loss(batch, ItemDraws(7, 1, [3, 4])).mean().item()
        loaded.update(trainer.pipeline.modules)
        return loss

    return run


@pytest.mark.parametrize(
    ("arguments", "beside"),
    [
        ("--timestep_sampling flux_shift", ""),
        ("--sigmoid_scale 0.5", "--timestep_sampling sigmoid"),
        ("--discrete_flow_shift 1.5", "--timestep_sampling shift"),
        ("--weighting_scheme sigma_sqrt", ""),
        ("--logit_mean 0.5", "--weighting_scheme logit_normal"),
        ("--logit_std 2", "--weighting_scheme logit_normal"),
        ("--mode_scale 0.5", "--weighting_scheme mode"),
        ("--model_prediction_type raw", ""),
        ("--guidance_scale 1", ""),
        ("--apply_t5_attn_mask", "--t5xxl_max_token_length 96"),
        ("--t5xxl_max_token_length 32", ""),
        ("--min_timestep 900", ""),
        ("--ip_noise_gamma 0.3", ""),
    ],
)
def test_an_option_changes_the_loss_of_the_same_draws(loss_of, arguments, beside):
    changed = loss_of(f"{beside} {arguments}")
    assert numpy.isfinite(changed) and changed != pytest.approx(loss_of(beside), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--model_type chroma", "is a FLUX.1 file; .*Give --model_type flux for this file"),
        ("--t5xxl_max_token_length 0", "--t5xxl_max_token_length must be at least 1"),
        ("--blocks_to_swap 2 --cpu_offload_checkpointing", "are mutually exclusive"),
        ("--clip_l none.safetensors", "--clip_l.*none.safetensors"),
        ("--t5xxl none.safetensors", "--t5xxl.*none.safetensors"),
        ("--ae none.safetensors", "--ae.*none.safetensors"),
    ],
)
def test_what_cannot_be_is_refused(make, arguments, sentence):
    trainer = make(arguments)
    with pytest.raises(UserError, match=sentence):
        trainer.check_options()
        trainer.prepare_output()
        trainer.start_processes()
        trainer.make_pipeline()


def test_what_changes_nothing_for_flux_is_said(make, caplog):
    arguments = "--v2 --v_parameterization --vae x --max_token_length 150 --weighted_captions --mem_eff_attn"
    arguments += " --noise_offset 0.1 --zero_terminal_snr --min_snr_gamma 5 --ddp_static_graph"
    trainer = make(f"{arguments} --split_mode --blocks_to_swap 2 --mode_scale 1 --discrete_flow_shift 1")
    with caplog.at_level("INFO"):
        trainer.check_options()
    names = [f"--{part.removeprefix('--')}" for part in arguments.split() if part.startswith("--")]
    (line,) = [text for text in caplog.messages if text.startswith("no effect for FLUX.1: ")]
    assert set(line.partition(": ")[2].split(", ")) == set(names)
    assert "--split_mode is deprecated; use --blocks_to_swap." in caplog.text
    assert "no effect beside --blocks_to_swap: --split_mode" in caplog.text
    assert "no effect with --timestep_sampling sigma: --discrete_flow_shift" in caplog.text
    assert "no effect with --weighting_scheme uniform: --mode_scale" in caplog.text
    expected = {name.removeprefix("--") for name in names}
    assert set(trainer.no_effect) == expected | {"split_mode", "mode_scale", "discrete_flow_shift"}


def test_a_model_without_embedded_guidance_says_so(make, tmp_path, caplog):
    from tools.make_tiny_models import make_tiny_flux

    schnell = make_tiny_flux(tmp_path / "schnell", variant="schnell")
    trainer = make("--guidance_scale 1", "--pretrained_model_name_or_path", schnell.transformer)
    trainer.check_options()
    trainer.prepare_output()
    trainer.check_network()
    trainer.start_processes()
    trainer.read_data()
    with caplog.at_level("INFO"):
        trainer.open_pipeline()
    assert "no effect for FLUX.1 schnell: --guidance_scale" in caplog.text
