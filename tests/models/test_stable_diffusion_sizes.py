"""Full-size checkpoints, by their headers alone, are recognised as the published models with the published sizes."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.models.clip import ClipTextEncoder
from library.models.loading import on_meta
from library.models.stable_diffusion.checkpoint import StableDiffusionModel, Variant, open_stable_diffusion
from tools.make_tiny_stable_diffusion import END_OF_TEXT, Encoder, Shape, encoder_config, original_tensors

VOCABULARY = 49408
LARGE = Encoder(768, 12, "quick_gelu", END_OF_TEXT, layers=12, mlp_ratio=4)
HUGE = Encoder(1024, 16, "gelu", "!", layers=23, mlp_ratio=4)
BIG = Encoder(1280, 20, "gelu", "!", layers=32, projection=1280, mlp_ratio=4)
SHAPES: dict[Variant, Shape] = {
    "sd1": Shape((320, 640, 1280, 1280), (1, 1, 1, 0), 8, False, (LARGE,), (False,)),
    "sd2": Shape((320, 640, 1280, 1280), (1, 1, 1, 0), (5, 10, 20, 20), True, (HUGE,), (True,)),
    "sdxl": Shape((320, 640, 1280), (0, 2, 10), (5, 10, 20), True, (LARGE, BIG), (False, True)),
}
# From unet/config.json of runwayml/stable-diffusion-v1-5, stabilityai/stable-diffusion-2-1 and
# stabilityai/stable-diffusion-xl-base-1.0; what they leave to diffusers' defaults is left out.
CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"
FOUR_LEVELS = [CROSS, CROSS, CROSS, PLAIN]
PUBLISHED: dict[Variant, dict[str, Any]] = {
    "sd1": {"attention_head_dim": 8, "cross_attention_dim": 768, "block_out_channels": [320, 640, 1280, 1280]},
    "sd2": {
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "block_out_channels": [320, 640, 1280, 1280],
        "use_linear_projection": True,
    },
    "sdxl": {
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "block_out_channels": [320, 640, 1280],
        "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
LEVELS: dict[Variant, list[str]] = {"sd1": FOUR_LEVELS, "sd2": FOUR_LEVELS, "sdxl": [PLAIN, CROSS, CROSS]}
FILE_KEYS = {"sd1": 1131, "sd2": 1228, "sdxl": 2515}
UNET_TENSORS = {"sd1": 686, "sd2": 686, "sdxl": 1680}
UNET_PARAMETERS = {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}
TEXT_PARAMETERS = {"sd1": [123_060_480], "sd2": [340_387_840], "sdxl": [123_060_480, 694_659_840]}
VAE_PARAMETERS = 83_653_863


def full_size_tensors(variant: Variant) -> dict[str, Tensor]:
    """All tensors of a published model's single file, on the meta device."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    shape = SHAPES[variant]
    with on_meta():
        types = {
            f"{half.lower()}_block_types": [level.format(half) for level in LEVELS[variant][::direction]]
            for half, direction in (("Down", 1), ("Up", -1))
        }
        modules: dict[str, Any] = {
            "unet": UNet2DConditionModel(**PUBLISHED[variant], **types),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4,
                layers_per_block=2,
            ),
        }
        for index, encoder in enumerate(shape.encoders):
            module = ClipTextEncoder(encoder_config(encoder, VOCABULARY), encoder.projection)
            modules["text_encoder_2" if index else "text_encoder"] = module
    return original_tensors(shape, {part: module.state_dict() for part, module in modules.items()})


def write_without_numbers(tensors: dict[str, Tensor], path: Path) -> Path:
    """A safetensors file of one-byte numbers that takes no space on the disk: its data is a hole."""
    header: dict[str, Any] = {}
    position = 0
    for name, tensor in tensors.items():
        stop = position + math.prod(tensor.shape)
        header[name] = {"dtype": "F8_E4M3", "shape": list(tensor.shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode("utf-8")
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
    return path


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module", params=list(SHAPES))
def opened(request, tmp_path_factory) -> StableDiffusionModel:
    tensors = full_size_tensors(request.param)
    assert len(tensors) == FILE_KEYS[request.param]
    path = write_without_numbers(tensors, tmp_path_factory.mktemp("sizes") / f"{request.param}.safetensors")
    return open_stable_diffusion(path)


def test_the_unet_has_the_published_configuration_and_size(opened):
    variant = opened.variant
    assert {key: opened.unet.config[key] for key in PUBLISHED[variant]} == PUBLISHED[variant]
    assert opened.unet.config["norm_num_groups"] == 32 and opened.unet.config["layers_per_block"] == 2
    unet = opened.unet.meta_module()
    assert len(unet.state_dict()) == UNET_TENSORS[variant] and parameters(unet) == UNET_PARAMETERS[variant]


def test_the_vae_has_the_published_configuration_and_size(opened):
    vae = opened.autoencoder.meta_module()
    assert len(vae.state_dict()) == 248 and parameters(vae) == VAE_PARAMETERS
    assert opened.autoencoder.config["scaling_factor"] == (0.13025 if opened.variant == "sdxl" else 0.18215)
    assert opened.autoencoder.config["norm_num_groups"] == 32


def test_the_text_encoders_have_the_published_configuration_and_size(opened):
    variant = opened.variant
    for file, encoder in zip(opened.text_encoders, SHAPES[variant].encoders, strict=True):
        assert file.sizes == {
            "vocab_size": VOCABULARY,
            "hidden_size": encoder.width,
            "intermediate_size": 4 * encoder.width,
            "num_hidden_layers": encoder.layers,
            "num_attention_heads": encoder.heads,
            "max_position_embeddings": 77,
            "hidden_act": encoder.activation,
        }
        assert file.projection_size == encoder.projection
    assert [parameters(file.meta_module()) for file in opened.text_encoders] == TEXT_PARAMETERS[variant]


def test_every_tensor_has_its_place_and_shape(opened):
    for file in (opened.unet, opened.autoencoder, *opened.text_encoders):
        places = {name: tuple(value.shape) for name, value in file.meta_module().state_dict().items()}
        assert {name: file.source.shape(name) for name in file.source.names()} == places


def test_a_stable_diffusion_2_file_with_and_without_the_unused_layer_has_23_layers(tmp_path):
    tensors = full_size_tensors("sd2")
    kept = {name: value for name, value in tensors.items() if ".resblocks.23." not in name}
    assert len(kept) == len(tensors) - 12
    opened = open_stable_diffusion(write_without_numbers(kept, tmp_path / "kept.safetensors"))
    assert opened.text_encoders[0].sizes["num_hidden_layers"] == 23
