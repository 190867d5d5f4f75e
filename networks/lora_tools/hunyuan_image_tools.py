"""What the tools for LoRA files need to know of HunyuanImage-2.1."""

from __future__ import annotations

from library.models.hunyuan_image.checkpoint import open_transformer
from library.modelspec import standard_entries
from networks.lora_hunyuan_image import HUNYUAN_IMAGE
from networks.lora_tools.family_merge import MergeFamily, MergePart
from networks.lora_tools.hunyuan_image_lora import VERSION, HunyuanImageLoRA

MERGES = MergeFamily(
    lora=HunyuanImageLoRA,
    parts={
        "--dit": MergePart(
            HUNYUAN_IMAGE.transformer,
            open_transformer,
            HUNYUAN_IMAGE.known_extra_layers,
            lambda _: standard_entries(VERSION),
        ),
    },
)
