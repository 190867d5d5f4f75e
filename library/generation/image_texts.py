"""What text encoders make of the texts of ``gen_img.py``'s images: each distinct text is encoded once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from library.generation.image_prompts import ImagePrompt

if TYPE_CHECKING:
    from torch import Tensor

    from library.models.pipeline import Conditioning
    from library.models.sampling import Role

EncodedText = tuple[str, int, tuple[float, ...]]
"""A text, its chunks, and the strengths of the networks where they change text encoders."""
TEXTS_KEPT = 512  # of XL, each takes half a megabyte


class ImageTexts:
    """Encodes texts with ``pipeline``'s encoders and keeps the outputs, on the CPU.

    ``strengths(prompt, role, part)`` gives the networks' strengths for a text where they change text encoders, which
    ``set_strengths(strengths, encoder)`` gives to an encoder; ``at_work(encoder)`` is active while it encodes.
    """

    def __init__(
        self,
        pipeline: Any,
        strengths: Callable[[ImagePrompt, Role, int], tuple[float, ...]],
        set_strengths: Callable[[Sequence[float], str], None],
        at_work: Callable[[str], AbstractContextManager[None]],
    ):
        self.pipeline = pipeline
        self.strengths = strengths
        self.set_strengths = set_strengths
        self.at_work = at_work
        self.encoded: dict[EncodedText, Conditioning] = {}
        """The most recently used ones last."""
        self.last: tuple[Hashable, dict[Role, list[EncodedText]]] = (None, {})
        """Only the last prompt's: images of the same prompt follow each other."""

    def of(self, prompt: ImagePrompt, request: Any) -> dict[Role, list[EncodedText]]:
        """The texts of an image by their roles: of the positive one, each sub-prompt; all have the same length."""
        settings = (prompt.prompt, prompt.negative_prompt, prompt.scale, prompt.negative_scale, prompt.network_mul)
        if self.last[0] != settings:
            self.last = (settings, self._of(prompt, request))
        return self.last[1]

    def _of(self, prompt: ImagePrompt, request: Any) -> dict[Role, list[EncodedText]]:
        given: dict[Role, list[str]] = {
            "positive": self.pipeline.sub_prompts(prompt.prompt),
            "negative": [prompt.negative_prompt or ""],
        }
        roles: Sequence[Role] = self.pipeline.guidance(request).roles
        texts = {role: given.get(role, [""]) for role in roles}
        chunks = self.pipeline.chunks_needed([text for group in texts.values() for text in group])
        return {
            role: [(text, chunks, self.strengths(prompt, role, part)) for part, text in enumerate(group)]
            for role, group in texts.items()
        }

    def encode(self, groups: Sequence[Sequence[EncodedText]]) -> None:
        """Make the outputs of these texts that are not there yet, each by itself."""
        wanted = list(dict.fromkeys(itertools.chain.from_iterable(groups)))
        missing: dict[EncodedText, dict[str, Tensor]] = {text: {} for text in wanted if text not in self.encoded}
        for encoder in self.pipeline.encoders if missing else ():
            with self.at_work(encoder):
                for (text, chunks, strengths), outputs in missing.items():
                    if strengths:
                        self.set_strengths(strengths, encoder)
                    (made,) = self.pipeline.encode_image_texts([text], [encoder], chunks=chunks)
                    outputs.update({name: tensor.cpu() for name, tensor in made.items()})
        self.encoded.update(missing)
        self.encoded.update({text: self.encoded.pop(text) for text in wanted})  # the newest last
        while len(self.encoded) > max(TEXTS_KEPT, len(wanted)):
            del self.encoded[next(iter(self.encoded))]

    def conditioning(self, text: EncodedText) -> Conditioning:
        """The outputs of an encoded text, on the pipeline's device."""
        return {name: tensor.to(self.pipeline.device) for name, tensor in self.encoded[text].items()}
