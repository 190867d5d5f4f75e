"""Prompts to Stable Diffusion's conditioning: token chunks, weights of words, and what CLIP makes of them.

A prompt of up to ``75 n`` tokens is cut into n chunks, each with a start and an end of text of its own, so that CLIP
can read them; their outputs are joined to ``75 n + 2`` positions, as in kohya-ss/sd-scripts.

``image_text.py`` has what ``gen_img.py`` does otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.devices import to_device
from library.errors import UserError
from library.models.stable_diffusion.prompt_weights import parse_prompt_weights

if TYPE_CHECKING:
    from library.models.clip import ClipTextEncoder
    from library.models.tokenizer_files import Tokenizer

CHUNK = 75
"""Text tokens in one chunk, between its start and its end."""


@dataclass(frozen=True)
class Tokens:
    """Token chunks of prompts. ``ids`` and ``weights`` (None: all are 1) are [batch, chunks, 77]."""

    ids: Tensor
    weights: Tensor | None = None


Join = Callable[[Tensor, Tokens], Tensor]
"""Makes states [batch, chunks, 77, hidden] of tokens one sequence, weighted [batch, positions, hidden]."""


def chunk_count(max_token_length: int | None) -> int:
    """Chunks for ``--max_token_length``: 75 (None), 150, 225 or any other multiple of 75. Raises UserError."""
    chunks, rest = divmod(CHUNK if max_token_length is None else max_token_length, CHUNK)
    if rest or chunks < 1:
        raise UserError(f"--max_token_length must be 75, 150 or 225, not {max_token_length}.")
    return chunks


def tokenize(tokenizer: Tokenizer, prompts: Sequence[str], chunks: int = 1, weighted: bool = False) -> Tokens:
    """The prompts as token chunks, cut or padded. ``weighted`` reads ``(words:1.2)`` and ``[words]`` in them."""
    rows = [text_tokens(tokenizer, prompt, weighted) for prompt in prompts]
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = torch.tensor([split_into_chunks(row, chunks, start, end, pad) for row, _ in rows])
    weights = [split_into_chunks(row, chunks, 1.0, 1.0, 1.0) for _, row in rows]
    return Tokens(ids, torch.tensor(weights) if weighted else None)


def text_tokens(tokenizer: Tokenizer, prompt: str, weighted: bool = False) -> tuple[list[int], list[float]]:
    """Token ids of a whole prompt, without start and end of text, and the weight of each."""
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in parse_prompt_weights(prompt) if weighted else [(prompt, 1.0)]:
        piece = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        ids += piece
        weights += [weight] * len(piece)
    return ids, weights


def split_into_chunks(row: Sequence[float], chunks: int, start: float, end: float, pad: float) -> list[list[float]]:
    """``chunks`` rows of 77: ``start``, up to 75 values of ``row``, ``end``, and ``pad`` up to the length."""
    pieces = [list(row[CHUNK * index : CHUNK * (index + 1)]) for index in range(chunks)]
    return [[start, *piece, end, *[pad] * (CHUNK - len(piece))] for piece in pieces]


def join_chunks(states: Tensor) -> Tensor:
    """[batch, chunks, 77, ...] to [batch, 75 chunks + 2, ...]: the first start, all inner positions, the last end."""
    return torch.cat((states[:, 0, :1], states[:, :, 1:-1].flatten(1, 2), states[:, -1, -1:]), dim=1)


def weighted_and_joined(states: Tensor, tokens: Tokens) -> Tensor:
    """States [batch, chunks, 77, hidden] as [batch, 75 chunks + 2, hidden], multiplied by the weights."""
    joined = join_chunks(states)
    if tokens.weights is None:
        return joined
    return joined * to_device(join_chunks(tokens.weights), joined.device, joined.dtype)[..., None]


def encode(
    encoder: ClipTextEncoder, tokens: Tokens, clip_skip: int | None = None, join: Join = weighted_and_joined
) -> Tensor:
    """States [batch, positions, hidden] as Stable Diffusion 1.x and 2.x take them.

    They are those of layer ``clip_skip`` from the end (1, which is also None: the last), after the final norm.
    """
    hidden_states, last = _run(encoder, tokens)
    if clip_skip is not None:
        last = encoder.text_model.final_layer_norm(hidden_states[-clip_skip])
    return join(last.unflatten(0, tokens.ids.shape[:2]), tokens)


def encode_for_xl(
    encoder: ClipTextEncoder, tokens: Tokens, end_of_text: int, layer: int = 2, join: Join = weighted_and_joined
) -> tuple[Tensor, Tensor | None]:
    """States [batch, positions, hidden] as XL takes them: of that ``layer`` from the end, without the final norm.

    The second is the pooled text [batch, projection] of an encoder with a ``text_projection``: the final state at the
    first ``end_of_text`` of the first chunk, projected, never weighted. (Added tokens have ids above the end token's;
    a search for the largest id would pool at them.)
    """
    hidden_states, last = _run(encoder, tokens)
    pooled = None
    if encoder.text_projection is not None:
        ends = to_device((tokens.ids[:, 0] == end_of_text).int().argmax(dim=-1), last.device)
        first_chunks = last.unflatten(0, tokens.ids.shape[:2])[:, 0]
        pooled = encoder.text_projection(first_chunks[torch.arange(len(ends), device=last.device), ends])
    return join(hidden_states[-layer].unflatten(0, tokens.ids.shape[:2]), tokens), pooled


def require_clip_skip(clip_skip: int | None, layers: int) -> None:
    """Raise UserError when a text encoder of that many ``layers`` has no such layer from the end."""
    if clip_skip is not None and not 1 <= clip_skip <= layers:
        raise UserError(f"--clip_skip must be between 1 and {layers}, the layers of the text encoder, not {clip_skip}.")


def _run(encoder: ClipTextEncoder, tokens: Tokens) -> tuple[tuple[Tensor, ...], Tensor]:
    """All layers' states and the last one after the final norm, [batch * chunks, 77, hidden] each."""
    ids = to_device(tokens.ids.flatten(0, 1), encoder.device)
    states = encoder.text_model(ids)
    return states.hidden_states, states.last_hidden_state
