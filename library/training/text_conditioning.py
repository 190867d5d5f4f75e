"""From captions to what the model is told of them: encoded ahead once, or at each step where encoders are trained.

``TextConditioning`` is the part of a run that is about text. A family's pipeline names its ``encoders``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from library.console import say, warn
from library.data.options import TextCacheOptions
from library.errors import UserError
from library.training.training_run import TrainingRun

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from library.data.batch import Batch
    from library.models.pipeline import Text
    from library.models.sampling import Role
    from library.prompt_options import PromptOptions


def prompt_texts(prompts: Iterable[PromptOptions]) -> list[Text]:
    """Every text of sample prompts with its role, each once: a prompt without a negative one has the empty one."""
    texts: dict[Text, None] = {}
    for prompt in prompts:
        texts |= {(prompt.prompt, "positive"): None, (prompt.negative_prompt or "", "negative"): None}
    return list(texts)


class TextConditioning(TrainingRun):
    """A run whose text encoders may be trained and whose outputs may be cached."""

    cache_text: bool = False
    """Whether captions are encoded ahead; the encoders that are not trained are released then."""

    @abstractmethod
    def text_format(self) -> Any:
        """How this family's text encoder outputs are cached (``library.data.cache.TextFormat``)."""

    def text_identity(self) -> str:
        """Text that changes with whatever the outputs of the text encoders depend on, but for the caption."""
        return self.part_identity(*self.pipeline.encoders)

    def take_text_options(self, cache: TextCacheOptions, trained: tuple[str, ...]) -> None:
        """Note which encoders are trained and whether outputs are cached. Raises UserError for a batch size below 1."""
        self.cache_text = cache.cache_text_encoder_outputs or cache.cache_text_encoder_outputs_to_disk
        self.trained_encoders = trained
        if cache.text_encoder_batch_size is not None and cache.text_encoder_batch_size < 1:
            raise UserError(f"--text_encoder_batch_size must be at least 1, not {cache.text_encoder_batch_size}.")

    def check_network(self) -> None:
        """As always; a module that says ``TRAINS_TEXT_ENCODERS = False`` is given none. Raises UserError."""
        super().check_network()
        if getattr(self.network_module, "TRAINS_TEXT_ENCODERS", True) or not self.trained_encoders:
            return
        name = self.options.network.network_module
        if self.options.network.network_train_text_encoder_only:
            raise UserError(f"--network_train_text_encoder_only: {name} trains no text encoder; leave it out.")
        say(f"{name} trains no text encoder")
        self.trained_encoders = ()
        self.report_unused(["text_encoder_lr"], f"with {name}")

    def build_datasets(self) -> None:
        """As always; captions that change from step to step cannot be encoded ahead."""
        super().build_datasets()
        if self.cache_text:
            from library.data.cache import check_text_cacheable

            for group in filter(None, (self.train_group, self.validation_group)):
                check_text_cacheable(group)

    def open_text_caches(self) -> list[Any]:
        """The text caches of training and validation data, looked through but not yet filled; none if not requested."""
        if not self.cache_text:
            return []
        from library.data.cache import TextCache

        return [
            TextCache(
                group,
                self.text_format(),
                to_disk=self.options.text_cache.cache_text_encoder_outputs_to_disk,
                skip_check=self.options.cache.skip_cache_check,
                identity=self.text_identity(),
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
            )
            for group in filter(None, (self.train_group, self.validation_group))
        ]

    def cache_text_outputs(self) -> None:
        """Encode captions and sample prompts ahead, if requested; encoders that are not trained are released."""
        self.prompt_conditioning: dict[Text, dict[str, Tensor]] = {}
        if not self.cache_text:
            return
        given = self.options.text_cache.text_encoder_batch_size
        size = given or self.train_group.datasets[0].settings.batch_size
        caches = self.open_text_caches()
        with self.load_in_turn():
            if any(cache.missing for cache in caches):
                self.pipeline.load_text_encoders(self.pipeline.encoders)
        self.cache_reports += [cache.fill(self.encode_frozen, batch_size=size) for cache in caches]
        self.accelerator.wait_for_everyone()
        for text in prompt_texts(self.samples.prompts):
            self.prompt_conditioning[text] = self.encode_frozen([text[0]], text[1])
        for encoder in set(self.pipeline.encoders) - set(self.trained_encoders):
            self.release(encoder)

    def encode_frozen(self, prompts: list[str], role: Role = "positive") -> dict[str, Tensor]:
        """The conditioning of prompts from every encoder, without gradients."""
        with self.accelerator.autocast():
            return self.pipeline.encode_prompts(prompts, role=role)

    def network_text_encoders(self, encoders: Collection[str]) -> Any:
        """These text encoders as network modules take them: a list in the family's order, None for the others."""
        modules = dict(zip(encoders, self.pipeline.load_text_encoders(encoders)))
        return [modules.get(name) for name in self.pipeline.encoders]

    def text_encoders_to_train(self) -> Any:
        """The trained encoders, ready to be trained through; the others stay in eval mode."""
        if self.options.precision.gradient_checkpointing:
            for module in self.pipeline.load_text_encoders(self.trained_encoders):
                module.enable_gradient_checkpointing()
                module.train()
        return self.network_text_encoders(self.trained_encoders)

    def text_encoders_to_merge(self) -> Any:
        """Every encoder that captions will still go through."""
        if self.cache_text:
            warn(
                "--base_weights: captions were encoded ahead, so what these files change in text encoders is used only "
                "where an encoder is trained."
            )
        return self.network_text_encoders(self.trained_encoders if self.cache_text else self.pipeline.encoders)

    def conditioning(self, batch: Batch) -> dict[str, Tensor]:
        """From the cache, with what a trained encoder gives for the caption in its place."""
        device = self.accelerator.device
        fixed = {name: tensor.to(device, non_blocking=True) for name, tensor in (batch.text or {}).items()}
        encoders = self.trained_encoders if fixed else self.pipeline.encoders
        if not encoders:
            return fixed
        with self.accelerator.autocast():
            return fixed | self.pipeline.encode_prompts(batch.captions, encoders, trained=self.trained_encoders)

    def sample_conditioning(self, text: str, role: Role = "positive") -> dict[str, Tensor]:
        """As in training: cached outputs, with those of trained encoders recomputed."""
        fixed = self.prompt_conditioning.get((text, role), {})
        encoders = self.trained_encoders if fixed else self.pipeline.encoders
        return {**fixed, **self.pipeline.encode_prompts([text], encoders, role)} if encoders else fixed

    def draw_sample(self, request: Any) -> Image:
        """The image of a request of the pipeline, whose prompts are encoded as in training."""
        roles = self.pipeline.guidance(request).roles
        request.conditioning = self.sample_conditioning(request.prompt)
        if "negative" in roles:
            request.negative_conditioning = self.sample_conditioning(request.negative_prompt or "", "negative")
        return self.pipeline.generate(request)
