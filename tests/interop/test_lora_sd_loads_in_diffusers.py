"""Diffusers' pipelines load LoRA files for Stable Diffusion: every key finds its module, and images agree."""

from __future__ import annotations

import logging
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from networks import lora

pytestmark = pytest.mark.skipif(find_spec("peft") is None, reason="diffusers loads LoRA through peft")


@pytest.fixture(scope="module", params=[*(pytest.param(v, marks=pytest.mark.thorough) for v in ("sd1", "sd2")), "sdxl"])
def pipe(request, tmp_path_factory):
    """diffusers' own pipeline of a tiny model."""
    from diffusers import DiffusionPipeline

    from tools.make_tiny_stable_diffusion import make_tiny_stable_diffusion

    folder = tmp_path_factory.mktemp(request.param)
    make_tiny_stable_diffusion(folder, request.param, "diffusers")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encoders_of(pipe) -> list[nn.Module]:
    return [pipe.text_encoder] + ([pipe.text_encoder_2] if hasattr(pipe, "text_encoder_2") else [])


def latents(pipe) -> torch.Tensor:
    """What two steps of sampling arrive at, text encoders included."""
    return pipe(
        "a circle on a background", num_inference_steps=2, guidance_scale=3.0, width=64, height=64,
        generator=torch.Generator().manual_seed(1), output_type="latent",
    ).images  # fmt: skip


def randomise(network: nn.Module, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def peft_layers(model: nn.Module) -> int:
    return sum(hasattr(module, "lora_A") for module in model.modules())


def test_what_diffusers_draws_with_the_file_is_what_the_network_drew(pipe, tmp_path, caplog):
    encoders = encoders_of(pipe)
    without = latents(pipe)
    network = lora.create_network(1.0, 4, 2.0, None, encoders, pipe.unet, conv_dim="3", conv_alpha="1")
    randomise(network)
    network.apply_to(encoders, pipe.unet)
    expected = latents(pipe)
    network.save_weights(tmp_path / "lora.safetensors", None, {"ss_seed": "1"})
    network.remove()
    assert (expected - without).abs().max() > 0.1

    with caplog.at_level(logging.WARNING):
        logging.getLogger("diffusers").propagate = True
        pipe.load_lora_weights(tmp_path / "lora.safetensors")
    said = [record.getMessage() for record in caplog.records if record.name.startswith(("diffusers", "peft"))]
    layers = [peft_layers(model) for model in (pipe.unet, *encoders)]
    torch.testing.assert_close(latents(pipe), expected, rtol=1e-4, atol=1e-4)
    pipe.unload_lora_weights()
    assert not [text for text in said if "key" in text or "LoRA" in text]
    assert layers[0] == len(network.unet_loras) and sum(layers[1:]) == len(network.text_encoder_loras)


def test_a_file_that_diffusers_wrote_is_read_here(pipe, tmp_path):
    """PEFT's own adapter, in diffusers' own file, drawn by diffusers and by the network that the file gives."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    encoders = encoders_of(pipe)
    names = ["text_encoder_lora_layers", "text_encoder_2_lora_layers"][: len(encoders)]
    generator = torch.Generator().manual_seed(0)
    states = []
    for model, layers in ((pipe.unet, ["to_q", "to_out.0", "ff.net.2"]), *((e, ["q_proj", "fc1"]) for e in encoders)):
        model.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=layers))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        states.append(convert_state_dict_to_diffusers(get_peft_model_state_dict(model)))
    expected = latents(pipe)
    type(pipe).save_lora_weights(tmp_path, unet_lora_layers=states[0], **dict(zip(names, states[1:])))
    pipe.unload_lora_weights()

    network, _ = lora.create_network_from_weights(
        1.0, tmp_path / "pytorch_lora_weights.safetensors", None, encoders, pipe.unet
    )
    assert len(network.loras) == sum(len(state) for state in states) // 2
    network.apply_to(encoders, pipe.unet)
    torch.testing.assert_close(latents(pipe), expected, rtol=1e-4, atol=1e-4)
    network.remove()
