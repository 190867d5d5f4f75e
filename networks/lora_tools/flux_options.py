"""Options of the tools for LoRA files of FLUX.1 and Chroma; imports no torch, so that ``--help`` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from networks.lora_tools.options import Precision

Source = Literal["sd-scripts", "ai-toolkit", "diffusers", "peft", "comfyui", "onetrainer", "xlabs", "bfl"]
Destination = Literal["sd-scripts", "ai-toolkit", "diffusers", "peft", "comfyui"]


@dataclass
class ConversionOptions:
    """Files and formats"""

    src_path: str | None = None
    """LoRA file to convert."""
    dst_path: str | None = None
    """File to write."""
    src: Source | None = None
    """Program whose key names the file has; unset finds out by itself, and what is given is checked."""
    dst: Destination = "sd-scripts"
    """Program whose key names are written; ai-toolkit, diffusers and peft are one and the same."""
    save_precision: Precision | None = None
    """Dtype of the file; unset keeps that of each matrix."""
    no_metadata: bool = False
    """Write only the metadata that is needed to use the file."""


@dataclass
class FluxMergeTargets:
    """Models"""

    flux_model: str | None = None
    """Transformer to merge into: a file in any layout or a Diffusers folder; unset merges the files into one LoRA."""
    clip_l: str | None = None
    """CLIP-L to merge into."""
    t5xxl: str | None = None
    """T5-XXL to merge into."""
    clip_l_save_to: str | None = None
    """File to write the merged CLIP-L to."""
    t5xxl_save_to: str | None = None
    """File to write the merged T5-XXL to."""


@dataclass
class FluxMergeNumbers:
    """Numbers and metadata"""

    precision: Precision = "float"
    """Dtype that results are rounded to; sums are computed in at least float32 whatever it is."""
    save_precision: str | None = None
    """Dtype of the files: float, fp16, bf16, for models also fp8; unset: --precision, models keep theirs."""
    loading_device: str = "cpu"
    """Accepted for kohya-ss/sd-scripts' command lines: tensors are read one at a time, where they are added to."""
    working_device: str = "cpu"
    """Device to compute on, such as cuda."""
    mem_eff_load_save: bool = False
    """Accepted for kohya-ss/sd-scripts' command lines: models are always read and written one tensor at a time."""
    diffusers: bool = False
    """Accepted for kohya-ss/sd-scripts' command lines: files with the names of other programs are always read."""
    no_metadata: bool = False
    """Write only the metadata that is needed to use the file."""
