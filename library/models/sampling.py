"""Denoising, the same for every model family: from noise (or a noisy image) to latents, step by step.

Three kinds of object take part. A ``Solver`` knows the noise levels and how a prediction becomes a step. ``Guidance``
decides for which prompts a model is run at a step and makes one prediction of the results. A ``StepHook`` is a feature
that is added to all this: it looks at the latents before and after a step, wraps the calls of the model, or replaces
one of the others.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Role = Literal["positive", "negative", "unconditional"]
"""What a text is for: what an image shall show, what it shall keep away from, or nothing (the empty text)."""


@dataclass(frozen=True)
class Step:
    """One call of the model."""

    index: int
    """From 0."""
    count: int
    """How many there are; samplers of second order have more than the steps that were requested."""
    timestep: Tensor
    """The model's noise level, 0-dim: a sigma in 0..1 (flow matching, float32) or a timestep in 0..999."""


Predict = Callable[[Tensor, Step, Sequence[Role]], Sequence[Tensor]]
"""``predict(latents [B, ...], step, roles)``: a prediction [B, ...] for the prompts of each of these roles."""


@dataclass(frozen=True)
class ModelCall:
    """What the denoiser is called with: a row for each role and image, all images of the first role first."""

    latents: Tensor
    """[rows, ...], as the solver gives them to the model."""
    timesteps: Tensor
    """[rows]"""
    conditioning: Mapping[str, Tensor]
    """Batch first, ``rows`` items."""
    roles: tuple[Role, ...]
    step: Step
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the pipeline's ``predict``, by name."""

    @property
    def images(self) -> int:
        """How many images are generated together."""
        return len(self.latents) // len(self.roles)


RunModel = Callable[[ModelCall], Tensor]
"""Gives the prediction [rows, ...]."""


# ---- guidance -------------------------------------------------------------------------------------------------------


class Guidance(ABC):
    """Makes one prediction of those for the prompts of several roles. An object serves one batch of images.

    So it may keep what it needs from step to step, such as a momentum, and act differently from step to step by
    ``Step.index``.
    """

    roles: tuple[Role, ...]
    """The roles whose prompts must be encoded."""

    @abstractmethod
    def __call__(self, predict: Predict, latents: Tensor, step: Step) -> Tensor:
        """The prediction [B, ...] for ``latents`` [B, ...], as the model is given them."""


class Unguided(Guidance):
    """The prediction for the positive prompt."""

    roles = ("positive",)

    def __call__(self, predict: Predict, latents: Tensor, step: Step) -> Tensor:
        return predict(latents, step, self.roles)[0]


class ClassifierFree(Guidance):
    """From the negative prediction ``scale`` times as far as the positive one (Ho and Salimans 2022)."""

    roles = ("negative", "positive")

    def __init__(self, scale: float):
        self.scale = scale

    def __call__(self, predict: Predict, latents: Tensor, step: Step) -> Tensor:
        negative, positive = predict(latents, step, self.roles)
        return negative + self.scale * (positive - negative)


class NegativeScale(Guidance):
    """Classifier-free guidance from the empty prompt, and away from the negative one by a scale of its own.

    With the predictions u for the empty prompt, c for the positive and n for the negative one, it is
    ``u + scale (c - u) - negative_scale (n - u)``.
    """

    roles = ("negative", "positive", "unconditional")

    def __init__(self, scale: float, negative_scale: float):
        self.scale, self.negative_scale = scale, negative_scale

    def __call__(self, predict: Predict, latents: Tensor, step: Step) -> Tensor:
        negative, positive, empty = predict(latents, step, self.roles)
        return empty + self.scale * (positive - empty) - self.negative_scale * (negative - empty)


class TruncatedClassifierFree(Guidance):
    """Classifier-free guidance near the noise only, whose result is no longer than the positive prediction.

    Guided while ``t = 1 - sigma`` (0 at noise, 1 at the image) is below ``truncation``; after that, the positive
    prediction alone is computed. 1 guides every step, 0 none. With ``renorm`` above 0, a guided prediction whose norm
    over everything but the batch exceeds ``renorm`` times that of the positive prediction is shortened to it, as in the
    official code of Lumina Image 2.0.
    """

    roles = ("negative", "positive")

    def __init__(self, scale: float, truncation: float = 1.0, renorm: float = 0.0):
        self.scale = scale
        self.truncation = truncation
        self.renorm = renorm

    def __call__(self, predict: Predict, latents: Tensor, step: Step) -> Tensor:
        if 1 - step.timestep.item() >= self.truncation:
            return predict(latents, step, ("positive",))[0]
        negative, positive = (prediction.float() for prediction in predict(latents, step, self.roles))
        guided = negative + self.scale * (positive - negative)
        if self.renorm <= 0:
            return guided
        longest = self.renorm * _norms(positive)
        return guided * (longest / _norms(guided).clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1)


