"""Guidance by what is seen in the image: at each step, the image that is coming is decoded, and a loss is lowered.

The gradient of the loss runs back through the autoencoder and the U-Net to the latents, so it takes the memory of a
training step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.generation.features import Batch, Feature
from library.models.sampling import DiffusersSolver, Guidance, Predict, Solver, Step, StepHook

if TYPE_CHECKING:
    from library.generation.image_prompts import ImagePrompt

SAMPLERS = ("ddim", "pndm", "lms", "k_lms")
SMALLEST_ALPHA = 1e-6

Loss = Callable[[Tensor], Tensor]
"""Of images [B, 3, H, W] in 0..1 the loss of each, [B]."""


class GuideModel(Protocol):
    """A model that sees images, which is loaded when it is needed."""

    @property
    def loaded(self) -> list[nn.Module]:
        """The module, once it is loaded."""

    def model_bytes(self, dtype: torch.dtype) -> dict[str, int]:
        """The memory of its weights in that dtype, by its name."""


class ImageGuide(Feature):
    """A feature that leads images towards an aim."""

    option: ClassVar[str]
    parts = ("autoencoder",)

    def __init__(self, pipeline: Any, scale: float, model: GuideModel):
        self.pipeline = pipeline
        self.scale = scale
        self.model = model

    @property
    def loaded(self) -> Sequence[nn.Module]:
        """The model that sees images, once it is loaded."""
        return self.model.loaded

    @property
    def model_bytes(self) -> Mapping[str, int]:
        """Its weights, in the pipeline's dtype."""
        return self.model.model_bytes(self.pipeline.dtype)

    def check(self, prompt: ImagePrompt, place: str) -> None:
        """Raises UserError for a sampler that it doesn't work with."""
        sampler = prompt.sample_sampler
        if sampler is not None and sampler not in SAMPLERS:
            raise UserError(
                f"{place}{self.option} works with the samplers ddim, pndm and lms only, not with {sampler}."
            )

    def settings(self, prompt: ImagePrompt) -> Mapping[str, str]:
        """The scale."""
        return {self.option.removeprefix("--").replace("_", "-"): f"{self.scale:g}"}

    def hook(self, batch: Batch) -> StepHook | None:
        """What leads the images of a batch; None where there is no aim."""
        loss = self.loss(batch)
        return None if loss is None else GuideHook(self.pipeline.decode_pixels, loss, self.scale)

    @abstractmethod
    def loss(self, batch: Batch) -> Loss | None:
        """How far images are from their aims; None where there are none."""


class GuideHook(StepHook):
    """Changes predictions (ddim, pndm) or latents (lms) so that ``scale`` times the loss of the images falls.

    ``decode`` gives images in -1..1 of latents as the U-Net knows them, and lets gradients through.
    """

    def __init__(self, decode: Callable[[Tensor], Tensor], loss: Loss, scale: float):
        self.decode = decode
        self.loss = loss
        self.scale = scale
        self.latents = torch.empty(0)
        self.shift: Tensor | None = None

    def solver(self, solver: Solver) -> Solver:
        """The solver, whose latents are changed where it knows amounts of noise as sigmas."""
        assert isinstance(solver, (DiffusersSolver, ShiftedSolver))
        self.inner = solver
        self.scheduler = solver.scheduler
        return ShiftedSolver(solver, self) if hasattr(self.scheduler, "sigmas") else solver

    def guidance(self, guidance: Guidance) -> Guidance:
        """The guidance, whose prediction is changed."""
        return Guided(guidance, self)

    def before(self, latents: Tensor, step: Step) -> Tensor:
        """Remembers what the step begins with."""
        self.latents = latents
        return latents

    def corrected(self, prediction: Tensor, predict: Predict, step: Step) -> Tensor:
        """The prediction that leads to less loss; for a solver with sigmas, ``shift`` is what the latents get."""
        is_velocity = self.scheduler.config.prediction_type == "v_prediction"
        if hasattr(self.scheduler, "sigmas"):
            sigma = float(self.scheduler.sigmas[step.index])
            fall = self._fall(predict, step, *_of_sigma(sigma, is_velocity))
            self.shift = fall * sigma**2
            return prediction
        alpha = float(self.scheduler.alphas_cumprod[int(step.timestep)])
        if alpha < SMALLEST_ALPHA:  # pure noise, in which nothing is to be seen
            return prediction
        noise = (1 - alpha) ** 0.5
        of_latents, of_prediction = (alpha**0.5, -noise) if is_velocity else (alpha**-0.5, -noise * alpha**-0.5)
        # Early on, of the image that is coming; late, what is there already.
        fall = self._fall(predict, step, noise * of_latents + 1 - noise, noise * of_prediction)
        return prediction - (noise * alpha**-0.5 if is_velocity else noise) * fall

    def _fall(self, predict: Predict, step: Step, of_latents: float, of_prediction: float) -> Tensor:
        """The direction of less loss [B, ...], of the images of ``of_latents x + of_prediction model(x)``."""
        with torch.enable_grad():
            latents = self.latents.detach().float().requires_grad_()
            (prediction,) = predict(self.inner.model_input(latents, step), step, ("positive",))
            seen = of_latents * latents + of_prediction * prediction.float()
            images = (self.decode(seen) / 2 + 0.5).clamp(0, 1)
            loss = self.scale * self.loss(images).sum()
            (gradient,) = torch.autograd.grad(loss, latents)
        return -gradient


def _of_sigma(sigma: float, is_velocity: bool) -> tuple[float, float]:
    """The shares of latents and prediction in the image that is coming."""
    return (1 / (sigma**2 + 1), -sigma / (sigma**2 + 1) ** 0.5) if is_velocity else (1.0, -sigma)


class Guided(Guidance):
    """Another guidance, whose prediction a hook corrects."""

    def __init__(self, inner: Guidance, hook: GuideHook):
        self.inner = inner
        self.hook = hook
        self.roles = inner.roles

    def __call__(self, predict: Predict, latents: Tensor, step: Step) -> Tensor:
        return self.hook.corrected(self.inner(predict, latents, step), predict, step)


class ShiftedSolver(Solver):
    """Another solver, that goes on from latents which a hook has shifted."""

    def __init__(self, inner: Any, hook: GuideHook):
        self.inner = inner
        self.hook = hook
        self.timesteps = inner.timesteps
        self.scheduler = inner.scheduler

    def start(self, noise: Tensor, image: Tensor | None = None, first: int = 0) -> Tensor:
        return self.inner.start(noise, image, first)

    def model_input(self, latents: Tensor, step: Step) -> Tensor:
        return self.inner.model_input(latents, step)

    def advance(self, prediction: Tensor, latents: Tensor, step: Step, generators: Sequence[torch.Generator]) -> Tensor:
        if self.hook.shift is not None:
            latents, self.hook.shift = latents + self.hook.shift, None
        return self.inner.advance(prediction, latents, step, generators)
