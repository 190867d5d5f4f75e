"""What text encoders that are made of a language model share: positions, float16's range, sizes of heads."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.models.loading import TensorSource
from library.models.pipeline import Module, OpenedTextEncoder

EMBEDDING = "embed_tokens.weight"
ADVICE = 'a model with heads of another width says so as "head_dim" in the "config" entry of its metadata'


class LanguageModelEncoder(nn.Module):
    """A language model under the checkpoints' names whose states are a prompt's encoding."""

    embed_tokens: nn.Embedding

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.weight.device

    def meets_float16(self) -> bool:
        """Whether weights or products would be in float16, now.

        These models were trained in bfloat16, and their states and products pass float16's range: states are then
        kept in float32 and products are in bfloat16 (``bfloat16_products``).
        """
        device = self.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return torch.float16 in (self.dtype, autocast)

    def bfloat16_products(self, enabled: bool) -> torch.autocast | nullcontext[None]:
        """A context in which products are in bfloat16 if ``enabled``."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if enabled else nullcontext()


def rotary_embedding(length: int, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1, length, head_dim] of the positions, on the device and in the dtype of ``like``."""
    exponents = torch.arange(0, head_dim, 2, device=like.device, dtype=torch.float32) / head_dim
    angles = torch.arange(length, device=like.device, dtype=torch.float32)[:, None] / theta**exponents
    angles = torch.cat((angles, angles), dim=-1)[None]
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def inferred_sizes(source: TensorSource, head_dim: int, model: str) -> dict[str, Any]:
    """transformers' names of the sizes of a language model with heads of ``head_dim``, from its tensors' shapes.

    Raises UserError, naming ``model`` ("Gemma 2"), where sizes don't fit.
    """
    vocabulary, hidden = source.sizes(EMBEDDING, 2)
    heads, shared = (_heads(source, projection, head_dim) for projection in "qk")
    if hidden % heads or heads % shared or head_dim % 2:
        raise UserError(
            f"{source.checkpoint.label}: a width of {hidden} with {heads} heads of queries and {shared} of keys, each "
            f"{head_dim} wide, is no {model}; {ADVICE}."
        )
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": source.sizes("layers.0.mlp.gate_proj.weight", 2)[0],
        "num_hidden_layers": source.count(r"layers\.(\d+)\."),
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": head_dim,
    }


def _heads(source: TensorSource, projection: str, head_dim: int) -> int:
    rows = source.sizes(f"layers.0.self_attn.{projection}_proj.weight", 2)[0]
    if rows % head_dim:
        raise UserError(
            f"{source.checkpoint.label}: the {rows} rows of {projection}_proj cannot be split into heads of "
            f"{head_dim}; {ADVICE}."
        )
    return rows // head_dim


@dataclass(frozen=True)
class LanguageModelFile(OpenedTextEncoder[Module]):
    """An opened checkpoint of a language model, ready to be loaded."""

    source: TensorSource
    sizes: dict[str, Any]


def configured_size(source: TensorSource, name: str, default: int) -> int:
    """A whole number above 0 from the file's exceptions. Raises UserError for anything else under that name."""
    value = source.exceptions.get(name, default)
    if not isinstance(value, int) or value < 1:
        raise UserError(f'{source.checkpoint.label}: "{name}" in its configuration is {value!r}, not a whole number.')
    return value
