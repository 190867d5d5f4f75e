"""The tokenizers of the tiny FLUX.1: a few hundred pieces each, in the files that transformers' classes read.

Each word of the captions is one token; everything else is spelled, in bytes by CLIP and in printable ASCII by T5.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from library.files import write_text, writing
from library.models.tokenizer_files import CLIP_L, T5_XXL, byte_characters
from tools import tiny_flux_drawings as drawings

CLIP_TOKENIZER, T5_TOKENIZER = CLIP_L.folder_name, T5_XXL.folder_name


def byte_pair_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Merges that make each of ``words`` one token, learned as byte-pair encoding does: most frequent pair first."""
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(spelling) > 1 for spelling in spellings):
        counts = Counter(pair for spelling in spellings for pair in pairwise(spelling))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for spelling in spellings:
            index = 0
            while index < len(spelling) - 1:
                if (spelling[index], spelling[index + 1]) == best:
                    spelling[index : index + 2] = ["".join(best)]
                index += 1
    return merges


def build_clip_tokenizer(folder: Path) -> None:
    """The files that CLIPTokenizer reads; the end token has the largest id, as in the original."""
    characters = byte_characters()
    merges = byte_pair_merges(drawings.WORDS)
    pieces = [*characters, *(character + "</w>" for character in characters)]
    pieces += ["".join(pair) for pair in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    if len(set(pieces)) != len(pieces):
        raise RuntimeError("the CLIP vocabulary has a piece twice")
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    write_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def build_t5_tokenizer(folder: Path) -> None:
    """``spiece.model``: a sentencepiece unigram model of the captions' words and of every printable ASCII character."""
    from sentencepiece import sentencepiece_model_pb2 as formats

    model = formats.ModelProto()
    kinds = formats.ModelProto.SentencePiece
    for piece, kind in (("<pad>", kinds.CONTROL), ("</s>", kinds.CONTROL), ("<unk>", kinds.UNKNOWN)):
        model.pieces.add(piece=piece, score=0.0, type=kind)
    for word in drawings.WORDS:
        model.pieces.add(piece="\u2581" + word, score=-1.0, type=kinds.NORMAL)
    for character in ["\u2581", *(chr(code) for code in range(33, 127))]:
        model.pieces.add(piece=character, score=-10.0, type=kinds.NORMAL)
    trainer = model.trainer_spec
    trainer.model_type = formats.TrainerSpec.UNIGRAM
    trainer.vocab_size = len(model.pieces)
    trainer.pad_id, trainer.eos_id, trainer.unk_id, trainer.bos_id = 0, 1, 2, -1
    trainer.pad_piece, trainer.eos_piece, trainer.unk_piece = "<pad>", "</s>", "<unk>"
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = True
    model.normalizer_spec.escape_whitespaces = True
    with writing(folder / "spiece.model") as file:
        file.write(model.SerializeToString())
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": 512,
        "extra_ids": 0,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def build_tokenizers(folder: Path) -> None:
    for name, build in ((CLIP_TOKENIZER, build_clip_tokenizer), (T5_TOKENIZER, build_t5_tokenizer)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        build(folder / name)
