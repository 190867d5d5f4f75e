"""Qwen2.5-VL's first language layers as an encoder of prompts, from a single file, a part of one, or a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.checkpoints import open_checkpoint
from library.devices import to_device
from library.errors import UserError
from library.lean_imports import transformers_class
from library.models.language_model import (
    EMBEDDING,
    LanguageModelEncoder,
    LanguageModelFile,
    configured_size,
    inferred_sizes,
    rotary_embedding,
)
from library.models.loading import TensorSource, on_meta
from library.models.recognition import QWEN2_5_VL_PREFIXES, refuse_unless

HEAD_DIM = 128
ROPE_THETA = 1_000_000.0
UNUSED_LAYERS = 2
"""The last layers of a file, whose output nothing reads: states are ``hidden_states[-3]`` of the whole model."""


class Qwen25VLTextEncoder(LanguageModelEncoder):
    """The token embedding and the first layers of Qwen2.5-VL: what a prompt's states take, and no more."""

    def __init__(self, config: Any):
        super().__init__()
        layer = transformers_class("qwen2.modeling_qwen2", "Qwen2DecoderLayer")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layer(config, index) for index in range(config.num_hidden_layers))

    def block_lists(self) -> dict[str, Sequence[nn.Module]]:
        """The layers, in the order in which they run."""
        return {"layers": list(self.layers)}

    def forward(self, tokens: Tensor) -> Tensor:
        """The state [batch, length, hidden] of ``tokens`` [batch, length] after the last layer, without a norm.

        Each token attends to itself and those before it, so padding behind a prompt changes nothing of it. Of a text,
        all three of the model's position axes are its index: an ordinary rotary embedding. With float16 weights, or
        inside float16's autocast, products are in bfloat16 and the state is float32 (see ``meets_float16``).
        """
        states = self.embed_tokens(to_device(tokens, self.device))
        is_float16 = self.meets_float16()
        with self.bfloat16_products(is_float16):
            states = states.float() if is_float16 else states
            rotations = rotary_embedding(tokens.shape[1], self.config.head_dim, ROPE_THETA, states)
            for layer in self.layers:
                states = layer(states, position_embeddings=rotations)
        return states


@dataclass(frozen=True)
class Qwen25VLFile(LanguageModelFile[Qwen25VLTextEncoder]):
    """An opened Qwen2.5-VL checkpoint, ready to be loaded."""

    def meta_module(self) -> Qwen25VLTextEncoder:
        """The module on torch's meta device: its structure without its values."""
        with on_meta():
            return Qwen25VLTextEncoder(qwen2_5_vl_config(self.sizes))


def qwen2_5_vl_config(sizes: dict[str, Any]) -> Any:
    """transformers' configuration of language layers of these ``sizes``."""
    config = transformers_class("qwen2.configuration_qwen2", "Qwen2Config")(**sizes, rms_norm_eps=1e-6, use_cache=False)
    config._attn_implementation = "sdpa"
    return config


def open_qwen2_5_vl(path: Path | str, disable_mmap: bool = False, option: str = "") -> Qwen25VLFile:
    """Open a Qwen2.5-VL text encoder by its headers: a file, shards, an all-in-one file, or a folder.

    In a Diffusers folder it is in ``text_encoder/``. The vision tower, the head, the final norm and the last two
    layers are left out. Heads are 128 wide; another model says ``head_dim`` in its metadata's ``config`` entry, or
    ``num_attention_heads`` in its folder's ``config.json``. Raises UserError, naming ``option`` and what the file is,
    also where sizes don't fit.
    """
    checkpoint = open_checkpoint(path, "text_encoder", disable_mmap, option)
    prefix = next((prefix for prefix in QWEN2_5_VL_PREFIXES if prefix + EMBEDDING in checkpoint), "")
    part = prefix.removesuffix("model.") if prefix.endswith("transformer.model.") else ""
    refuse_unless(checkpoint, {"qwen2.5-vl"}, "a Qwen2.5-VL text encoder", (part,) if part else ())
    source = TensorSource(checkpoint, (prefix,), "qwen2_5_vl")
    layers = source.count(r"layers\.(\d+)\.") - UNUSED_LAYERS
    if layers < 1:
        raise UserError(
            f"{checkpoint.label} has too few layers ({layers + UNUSED_LAYERS}): what a prompt becomes is the output of "
            "the third from last."
        )
    kept = ("embed_tokens.", *(f"layers.{index}." for index in range(layers)))
    source.drop([name for name in source.names() if not name.startswith(kept)])
    return Qwen25VLFile(source, inferred_sizes(source, _head_dim(source), "Qwen2.5-VL"))


def _head_dim(source: TensorSource) -> int:
    """The width of heads, which in a model's own ``config.json`` follows from their number."""
    text = source.exceptions.get("text_config", source.exceptions)
    if isinstance(text, dict) and str(text.get("model_type")).startswith("qwen2_5_vl") and "head_dim" not in text:
        heads = text.get("num_attention_heads")
        if isinstance(heads, int) and heads > 0:
            return source.sizes(EMBEDDING, 2)[1] // heads
    return configured_size(source, "head_dim", HEAD_DIM)
