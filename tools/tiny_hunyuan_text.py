"""A tiny Qwen2.5-VL and a tiny glyph ByT5 with random weights, in the layouts of the real files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.files import write_text
from library.lean_imports import transformers_class
from library.models.hunyuan_image.text import BEFORE_PROMPT
from library.models.qwen2_5_vl import Qwen25VLTextEncoder, qwen2_5_vl_config
from library.models.t5 import T5TextEncoder
from library.models.tokenizer_files import QWEN_ADDED, QWEN_SPECIAL, byte_characters
from library.randomness import generator
from library.safetensors_io import save_file
from tools.tiny_parts import WORDS, fill_randomly

GLYPH_VOCABULARY = 1510
"""Bytes and special tokens of ByT5, then 138 colours and 988 fonts."""
HEAD_DIM = 16


@dataclass(frozen=True)
class TinyQwen25VL:
    """A Qwen2.5-VL before it is written, with its vision tower and its head."""

    config: dict[str, Any]
    """Its config.json."""
    state: dict[str, Tensor]
    """Under the names of the published single file (``model.``, ``visual.``, ``lm_head.``)."""
    exceptions: dict[str, int]
    """What a single file has to say because its shapes don't."""


def tiny_qwen2_5_vl(hidden: int, seed: int, dtype: torch.dtype, vocabulary: int, layers: int = 4) -> TinyQwen25VL:
    """A model whose states are ``hidden`` wide, a multiple of 32, and come from all but its last two ``layers``."""
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": hidden // HEAD_DIM // 2,
    }
    encoder = Qwen25VLTextEncoder(qwen2_5_vl_config({**sizes, "head_dim": HEAD_DIM}))
    fill_randomly(encoder, seed, "tiny qwen2.5-vl")
    state = {f"model.{name}": value for name, value in encoder.state_dict().items()}
    state["model.norm.weight"] = torch.ones(hidden)
    unused = {"lm_head.weight": (vocabulary, hidden), **_vision_tower(hidden)}
    for name, shape in unused.items():
        state[name] = torch.randn(shape, generator=generator(seed, "tiny qwen2.5-vl", name)) / 10
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    text = {**sizes, "model_type": "qwen2_5_vl_text", "rms_norm_eps": 1e-6, "rope_parameters": rope}
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "text_config": {**text, "bos_token_id": None, "eos_token_id": None},
        "vision_config": {
            **{"model_type": "qwen2_5_vl_vision", "depth": 1, "hidden_size": 32, "intermediate_size": 32},
            **{"num_heads": 2, "out_hidden_size": hidden, "fullatt_block_indexes": [0]},
        },
    }
    state = {name: value.to(dtype).contiguous() for name, value in state.items()}
    return TinyQwen25VL(config, state, {"head_dim": HEAD_DIM})


