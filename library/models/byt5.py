"""The glyph ByT5: a small T5 v1.1 encoder that reads the bytes of a text which is to stand in an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from library.checkpoints import open_checkpoint
from library.errors import UserError
from library.models.loading import TensorSource
from library.models.recognition import BYT5_PREFIXES, refuse_unless
from library.models.t5 import T5File, opened_encoder

PAD, END = 0, 1
FIRST_BYTE = 3
"""The token of the byte 0; before it are padding, the end of text, and an unknown token."""


def open_byt5(path: Path | str, disable_mmap: bool = False, option: str = "") -> T5File:
    """Open a glyph ByT5 by its headers: ComfyUI's single file, Glyph-SDXL-v2's ``byt5_model.pt``, or a folder.

    In a Diffusers folder it is in ``text_encoder_2/``. Raises UserError, naming ``option`` and what the file is; plain
    ByT5, which has no tokens for colours and fonts and was never trained on glyphs, is refused.
    """
    checkpoint = open_checkpoint(path, "text_encoder_2", disable_mmap, option)
    wanted = "the glyph ByT5 (byt5_small_glyphxl_fp16.safetensors)"
    if refuse_unless(checkpoint, {"byt5-glyph", "byt5"}, wanted, BYT5_PREFIXES).name == "byt5":
        raise UserError(f"{checkpoint.label} is plain ByT5, which knows no glyphs; {wanted} is needed here.")
    return opened_encoder(TensorSource(checkpoint, BYT5_PREFIXES))


def byt5_tokens(texts: Sequence[str], length: int) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, both [B, L] int64, of ``texts``, padded to the longest of them.

    A token is a byte of UTF-8, so no file is needed; the end of text is the last one, also of a text that is cut to
    ``length`` tokens. Words such as ``<color-1>`` are text like any other.
    """
    ids = [
        torch.tensor([FIRST_BYTE + byte for byte in text.encode("utf-8", "replace")[: length - 1]] + [END])
        for text in texts
    ]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD)
    return {"input_ids": padded, "attention_mask": (padded != PAD).long()}
