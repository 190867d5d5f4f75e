"""LoRA files for HunyuanImage-2.1 under this suite's names (see ``stream_lora``)."""

from __future__ import annotations

import re
from collections.abc import Iterable

from library.models.hunyuan_image.checkpoint import BLOCK_LISTS, DIFFUSERS
from networks.adapters.lora_targets import TargetTable
from networks.lora_hunyuan_image import HUNYUAN_IMAGE, TRANSFORMER
from networks.lora_tools.metadata import file_entries
from networks.lora_tools.stream_lora import StreamLoRA

VERSION = "hunyuan-image-2.1"
"""Of the base model, as metadata name it."""
_LINEAR = {
    name: [path for path in table if "norm" not in path]
    for name, table in zip(BLOCK_LISTS, (DIFFUSERS.double, DIFFUSERS.single, DIFFUSERS.refiner))
}
_OUTER = [path for path in DIFFUSERS.outer if path not in ("img_in.proj", "byt5_in.layernorm")]
_OURS = re.compile(r"(^|[._])(double_blocks|single_blocks|time_in|txt_in|byt5_in|final_layer)[._]")
_COMFYUI = re.compile(r"_mlp[._]\d$|_mod[._]lin$|modulation[._]lin$|_attn\.(qkv|proj)$|[._](in|out)_layer$")


class HunyuanImageLoRA(StreamLoRA):
    """A LoRA file for HunyuanImage-2.1."""

    model_name = "HunyuanImage-2.1"
    rules = HUNYUAN_IMAGE
    entries = file_entries(VERSION, "networks.lora_hunyuan_image")
    joined = ("_attn_qkv",)
    feed_forward = ("_mlp.fc1", "_mlp.fc2")

    @staticmethod
    def layer_paths(blocks: int) -> Iterable[tuple[TargetTable, str]]:
        yield from ((TRANSFORMER, path) for path in _OUTER)
        for number in range(blocks):
            for name, paths in _LINEAR.items():
                yield from ((TRANSFORMER, f"{name}.{number}.{path}") for path in paths)

    @staticmethod
    def dialect_of(name: str) -> str:
        if name.startswith("lycoris_"):
            return "lycoris"
        if not _OURS.search(name):
            return "diffusers"
        if name.startswith("diffusion_model.") or _COMFYUI.search(name):
            return "comfyui"
        return "sd-scripts" if name.startswith("lora_unet_") else "original"