class AdaptiveProjected(Guidance):
    """Classifier-free guidance for the first steps, adaptive projected guidance (Sadat et al. 2024) for the others.

    Up to and with step ``last_plain`` it is classifier-free guidance with ``scale``. After that, the difference of the
    predictions (with a momentum over all steps, shortened to ``longest``) counts ``weight`` times, without its part
    along the positive prediction. ``rescale`` and ``rescale_projected`` in 0..1 bring a result's standard deviation
    that far back to the positive prediction's (Lin et al. 2023). Constants as in HunyuanImage-2.1's official code.
    """

    roles = ("negative", "positive")
    weight = 10.0
    longest = 10.0
    momentum = -0.5

    def __init__(self, scale: float, last_plain: int, rescale: float = 0.0, rescale_projected: float = 0.0):
        self.scale = scale
        self.last_plain = last_plain
        self.rescale, self.rescale_projected = rescale, rescale_projected
        self.moving: Tensor | None = None

    def __call__(self, predict: Predict, latents: Tensor, step: Step) -> Tensor:
        negative, positive = (prediction.float() for prediction in predict(latents, step, self.roles))
        difference = positive - negative
        self.moving = difference if self.moving is None else difference + self.momentum * self.moving
        if step.index <= self.last_plain:
            return _rescaled(negative + self.scale * difference, positive, self.rescale)
        short = self.moving * (self.longest / _norms(self.moving).clamp(min=torch.finfo(torch.float32).tiny)).clamp(
            max=1
        )
        projected = negative + self.weight * _orthogonal(short, positive)
        return _rescaled(projected, positive, self.rescale_projected)


def _orthogonal(differences: Tensor, directions: Tensor) -> Tensor:
    """What is left of each of ``differences`` [B, ...] without its part along ``directions``; in float64."""
    wide, along = differences.double(), directions.double()
    along = along / _norms(along).clamp(min=torch.finfo(torch.float64).tiny)
    share = (wide * along).sum(dim=tuple(range(1, wide.ndim)), keepdim=True)
    return (wide - share * along).to(differences.dtype)


def _rescaled(guided: Tensor, positive: Tensor, amount: float) -> Tensor:
    """``guided`` [B, ...], the share ``amount`` of it with the standard deviation of ``positive``."""
    if not amount:
        return guided
    axes = tuple(range(1, guided.ndim))
    return amount * guided * positive.std(axes, keepdim=True) / guided.std(axes, keepdim=True) + (1 - amount) * guided


def _norms(predictions: Tensor) -> Tensor:
    """The norm of each prediction of a batch [B, ...], as [B, 1, ...]."""
    return torch.linalg.vector_norm(predictions, dim=tuple(range(1, predictions.ndim)), keepdim=True)


# ---- solvers --------------------------------------------------------------------------------------------------------


class Solver(ABC):
    """The noise levels of one batch of images, and how predictions lead from each to the next. Used once."""

    timesteps: Tensor
    """The model's noise level at each step, [steps]."""

    @abstractmethod
    def start(self, noise: Tensor, image: Tensor | None = None, first: int = 0) -> Tensor:
        """The latents that step ``first`` begins with: noise alone, or the latents ``image`` under that much noise."""

    def model_input(self, latents: Tensor, step: Step) -> Tensor:
        """What the model is given of ``latents``."""
        return latents

    @abstractmethod
    def advance(self, prediction: Tensor, latents: Tensor, step: Step, generators: Sequence[torch.Generator]) -> Tensor:
        """The latents after ``step``; new noise for image i comes from ``generators[i]``."""


class FlowEuler(Solver):
    """Euler steps along the velocity (noise minus image); ``sigmas`` [steps + 1] fall from 1 (noise) to 0 (image)."""

    def __init__(self, sigmas: Tensor):
        self.sigmas = sigmas.tolist()
        self.timesteps = sigmas[:-1].float()

    def start(self, noise: Tensor, image: Tensor | None = None, first: int = 0) -> Tensor:
        if image is None:
            return noise
        sigma = self.sigmas[first]
        return (1 - sigma) * image + sigma * noise

    def advance(self, prediction: Tensor, latents: Tensor, step: Step, generators: Sequence[torch.Generator]) -> Tensor:
        return latents + (self.sigmas[step.index + 1] - self.sigmas[step.index]) * prediction


