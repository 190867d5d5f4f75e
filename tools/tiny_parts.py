"""What the tiny models share: random weights, the words of their tokenizers, and a CLIP tokenizer."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.files import write_text
from library.models.clip import ClipConfig
from library.models.tokenizer_files import byte_characters
from library.randomness import generator

WORDS = "a the of on and big small red green blue yellow purple black white circle square ring cat dog photo background"
"""What the tiny tokenizers know in one piece."""


def fill_randomly(module: nn.Module, seed: int, purpose: str) -> None:
    """Give each parameter values that depend on the seed and its name only: activations stay near unit variance.

    A module on torch's meta device (``on_meta`` builds it in half of the time), without buffers, comes to the CPU.
    """
    if any(parameter.is_meta for parameter in module.parameters()):
        module._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))  # to_empty imports SymPy
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator(seed, purpose, name))
        is_norm_weight = parameter.dim() == 1 and not name.endswith("bias")
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
        parameter.data = 1 + 0.1 * values if is_norm_weight else values / fan_in**0.5
        parameter.requires_grad_(False)


def transformers_clip_config(
    config: ClipConfig, projection: int | None = None, pads_with_end: bool = True
) -> dict[str, Any]:
    """What transformers' ``config.json`` says of a text encoder whose tokenizer is ``write_clip_tokenizer``'s."""
    end = config.vocab_size - 1
    return {
        "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        **asdict(config),
        "projection_dim": projection or config.hidden_size,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end if pads_with_end else 0,
    }


def write_clip_tokenizer(folder: Path, pad_token: str = "<|endoftext|>") -> int:
    """A byte-level BPE without merges, as vocab.json and merges.txt; returns its number of entries."""
    folder.mkdir(parents=True, exist_ok=True)
    characters = byte_characters()
    entries = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    write_text(folder / "vocab.json", json.dumps({entry: index for index, entry in enumerate(entries)}))
    write_text(folder / "merges.txt", "#version: 0.2\n")
    write_text(
        folder / "tokenizer_config.json",
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad_token}),
    )
    return len(entries)
