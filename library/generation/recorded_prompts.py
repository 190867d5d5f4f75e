"""Prompts that are read back from images: those of ``gen_img.py``, of kohya-ss/sd-scripts and of web UIs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from library.errors import UserError
from library.generation.dynamic_prompts import escaped
from library.generation.image_files import text_in_image
from library.generation.image_prompts import NETWORK_TAG
from library.generation.prompt_sources import PromptLine

SETTINGS_LINE = re.compile(r"Steps: \d+")
NEGATIVE = "Negative prompt:"


def recorded_lines(paths: Sequence[Path]) -> list[PromptLine]:
    """A prompt line for each image, from the text in it. Raises UserError for an image that holds none."""
    return [PromptLine(recorded_line(path), str(path)) for path in paths]


def recorded_line(path: Path) -> str:
    """``prompt --n negative prompt`` from the text in an image. Raises UserError when there is none."""
    found = recorded_prompt(text_in_image(path))
    if found is None:
        raise UserError(f"--image_path: {path} holds no prompt; give --prompt or --from_file.")
    prompt, negative = (_as_words(text) for text in found)
    return f"{prompt} --n {negative}" if negative else prompt


def recorded_prompt(text: Mapping[str, str]) -> tuple[str, str] | None:
    """Prompt and negative prompt in the text of an image; None when it holds none.

    Single keys are those of ``gen_img.py``; ``parameters`` is the text of web UIs. ComfyUI's ``prompt`` is a graph.
    """
    if "prompt" in text and not re.match(r'\{\s*"', text["prompt"]):
        return text["prompt"], text.get("negative-prompt", "")
    if "parameters" in text:
        return _of_web_ui(text["parameters"])
    return None


def holds_another_prompt(text: Mapping[str, str], prompt: str) -> bool:
    """Whether the text in an image says that it is the image of another prompt."""
    found = recorded_prompt(text)
    return found is not None and _words(found[0]) != _words(prompt)


def _words(prompt: str) -> list[str]:
    return _without_networks(prompt).split()


def _without_networks(prompt: str) -> str:
    return re.sub(rf"\s*{NETWORK_TAG.pattern}", "", prompt)


def _of_web_ui(parameters: str) -> tuple[str, str]:
    lines = parameters.strip().split("\n")
    if SETTINGS_LINE.match(lines[-1].strip()):
        del lines[-1]
    start = next((number for number, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    prompt, negative = "\n".join(lines[:start]), "\n".join(lines[start:]).removeprefix(NEGATIVE)
    return _without_networks(prompt).strip(), negative.strip()


def _as_words(text: str) -> str:
    """``text`` in one line in which nothing is an option or a dynamic prompt."""
    return escaped(re.sub(r"(^|\s)--", r"\1- -", " ".join(text.split())))
