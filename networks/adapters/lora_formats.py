"""Reading LoRA tensors under the key names of several programs.

A name is looked up in a list that is made from the modules of the model at hand, so nothing is guessed from the key
itself: ``lora_unet_...`` (kohya-ss/sd-scripts), ``transformer....lora_A`` (diffusers, PEFT, AI-toolkit),
``diffusion_model....`` (ComfyUI), ``lycoris_...`` (LyCORIS, SimpleTuner). What diffusers keeps as separate q, k, v (and
mlp) layers is joined into one module. Trainers, inference and tools all read a module with ``read_module``.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from library.checkpoints import require_finite
from library.errors import UserError
from library.safetensors_io import strict_json
from networks.adapters.lora_file import PEFT_METADATA, LoRAWeights, Magnitudes
from networks.adapters.lora_targets import Part, Rules, Target

# A PEFT adapter's name stands between lora_A and weight.
_ROLES = {
    "down": r"(?:\.lora_down|\.lora_A(?:\.(?:default$|[^.]+(?=\.weight$)))?|(?:[._]lora|\.lora_linear_layer)?\.down)",
    "up": r"(?:\.lora_up|\.lora_B(?:\.(?:default$|[^.]+(?=\.weight$)))?|(?:[._]lora|\.lora_linear_layer)?\.up)",
    "alpha": r"\.alpha",
    "magnitudes": r"(?:\.dora_scale|\.lora_magnitude_vector(?:\.[^.]+(?=\.weight$)|\.default$)?(?:\.weight)?)",
}
KEY = re.compile(
    rf"(?P<module>.+?)(?:(?P<down>{_ROLES['down']}(?:\.weight)?)|(?P<up>{_ROLES['up']}(?:\.weight)?)"
    rf"|(?P<alpha>{_ROLES['alpha']})|(?P<magnitudes>{_ROLES['magnitudes']}))$"
)
_OTHER_METHODS = {"hada_w1_a": "LoHa", "lokr_w1": "LoKr"}
_OTHER_METHODS |= {"lokr_w1_a": "LoKr", "oft_blocks": "OFT", "oft_diag": "OFT", "lora_mid": "Tucker-decomposed LoCon"}
# What PEFT and data parallelism put before a module's name, or between the model and the path in it.
_WRAPPERS = re.compile(
    r"^(?P<model>(?:transformer|unet|text_encoder(?:_\d)?|diffusion_model)\.)?(?:base_model\.model\.|module\.)+"
)
# Regular expressions of PEFT's settings that could take for ever: repeated groups, or many repetitions.
_SLOW_PATTERN = re.compile(r"\)[*+?{]|(?:[*+}].*){4}|.{300}", re.DOTALL)


class ModuleKeys(NamedTuple):
    """The keys of one module's tensors."""

    down: str
    up: str
    alpha: str | None
    magnitudes: str | None = None
    """Of DoRA."""


