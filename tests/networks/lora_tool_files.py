"""LoRA files for the tests of the tools, written and read with the safetensors library alone."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

# The shapes [out, in] or [out, in, kh, kw] of a few layers of a Stable Diffusion 1.x U-Net and text encoder.
SD_LAYERS = {
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (20, 12),
    "lora_unet_down_blocks_0_attentions_1_proj_in": (16, 16, 1, 1),
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": (16, 16),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2": (16, 24),
    "lora_unet_up_blocks_3_resnets_1_conv1": (16, 10, 3, 3),
}
SDXL_LAYERS = {
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (20, 12),
    "lora_te2_text_model_encoder_layers_0_self_attn_q_proj": (14, 14),
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (16, 16),
    "lora_unet_middle_block_1_proj_in": (16, 16),
    "lora_unet_output_blocks_2_1_transformer_blocks_1_ff_net_2": (16, 24),
    "lora_unet_input_blocks_1_0_in_layers_2": (16, 10, 3, 3),
}
KEYS = {
    "kohya": ("lora_down.weight", "lora_up.weight"),
    "peft": ("lora_A.weight", "lora_B.weight"),
    "plain": ("down.weight", "up.weight"),
    "control": ("down", "up"),
}
DESCRIBED = {"ss_network_module": "networks.lora", "ss_base_model_version": "sd_v1", "ss_v2": "False"}


def write_lora(
    path: Path,
    layers: Mapping[str, tuple[int, ...]] = SD_LAYERS,
    rank: int = 4,
    alpha: float | None = 2.0,
    seed: int = 0,
    conv_rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    form: str = "kohya",
    metadata: Mapping[str, str] | None = DESCRIBED,
) -> Path:
    """A file with a module for each layer; ``alpha`` None leaves alphas out."""
    generator = torch.Generator().manual_seed(seed)
    down_key, up_key = KEYS[form]
    tensors: dict[str, Tensor] = {}
    for name, (out, *rest) in layers.items():
        own = conv_rank if conv_rank is not None and rest[1:] == [3, 3] else rank
        tensors[f"{name}.{down_key}"] = torch.randn(own, *rest, generator=generator).to(dtype)
        up = torch.randn(out, own, *(1 for _ in rest[1:]), generator=generator) * 0.1
        tensors[f"{name}.{up_key}"] = up.to(dtype)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
    save_file(tensors, path, dict(metadata) if metadata else None)
    return path


def deltas(path: Path, form: str = "kohya") -> dict[str, Tensor]:
    """What each module of a file adds to its layer, [out, in * kernel] in float64."""
    tensors = {key: tensor.double() for key, tensor in load_file(path).items()}
    down_key, up_key = KEYS[form]
    found = {}
    for key, down in tensors.items():
        name, dot, _ = key.partition(f".{down_key}")
        if dot:
            up, rank = tensors[f"{name}.{up_key}"], len(down)
            scale = tensors.get(f"{name}.alpha", torch.tensor(float(rank), dtype=torch.float64)) / rank
            found[name] = scale * up.reshape(len(up), rank) @ down.reshape(rank, -1)
    return found


def ranks(path: Path, form: str = "kohya") -> dict[str, int]:
    """The rank of each module of a file."""
    suffix = f".{KEYS[form][0]}"
    return {key.removesuffix(suffix): len(tensor) for key, tensor in load_file(path).items() if key.endswith(suffix)}


def metadata(path: Path) -> dict[str, str]:
    """The metadata of a file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def independent_hashes(path: Path) -> tuple[str, str]:
    """As other programs compute them, from the file's bytes; the second is of nothing in a file below 1 MiB."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert len(data) < 1 << 20
    return hashlib.sha256(data[8 + length :]).hexdigest(), hashlib.sha256(b"").hexdigest()[:8]


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float) -> None:
    """Both hold the same modules, equal up to ``tolerance`` of each one's norm."""
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm(), name


def run(main: Any, *arguments: object) -> None:
    """A tool's ``main`` with these words of a command line."""
    main([str(argument) for argument in arguments])
