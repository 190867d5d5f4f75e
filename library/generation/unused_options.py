"""Options of ``gen_img.py`` that have no effect because another one is missing, which does not make them mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from library.generation.image_prompts import LETTERS, ImagePrompt
from library.options import changed_options

TOLD_TO_XL = (
    *("original_height", "original_width", "original_height_negative", "original_width_negative"),
    *("crop_top", "crop_left"),
)
SHRINKING = ("ds_timesteps_1", "ds_depth_2", "ds_timesteps_2", "ds_ratio")
GROWING = ("ratio", "ratio_step", "every_n_steps", "s_noise", "unsharp_params")
BY_IMAGE = ("clip_image_guidance_scale", "vgg16_guidance_scale")
CONTROL = ("control_net_models", "control_net_lllite_models")


def unused_options(
    options: Any, is_xl: bool, prompts: Sequence[ImagePrompt] | None, defaults: ImagePrompt
) -> list[str]:
    """A line for each reason for which given ``options``, or options in ``prompts``, have no effect.

    ``prompts`` are all of the run, which may request a feature themselves; None: they are not known ahead. ``defaults``
    are the command line as a prompt.
    """
    changed = changed_options(options)

    def given(*names: str) -> bool:
        return any(name in changed for name in names)

    def requested(field: str) -> bool:
        return prompts is None or any(getattr(prompt, field) is not None for prompt in prompts)

    def in_prompts(letter: str) -> bool:
        field = LETTERS[letter][0]
        return any(getattr(prompt, field) != getattr(defaults, field) for prompt in prompts or ())

    clip_text, growing = given("clip_guidance_scale"), [f"gradual_latent_{name}" for name in GROWING]
    rules: tuple[tuple[str, bool, Sequence[str], Sequence[str]], ...] = (
        ("without --image_path or --highres_fix_scale", given("image_path", "highres_fix_scale"), ["strength"], "t"),
        (
            "without --image_path",
            given("image_path"),
            ["force_scheduler_zero_steps_offset", "highres_fix_strength"],
            (),
        ),
        ("for models other than Stable Diffusion XL", is_xl, TOLD_TO_XL, ("ow", "oh", "nw", "nh", "ct", "cl")),
        ("without --pyramid_noise_prob", given("pyramid_noise_prob"), ["pyramid_noise_discount_range"], ()),
        ("without --noise_offset_prob", given("noise_offset_prob"), ["noise_offset_range"], ()),
        ("without --ds_depth_1", requested("deep_shrink_depth_1"), SHRINKING, ()),
        ("without --gradual_latent_timesteps", requested("gradual_latent_timesteps"), growing, ()),
        ("without ControlNets or guidance by images", given(*CONTROL, *BY_IMAGE), ["guide_image_path"], ()),
        ("without guidance by CLIP", clip_text or given("clip_image_guidance_scale"), ["clip_model"], ()),
        ("without --clip_guidance_scale", clip_text, (), "c"),
        (
            "without --vgg16_guidance_scale",
            given("vgg16_guidance_scale"),
            ["vgg16_guidance_layer", "vgg16_weights"],
            (),
        ),
        ("without --clip_vision_strength", given("clip_vision_strength"), ["clip_vision_model"], ()),
        ("without --network_module", given("network_module"), (), ["am"]),
    )
    lines = []
    for reason, has_effect, names, letters in rules:
        found = [name for name in names if name in changed] + [letter for letter in letters if in_prompts(letter)]
        if found and not has_effect:
            lines.append(f"no effect {reason}: {', '.join(f'--{name}' for name in found)}")
    return lines
