"""What every LoRA file for FLUX.1 or Chroma says about itself."""

from __future__ import annotations

from library.modelspec import standard_entries

NETWORK_MODULE = "networks.lora_flux"


def flux_entries(model_type: str, variant: str = "", standard: bool = False) -> dict[str, str]:
    """The entries without which programs do not know the file; with ``standard``, the modelspec's that follow.

    ``model_type`` is ``flux`` or ``chroma``, ``variant`` the transformer's (dev, schnell, chroma), "" for unknown.
    """
    version = "chroma" if model_type == "chroma" else "flux1"
    if not standard:
        return {"ss_v2": "False", "ss_base_model_version": version, "ss_network_module": NETWORK_MODULE}
    entries = standard_entries(version)
    if variant == "schnell":
        entries["modelspec.architecture"] = "flux-1-schnell"
    entries["modelspec.architecture"] += "/lora"
    return entries
