"""Gradual Latent: an image begins small and grows while it is drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from library.errors import UserError
from library.generation.features import Batch
from library.generation.gradual_latent import GradualLatentOptions, open_gradual_latent, parse_unsharp
from library.generation.image_prompts import ImagePrompt, parse_image_prompt
from library.generation.sampling_options import SamplingOptions, default_prompt, request_fields
from library.models.inpainting import Inpainting
from library.models.sampling import StepHook
from library.models.stable_diffusion.gradual_latent import Growth, Unsharp, blurred, sharpened
from library.models.stable_diffusion.pipeline import StableDiffusionFiles, StableDiffusionPipeline


class Sizes(StepHook):
    """Keeps the height and width after each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def after(self, latents: torch.Tensor, step: Any) -> torch.Tensor:
        self.seen.append(tuple(latents.shape[-2:]))
        return latents


@pytest.fixture(scope="module")
def pipeline(few_blocks_sd1) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(StableDiffusionFiles(few_blocks_sd1), torch.float32, "cpu")


def draw(
    pipeline: StableDiffusionPipeline, sizes: Sizes | None = None, hooks: Any = (), over: Any = None, **fields: Any
) -> torch.Tensor:
    values = {"width": 128, "height": 192, "sample_steps": 8, "seed": 3, "sample_sampler": "euler_a", "scale": 1.0}
    prompt = ImagePrompt("a cat", **{**values, **fields})
    request = pipeline.request(prompt, start_latents=over, **request_fields(SamplingOptions()))
    hook = open_gradual_latent().hook(Batch([prompt], [request], [0], 192, 128))
    hooks = [*([] if hook is None else [hook]), *hooks, *([] if sizes is None else [sizes])]
    return pipeline.generate_latents(request, hooks=hooks)


