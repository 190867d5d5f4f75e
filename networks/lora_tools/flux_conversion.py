"""A LoRA file for FLUX.1 or Chroma under the names of another program.

Diffusers, PEFT and AI-toolkit have query, key and value (and the feed-forward part of single blocks) as layers of their
own and no alpha; what these layers do stays exactly the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.console import say
from library.devices import parse_dtype
from library.errors import UserError
from library.safetensors_io import content_hashes, save_one_by_one
from networks.adapters.lora_file import PEFT_METADATA, SPLIT_MARK, LoRAWeights, state_dict_of
from networks.adapters.lora_formats import swap_halves
from networks.adapters.lora_targets import Target
from networks.lora_flux import CLIP_L, LAST_MODULATION, T5XXL, diffusers_paths
from networks.lora_tools.arithmetic import strength, with_storable_alpha
from networks.lora_tools.flux_lora import FluxLoRA
from networks.lora_tools.flux_metadata import flux_entries
from networks.lora_tools.metadata import network_entries
from networks.lora_tools.options import tell_saved

if TYPE_CHECKING:
    from networks.lora_tools.flux_options import ConversionOptions

SAME = {"diffusers": "ai-toolkit", "peft": "ai-toolkit"}
ENCODER_FOLDERS = {CLIP_L.prefix: "text_encoder", T5XXL.prefix: "text_encoder_2"}
COMFYUI_ENCODERS = {CLIP_L.prefix: "text_encoders.clip_l.transformer", T5XXL.prefix: "text_encoders.t5xxl.transformer"}
STALE_METADATA = ("sshs_", "modelspec.hash", PEFT_METADATA)


def convert(options: ConversionOptions, save_to: Path) -> None:
    """Write the file; module by module, so that memory holds little more than one. Raises UserError before that."""
    lora = FluxLoRA(str(options.src_path), "--src_path")
    lora.require_known()
    _check_source(lora, options.src)
    destination = SAME.get(options.dst, options.dst)
    dtype = parse_dtype(options.save_precision) if options.save_precision else None
    made = ConvertedTensors(lora, destination, dtype)
    if made.described.keys() == set(lora.checkpoint) and dtype is None:
        raise UserError(
            f"--dst: {lora.path} has the names of {options.dst} already; name the program that the file is to be for."
        )
    _tell_of_encoders(lora, destination)
    metadata = converted_metadata(lora, made, options.dst, options.no_metadata)
    if destination == "sd-scripts":
        hashes = content_hashes(made.described, metadata, made.load)
        metadata |= dict(zip(("sshs_model_hash", "sshs_legacy_hash"), hashes))
    save_one_by_one(made.described, made.load, save_to, metadata)
    tell_saved(save_to, [len(weights.down) for weights in made.modules.values()])


def _check_source(lora: FluxLoRA, source: str | None) -> None:
    """Raises UserError when the file's names are not those that ``--src`` says."""
    wanted = SAME.get(str(source), source)
    if wanted is not None and lora.dialects != {wanted}:
        raise UserError(
            f"--src {source}: {lora.path} has the names of {' and '.join(sorted(lora.dialects))}; leave --src out, or "
            "give what the file is."
        )


def _tell_of_encoders(lora: FluxLoRA, destination: str) -> None:
    count = Counter(target.table.prefix for target in lora.targets.values())[T5XXL.prefix]
    if destination == "ai-toolkit" and count:
        say(f"{count} modules are for T5-XXL; Diffusers leaves them out when it loads the file")


def converted_metadata(lora: FluxLoRA, made: ConvertedTensors, dst: str, no_metadata: bool) -> dict[str, str]:
    """The file's own but for what is no longer true, with a word on the conversion; hashes are not in it.

    A file for sd-scripts also says what its readers look for. ``no_metadata`` leaves that alone.
    """
    entries = {} if no_metadata else {k: v for k, v in lora.metadata.items() if not k.startswith(STALE_METADATA)}
    if SAME.get(dst, dst) == "ai-toolkit":
        entries.pop(SPLIT_MARK, None)
    if not no_metadata:
        comment = f"converted from {' and '.join(sorted(lora.dialects))} to {dst}"
        entries["ss_training_comment"] = "; ".join(filter(None, (comment, entries.get("ss_training_comment"))))
    if dst == "sd-scripts":
        entries = {**flux_entries("flux"), **entries, **network_entries(made.modules)}
    elif "ss_network_dim" in entries:
        entries |= network_entries(made.modules)
    return entries


Tensors = dict[str, Tensor]
Writer = Callable[[Target, LoRAWeights, list[int]], Tensors]


def sd_scripts_tensors(target: Target, weights: LoRAWeights, rows: list[int]) -> Tensors:
    """``<name>.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``."""
    return state_dict_of({target.name: weights})


def comfyui_tensors(target: Target, weights: LoRAWeights, rows: list[int]) -> Tensors:
    """``diffusion_model.<path>.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``, as ComfyUI itself saves them."""
    prefix = COMFYUI_ENCODERS.get(target.table.prefix, "diffusion_model")
    return state_dict_of({f"{prefix}.{target.path}": weights})


