"""Ratios for each block of the U-Net (LBW, "LoRA block weight"), as lists of 12, 17, 20 or 26 numbers.

The blocks are BASE (the text encoders), IN00 to IN11, MID and OUT00 to OUT11, counted as in the original U-Net. Short
lists name only some of them: 17 those where LoRA of Stable Diffusion 1.x and 2.x has modules, 12 those of Stable
Diffusion XL; 26 and 20 are for files with convolutions too. After hako-mikan/sd-webui-lora-block-weight.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from library.errors import UserError
from library.families import SDXL, STABLE_DIFFUSION, Family

BLOCKS = ("BASE", *(f"IN{i:02d}" for i in range(12)), "MID", *(f"OUT{i:02d}" for i in range(12)))
_SD_17 = "BASE IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"
_SDXL_12 = "BASE IN04 IN05 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05"
PRESETS = {
    12: (SDXL, tuple(_SDXL_12.split())),
    17: (STABLE_DIFFUSION, tuple(_SD_17.split())),
    20: (SDXL, BLOCKS[:10] + BLOCKS[13:23]),
    26: (STABLE_DIFFUSION, BLOCKS),
}
"""Length of a list: the model family it is for, and the blocks that it names."""

_DIFFUSERS = re.compile(r"_(?P<half>down|up)_blocks_(?P<level>\d+)_(?P<kind>resnets|attentions|\w+samplers)_(?P<j>\d+)")
_ORIGINAL = re.compile(r"_(?P<half>input|output)_blocks_(?P<number>\d+)_")


@dataclass(frozen=True)
class BlockWeights:
    """The numbers of one list by block name; ``family`` is the model family that lists of this length are for."""

    family: Family
    weights: dict[str, float]

    def of(self, lora_name: str) -> float | None:
        """The module's number; None where its block is not in the list."""
        return self.weights.get(block_of(lora_name) or "")


def parse_block_weights(text: str, option: str = "--lbws") -> BlockWeights:
    """Read a JSON list such as ``[1, 0, 0.5, ...]``. Raises UserError for anything else and for other lengths."""
    try:
        values = json.loads(text)
        numbers = [float(value) for value in values if not isinstance(value, (bool, str))]
    except (ValueError, TypeError):
        values, numbers = [], []
    if not isinstance(values, list) or len(numbers) != len(values) or len(values) not in PRESETS:
        raise UserError(
            f"{option}: each value must be a JSON list of 12 or 20 ({SDXL.lora_name}) or 17 or 26 numbers"
            f" ({STABLE_DIFFUSION.lora_name}) such as"
            ' "[1,0,0,0,1,1,1,1,1,1,1,1]", not "{text}".'
        )
    family, blocks = PRESETS[len(values)]
    return BlockWeights(family, dict(zip(blocks, numbers)))


def block_of(lora_name: str) -> str | None:
    """The block that a module lies in; None for layers outside the blocks (time embedding, first and last convolution).

    ``lora_name`` has the U-Net's path of Diffusers (Stable Diffusion 1.x, 2.x) or the original one (XL).
    """
    if "_text_model_" in lora_name:
        return "BASE"
    if "_mid_block_" in lora_name or "_middle_block_" in lora_name:
        return "MID"
    original = _ORIGINAL.search(lora_name)
    if original is not None:
        return f"{'IN' if original['half'] == 'input' else 'OUT'}{int(original['number']):02d}"
    match = _DIFFUSERS.search(lora_name)
    if match is None:
        return None
    level, j = int(match["level"]), int(match["j"])
    if match["half"] == "down":
        return f"IN{3 * level + (3 if match['kind'] == 'downsamplers' else j + 1):02d}"
    return f"OUT{3 * level + (2 if match['kind'] == 'upsamplers' else j):02d}"
