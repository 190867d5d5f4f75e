"""Losses, masks and the reduction over batches and processes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import UserError
from library.training.objective.losses import (
    LossOptions,
    apply_mask,
    batch_loss,
    check_loss_options,
    elementwise_loss,
    huber_threshold,
    item_losses,
    loss_mask,
)


def formula(kind: str, d: float, c: float) -> float:
    """The definitions, in Python floats."""
    if kind == "l2":
        return d * d
    if kind == "l1":
        return abs(d)
    base = math.hypot(d, c) - c
    return 2 * c * base if kind == "huber" else 2 * base


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["l1", "l2", "huber", "smooth_l1"]), st.floats(-50, 50, width=32), st.floats(1 / 128, 2.0, width=32)
)
def test_elementwise_losses_follow_their_definitions(kind, d, c):
    prediction, target = torch.tensor([[[[d]]]]), torch.zeros(1, 1, 1, 1)
    loss = elementwise_loss(LossOptions(loss_type=kind), prediction, target, torch.tensor([c]))
    assert loss.item() == pytest.approx(formula(kind, d, c), rel=1e-5, abs=1e-6)


def test_small_differences_keep_their_loss_and_gradient():
    prediction = torch.full((1, 1, 1, 1), 1e-5, requires_grad=True)
    loss = elementwise_loss(LossOptions(loss_type="huber"), prediction, torch.zeros(1, 1, 1, 1), torch.tensor([0.5]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(1e-10, rel=1e-4)  # c * d^2 / c
    assert prediction.grad.item() == pytest.approx(2e-5, rel=1e-4)


def test_loss_is_float32_whatever_the_model_gives():
    loss = elementwise_loss(LossOptions(), torch.ones(1, 2, 2, 2, dtype=torch.bfloat16), torch.zeros(1, 2, 2, 2))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", lambda s: 0.1),
        ("exponential", lambda s: 0.1**s),
        # (1 - c) / (1 + s / (1 - s))^2 + c = (1 - c) (1 - s)^2 + c
        ("snr", lambda s: 0.9 * (1 - s) ** 2 + 0.1),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_huber_thresholds_follow_their_schedules_up_to_pure_noise(schedule, expected, scale):
    sigmas = torch.tensor([0.0, 0.2, 0.75, 1.0])
    options = LossOptions(loss_type="huber", huber_schedule=schedule, huber_c=0.1, huber_scale=scale)
    threshold = huber_threshold(options, sigmas, sigmas / (1 - sigmas))
    assert threshold is not None
    assert threshold.tolist() == pytest.approx([scale * expected(s) for s in (0.0, 0.2, 0.75, 1.0)], rel=1e-5)


def test_default_huber_schedule_works_from_the_first_step():
    options = LossOptions(loss_type="smooth_l1")
    sigmas = torch.tensor([1.0, 0.5])
    threshold = huber_threshold(options, sigmas, sigmas / (1 - sigmas))
    loss = elementwise_loss(options, torch.ones(2, 4, 3, 3), torch.zeros(2, 4, 3, 3), threshold)
    assert torch.isfinite(loss).all()


def test_losses_without_threshold_ask_for_none():
    assert huber_threshold(LossOptions(loss_type="l1"), torch.ones(2), torch.ones(2)) is None
    with pytest.raises(ValueError, match="threshold"):
        elementwise_loss(LossOptions(loss_type="huber"), torch.ones(1, 1), torch.ones(1, 1))


@pytest.mark.parametrize("name", ["huber_c", "huber_scale"])
def test_a_threshold_that_is_not_positive_is_refused(name):
    with pytest.raises(UserError, match=name):
        check_loss_options(LossOptions(loss_type="huber", **{name: 0.0}))
    check_loss_options(LossOptions(loss_type="l2", **{name: 0.0}))


def test_masked_loss_takes_the_red_channel_of_the_conditioning_image():
    images = torch.full((1, 3, 16, 16), -1.0)
    images[:, 0, :, 8:] = 1.0
    mask = loss_mask(True, images, torch.zeros(1, 16, 16))
    assert mask is not None
    assert mask[0, :, :8].eq(0).all()
    assert mask[0, :, 8:].eq(1).all()


def test_alpha_masks_apply_without_the_switch_and_conditioning_images_do_not():
    alpha = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loss_mask(False, None, alpha), alpha)
    assert loss_mask(False, torch.zeros(2, 3, 16, 16), None) is None
    assert loss_mask(True, None, None) is None


def test_masks_are_averaged_over_the_area_of_each_latent_element():
    mask = torch.rand(2, 48, 32, generator=torch.Generator().manual_seed(0))
    loss = torch.rand(2, 5, 6, 4, generator=torch.Generator().manual_seed(1))
    means = mask.reshape(2, 6, 8, 4, 8).mean((2, 4))
    torch.testing.assert_close(apply_mask(loss, mask), loss * means[:, None])


def test_a_mask_lowers_the_loss_in_proportion_to_its_area():
    mask = torch.zeros(1, 16, 16)
    mask[:, :, :4] = 1
    loss = item_losses(apply_mask(torch.ones(1, 3, 2, 4), mask))
    assert loss.item() == pytest.approx(0.25)
    assert apply_mask(loss, None) is loss


def test_item_losses_are_means_over_everything_but_the_batch():
    loss = torch.rand(3, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(item_losses(loss), loss.mean((1, 2, 3)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 11), st.integers(0, 100))
def test_gradients_averaged_over_processes_are_those_of_the_mean_over_real_items(world_size, items, seed):
    """Items are dealt to processes in equal batches, filled up with padding items of weight 0."""
    made = torch.Generator().manual_seed(seed)
    losses = torch.rand(items, generator=made, dtype=torch.float64)
    weights = torch.rand(items, generator=made, dtype=torch.float64)
    size = math.ceil(items / world_size)
    padded = torch.cat([losses, torch.rand(world_size * size - items, dtype=torch.float64, generator=made)])
    padded_weights = torch.cat([weights, torch.zeros(world_size * size - items, dtype=torch.float64)])
    per_process = [
        batch_loss(padded[r * size : (r + 1) * size], padded_weights[r * size : (r + 1) * size], items, world_size)
        for r in range(world_size)
    ]
    torch.testing.assert_close(torch.stack(per_process).mean(), (losses * weights).mean())
