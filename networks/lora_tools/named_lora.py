"""LoRA files read without a model: modules under the names that the file gives them, one at a time.

What a file holds is known from its header, so that a mistake is found before anything is computed. Key forms are those
of ``lora_formats``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from library.errors import UserError
from library.safetensors_io import open_checkpoint
from networks.adapters.lora_file import LoRAWeights, with_adapter_config
from networks.adapters.lora_formats import check_shapes, grouped_keys, read_module
from networks.lora_tools.arithmetic import layer_shape

SD = "Stable Diffusion 1.x or 2.x"
SDXL = "Stable Diffusion XL"
# What a module's name tells about the model that the file was made for; the first that fits any name is taken.
FAMILY_BY_NAME = {
    "HunyuanImage-2.1": r"lora_unet_(double|single)_blocks_\d+_(\w+_fc\d|\w*mod\w*_linear)$",
    "FLUX.1": r"lora_unet_(double|single)_blocks_",
    "Lumina Image 2.0": r"lora_unet_(layers|context_refiner|noise_refiner|cap_embedder)_",
    SDXL: r"lora_unet_((input|output)_blocks|middle_block)_|lora_unet_\w+_attentions_\d+_transformer_blocks_[1-9]",
    SD: r"lora_unet_((down|up)_blocks|mid_block)_",
}
# For files without a transformer or U-Net: the beginning of ss_base_model_version, then the names of the text encoders.
FAMILY_BY_METADATA = {
    "hunyuan": "HunyuanImage-2.1",
    "flux": "FLUX.1",
    "lumina": "Lumina Image 2.0",
    "sdxl": SDXL,
    "sd_v": SD,
}
FAMILY_BY_ENCODER = {SDXL: r"lora_te[12]_text_model_", SD: r"lora_te_text_model_"}


class NamedLoRA:
    """A LoRA file, opened by its header.

    ``modules`` are the names of its modules, ``keys`` their tensors, ``others`` the keys that belong to no module.
    Raises UserError naming ``option`` for a file that cannot be read, is no LoRA, or whose matrices do not fit.
    """

    modules: Collection[str]

    def __init__(self, path: Path | str, option: str = "--models"):
        self.path = Path(path)
        self.checkpoint = open_checkpoint(path, option=option)
        self.label = self.checkpoint.label
        self.metadata = with_adapter_config(path, self.checkpoint.metadata)
        try:
            self.keys, self.others = grouped_keys(self.checkpoint)
            self.modules = self.keys.keys()
            if not self.keys:
                raise UserError(f"{self.label} contains no LoRA modules; a LoRA file is needed here.")
            for name in self.keys:
                self._check(name)
        except UserError as error:
            raise self._named(error) from None

    def _named(self, error: UserError) -> UserError:
        """The error with the file's name before it."""
        return error if str(error).startswith(self.label) else UserError(f"{self.label}: {error}")

    def _check(self, name: str) -> None:
        down, up = self.shapes(name)
        check_shapes(name, down, up if len(up) == len(down) else ())

    def shapes(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of down and up."""
        keys = self.keys[name]
        return self.checkpoint.shape(keys.down), self.checkpoint.shape(keys.up)

    def layer_shape(self, name: str) -> tuple[int, ...]:
        """The shape [out, in] or [out, in, kh, kw] of the layer's weight."""
        return layer_shape(*self.shapes(name))

    def rank(self, name: str) -> int:
        return self.shapes(name)[0][0]

    def load(self, name: str, device: torch.device | str = "cpu") -> LoRAWeights:
        """The module's matrices in the file's dtype. Raises UserError as ``lora_formats.read_module`` does."""
        try:
            return read_module(partial(self.checkpoint.load, device=device), name, self.keys[name], self.metadata)
        except UserError as error:
            raise self._named(error) from None

    @property
    def family(self) -> str | None:
        """The model family that the names (or the metadata) tell; None where they do not."""
        version = self.metadata.get("ss_base_model_version", "")
        told = (family for beginning, family in FAMILY_BY_METADATA.items() if version.startswith(beginning))
        return self._family_by(FAMILY_BY_NAME) or next(told, None) or self._family_by(FAMILY_BY_ENCODER)

    def _family_by(self, patterns: Mapping[str, str]) -> str | None:
        for family, pattern in patterns.items():
            if any(re.match(pattern, name) for name in self.modules):
                return family
        return None

    def require_family(self, wanted: Sequence[str], advice: str = "") -> None:
        """Raises UserError unless the file is for one of these families; ``advice`` says what else to do."""
        if self.family not in wanted:
            what = f"is for {self.family}" if self.family else "is for another kind of model"
            raise UserError(
                f"{self.label} {what} (it has a module {next(iter(self.modules))}); a LoRA for {' or '.join(wanted)}"
                f" is needed here.{' ' + advice if advice else ''}"
            )

    def refuse_other_tensors(self) -> None:
        """Raises UserError that lists tensors which belong to no LoRA module."""
        if self.others:
            raise UserError(
                f"{self.label} holds {len(self.others)} tensors that belong to no LoRA module, so they cannot be"
                f" merged: {', '.join(self.others)}."
            )


def kernel_is_wide(shape: Sequence[int]) -> bool:
    """Whether a layer's shape is that of a convolution that sees neighbours."""
    return any(size != 1 for size in shape[2:])


def without_1x1(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A layer's shape without a kernel of 1x1, since such a convolution and a Linear layer take the same LoRA."""
    return shape if kernel_is_wide(shape) else shape[:2]
