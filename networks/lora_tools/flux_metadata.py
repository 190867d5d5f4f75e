"""What every LoRA file and model of FLUX.1 or Chroma says about itself."""

from __future__ import annotations

from library.modelspec import standard_entries
from networks.lora_tools.metadata import file_entries


def flux_entries(variant: str = "dev") -> dict[str, str]:
    """The entries without which programs do not know a LoRA file; ``variant`` is a transformer's."""
    return file_entries("chroma" if variant == "chroma" else "flux1", "networks.lora_flux")


def transformer_entries(variant: str) -> dict[str, str]:
    """The modelspec entries that follow from a transformer's ``variant`` (dev, schnell, chroma)."""
    entries = standard_entries(flux_entries(variant)["ss_base_model_version"])
    if variant == "schnell":
        entries["modelspec.architecture"] = "flux-1-schnell"
    return entries
