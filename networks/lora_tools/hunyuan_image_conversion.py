"""A LoRA file for HunyuanImage-2.1 under ComfyUI's names or those of sd-scripts.

Both have a module for each layer, so that only names differ and no bit changes. What other programs have in parts is
joined.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from library.console import say
from library.safetensors_io import content_hashes, save_one_by_one
from networks.adapters.lora_file import PEFT_METADATA, state_dict_of
from networks.adapters.lora_formats import finite_numbers, single_number
from networks.adapters.lora_targets import Target
from networks.lora_hunyuan_image import TRANSFORMER, comfyui_path
from networks.lora_tools.hunyuan_image_lora import HunyuanImageLoRA
from networks.lora_tools.options import tell_saved

HASHES = ("sshs_model_hash", "sshs_legacy_hash")
STALE_METADATA = ("modelspec.hash", PEFT_METADATA)


def comfyui_name(target: Target) -> str:
    """``lora_unet_`` and ComfyUI's path of the layer."""
    return f"{TRANSFORMER.prefix}.{comfyui_path(target.path)}".replace(".", "_")


def convert(src_path: str, save_to: Path, reverse: bool = False) -> None:
    """Write the file ``src_path`` under ComfyUI's names, or with ``reverse`` under those of sd-scripts.

    Converted again the same way, a file stays as it is. Metadata are kept, hashes in them recomputed; a file for
    sd-scripts says what its readers look for. Raises UserError for modules that belong to no layer of HunyuanImage-2.1.
    """
    lora = HunyuanImageLoRA(src_path, "src_path")
    lora.require_known()
    made = RenamedTensors(lora, reverse)
    metadata = {key: value for key, value in lora.metadata.items() if not key.startswith(STALE_METADATA)}
    if reverse and "ss_base_model_version" not in metadata:
        metadata |= lora.entries
    if any(key in metadata for key in HASHES):
        metadata |= dict(zip(HASHES, content_hashes(made.described, metadata, made.load)))
    if made.described.keys() == set(lora.checkpoint):
        say(f"{lora.path} has the names of {'sd-scripts' if reverse else 'ComfyUI'} already; no name changes")
    save_one_by_one(made.described, made.load, save_to, metadata)
    tell_saved(save_to, made.ranks)


class RenamedTensors:
    """The tensors of the new file, each read or made when it is needed; ``described`` are they on the meta device."""

    def __init__(self, lora: HunyuanImageLoRA, reverse: bool):
        self.lora = lora
        self.described: dict[str, Tensor] = {}
        self.ranks: list[int] = []
        """Of the modules."""
        self._kept: dict[str, str] = {}
        self._made: dict[str, tuple[str, str]] = {}
        for module, target in lora.targets.items():
            name = target.name if reverse else comfyui_name(target)
            described = self._keep(module, name) or self._make(module, name)
            self.described |= described
            self.ranks.append(described[f"{name}.lora_down.weight"].shape[0])

    def _keep(self, module: str, name: str) -> dict[str, Tensor]:
        """A module whose tensors only get another name; empty for another one."""
        own, checkpoint = self.lora.whole(module), self.lora.checkpoint
        if own is None or None not in self.lora.parts[module] or PEFT_METADATA in self.lora.metadata:
            return {}
        down, up, alpha, _ = self.lora.keys[own]
        keys = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        if alpha is not None:
            keys[f"{name}.alpha"] = alpha
        self._kept |= keys
        return {
            new: torch.empty(checkpoint.shape(key), dtype=checkpoint.dtype(key), device="meta")
            for new, key in keys.items()
        }

    def _make(self, module: str, name: str) -> dict[str, Tensor]:
        """A module that is put together of its parts, or whose alpha stands in the metadata."""
        made = state_dict_of({name: self.lora.load(module)})
        self._made |= {key: (module, name) for key in made}
        return {key: torch.empty_like(tensor, device="meta") for key, tensor in made.items()}

    def load(self, key: str) -> Tensor:
        """A tensor by its key in the new file. Raises UserError when it holds infinity or NaN."""
        if key in self._kept:
            tensor = self.lora.checkpoint.load(self._kept[key])
            check = single_number if key.endswith(".alpha") else finite_numbers
            check(self._kept[key], tensor)
            return tensor
        module, name = self._made[key]
        return state_dict_of({name: self.lora.load(module)})[key]
