"""From prompt to image, the path gives what diffusers' pipelines give, in float32 before rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from library.models.stable_diffusion.pipeline import (
    StableDiffusionFiles,
    StableDiffusionPipeline,
    StableDiffusionRequest,
)
from tests.families.stable_diffusion import make_few_blocks

PROMPT, NEGATIVE = "a big red cat, on the blue photo", "small dog"
HEIGHT, WIDTH, STEPS, SCALE, SEED = 64, 72, 4, 4.0, 11
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class Pair:
    """The same weights in both programs: ours from the original single file, theirs from the Diffusers folder."""

    def __init__(self, variant: str, folder: Path):
        self.variant = variant
        self.file = make_few_blocks(folder / "original", variant, "original", seed=4)
        self.folder = make_few_blocks(folder / "diffusers", variant, "diffusers", seed=4)
        self.loaded: dict[Any, Any] = {}
        self.ours = self.open()
        name = "StableDiffusionXLPipeline" if variant == "sdxl" else "StableDiffusionPipeline"
        self.theirs = getattr(diffusers, name).from_pretrained(self.folder)
        self.theirs.set_progress_bar_config(disable=True)

    def open(self, **arguments: Any) -> StableDiffusionPipeline:
        """The single file, opened with these settings; parts that are loaded already serve again."""
        pipeline = StableDiffusionPipeline(StableDiffusionFiles(self.file), torch.float32, "cpu", **arguments)
        pipeline.modules = self.loaded
        return pipeline

    def draw(self, scheduler: Any, **arguments: Any) -> torch.Tensor:
        self.theirs.scheduler = scheduler
        return self.theirs(
            PROMPT,
            negative_prompt=arguments.pop("negative_prompt", NEGATIVE),
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            generator=torch.Generator().manual_seed(SEED),
            **arguments,
        ).images


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def pair(request, tmp_path_factory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


def request(sampler: str, **arguments: Any) -> StableDiffusionRequest:
    sizes = {"width": WIDTH, "height": HEIGHT, "seed": SEED, "sample_steps": STEPS, "scale": SCALE}
    settings = {**sizes, "steps_offset": 0, **arguments}  # 0 is the default of diffusers' schedulers
    return StableDiffusionRequest(PROMPT, NEGATIVE, sampler=sampler, **settings)


def assert_equal_to_scale(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape and expected.abs().max() > 0.1
    assert (actual - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max().item())


SCHEDULERS = {
    "ddim": lambda **a: diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, **a),
    "euler": lambda **a: diffusers.EulerDiscreteScheduler(**SCHEDULE, **a),
    "euler_a": lambda **a: diffusers.EulerAncestralDiscreteScheduler(**SCHEDULE, **a),
    "dpmsolver++": lambda **a: diffusers.DPMSolverMultistepScheduler(**SCHEDULE, algorithm_type="dpmsolver++", **a),
}


@pytest.mark.parametrize(
    ("pair", "sampler"),
    [
        *(("sd1", sampler) for sampler in SCHEDULERS),
        ("sdxl", "euler_a"),
        *(pytest.param(*case, marks=pytest.mark.thorough) for case in (("sd2", "euler"), ("sdxl", "ddim"))),
    ],
    indirect=["pair"],
)
def test_latents_are_the_same(pair, sampler):
    latents = pair.ours.generate_latents(request(sampler))
    assert_equal_to_scale(latents, pair.draw(SCHEDULERS[sampler](), output_type="latent"))


@pytest.mark.parametrize(
    ("pair", "sampler"), [("sd2", "ddim"), pytest.param("sdxl", "euler", marks=pytest.mark.thorough)], indirect=["pair"]
)
def test_latents_of_v_prediction_are_the_same(pair, sampler):
    ours = pair.open(v_parameterization=True)
    scheduler = SCHEDULERS[sampler](prediction_type="v_prediction")
    latents = ours.generate_latents(request(sampler))
    assert_equal_to_scale(latents, pair.draw(scheduler, output_type="latent"))


@pytest.mark.parametrize("pair", ["sd2"], indirect=True)
def test_latents_of_zero_terminal_snr_are_the_same(pair):
    ours = pair.open(v_parameterization=True, zero_terminal_snr=True)
    rescaled = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    latents = ours.generate_latents(request("ddim"))
    assert_equal_to_scale(latents, pair.draw(SCHEDULERS["ddim"](**rescaled), output_type="latent"))


@pytest.mark.parametrize("pair", ["sd1"], indirect=True)
def test_clipped_ddim_is_diffusers_default(pair):
    latents = pair.ours.generate_latents(request("ddim", clip_sample=True))
    assert_equal_to_scale(latents, pair.draw(diffusers.DDIMScheduler(**SCHEDULE), output_type="latent"))


@pytest.mark.parametrize("pair", ["sd1", pytest.param("sd2", marks=pytest.mark.thorough), "sdxl"], indirect=True)
def test_the_image_is_the_same_from_the_same_folder(pair):
    ours = StableDiffusionPipeline(StableDiffusionFiles(pair.folder), torch.float32, "cpu")
    expected = pair.draw(diffusers.DDIMScheduler(**SCHEDULE, steps_offset=1), output_type="pt")
    image = ours.generate(request("ddim", steps_offset=1, clip_sample=True))
    assert image.size == (WIDTH, HEIGHT)
    (theirs,) = pair.theirs.image_processor.postprocess(expected * 2 - 1, "pil")
    differences = [abs(a - b) for a, b in zip(image.tobytes(), theirs.tobytes())]
    assert max(differences) <= 1, "but for rounding"


def test_without_guidance_the_negative_prompt_plays_no_part(pair):
    pair.theirs.scheduler = SCHEDULERS["euler"]()
    asked = request("euler")
    asked.scale = 1.0
    expected = pair.theirs(
        PROMPT,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).images
    assert_equal_to_scale(pair.ours.generate_latents(asked), expected)


def test_images_become_the_same_latents(pair):
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = pair.theirs.vae.encode(pixels).latent_dist
    assert_equal_to_scale(pair.ours.encode_images(pixels, None), posterior.mode())
    for item in range(2):
        drawn = pair.ours.encode_images(pixels, [torch.Generator().manual_seed(seed) for seed in (1, 2)])[item]
        noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(item + 1))
        assert_equal_to_scale(drawn, (posterior.mean + posterior.std * noise)[item])
    assert pair.ours.latent_scale == pair.theirs.vae.config.scaling_factor


# Text


def their_text(pair: Pair, prompt: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    with torch.no_grad():
        if pair.variant == "sdxl":
            states, _, pooled, _ = pair.theirs.encode_prompt(prompt, do_classifier_free_guidance=False)
            return states, pooled
        return pair.theirs.encode_prompt(prompt, "cpu", 1, False)[0], None


@pytest.mark.parametrize("prompt", [PROMPT, "", "the red dog " * 30])
def test_text_outputs_are_the_same(pair, prompt):
    states, pooled = their_text(pair, prompt)
    conditioning = pair.ours.encode_prompts([prompt])
    assert_equal_to_scale(torch.cat([conditioning[name] for name in conditioning if "hidden" in name], -1), states)
    if pooled is not None:
        assert_equal_to_scale(conditioning["pool2"], pooled)


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip_takes_an_earlier_layer_through_the_final_norm(pair, clip_skip):
    conditioning = pair.open(clip_skip=clip_skip).encode_prompts([PROMPT])
    if pair.variant == "sdxl":
        assert_equal_to_scale(
            torch.cat((conditioning["hidden_state1"], conditioning["hidden_state2"]), -1), their_text(pair, PROMPT)[0]
        )
        return
    encoder = pair.theirs.text_encoder
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    tokens = pair.theirs.tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = norm(encoder(tokens, output_hidden_states=True).hidden_states[-clip_skip])
    assert_equal_to_scale(conditioning["hidden_state"], expected)


# SDXL's sizes


@pytest.mark.parametrize("pair", ["sdxl"], indirect=True)
def test_sdxl_sizes_reach_the_u_net_as_in_diffusers(pair):
    told = {"original_size": (600, 801), "target_size": (1024, 1000)}
    expected = pair.draw(SCHEDULERS["euler"](), output_type="latent", crops_coords_top_left=(17, 33), **told)
    latents = pair.ours.generate_latents(request("euler", crop=(17, 33), **told))
    assert_equal_to_scale(latents, expected)
    assert (latents - pair.ours.generate_latents(request("euler"))).abs().max() > 1e-3
