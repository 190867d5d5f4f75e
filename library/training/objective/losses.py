"""The loss: per element, masked, per item, and over the whole batch of all processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from library.devices import to_device
from library.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass
class LossOptions:
    """Loss"""

    loss_type: Literal["l1", "l2", "huber", "smooth_l1"] = "l2"
    """Loss function."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """How the threshold of huber and smooth_l1 depends on the noise level."""
    huber_c: float = 0.1
    """Threshold of huber and smooth_l1: larger differences are penalised linearly."""
    huber_scale: float = 1.0
    """Factor for the threshold of huber and smooth_l1."""


def check_loss_options(options: LossOptions) -> None:
    """Raise UserError for a threshold that is not positive."""
    if options.loss_type in ("huber", "smooth_l1"):
        for name in ("huber_c", "huber_scale"):
            if getattr(options, name) <= 0:
                raise UserError(f"--{name} {getattr(options, name)} must be greater than 0.")


def huber_threshold(options: LossOptions, sigmas: torch.Tensor, noise_to_signal: torch.Tensor) -> torch.Tensor | None:
    """The threshold c of huber and smooth_l1 for each item, [batch] float32; None for the other losses.

    ``sigmas`` is timestep / 1000 in 0..1; ``noise_to_signal`` is sqrt(1 / SNR), which may be infinite. c is, all times
    ``huber_scale``: constant: huber_c; exponential: huber_c^sigma; snr: (1 - huber_c) / (1 + noise_to_signal)^2
    + huber_c.
    """
    if options.loss_type not in ("huber", "smooth_l1"):
        return None
    if options.huber_schedule == "constant":
        c = sigmas.new_full(sigmas.shape, options.huber_c)
    elif options.huber_schedule == "exponential":
        c = options.huber_c**sigmas
    else:
        c = (1 - options.huber_c) / (1 + noise_to_signal) ** 2 + options.huber_c
    return c * options.huber_scale


def elementwise_loss(
    options: LossOptions, prediction: torch.Tensor, target: torch.Tensor, threshold: torch.Tensor | None = None
) -> torch.Tensor:
    """The loss of every element in float32, shaped as ``prediction`` [batch, ...].

    d = prediction - target; l2: d^2; l1: |d|; huber: 2c(sqrt(d^2 + c^2) - c); smooth_l1: 2(sqrt(d^2 + c^2) - c) with
    c = ``threshold`` [batch], which the last two need.
    """
    difference = prediction.float() - target.float()
    if options.loss_type == "l2":
        return difference**2
    if options.loss_type == "l1":
        return difference.abs()
    if threshold is None:
        raise ValueError(f"{options.loss_type} needs a threshold per item")
    c = threshold.reshape(-1, *[1] * (difference.ndim - 1))
    # sqrt(d^2 + c^2) - c, written without the cancellation that eats small differences
    loss = 2 * difference**2 / ((difference**2 + c**2).sqrt() + c)
    return c * loss if options.loss_type == "huber" else loss


def loss_mask(
    masked_loss: bool, conditioning_images: torch.Tensor | None, alpha_masks: torch.Tensor | None
) -> torch.Tensor | None:
    """The mask of a batch at image size, [batch, H, W] in 0..1, or None when nothing is masked.

    With ``masked_loss`` the red channel of ``conditioning_images`` [batch, 3, H, W] (-1..1) comes first; otherwise
    ``alpha_masks`` [batch, H, W] (0..1) apply whenever the batch has them.
    """
    if masked_loss and conditioning_images is not None:
        return conditioning_images[:, 0].float() / 2 + 0.5
    return None if alpha_masks is None else alpha_masks.float()


def apply_mask(loss: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Multiply an elementwise loss [batch, channels, (frames,) h, w] by ``mask`` [batch, H, W], averaged over areas.

    The loss is not divided by the mask's area: an item with a small mask counts less.
    """
    if mask is None:
        return loss
    import torch

    mask = to_device(mask, loss.device, torch.float32).unsqueeze(1)
    mask = torch.nn.functional.interpolate(mask, size=tuple(loss.shape[-2:]), mode="area")
    return loss * (mask if loss.ndim == 4 else mask.unsqueeze(2))


def item_losses(loss: torch.Tensor) -> torch.Tensor:
    """The mean over all but the batch dimension, [batch]."""
    return loss.flatten(1).mean(1)


def batch_loss(losses: torch.Tensor, loss_weights: torch.Tensor, group_size: int, world_size: int = 1) -> torch.Tensor:
    """The scalar to run backward from: ``sum(losses * loss_weights) / group_size * world_size``.

    ``losses`` and ``loss_weights`` are [batch] of this process, ``group_size`` counts the real items of the batches of
    all processes together. Because processes average their gradients, the gradient is then that of the mean over all
    real items, however they are dealt out; a padding item has weight 0.
    """
    return (losses * to_device(loss_weights, losses.device)).sum() * (world_size / group_size)
