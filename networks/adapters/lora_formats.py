"""Reading LoRA tensors under the key names of several programs.

A name is looked up in a list that is made from the modules of the model at hand, so nothing is guessed from the key
itself: ``lora_unet_...`` (kohya-ss/sd-scripts), ``transformer....lora_A`` (diffusers, PEFT, AI-toolkit),
``diffusion_model....`` (ComfyUI). What diffusers keeps as separate q, k, v (and mlp) layers is joined into one module.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from library.errors import UserError
from networks.adapters.lora_file import PEFT_METADATA, LoRAWeights
from networks.adapters.lora_targets import Family, Part, Target

_ROLES = {
    "down": r"(?:\.lora_down|\.lora_A(?:\.default)?|(?:[._]lora|\.lora_linear_layer)?\.down)(?:\.weight)?",
    "up": r"(?:\.lora_up|\.lora_B(?:\.default)?|(?:[._]lora|\.lora_linear_layer)?\.up)(?:\.weight)?",
    "alpha": r"\.alpha",
}
KEY = re.compile(r"(?P<module>.+?)(?:" + "|".join(f"(?P<{role}>{end})" for role, end in _ROLES.items()) + r")$")
_OTHER_METHODS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_w1_a": "LoHa", "lokr_w1": "LoKr"}
_OTHER_METHODS |= {"lokr_w1_a": "LoKr", "oft_blocks": "OFT", "oft_diag": "OFT", "lora_mid": "Tucker-decomposed LoCon"}


def read_modules(
    tensors: Mapping[str, Tensor],
    targets: Iterable[Target],
    family: Family,
    metadata: Mapping[str, str] | None = None,
) -> tuple[dict[str, LoRAWeights], list[str]]:
    """The modules in ``tensors`` by LoRA name, and the keys that belong to no target or to an incomplete module.

    ``metadata`` is the file's; it says alpha where the tensors do not (see ``peft_alpha``).
    Raises UserError when the tensors belong to another method (DoRA, LoHa, LoKr, OFT).
    """
    known = {alias: (target, part) for target in targets for alias, part in _names(target, family)}
    entries: dict[tuple[str, Part], dict[str, str]] = defaultdict(dict)
    by_name: dict[str, Target] = {}
    unexpected = []
    for key in tensors:
        match = KEY.match(key)
        found = known.get(without_wrapper(match["module"])) if match else None
        if match is None or found is None:
            refuse_other_methods(key)
            unexpected.append(key)
            continue
        target, part = found
        by_name[target.name] = target
        entries[target.name, part][str(match.lastgroup)] = key
    parts: dict[str, dict[Part, LoRAWeights]] = defaultdict(dict)
    for (name, part), keys in entries.items():
        if "down" in keys and "up" in keys:
            down, up = tensors[keys["down"]], tensors[keys["up"]]
            if "alpha" in keys:
                alpha = float(tensors[keys["alpha"]])
            else:
                module = str(KEY.match(keys["down"])["module"])  # type: ignore[index]
                alpha = peft_alpha(metadata or {}, without_wrapper(module), len(down)) or float(len(down))
            parts[name][part] = LoRAWeights(down, up, alpha)
        else:
            unexpected.extend(keys.values())
    return {name: _joined(by_name[name], found_parts, family) for name, found_parts in parts.items()}, unexpected


def _names(target: Target, family: Family) -> Iterable[tuple[str, Part]]:
    yield target.name, None
    yield from family.aliases(target)


def peft_alpha(metadata: Mapping[str, str], module: str, rank: int) -> float | None:
    """The alpha of a module that diffusers and PEFT keep in the metadata, as kohya's: what counts is alpha / rank.

    ``module`` is its name in the file, "transformer.x_embedder". None where nothing is said.
    """
    try:
        settings = dict(json.loads(metadata.get(PEFT_METADATA, "{}")))
    except (ValueError, TypeError):
        return None
    model, _, path = module.partition(".")
    prefix = f"{model}." if f"{model}.lora_alpha" in settings else ""
    alpha = settings.get(f"{prefix}lora_alpha")
    for pattern, own in (settings.get(f"{prefix}alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path if prefix else module):
            alpha = own
            break  # as PEFT: the first pattern that fits
    if alpha is None:
        return None
    return float(alpha) * (math.sqrt(rank) if settings.get(f"{prefix}use_rslora") else 1.0)


def without_wrapper(module: str) -> str:
    """A module's name without what PEFT and data parallelism put before it."""
    for wrapper in ("base_model.model.", "module."):
        module = module.removeprefix(wrapper)
    return module


def refuse_other_methods(key: str) -> None:
    """Raises UserError when ``key`` belongs to a method that is not LoRA."""
    method = next((method for part, method in _OTHER_METHODS.items() if part in key.split(".")), None)
    if method:
        raise UserError(f'the file holds {method} weights ("{key}"), which are not LoRA and cannot be read here.')


def _joined(target: Target, parts: Mapping[Part, LoRAWeights], family: Family) -> LoRAWeights:
    """One module of separately trained parts: downs stacked, ups on the diagonal, zeros for a part that is missing."""
    whole = whole_module(parts)
    if whole is not None:
        return whole
    rows = family.split(target) or []
    found = [(index, parts[index]) for index in range(len(rows)) if index in parts]
    return join_parts([weights for _, weights in found], [index for index, _ in found], rows)


def whole_module(parts: Mapping[Part, LoRAWeights]) -> LoRAWeights | None:
    """The module that stands for the whole layer, its rows in the original order; None where there are only parts."""
    if "swapped" in parts:
        return parts["swapped"]._replace(up=swap_halves(parts["swapped"].up))
    return parts.get(None)


def swap_halves(up: Tensor) -> Tensor:
    """An up with the halves of its rows exchanged."""
    first, second = up.chunk(2)
    return torch.cat((second, first))


def join_parts(parts: Sequence[LoRAWeights], positions: Sequence[int], rows: Sequence[int]) -> LoRAWeights:
    """``parts[i]`` acts on rows number ``positions[i]``, and whole further ones, of a layer of ``rows``.

    The result has the sum of the ranks. Where all parts have one strength, no number is changed: alpha is that strength
    times the rank. Else strengths are folded into the ups.
    """
    rank = sum(len(weights.down) for weights in parts)
    strengths = [weights.alpha / len(weights.down) for weights in parts]
    strength = strengths[0] if len(set(strengths)) == 1 else 1.0
    dtype = functools.reduce(torch.promote_types, (weights.up.dtype for weights in parts))
    up = torch.zeros(sum(rows), rank, dtype=dtype, device=parts[0].up.device)
    column = 0
    for weights, position, own in zip(parts, positions, strengths):
        top, (height, width) = sum(rows[:position]), weights.up.shape
        if height not in accumulate(rows[position:]) or width != len(weights.down):
            raise UserError(
                f"the file has an up matrix of shape {list(weights.up.shape)} where this model needs"
                f" {[rows[position], len(weights.down)]}; it was made for another model."
            )
        factor = 1.0 if own == strength else own / strength
        up[top : top + height, column : column + width] = weights.up.to(dtype) * factor
        column += width
    return LoRAWeights(torch.cat([weights.down for weights in parts]), up, strength * rank)
