"""ControlNet-LLLite for Stable Diffusion XL: small networks in front of attention layers that see a hint image.

A file names each of its modules after a layer of the original U-Net (``lllite_unet_input_blocks_4_1_..._attn1_to_q``).
What a module adds to the layer's input depends on that input and on the hint, of which convolutions make a map of the
size that the layer's tokens have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.checkpoints import Checkpoint, open_checkpoint
from library.errors import UserError
from library.models.stable_diffusion.checkpoint import MODEL_NAMES, UnetFile, Variant
from library.models.stable_diffusion.original_names import under_original_names

PREFIX = "lllite_unet_"
KEY = re.compile(rf"{PREFIX}(\w+)\.(conditioning1\.\d+|down\.0|mid\.0|up\.0)\.(weight|bias)")
LAYER = re.compile(r"(input_blocks|middle_block)\.(\d+)\.(.+\.)?attn[12]\.to_[qkv]")
LATENT_STRIDE = 8
IMAGE_CHANNELS = 3


class LLLiteModule(nn.Module):
    """What is added to the input of one layer; the state dict has the keys of the files.

    ``hint_layers`` are (channels in, channels out, kernel and stride) of the convolutions that the hint passes,
    ``width`` is the layer's input's, ``inner`` the network's.
    """

    def __init__(self, hint_layers: tuple[tuple[int, int, int], ...], width: int, inner: int):
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in hint_layers:
            layers += [nn.Conv2d(inputs, outputs, stride, stride), nn.ReLU()]
        self.conditioning1 = nn.Sequential(*layers[:-1])
        self.down = nn.Sequential(nn.Linear(width, inner), nn.ReLU())
        self.mid = nn.Sequential(nn.Linear(inner + hint_layers[-1][1], inner), nn.ReLU())
        self.up = nn.Sequential(nn.Linear(inner, width))

    @property
    def stride(self) -> int:
        """Pixels of the hint for each position of its map."""
        stride = 1
        for layer in self.conditioning1:
            stride *= layer.stride[0] if isinstance(layer, nn.Conv2d) else 1
        return stride

    def hint_map(self, hints: Tensor, latent_size: tuple[int, int]) -> Tensor:
        """[B, tokens, channels] of ``hints`` [B, 3, H, W] in -1..1, for latents of that height and width.

        The map is resized where it has another size than the layer's tokens.
        """
        made = self.conditioning1(hints)
        size = latent_size
        for _ in range((self.stride // LATENT_STRIDE).bit_length() - 1):
            size = (size[0] + 1) // 2, (size[1] + 1) // 2
        if made.shape[2:] != size:
            made = F.interpolate(made, size, mode="bilinear", align_corners=False)
        return made.flatten(2).transpose(1, 2)

    def forward(self, x: Tensor, hint_map: Tensor) -> Tensor:
        """What is added to ``x`` [rows, tokens, width]; ``hint_map`` [B, tokens, channels] is repeated for it."""
        hints = hint_map.repeat(len(x) // len(hint_map), 1, 1)
        return self.up(self.mid(torch.cat([hints, self.down(x)], dim=-1)))


@dataclass(frozen=True)
class LLLiteFile:
    """An opened file: its modules by the layers' paths in the original U-Net."""

    checkpoint: Checkpoint
    prefixes: dict[str, str]
    """What begins the keys of each layer's module."""

    def load(self, dtype: torch.dtype, device: torch.device | str) -> dict[str, LLLiteModule]:
        """The modules, frozen, by the layers' paths."""
        return {path: self._module(prefix, dtype, device) for path, prefix in self.prefixes.items()}

    def meta_module(self, prefix: str) -> LLLiteModule:
        """The module whose keys begin so, on torch's meta device."""
        own = [key.removeprefix(prefix) for key in self.checkpoint if key.startswith(prefix)]
        convolutions = sorted(int(key.split(".")[1]) for key in own if re.fullmatch(r"conditioning1\.\d+\.weight", key))
        shapes = [self._sizes(f"{prefix}conditioning1.{number}.weight", 4) for number in convolutions or (0,)]
        inner, width = self._sizes(f"{prefix}down.0.weight", 2)
        if [shape[1] for shape in shapes] != [IMAGE_CHANNELS, *(shape[0] for shape in shapes[:-1])]:
            raise UserError(
                f"{self.checkpoint.label}: the convolutions of {prefix}conditioning1 don't follow each other from an "
                f"image's {IMAGE_CHANNELS} channels on; the file is damaged."
            )
        with torch.device("meta"):
            module = LLLiteModule(tuple((shape[1], shape[0], shape[2]) for shape in shapes), width, inner)
        for name, tensor in module.state_dict().items():
            if self._sizes(prefix + name, tensor.dim()) != tuple(tensor.shape):
                raise UserError(
                    f'{self.checkpoint.label}: tensor "{prefix}{name}" has the shape '
                    f"{list(self.checkpoint.shape(prefix + name))}, but the other tensors imply {list(tensor.shape)}."
                )
        return module

    def _sizes(self, key: str, dimensions: int) -> tuple[int, ...]:
        if key not in self.checkpoint:
            raise UserError(f'{self.checkpoint.label}: the tensor "{key}" is missing; the file is damaged.')
        shape = self.checkpoint.shape(key)
        if len(shape) != dimensions or 0 in shape:
            raise UserError(
                f'{self.checkpoint.label}: tensor "{key}" has the shape {list(shape)}; the file is damaged.'
            )
        return shape

    def _module(self, prefix: str, dtype: torch.dtype, device: torch.device | str) -> LLLiteModule:
        module = self.meta_module(prefix)
        state = {name: self.checkpoint.load(prefix + name, dtype, device) for name in module.state_dict()}
        module.load_state_dict(state, assign=True)
        return module.requires_grad_(False).eval()