def _vision_tower(hidden: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a vision tower of one block, 32 wide."""
    block, merger = "visual.blocks.0.", "visual.merger."
    layers = {f"{block}attn.qkv": (96, 32), f"{block}attn.proj": (32, 32)}
    layers |= {f"{block}mlp.{name}_proj": (32, 32) for name in ("gate", "up", "down")}
    layers |= {f"{merger}mlp.0": (128, 128), f"{merger}mlp.2": (hidden, 128)}
    shapes: dict[str, tuple[int, ...]] = {"visual.patch_embed.proj.weight": (32, 3, 2, 14, 14)}
    shapes |= {f"{name}.weight": (32,) for name in (f"{block}norm1", f"{block}norm2", f"{merger}ln_q")}
    return shapes | {
        f"{name}.{kind}": shape[:count]
        for name, shape in layers.items()
        for kind, count in (("weight", 2), ("bias", 1))
    }


def make_tiny_qwen2_5_vl(
    path: Path | str,
    hidden: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layers: int = 4,
    words: str = WORDS,
) -> Path:
    """Write a Qwen2.5-VL as one file, as it is published for ComfyUI, with its tokenizer's two files beside it.

    Each of ``words`` is one token.
    """
    path = Path(path)
    made = tiny_qwen2_5_vl(hidden, seed, dtype, write_qwen_tokenizer(path.parent, words), layers)
    save_file(made.state, path, {"config": json.dumps({"qwen2_5_vl": made.exceptions})})
    return path


def write_diffusers_qwen2_5_vl(
    folder: Path, hidden: int = 64, seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 4
) -> None:
    """Write the same model into a Diffusers folder: ``text_encoder/`` and ``tokenizer/``."""
    vocabulary = write_qwen_tokenizer(folder / "tokenizer")
    added = [*((name, True) for name in QWEN_SPECIAL), *((name, False) for name in QWEN_ADDED)]
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    settings = {
        **{"tokenizer_class": "Qwen2Tokenizer", "pad_token": QWEN_SPECIAL[0], "eos_token": "<|im_end|>"},
        "added_tokens_decoder": {
            str(number): {"content": name, "special": is_special, **plain}
            for number, (name, is_special) in enumerate(added, vocabulary - len(added))
        },
    }
    write_text(folder / "tokenizer" / "tokenizer_config.json", json.dumps(settings))
    made, prefixes = tiny_qwen2_5_vl(hidden, seed, dtype, vocabulary, layers), {"model": "model.language_model"}
    prefixes["visual"] = "model.visual"
    state = {}
    for name, value in made.state.items():
        part, _, rest = name.partition(".")
        state[f"{prefixes.get(part, part)}.{rest}"] = value
    _write_model(folder / "text_encoder", made.config, state)


def write_qwen_tokenizer(folder: Path, words: str = WORDS) -> int:
    """A byte-level BPE whose merges make the words of the template and ``words``, as vocab.json and merges.txt.

    Returns its number of entries, with the special tokens that are in neither file.
    """
    characters = dict(zip(_byte_order(), byte_characters()))
    ranks: dict[tuple[str, str], int] = {}
    for word in re.findall(r"\w+", f"{BEFORE_PROMPT} {words}"):
        for text in (word, f" {word}"):
            pieces = _merged([characters[byte] for byte in text.encode()], ranks)
            while len(pieces) > 1:
                ranks[pieces[0], pieces[1]] = len(ranks)
                pieces[:2] = [pieces[0] + pieces[1]]
    entries = [*byte_characters(), *dict.fromkeys("".join(pair) for pair in ranks)]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "vocab.json", json.dumps({entry: index for index, entry in enumerate(entries)}))
    write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{one} {other}\n" for one, other in ranks))
    return len(entries) + len(QWEN_SPECIAL) + len(QWEN_ADDED)


def _merged(pieces: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """The pieces of a word after all merges that are known so far, the first known first."""
    while known := [(ranks[pair], place) for place, pair in enumerate(pairwise(pieces)) if pair in ranks]:
        place = min(known)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    return pieces


def _byte_order() -> list[int]:
    """The bytes that ``byte_characters`` stand for."""
    own = {ord(character) for character in byte_characters() if ord(character) < 256}
    return [*sorted(own), *(byte for byte in range(256) if byte not in own)]


def tiny_byt5(width: int, seed: int) -> T5TextEncoder:
    """A glyph ByT5 of two layers."""
    sizes = {"d_kv": HEAD_DIM, "d_ff": 2 * width, "num_layers": 2, "num_heads": width // HEAD_DIM}
    settings = {"feed_forward_proj": "gated-gelu", "use_cache": False, "is_encoder_decoder": False}
    config_class = transformers_class("t5.configuration_t5", "T5Config")
    encoder = T5TextEncoder(config_class(vocab_size=GLYPH_VOCABULARY, d_model=width, **sizes, **settings))
    fill_randomly(encoder, seed, "tiny byt5")
    return encoder


def byt5_state(encoder: T5TextEncoder, dtype: torch.dtype) -> dict[str, Tensor]:
    """Its tensors under the names of the published file."""
    state = {name: value.to(dtype).contiguous() for name, value in encoder.state_dict().items()}
    return {"shared.weight": state.pop("encoder.embed_tokens.weight"), **state}


def make_tiny_byt5(path: Path | str, width: int = 64, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a glyph ByT5 as one file, as it is published for ComfyUI. ``width`` is a multiple of 16."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(byt5_state(tiny_byt5(width, seed), dtype), path)
    return Path(path)


def write_diffusers_byt5(folder: Path, width: int = 64, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
    """Write the same model into a Diffusers folder: ``text_encoder_2/`` and ``tokenizer_2/``."""
    (folder / "tokenizer_2").mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer_2" / "tokenizer_config.json", json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    encoder = tiny_byt5(width, seed)
    config = {**json.loads(encoder.config.to_json_string()), "architectures": ["T5EncoderModel"]}
    _write_model(folder / "text_encoder_2", config, byt5_state(encoder, dtype))


def _write_model(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", json.dumps(config))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
