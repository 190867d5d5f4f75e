"""Images as files: names that are never taken twice, and text in the PNG that says how to make the image again.

The text is written twice: as single keys, those of kohya-ss/sd-scripts' image generation where it has one, and as the
``parameters`` text of AUTOMATIC1111's web UI, which image sites and viewers read.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from library.files import write_new
from library.modelspec import IMPLEMENTATION_VERSION
from library.prompt_options import PromptOptions
from library.safetensors_io import file_hash, model_hash, read_header

if TYPE_CHECKING:
    from PIL import Image

HASH_DIGITS = 12  # of a LoRA file's hash, as the web UI writes it


@dataclass
class ImageFileOptions:
    """Files"""

    output_dir: str = "."
    """Folder for the images."""
    no_metadata: bool = False
    """Write no text into the images."""


@dataclass(frozen=True)
class UsedLora:
    """A LoRA file that acted on an image."""

    name: str
    """Its file name."""
    multiplier: float
    hash: str
    """SHA-256 (hex) of its tensors."""


@dataclass(frozen=True)
class ImageRecord:
    """How an image was made."""

    script: str
    prompt: PromptOptions
    """With every value decided; a negative prompt or guidance scale that did not act is None."""
    sampler: str
    model: str
    """File or folder name of the model."""
    model_hash: str
    """Its short hash (``legacy_hash``)."""
    loras: Sequence[UsedLora] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    """What else the image depends on, by key."""

    def entries(self) -> dict[str, str]:
        """The text chunks by key."""
        prompt = self.prompt
        values = {
            "parameters": self.web_ui_text(),
            "prompt": prompt.prompt,
            "negative-prompt": prompt.negative_prompt,
            "seed": prompt.seed,
            "sampler": self.sampler.lower(),
            "steps": prompt.sample_steps,
            "scale": prompt.scale,
            "guidance-scale": prompt.guidance_scale,
            "width": prompt.width,
            "height": prompt.height,
            "model": self.model,
            "model-hash": self.model_hash,
            "lora-weights": json.dumps([f"{lora.name};{lora.multiplier:g}" for lora in self.loras])
            if self.loras
            else None,
            **self.settings,
            "Software": f"{self.script}, {IMPLEMENTATION_VERSION}",
        }
        return {key: str(value) for key, value in values.items() if value is not None}

    def web_ui_text(self) -> str:
        """Prompt (LoRA files as ``<lora:name:strength>``), negative prompt, and a line of settings."""
        prompt = self.prompt
        tags = "".join(f" <lora:{Path(lora.name).stem}:{lora.multiplier:g}>" for lora in self.loras)
        hashes = ", ".join(f"{Path(lora.name).stem}: {lora.hash[:HASH_DIGITS]}" for lora in self.loras)
        values = {
            "Steps": prompt.sample_steps,
            "Sampler": self.sampler,
            "CFG scale": prompt.scale,
            "Distilled CFG Scale": prompt.guidance_scale,
            "Seed": prompt.seed,
            "Size": f"{prompt.width}x{prompt.height}",
            "Model hash": self.model_hash,
            "Model": Path(self.model).stem,
            "Lora hashes": hashes or None,
            "Version": IMPLEMENTATION_VERSION,
        }
        settings = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in values.items() if value is not None)
        negative = [] if prompt.negative_prompt is None else [f"Negative prompt: {prompt.negative_prompt}"]
        return "\n".join([prompt.prompt + tags, *negative, settings])


def _quoted(value: str) -> str:
    """As the web UI writes a value that holds one of its separators."""
    return json.dumps(value, ensure_ascii=False) if set(value) & set(",:\n") else value


def lora_hash(path: Path) -> str:
    """SHA-256 (hex) of a LoRA file's tensors, as its metadata says or computed; of other kinds, of the whole file."""
    if path.suffix.lower() != ".safetensors":
        return file_hash(path)
    return read_header(path).metadata.get("sshs_model_hash") or model_hash(path)


def file_names(folder: Path, name: str, suffix: str) -> Iterator[Path]:
    """``name`` with ``suffix`` in ``folder``, then the same with ``_001`` and so on."""
    yield folder / f"{name}{suffix}"
    for number in itertools.count(1):
        yield folder / f"{name}_{number:03d}{suffix}"


def save_image(image: Image.Image, folder: Path, name: str, text: Mapping[str, str]) -> Path:
    """Write ``image`` as ``name.png``, or a new name beginning so, in ``folder``, with ``text`` by key.

    Returns the path.
    """
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for key, value in text.items():
        chunks.add_text(key, value)  # becomes iTXt (UTF-8) where Latin-1 does not suffice
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=chunks)
    return write_new(file_names(folder, name, ".png"), buffer.getvalue())
