"""ControlNets of ``gen_img.py``: their options, and what the options ask for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from library.errors import UserError
from library.generation.control_hints import CONTROL_NETS, LLLITES, Control, Hints
from library.generation.guide_images import GuideImages
from library.options import Aliases

if TYPE_CHECKING:
    from library.generation.features import Feature

CANNY = re.compile(r"canny(?:_(\d+)_(\d+))?")
CANNY_THRESHOLDS = (63, 191)


@dataclass
class ControlOptions:
    """ControlNet"""

    control_net_models: list[str] = field(default_factory=list)
    """ControlNet files (the original layout, as weights or as differences, or Diffusers') or folders. Several of Stable
    Diffusion 1.x and 2.x act in turn, step by step; of SDXL, the mean of what they add is used."""
    control_net_preps: list[str] = field(default_factory=list)
    """What is done to the hint image of each ControlNet: none, canny, or canny with its two thresholds, as in
    canny_63_191."""
    control_net_multipliers: Annotated[list[float], Aliases("control_net_weights")] = field(default_factory=list)
    """Strength of each ControlNet or ControlNet-LLLite; 1 where none is given."""
    control_net_ratios: list[float] = field(default_factory=list)
    """Up to which share of the steps, 0 to 1, each ControlNet or ControlNet-LLLite acts; 1 where none is given."""
    control_net_lllite_models: list[str] = field(default_factory=list)
    """ControlNet-LLLite files, for SDXL; several act together."""
    guide_image_path: list[str] = field(default_factory=list)
    """Images, or folders of them, that ControlNets take as hints and image guidance as its aims. Each image that is
    drawn takes the next one, or the next one for each ControlNet."""


def controls(models: Sequence[str], options: ControlOptions) -> list[Control]:
    """Each of ``models`` with what the options say of it. Raises UserError."""
    for name in ("control_net_preps", "control_net_multipliers", "control_net_ratios"):
        count = len(getattr(options, name))
        if count > len(models):
            raise UserError(f"--{name} has more values ({count}) than there are ControlNet models ({len(models)}).")
    for ratio in options.control_net_ratios:
        if not 0 <= ratio <= 1:
            raise UserError(f"--control_net_ratios: a ratio must be between 0 and 1, not {ratio:g}.")
    preps = [_thresholds(text) for text in options.control_net_preps]
    return [
        Control(
            model,
            _of(options.control_net_multipliers, index, 1.0),
            _of(options.control_net_ratios, index, 1.0),
            _of(preps, index, None),
        )
        for index, model in enumerate(models)
    ]


def _of(values: Sequence[Any], index: int, missing: Any) -> Any:
    return values[index] if index < len(values) else missing


def _thresholds(text: str) -> tuple[int, int] | None:
    if text.lower() == "none":
        return None
    match = CANNY.fullmatch(text.lower())
    if match is None:
        raise UserError(
            f'--control_net_preps: "{text}" is not known; write none, canny, or canny with its two thresholds '
            "(canny_63_191)."
        )
    return CANNY_THRESHOLDS if match[1] is None else (int(match[1]), int(match[2]))


def open_control(options: ControlOptions, pipeline: Any, first_stage_only: bool = False) -> Feature | None:
    """The feature that the options ask for; None where they ask for none.

    ``first_stage_only`` leaves it out of the second stage of Highres. fix. Raises UserError, before anything is loaded,
    for options and files that cannot be used.
    """
    if options.control_net_models and options.control_net_lllite_models:
        raise UserError(f"{CONTROL_NETS} and {LLLITES} cannot be used at the same time.")
    models = options.control_net_models or options.control_net_lllite_models
    used = controls(models, options)
    if not models:
        return None
    option = CONTROL_NETS if options.control_net_models else LLLITES
    hints = Hints(GuideImages(options.guide_image_path), used, option)
    if options.control_net_models:
        from library.generation.control_net import ControlNets

        return ControlNets(pipeline, hints, first_stage_only)
    from library.generation.control_net_lllite import LLLites

    return LLLites(pipeline, hints, first_stage_only)
