"""The loss of a batch: what every step of every family does between its batch and its backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.console import warn
from library.training.objective.losses import apply_mask, elementwise_loss, huber_threshold, item_losses, loss_mask
from library.training.objective.noise import per_item
from library.training.objective.step_inputs import ItemDraws, NoisyInput
from library.training.text_conditioning import TextConditioning

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.batch import Batch


class TrainingStep(TextConditioning):
    """A run that can say how well its network does on a batch."""

    def item_losses(self, batch: Batch, draws: ItemDraws, timestep: int | None = None) -> Tensor:
        """The loss of each item, [batch] float32; ``timestep`` (0..1000) fixes the noise level."""
        options = self.options
        noisy = self.objective.noisy_input(self.clean_latents(batch, draws), draws, timestep)
        conditioning = self.conditioning(batch)
        with self.accelerator.autocast():
            prediction = self.objective.read_prediction(self.predict(noisy, conditioning), noisy)
        target = self.preserve_base_output(batch, noisy, conditioning)
        threshold = huber_threshold(options.loss, noisy.sigmas, noisy.noise_to_signal)
        loss = elementwise_loss(options.loss, prediction.float(), target, threshold)
        loss = loss * per_item(noisy.weights, loss)
        masks_in_folder = options.dataset.masked_loss and not self.takes_control_images
        mask = loss_mask(masks_in_folder, batch.conditioning_images, batch.alpha_masks)
        return item_losses(loss if mask is None else apply_mask(loss, mask.to(loss.device)))

    def clean_latents(self, batch: Batch, draws: ItemDraws) -> Tensor:
        """The batch's latents on the device, float32, from the cache or from the autoencoder."""
        import torch

        if batch.latents is not None:
            return batch.latents.to(self.accelerator.device, torch.float32, non_blocking=True)
        assert batch.images is not None
        latents = self.encode_images(batch.images, draws.generators("latents"))
        if not torch.isfinite(latents).all():
            warn("The autoencoder gave NaN latents, which were replaced by 0; try --no_half_vae.")
            latents = latents.nan_to_num(0.0, 0.0, 0.0)
        return latents

    def preserve_base_output(self, batch: Batch, noisy: NoisyInput, conditioning: dict[str, Tensor]) -> Tensor:
        """The target, replaced by the base model's own prediction for items marked ``diff_output_preservation``."""
        import torch

        marked = [i for i, a in enumerate(batch.custom_attributes) if a.get("diff_output_preservation")]
        if not marked:
            return noisy.target
        self.network.set_multiplier(0.0)
        with torch.no_grad(), self.accelerator.autocast():
            if self.trained_encoders:
                conditioning = self.conditioning(batch)
            prediction = self.objective.read_prediction(self.predict(noisy, conditioning), noisy).float()
        self.network.set_multiplier(float(batch.network_multipliers[0]))
        target = noisy.target.clone()
        target[marked] = prediction[marked]
        return target
