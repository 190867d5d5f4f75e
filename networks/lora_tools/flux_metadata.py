"""What every LoRA file and model of FLUX.1 or Chroma says about itself."""

from __future__ import annotations

from library.modelspec import standard_entries


def flux_entries(variant: str = "dev") -> dict[str, str]:
    """The entries without which programs do not know a LoRA file; ``variant`` is a transformer's."""
    version = "chroma" if variant == "chroma" else "flux1"
    return {"ss_v2": "False", "ss_base_model_version": version, "ss_network_module": "networks.lora_flux"}


def transformer_entries(variant: str) -> dict[str, str]:
    """The modelspec entries that follow from a transformer's ``variant`` (dev, schnell, chroma)."""
    entries = standard_entries(flux_entries(variant)["ss_base_model_version"])
    if variant == "schnell":
        entries["modelspec.architecture"] = "flux-1-schnell"
    return entries
