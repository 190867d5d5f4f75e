"""Textual Inversion: files of vectors that are used where a file's name stands in a text.

Read are the files of kohya-ss/sd-scripts (``emb_params``; for XL ``clip_l`` and ``clip_g``), of AUTOMATIC1111's web UI
(``string_to_param``) and of Diffusers (a vector by its token), as safetensors or pickled.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.checkpoints import PICKLE_SUFFIXES, checkpoint_files, load_pickled, open_checkpoint, require_dense
from library.console import warn
from library.errors import UserError
from library.models.stable_diffusion.added_words import AddedWords

if TYPE_CHECKING:
    from library.models.stable_diffusion.pipeline import StableDiffusionPipeline

OPTION = "--textual_inversion_embeddings"
XL_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""The tensor of an XL embedding for each text encoder."""
ORDINALS = {"text_encoder": "first", "text_encoder_2": "second"}
IMAGE_SUFFIXES = (".png", ".webp", ".jxl", ".avif")


def add_textual_inversions(paths: Sequence[str], pipeline: StableDiffusionPipeline) -> None:
    """Let texts of images have the words that the files ``paths`` are named after, ending taken away.

    Raises UserError, naming the file, for one that is no embedding for this model, and for a name that is taken.
    """
    for name in paths:
        path = Path(name)
        tensors = read_embedding(path, OPTION)
        place = f"{OPTION}: {path}"
        vectors = _xl_vectors(tensors, place) if pipeline.variant == "sdxl" else _vectors(tensors, place)
        add_word(path, vectors, pipeline, OPTION)


def add_word(path: Path, vectors: Mapping[str, Tensor], pipeline: StableDiffusionPipeline, option: str) -> None:
    """Let the name of a file stand for ``vectors`` [vectors, hidden] in each text encoder.

    In an encoder without vectors it stands for nothing. Raises UserError where they don't fit, and for a name that is
    taken.
    """
    word, place = path.stem, f"{option}: {path}"
    for encoder in pipeline.encoders:
        opened = pipeline.opened(encoder)
        words = pipeline.words.setdefault(encoder, AddedWords(opened.vocabulary))
        if word in words.ids:
            raise UserError(f'{place}: there is another embedding of the name "{word}"; rename one of the files.')
        if word in pipeline.tokenizer(encoder).get_vocab():
            raise UserError(f'{place}: "{word}" is in the vocabulary of the text encoder; rename the file.')
        its_vectors = vectors.get(encoder, torch.empty(0, opened.hidden_size))
        if its_vectors.shape[1] != opened.hidden_size:
            raise UserError(
                f"{place} holds vectors of {its_vectors.shape[1]} values; the text encoder of this model takes "
                f"{opened.hidden_size}."
            )
        words.add(word, its_vectors)


def read_embedding(path: Path, option: str) -> dict[str, Tensor]:
    """The tensors of an embedding file by name, float32, [vectors, values] each. Raises UserError."""
    place = f"{option}: {path}"
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise UserError(f"{place}: embeddings in images are not supported; use a .safetensors or .pt file.")
    content: Any
    if path.suffix.lower() in PICKLE_SUFFIXES:
        try:
            checkpoint_files(path)
            content = load_pickled(path, classes=(nn.ParameterDict, OrderedDict, set))
        except UserError as error:
            raise UserError(f"{option}: {error}") from None
        content = content.get("string_to_param", content)
        if isinstance(content, nn.Module):  # as old versions of the web UI pickled it
            content = content._parameters
    else:
        checkpoint = open_checkpoint(path, None, option=option)
        content = {key: checkpoint.load(key) for key in checkpoint}
    if not isinstance(content, Mapping):
        raise UserError(f'{place} is not an embedding: its "string_to_param" holds no tensors by name.')
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    for key, value in tensors.items():
        require_dense(place, key, value)
        if value.ndim not in (1, 2) or not value.is_floating_point():
            raise UserError(f'{place} is not an embedding: "{key}" is not a list of vectors.')
    if not tensors:
        raise UserError(f"{place} is not an embedding: it holds no tensor.")
    return {key: (value[None] if value.ndim == 1 else value).detach().float() for key, value in tensors.items()}


def _vectors(tensors: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """The vectors of an embedding for Stable Diffusion 1.x or 2.x."""
    if tensors.keys() & set(XL_KEYS.values()):
        raise UserError(f"{place} is an embedding for Stable Diffusion XL.")
    if len(tensors) > 1:
        names, hint = ", ".join([*tensors][:4]), ""
        if "MID" in tensors:
            hint = "; it may be meant for --XTI_embeddings"
        raise UserError(
            f"{place} is not a Textual Inversion: it holds {len(tensors)} tensors ({names}, ...), not one{hint}."
        )
    return {"text_encoder": next(iter(tensors.values()))}


def _xl_vectors(tensors: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """The vectors of an embedding for XL; for an encoder that has none, with a warning, none."""
    vectors = {encoder: tensors[key] for encoder, key in XL_KEYS.items() if key in tensors}
    if not vectors:
        raise UserError(f"{place} is not an embedding for Stable Diffusion XL: it holds neither clip_l nor clip_g.")
    for encoder in XL_KEYS.keys() - vectors.keys():
        warn(f"{place} holds no {XL_KEYS[encoder]}: the {ORDINALS[encoder]} text encoder does not see its name.")
    return vectors
