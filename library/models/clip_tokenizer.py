"""CLIP's tokenizer: byte pairs of lower-case words.

Ids are those of transformers' ``CLIPTokenizer``, whose import takes a second. Folders that ask for more than models
come with are left to it: ``clip_tokenizer`` gives None for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

START, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
"""The names that files have for special tokens, and CLIP's, which hold where a file does not name them."""
OTHERS = ("sep_token", "cls_token", "mask_token", "additional_special_tokens", "extra_special_tokens")
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text, or of several, and 0 where they are padding: lists, or tensors [batch, length] int64."""

    input_ids: Any
    attention_mask: Any


class ClipTokenizer:
    """The tokenizer of a ``vocabulary`` (ids of entries) and its ``merges``, called as those of transformers are.

    ``special`` are the start and the end of text as they are found in texts.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        special: Iterable[AddedToken] = (AddedToken(START, special=True), AddedToken(END, special=True)),
    ):
        affixes = {"continuing_subword_prefix": "", "end_of_word_suffix": "</w>"}
        self.backend = Tokenizer(BPE(dict(vocabulary), list(merges), unk_token=END, fuse_unk=False, **affixes))
        self.backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        words = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
        self.backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        self.backend.add_tokens(list(special))
        start, end = self.backend.token_to_id(START), self.backend.token_to_id(END)
        assert start is not None and end is not None  # added where the vocabulary lacks them
        self.bos_token_id, self.eos_token_id = start, end
        self.pad_token_id = self.eos_token_id

    def __len__(self) -> int:
        """The number of entries."""
        return self.backend.get_vocab_size()

    def get_vocab(self) -> dict[str, int]:
        """The ids of all entries."""
        return self.backend.get_vocab()

    def __call__(
        self,
        text: str | Sequence[str],
        add_special_tokens: bool = True,
        max_length: int | None = None,
        padding: str | bool = False,
        truncation: bool = False,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> Encoded:
        """The ids of one text, or of each of several, between start and end of text unless without special tokens.

        They are cut to ``max_length`` with ``truncation``, and padded to it with ``padding="max_length"``;
        ``return_tensors="pt"`` gives tensors. Nothing is ever said, as without ``verbose`` in transformers.
        """
        texts = [text] if isinstance(text, str) else list(text)
        rows: list[list[int]] = [self.backend.encode(each, add_special_tokens=False).ids for each in texts]
        if max_length is not None and truncation:
            rows = [row[: max_length - 2 * add_special_tokens] for row in rows]
        if add_special_tokens:
            rows = [[self.bos_token_id, *row, self.eos_token_id] for row in rows]
        masks = [[1] * len(row) for row in rows]
        if max_length is not None and padding == "max_length":
            rows = [row + [self.pad_token_id] * (max_length - len(row)) for row in rows]
            masks = [mask + [0] * (max_length - len(mask)) for mask in masks]
        if return_tensors == "pt":
            return Encoded(torch.tensor(rows), torch.tensor(masks))
        return Encoded(rows[0], masks[0]) if isinstance(text, str) else Encoded(rows, masks)


def clip_tokenizer(folder: Path) -> ClipTokenizer | None:
    """The tokenizer of the vocab.json and merges.txt in ``folder``; None where other files ask for more than CLIP's.

    Raises ValueError for a file that is not JSON and whatever tokenizers raises for a damaged vocabulary.
    """
    if any((folder / name).is_file() for name in ("tokenizer.json", "added_tokens.json")):
        return None
    special = _special_tokens(_content(folder / "tokenizer_config.json"), _content(folder / "special_tokens_map.json"))
    if special is None:
        return None
    vocabulary, merges = BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    return ClipTokenizer(vocabulary, merges, special)


def _content(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _special_tokens(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> list[AddedToken] | None:
    """Start and end of text as transformers finds them in texts, from a folder's two files about special tokens.

    None where there are others than CLIP's. A pad token of one character is not one, since text would be cut at it.
    """
    listed = config.get("added_tokens_decoder")
    named = {**SPECIAL, **config, **({} if listed is not None else special_map)}
    if any(named.get(name) for name in OTHERS) or named.get("split_special_tokens"):
        return None
    if any(name.endswith("_token") and name not in SPECIAL and name not in OTHERS for name in named):
        return None
    if not all(isinstance(named[name], str | dict) for name in SPECIAL):
        return None
    found = [_token(value) for _, value in sorted((listed or {}).items(), key=lambda entry: int(entry[0]))]
    is_listed = {token.content for token in found}
    for name, usual in SPECIAL.items():
        token = _token(named[name])
        if token.content != usual and (name != "pad_token" or len(token.content) != 1):
            return None
        if token.content not in is_listed:
            found.append(token)
    last = {token.content: token for token in found if len(token.content) > 1}
    return list(last.values()) if last.keys() == {START, END} else None


def _token(value: str | dict[str, Any]) -> AddedToken:
    """A special token of a JSON file: a text, or a dictionary that says how it is found."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    fields = {name: value[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in value}
    return AddedToken(value.get("content", ""), special=True, **fields)