def diffusers_tensors(target: Target, weights: LoRAWeights, rows: list[int]) -> Tensors:
    """``transformer.<path>.lora_A.weight`` and ``.lora_B.weight`` of each part, with alpha in the numbers."""
    down, up = scaled_factors(weights)
    if target.table.prefix in ENCODER_FOLDERS:
        names: tuple[str, ...] = (f"{ENCODER_FOLDERS[target.table.prefix]}.{target.path}",)
    else:
        names = tuple(f"transformer.{path}" for path in diffusers_paths(target.path))
    if target.path == LAST_MODULATION:
        up = swap_halves(up)
    parts = taken_apart(down, up, rows) if len(names) > 1 else [(down, up)]
    tensors: Tensors = {}
    for name, part in zip(names, parts):
        if part is not None:
            tensors |= {f"{name}.lora_A.weight": part[0], f"{name}.lora_B.weight": part[1]}
    return tensors


WRITERS: Mapping[str, Writer] = {
    "sd-scripts": sd_scripts_tensors,
    "comfyui": comfyui_tensors,
    "ai-toolkit": diffusers_tensors,
}


def scaled_factors(weights: LoRAWeights) -> tuple[Tensor, Tensor]:
    """``down`` and ``up`` with alpha / rank in them: powers of two go to both sides evenly, what is left to down.

    Multiplying by a power of two loses no digits.
    """
    of_down, of_up = strength(weights), 1.0
    while of_down > 0 and 2 * of_down < of_up:
        of_down, of_up = 2 * of_down, of_up / 2
    return _times(weights.down, of_down), _times(weights.up, of_up)


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else (tensor.double() * factor).to(tensor.dtype)


def taken_apart(down: Tensor, up: Tensor, rows: list[int]) -> list[tuple[Tensor, Tensor] | None]:
    """A joined layer's factors as those of its parts, which have ``rows`` rows each.

    Where each rank acts on one part alone, as ``split_qkv=True`` trains, a part gets its own ranks (None: it has none);
    else all parts share ``down``.
    """
    pieces = up.split(rows)
    acts_on = torch.stack([(piece != 0).any(dim=0) for piece in pieces])  # [parts, rank]
    if bool((acts_on.sum(dim=0) > 1).any()):
        return [(down, piece) for piece in pieces]
    owners = _owners(acts_on)
    apart: list[tuple[Tensor, Tensor] | None] = []
    for number, piece in enumerate(pieces):
        own = owners == number
        apart.append((down[own], piece[:, own]) if bool(own.any()) else None)
    return apart


def _owners(acts_on: Tensor) -> Tensor:
    """The part of each rank [rank]; one without any effect belongs to the part that its place suggests."""
    parts, rank = acts_on.shape
    places = torch.arange(rank) * parts // rank
    return torch.where(acts_on.any(dim=0), acts_on.int().argmax(dim=0), places)


class ConvertedTensors:
    """The tensors of the new file, made module by module when they are needed.

    ``described`` are they, ``modules`` the new file's modules, both on the meta device.
    """

    def __init__(self, lora: FluxLoRA, destination: str, dtype: torch.dtype | None):
        self.lora, self.writer, self.dtype = lora, WRITERS[destination], dtype
        self.has_alpha = destination != "ai-toolkit"
        self.described: Tensors = {}
        self.modules: dict[str, LoRAWeights] = {}
        self._module_of: dict[str, str] = {}
        self._alphas: Tensors = {}
        self._last: tuple[str, Tensors] = ("", {})
        for name in lora.modules:
            self._describe(name)

    def _describe(self, name: str) -> None:
        made = self._made(name)
        self._module_of |= dict.fromkeys(made, name)
        self._alphas |= {key: tensor for key, tensor in made.items() if key.endswith(".alpha")}
        described = {key: torch.empty_like(tensor, device="meta") for key, tensor in made.items()}
        self.described |= described
        for key, down in described.items():
            module, _, role = key.partition(".lora_")
            if role in ("down.weight", "A.weight"):
                up = described[f"{module}.lora_{'up' if role == 'down.weight' else 'B'}.weight"]
                self.modules[module] = LoRAWeights(down, up, float(made.get(f"{module}.alpha", len(down))))

    def load(self, key: str) -> Tensor:
        """A tensor by its key in the new file."""
        return self._alphas[key] if key in self._alphas else self._made(self._module_of[key])[key]

    def _made(self, name: str) -> Tensors:
        if self._last[0] != name:
            weights = self.lora.load(name)
            if self.has_alpha:
                weights = with_storable_alpha(weights, self.dtype or torch.float32)
            tensors = self.writer(self.lora.targets[name], weights, self.lora.rows(name))
            self._last = name, {key: self._stored(key, tensor) for key, tensor in tensors.items()}
        return self._last[1]

    def _stored(self, key: str, tensor: Tensor) -> Tensor:
        stored = tensor.contiguous() if self.dtype is None else tensor.to(self.dtype).contiguous()
        if not bool(torch.isfinite(stored.float()).all()):
            raise UserError(f'"{key}" holds numbers too large for {stored.dtype}; use --save_precision bf16 or float.')
        return stored
