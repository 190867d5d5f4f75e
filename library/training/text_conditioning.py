"""From captions to the model's conditioning: encoded ahead once, or at each step where encoders are trained."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from library.training.caching import Caching, warn_of_full_disk

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.batch import Batch
    from library.data.cache import CacheReport, TextCache
    from library.models.pipeline import ImageRequest, Pipeline, Text
    from library.models.sampling import Role
    from library.prompt_options import PromptOptions
    from library.training.data import TrainingData
    from library.training.distribution import LoadInTurn


def prompt_texts(prompts: Iterable[PromptOptions]) -> list[Text]:
    """Every text of sample prompts with its role, each once: a prompt without a negative one has the empty one."""
    texts: dict[Text, None] = {}
    for prompt in prompts:
        texts |= {(prompt.prompt, "positive"): None, (prompt.negative_prompt or "", "negative"): None}
    return list(texts)


class TextConditioning:
    """The conditioning of captions and sample prompts.

    ``trained`` encoders encode at each step, with gradients; ``caching`` None: the others do so as well.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        data: TrainingData,
        accelerator: Any,
        caching: Caching | None,
        trained: tuple[str, ...],
    ) -> None:
        self.pipeline, self.data, self.accelerator = pipeline, data, accelerator
        self.caching, self.trained = caching, trained
        self.prompts: dict[Text, dict[str, Tensor]] = {}
        """The conditioning of the sample prompts, if it was made ahead."""
        self._caches: list[TextCache] | None = None

    @property
    def encoders_at_steps(self) -> tuple[str, ...]:
        """The encoders that captions go through at every step."""
        return self.trained if self.caching else self.pipeline.encoders

    def open_caches(self) -> list[TextCache]:
        """The caches, looked through but not yet filled; none if not requested."""
        if self.caching is None:
            return []
        from library.data.cache import TextCache

        return self.caching.open(TextCache, self.data, self.accelerator)

    def prepare(self, prompts: Sequence[PromptOptions]) -> None:
        """Look through the caches, and find the tokenizers that will be needed, before anything is encoded.

        Raises UserError where there is none.
        """
        self._caches = self.open_caches()
        encodes_all = not self.caching or bool(prompts) or any(cache.missing for cache in self._caches)
        self.pipeline.load_tokenizers(self.pipeline.encoders if encodes_all else self.trained)

    def fill_caches(self, load_in_turn: LoadInTurn, prompts: Sequence[PromptOptions] = ()) -> list[CacheReport]:
        """Encode captions and sample prompts ahead, if requested; encoders that are not trained are released."""
        if self.caching is None:
            return []
        caches = self.open_caches() if self._caches is None else self._caches
        warn_of_full_disk(caches, self.accelerator.num_processes)
        with load_in_turn():
            if any(cache.missing for cache in caches):
                self.pipeline.load_text_encoders(self.pipeline.encoders)
        with self.pipeline.blaming_files(*self.pipeline.encoders):
            reports = [cache.fill(self.encode, batch_size=self.caching.batch_size) for cache in caches]
        self.accelerator.wait_for_everyone()
        for text, role in prompt_texts(prompts):
            self.prompts[text, role] = self.encode([text], role)
        for encoder in set(self.pipeline.encoders) - set(self.trained):
            self.pipeline.release(encoder)
        return reports

    def encode(self, prompts: Sequence[str], role: Role = "positive") -> dict[str, Tensor]:
        """The conditioning of prompts from every encoder, without gradients."""
        with self.accelerator.autocast():
            return self.pipeline.encode_prompts(prompts, role=role)

    def of(self, batch: Batch) -> dict[str, Tensor]:
        """The conditioning of a batch on the device: cached, with what trained encoders give in its place."""
        device, kept = self.accelerator.device, self.pipeline.read_on_host
        fixed = {
            name: tensor if name in kept else tensor.to(device, non_blocking=True)
            for name, tensor in (batch.text or {}).items()
        }
        encoders = self._encoders_beside(fixed)
        if not encoders:
            return fixed
        with self.accelerator.autocast():
            return fixed | self.pipeline.encode_prompts(batch.captions, encoders, trained=self.trained)

    def of_prompt(self, text: str, role: Role = "positive") -> dict[str, Tensor]:
        """The conditioning of a sample prompt, made as in training."""
        fixed = self.prompts.get((text, role), {})
        encoders = self._encoders_beside(fixed)
        return {**fixed, **self.pipeline.encode_prompts([text], encoders, role)} if encoders else fixed

    def add_to(self, request: ImageRequest) -> None:
        """Give a request the conditioning of its prompts."""
        request.conditioning = self.of_prompt(request.prompt)
        if "negative" in self.pipeline.guidance(request).roles:
            request.negative_conditioning = self.of_prompt(request.negative_prompt or "", "negative")

    def _encoders_beside(self, fixed: dict[str, Tensor]) -> Collection[str]:
        return self.trained if fixed else self.pipeline.encoders