def open_lllite(
    path: Path | str, unet: UnetFile, variant: Variant, option: str = "--control_net_lllite_models"
) -> LLLiteFile:
    """Open a file for this U-Net by its headers only.

    Raises UserError, naming ``option``, when the model isn't XL, the file holds something else, or a module belongs to
    no layer of the U-Net.
    """
    if variant != "sdxl":
        raise UserError(f"{option}: ControlNet-LLLite is for {MODEL_NAMES['sdxl']}; this is {MODEL_NAMES[variant]}.")
    checkpoint = open_checkpoint(path, option=option)
    layers = layers_of(unet.meta_module())
    paths = {path.replace(".", "_"): path for path in layers}
    matches = [match for match in map(KEY.fullmatch, checkpoint) if match is not None]
    if not matches:
        raise UserError(f'{checkpoint.label} holds no ControlNet-LLLite: none of its keys begins with "{PREFIX}".')
    names = list(dict.fromkeys(match[1] for match in matches))
    unknown = [name for name in names if name not in paths]
    if unknown:
        raise UserError(
            f"{checkpoint.label} belongs to another model: the U-Net has no layer for {len(unknown)} of its "
            f"{len(names)} modules, such as {unknown[0]}."
        )
    opened = LLLiteFile(checkpoint, {paths[name]: f"{PREFIX}{name}." for name in names})
    for name in names:
        width = opened.meta_module(f"{PREFIX}{name}.").up[0].out_features
        wanted = layers[paths[name]].in_features
        if width != wanted:
            raise UserError(
                f"{checkpoint.label} belongs to another model: its module {name} takes {width} channels, the U-Net's "
                f"layer {wanted}."
            )
    return opened


def layers_of(unet: Any) -> dict[str, nn.Linear]:
    """The layers of diffusers' ``unet`` that a module may stand before, by their paths in the original U-Net."""
    modules = under_original_names(unet).named_modules()
    return {path: module for path, module in modules if LAYER.fullmatch(path) and isinstance(module, nn.Linear)}


AddTo = Callable[[str, Tensor], Tensor]
"""What becomes of the input of the layer of that path."""


@contextmanager
def before_layers(unet: Any, paths: Collection[str], add_to: AddTo) -> Iterator[None]:
    """While it is active, the layers of those paths are given what ``add_to`` makes of their inputs."""
    with ExitStack() as hooks:
        for path, layer in layers_of(unet).items():
            if path in paths:
                hooks.callback(layer.register_forward_pre_hook(_of_path(path, add_to)).remove)
        yield


def _of_path(path: str, add_to: AddTo) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda layer, arguments: (add_to(path, arguments[0]), *arguments[1:])
