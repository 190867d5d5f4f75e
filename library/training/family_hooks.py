"""What a model family gives to the trainer: its constants and its answers, one subject each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from library.prompt_options import PromptOptions
from library.training.objective.objective import Objective
from library.training.objective.step_inputs import NoisyInput
from library.training.run_options import ObsoleteDistributionOptions
from library.training.training_options import TrainingOptions

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.batch import Batch
    from library.models.pipeline import ImageRequest, Pipeline
    from library.training.text_conditioning import TextConditioning


class FamilyHooks(ABC):
    """The interface between ``NetworkTrainer``, which calls these, and a family's trainer, which overrides them."""

    options_class: ClassVar[type] = TrainingOptions
    family: ClassVar[str] = "Stable Diffusion"
    """Its name in messages, and in states."""
    unused_groups: ClassVar[tuple[type, ...]] = (ObsoleteDistributionOptions,)
    """Option groups without effect for this family."""
    bucket_divisor: ClassVar[int] = 64
    size_divisor: ClassVar[int] = 8
    sample_side: ClassVar[int] = 512
    """Side of a sample image whose prompt says nothing, in pixels."""
    sample_step: ClassVar[int] = 8
    """Sides of sample images are multiples of this many pixels."""
    cache_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """The parts of the pipeline whose files the caches of ``latents`` and ``text`` need; all of them unless named."""

    prediction_type: str | None = None
    """``modelspec.prediction_type``."""
    default_resolution: int = 1024
    """Side of the square in a file's metadata when ``--resolution`` is not given."""
    takes_control_images: bool = False
    """Whether a ControlNet takes part, to which the images of conditioning_data_dir go."""
    trained_encoders: tuple[str, ...] = ()
    """The text encoders that the network is put into, by the pipeline's names."""

    options: Any
    pipeline: Pipeline[Any]
    text: TextConditioning

    @classmethod
    def of(cls, options: Any) -> Any:
        """The trainer of the model that the options name, in a family with several kinds of models."""
        return cls(options)  # type: ignore[call-arg]

    @abstractmethod
    def report_unused(self, names: Iterable[str], reason: str = "") -> None:
        """Of the options ``names``, say and remember those that were given: they change nothing (for this family)."""

    def check_family_options(self) -> None:
        """Refuse what this family forbids (UserError) and say which given options have no effect."""

    def prompt_options_without_effect(self) -> Iterable[str]:
        """Fields of ``PromptOptions`` that this family's sample images don't use."""
        return ()

    @abstractmethod
    def make_pipeline(self, parts: tuple[Any, ...] = ()) -> Any:
        """The family's pipeline over the files of ``parts``, all of them if empty; only headers are read.

        Raises UserError.
        """

    @abstractmethod
    def latent_format(self) -> Any:
        """How this family's latents are cached (``library.data.cache.LatentFormat``)."""

    @abstractmethod
    def text_format(self) -> Any:
        """How this family's text encoder outputs are cached (``library.data.cache.TextFormat``)."""

    def text_identity(self) -> str:
        """Text that changes with whatever the outputs of the text encoders depend on, but for the caption."""
        return self.pipeline.identity(*self.pipeline.encoders)

    def control_parts(self) -> set[str]:
        """The parts of the pipeline that control images need at every step."""
        return set()

    def network_base(self) -> Any:
        """The transformer or U-Net as network modules take it: with the module names that their files have."""
        return self.pipeline.load_transformer()

    def network_text_encoders(self, encoders: Mapping[str, Any]) -> Any:
        """These text encoders as network modules take them: a list in the family's order, None for the others."""
        return [encoders.get(name) for name in self.pipeline.encoders]

    def conditioning(self, batch: Batch) -> dict[str, Tensor]:
        """The model's conditioning for a batch, on the device, with gradients where a text encoder is trained."""
        return self.text.of(batch)

    @abstractmethod
    def make_objective(self) -> Objective:
        """What is trained; the pipeline is open by now."""

    @abstractmethod
    def predict(self, noisy: NoisyInput, conditioning: dict[str, Tensor]) -> Tensor:
        """The model's output, which ``objective.read_prediction`` makes comparable with ``noisy.target``."""

    def sample_size(self, prompt: PromptOptions) -> tuple[int, int]:
        """Width and height of a sample image: multiples of ``sample_step`` not above the prompt's, at least 64."""
        sides = (side or self.sample_side for side in (prompt.width, prompt.height))
        width, height = (max(64, side // self.sample_step * self.sample_step) for side in sides)
        return width, height

    @abstractmethod
    def sample_request(self, prompt: PromptOptions) -> ImageRequest:
        """The image that a sample prompt asks for."""

    def while_sampling(self) -> AbstractContextManager[Any]:
        """Around the drawing of sample images: what the model does otherwise then than in training."""
        return nullcontext()

    @abstractmethod
    def family_metadata(self) -> dict[str, Any]:
        """The ``ss_*`` entries that only this family writes, ``ss_base_model_version`` among them."""

    @abstractmethod
    def architecture(self) -> tuple[str, str]:
        """``modelspec.architecture`` without ``/lora``, and ``modelspec.implementation``."""
