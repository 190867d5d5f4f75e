"""CLIP's text encoders from a single file, a part of one, or a Diffusers folder.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020. Names and
results, to the bit, are those of transformers' ``CLIPTextModel``, whose import takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.checkpoints import open_checkpoint
from library.devices import to_device
from library.errors import UserError
from library.models.loading import Origin, TensorSource, on_meta
from library.models.pipeline import OpenedTextEncoder
from library.models.recognition import CLIP_L_PREFIXES, refuse_unless

HEAD_DIM = 64
PREFIX = "text_model."
BELOW_PREFIX = ("embeddings.", "encoder.", "final_layer_norm.")  # how transformers 5 itself writes files
POSITION_IDS = "text_model.embeddings.position_ids"


def quick_gelu(states: Tensor) -> Tensor:
    """OpenAI's approximation of GELU."""
    return states * torch.sigmoid(1.702 * states)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}
"""What a ``config.json`` may call ``hidden_act``."""


@dataclass(frozen=True)
class ClipConfig:
    """The sizes of a text encoder under transformers' names."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"


class ClipStates(NamedTuple):
    """What the text transformer makes of tokens, [batch, length, hidden] each."""

    last_hidden_state: Tensor
    """Of the last layer, after the final norm."""
    hidden_states: tuple[Tensor, ...]
    """The embeddings, then the states of each layer, without the final norm."""


# LoRA networks, ours and LyCORIS, find layers by the names of classes; their order is that in which values are drawn.


class CLIPAttention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[batch, length, hidden] to the same."""
        projected = (self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states))
        query, key, value = (tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2) for tensor in projected)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=query.shape[-1] ** -0.5)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class CLIPMLP(nn.Module):
    """The feed-forward network."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[batch, length, hidden] to the same."""
        return self.fc2(self.activation(self.fc1(hidden_states)))


class CLIPEncoderLayer(nn.Module):
    """Attention and feed-forward network, each behind a norm and beside a residual connection."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[batch, length, hidden] to the same."""
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states))
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class ClipEmbeddings(nn.Module):
    """Vectors of tokens and of their positions."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[batch, length, hidden] of ``input_ids`` [batch, length]."""
        positions = torch.arange(input_ids.shape[-1], device=input_ids.device)
        return self.token_embedding(input_ids) + self.position_embedding(positions)


class ClipLayers(nn.Module):
    """The level of the names that holds the layers."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))


class ClipTextModel(nn.Module):
    """The text transformer."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.embeddings = ClipEmbeddings(config)
        self.encoder = ClipLayers(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, input_ids: Tensor) -> ClipStates:
        """The states of ``input_ids`` [batch, length]."""
        hidden_states = [self.embeddings(input_ids)]
        for layer in self.encoder.layers:
            hidden_states.append(layer(hidden_states[-1]))
        return ClipStates(self.final_layer_norm(hidden_states[-1]), tuple(hidden_states))


