"""Texts of images: weights, ``BREAK``, added words, and as many chunks of 75 tokens as an image's texts need.

Training reads captions and the prompts of its samples by ``text.py``. The texts of images differ in three points:
weights are always read, ``BREAK`` begins a new chunk, and the outputs of n chunks are joined whole, each with its start
and its end, to ``77 n`` positions. Up to 75 tokens without weights, the two are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from library.devices import to_device
from library.models.stable_diffusion.added_words import AddedWords
from library.models.stable_diffusion.prompt_weights import parts_between_breaks
from library.models.stable_diffusion.text import CHUNK, Tokens, split_into_chunks

if TYPE_CHECKING:
    from library.models.tokenizer_files import Tokenizer

WeightNormalization = Literal["original", "abs", "none"]
"""What is done to a weighted text: it gets the mean that it had without weights, the mean of its absolute values, or
nothing."""


@dataclass(frozen=True)
class ImageTexts:
    """How the texts of images are read."""

    max_chunks: int = 1
    """Chunks of 75 tokens that a text may have."""
    normalization: WeightNormalization = "original"


@dataclass(frozen=True)
class Chunk:
    """Up to 75 tokens of a text, without start and end, and the weight of each."""

    ids: list[int]
    weights: list[float]


def image_chunks(tokenizer: Tokenizer, text: str, words: AddedWords | None = None) -> list[Chunk]:
    """The whole ``text`` in chunks, at least one; its parts between the words ``BREAK`` begin chunks of their own.

    A part without tokens begins none, so that a ``BREAK`` where a chunk ends, or at an end of the text, adds nothing.
    """
    words = words or AddedWords(0)
    chunks: list[Chunk] = []
    for part in parts_between_breaks(text):
        ids: list[int] = []
        weights: list[float] = []
        for piece, weight in part:
            tokens = words.tokens(tokenizer, piece)
            ids += tokens
            weights += [weight] * len(tokens)
        chunks += [Chunk(ids[i : i + CHUNK], weights[i : i + CHUNK]) for i in range(0, len(ids), CHUNK)]
    return chunks or [Chunk([], [])]


def image_tokens(tokenizer: Tokenizer, text: Sequence[Chunk], chunks: int) -> Tokens:
    """A ``text`` as a batch of one, cut or padded to ``chunks`` chunks. Without weights where all of them are 1."""
    text = [*text, *[Chunk([], [])] * (chunks - len(text))][:chunks]
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = [split_into_chunks(chunk.ids, 1, start, end, pad)[0] for chunk in text]
    weights = [split_into_chunks(chunk.weights, 1, 1.0, 1.0, 1.0)[0] for chunk in text]
    is_weighted = any(weight != 1 for row in weights for weight in row)
    return Tokens(torch.tensor([ids]), torch.tensor([weights]) if is_weighted else None)


def whole_chunks(states: Tensor, tokens: Tokens, normalization: WeightNormalization) -> Tensor:
    """States [batch, chunks, 77, hidden] as [batch, 77 chunks, hidden], multiplied by the weights and normalized."""
    joined = states.flatten(1, 2)
    if tokens.weights is None:
        return joined
    weights = to_device(tokens.weights.flatten(1, 2), joined.device, joined.dtype)
    return normalized(joined * weights[..., None], joined, normalization)


def normalized(weighted: Tensor, plain: Tensor, normalization: WeightNormalization) -> Tensor:
    """``weighted`` [batch, positions, hidden], scaled so that each text has the mean of ``plain``.

    ``abs`` compares the means of absolute values, ``none`` does nothing. A text whose mean is 0 is not scaled.
    """
    if normalization == "none":
        return weighted
    before, after = (
        (states.float().abs() if normalization == "abs" else states.float()).mean(dim=(1, 2), keepdim=True)
        for states in (plain, weighted)
    )
    return weighted * torch.where(after == 0, 1, before / after).to(weighted.dtype)
