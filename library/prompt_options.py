"""The prompt-line grammar: ``a cat --w 512 --h 512 --d 1 --n blurry``.

Shared by sample images during training, the inference scripts and image generation. Options are read only after the
first ``" --"``, so that the prompt's own words are never taken for options. Format: kohya-ss/sd-scripts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from library.console import warn
from library.errors import UserError, did_you_mean
from library.text_files import parse_json, read_text, read_toml, shown


@dataclass(frozen=True)
class PromptOptions:
    """One image to generate. None means: the model family's default."""

    prompt: str = ""
    negative_prompt: str | None = None
    width: int | None = None
    """Pixels."""
    height: int | None = None
    """Pixels."""
    seed: int | None = None
    sample_steps: int | None = None
    """Denoising steps, 1..1000."""
    scale: float | None = None
    """Classifier-free guidance."""
    guidance_scale: float | None = None
    """Embedded (distilled) guidance."""
    sample_sampler: str | None = None
    controlnet_image: str | None = None
    cfg_trunc_ratio: float | None = None
    """Classifier-free guidance acts while t, from 0 (noise) to 1 (image), is below this; 0..1."""
    renorm_cfg: float | None = None
    """A guided prediction is at most this many times as long as the positive one; 0: any length."""
    flow_shift: float | None = None
    """Shift of a flow model's schedule towards more noise, above 0."""


LINE_OPTIONS = {
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("sample_steps", int),
    "l": ("scale", float),
    "g": ("guidance_scale", float),
    "n": ("negative_prompt", str),
    "ss": ("sample_sampler", str),
    "cn": ("controlnet_image", str),
    "ctr": ("cfg_trunc_ratio", float),
    "rcfg": ("renorm_cfg", float),
    "fs": ("flow_shift", float),
}
FIELD_TYPES = {field: kind for field, kind in LINE_OPTIONS.values()} | {"prompt": str}
TRIGGER = "[trigger]"
"""What stands for the trigger word in captions and prompts."""
Prompt = TypeVar("Prompt", bound=PromptOptions)


def parse_prompt_line(line: str, place: str = "prompt") -> PromptOptions:
    """Read one prompt line; the first of repeated options counts, an unknown one is named and ignored.

    Raises UserError, beginning with ``place``, when an option's value is not a number where one is needed.
    """
    return prompt_options(parse_prompt_values(line, place))


def parse_prompt_values(
    line: str, place: str = "prompt", known: Mapping[str, tuple[str, type]] = LINE_OPTIONS
) -> dict[str, Any]:
    """As ``parse_prompt_line``, by field: the prompt and those of the ``known`` options that the line gives."""
    prompt, *pieces = (" " + line.strip()).split(" --")
    values: dict[str, Any] = {"prompt": prompt.strip()}
    for piece in pieces:
        name, _, text = piece.strip().partition(" ")
        if name.lower() not in known:
            warn(f'{place}: "--{piece.strip()}" is not a prompt option and is ignored.')
            continue
        field, kind = known[name.lower()]
        values.setdefault(field, _value(text.strip(), kind, f"{place}: --{name}"))
    return values


def prompt_options(values: Mapping[str, Any]) -> PromptOptions:
    """Values by field as one object, with the steps kept in 1..1000."""
    options = PromptOptions(**values)
    steps = options.sample_steps
    return options if steps is None else dataclasses.replace(options, sample_steps=min(max(steps, 1), 1000))


def name_trigger(text: str, word: str | None) -> str:
    """``text`` with the trigger word in the place of ``[trigger]``; as it is if there is no such word."""
    return text.replace(TRIGGER, word) if word else text


def names_trigger(prompt: PromptOptions) -> bool:
    """Whether ``[trigger]`` stands in the prompt or its negative one."""
    return TRIGGER in f"{prompt.prompt} {prompt.negative_prompt}"


def with_trigger(prompt: Prompt, word: str | None) -> Prompt:
    """``prompt`` with the trigger word in the place of ``[trigger]``."""
    if not word or not names_trigger(prompt):
        return prompt
    negative = prompt.negative_prompt
    return dataclasses.replace(
        prompt,
        prompt=name_trigger(prompt.prompt, word),
        negative_prompt=None if negative is None else name_trigger(negative, word),
    )


