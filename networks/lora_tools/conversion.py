"""A LoRA file under the names of another program, for any family.

Diffusers and PEFT have query, key and value (and the feed-forward part of FLUX.1's single blocks) as layers of their
own and no alpha; what these layers do stays exactly the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.console import say, warn
from library.devices import parse_dtype
from library.errors import UserError
from library.safetensors_io import content_hashes, save_one_by_one
from networks.adapters.lora_file import PEFT_METADATA, SPLIT_MARK, LoRAWeights, state_dict_of
from networks.adapters.lora_formats import swap_halves
from networks.adapters.lora_targets import Target
from networks.lora_tools.arithmetic import strength, with_storable_alpha
from networks.lora_tools.known_lora import KnownLoRA
from networks.lora_tools.metadata import network_entries
from networks.lora_tools.options import tell_saved

if TYPE_CHECKING:
    from networks.lora_tools.options import ConversionFiles

STALE_METADATA = ("sshs_", "modelspec.hash", PEFT_METADATA)
Tensors = dict[str, Tensor]
Writer = Callable[[Target, LoRAWeights, list[int]], Tensors]


@dataclass(frozen=True)
class Conversions:
    """The names that other programs give one family's modules."""

    lora: type[KnownLoRA]
    diffusers_paths: Callable[[str], tuple[str, ...]]
    """What Diffusers calls a layer of the transformer, or the parts of a joined one."""
    same: Mapping[str, str]
    """The names of programs that have Diffusers' names -> the dialect by which ``lora`` knows these."""
    encoder_folders: Mapping[str, str]
    """Of text encoders whose modules Diffusers can load, by prefix: the name of the part in a pipeline."""
    comfyui_encoders: Mapping[str, str]
    """What stands before a text encoder's paths in ComfyUI, by prefix."""
    swapped: str = ""
    """The path of a layer the halves of whose rows Diffusers keeps in another order."""
    silent: Mapping[str, str] = field(default_factory=dict)
    """Of text encoders whose modules are converted but left out by Diffusers, by prefix: how messages name them."""

    def destination(self, name: str) -> str:
        """The dialect of a program."""
        return self.same.get(name, name)

    def is_diffusers(self, name: str) -> bool:
        """Whether a program has Diffusers' names."""
        return self.destination(name) in self.same.values()

    def holds(self, target: Target, destination: str) -> bool:
        """Whether a module has a name there."""
        prefix = target.table.prefix
        return not (target.table.is_text_encoder and self.is_diffusers(destination)) or prefix in self.encoder_folders

    def writer(self, destination: str) -> Writer:
        """What makes a module's tensors under the names of a program."""
        if self.is_diffusers(destination):
            return self.diffusers_tensors
        return self.comfyui_tensors if destination == "comfyui" else sd_scripts_tensors

    def comfyui_tensors(self, target: Target, weights: LoRAWeights, rows: list[int]) -> Tensors:
        """``diffusion_model.<path>.lora_down.weight``, ``.lora_up.weight``, ``.alpha``, as ComfyUI saves them."""
        prefix = self.comfyui_encoders.get(target.table.prefix, "diffusion_model")
        return state_dict_of({f"{prefix}.{target.path}": weights})

    def diffusers_tensors(self, target: Target, weights: LoRAWeights, rows: list[int]) -> Tensors:
        """``transformer.<path>.lora_A.weight`` and ``.lora_B.weight`` of each part, with alpha in the numbers."""
        down, up = scaled_factors(weights)
        if target.table.prefix in self.encoder_folders:
            names: tuple[str, ...] = (f"{self.encoder_folders[target.table.prefix]}.{target.path}",)
        else:
            names = tuple(f"transformer.{path}" for path in self.diffusers_paths(target.path))
        if target.path == self.swapped:
            up = swap_halves(up)
        parts = taken_apart(down, up, rows) if len(names) > 1 else [(down, up)]
        tensors: Tensors = {}
        for name, part in zip(names, parts):
            if part is not None:
                tensors |= {f"{name}.lora_A.weight": part[0], f"{name}.lora_B.weight": part[1]}
        return tensors


