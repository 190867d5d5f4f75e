"""Gemma 2 (transformers' layers) as an encoder of prompts, from a single file, a part of one, or a Diffusers folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints import open_checkpoint
from library.devices import to_device
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
from library.models.recognition import GEMMA2_PREFIXES, refuse_unless

MODULES = ("embed_tokens.", "layers.", "norm.")
HEAD_DIM = 256
SLIDING_WINDOW = 4096
ROPE_THETA = 10000.0


class Gemma2TextEncoder(LanguageModelEncoder):
    """Gemma 2 under the checkpoints' names, without logit soft-capping, as the inference programs run it.

    Its text is the state that enters the last layer. That layer and the final norm are there, because checkpoints and
    LoRA files name them, and never run.
    """

    def __init__(self, config: Any):
        super().__init__()
        layer, norm = (
            transformers_class("gemma2.modeling_gemma2", name) for name in ("Gemma2DecoderLayer", "Gemma2RMSNorm")
        )
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = norm(config.hidden_size, eps=config.rms_norm_eps)

    def block_lists(self) -> dict[str, Sequence[nn.Module]]:
        """The layers that run, in their order."""
        return {"layers": list(self.layers)[:-1]}

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The state [batch, length, hidden] of ``tokens`` [batch, length] before the last layer.

        Each token attends to itself and those before it. ``attention_mask`` [batch, length], non-zero where tokens are
        attended to, has to begin with such a one; None: everywhere. Gemma 2 was trained in bfloat16, and its states and
        products pass float16's range: with float16 weights, or inside float16's autocast, products are in bfloat16,
        and the state is float32.
        """
        tokens = to_device(tokens, self.device)
        scale = torch.tensor(self.config.hidden_size**0.5, dtype=self.dtype)  # rounded to the dtype, as in training
        states = self.embed_tokens(tokens)
        masks = self._masks(tokens, attention_mask)
        is_float16 = self.meets_float16()
        with self.bfloat16_products(is_float16):
            states = states.float() * scale.float() if is_float16 else states * scale
            rotations = rotary_embedding(tokens.shape[1], self.config.head_dim, ROPE_THETA, states)
            for layer, kind in zip(self.block_lists()["layers"], self.config.layer_types):
                states = layer(states, position_embeddings=rotations, attention_mask=masks[kind])
        return states

    def _masks(self, tokens: Tensor, attention_mask: Tensor | None) -> dict[str, Tensor | None]:
        """Which tokens attend to which [batch or 1, 1, length, length], by kind of layer; None: all those before."""
        length, window = tokens.shape[1], self.config.sliding_window
        if attention_mask is None and length <= window:
            return {"full_attention": None, "sliding_attention": None}
        position = torch.arange(length, device=tokens.device)
        distance = position[:, None] - position
        attends = (distance >= 0)[None, None]
        if attention_mask is not None:
            attends = attends & to_device(attention_mask, tokens.device).bool()[:, None, None]
        return {
            "full_attention": attends,
            "sliding_attention": attends if length <= window else attends & (distance < window),
        }


@dataclass(frozen=True)
class Gemma2File(LanguageModelFile[Gemma2TextEncoder]):
    """An opened Gemma 2 checkpoint, ready to be loaded."""

    def meta_module(self) -> Gemma2TextEncoder:
        """The module on torch's meta device: its structure without its values."""
        with on_meta():
            return Gemma2TextEncoder(gemma2_config(self.sizes))


def gemma2_config(sizes: dict[str, Any]) -> Any:
    """transformers' configuration of a model of these ``sizes``, with the attention that this encoder computes."""
    # The special ids of the configuration are unused: they come from the tokenizer.
    config = transformers_class("gemma2.configuration_gemma2", "Gemma2Config")(
        **sizes, attn_logit_softcapping=None, use_cache=False
    )
    config._attn_implementation = "sdpa"  # transformers refuses it for the class, because it has no soft-capping
    return config


def open_gemma2(path: Path | str, disable_mmap: bool = False, option: str = "") -> Gemma2File:
    """Open a Gemma 2 text encoder by its headers: a file, shards, an all-in-one file, or a folder.

    In a Diffusers folder it is in ``text_encoder/``. Heads are 256 wide, as in the 2B and 9B models, and a product of
    queries and keys is divided by the root of their width; another model says ``head_dim`` or
    ``query_pre_attn_scalar`` in its metadata's ``config`` entry or its folder's ``config.json``. Raises UserError,
    naming ``option`` and what the file is, also where sizes don't fit.
    """
    checkpoint = open_checkpoint(path, "text_encoder", disable_mmap, option)
    prefix = next((prefix for prefix in GEMMA2_PREFIXES if prefix + EMBEDDING in checkpoint), "")
    part = prefix.removesuffix("model.")  # what comes before the names that a language model is recognised by
    refuse_unless(checkpoint, {"gemma2"}, "a Gemma 2 text encoder", (part,) if part else ())
    source = TensorSource(checkpoint, (prefix,), "gemma2")
    source.drop([name for name in source.names() if not name.startswith(MODULES)])
    head_dim = configured_size(source, "head_dim", HEAD_DIM)
    sizes = {
        **inferred_sizes(source, head_dim, "Gemma 2"),
        "query_pre_attn_scalar": configured_size(source, "query_pre_attn_scalar", head_dim),
        "sliding_window": SLIDING_WINDOW,
    }
    return Gemma2File(source, sizes)
