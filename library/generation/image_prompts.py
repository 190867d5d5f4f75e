"""One image of Stable Diffusion as a prompt line of ``gen_img.py`` describes it.

The grammar is that of ``library.prompt_options`` with more letters; as in kohya-ss/sd-scripts' image generation, the
last of repeated options counts.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Any

from library.console import warn
from library.errors import UserError
from library.models.stable_diffusion.prompt_weights import require_usable_weights
from library.prompt_options import PromptOptions, check_prompt_values
from library.text_files import shown

SIDE_MULTIPLE = 8
"""Pixels of a latent position: what both sides of an image are multiples of."""
LONGEST_NAME = 240
"""Bytes of a file's name; file systems allow 255, and a number may follow."""
DEEP_SHRINK_DEPTH = 3
"""The depth of Deep Shrink where only other options of it are given."""
GRADUAL_LATENT_TIMESTEPS = 650
"""The first timestep of Gradual Latent where only other options of it are given."""


@dataclass(frozen=True)
class ImagePrompt(PromptOptions):
    """One image to generate. None means: not given, so the feature's own default, or no such feature."""

    original_height: int | None = None
    """SDXL's conditioning: original size in pixels; None: the image's own."""
    original_width: int | None = None
    original_height_negative: int | None = None
    """The same for the negative prompt; None: as for the positive one."""
    original_width_negative: int | None = None
    crop_top: int | None = None
    """SDXL's conditioning: crop coordinate in pixels; None: 0."""
    crop_left: int | None = None
    negative_scale: float | None = None
    """How far to lead away from the negative prompt, apart from ``scale``; None: by classifier-free guidance."""
    strength: float | None = None
    """How much of the start image is changed, 0..1."""
    clip_prompt: str | None = None
    """The text for CLIP guidance; None: the prompt."""
    network_mul: tuple[float, ...] | None = None
    """A multiplier for each network; the last one counts for those that follow."""
    file_name: str | None = None
    """Path of the image within the output folder."""
    deep_shrink_depth_1: int | None = None
    """None: no Deep Shrink."""
    deep_shrink_timesteps_1: int | None = None
    deep_shrink_depth_2: int | None = None
    deep_shrink_timesteps_2: int | None = None
    deep_shrink_ratio: float | None = None
    gradual_latent_timesteps: int | None = None
    """None: no Gradual Latent."""
    gradual_latent_ratio: float | None = None
    gradual_latent_ratio_step: float | None = None
    gradual_latent_every_n_steps: int | None = None
    gradual_latent_s_noise: float | None = None
    gradual_latent_unsharp_params: str | None = None

    raw_prompt: str | None = None
    """The prompt line with its options, dynamic prompts replaced, without ``--d``."""
    number: int = 0
    """Running number of the image in the run, over all iterations."""
    iteration: int = 0
    """Which repetition of all prompts (``--n_iter``) it belongs to."""
    index: int = 0
    """Which of the images of its prompt line it is."""
    dynamic: bool = False
    """Whether the line holds a dynamic prompt."""


def _text(text: str) -> str:
    return text


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else _number(text)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(_number(part) for part in text.split(","))


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


WANTED: dict[Callable[[str], Any], str] = {
    _text: "text",
    int: "a whole number",
    _number: "a number",
    _number_or_none: "a number or none",
    _numbers: "numbers with commas between them",
    _whole_numbers: "whole numbers with commas between them",
}
"""What a reader of values wants, for messages."""

LETTERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "n": ("negative_prompt", _text),
    "w": ("width", int),
    "h": ("height", int),
    "ow": ("original_width", int),
    "oh": ("original_height", int),
    "nw": ("original_width_negative", int),
    "nh": ("original_height_negative", int),
    "ct": ("crop_top", int),
    "cl": ("crop_left", int),
    "s": ("sample_steps", int),
    "l": ("scale", _number),
    "nl": ("negative_scale", _number_or_none),
    "t": ("strength", _number),
    "c": ("clip_prompt", _text),
    "am": ("network_mul", _numbers),
    "f": ("file_name", _text),
    "dsd1": ("deep_shrink_depth_1", int),
    "dst1": ("deep_shrink_timesteps_1", int),
    "dsd2": ("deep_shrink_depth_2", int),
    "dst2": ("deep_shrink_timesteps_2", int),
    "dsr": ("deep_shrink_ratio", _number),
    "glt": ("gradual_latent_timesteps", int),
    "glr": ("gradual_latent_ratio", _number),
    "gls": ("gradual_latent_ratio_step", _number),
    "gle": ("gradual_latent_every_n_steps", int),
    "glsn": ("gradual_latent_s_noise", _number),
    "glus": ("gradual_latent_unsharp_params", _text),
}
"""Field and reader of a value by the option's name; ``--d`` (seeds) is read by ``take_seeds``."""

NETWORK_TAG = re.compile(r"<(lora|lyco|hypernet):[^<>]*>")
"""A network as web UIs have it in prompts."""
PLAIN_TEXT = (
    (NETWORK_TAG, "networks are named by --network_weights, and --am gives their strengths"),
    (re.compile(r"(?<!\w)__\w[\w/*-]*?__(?!\w)"), "write the words themselves, as in {red|blue}"),
)
"""What means something in other programs, and what to do instead."""
OPTION = re.compile(r"\s--")
"""What an option begins with; a prompt from a shell or a module may have line breaks."""
SEEDS = re.compile(r"(?:^|\s)--d(?:\s+(.*?))?\s*(?=\s--|$)", re.IGNORECASE)


