"""Images as files: names that are never taken twice, and text in them that says how to make the image again.

In a PNG the text is written twice: as single keys, those of kohya-ss/sd-scripts' image generation where it has one, and
as the ``parameters`` text of AUTOMATIC1111's web UI, which image sites and viewers read. WebP and JPEG files hold the
second one, in EXIF's UserComment, where the web UI has it.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.files import write_new
from library.image_reading import open_image, reason
from library.modelspec import IMPLEMENTATION_VERSION
from library.prompt_options import PromptOptions
from library.safetensors_io import file_hash, model_hash, read_header

if TYPE_CHECKING:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

HASH_DIGITS = 12  # of a LoRA file's hash, as the web UI writes it
SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
"""Of image files that can be written."""
CONTACT_SHEET = "contact-sheet"
"""The key in the text of an image that shows all images of a run: it is none of them."""
EXIF_FOLDER, USER_COMMENT = 0x8769, 0x9286
LONGEST_COMMENT = 60_000
"""Bytes; a JPEG file has room for 64 KiB of EXIF data."""
UNICODE = b"UNICODE\0"
"""What EXIF puts before a comment in UTF-16."""


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
    web_ui_sampler: str | None = None
    """The web UI's name of the sampler; None: the same."""
    web_ui_settings: Mapping[str, str] = field(default_factory=dict)
    """What else the image depends on, by the web UI's names."""

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
            "Sampler": self.web_ui_sampler or self.sampler,
            "CFG scale": prompt.scale,
            "Distilled CFG Scale": prompt.guidance_scale,
            "Seed": prompt.seed,
            "Size": f"{prompt.width}x{prompt.height}",
            "Model hash": self.model_hash,
            "Model": Path(self.model).stem,
            **self.web_ui_settings,
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
    return write_new(file_names(folder, name, ".png"), image_bytes(image, ".png", text))


def image_bytes(image: Image.Image, suffix: str, text: Mapping[str, str]) -> bytes:
    """The file of ``image`` in the format of ``suffix``, one of ``SUFFIXES``, with ``text`` by key.

    A PNG has all keys, the others ``parameters`` only.
    """
    buffer = io.BytesIO()
    if suffix == ".png":
        image.save(buffer, format="PNG", pnginfo=_png_text(text))
    else:
        exif = _exif_text(text["parameters"]) if "parameters" in text else b""
        image.save(buffer, format="WEBP" if suffix == ".webp" else "JPEG", quality=100, exif=exif)
    return buffer.getvalue()


def _png_text(text: Mapping[str, str]) -> PngInfo:
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for key, value in text.items():
        value = value.encode("utf-8", "replace").decode("utf-8")  # a prompt of the command line may be no UTF-8
        chunks.add_text(key, value)  # becomes iTXt (UTF-8) where Latin-1 does not suffice
    return chunks


def _exif_text(text: str) -> bytes:
    """EXIF data with ``text`` as UserComment."""
    from PIL import Image

    exif = Image.Exif()
    comment = text.encode("utf-16-be", errors="replace")[:LONGEST_COMMENT]
    exif[EXIF_FOLDER] = {USER_COMMENT: UNICODE + comment}
    return exif.tobytes()


def text_in_image(path: Path) -> dict[str, str]:
    """The text in an image file, by key; the comment of a WebP or JPEG file is its ``parameters``.

    Raises UserError for a file that is no image or cannot be read.
    """
    with open_image(path) as image:
        try:
            texts = {str(key): value for key, value in image.info.items() if isinstance(value, str)}
            if image.format == "PNG" and not texts:
                texts = dict(getattr(image, "text", {}))  # may stand behind the pixels, which takes longer
            if image.format == "PNG":
                return texts
            comment = image.getexif().get_ifd(EXIF_FOLDER).get(USER_COMMENT, b"")
        except Exception as error:  # for damaged bytes each decoder raises what it likes
            raise UserError(f"{path}: cannot read the text in the image ({reason(error)}).") from None
    if isinstance(comment, bytes) and comment.startswith(UNICODE):
        texts["parameters"] = comment[len(UNICODE) :].decode("utf-16-be", errors="replace")
    return texts