@pytest.mark.parametrize("v_prediction", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_a_ratio_of_1_is_the_plain_sampler(pipeline, v_prediction):
    """``--gradual_latent_ratio`` (``--glr``)."""
    pipeline.v_parameterization = v_prediction
    plain = draw(pipeline)
    same = draw(pipeline, gradual_latent_timesteps=750, gradual_latent_ratio=1.0)
    torch.testing.assert_close(same, plain, rtol=0, atol=1e-4)
    pipeline.v_parameterization = False


def test_sizes_grow_by_the_steps_that_were_given(pipeline):
    """``--gradual_latent_timesteps``, ``_ratio_step``, ``_every_n_steps`` (``--glt``, ``--gls``, ``--gle``)."""
    sizes = Sizes()  # timesteps 999, 856, 713, 571, 428, 285, 142, 0
    draw(pipeline, sizes, gradual_latent_timesteps=750, gradual_latent_ratio_step=0.25, gradual_latent_every_n_steps=2)
    assert sizes.seen == [(12, 8), (12, 8), (16, 8), (16, 8), (24, 16), (24, 16), (24, 16), (24, 16)]
    sizes = Sizes()
    draw(pipeline, sizes, gradual_latent_timesteps=1000, gradual_latent_ratio_step=0.5)
    assert set(sizes.seen) == {(24, 16)}


def test_the_last_size_is_the_one_that_was_asked_for(pipeline, caplog):
    """Sides that are no multiple of 64 pixels, and steps that end too early."""
    sizes = Sizes()
    latents = draw(pipeline, sizes, width=136, height=104, gradual_latent_timesteps=999, gradual_latent_ratio_step=0.25)
    assert latents.shape[-2:] == (13, 17) and sizes.seen[0] == (6, 8) and not caplog.text
    late = draw(pipeline, gradual_latent_timesteps=200)
    assert late.shape[-2:] == (24, 16) and "the steps ended at 0.625 of the size" in caplog.text


def test_the_noise_of_growing_steps_has_its_own_strength(pipeline):
    """``--gradual_latent_s_noise`` (``--glsn``)."""
    fields = {"gradual_latent_timesteps": 750, "gradual_latent_ratio_step": 0.5}
    plain = draw(pipeline, **fields)
    assert torch.equal(plain, draw(pipeline, **fields, gradual_latent_s_noise=1.0))
    assert (plain - draw(pipeline, **fields, gradual_latent_s_noise=0.5)).abs().max() > 0.01
    whole = draw(pipeline, gradual_latent_timesteps=750, gradual_latent_ratio=1.0, gradual_latent_s_noise=0.0)
    torch.testing.assert_close(whole, draw(pipeline), rtol=0, atol=1e-4)


def test_sharpening_acts_on_what_has_grown(pipeline):
    """``--gradual_latent_unsharp_params`` (``--glus``), with both targets."""
    fields = {"gradual_latent_timesteps": 750, "gradual_latent_ratio_step": 0.5}
    plain = draw(pipeline, **fields)
    for target in ("", ",0"):
        none = draw(pipeline, **fields, gradual_latent_unsharp_params=f"3,0.5,0{target}")
        torch.testing.assert_close(none, plain, rtol=0, atol=1e-4)
    sharp = [draw(pipeline, **fields, gradual_latent_unsharp_params=f"3,1,1{target}") for target in ("", ",1", ",0")]
    assert torch.equal(sharp[0], sharp[1])
    assert (sharp[1] - plain).abs().max() > 0.01 and (sharp[1] - sharp[2]).abs().max() > 1e-3


def test_the_blur_is_a_gaussian():
    flat = torch.full((1, 2, 5, 5), 3.0)
    torch.testing.assert_close(blurred(flat, 3, 0.7), flat)
    assert torch.equal(sharpened(flat, None), flat)
    point = torch.zeros(1, 1, 7, 7)
    point[0, 0, 3, 3] = 1
    spread = blurred(point, 5, 1.0)[0, 0]
    assert spread.sum() == pytest.approx(1)
    assert (spread[3, 4] / spread[3, 3]).item() == pytest.approx(torch.exp(torch.tensor(-0.5)).item())
    assert torch.equal(spread, spread.T) and spread[0].sum() == 0


def test_an_image_does_not_depend_on_its_batch(pipeline):
    prompt = ImagePrompt(
        "a cat", width=128, height=128, sample_steps=4, sample_sampler="euler_a", gradual_latent_timesteps=900
    )
    requests = [pipeline.request(prompt, seed=seed) for seed in range(3)]
    feature = open_gradual_latent()

    def drawn(*chosen: Any) -> torch.Tensor:
        return pipeline.generate_latents(*chosen, hooks=[feature.hook(Batch([prompt], chosen, [0], 128, 128))])

    torch.testing.assert_close(drawn(*requests)[2], drawn(requests[2])[0], rtol=0, atol=1e-3)


def test_what_a_mask_keeps_is_kept(pipeline):
    image = torch.randn(4, 24, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 24, 16)
    mask[..., :12, :] = 1
    latents = draw(
        pipeline, hooks=[Inpainting(mask)], over=image, strength=0.8, gradual_latent_timesteps=750,
        gradual_latent_ratio_step=0.25, gradual_latent_every_n_steps=1,
    )  # fmt: skip
    torch.testing.assert_close(latents[0, :, 12:], image[:, 12:])
    assert (latents[0, :, :12] - image[:, :12]).abs().mean() > 0.1


def test_it_is_requested_on_the_command_line_or_in_a_prompt(caplog):
    feature = open_gradual_latent()
    given = GradualLatentOptions(700, 0.6, 0.2, 4, 0.9, "3,0.5,0.5")
    plain, whole = (
        default_prompt(SamplingOptions(sampler="k_euler_a"), "sd1", options)
        for options in (GradualLatentOptions(), given)
    )
    assert not feature.acts_on(plain) and feature.acts_on(whole)
    assert feature.growth(whole) == Growth(700, 0.6, 0.2, 4, 0.9, Unsharp(3, 0.5, 0.5, True))
    line = parse_image_prompt("a cat --glt 500 --glr 0.7 --gls 0.1 --gle 1 --glsn 1.1 --glus 5,1,1,0", whole)
    assert feature.growth(line) == Growth(500, 0.7, 0.1, 1, 1.1, Unsharp(5, 1.0, 1.0, False))
    assert feature.growth(parse_image_prompt("a cat --gle 2", plain)) == Growth(650, 0.5, 0.125, 2, 1.0, None)
    assert len({feature.key(prompt) for prompt in (plain, whole, line)}) == 3
    assert feature.settings(whole) == {"gradual-latent": "700,0.6,0.2,4,0.9", "gradual-latent-unsharp": "3,0.5,0.5"}
    assert not caplog.text
    other = default_prompt(SamplingOptions(sampler="ddim"), "sd1", given)
    assert not feature.acts_on(other) and "needs --sampler euler_a; it has no effect with ddim" in caplog.text
    assert feature.key(other) is None and feature.hook(Batch([other], [], [0], 64, 64)) is None


@pytest.mark.parametrize(
    "options, message",
    [
        ("--glt -1", r"line 3: --gradual_latent_timesteps \(--glt\) must be from 0 to 1000, not -1"),
        ("--glr 0", r"--gradual_latent_ratio \(--glr\) must be above 0 and at most 1, not 0"),
        ("--gls 0", r"--gradual_latent_ratio_step \(--gls\) must be above 0, not 0"),
        ("--gle 0", r"--gradual_latent_every_n_steps \(--gle\) must be at least 1, not 0"),
        ("--glsn -1", r"--gradual_latent_s_noise \(--glsn\) must be at least 0, not -1"),
        ("--glus 4,1,1", r'\(--glus\) must be an odd whole number, .* not "4,1,1"'),
        ("--glus 3,1", r'not "3,1"'),
        ("--glus 3,0,1,1", r'not "3,0,1,1"'),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    plain = default_prompt(SamplingOptions(sampler="euler_a"), "sd1", GradualLatentOptions())
    with pytest.raises(UserError, match=message):
        open_gradual_latent().check(parse_image_prompt(f"a cat {options}", plain), "line 3: ")


def test_no_sharpening_is_none():
    assert parse_unsharp(None) is None
