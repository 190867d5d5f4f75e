"""ControlNets for Stable Diffusion: a copy of the U-Net's way down that sees a hint image and adds to the U-Net.

Read are the original layout (``control_model.``), files that hold the differences from a base model in it, and
Diffusers' ``ControlNetModel``, which all of them become.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from library.checkpoints import open_checkpoint
from library.devices import move_module
from library.errors import UserError
from library.lean_imports import diffusers_class
from library.models.loading import LoadSpec, Origin, TensorSource, on_meta, require_fit
from library.models.pipeline import OpenedPart
from library.models.recognition import refuse_unless
from library.models.stable_diffusion.checkpoint import UnetFile
from library.models.stable_diffusion.keys import renamed, unet_table, unet_topology
from library.models.stable_diffusion.unet import set_attention_backend

if TYPE_CHECKING:
    from diffusers import ControlNetModel

    from library.models.stable_diffusion.pipeline import StableDiffusionPipeline

WANTED = "a ControlNet for Stable Diffusion"
PREFIXES = ("control_model.",)
DIFFERENCE = "difference"
"""The tensor that marks a file of differences; its value says nothing."""
HINT = "controlnet_cond_embedding."
IMAGE_CHANNELS = 3
CROSS_ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
FROM_UNET = (
    *("in_channels", "attention_head_dim", "norm_num_groups", "use_linear_projection", "upcast_attention"),
    *("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
)
"""Arguments of diffusers' class that a ControlNet, a copy of the U-Net's encoder, shares with the U-Net."""


@dataclass(frozen=True)
class ControlNetFile(OpenedPart["ControlNetModel"]):
    """An opened ControlNet, ready to be loaded; ``config`` holds the arguments of diffusers' class."""

    source: TensorSource
    config: dict[str, Any]
    base: TensorSource | None = None
    """The U-Net that a file of differences is added to; None where the file holds the weights themselves."""

    def meta_module(self) -> Any:
        """diffusers' ControlNetModel on torch's meta device: its structure without its values."""
        with on_meta():
            return diffusers_class("ControlNetModel")(**self.config)

    def load(self, spec: LoadSpec) -> ControlNetModel:
        """The module, frozen and in eval mode; differences become weights. Raises UserError where tensors don't fit."""
        if self.base is None:
            return super().load(spec)
        module: Any = super().load(LoadSpec(torch.float32, None, spec.place))
        for name, parameter in module.named_parameters():
            if name in self.base:
                parameter.data += self.base.load(name, torch.float32, parameter.device)
        return module if spec.compute is None else move_module(module, spec.compute)


def open_control_net(path: Path | str, unet: UnetFile, option: str = "--control_net_models") -> ControlNetFile:
    """Open a ControlNet for a model with this U-Net by its headers only: a file, or a Diffusers folder.

    Raises UserError, naming ``option`` and what the file is, when it isn't one or belongs to another model.
    """
    checkpoint = open_checkpoint(path, "controlnet", option=option)
    refuse_unless(checkpoint, {"sd-controlnet"}, WANTED, PREFIXES)
    source = TensorSource(checkpoint, PREFIXES, "controlnet")
    is_difference = DIFFERENCE in checkpoint
    if any(key.startswith(PREFIXES) for key in checkpoint):  # beside it, the whole model that it was trained with
        source.drop([name for name, origin in source.origins.items() if not origin.keys[0].startswith(PREFIXES)])
    source.drop([DIFFERENCE])
    if any(name.startswith("input_hint_block.") for name in source.names()):
        _name_original(source)
    opened = ControlNetFile(source, infer_config(source, unet), unet.source if is_difference else None)
    require_fit(opened.meta_module(), source)
    return opened


def _name_original(source: TensorSource) -> None:
    """Original names become Diffusers': those of the encoder as the U-Net's, and those of the ControlNet itself."""
    table = unet_table(*unet_topology(source.names()))
    table["middle_block_out.0"] = "controlnet_mid_block"
    for number in range(source.count(r"zero_convs\.(\d+)\.")):
        table[f"zero_convs.{number}.0"] = f"controlnet_down_blocks.{number}"
    last = source.count(r"input_hint_block\.(\d+)\.") - 1
    table["input_hint_block.0"] = f"{HINT}conv_in"
    table[f"input_hint_block.{last}"] = f"{HINT}conv_out"
    for number in range(2, last, 2):
        table[f"input_hint_block.{number}"] = f"{HINT}blocks.{number // 2 - 1}"
    source.remap({renamed(name, table) or name: Origin((name,)) for name in source.names()})


def infer_config(source: TensorSource, unet: UnetFile) -> dict[str, Any]:
    """Arguments of ``ControlNetModel`` from the shapes of tensors under Diffusers' names, and from the U-Net's.

    Raises UserError when the ControlNet was made for a model of other sizes.
    """
    levels = range(source.count(r"down_blocks\.(\d+)\."))
    widths = [source.sizes(f"down_blocks.{level}.resnets.0.conv1.weight", 4)[0] for level in levels]
    theirs = list(unet.config["block_out_channels"])
    label = source.checkpoint.label
    if widths != theirs:
        raise UserError(f"{label} belongs to another model: its levels have the widths {widths}, the U-Net's {theirs}.")
    text = source.sizes(CROSS_ATTENTION, 2)[1] if CROSS_ATTENTION in source else unet.config["cross_attention_dim"]
    if text != unet.config["cross_attention_dim"]:
        raise UserError(
            f"{label} belongs to another model: it reads text {text} wide, the U-Net text "
            f"{unet.config['cross_attention_dim']} wide."
        )
    channels = source.sizes(f"{HINT}conv_in.weight", 4)[1]
    if channels != IMAGE_CHANNELS:
        raise UserError(f"{label} takes hints of {channels} channels, where an image has {IMAGE_CHANNELS}.")
    depths = [source.count(rf"down_blocks\.{level}\.attentions\.\d+\.transformer_blocks\.(\d+)\.") for level in levels]
    middle = source.count(r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.")
    hint_steps = source.count(rf"{HINT}blocks\.(\d+)\.")
    hint_layers = ["conv_in", *(f"blocks.{number}" for number in range(1, hint_steps, 2))]
    return {
        **{name: unet.config[name] for name in FROM_UNET if name in unet.config},
        "block_out_channels": widths,
        "layers_per_block": source.count(r"down_blocks\.0\.resnets\.(\d+)\."),
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D",
        "transformer_layers_per_block": [*(depth or 1 for depth in depths[:-1]), depths[-1] or middle or 1],
        "cross_attention_dim": text,
        "conditioning_channels": channels,
        "conditioning_embedding_out_channels": [source.sizes(f"{HINT}{layer}.weight", 4)[0] for layer in hint_layers],
    }


def load_control_net(opened: ControlNetFile, pipeline: StableDiffusionPipeline) -> Any:
    """diffusers' ControlNetModel on the pipeline's device, in its dtype and with its attention.

    Its ``forward`` is the one inside diffusers' decorator.
    """
    module: Any = opened.load(LoadSpec.of(pipeline.dtype, pipeline.device))
    set_attention_backend(module, pipeline.attention_backend)
    inner = getattr(type(module).forward, "__wrapped__", None)
    if inner is not None:
        module.forward = MethodType(inner, module)
    return move_module(module, memory_format=torch.channels_last) if pipeline.channels_last else module
