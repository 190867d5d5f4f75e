"""Tensors and sizes as Diffusers and ComfyUI name them, for the tiny models, tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from library.models.autoencoder_kl import LATENT_SCALE, LATENT_SHIFT, AutoencoderConfig
from library.models.flux.checkpoint import (
    APPROXIMATOR_LAYER,
    APPROXIMATOR_NORM,
    APPROXIMATOR_OUTER,
    DOUBLE,
    DOUBLE_NORMS,
    OUTER,
    SINGLE,
    SINGLE_NORMS,
)
from library.models.flux.chroma import ChromaConfig
from library.models.flux.transformer import FluxConfig
from library.models.hunyuan_image.checkpoint import DIFFUSERS as HUNYUAN_IN_DIFFUSERS
from library.models.hunyuan_image.checkpoint import LAST_MODULATION
from library.models.hunyuan_image.transformer import HunyuanImageConfig
from library.models.lumina.checkpoint import diffusers_modules
from library.models.lumina.transformer import LuminaConfig

AUTOENCODER_NAMES = {
    "mid.block_1.": "mid_block.resnets.0.",
    "mid.block_2.": "mid_block.resnets.1.",
    "mid.attn_1.norm.": "mid_block.attentions.0.group_norm.",
    "mid.attn_1.q.": "mid_block.attentions.0.to_q.",
    "mid.attn_1.k.": "mid_block.attentions.0.to_k.",
    "mid.attn_1.v.": "mid_block.attentions.0.to_v.",
    "mid.attn_1.proj_out.": "mid_block.attentions.0.to_out.0.",
    ".downsample.": ".downsamplers.0.",
    ".upsample.": ".upsamplers.0.",
    ".block.": ".resnets.",
    "nin_shortcut.": "conv_shortcut.",
    "norm_out.": "conv_norm_out.",
}


def comfyui_name(key: str) -> str:
    """The name that a tensor of HunyuanImage-2.1's transformer has inside ComfyUI."""
    changes = {
        "txt_in.c_embedder.linear_1.": "txt_in.c_embedder.in_layer.",
        "txt_in.c_embedder.linear_2.": "txt_in.c_embedder.out_layer.",
        "_embedder.mlp.0.": "_embedder.in_layer.",
        "_embedder.mlp.2.": "_embedder.out_layer.",
        "time_in.mlp.0.": "time_in.in_layer.",
        "time_in.mlp.2.": "time_in.out_layer.",
        "_mod.linear.": "_mod.lin.",
        ".modulation.linear.": ".modulation.lin.",
        "_attn_qkv.": "_attn.qkv.",
        "_attn_proj.": "_attn.proj.",
        "_attn_q_norm.weight": "_attn.norm.query_norm.scale",
        "_attn_k_norm.weight": "_attn.norm.key_norm.scale",
        ".q_norm.weight": ".norm.query_norm.scale",
        ".k_norm.weight": ".norm.key_norm.scale",
        "mlp.fc1.": "mlp.0.",
        "mlp.fc2.": "mlp.2.",
    }
    for ours, theirs in changes.items():
        key = key.replace(ours, theirs)
    return key


def diffusers_transformer_config(config: FluxConfig) -> dict[str, Any]:
    common = {
        "patch_size": 1,
        "in_channels": config.in_channels,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_dim,
        "axes_dims_rope": list(config.axes_dims),
    }
    if isinstance(config, ChromaConfig):
        return {
            "_class_name": "ChromaTransformer2DModel",
            **common,
            "approximator_num_channels": config.approximator_in,
            "approximator_hidden_dim": config.approximator_hidden,
            "approximator_layers": config.approximator_layers,
        }
    return {
        "_class_name": "FluxTransformer2DModel",
        **common,
        "pooled_projection_dim": config.vector_dim,
        "guidance_embeds": config.guidance_embed,
    }


def diffusers_transformer_state(state: dict[str, Tensor], config: FluxConfig) -> dict[str, Tensor]:
    """The transformer's tensors under Diffusers' names."""
    modules = {ours: (theirs,) for ours, theirs in OUTER.items()} | {name: (name,) for name in APPROXIMATOR_OUTER}
    norms: dict[str, str] = {}
    for index in range(config.approximator_layers if isinstance(config, ChromaConfig) else 0):
        modules |= {ours.format(index): (theirs.format(index),) for ours, theirs in APPROXIMATOR_LAYER.items()}
        scale, weight = (name.format(index).rsplit(".", 1)[0] for name in APPROXIMATOR_NORM)
        norms[scale] = weight
    for index in range(config.depth):
        prefix, theirs = f"double_blocks.{index}.", f"transformer_blocks.{index}."
        modules |= {prefix + name: tuple(theirs + part for part in parts) for name, parts in DOUBLE.items()}
        norms |= {prefix + name: theirs + part for name, part in DOUBLE_NORMS.items()}
    for index in range(config.depth_single):
        prefix, theirs = f"single_blocks.{index}.", f"single_transformer_blocks.{index}."
        modules |= {prefix + name: tuple(theirs + part for part in parts) for name, parts in SINGLE.items()}
        norms |= {prefix + name: theirs + part for name, part in SINGLE_NORMS.items()}
    converted = {}
    for key, value in state.items():
        module, kind = key.rsplit(".", 1)
        if module in norms:
            converted[f"{norms[module]}.weight"] = value
            continue
        if module == "final_layer.adaLN_modulation.1":
            value = torch.cat(tuple(reversed(value.chunk(2))))
        parts = modules[module]
        rows = [config.hidden_size] * 3 + [config.mlp_hidden]
        for part, piece in zip(parts, value.split(rows[: len(parts)]) if len(parts) > 1 else (value,)):
            converted[f"{part}.{kind}"] = piece.contiguous()
    return converted


