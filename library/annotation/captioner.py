"""Captions by a model in the layout of transformers: BLIP, Florence-2 or Qwen2.5-VL."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.annotation.images import read_on_white
from library.annotation.model_files import read_model, read_processor
from library.errors import UserError
from library.lean_imports import transformers_class

if TYPE_CHECKING:
    import torch
    from PIL import Image

BLIP, FLORENCE, QWEN = "blip", "florence2", "qwen2_5_vl"
TASKS = ("CAPTION", "DETAILED_CAPTION", "MORE_DETAILED_CAPTION")
"""Of Florence-2, the last of them unless --prompt says otherwise."""
INSTRUCTION = "Describe this image in one paragraph."
"""For Qwen2.5-VL."""
QWEN_PIXELS = 1280 * 28 * 28
"""Most pixels of an image that Qwen2.5-VL is shown: 1280 of its tokens. Its own limit takes a GPU's whole memory."""
QWEN_RATIO = 200
"""Between an image's sides, beyond which it refuses the image."""
QWEN_TURN = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n"
)
"""Its published conversation format, with one image."""
IMAGE_TOKEN = "<|image_pad|>"
TOKENS = {BLIP: 75, FLORENCE: 256, QWEN: 256}
"""Most tokens of a caption, unless --max_length says otherwise."""


@dataclass
class SentenceOptions:
    """Sentences (of BLIP, Florence-2 and Qwen2.5-VL)"""

    prompt: str | None = None
    """What to write: an instruction (Qwen2.5-VL), a task (Florence-2: CAPTION, ...), the caption's beginning (BLIP)."""
    max_length: int | None = None
    """Most tokens of a caption; unset means 75 for BLIP and 256 for the others."""
    min_length: int = 0
    """Fewest tokens of a caption."""
    num_beams: int | None = None
    """Beams of the search for the likeliest caption; unset means as many as the model's files recommend."""
    top_p: float | None = None
    """Draw words among the likeliest, up to this total probability; unset means no drawing."""
    seed: int = 0
    """Of the draws of --top_p."""


@dataclass(frozen=True)
class Caption:
    """What a model wrote."""

    text: str
    complete: bool
    """Whether it ended by itself, before the limit."""


class Captioner(ABC):
    """A model that writes captions."""

    model_class: tuple[str, str]
    """Module below ``transformers.models``, and name."""

    def __init__(
        self, folder: Path, kind: str, options: SentenceOptions, device: torch.device, dtype: torch.dtype
    ) -> None:
        """``kind`` is one of ``CAPTIONERS``. Raises UserError for options and files that are wrong."""
        self.options, self.device, self.dtype = options, device, dtype
        self.prompt = self.check_prompt(options)
        self.search = search_settings(kind, options)
        self.tokenizer, self.images = self.read_settings(folder)
        self.model = read_model(transformers_class(*self.model_class), folder, device, dtype)
        self.keep_within_positions()

    def check_prompt(self, options: SentenceOptions) -> str:
        """The prompt, as the model takes it. Raises UserError."""
        return options.prompt or ""

    def read_settings(self, folder: Path) -> tuple[Any, Any]:
        """The tokenizer, and what makes tensors of images and texts. Raises UserError."""
        auto = transformers_class("auto.processing_auto", "AutoProcessor")
        processor = read_processor(auto, folder, backend="pil")
        return processor.tokenizer, processor

    def keep_within_positions(self) -> None:
        """Captions end where the model has no positions any more. Raises UserError for a --max_length beyond them."""
        places, before = self.model.config.text_config.max_position_embeddings, self.words_before()
        longest = before + max(self.options.max_length or 1, self.options.min_length)
        if longest > places:
            raise UserError(f"--max_length: prompt and caption have {longest} tokens then; the model takes {places}.")
        self.search["max_new_tokens"] = min(self.search["max_new_tokens"], places - before)

    def words_before(self) -> int:
        """How many tokens of the prompt stand before a caption, in the same positions."""
        return 0

    @abstractmethod
    def inputs(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Tensors for the model's ``generate``, by name."""

    def given(self, inputs: dict[str, Any]) -> int:
        """How many tokens of the output come before the caption: a start token."""
        return 1

    def end_tokens(self) -> set[int]:
        """Those that end a caption."""
        ends = self.model.generation_config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}

    def prepare(self, path: Path) -> Image.Image:
        """The image. Raises UserError."""
        return read_on_white(path)

    def __call__(self, prepared: list[Any]) -> list[Caption]:
        """The caption of each image."""
        import torch

        inputs = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in self.inputs(prepared).items()
        }
        draws = self.options.top_p is not None
        on_gpu = [self.device] if self.device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(on_gpu, enabled=draws):
            if draws:
                torch.manual_seed(self.options.seed)
            found = self.model.generate(**inputs, **self.search)
        return [self._caption(row) for row in found[:, self.given(inputs) :].tolist()]

    def _caption(self, row: list[int]) -> Caption:
        ended = len(row) < self.search["max_new_tokens"] or bool(self.end_tokens() & set(row[:-1]))
        return Caption(self.tokenizer.decode(row, skip_special_tokens=True), ended)


