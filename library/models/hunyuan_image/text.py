"""Prompts to conditioning: the states of Qwen2.5-VL, and those of the glyph ByT5 for texts that a prompt quotes.

Conditioning is a dictionary of tensors, batch first: ``vlm_embed`` [B, L, 3584] and ``vlm_mask`` [B, L] of the prompt;
``byt5_embed`` [B, 128, 1472] and ``byt5_mask`` [B, 128] of the quoted texts, and ``ocr_mask`` [B], whether there are
any. Masks are 1 where a token stands, and states are zero elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.models.byt5 import byt5_tokens

if TYPE_CHECKING:
    from library.models.qwen2_5_vl import Qwen25VLTextEncoder
    from library.models.t5 import T5TextEncoder
    from library.models.tokenizer_files import Tokenizer

TEXT_LENGTH = 1000
GLYPH_LENGTH = 128
BEFORE_PROMPT = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
AFTER_PROMPT = "<|im_end|>"
QUOTES = tuple(re.compile(pattern) for pattern in ('"(.*?)"', "‘(.*?)’", "“(.*?)”"))
"""The quotation marks around a text that is to stand in the image; never around more than one line."""


def quoted_texts(prompt: str) -> list[str]:
    """The texts that ``prompt`` quotes: those in "…", then those in ‘…’, then those in “…”."""
    return [text for quotes in QUOTES for text in quotes.findall(prompt)]


def glyph_text(prompt: str) -> str | None:
    """What the glyph encoder reads of ``prompt``; None where nothing is quoted."""
    return "".join(f'Text "{text}". ' for text in quoted_texts(prompt)) or None


@dataclass(frozen=True)
class QwenTokens:
    """Prompts inside their template, as tokens on the CPU."""

    ids: Tensor
    """[B, n] int64, padded on the right to the longest prompt."""
    mask: Tensor
    """[B, n] int64, 1 where a token stands."""
    crop: int
    """How many tokens come before the user's text: 34 with Qwen2.5's vocabulary."""


def qwen_tokens(tokenizer: Tokenizer, prompts: Sequence[str], length: int = TEXT_LENGTH) -> QwenTokens:
    """The tokens of ``prompts``, each cut to ``length`` behind the template's beginning, its end included."""
    crop = len(tokenizer(BEFORE_PROMPT).input_ids)
    texts = [BEFORE_PROMPT + prompt + AFTER_PROMPT for prompt in prompts]
    tokens = tokenizer(texts, max_length=crop + length, padding="longest", truncation=True, return_tensors="pt")
    return QwenTokens(tokens.input_ids, tokens.attention_mask, crop)


@torch.no_grad()
def encode_qwen(encoder: Qwen25VLTextEncoder, tokens: QwenTokens) -> dict[str, Tensor]:
    """``vlm_embed``, on the encoder's device, and ``vlm_mask``, on the CPU, without the template's beginning."""
    states, mask = encoder(tokens.ids)[:, tokens.crop :], tokens.mask[:, tokens.crop :]
    return {"vlm_embed": states.masked_fill(_absent(mask, states), 0), "vlm_mask": mask}


@torch.no_grad()
def encode_glyphs(encoder: T5TextEncoder, prompts: Sequence[str], length: int = GLYPH_LENGTH) -> dict[str, Tensor]:
    """``byt5_embed``, on the encoder's device, ``byt5_mask`` and ``ocr_mask`` (bool), on the CPU.

    All of them are zero for a prompt that quotes nothing; the encoder does not run unless one does.
    """
    texts = [glyph_text(prompt) for prompt in prompts]
    quoting = [row for row, text in enumerate(texts) if text is not None]
    width = encoder.config.d_model
    embed = torch.zeros(len(texts), length, width, dtype=encoder.dtype, device=encoder.device)
    mask = torch.zeros(len(texts), length, dtype=torch.int64)
    if quoting:
        tokens = byt5_tokens([text for text in texts if text is not None], length)
        states, count = encoder(tokens["input_ids"], tokens["attention_mask"]), tokens["input_ids"].shape[1]
        mask[quoting, :count] = tokens["attention_mask"]
        states = states.masked_fill(_absent(tokens["attention_mask"], states), 0).to(embed.dtype)
        embed[quoting, :count] = states
    ocr_mask = torch.tensor([text is not None for text in texts])
    return {"byt5_embed": embed, "byt5_mask": mask, "ocr_mask": ocr_mask}


def _absent(mask: Tensor, states: Tensor) -> Tensor:
    """Where no token stands, as [B, L, 1] on the device of ``states``."""
    return (mask == 0)[..., None].to(states.device)