def diffusers_lumina_config(config: LuminaConfig) -> dict[str, Any]:
    """The same sizes as Diffusers' configuration says them."""
    return {
        "_class_name": "Lumina2Transformer2DModel",
        "patch_size": 2,
        "in_channels": config.latent_channels,
        "hidden_size": config.dim,
        "num_layers": config.layers,
        "num_refiner_layers": config.refiner_layers,
        "num_attention_heads": config.heads,
        "num_kv_heads": config.kv_heads,
        "multiple_of": config.ffn_dim,
        "axes_dim_rope": list(config.axes_dims),
        "cap_feat_dim": config.text_dim,
    }


def diffusers_lumina_state(state: dict[str, Tensor], config: LuminaConfig) -> dict[str, Tensor]:
    """The tensors of a Lumina transformer under Diffusers' names."""
    refiners = {"noise_refiner": config.refiner_layers, "context_refiner": config.refiner_layers}
    rows = [heads * config.head_dim for heads in (config.heads, config.kv_heads, config.kv_heads)]
    converted = {}
    for module, parts in diffusers_modules({**refiners, "layers": config.layers}):
        for kind in ("weight", "bias"):
            value = state.get(f"{module}.{kind}")
            if value is not None:
                for part, piece in zip(parts, value.split(rows) if len(parts) > 1 else (value,)):
                    converted[f"{part}.{kind}"] = piece.contiguous()
    return converted


def diffusers_hunyuan_image_config(config: HunyuanImageConfig) -> dict[str, Any]:
    """The same sizes as Diffusers' configuration says them; it has none for the hidden width of the glyphs."""
    return {
        "_class_name": "HunyuanImageTransformer2DModel",
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single,
        "num_refiner_layers": config.refiner_depth,
        "mlp_ratio": config.mlp_hidden / config.hidden_size,
        "patch_size": [config.patch_size] * 2,
        "text_embed_dim": config.text_dim,
        "text_embed_2_dim": config.glyph_dim,
        "rope_theta": config.theta,
        "rope_axes_dim": list(config.axes_dims),
    }


def diffusers_hunyuan_image_state(state: dict[str, Tensor], config: HunyuanImageConfig) -> dict[str, Tensor]:
    """The tensors of a HunyuanImage transformer under Diffusers' names."""
    counts = (config.depth, config.depth_single, config.refiner_depth)
    rows = [config.hidden_size] * 3 + [config.single_mlp_hidden]
    converted = {}
    for module, parts in HUNYUAN_IN_DIFFUSERS.modules(counts):
        for kind in ("weight", "bias"):
            value = state.get(f"{module}.{kind}")
            if value is None:
                continue
            if module == LAST_MODULATION:
                value = torch.cat(tuple(reversed(value.chunk(2))))
            for part, piece in zip(parts, value.split(rows[: len(parts)]) if len(parts) > 1 else (value,)):
                converted[f"{part}.{kind}"] = piece.contiguous()
    return converted


def diffusers_autoencoder_config(config: AutoencoderConfig) -> dict[str, Any]:
    levels = len(config.multipliers)
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [config.channels * multiplier for multiplier in config.multipliers],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": config.res_blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "scaling_factor": LATENT_SCALE,
        "shift_factor": LATENT_SHIFT,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
    }


def diffusers_autoencoder_state(state: dict[str, Tensor], config: AutoencoderConfig) -> dict[str, Tensor]:
    """The autoencoder's tensors under Diffusers' names."""
    converted = {}
    last = len(config.multipliers) - 1
    for key, value in state.items():
        name = key
        for ours, theirs in AUTOENCODER_NAMES.items():
            name = name.replace(ours, theirs)
        for level in range(last + 1):
            name = name.replace(f"encoder.down.{level}.", f"encoder.down_blocks.{level}.")
            name = name.replace(f"decoder.up.{level}.", f"decoder.up_blocks.{last - level}.")
        is_projection = ".attentions.0.to_" in name and value.dim() == 4
        converted[name] = value[:, :, 0, 0].contiguous() if is_projection else value
    return converted