class DiffusersSolver(Solver):
    """A diffusers scheduler, new and of this solver alone, that is to make ``steps`` steps.

    An image that is drawn over gets the noise of the step ``lead`` steps before the first one.
    """

    PNDM_STEPS = 4
    """With fewer, there is no room for the Runge-Kutta steps that pndm begins with."""

    noise: Tensor
    """What the latents began with, [B, ...]."""
    image: Tensor | None = None
    """The latents that are drawn over, [B, ...]."""

    def __init__(self, scheduler: Any, steps: int, lead: int = 0):
        if steps < self.PNDM_STEPS and "skip_prk_steps" in scheduler.config:
            scheduler.register_to_config(skip_prk_steps=True)
        scheduler.set_timesteps(steps)
        self.scheduler = scheduler
        self.steps = steps
        self.lead = lead
        self.timesteps = scheduler.timesteps
        self.takes_generator = "generator" in inspect.signature(scheduler.step).parameters

    def start(self, noise: Tensor, image: Tensor | None = None, first: int = 0) -> Tensor:
        self.noise, self.image = noise, image
        if image is None:
            return noise * float(self.scheduler.init_noise_sigma)
        self._begin(max(first - self.lead, 0))
        latents = self.noisy_image(max(first - self.lead, 0)) if first < len(self.timesteps) else image
        self._begin(first)
        return latents

    def first_step(self, strength: float) -> int:
        """The step that drawing over an image begins with: the share ``strength`` (0..1) of all steps is left."""
        steps = min(int(self.steps * strength) + self.lead, self.steps)
        return (self.steps - steps + self.lead) * self.scheduler.order

    def noisy_image(self, index: int) -> Tensor:
        """The image that is drawn over under the noise of step ``index``, the next one; after the last one, itself."""
        assert self.image is not None
        if index >= len(self.timesteps):
            return self.image
        return self.scheduler.add_noise(self.image, self.noise, self.timesteps[index : index + 1])

    def _begin(self, index: int) -> None:
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(index)

    def model_input(self, latents: Tensor, step: Step) -> Tensor:
        return self.scheduler.scale_model_input(latents, step.timestep)

    def advance(self, prediction: Tensor, latents: Tensor, step: Step, generators: Sequence[torch.Generator]) -> Tensor:
        arguments = {"generator": list(generators)} if self.takes_generator and generators else {}
        return self.scheduler.step(prediction, step.timestep, latents, **arguments).prev_sample


# ---- the loop -------------------------------------------------------------------------------------------------------


class StepHook:
    """A feature of the denoising loop for one batch of images; what it does not need, it leaves as it is here.

    Several work together: the first one is the innermost around the model, the guidance and the solver, and the first
    to see the latents [B, ...] before and after every step, of which it may give back others.
    """

    def attached(self, denoiser: Any) -> AbstractContextManager[Any]:
        """While the context is active, what has to be changed in the loaded ``denoiser`` is changed."""
        return nullcontext()

    def solver(self, solver: Solver) -> Solver:
        """The solver of the batch."""
        return solver

    def guidance(self, guidance: Guidance) -> Guidance:
        """The guidance of the batch."""
        return guidance

    def around(self, run: RunModel, call: ModelCall) -> Tensor:
        """The prediction [rows, ...] of a call of the model; ``run`` makes it, of this call or another."""
        return run(call)

    def before(self, latents: Tensor, step: Step) -> Tensor:
        """The latents that the step begins with."""
        return latents

    def after(self, latents: Tensor, step: Step) -> Tensor:
        """The latents that the next step begins with, or the final ones."""
        return latents


def denoise(
    predict: Predict,
    solver: Solver,
    noise: Tensor,
    guidance: Guidance | None = None,
    *,
    generators: Sequence[torch.Generator] = (),
    hooks: Sequence[StepHook] = (),
    image: Tensor | None = None,
    first: int = 0,
    progress: bool = False,
) -> Tensor:
    """The latents [B, ...], float32, that ``noise`` [B, ...] of unit variance leads to.

    ``generators`` holds one for each image, for samplers that add noise on the way. With ``image``, latents of that
    shape, the way begins with it under the noise of step ``first``. ``progress`` shows a progress bar.
    """
    from tqdm import tqdm

    guidance = guidance or Unguided()
    for hook in hooks:
        solver, guidance = hook.solver(solver), hook.guidance(guidance)
    latents = solver.start(noise.float(), None if image is None else image.float(), first)
    count = len(solver.timesteps)
    for index in tqdm(range(first, count), desc="denoising", disable=not progress):
        step = Step(index, count, solver.timesteps[index])
        for hook in hooks:
            latents = hook.before(latents, step)
        prediction = guidance(predict, solver.model_input(latents, step), step).float()
        latents = solver.advance(prediction, latents, step, generators)
        for hook in hooks:
            latents = hook.after(latents, step)
    return latents
