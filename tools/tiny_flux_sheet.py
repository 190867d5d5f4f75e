"""A contact sheet of what a tiny model draws, to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from library.models.pipeline import Pipeline
from tools.tiny_flux_autoencoder import PIXELS

SHEET_PROMPTS = (
    "a red circle on a blue background",
    "a yellow square on a purple background",
    "a green triangle on a white background",
    "a white cross on a red background",
    "an orange diamond on a black background",
    "a purple ring on a yellow background",
    "a big blue circle on an orange background",
    "a small black square on a green background",
    "a blue triangle on a yellow background",
    "a big yellow ring on a blue background",
    "a small red diamond on a white background",
    "a big green cross on a black background",
    "a purple circle on a green background",
    "a black ring on an orange background",
    "an orange triangle on a purple background",
    "a white square on a red background",
    "a zog on a red background",
    "a zog on a blue background",
    "a zog on a white background",
    "a dak on an orange background",
    "a yellow diamond",
    "a cross on a green background",
    "a black background",
    "a big purple square on a white background",
)


def draw_sheet(
    pipeline: Pipeline, path: Path, prompts: Sequence[str] = SHEET_PROMPTS, columns: int = 8, **settings: Any
) -> None:
    """One image of each prompt on one sheet; ``settings`` are further fields of the family's request."""
    cell = PIXELS + 4
    sheet = Image.new("RGB", (columns * cell, -(-len(prompts) // columns) * cell), "gray")
    for index, prompt in enumerate(prompts):
        request = pipeline.request_class(prompt=prompt, width=PIXELS, height=PIXELS, seed=index, **settings)
        sheet.paste(pipeline.generate(request), (index % columns * cell, index // columns * cell))
    sheet.save(path)
    print(path)
