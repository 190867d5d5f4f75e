"""Deep Shrink: inner blocks work on a smaller image while there is much noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from library.errors import UserError
from library.generation.deep_shrink import DeepShrinkOptions, open_deep_shrink
from library.generation.features import Batch
from library.generation.image_prompts import ImagePrompt, parse_image_prompt
from library.generation.sampling_options import SamplingOptions, default_prompt
from library.models.stable_diffusion.deep_shrink import DeepShrink, Shrinking, entries
from library.models.stable_diffusion.pipeline import StableDiffusionFiles, StableDiffusionPipeline


@pytest.fixture(scope="module", params=["few_blocks_sd1", "few_blocks_sdxl"])
def pipeline(request) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(StableDiffusionFiles(request.getfixturevalue(request.param)), torch.float32, "cpu")


def draw(pipeline: StableDiffusionPipeline, sizes: list[torch.Size] | None = None, **fields: Any) -> torch.Tensor:
    values = {"width": 88, "height": 104, "sample_steps": 2, "seed": 3, "sample_sampler": "ddim", **fields}
    prompt = ImagePrompt("a cat", **values)
    feature = open_deep_shrink(pipeline)
    request = pipeline.request(prompt)
    hook = feature.hook(Batch([prompt], [request], [0], prompt.height, prompt.width))
    seen = pipeline.load("unet").mid_block.register_forward_pre_hook(
        lambda module, positional: None if sizes is None else sizes.append(positional[0].shape[-2:])
    )
    try:
        return pipeline.generate_latents(request, hooks=[] if hook is None else [hook])
    finally:
        seen.remove()


def test_a_ratio_of_1_changes_nothing(pipeline):
    """``--ds_ratio`` (``--dsr``): the way up that resizes is otherwise diffusers' own."""
    plain = draw(pipeline)
    for depth in range(len(entries(pipeline.load("unet"), pipeline.variant == "sdxl"))):
        same = draw(pipeline, deep_shrink_depth_1=depth, deep_shrink_timesteps_1=0, deep_shrink_ratio=1.0)
        torch.testing.assert_close(same, plain, rtol=0, atol=1e-5)


def test_every_depth_works_on_a_smaller_image_and_gives_the_whole_size(pipeline):
    """``--ds_depth_1`` (``--dsd1``), with sides that no stage halves evenly."""
    sizes: list[torch.Size] = []
    plain = draw(pipeline, sizes)
    deepest = open_deep_shrink(pipeline).deepest
    whole, drawn = sizes[0], [plain]
    for depth in range(deepest + 1):
        sizes.clear()
        latents = draw(pipeline, sizes, deep_shrink_depth_1=depth, deep_shrink_timesteps_1=0, deep_shrink_ratio=0.5)
        assert latents.shape == plain.shape == (1, 4, 13, 11)
        assert sizes[0][0] <= whole[0] / 2 + 1 and sizes[0][1] <= whole[1] / 2 + 1
        assert all((latents - other).abs().max() > 1e-4 for other in drawn), "each depth has an effect of its own"
        drawn.append(latents)


def test_it_acts_at_high_noise_only(pipeline):
    """``--ds_timesteps_1``, ``--ds_depth_2``, ``--ds_timesteps_2`` (``--dst1``, ``--dsd2``, ``--dst2``)."""
    shrinking = Shrinking(depth_1=1, timesteps_1=650, depth_2=0, timesteps_2=300, ratio=0.5)
    assert [shrinking.depth(t) for t in (999, 650, 649, 300, 299, 0)] == [1, 1, 0, 0, None, None]
    sizes: list[torch.Size] = []
    draw(pipeline, sizes, deep_shrink_depth_1=1, sample_steps=4)
    assert sizes[0] != sizes[1] == sizes[2] == sizes[3], "timesteps 750, 500, 250 and 0, with 650 as default"
    sizes.clear()
    draw(pipeline, sizes, deep_shrink_depth_1=1, deep_shrink_depth_2=0, deep_shrink_timesteps_2=500, sample_steps=4)
    assert sizes[0] != sizes[3] and sizes[1] != sizes[3] == sizes[2]


def test_nothing_of_it_is_left_in_the_u_net(pipeline):
    unet = pipeline.load("unet")
    plain, before = draw(pipeline), [dict(module.__dict__) for module in unet.up_blocks]
    draw(pipeline, deep_shrink_depth_1=1)
    assert [module.__dict__ for module in unet.up_blocks] == before
    assert not any(module._forward_pre_hooks for module in unet.modules())
    assert torch.equal(draw(pipeline), plain)
    with pytest.raises(ZeroDivisionError), DeepShrink(Shrinking(0, 0, None, 0, 0.5), False).attached(unet):
        raise ZeroDivisionError
    assert [module.__dict__ for module in unet.up_blocks] == before


def test_it_is_requested_on_the_command_line_or_in_a_prompt(pipeline):
    """A prompt's options act on that prompt alone, and prompts with other ones are not drawn together."""
    feature = open_deep_shrink(pipeline)
    plain = default_prompt(SamplingOptions(), "sd1", DeepShrinkOptions())
    given = default_prompt(SamplingOptions(), "sd1", DeepShrinkOptions(ds_depth_1=1, ds_ratio=0.4, ds_timesteps_1=700))
    assert not feature.acts_on(plain) and feature.acts_on(given)
    assert feature.shrinking(given) == Shrinking(1, 700, None, 650, 0.4)
    line = parse_image_prompt("a cat --dsd1 0 --dst1 600 --dsd2 1 --dst2 300 --dsr 0.3", given)
    assert feature.shrinking(line) == Shrinking(0, 600, 1, 300, 0.3)
    assert feature.shrinking(parse_image_prompt("a cat --dsr 0.3", plain)) == Shrinking(3, 650, None, 650, 0.3)
    assert len({feature.key(prompt) for prompt in (plain, given, line)}) == 3
    assert feature.settings(given) == {"deep-shrink": "1,700,0.4"} and feature.settings(plain) == {}


@pytest.mark.parametrize(
    "options, message",
    [
        ("--dsd1 99", r"line 3: --ds_depth_1 \(--dsd1\) must be from 0 to \d for this model, not 99"),
        ("--dsd1 0 --dsd2 -1", r"--ds_depth_2 \(--dsd2\) must be from 0 to \d for this model, not -1"),
        ("--dsd1 0 --dst1 1001", r"--ds_timesteps_1 \(--dst1\) must be from 0 to 1000, not 1001"),
        ("--dsd1 0 --dst2 -5", r"--ds_timesteps_2 \(--dst2\) must be from 0 to 1000, not -5"),
        ("--dsd1 0 --dsr 0", r"--ds_ratio \(--dsr\) must be above 0 and at most 1, not 0"),
    ],
)
def test_what_cannot_be_is_refused(pipeline, options, message):
    prompt = parse_image_prompt(f"a cat {options}", default_prompt(SamplingOptions(), "sd1", DeepShrinkOptions()))
    with pytest.raises(UserError, match=message):
        open_deep_shrink(pipeline).check(prompt, "line 3: ")