def take_seeds(line: str, place: str = "prompt") -> tuple[str, tuple[int, ...]]:
    """A prompt line without its ``--d``, wherever it stands, and the seeds that it gives (none without it).

    Raises UserError, beginning with ``place``, for what is no list of whole numbers of 64 bits.
    """
    found = SEEDS.findall(line)
    if not found:
        return line, ()
    seeds = _read(found[-1], _whole_numbers, f"{place}: --d")
    for seed in seeds:
        check_prompt_values(PromptOptions(seed=seed), f"{place}: ")
    return SEEDS.sub("", line).strip(), seeds


def parse_image_prompt(line: str, defaults: ImagePrompt, place: str = "prompt") -> ImagePrompt:
    """A prompt line (without ``--d`` and dynamic prompts) as an image; ``defaults`` for what it leaves open.

    An unknown option logs a warning and is ignored. ``--nl none`` takes back a default. One option of Deep Shrink or of
    Gradual Latent is enough to enable it. Raises UserError, beginning with ``place``, for a value that is no number
    where one is needed, or that no image can have.
    """
    if not _is_unicode(line):
        raise UserError(f"{place}: the prompt holds bytes that are not UTF-8 text.")
    prompt, *pieces = OPTION.split(" " + line.strip())
    values: dict[str, Any] = {"prompt": prompt.strip(), "raw_prompt": line.strip()}
    for piece in pieces:
        name, *text = piece.split(None, 1) or [""]
        if name.lower() not in LETTERS:
            warn(f'{place}: "--{piece.strip()}" is not a prompt option and is ignored.')
            continue
        field, read = LETTERS[name.lower()]
        values[field] = _read("".join(text), read, f"{place}: --{name}")
    if "sample_steps" in values:
        values["sample_steps"] = min(max(values["sample_steps"], 1), 1000)
    _enable(values, "deep_shrink_", "deep_shrink_depth_1", defaults, DEEP_SHRINK_DEPTH)
    _enable(values, "gradual_latent_", "gradual_latent_timesteps", defaults, GRADUAL_LATENT_TIMESTEPS)
    image = dataclasses.replace(defaults, **values)
    check_image_prompt(image, f"{place}: ")
    for found, instead in PLAIN_TEXT:
        if match := found.search(f"{image.prompt} {image.negative_prompt or ''}"):
            warn(f'{place}: "{match[0]}" is plain text here; {instead}.')
    return image


def _is_unicode(text: str) -> bool:
    try:
        return text.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False


def _enable(values: dict[str, Any], prefix: str, switch: str, defaults: ImagePrompt, value: int) -> None:
    """Give ``switch`` a value if any option of its feature is given and nothing else gives one."""
    if any(name.startswith(prefix) for name in values) and getattr(defaults, switch) is None:
        values.setdefault(switch, value)


def _read(text: str, read: Callable[[str], Any], place: str) -> Any:
    text = text.strip()
    try:
        return read(text)
    except ValueError:
        raise UserError(f"{place} must be {WANTED[read]}, not {shown(text)}.") from None


LIMITS: Mapping[str, tuple[str, float, float]] = {
    "original_width": ("the original width (--ow)", 0, math.inf),
    "original_height": ("the original height (--oh)", 0, math.inf),
    "original_width_negative": ("the negative prompt's original width (--nw)", 0, math.inf),
    "original_height_negative": ("the negative prompt's original height (--nh)", 0, math.inf),
    "crop_top": ("the crop (--ct)", 0, math.inf),
    "crop_left": ("the crop (--cl)", 0, math.inf),
    "strength": ("the strength (--t)", 0, 1),
}
"""Name in messages, least and largest value by field."""


def check_side(side: int | None, place: str) -> None:
    """Raises UserError, beginning with ``place``, for a width or height in pixels that no image can have."""
    if side is not None and (side < 1 or side % SIDE_MULTIPLE):
        raise UserError(f"{place} must be a positive multiple of {SIDE_MULTIPLE}, not {side}.")


def check_image_prompt(prompt: ImagePrompt, place: str = "") -> None:
    """Raises UserError, beginning with ``place``, for values that no image can have."""
    for letter, side in (("w", prompt.width), ("h", prompt.height)):
        check_side(side, f"{place}--{letter}")
    check_prompt_values(prompt, place)
    for text in (prompt.prompt, prompt.negative_prompt or ""):
        require_usable_weights(text, place)
    if prompt.file_name is not None:
        _check_file_name(prompt.file_name, place)
    for field, (name, least, largest) in LIMITS.items():
        value = getattr(prompt, field)
        if value is not None and not least <= value <= largest:
            wanted = "not be negative" if largest == math.inf else f"be between {least:g} and {largest:g}"
            raise UserError(f"{place}{name} must {wanted}, but is {value:g}.")


def _check_file_name(name: str, place: str) -> None:
    """Raises UserError, beginning with ``place``, for what names no file within the output folder."""
    path = PureWindowsPath(name)  # knows the separators and drives of every system
    too_long = any(len(part.encode("utf-8", "replace")) > LONGEST_NAME for part in path.parts)
    if not path.name or path.anchor or ".." in path.parts or not name.isprintable() or too_long:
        raise UserError(f"{place}--f must name a file within --outdir, not {shown(name)}.")