class ClipTextEncoder(nn.Module):
    """CLIP's text transformer under the checkpoints' names: everything lies below ``text_model``.

    ``text_projection`` is the layer of that many outputs that the pooled text passes in SDXL's second encoder.
    """

    text_projection: nn.Linear | None

    def __init__(self, config: ClipConfig, projection_size: int | None = None):
        super().__init__()
        self.config = config
        self.text_model = ClipTextModel(config)
        self.text_projection = None
        if projection_size is not None:
            self.text_projection = nn.Linear(config.hidden_size, projection_size, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.text_model.embeddings.position_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.text_model.embeddings.position_embedding.weight.device

    def block_lists(self) -> dict[str, Sequence[nn.Module]]:
        """Its layers, in the order in which they run."""
        return {"text_model.encoder.layers": list(self.text_model.encoder.layers)}

    def forward(self, tokens: Tensor, end_of_text: int) -> Tensor:
        """Pooled text [batch, hidden] of ``tokens`` [batch, length]: the final state at the first ``end_of_text``.

        Where there is a ``text_projection``, it is applied.
        """
        tokens = to_device(tokens, self.device)
        hidden = self.text_model(tokens).last_hidden_state
        ends = (tokens == end_of_text).int().argmax(dim=-1)
        pooled = hidden[torch.arange(len(tokens), device=hidden.device), ends]
        return pooled if self.text_projection is None else self.text_projection(pooled)


@dataclass(frozen=True)
class ClipFile(OpenedTextEncoder[ClipTextEncoder]):
    """An opened CLIP checkpoint, ready to be loaded."""

    source: TensorSource
    sizes: dict[str, Any]
    projection_size: int | None = None
    """Outputs of the layer that projects the pooled text, where there is one."""

    @property
    def max_length(self) -> int:
        """Tokens in one prompt, start and end included."""
        return self.sizes["max_position_embeddings"]

    def meta_module(self) -> ClipTextEncoder:
        """The module on torch's meta device: its structure without its values."""
        with on_meta():
            return ClipTextEncoder(ClipConfig(**self.sizes), self.projection_size)


def open_clip(path: Path | str, disable_mmap: bool = False, option: str = "") -> ClipFile:
    """Open a CLIP-L text encoder by its headers: a file, or a folder (with ``text_encoder/`` in it).

    Raises UserError, naming ``option`` and what the file is.
    """
    checkpoint = open_checkpoint(path, "text_encoder", disable_mmap, option)
    refuse_unless(checkpoint, {"clip-l", "clip-full"}, "a CLIP-L text encoder", CLIP_L_PREFIXES)
    source = TensorSource(checkpoint, CLIP_L_PREFIXES)
    name_below_text_model(source)
    source.drop([name for name in source.names() if not name.startswith(PREFIX)])
    return clip_file(source)


def name_below_text_model(source: TensorSource) -> None:
    """Give the names of a Hugging Face text encoder the level that some files leave out; drop the position numbers."""
    source.remap({PREFIX + name: Origin((name,)) for name in source.names() if name.startswith(BELOW_PREFIX)})
    source.drop([POSITION_IDS])


def clip_file(source: TensorSource, hidden_act: str = "quick_gelu", is_projected: bool = False) -> ClipFile:
    """A text encoder from ``source`` under Hugging Face names, with all sizes from the shapes.

    Heads are 64 wide, as in all published models, and the activation is ``hidden_act``; a model that differs says
    ``num_attention_heads`` or ``hidden_act`` in its metadata's ``config`` entry or its folder's ``config.json``.
    ``is_projected``: with ``text_projection``. Raises UserError where tensors are missing or sizes don't fit.
    """
    vocabulary, hidden = source.sizes("text_model.embeddings.token_embedding.weight", 2)
    exceptions = source.exceptions
    heads = int(exceptions.get("num_attention_heads", hidden // HEAD_DIM))
    if heads < 1 or hidden % heads:
        raise UserError(
            f"{source.checkpoint.label}: a width of {hidden} cannot be split into "
            f"{f'{heads} attention heads' if heads else f'attention heads of {HEAD_DIM}'}; a model that was made with "
            'another number says so as "num_attention_heads" in the "config" entry of its metadata.'
        )
    activation = exceptions.get("hidden_act", hidden_act)
    if activation not in ACTIVATIONS:
        known = " and ".join(f'"{name}"' for name in ACTIVATIONS)
        raise UserError(
            f'{source.checkpoint.label}: "hidden_act" in its configuration is "{activation}"; {known} are supported.'
        )
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": source.sizes("text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": source.count(r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": heads,
        "max_position_embeddings": source.sizes("text_model.embeddings.position_embedding.weight", 2)[0],
        "hidden_act": activation,
    }
    return ClipFile(source, sizes, source.sizes("text_projection.weight", 2)[0] if is_projected else None)