def search_settings(kind: str, options: SentenceOptions) -> dict[str, Any]:
    """How words are chosen: the likeliest, without draws, unless requested. Raises UserError for what cannot be."""
    most = TOKENS[kind] if options.max_length is None else options.max_length
    if most < 1 or not 0 <= options.min_length <= most:
        raise UserError("--max_length must be at least 1, and --min_length from 0 to --max_length.")
    if options.num_beams is not None and options.num_beams < 1:
        raise UserError(f"--num_beams must be at least 1, not {options.num_beams}.")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise UserError(f"--top_p must be above 0 and at most 1, not {options.top_p}.")
    settings: dict[str, Any] = {"max_new_tokens": most, "min_new_tokens": options.min_length, "do_sample": False}
    if options.top_p is not None:
        settings |= {"do_sample": True, "top_p": options.top_p, "top_k": 0, "temperature": 1.0, "num_beams": 1}
    if options.num_beams is not None:
        settings["num_beams"] = options.num_beams
    return settings


class BlipCaptioner(Captioner):
    """BLIP, whose prompt is the beginning of each caption."""

    model_class = ("blip.modeling_blip", "BlipForConditionalGeneration")

    def words_before(self) -> int:
        """The caption's beginning."""
        return len(self.tokenizer(self.prompt, add_special_tokens=False)["input_ids"])

    def inputs(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Pixels, and the caption's beginning."""
        texts = {"text": [self.prompt] * len(images)} if self.prompt else {}
        return dict(self.images(images=list(images), return_tensors="pt", **texts))

    def end_tokens(self) -> set[int]:
        """BLIP ends with the separator."""
        return {self.model.config.text_config.sep_token_id}


class FlorenceCaptioner(Captioner):
    """Florence-2, which knows three tasks that are captions."""

    model_class = ("florence2.modeling_florence2", "Florence2ForConditionalGeneration")

    def check_prompt(self, options: SentenceOptions) -> str:
        """A task of Florence-2, with or without its brackets."""
        task = (options.prompt or TASKS[-1]).strip("<> ").upper()
        if task not in TASKS:
            raise UserError(
                f'--prompt: "{options.prompt}" is not a captioning task of Florence-2; {", ".join(TASKS)} are.'
            )
        return f"<{task}>"

    def inputs(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Pixels, and the task in words."""
        texts = [self.prompt] * len(images)
        return dict(self.images(images=list(images), text=texts, return_tensors="pt", padding=True))


class QwenCaptioner(Captioner):
    """Qwen2.5-VL, which answers an instruction."""

    model_class = ("qwen2_5_vl.modeling_qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration")

    def check_prompt(self, options: SentenceOptions) -> str:
        """The instruction."""
        return options.prompt or INSTRUCTION

    def read_settings(self, folder: Path) -> tuple[Any, Any]:
        """The tokenizer, and what makes patches of images; the processor for both would need torchvision."""
        tokenizer = read_processor(transformers_class("auto.tokenization_auto", "AutoTokenizer"), folder)
        tokenizer.padding_side = "left"
        images = read_processor(
            transformers_class("qwen2_vl.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil"), folder
        )
        images.size = {side: min(pixels, QWEN_PIXELS) for side, pixels in dict(images.size).items() if pixels}
        return tokenizer, images

    def prepare(self, path: Path) -> Image.Image:
        """The image. Raises UserError for one so long that the model has no patches for it."""
        image = super().prepare(path)
        if max(image.size) > QWEN_RATIO * min(image.size):
            raise UserError(f"{path}: is {image.width}x{image.height}; Qwen2.5-VL sees no image of such a shape.")
        return image

    def inputs(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Patches of all images behind each other, and conversations padded on the left."""
        patches = dict(self.images(images=list(images), return_tensors="pt"))
        counts = patches["image_grid_thw"].prod(dim=1) // self.images.merge_size**2
        texts = [QWEN_TURN.format(image=IMAGE_TOKEN * int(count), prompt=self.prompt) for count in counts]
        words = self.tokenizer(texts, padding=True, return_tensors="pt")
        ids = words["input_ids"]
        kinds = (ids == self.model.config.image_token_id).int()
        return {"input_ids": ids, "attention_mask": words["attention_mask"], "mm_token_type_ids": kinds, **patches}

    def given(self, inputs: dict[str, Any]) -> int:
        """The conversation comes before the answer."""
        return inputs["input_ids"].shape[1]


CAPTIONERS: dict[str, type[Captioner]] = {BLIP: BlipCaptioner, FLORENCE: FlorenceCaptioner, QWEN: QwenCaptioner}
