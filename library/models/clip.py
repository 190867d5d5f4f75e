"""CLIP's text encoders (transformers' model) from a single file, a part of one, or a Diffusers folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints import open_checkpoint
from library.devices import to_device
from library.errors import UserError
from library.models.lean_imports import transformers_class
from library.models.loading import Origin, Place, TensorSource, on_meta
from library.models.pipeline import OpenedTextEncoder
from library.models.recognition import CLIP_L_PREFIXES, refuse_unless

HEAD_DIM = 64
PREFIX = "text_model."
BELOW_PREFIX = ("embeddings.", "encoder.", "final_layer_norm.")  # how transformers 5 itself writes files
POSITION_IDS = "text_model.embeddings.position_ids"


class ClipTextEncoder(nn.Module):
    """CLIP's text transformer under the checkpoints' names: everything lies below ``text_model``.

    (From version 5 on, transformers leaves that level out, and LoRA names would lose it.) ``text_projection`` is the
    layer of that many outputs that the pooled text passes in SDXL's second encoder.
    """

    text_projection: nn.Linear | None

    def __init__(self, config: Any, projection_size: int | None = None):
        super().__init__()
        self.text_model = transformers_class("clip.modeling_clip", "CLIPTextModel")(config)
        self.text_projection = None
        if projection_size is not None:
            self.text_projection = nn.Linear(config.hidden_size, projection_size, bias=False)

    @property
    def config(self) -> Any:
        """transformers' configuration."""
        return self.text_model.config

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
        hidden = self.text_model(input_ids=tokens).last_hidden_state
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
        from transformers.models.clip.configuration_clip import CLIPTextConfig

        # The special ids of the configuration are unused: they come from the tokenizer.
        config = CLIPTextConfig(**self.sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0, attention_dropout=0.0)
        with on_meta():
            return ClipTextEncoder(config, self.projection_size)

    def add_buffers(self, module: ClipTextEncoder, place: Place) -> None:
        """The numbers of the positions."""
        positions = torch.arange(self.max_length, device=place(POSITION_IDS)).expand(1, -1)
        module.text_model.embeddings.register_buffer("position_ids", positions, persistent=False)


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
    ``is_projected`` asks for ``text_projection``. Raises UserError where tensors are missing or sizes don't fit.
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
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": source.sizes("text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": source.count(r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": heads,
        "max_position_embeddings": source.sizes("text_model.embeddings.position_embedding.weight", 2)[0],
        "hidden_act": exceptions.get("hidden_act", hidden_act),
    }
    return ClipFile(source, sizes, source.sizes("text_projection.weight", 2)[0] if is_projected else None)
