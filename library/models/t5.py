"""T5 v1.1's encoder (transformers' model) from a single file, shards or a Diffusers folder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints import open_checkpoint
from library.devices import to_device
from library.errors import UserError
from library.lean_imports import transformers_class
from library.models.loading import Origin, TensorSource, on_meta
from library.models.pipeline import OpenedTextEncoder
from library.models.recognition import T5_PREFIXES, refuse_unless

EMBEDDING = "encoder.embed_tokens.weight"
SHARED_EMBEDDING = "shared.weight"
GATE = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"


def _stack_class() -> Any:
    """transformers' class without its look at all ways to run a mixture of experts, which are imported for it."""
    stack = transformers_class("t5.modeling_t5", "T5Stack")
    return type(stack.__name__, (stack,), {"get_correct_experts_implementation": lambda self, requested: "eager"})


class T5TextEncoder(nn.Module):
    """T5's encoder under the checkpoints' names, with one embedding table (``encoder.embed_tokens``)."""

    def __init__(self, config: Any):
        super().__init__()
        self.encoder = _stack_class()(config)

    @property
    def config(self) -> Any:
        """transformers' configuration."""
        return self.encoder.config

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.encoder.final_layer_norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encoder.final_layer_norm.weight.device

    def block_lists(self) -> dict[str, Sequence[nn.Module]]:
        """Its layers, in the order in which they run."""
        return {"encoder.block": list(self.encoder.block)}

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The last hidden state [batch, length, width] of ``tokens`` [batch, length].

        ``attention_mask`` [batch, length], non-zero where tokens are attended to; None: everywhere.
        """
        mask = None if attention_mask is None else to_device(attention_mask, self.device)
        # Under autocast the feed-forward's last product would be in float16, too, and pass its range.
        with torch.autocast(self.device.type, enabled=False) if self.dtype == torch.float16 else nullcontext():
            return self.encoder(input_ids=to_device(tokens, self.device), attention_mask=mask).last_hidden_state


@dataclass(frozen=True)
class T5File(OpenedTextEncoder[T5TextEncoder]):
    """An opened T5 checkpoint, ready to be loaded."""

    source: TensorSource
    sizes: dict[str, Any]

    @property
    def hidden_size(self) -> int:
        """Width of the states."""
        return self.sizes["d_model"]

    def meta_module(self) -> T5TextEncoder:
        """The module on torch's meta device: its structure without its values."""
        config = transformers_class("t5.configuration_t5", "T5Config")(
            **self.sizes,
            feed_forward_proj="gated-gelu",
            layer_norm_epsilon=1e-6,
            dropout_rate=0.0,  # only ever used as an encoder of prompts, which must not change from step to step
            use_cache=False,
            is_encoder_decoder=False,
        )
        with on_meta():
            return T5TextEncoder(config)

    def kept_in_float32(self, compute: torch.dtype | None) -> tuple[str, ...]:
        """In float16 the feed-forward's last matrix, as in transformers: its products pass float16's range."""
        return (".wo.weight",) if compute == torch.float16 else ()


def open_t5(path: Path | str, disable_mmap: bool = False, option: str = "") -> T5File:
    """Open a T5 v1.1 encoder by its headers: a file, shards, or a folder.

    In a Diffusers folder it is in ``text_encoder_2/``, of Chroma in ``text_encoder/``. Raises UserError, naming
    ``option`` and what the file is.
    """
    is_second = (Path(path) / "text_encoder_2").is_dir()
    checkpoint = open_checkpoint(path, "text_encoder_2" if is_second else "text_encoder", disable_mmap, option)
    refuse_unless(checkpoint, {"t5", "t5-full"}, "a T5 v1.1 text encoder", T5_PREFIXES)
    source = TensorSource(checkpoint, T5_PREFIXES)
    if GATE not in source:
        raise UserError(f"{checkpoint.label} is a T5 v1.0 text encoder; T5 v1.1 (t5xxl) is needed here.")
    return opened_encoder(source)


def opened_encoder(source: TensorSource) -> T5File:
    """The T5 v1.1 encoder whose tensors ``source`` has, its sizes inferred from their shapes. Raises UserError."""
    if EMBEDDING not in source:
        source.remap({EMBEDDING: Origin((SHARED_EMBEDDING,))})
    source.drop([name for name in source.names() if not name.startswith("encoder.")])
    buckets, heads = source.sizes("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 2)
    vocabulary, width = source.sizes(EMBEDDING, 2)
    sizes = {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": source.sizes("encoder.block.0.layer.0.SelfAttention.q.weight", 2)[0] // heads,
        "d_ff": source.sizes(GATE, 2)[0],
        "num_layers": source.count(r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": int(source.exceptions.get("relative_attention_max_distance", 128)),
    }
    return T5File(source, sizes)
