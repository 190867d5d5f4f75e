"""Prompts to conditioning: a pooled vector from CLIP-L (FLUX.1 alone) and a sequence of states from T5.

Conditioning is a dictionary of tensors, batch first: ``l_pooled`` [B, 768], ``t5_out`` [B, L, 4096], ``txt_ids``
[B, L, 3] (all zero) and ``t5_attn_mask`` [B, L] (1 where the prompt and its end token stand).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from library.models.clip import ClipTextEncoder
    from library.models.t5 import T5TextEncoder
    from library.models.tokenizer_files import Tokenizer

T5_LENGTH = {"schnell": 256, "dev": 512, "chroma": 512}


def clip_tokens(tokenizer: Tokenizer, prompts: Sequence[str], length: int) -> dict[str, Tensor]:
    """Token ids of ``prompts`` for CLIP, cut or padded: ``l_tokens`` [B, length]."""
    return {"l_tokens": _tokenize(tokenizer, prompts, length).input_ids}


def t5_tokens(tokenizer: Tokenizer, prompts: Sequence[str], length: int) -> dict[str, Tensor]:
    """Token ids of ``prompts`` for T5, cut or padded: ``t5_tokens`` and ``t5_attn_mask``, both [B, length]."""
    tokens = _tokenize(tokenizer, prompts, length)
    return {"t5_tokens": tokens.input_ids, "t5_attn_mask": tokens.attention_mask}


def _tokenize(tokenizer: Tokenizer, prompts: Sequence[str], length: int) -> Any:
    return tokenizer(list(prompts), max_length=length, padding="max_length", truncation=True, return_tensors="pt")


def encode_clip(
    encoder: ClipTextEncoder, tokens: Mapping[str, Tensor], end_of_text: int, with_gradients: bool = False
) -> dict[str, Tensor]:
    """``l_pooled`` of ``tokens`` (from ``clip_tokens``)."""
    with torch.set_grad_enabled(with_gradients):
        return {"l_pooled": encoder(tokens["l_tokens"], end_of_text)}


def encode_t5(
    encoder: T5TextEncoder, tokens: Mapping[str, Tensor], apply_attention_mask: bool, with_gradients: bool = False
) -> dict[str, Tensor]:
    """``t5_out``, ``txt_ids`` and ``t5_attn_mask`` of ``tokens`` (from ``t5_tokens``).

    Ids and mask stay where the mask is. Without ``apply_attention_mask`` T5 also attends to padding, as FLUX.1 was
    trained.
    """
    mask = tokens["t5_attn_mask"]
    with torch.set_grad_enabled(with_gradients):
        states = encoder(tokens["t5_tokens"], mask if apply_attention_mask else None)
    return {"t5_out": states, "txt_ids": torch.zeros(*mask.shape, 3, device=mask.device), "t5_attn_mask": mask}


def attended_text(conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``conditioning`` of Chroma without the padding that no item of the batch attends to.

    Nothing changes in what comes out: most captions are short, and their 512 tokens would cost time.
    """
    mask = conditioning["t5_attn_mask"]
    if isinstance(mask, FakeTensor):  # a simulation has no values; it stands for the longest caption
        return dict(conditioning)
    length = min(int(mask.bool().sum(dim=1).max()) + 1, mask.shape[1])  # the first padding token is attended to
    return {name: conditioning[name][:, :length] for name in ("t5_out", "txt_ids", "t5_attn_mask")}
