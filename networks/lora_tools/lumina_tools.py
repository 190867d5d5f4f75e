"""What the tools for LoRA files need to know of Lumina Image 2.0."""

from __future__ import annotations

from library.models.gemma2 import open_gemma2
from library.models.lumina.checkpoint import open_transformer
from library.modelspec import standard_entries
from networks.lora_lumina import GEMMA_2, LUMINA, diffusers_paths
from networks.lora_tools.conversion import Conversions
from networks.lora_tools.family_merge import MergeFamily, MergePart
from networks.lora_tools.lumina_lora import VERSION, LuminaLoRA

MERGES = MergeFamily(
    lora=LuminaLoRA,
    parts={
        "--lumina_model": MergePart(
            LUMINA.transformer, open_transformer, LUMINA.known_extra_layers, lambda _: standard_entries(VERSION)
        ),
        "--gemma2": MergePart(GEMMA_2, open_gemma2),
    },
)
CONVERSIONS = Conversions(
    lora=LuminaLoRA,
    diffusers_paths=diffusers_paths,
    same={"diffusers": "diffusers", "peft": "diffusers"},
    encoder_folders={},
    comfyui_encoders={GEMMA_2.prefix: "text_encoders.gemma2_2b.transformer.model"},
)