def grouped_keys(keys: Iterable[str]) -> tuple[dict[str, ModuleKeys], list[str]]:
    """The modules of a file by the names it gives them, and the keys that belong to no module with both factors.

    Raises UserError for keys of another method (LoHa, LoKr, OFT), for a module that stands in the file twice, and for
    DoRA's scales without factors.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    others = []
    for key in keys:
        match = KEY.match(key)
        if match is None:
            refuse_other_methods(key)
            others.append(key)
            continue
        role, own = str(match.lastgroup), found[match["module"]]
        if role in own:
            raise UserError(
                f'the file holds a module twice, as "{own[role]}" and "{key}"; a file with one adapter is needed.'
            )
        own[role] = key
    modules = {}
    for name, roles in found.items():
        if "down" in roles and "up" in roles:
            modules[name] = ModuleKeys(roles["down"], roles["up"], roles.get("alpha"), roles.get("magnitudes"))
        elif "magnitudes" in roles:
            raise UserError(f'the file holds DoRA scales without the LoRA that they are for ("{roles["magnitudes"]}").')
        else:
            others.extend(roles.values())
    return modules, others


def check_shapes(name: str, down: Sequence[int], up: Sequence[int]) -> None:
    """Raises UserError unless the shapes are those of two factors of a Linear or Conv2d, with a rank of 1 or more."""
    fits = len(down) in (2, 4) and len(up) in (2, 4) and down[0] == up[1] and 0 not in (*down, *up)
    if not fits or any(size != 1 for size in up[2:]):
        raise UserError(
            f"the matrices of {name}, {list(up)} and {list(down)}, do not fit together; the file is damaged or holds"
            " something other than LoRA."
        )


def read_module(
    load: Callable[[str], Tensor], name: str, keys: ModuleKeys, metadata: Mapping[str, str] | None = None
) -> LoRAWeights:
    """One module; ``load`` gives a tensor by its key, ``name`` is the module's in the file.

    Alpha is the module's own, else what PEFT's settings in the metadata say, else the rank. Factors in fp8, with which
    nothing can be computed, become bfloat16, which holds the same numbers. Raises UserError for factors that do not fit
    together and for anything that is not a finite number.
    """
    down, up = (finite_numbers(key, load(key)) for key in (keys.down, keys.up))
    check_shapes(name, down.shape, up.shape)
    if keys.alpha is not None:
        alpha = single_number(keys.alpha, load(keys.alpha))
    else:
        alpha = peft_alpha(metadata or {}, plain_name(name), len(down)) or float(len(down))
    if keys.magnitudes is None:
        return LoRAWeights(down, up, alpha)
    scales = finite_numbers(keys.magnitudes, load(keys.magnitudes))
    return LoRAWeights(down, up, alpha, (_magnitudes(keys.magnitudes, scales, down, up),))


def _magnitudes(key: str, scales: Tensor, down: Tensor, up: Tensor) -> Magnitudes:
    """The scales of all rows; PEFT's of a Linear are [outputs]. Raises UserError for any other shape."""
    outputs, inputs = len(up), down.shape[1]
    if (
        (scales.numel() == outputs and scales.dim() == 1)
        or (scales.shape[:1] == (outputs,) and scales.numel() == outputs)
        or (scales.numel() == outputs != inputs and scales.shape[0] == 1)
    ):
        values = scales.reshape(outputs, *(1 for _ in down.shape[1:]))
    elif scales.numel() == inputs and scales.shape[0] == 1:
        values = scales.reshape(1, inputs, *(1 for _ in down.shape[2:]))
    else:
        raise UserError(
            f'"{key}" has the shape {list(scales.shape)}, where one number for each of {outputs} outputs or {inputs}'
            " inputs is needed."
        )
    return Magnitudes(slice(0, outputs), values)


def finite_numbers(key: str, tensor: Tensor) -> Tensor:
    """A tensor of a file that a network can be made of; fp8 becomes bfloat16. Raises UserError."""
    if not tensor.is_floating_point():
        raise UserError(f'"{key}" is of the dtype {tensor.dtype}, where floating-point numbers are needed.')
    numbers = tensor.bfloat16() if tensor.element_size() == 1 else tensor
    require_finite(key, numbers)
    return numbers


def single_number(key: str, tensor: Tensor) -> float:
    """The number in a tensor of a file, such as alpha. Raises UserError unless it is one, and finite in float32."""
    if tensor.numel() != 1 or tensor.is_complex():
        raise UserError(f'"{key}" has the shape {list(tensor.shape)}, where one real number is needed.')
    number = float(tensor.double())
    require_finite(key, torch.tensor(number, dtype=torch.float32))
    return number


def read_modules(
    tensors: Mapping[str, Tensor],
    targets: Iterable[Target],
    rules: Rules,
    metadata: Mapping[str, str] | None = None,
) -> tuple[dict[str, LoRAWeights], list[str]]:
    """The modules in ``tensors`` by LoRA name, and the keys that belong to no target or to an incomplete module.

    ``metadata`` is the file's; it says alpha where the tensors do not (see ``peft_alpha``). Raises UserError as
    ``grouped_keys`` and ``read_module`` do.
    """
    known = {alias: (target, part) for target in targets for alias, part in _names(target, rules)}
    modules, others = grouped_keys(tensors)
    unexpected = set(others)
    by_name: dict[str, Target] = {}
    parts: dict[str, dict[Part, LoRAWeights]] = defaultdict(dict)
    for name, keys in modules.items():
        found = known.get(plain_name(name))
        if found is None:
            unexpected.update(key for key in keys if key is not None)
            continue
        target, part = found
        by_name[target.name] = target
        refuse_repetition(target.name, part, parts[target.name])
        parts[target.name][part] = read_module(tensors.__getitem__, name, keys, metadata)
    joined = {name: _joined(by_name[name], found_parts, rules) for name, found_parts in parts.items()}
    return joined, [key for key in tensors if key in unexpected]


def refuse_repetition(name: str, part: Part, parts: Collection[Part]) -> None:
    """Raises UserError when ``part`` of a layer adds to ``parts`` what they hold already."""
    if part in parts or (parts and not all(isinstance(one, int) for one in (part, *parts))):
        raise UserError(f"the file holds {name} twice, under several names.")


def _names(target: Target, rules: Rules) -> Iterable[tuple[str, Part]]:
    yield target.name, None
    yield from rules.aliases(target)


