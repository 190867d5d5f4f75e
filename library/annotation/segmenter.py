"""Masks by a model of transformers that tells apart what an image shows: SegFormer, Mask2Former or CLIPSeg."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.annotation.images import read_on_white
from library.annotation.model_files import read_config, read_model, read_processor
from library.errors import UserError, did_you_mean
from library.lean_imports import transformers_class

if TYPE_CHECKING:
    import numpy
    import torch
    from PIL import Image
    from torch import Tensor

LABELS_SHOWN = 20


class Segmenter(ABC):
    """A model that finds what counts in an image."""

    model_class: tuple[str, str]
    """Module below ``transformers.models``, and name; of its processor too."""
    processor_class: tuple[str, str]
    processor_settings: dict[str, str] = {}

    def __init__(
        self, folder: Path, classes: Sequence[str], threshold: float, device: torch.device, dtype: torch.dtype
    ) -> None:
        """``classes`` is what counts. Raises UserError for classes that the model does not know, and damaged files."""
        self.device, self.dtype, self.threshold = device, dtype, threshold
        self.classes = list(classes)
        self.chosen = self.choose(self.classes, read_config(folder))
        self.processor = read_processor(transformers_class(*self.processor_class), folder, **self.processor_settings)
        self.model = read_model(transformers_class(*self.model_class), folder, device, dtype)

    def choose(self, classes: Sequence[str], config: dict[str, Any]) -> list[int]:
        """The model's numbers of the classes. Raises UserError."""
        try:
            labels = {int(number): str(label) for number, label in config["id2label"].items()}
        except (AttributeError, KeyError, ValueError):
            raise UserError("--model: its config.json names no classes (id2label).") from None
        by_name = {label.lower(): number for number, label in labels.items()}
        shown = ", ".join(list(labels.values())[:LABELS_SHOWN]) + (", ..." if len(labels) > LABELS_SHOWN else "")
        for name in classes:
            if name.lower() not in by_name:
                raise UserError(
                    f'--classes: "{name}" is none of the {len(labels)} classes that the model knows ({shown}).'
                    f"{did_you_mean(name, by_name)}"
                )
        if not classes:
            raise UserError(f"--classes is missing: which of the model's {len(labels)} classes count ({shown})?")
        return [by_name[name.lower()] for name in classes]

    def prepare(self, path: Path) -> Image.Image:
        """The image. Raises UserError."""
        return read_on_white(path)

    def __call__(self, prepared: list[Any]) -> list[numpy.ndarray]:
        """The mask of each image, at its size."""
        import torch

        with torch.inference_mode():
            return [
                self.mask(scores, (image.height, image.width)).float().cpu().numpy()
                for image, scores in zip(prepared, self.scores(prepared))
            ]

    @abstractmethod
    def scores(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Of each image, how much speaks for each class where: [classes, h, w]."""

    def mask(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """Where the class that most speaks for is one that counts: [height, width], 0 or 1.

        One class after the other is brought to the image's size: all at once may be gigabytes.
        """
        import torch

        best = {counts: torch.full(size, -torch.inf, device=scores.device) for counts in (True, False)}
        for number, score in enumerate(scores):
            counts = number in self.chosen
            best[counts] = torch.maximum(best[counts], _resized(score[None], size)[0])
        return best[True] > best[False]

    def _inputs(self, **given: Any) -> dict[str, Any]:
        inputs = self.processor(return_tensors="pt", **given)
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }


def _resized(values: Tensor, size: tuple[int, int]) -> Tensor:
    """[channels, h, w] at another size, linearly between the pixels."""
    import torch

    return torch.nn.functional.interpolate(values[None], size=size, mode="bilinear", align_corners=False)[0]


class SegformerSegmenter(Segmenter):
    """SegFormer, which gives each place of an image a score for each class."""

    model_class = ("segformer.modeling_segformer", "SegformerForSemanticSegmentation")
    processor_class = ("segformer.image_processing_pil_segformer", "SegformerImageProcessorPil")

    def scores(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """The model's scores, in a quarter of the size that it sees."""
        return list(self.model(**self._inputs(images=list(images))).logits.float())


class Mask2FormerSegmenter(Segmenter):
    """Mask2Former, which finds pieces, each with a shape and a class."""

    model_class = ("mask2former.modeling_mask2former", "Mask2FormerForUniversalSegmentation")
    processor_class = ("mask2former.image_processing_pil_mask2former", "Mask2FormerImageProcessorPil")

    def scores(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """The sum of the pieces' shapes for each class.

        Images that come to different sizes are no batch: the padding that it takes would change what is found.
        """
        import torch

        singly = [self._inputs(images=[image]) for image in images]
        sizes = {inputs["pixel_values"].shape for inputs in singly}
        if len(sizes) == 1:
            return self._scores({name: torch.cat([inputs[name] for inputs in singly]) for name in singly[0]})
        return [scores for inputs in singly for scores in self._scores(inputs)]

    def _scores(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        found = self.model(**inputs)
        scores = []
        for pieces, shapes, seen in zip(
            found.class_queries_logits.float(), found.masks_queries_logits.float(), inputs["pixel_mask"]
        ):
            used = (int(seen.any(dim=1).sum()), int(seen.any(dim=0).sum()))
            shapes = _resized(shapes, (seen.shape[0], seen.shape[1])).sigmoid()[:, : used[0], : used[1]]
            kinds = pieces.softmax(dim=-1)[:, :-1]  # the last one is "nothing"
            scores.append((kinds.T @ shapes.flatten(1)).unflatten(1, used))
        return scores


class ClipsegSegmenter(Segmenter):
    """CLIPSeg, which looks for what a text says."""

    model_class = ("clipseg.modeling_clipseg", "CLIPSegForImageSegmentation")
    processor_class = ("auto.processing_auto", "AutoProcessor")
    processor_settings = {"backend": "pil"}

    def __init__(
        self, folder: Path, classes: Sequence[str], threshold: float, device: torch.device, dtype: torch.dtype
    ) -> None:
        """``classes`` are texts. Raises UserError for those that are too long, and for damaged files."""
        super().__init__(folder, classes, threshold, device, dtype)
        most = self.model.config.text_config.max_position_embeddings
        for text in classes:
            count = len(self.processor.tokenizer(text)["input_ids"])
            if count > most:
                raise UserError(f'--classes: "{text}" has {count} tokens; the model reads {most} at most.')

    def choose(self, classes: Sequence[str], config: dict[str, Any]) -> list[int]:
        """Every text counts."""
        if not all(text.strip() for text in classes or [""]):
            raise UserError('--classes is missing: what CLIPSeg looks for, such as --classes "a cat".')
        return list(range(len(classes)))

    def scores(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """The probability of each text everywhere."""
        count = len(self.classes)
        every = [image for image in images for _ in self.classes]
        inputs = self._inputs(images=every, text=self.classes * len(images), padding=True)
        logits = self.model(**inputs).logits.float()
        return list(logits.reshape(len(images), count, *logits.shape[-2:]).sigmoid())

    def mask(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """Where the probability of one of the texts is at least ``--threshold``."""
        return _resized(scores, size).amax(dim=0) >= self.threshold


SEGMENTERS: dict[str, type[Segmenter]] = {
    "segformer": SegformerSegmenter,
    "mask2former": Mask2FormerSegmenter,
    "clipseg": ClipsegSegmenter,
}
