"""The loss of a batch: what every step of every family does between its batch and its backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from library.training.objective.losses import (
    LossOptions,
    apply_mask,
    elementwise_loss,
    huber_threshold,
    item_losses,
    loss_mask,
)
from library.training.objective.noise import per_item

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.batch import Batch
    from library.training.latents import Latents
    from library.training.objective.objective import Objective
    from library.training.objective.step_inputs import ItemDraws, NoisyInput
    from library.training.text_conditioning import TextConditioning


class StepModel(Protocol):
    """What a step needs: the parts of a run, and the two hooks by which a family calls its model."""

    accelerator: Any
    objective: Objective
    latents: Latents
    text: TextConditioning
    network: Any

    def conditioning(self, batch: Batch) -> dict[str, Tensor]:
        """The model's conditioning for a batch, beside latents and noise levels."""

    def predict(self, noisy: NoisyInput, conditioning: dict[str, Tensor]) -> Tensor:
        """The model's output."""


class StepLoss:
    """Says how well the network does on a batch. ``masked``: control images are masks of the loss."""

    def __init__(self, model: StepModel, options: LossOptions, masked: bool) -> None:
        self.model, self.options, self.masked = model, options, masked

    def __call__(self, batch: Batch, draws: ItemDraws, timestep: int | None = None) -> Tensor:
        """The loss of each item, [batch] float32; ``timestep`` (0..1000) fixes the noise level."""
        model = self.model
        noisy = model.objective.noisy_input(model.latents.of(batch, draws), draws, timestep)
        conditioning = model.conditioning(batch)
        with model.accelerator.autocast():
            prediction = model.objective.read_prediction(model.predict(noisy, conditioning), noisy)
        target = self.preserve_base_output(batch, noisy, conditioning)
        threshold = huber_threshold(self.options, noisy.sigmas, noisy.noise_to_signal)
        loss = elementwise_loss(self.options, prediction.float(), target, threshold)
        loss = loss * per_item(noisy.weights, loss)
        mask = loss_mask(self.masked, batch.conditioning_images, batch.alpha_masks)
        return item_losses(apply_mask(loss, mask))

    def preserve_base_output(self, batch: Batch, noisy: NoisyInput, conditioning: dict[str, Tensor]) -> Tensor:
        """The target, replaced by the base model's own prediction for items marked ``diff_output_preservation``."""
        import torch

        marked = [i for i, a in enumerate(batch.custom_attributes) if a.get("diff_output_preservation")]
        if not marked:
            return noisy.target
        model = self.model
        model.network.set_multiplier(0.0)
        with torch.no_grad(), model.accelerator.autocast():
            if model.text.trained:
                conditioning = model.conditioning(batch)
            prediction = model.objective.read_prediction(model.predict(noisy, conditioning), noisy).float()
        model.network.set_multiplier(batch.network_multipliers[0])
        target = noisy.target.clone()
        target[marked] = prediction[marked]
        return target
