"""What the tools for LoRA files need to know of FLUX.1 and Chroma."""

from __future__ import annotations

from functools import partial

from library.models.clip import open_clip
from library.models.flux.checkpoint import open_transformer
from library.models.t5 import open_t5
from networks.lora_flux import CLIP_L, FLUX, LAST_MODULATION, T5XXL, diffusers_paths
from networks.lora_tools.conversion import Conversions
from networks.lora_tools.family_merge import MergeFamily, MergePart
from networks.lora_tools.flux_lora import FluxLoRA
from networks.lora_tools.flux_metadata import transformer_entries

MERGES = MergeFamily(
    lora=FluxLoRA,
    parts={
        "--flux_model": MergePart(
            FLUX.transformer,
            partial(open_transformer, model_type=None),
            FLUX.known_extra_layers,
            lambda opened: transformer_entries(opened.variant),
        ),
        "--clip_l": MergePart(CLIP_L, open_clip),
        "--t5xxl": MergePart(T5XXL, open_t5),
    },
)
CONVERSIONS = Conversions(
    lora=FluxLoRA,
    diffusers_paths=diffusers_paths,
    same={"diffusers": "ai-toolkit", "peft": "ai-toolkit"},
    encoder_folders={CLIP_L.prefix: "text_encoder", T5XXL.prefix: "text_encoder_2"},
    comfyui_encoders={
        CLIP_L.prefix: "text_encoders.clip_l.transformer",
        T5XXL.prefix: "text_encoders.t5xxl.transformer",
    },
    swapped=LAST_MODULATION,
    silent={T5XXL.prefix: "T5-XXL"},
)
