"""Ranks, alphas and learning rates for the single blocks of a Stable Diffusion U-Net.

Blocks are counted as in the original (LDM) U-Net, from its input to its output. ``block_dims`` and its like have a
value for each block; ``down_lr_weight``, ``mid_lr_weight`` and ``up_lr_weight`` are factors on the learning rate of the
blocks before, in and after the middle. A block whose factor is not above ``block_lr_zero_threshold`` gets no modules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from library.console import warn
from library.errors import UserError
from networks.adapters.lora_arguments import Parser, number, whole_number
from networks.adapters.lora_targets import Arguments, Target, conv_dim_is_given, default_group

LISTS = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
WEIGHTS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
CURVES: Mapping[str, Callable[[float], float]] = {
    "sine": lambda x: math.sin(math.pi / 2 * x),
    "cosine": lambda x: math.sin(math.pi / 2 * (1 - x)),
    "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x,
    "zeros": lambda x: 0.0,
}


class Curve(NamedTuple):
    """A curve over the blocks of one part, raised by ``base``."""

    name: str
    base: float


BlockWeights = list[float] | Curve


def block_list(parse_value: Parser) -> Parser:
    """A value for each block: "4,4,8,..."; how many there must be is known with the model."""

    def parse(name: str, value: Any) -> list[Any]:
        parts = value if isinstance(value, list | tuple) else str(value).strip().strip("[]").split(",")
        return [parse_value(name, part) for part in parts]

    return parse


def block_weights(name: str, value: Any) -> list[float]:
    """Factors separated by commas; a blank is 0. Raises UserError."""
    parts = value if isinstance(value, list | tuple) else str(value).split(",")
    return [number(name, part) if str(part).strip() or len(parts) == 1 else 0.0 for part in parts]


def block_weights_or_curve(name: str, value: Any) -> BlockWeights:
    """As ``block_weights``, or the name of a curve, optionally with "+base". Raises UserError."""
    curve, plus, base = str(value).strip().partition("+")
    if curve in CURVES:
        return Curve(curve, number(name, base) if plus else 0.0)
    if re.match(r"\s*[a-z]", str(value)):
        known = ", ".join(CURVES)
        raise UserError(
            f'--network_args: {name} "{value}" must be numbers separated by commas or one of {known}, each with +number'
            " behind it or not."
        )
    return block_weights(name, value)


BLOCK_ARGUMENTS: Mapping[str, Parser] = {
    "block_dims": block_list(whole_number),
    "block_alphas": block_list(number),
    "conv_block_dims": block_list(whole_number),
    "conv_block_alphas": block_list(number),
    "down_lr_weight": block_weights_or_curve,
    "mid_lr_weight": block_weights,
    "up_lr_weight": block_weights_or_curve,
    "block_lr_zero_threshold": number,
}
BLOCK_LEARNING_ARGUMENTS = frozenset({*WEIGHTS, "block_lr_zero_threshold"})


@dataclass(frozen=True)
class BlockLayout:
    """How the blocks of a U-Net are counted, and what the arguments above say about its modules."""

    model: str
    """Name of the model in messages."""
    down: int
    middle: int
    up: int
    ends: int
    """Blocks in front of and behind those: embeddings and the last layer. They have no modules but are counted."""
    index: Callable[[str], int]
    """Module path -> number of its block."""
    is_standard: Callable[[Any], bool]
    """Whether a U-Net has the blocks of the published models."""

    @property
    def count(self) -> int:
        """All blocks."""
        return 2 * self.ends + self.down + self.middle + self.up

    # ---- what ``Rules`` ask ----

    def rank(self, target: Target, arguments: Arguments) -> int | None:
        """Rank that ``block_dims`` or, for a wide convolution, ``conv_block_dims`` gives."""
        ranks = arguments["conv_block_dims" if target.is_wide_conv else "block_dims"]
        return None if ranks is None else ranks[self.index(target.path)]

    def alpha(self, target: Target, arguments: Arguments) -> float | None:
        """Alpha that ``block_alphas`` or ``conv_block_alphas`` gives; text encoders have no blocks."""
        alphas = arguments["conv_block_alphas" if target.is_wide_conv else "block_alphas"]
        return None if alphas is None or target.table.is_text_encoder else alphas[self.index(target.path)]

    def with_conv(self, arguments: Arguments) -> bool:
        """Whether ``conv_dim`` or ``conv_block_dims`` includes wide convolutions."""
        return conv_dim_is_given(arguments) or arguments["conv_block_dims"] is not None

    def selected(self, targets: Sequence[Target], arguments: Arguments) -> set[str]:
        """Names of the modules in blocks that learn."""
        weights = self.weights(arguments)
        return {target.name for target in targets if weights is None or weights[self.index(target.path)]}

    def group(self, target: Target, arguments: Arguments) -> tuple[str, float]:
        """A group for each block of the U-Net where blocks have factors."""
        weights = self.weights(arguments)
        label, factor = default_group(target, arguments)
        if weights is None or target.table.is_text_encoder:
            return label, factor
        block = self.index(target.path)
        return f"{label}_block{block}", factor * weights[block]

    def check(self, arguments: Arguments, unet: nn.Module) -> None:
        """Raises UserError where lists have the wrong length or the U-Net has other blocks than the published models.

        Says where a list of factors is filled up or cut.
        """
        given = [name for name in (*LISTS, *WEIGHTS) if arguments[name] is not None]
        if given and not self.is_standard(unet):
            raise UserError(
                f"--network_args: {', '.join(given)} cannot be used with this model: its U-Net does not have the"
                f" {self.down} + {self.middle} + {self.up} blocks of {self.model}."
            )
        for name in LISTS:
            values = arguments[name]
            if values is not None and len(values) != self.count:
                raise UserError(
                    f"--network_args: {name} must have {self.count} values for {self.model}, one for each block, not"
                    f" {len(values)}."
                )
        for name, count in zip(WEIGHTS, (self.down, self.middle, self.up)):
            _say_what_becomes_of(name, arguments[name], count, self.model)
        if arguments["block_lr_zero_threshold"] is not None and self.weights(arguments) is None:
            warn(f"--network_args: block_lr_zero_threshold has no effect without one of {', '.join(WEIGHTS)}")

    # ---- factors ----

    def weights(self, arguments: Arguments) -> list[float] | None:
        """The factor on each block's learning rate, all blocks in order; None when none was given."""
        if all(arguments[name] is None for name in WEIGHTS):
            return None
        threshold = arguments["block_lr_zero_threshold"] or 0.0
        counts = (self.down, self.middle, self.up)
        inner = [w for name, count in zip(WEIGHTS, counts) for w in expanded(arguments[name], count)]
        ends = [1.0] * self.ends
        return ends + [weight if weight > threshold else 0.0 for weight in inner] + ends


