"""Names of tensors in original (LDM, OpenCLIP) checkpoints and in Diffusers and Hugging Face models, as tables.

A table maps the path of a module in the original to its path in the other; a tensor's name is found by the longest path
that begins it. ``inverted`` gives the way back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from library.models.loading import Origin

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
UNET_OUTER = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "middle_block.1": "mid_block.attentions.0",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
AUTOENCODER_MIDDLE = {
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
    "mid.attn_1.q": "mid_block.attentions.0.to_q",
    "mid.attn_1.k": "mid_block.attentions.0.to_k",
    "mid.attn_1.v": "mid_block.attentions.0.to_v",
    "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
# Diffusers before version 0.15 wrote the autoencoder's attention under these names.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
OPEN_CLIP_OUTER = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
}


def renamed(name: str, table: Mapping[str, str]) -> str | None:
    """``name`` with the longest path that is in ``table`` replaced; None where no part of it is."""
    path = name
    while path not in table:
        path, dot, _ = path.rpartition(".")
        if not dot:
            return None
    return table[path] + name[len(path) :]


def inverted(table: Mapping[str, str]) -> dict[str, str]:
    """The table of the way back."""
    return {theirs: ours for ours, theirs in table.items()}


def unet_table(layers: int, attention: Sequence[bool]) -> dict[str, str]:
    """Original paths -> Diffusers paths of a U-Net with ``layers`` ResNet blocks per level on the way down.

    ``attention`` tells for each level, the finest first, whether its blocks have transformers.
    """
    table = dict(UNET_OUTER)
    last = len(attention) - 1

    def add_resnet(original: str, diffusers: str) -> None:
        table.update({f"{original}.{ours}": f"{diffusers}.{theirs}" for ours, theirs in RESNET.items()})

    add_resnet("middle_block.0", "mid_block.resnets.0")
    add_resnet("middle_block.2", "mid_block.resnets.1")
    for level, has_attention in enumerate(attention):
        for layer in range(layers):
            block = f"input_blocks.{1 + level * (layers + 1) + layer}"
            add_resnet(f"{block}.0", f"down_blocks.{level}.resnets.{layer}")
            if has_attention:
                table[f"{block}.1"] = f"down_blocks.{level}.attentions.{layer}"
        if level < last:
            table[f"input_blocks.{(level + 1) * (layers + 1)}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
    for level, has_attention in enumerate(reversed(attention)):
        for layer in range(layers + 1):
            block = f"output_blocks.{level * (layers + 1) + layer}"
            add_resnet(f"{block}.0", f"up_blocks.{level}.resnets.{layer}")
            if has_attention:
                table[f"{block}.1"] = f"up_blocks.{level}.attentions.{layer}"
        if level < last:
            table[f"{block}.{1 + has_attention}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return table


def unet_topology(names: Iterable[str]) -> tuple[int, tuple[bool, ...]]:
    """``layers`` and ``attention`` of ``unet_table``, inferred from the tensor names of an original U-Net."""
    blocks: dict[int, set[str]] = {}
    for name in names:
        match = re.match(r"input_blocks\.(\d+)\.(.+)", name)
        if match:
            blocks.setdefault(int(match[1]), set()).add(match[2])
    downsamplers = [number for number in sorted(blocks) if any(rest.startswith("0.op.") for rest in blocks[number])]
    layers = (downsamplers[0] if downsamplers else len(blocks)) - 1
    starts = [1, *(number + 1 for number in downsamplers)]
    return layers, tuple(any(rest.startswith("1.") for rest in blocks.get(start, ())) for start in starts)


def autoencoder_table(levels: int, layers: int) -> dict[str, str]:
    """Original paths -> Diffusers paths of a VAE; Diffusers counts the decoder's levels from the coarsest."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        table.update({f"{half}.{ours}": f"{half}.{theirs}" for ours, theirs in AUTOENCODER_MIDDLE.items()})
    for level in range(levels):
        halves = (
            (f"encoder.down.{level}", f"encoder.down_blocks.{level}", "downsample", layers),
            (f"decoder.up.{level}", f"decoder.up_blocks.{levels - 1 - level}", "upsample", layers + 1),
        )
        for ours, theirs, resample, count in halves:
            for layer in range(count):
                table[f"{ours}.block.{layer}"] = f"{theirs}.resnets.{layer}"
                table[f"{ours}.block.{layer}.nin_shortcut"] = f"{theirs}.resnets.{layer}.conv_shortcut"
            table[f"{ours}.{resample}"] = f"{theirs}.{resample}rs.0"
    return table


def open_clip_table(layers: int) -> dict[str, str]:
    """OpenCLIP paths -> transformers paths of a text encoder; ``open_clip_origins`` has the rest."""
    table = dict(OPEN_CLIP_OUTER)
    for layer in range(layers):
        ours, theirs = f"transformer.resblocks.{layer}", f"text_model.encoder.layers.{layer}"
        table.update({f"{ours}.{part}": f"{theirs}.{name}" for part, name in OPEN_CLIP_LAYER.items()})
    return table


def open_clip_origins(shapes: Mapping[str, tuple[int, ...]], layers: int) -> dict[str, Origin]:
    """Where a transformers text encoder finds its tensors among those of an OpenCLIP file with these ``shapes``.

    Query, key and value are the thirds of one matrix. The projection of the pooled text is a parameter P that is used
    as ``x @ P``, where a linear layer holds the transposed; some files hold the layer.
    """
    table = open_clip_table(layers)
    origins = {}
    for name, shape in shapes.items():
        path, _, kind = name.rpartition(".")
        new = renamed(name, table)
        if new is not None:
            origins[new] = Origin((name,))
        elif kind in ("in_proj_weight", "in_proj_bias"):
            layer = path.removeprefix("transformer.resblocks.").removesuffix(".attn")
            for index, part in enumerate(("q", "k", "v")):
                target = f"text_model.encoder.layers.{layer}.self_attn.{part}_proj.{kind.removeprefix('in_proj_')}"
                origins[target] = Origin((name,), rows=(index * shape[0] // 3, (index + 1) * shape[0] // 3))
        elif name == "positional_embedding":
            origins["text_model.embeddings.position_embedding.weight"] = Origin((name,))
        elif name == "text_projection":
            origins["text_projection.weight"] = Origin((name,), transposed, (shape[1], shape[0]))
        elif name == "text_projection.weight.weight":
            origins["text_projection.weight"] = Origin((name,))
    return origins


def transposed(matrix: Tensor) -> Tensor:
    """Rows and columns exchanged, in memory of its own order."""
    return matrix.t().contiguous()
