"""The tiny HunyuanImage-2.1's autoencoder: random weights at the real stride, in the original and Diffusers layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.files import write_text
from library.models.autoencoder_hunyuan import LATENT_SCALE, HunyuanAutoencoder, HunyuanAutoencoderConfig
from library.safetensors_io import save_file
from tools.tiny_parts import fill_randomly

HUNYUAN_AUTOENCODER = HunyuanAutoencoderConfig(widths=(32, 32, 32, 32, 64, 128), res_blocks=1)
"""As narrow as 64 latent channels and 32 norm groups allow."""


def tiny_hunyuan_autoencoder(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of one with random weights, under the original names."""
    module = HunyuanAutoencoder(HUNYUAN_AUTOENCODER)
    fill_randomly(module, seed, "tiny hunyuan image autoencoder")
    return {key: value.to(dtype).contiguous() for key, value in module.state_dict().items()}


def write_diffusers_hunyuan_autoencoder(
    folder: Path, state: dict[str, Tensor], config: HunyuanAutoencoderConfig = HUNYUAN_AUTOENCODER
) -> None:
    """Write ``state``, under the original names, as a Diffusers model folder (a pipeline's ``vae``)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", json.dumps(diffusers_hunyuan_autoencoder_config(config)))
    converted = diffusers_hunyuan_autoencoder_state(state, config)
    save_file(converted, folder / "diffusion_pytorch_model.safetensors")


def diffusers_hunyuan_autoencoder_config(config: HunyuanAutoencoderConfig) -> dict[str, Any]:
    """The same sizes as Diffusers' configuration says them."""
    return {
        "_class_name": "AutoencoderKLHunyuanImage",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": config.latent_channels,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.res_blocks,
        "spatial_compression_ratio": config.stride,
        "sample_size": 384,
        "scaling_factor": LATENT_SCALE,
    }


NAMES = {
    "mid.block_1.": "mid_block.resnets.0.",
    "mid.block_2.": "mid_block.resnets.1.",
    "mid.attn_1.norm.": "mid_block.attentions.0.norm.",
    "mid.attn_1.q.": "mid_block.attentions.0.to_q.",
    "mid.attn_1.k.": "mid_block.attentions.0.to_k.",
    "mid.attn_1.v.": "mid_block.attentions.0.to_v.",
    "mid.attn_1.proj_out.": "mid_block.attentions.0.proj.",
}


def diffusers_hunyuan_autoencoder_state(
    state: dict[str, Tensor], config: HunyuanAutoencoderConfig
) -> dict[str, Tensor]:
    """The autoencoder's tensors under Diffusers' names, whose levels are one list of blocks and resamplers."""
    names = dict(NAMES)
    for side, part, resampler, blocks in (
        ("encoder", "down", "downsample", config.res_blocks),
        ("decoder", "up", "upsample", config.res_blocks + 1),
    ):
        layers = []
        for level in range(len(config.widths)):
            layers += [f"{side}.{part}.{level}.block.{block}." for block in range(blocks)]
            layers.append(f"{side}.{part}.{level}.{resampler}.")
        names |= {layer: f"{side}.{part}_blocks.{index}." for index, layer in enumerate(layers)}
    converted = {}
    for key, value in state.items():
        name = key
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        converted[name.replace("nin_shortcut.", "conv_shortcut.")] = value
    return converted
