"""Prompts to conditioning: the states of Gemma 2.

Conditioning is a dictionary of tensors, batch first: ``hidden_state`` [B, L, hidden], ``attention_mask`` [B, L] (1
where the prompt stands) and ``input_ids`` [B, L].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from library.models.gemma2 import Gemma2TextEncoder
    from library.models.tokenizer_files import Tokenizer

TEXT_LENGTH = 256


def with_system_prompt(prompt: str, system_prompt: str) -> str:
    """``prompt`` behind the instruction that Lumina Image 2.0 was trained with; alone if that is empty."""
    return f"{system_prompt} <Prompt Start> {prompt}" if system_prompt else prompt


def gemma_tokens(tokenizer: Tokenizer, prompts: Sequence[str], length: int) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, both [B, length] int64, of ``prompts``, cut or padded on the right.

    The beginning-of-text token stands first, and no token ends a prompt.
    """
    tokens = tokenizer(list(prompts), max_length=length, padding="max_length", truncation=True, return_tensors="pt")
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}


def encode_gemma(
    encoder: Gemma2TextEncoder, tokens: Mapping[str, Tensor], with_gradients: bool = False
) -> dict[str, Tensor]:
    """``hidden_state`` of ``tokens`` (from ``gemma_tokens``) beside them; they stay where they are."""
    with torch.set_grad_enabled(with_gradients):
        states = encoder(tokens["input_ids"], tokens["attention_mask"])
    return {"hidden_state": states, "attention_mask": tokens["attention_mask"], "input_ids": tokens["input_ids"]}