def check_prompt_values(prompt: PromptOptions, place: str = "") -> None:
    """Raises UserError, beginning with ``place``, for values that no image can have."""
    for name, option in (("width", "width"), ("height", "height"), ("sample_steps", "steps")):
        value = getattr(prompt, name)
        if value is not None and value < 1:
            raise UserError(f"{place}--{option} must be at least 1, not {value}.")
    if prompt.seed is not None and not -(2**63) <= prompt.seed < 2**64:
        raise UserError(f"{place}the seed {prompt.seed} does not fit into 64 bits.")
    for name in ("scale", "guidance_scale", "cfg_trunc_ratio", "renorm_cfg", "flow_shift"):
        value = getattr(prompt, name)
        if value is not None and not math.isfinite(value):
            raise UserError(f"{place}{name} must be a finite number, not {value}.")
    if prompt.cfg_trunc_ratio is not None and not 0 <= prompt.cfg_trunc_ratio <= 1:
        raise UserError(f"{place}cfg_trunc_ratio (--ctr) must be between 0 and 1, not {prompt.cfg_trunc_ratio:g}.")
    if prompt.renorm_cfg is not None and prompt.renorm_cfg < 0:
        raise UserError(f"{place}renorm_cfg (--rcfg) must not be negative, but is {prompt.renorm_cfg:g}.")
    if prompt.flow_shift is not None and prompt.flow_shift <= 0:
        raise UserError(f"{place}the flow shift (--fs) must be above 0, not {prompt.flow_shift:g}.")


def _value(value: Any, kind: type, place: str) -> Any:
    """``value`` as ``kind``; raises UserError, beginning with ``place``, for what is none and for infinite numbers."""
    wanted = {str: "text", int: "a whole number", float: "a number"}[kind]
    try:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise TypeError
        if kind is str:
            return str(value)
        number = kind(value.strip() if isinstance(value, str) else value)
        if not math.isfinite(number) or (isinstance(value, float) and number != value):
            raise ValueError
        return number
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{place} must be {wanted}, not {shown(value)}.") from None


def _from_table(table: dict[str, Any], place: str) -> PromptOptions:
    values = {}
    for key, value in table.items():
        if key not in FIELD_TYPES:
            raise UserError(f'{place}: unknown key "{key}".{did_you_mean(key, FIELD_TYPES)}')
        if value is not None:  # null in JSON leaves a key open
            values[key] = _value(value, FIELD_TYPES[key], f'{place}: "{key}"')
    return prompt_options(values)


def read_prompt_file(path: Path) -> list[PromptOptions]:
    """The prompts of a ``.txt``, ``.toml`` or ``.json`` file, in order.

    ``.txt``: one line each; empty lines and lines that begin with ``#`` are left out. ``.toml``: a ``[prompt]`` table
    of common keys with ``[[prompt.subset]]`` tables, whose own keys win. ``.json``: a list of lines or tables.
    Raises UserError when the file cannot be read or holds something else.
    """
    if path.suffix.lower() == ".toml":
        return _from_toml(path)
    text = read_text(path)
    if path.suffix.lower() == ".json":
        return _from_json(path, text)
    lines = enumerate(text.split("\n"), 1)  # other line separators may stand inside a prompt
    return [parse_prompt_line(s, f"{path}, line {n}") for n, s in lines if s.strip() and not s.startswith("#")]


def _from_toml(path: Path) -> list[PromptOptions]:
    table = read_toml(path).get("prompt")
    if not isinstance(table, dict):
        raise UserError(f"{path}: needs a [prompt] table.")
    common = {key: value for key, value in table.items() if key != "subset"}
    subsets = table.get("subset", [{}])
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise UserError(f"{path}: prompts are an array of tables; write [[prompt.subset]], with two brackets.")
    return [_from_table({**common, **subset}, f"{path}, prompt {n}") for n, subset in enumerate(subsets, 1)]


def _from_json(path: Path, text: str) -> list[PromptOptions]:
    entries = parse_json(text, path)
    if not isinstance(entries, list):
        raise UserError(f"{path}: needs a list of prompts.")
    prompts = []
    for number, entry in enumerate(entries, 1):
        place = f"{path}, prompt {number}"
        if not isinstance(entry, (dict, str)):
            raise UserError(f"{place}: must be a prompt line or a table of keys, not {shown(entry)}.")
        prompts.append(_from_table(entry, place) if isinstance(entry, dict) else parse_prompt_line(entry, place))
    return prompts
