"""Latents as files, to be decoded later: the format of kohya-ss/sd-scripts.

One tensor, ``latent`` [1, C, h, w], as the denoiser gives it, and metadata that says how it was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints import PICKLE_SUFFIXES
from library.errors import UserError
from library.files import write_new
from library.generation.image_files import file_names
from library.prompt_options import PromptOptions

if TYPE_CHECKING:
    from torch import Tensor

KEY = "latent"
OWN_NAMES = {
    "seeds": "seed",
    "prompt": "prompt",
    "height": "height",
    "width": "width",
    "infer_steps": "steps",
    "guidance_scale": "scale",
    "negative_prompt": "negative-prompt",
}
"""An entry of a latent file's metadata -> the key of the text in an image that says the same."""


@dataclass(frozen=True)
class LatentFile:
    """What a file holds."""

    latents: Tensor
    """[1, C, h, w] float32."""
    text: Mapping[str, str]
    """What is known of how they were made, by the keys of the text in images."""


def save_latents(
    latents: Tensor, folder: Path, name: str, prompt: PromptOptions | None, text: Mapping[str, str]
) -> Path:
    """Write ``latents`` [1, C, h, w] as ``name.safetensors``, or a new name beginning so, in ``folder``.

    Metadata are what ``prompt`` says (nothing without one) and ``text``, which an image of them gets. Returns the path.
    """
    from safetensors.torch import save

    metadata = dict(text)
    if prompt is not None:
        metadata |= {
            "seeds": str(prompt.seed),
            "prompt": prompt.prompt,
            "height": str(prompt.height),
            "width": str(prompt.width),
            "infer_steps": str(prompt.sample_steps),
            "guidance_scale": str(prompt.scale),
            "negative_prompt": prompt.negative_prompt or "",
        }
    data = save({KEY: latents.cpu().contiguous()}, metadata)
    return write_new(file_names(folder, name, ".safetensors"), data)


def read_latents(path: Path, channels: int, rows: int, columns: int) -> LatentFile:
    """The latents of a file, with ``channels``.

    A safetensors file, or what ``torch.save`` wrote of a tensor. The axis of frames in [1, C, 1, h, w] is left out;
    [tokens, C] is taken as rows and columns of the size in the metadata, else as ``rows`` x ``columns``. Raises
    UserError for a file that cannot be read or holds anything else.
    """
    tensor, metadata = _read(path)
    shape = list(tensor.shape)
    text = {ours: metadata[name] for name, ours in OWN_NAMES.items() if name in metadata}
    text |= {name: value for name, value in metadata.items() if name not in OWN_NAMES}
    if tensor.ndim == 5 and shape[2] == 1:
        tensor = tensor.squeeze(2)
    if tensor.ndim == 3:
        tensor = tensor[None]
    if tensor.ndim == 2 and shape[1] == channels:
        if shape[0] != rows * columns:
            raise UserError(
                f"{path} holds {shape[0]} packed positions, but the image size makes {rows} x {columns} of them; give "
                "the --image_size that it was made with."
            )
        tensor = tensor.reshape(1, rows, columns, channels).permute(0, 3, 1, 2)
    if tensor.ndim != 4 or tensor.shape[:2] != (1, channels) or not tensor.is_floating_point():
        raise UserError(f"{path}: its latents are {shape}, but [1, {channels}, height, width] are needed.")
    return LatentFile(tensor.float().contiguous(), text)


def _read(path: Path) -> tuple[Tensor, Mapping[str, str]]:
    import torch

    from library.checkpoints import load_tensors, require_dense, unpickled

    if not path.is_file():
        raise UserError(f"there is no latent file {path}.")
    if path.suffix.lower() not in PICKLE_SUFFIXES:
        tensors, metadata = load_tensors(path)
    else:
        loaded = unpickled(path)
        tensors, metadata = loaded if isinstance(loaded, dict) else {KEY: loaded}, {}
    tensor = tensors.get(KEY)
    if not isinstance(tensor, torch.Tensor):
        raise UserError(f'{path} holds no tensor "{KEY}"; it is not a file of latents.')
    require_dense(path, KEY, tensor)
    return tensor, metadata
