"""The sample images of a report: every prompt at every moment, as small images inside the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from library.html_pages import embedded_image, link_from
from library.prompt_options import PromptOptions

LONGEST_SIDE = 256
"""Pixels of an embedded image."""
MOST_EMBEDDED = 8_000_000
"""Characters of embedded images in a page; older ones are links beyond that."""
MOST_ROUNDS = 500
"""Moments that a page names; older ones are only counted beyond that."""


class SampleGrid:
    """Prompts, and rounds of images: one round for each moment at which samples were generated.

    The first round and the newest ones are kept: what the model drew before training is what the rest is compared with.
    """

    def __init__(self, document: Mapping[str, Any] | None = None) -> None:
        """Empty, or what ``document`` holds. Raises KeyError, TypeError or ValueError when that is no such thing."""
        known = document or {"prompts": [], "rounds": [], "dropped": 0}
        self.prompts: list[dict[str, Any]] = [dict(prompt) for prompt in known["prompts"]]
        self.rounds: list[dict[str, Any]] = [dict(entry) for entry in known["rounds"]]
        self.dropped = int(known["dropped"])

    def document(self) -> dict[str, Any]:
        """JSON-able contents."""
        return {"prompts": self.prompts, "rounds": self.rounds, "dropped": self.dropped}

    def add(
        self, page: Path, step: int, epoch: int | None, prompts: Sequence[PromptOptions], files: Mapping[int, Path]
    ) -> None:
        """Take in one moment's images: the file of each prompt's index. ``page`` is where the report lies.

        Raises OSError when an image cannot be read.
        """
        entry: dict[str, Any] = {"step": step, "epoch": epoch, "images": {}}
        for index, path in sorted(files.items()):
            entry["images"][str(self._number(index, prompts[index]))] = _image(page, path)
        self.rounds = [known for known in self.rounds if (known["step"], known["epoch"]) != (step, epoch)] + [entry]
        self._keep_small()

    def cut(self, step: int) -> None:
        """Forget the rounds after ``step``."""
        self.rounds = [entry for entry in self.rounds if entry["step"] <= step]

    def _number(self, index: int, prompt: PromptOptions) -> int:
        """The place of a prompt among those that were ever drawn; a changed prompt file adds new ones."""
        words = {
            "index": index,
            "text": prompt.prompt,
            "negative": prompt.negative_prompt or "",
            "details": describe_prompt(prompt),
        }
        if words not in self.prompts:
            self.prompts.append(words)
        return self.prompts.index(words)

    def _keep_small(self) -> None:
        while len(self.rounds) > MOST_ROUNDS:
            del self.rounds[1]
            self.dropped += 1
        sizes = [sum(len(image.get("thumb", "")) for image in entry["images"].values()) for entry in self.rounds]
        total = sum(sizes)
        # Oldest first, but the very first round before the newest only.
        for number in [*range(1, len(sizes) - 1), 0][: len(sizes) - 1]:
            if total <= MOST_EMBEDDED:
                return
            for image in self.rounds[number]["images"].values():
                image.pop("thumb", None)
            total -= sizes[number]


def _image(page: Path, path: Path) -> dict[str, Any]:
    from PIL import Image

    with Image.open(path) as image:
        return {"link": link_from(page, path), "size": image.size, "thumb": embedded_image(image, LONGEST_SIDE)}


def describe_prompt(prompt: PromptOptions) -> str:
    """What a prompt asks for beside its words, in a reader's words."""
    names = {"sample_steps": "steps", "guidance_scale": "guidance", "scale": "CFG scale", "sample_sampler": "sampler"}
    parts = []
    for name, value in asdict(prompt).items():
        if value is None or name in ("prompt", "negative_prompt", "height"):
            continue
        if name == "width":
            parts.append(f"{value} x {prompt.height or value}")
        else:
            parts.append(
                f"{names.get(name, name.replace('_', ' '))} {value:g}"
                if isinstance(value, float)
                else f"{names.get(name, name.replace('_', ' '))} {value}"
            )
    return ", ".join(parts)
