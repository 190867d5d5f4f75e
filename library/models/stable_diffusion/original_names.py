"""The layers of a diffusers U-Net in the module tree of the original (LDM) code.

LoRA files for SDXL name modules by their paths in the original code, and network modules find their targets by classes
that are called Transformer2DModel, ResnetBlock2D, Downsample2D and Upsample2D. What is changed through the tree (a
layer's forward, a weight) is changed in the diffusers model, since the layers are the same objects.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class OriginalUNet(nn.Module):
    """The root of the tree; it computes nothing by itself."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.time_embed = _embedding(unet.time_embedding)
        if getattr(unet, "add_embedding", None) is not None:
            self.label_emb = nn.ModuleList([_embedding(unet.add_embedding)])
        self.input_blocks = nn.ModuleList(_input_blocks(unet))
        self.middle_block = nn.ModuleList(_middle_block(unet.mid_block))
        self.output_blocks = nn.ModuleList(_output_blocks(unet))
        self.out = nn.ModuleList([unet.conv_norm_out, unet.conv_act, unet.conv_out])


class ResnetBlock2D(nn.Module):
    """The layers of one of diffusers' blocks of that name."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.in_layers = nn.ModuleList([block.norm1, block.nonlinearity, block.conv1])
        self.emb_layers = nn.ModuleList([block.nonlinearity, block.time_emb_proj])
        self.out_layers = nn.ModuleList([block.norm2, block.nonlinearity, block.dropout, block.conv2])
        self.skip_connection = nn.Identity() if block.conv_shortcut is None else block.conv_shortcut


class Downsample2D(nn.Module):
    """Half the size; the layer is called ``op``."""

    def __init__(self, sampler: Any) -> None:
        super().__init__()
        self.op = sampler.conv


class Upsample2D(nn.Module):
    """Twice the size; the layer is called ``conv``."""

    def __init__(self, sampler: Any) -> None:
        super().__init__()
        self.conv = sampler.conv


def under_original_names(unet: Any) -> OriginalUNet:
    """A module tree that holds the very layers of ``unet``, diffusers' UNet2DConditionModel, under LDM paths.

    ``input_blocks.4.1.transformer_blocks.0.attn1.to_q``, ``input_blocks.3.0.op``, ``output_blocks.2.2.conv``,
    ``middle_block.0.in_layers.2``, ``time_embed.0``, ``label_emb.0.0``, ``out.2``; below a Transformer2DModel both
    trees have the same names. The tree is for finding layers: it cannot be called, and is no part of the U-Net's state.
    """
    return OriginalUNet(unet)


def _embedding(embedding: Any) -> nn.ModuleList:
    return nn.ModuleList([embedding.linear_1, embedding.act, embedding.linear_2])


def _stages(block: Any) -> list[list[nn.Module]]:
    """Per ResNet of a diffusers block the ResNet and, where there is one, the transformer behind it."""
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    pairs = zip(block.resnets, attentions)
    return [[ResnetBlock2D(resnet), *([] if attention is None else [attention])] for resnet, attention in pairs]


def _input_blocks(unet: Any) -> list[nn.ModuleList]:
    stages: list[list[nn.Module]] = [[unet.conv_in]]
    for block in unet.down_blocks:
        stages += _stages(block)
        stages += [[Downsample2D(sampler)] for sampler in block.downsamplers or ()]
    return [nn.ModuleList(stage) for stage in stages]


def _middle_block(block: Any) -> list[nn.Module]:
    first, *rest = block.resnets
    modules: list[nn.Module] = [ResnetBlock2D(first)]
    for attention, resnet in zip(block.attentions, rest):
        modules += [attention, ResnetBlock2D(resnet)]
    return modules


def _output_blocks(unet: Any) -> list[nn.ModuleList]:
    stages: list[list[nn.Module]] = []
    for block in unet.up_blocks:
        stages += _stages(block)
        stages[-1] += [Upsample2D(sampler) for sampler in block.upsamplers or ()]
    return [nn.ModuleList(stage) for stage in stages]
