"""Options of gen_img.py without effect are named with the reason, and those with an effect are not."""

from __future__ import annotations

import shlex

import pytest

from gen_img import GenImgOptions
from library.generation.image_prompts import ImagePrompt, parse_image_prompt
from library.generation.sampling_options import default_prompt
from library.generation.unused_options import unused_options
from library.options import parse_options


def lines(options: str, *prompts: str, is_xl: bool = False, known: bool = True) -> list[str]:
    parsed = parse_options(GenImgOptions, "", shlex.split(options))
    groups = (parsed.start, parsed.deep_shrink, parsed.gradual_latent)
    defaults = default_prompt(parsed.sampling, "sdxl" if is_xl else "sd1", *groups)
    read: list[ImagePrompt] = [parse_image_prompt(text, defaults) for text in prompts or ("a cat",)]
    return unused_options(parsed, is_xl, read if known else None, defaults)


@pytest.mark.parametrize(
    ("unused", "needed", "reason"),
    [
        ("--strength 0.5", "--image_path a.png", "without --image_path or --highres_fix_scale"),
        ("--strength 0.5", "--highres_fix_scale 0.5", "without --image_path or --highres_fix_scale"),
        ("--force_scheduler_zero_steps_offset", "--image_path a.png", "without --image_path"),
        ("--pyramid_noise_discount_range 0.1 0.2", "--pyramid_noise_prob 0.5", "without --pyramid_noise_prob"),
        ("--noise_offset_range 0.1 0.2", "--noise_offset_prob 0.5", "without --noise_offset_prob"),
        ("--ds_ratio 0.3", "--ds_depth_1 1", "without --ds_depth_1"),
        ("--gradual_latent_s_noise 2", "--gradual_latent_timesteps 700", "without --gradual_latent_timesteps"),
        ("--guide_image_path a.png", "--control_net_models b", "without ControlNets or guidance by images"),
        ("--guide_image_path a.png", "--vgg16_guidance_scale 1", "without ControlNets or guidance by images"),
        ("--clip_model a", "--clip_image_guidance_scale 1", "without guidance by CLIP"),
        ("--vgg16_guidance_layer 3", "--vgg16_guidance_scale 1", "without --vgg16_guidance_scale"),
        ("--clip_vision_model a", "--clip_vision_strength 1", "without --clip_vision_strength"),
    ],
)
def test_an_option_that_needs_another_is_named_without_it(unused, needed, reason):
    assert lines(unused) == [f"no effect {reason}: {unused.split()[0]}"]
    assert lines(f"{unused} {needed}") == lines(needed) == []


@pytest.mark.parametrize(
    ("prompt", "needed", "reason"),
    [
        ("--t 0.5", "--image_path a.png", "without --image_path or --highres_fix_scale"),
        ("--c a dog", "--clip_guidance_scale 100", "without --clip_guidance_scale"),
        ("--am 0.5", "--network_module networks.lora", "without --network_module"),
    ],
)
def test_an_option_of_a_prompt_that_needs_another_is_named_without_it(prompt, needed, reason):
    found = lines("", "a dog", f"a cat {prompt}")
    assert found == [f"no effect {reason}: {prompt.split()[0]}"]
    assert lines(needed, f"a cat {prompt}") == []


def test_sizes_that_only_xl_is_told():
    given = ("--original_height 512 --crop_top 3", "a cat --ow 512")
    assert lines(*given) == ["no effect for models other than Stable Diffusion XL: --original_height, --crop_top, --ow"]
    assert lines(*given, is_xl=True) == []


def test_a_prompt_may_request_what_the_command_line_describes():
    options = "--ds_ratio 0.3 --gradual_latent_ratio 0.7"
    assert len(lines(options, "a cat", "a dog --s 3")) == 2
    assert lines(options, "a cat", "a dog --dsd1 1", "a dog --glt 700") == []
    assert lines(options, known=False) == [], "in a session, or from a module, it may yet come"
