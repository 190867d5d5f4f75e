"""Stable Diffusion's models for the tests of its networks: the published sizes without values, and tiny ones with."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.models.loading import on_meta
from tests.families.stable_diffusion import few_blocks

if TYPE_CHECKING:
    from library.models.stable_diffusion.checkpoint import Variant

# As the published config.json files have them; what isn't named here is diffusers' default.
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
ENCODERS = {"sd1": [(12, 768)], "sd2": [(23, 1024)], "sdxl": [(12, 768), (32, 1280)]}  # layers, width


@cache
def real_unet(variant: str, **changes: Any) -> nn.Module:
    """diffusers' U-Net of a published model on torch's meta device, made once: no test changes it."""
    from diffusers import UNet2DConditionModel

    with on_meta():
        return UNet2DConditionModel(**{**UNETS[variant], **changes})


@cache
def real_encoders(variant: str) -> tuple[nn.Module, ...]:
    """The text encoders of a published model on torch's meta device, made once: no test changes them."""
    from library.models.clip import ClipConfig, ClipTextEncoder

    encoders: list[nn.Module] = []
    for layers, width in ENCODERS[variant]:
        config = ClipConfig(
            num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64
        )
        with on_meta():
            encoders.append(ClipTextEncoder(config, width if width == 1280 else None))
    return tuple(encoders)


@dataclass
class Tiny:
    """A tiny model, frozen, and inputs for it."""

    variant: str
    unet: nn.Module
    encoders: list[nn.Module]
    inputs: dict[str, Any]
    tokens: Tensor

    def predict(self) -> Tensor:
        """What the U-Net makes of the inputs."""
        return self.unet(**self.inputs).sample

    def encode(self) -> list[Tensor]:
        """The last hidden state of each text encoder."""
        return [encoder.text_model(self.tokens).last_hidden_state for encoder in self.encoders]


@cache
def tiny_meta_module(variant: Variant, whole: bool = False) -> nn.Module:
    """The U-Net of ``tiny_model`` on torch's meta device."""
    from tools.make_tiny_stable_diffusion import SHAPES, build_modules

    with on_meta():
        return build_modules(SHAPES[variant] if whole else few_blocks(variant), vocabulary=64)["unet"]


def tiny_model(variant: Variant, dtype: torch.dtype = torch.float32, whole: bool = False) -> Tiny:
    """Random weights, the same each time; the caller may change them. ``whole``: with all blocks of the real model."""
    return copy.deepcopy(shared_tiny_model(variant, dtype, whole))


@cache
def shared_tiny_model(variant: Variant, dtype: torch.dtype = torch.float32, whole: bool = False) -> Tiny:
    """The same for tests that change nothing of it: no network may stay applied."""
    from tools.make_tiny_models import fill_randomly
    from tools.make_tiny_stable_diffusion import SHAPES, build_modules

    with on_meta():
        modules = build_modules(SHAPES[variant] if whole else few_blocks(variant), vocabulary=64)
    for part, module in modules.items():
        fill_randomly(module, 0, part)
        module.to(dtype).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(1)
    config = modules["unet"].config

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    inputs: dict[str, Any] = {
        "sample": normal(2, 4, 8, 8),
        "timestep": torch.tensor([100, 700]),
        "encoder_hidden_states": normal(2, 7, config.cross_attention_dim),
    }
    if variant == "sdxl":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": normal(2, pooled), "time_ids": normal(2, 6).abs() * 100}
    tokens = torch.randint(0, 60, (2, 9), generator=generator)
    encoders = [modules[name] for name in ("text_encoder", "text_encoder_2") if name in modules]
    return Tiny(variant, modules["unet"], encoders, inputs, tokens)