def expanded(weights: BlockWeights | None, count: int) -> Iterator[float]:
    """``count`` factors: a curve's values, a list's with 1 for each that it lacks, or 1 for all."""
    for block in range(count):
        if isinstance(weights, Curve):
            yield CURVES[weights.name](block / (count - 1)) + weights.base
        else:
            yield weights[block] if weights is not None and block < len(weights) else 1.0


def _say_what_becomes_of(name: str, weights: BlockWeights | None, count: int, model: str) -> None:
    if weights is None or isinstance(weights, Curve) or len(weights) == count:
        return
    fate = f"the other {count - len(weights)} get 1" if len(weights) < count else "the rest is left out"
    if len(weights) == 1 and name != "mid_lr_weight":
        fate += f" (zeros+{weights[0]:g} means {weights[0]:g} for all)"
    warn(f"--network_args: {name} has {len(weights)} factors, {model} takes {count}; {fate}")


# ---- the two ways of counting ----


def diffusers_block(path: str) -> int:
    """Block of a module of Stable Diffusion 1.x and 2.x: 1-11 down (samplers count), 12 middle, 13-24 up, 0 others."""
    match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.", path)
    if match is None:
        return 12 if path.startswith("mid_block.") else 0
    part, level, kind, layer = match.groups()
    position = 2 if kind.endswith("samplers") else int(layer)
    return (1 if part == "down" else 13) + 3 * int(level) + position


def original_block(path: str) -> int:
    """Block of a module of Stable Diffusion XL: 1-9 input, 10-12 middle, 13-21 output; 0 embeddings, 22 the end."""
    part, number, *_ = path.split(".")
    first = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}.get(part)
    if first is None:
        return 22 if part == "out" else 0
    return first + int(number)


def has_diffusers_blocks(unet: Any) -> bool:
    """Four levels of two blocks each on the way down."""
    levels = getattr(unet, "down_blocks", ())
    return len(levels) == 4 and all(len(level.resnets) == 2 for level in levels)


def has_original_blocks(unet: Any) -> bool:
    """Nine input blocks and as many output blocks."""
    return len(getattr(unet, "input_blocks", ())) == len(getattr(unet, "output_blocks", ())) == 9


SD_BLOCKS = BlockLayout("Stable Diffusion 1.x and 2.x", 12, 1, 12, 0, diffusers_block, has_diffusers_blocks)
SDXL_BLOCKS = BlockLayout("Stable Diffusion XL", 9, 3, 9, 1, original_block, has_original_blocks)