def convert(conversions: Conversions, files: ConversionFiles, src: str | None, dst: str, save_to: Path) -> None:
    """Write the file ``files.src_path``, which must have the names of ``src``, under those of ``dst``.

    It goes module by module, so that memory holds little more than one. Raises UserError before that.
    """
    lora = conversions.lora(str(files.src_path), "--src_path")
    lora.require_known()
    _check_source(conversions, lora, src)
    destination = conversions.destination(dst)
    _leave_out(conversions, lora, destination)
    dtype = parse_dtype(files.save_precision) if files.save_precision else None
    made = ConvertedTensors(conversions, lora, destination, dtype)
    if made.described.keys() == set(lora.checkpoint) and dtype is None:
        raise UserError(
            f"--dst: {lora.path} has the names of {dst} already; name the program that the file is to be for."
        )
    metadata = converted_metadata(conversions, lora, made, dst, files.no_metadata)
    if destination == "sd-scripts":
        hashes = content_hashes(made.described, metadata, made.load)
        metadata |= dict(zip(("sshs_model_hash", "sshs_legacy_hash"), hashes))
    save_one_by_one(made.described, made.load, save_to, metadata)
    tell_saved(save_to, [len(weights.down) for weights in made.modules.values()])


def _check_source(conversions: Conversions, lora: KnownLoRA, source: str | None) -> None:
    """Raises UserError when the file's names are not those that ``--src`` says."""
    if source is not None and lora.dialects != {conversions.destination(source)}:
        raise UserError(
            f"--src {source}: {lora.path} has the names of {' and '.join(sorted(lora.dialects))}; leave --src out, or "
            "give what the file is."
        )


def _leave_out(conversions: Conversions, lora: KnownLoRA, destination: str) -> None:
    """Say what Diffusers leaves out, and take what has no name there away. Raises UserError when nothing is left."""
    for prefix, name in conversions.silent.items():
        count = sum(target.table.prefix == prefix for target in lora.targets.values())
        if conversions.is_diffusers(destination) and count:
            say(f"{count} modules are for {name}; Diffusers leaves them out when it loads the file")
    nameless = [name for name, target in lora.targets.items() if not conversions.holds(target, destination)]
    if len(nameless) == len(lora.modules):
        raise UserError(
            f"{lora.path} holds modules of the text encoder alone, such as {nameless[0]}, which Diffusers cannot load;"
            " --dst comfyui converts them."
        )
    if nameless:
        warn(
            f"{len(nameless)} modules of the text encoder, such as {nameless[0]}, are left out, because Diffusers"
            " cannot load them; --dst comfyui keeps them"
        )
    lora.modules = [name for name in lora.modules if name not in set(nameless)]


def converted_metadata(
    conversions: Conversions, lora: KnownLoRA, made: ConvertedTensors, dst: str, no_metadata: bool
) -> dict[str, str]:
    """The file's own but for what is no longer true, with a word on the conversion; hashes are not in it.

    A file for sd-scripts also says what its readers look for. ``no_metadata`` leaves that alone.
    """
    entries = {} if no_metadata else {k: v for k, v in lora.metadata.items() if not k.startswith(STALE_METADATA)}
    if conversions.is_diffusers(dst):
        entries.pop(SPLIT_MARK, None)
    if not no_metadata:
        comment = f"converted from {' and '.join(sorted(lora.dialects))} to {dst}"
        entries["ss_training_comment"] = "; ".join(filter(None, (comment, entries.get("ss_training_comment"))))
    if dst == "sd-scripts":
        entries = {**lora.entries, **entries, **network_entries(made.modules)}
    elif "ss_network_dim" in entries:
        entries |= network_entries(made.modules)
    return entries


def sd_scripts_tensors(target: Target, weights: LoRAWeights, rows: list[int]) -> Tensors:
    """``<name>.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``."""
    return state_dict_of({target.name: weights})


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

    def __init__(self, conversions: Conversions, lora: KnownLoRA, destination: str, dtype: torch.dtype | None):
        self.lora, self.writer, self.dtype = lora, conversions.writer(destination), dtype
        self.has_alpha = not conversions.is_diffusers(destination)
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