def peft_alpha(metadata: Mapping[str, str], module: str, rank: int) -> float | None:
    """The alpha of a module that diffusers and PEFT keep in the metadata, as kohya's: what counts is alpha / rank.

    ``module`` is its name in the file, "transformer.x_embedder". None where nothing is said. Raises UserError for
    settings that cannot be read.
    """
    text = metadata.get(PEFT_METADATA)
    if not text:
        return None
    try:
        settings = strict_json(text)
        model, _, path = module.partition(".")
        prefix = f"{model}." if f"{model}.lora_alpha" in settings else ""
        alpha = settings.get(f"{prefix}lora_alpha")
        for pattern, own in (settings.get(f"{prefix}alpha_pattern") or {}).items():
            if _SLOW_PATTERN.search(pattern):
                raise ValueError(f"the pattern {pattern:.40} is too intricate")
            if re.match(rf"(.*\.)?({pattern})$", path if prefix else module):
                alpha = own
                break  # as PEFT: the first pattern that fits
        if alpha is None:
            return None
        value = float(alpha) * (math.sqrt(rank) if settings.get(f"{prefix}use_rslora") else 1.0)
        require_finite("lora_alpha", torch.tensor(value, dtype=torch.float32))
    except (UserError, ValueError, TypeError, AttributeError, OverflowError, RecursionError, re.error):
        raise UserError(f"the settings of PEFT in the metadata ({PEFT_METADATA}) give no alpha for {module}.") from None
    return value


def plain_name(module: str) -> str:
    """A module's name without what PEFT and data parallelism put into it, and without an underscore at its end."""
    return _WRAPPERS.sub(r"\g<model>", module).rstrip("_")


def refuse_other_methods(key: str) -> None:
    """Raises UserError when ``key`` belongs to a method that is not LoRA."""
    method = next((method for part, method in _OTHER_METHODS.items() if part in key.split(".")), None)
    if method:
        raise UserError(f'the file holds {method} weights ("{key}"), which are not LoRA and cannot be read here.')


def _joined(target: Target, parts: Mapping[Part, LoRAWeights], rules: Rules) -> LoRAWeights:
    """One module of separately trained parts: downs stacked, ups on the diagonal, zeros for a part that is missing."""
    whole = whole_module(parts)
    if whole is not None:
        return whole
    rows = rules.split(target) or []
    found = [(index, parts[index]) for index in range(len(rows)) if index in parts]
    return join_parts([weights for _, weights in found], [index for index, _ in found], rows)


def whole_module(parts: Mapping[Part, LoRAWeights]) -> LoRAWeights | None:
    """The module that stands for the whole layer, its rows in the original order; None where there are only parts."""
    if "swapped" in parts:
        return _swapped(parts["swapped"])
    return parts.get(None)


def _swapped(weights: LoRAWeights) -> LoRAWeights:
    magnitudes = tuple(
        part if part.values.shape[0] == 1 else part._replace(values=swap_halves(part.values))
        for part in weights.magnitudes
    )
    return weights._replace(up=swap_halves(weights.up), magnitudes=magnitudes)


def swap_halves(up: Tensor) -> Tensor:
    """An up with the halves of its rows exchanged."""
    if len(up) % 2:
        raise UserError(f"the file has an up matrix of shape {list(up.shape)} where this model needs two halves.")
    first, second = up.chunk(2)
    return torch.cat((second, first))


def join_parts(parts: Sequence[LoRAWeights], positions: Sequence[int], rows: Sequence[int]) -> LoRAWeights:
    """``parts[i]`` acts on rows number ``positions[i]``, and whole further ones, of a layer of ``rows``.

    The result has the sum of the ranks. Where all parts have one strength, no number is changed: alpha is that strength
    times the rank. Else strengths are folded into the ups.
    """
    widths = {tuple(weights.down.shape[1:]) for weights in parts}
    if len(widths) > 1 or any(weights.up.dim() != 2 for weights in parts):
        raise UserError(
            "the file has matrices of different widths for the parts of one layer; it is damaged or was made for"
            " another model."
        )
    rank = sum(len(weights.down) for weights in parts)
    strengths = [weights.alpha / len(weights.down) for weights in parts]
    strength = strengths[0] if len(set(strengths)) == 1 else 1.0
    dtype = functools.reduce(torch.promote_types, (weights.up.dtype for weights in parts))
    up = torch.zeros(sum(rows), rank, dtype=dtype, device=parts[0].up.device)
    column, magnitudes = 0, []
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
        magnitudes += [part._replace(rows=slice(top, top + height)) for part in weights.magnitudes]
    return LoRAWeights(torch.cat([weights.down for weights in parts]), up, strength * rank, tuple(magnitudes))
