"""LoRA for HunyuanImage-2.1: which modules, which arguments, which names other programs use.

Files are those of kohya-ss/sd-scripts' ``networks.lora_hunyuan_image``: ``lora_unet_double_blocks_0_img_attn_qkv`` and
so on. Text encoders are not trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from library.models.hunyuan_image.checkpoint import BLOCK_LISTS, DIFFUSERS, LAST_MODULATION, SEPARATE, Layout
from networks.adapters.lora_arguments import choice, text
from networks.adapters.lora_core import LoRANetwork
from networks.adapters.lora_kind import LoRAKind
from networks.adapters.lora_module import LoRAModule
from networks.adapters.lora_targets import (
    BlockList,
    Part,
    Rules,
    Target,
    TargetTable,
    blocks_by_arguments,
    flat_names,
)
from networks.adapters.network_kind import same_rules

TRAINS_TEXT_ENCODERS = False

TRANSFORMER = TargetTable("lora_unet", "unet", ("MMDoubleStreamBlock", "MMSingleStreamBlock"))
JOINED = ("_attn_qkv", ".linear1")
"""Ends of the paths of layers that hold q, k, v (and the feed-forward part) together."""
OUTER = ("time_in", "txt_in", "byt5_in", "final_layer")
"""What files of other programs may hold beside the blocks."""
CHOICES = (
    BlockList("double_blocks", ("double",), "train_double_block_indices"),
    BlockList("single_blocks", ("single",), "train_single_block_indices"),
)
# What whole parts of paths are in ComfyUI.
_COMFYUI = (
    (re.compile(r"(_mod|\.modulation)\.linear$"), r"\1.lin"),
    (re.compile(r"_attn_(qkv|proj)$"), r"_attn.\1"),
    (re.compile(r"mlp\.fc1$"), "mlp.0"),
    (re.compile(r"mlp\.fc2$"), "mlp.2"),
    (re.compile(r"^(time_in|txt_in\.t_embedder)\.mlp\.0$"), r"\1.in_layer"),
    (re.compile(r"^(time_in|txt_in\.t_embedder)\.mlp\.2$"), r"\1.out_layer"),
    (re.compile(r"^txt_in\.c_embedder\.linear_1$"), "txt_in.c_embedder.in_layer"),
    (re.compile(r"^txt_in\.c_embedder\.linear_2$"), "txt_in.c_embedder.out_layer"),
)


def joined_rows(target: Target) -> list[int] | None:
    """Rows of q, k, v (and mlp) in the modules that hold them together."""
    if not target.path.endswith(JOINED):
        return None
    assert isinstance(target.module, nn.Linear)
    hidden = target.module.in_features
    rest = target.module.out_features - 3 * hidden
    return [hidden] * 3 + ([rest] if rest else [])


def comfyui_path(path: str) -> str:
    """What ComfyUI calls a layer of the original transformer."""
    for pattern, theirs in _COMFYUI:
        path = pattern.sub(theirs, path)
    return path


def diffusers_paths(path: str) -> tuple[str, ...]:
    """What diffusers calls a layer of the original transformer, or the parts of a joined one."""
    return paths_in(DIFFUSERS, path)


def paths_in(layout: Layout, path: str) -> tuple[str, ...]:
    """A layer of the original transformer in another layout, or the parts of a joined one; nothing if it is the same
    there."""
    if path in layout.outer:
        return layout.outer[path]
    for ours, theirs, table in zip(BLOCK_LISTS, layout.lists, (layout.double, layout.single, layout.refiner)):
        number, _, module = path.removeprefix(f"{ours}.").partition(".")
        if path.startswith(f"{ours}."):
            return tuple(f"{theirs}.{number}.{part}" for part in table.get(module, ()))
    return ()


def other_names(target: Target) -> Iterable[tuple[str, Part]]:
    """What ComfyUI, Tencent, diffusers, PEFT and LyCORIS call a module, or the parts of a joined one."""
    path = target.path
    for whole in dict.fromkeys((path, comfyui_path(path))):
        yield from _names_of(whole, None)
    for parts in (paths_in(SEPARATE, path), diffusers_paths(path)):
        for index, part in enumerate(parts):
            yield from _names_of(part, "swapped" if path == LAST_MODULATION else index if len(parts) > 1 else None)


def _names_of(path: str, part: Part) -> Iterable[tuple[str, Part]]:
    yield from ((f"{model}{path}", part) for model in ("", "transformer.", "diffusion_model."))
    yield from ((name, part) for name in flat_names(path, ("lora_unet", "lora_transformer", "lycoris")))


HUNYUAN_IMAGE = Rules(
    transformer=TRANSFORMER,
    text_encoders=(),
    selected=blocks_by_arguments(CHOICES),
    known_extra_layers=OUTER,
    split=joined_rows,
    aliases=other_names,
)
NETWORK = LoRAKind(
    "networks.lora_hunyuan_image",
    same_rules(HUNYUAN_IMAGE),
    {
        "train_blocks": choice("all", "single", "double"),
        "train_double_block_indices": text,
        "train_single_block_indices": text,
    },
    network_class=LoRANetwork,
    module_class=LoRAModule,
)
check_network_args = NETWORK.check_network_args
create_network = NETWORK.create_network
create_network_from_weights = NETWORK.create_network_from_weights
