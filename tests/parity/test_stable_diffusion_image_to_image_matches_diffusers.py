"""Drawing from noise, over an image and within a mask gives what diffusers' pipelines give, with every sampler."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from library.models.inpainting import Inpainting
from library.models.stable_diffusion.pipeline import (
    StableDiffusionFiles,
    StableDiffusionPipeline,
    StableDiffusionRequest,
)
from library.models.stable_diffusion.sampling import SCHEDULERS, noises_of_steps

PROMPT, NEGATIVE = "a big red cat, on the blue photo", "small dog"
SIDE, STEPS, SCALE, STRENGTH, SEED = 64, 4, 4.0, 0.8, 11
SHAPE = (4, SIDE // 8, SIDE // 8)
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
THEIRS = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "pndm": (diffusers.PNDMScheduler, {}),
    "lms": (diffusers.LMSDiscreteScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "dpm_2": (diffusers.KDPM2DiscreteScheduler, {}),
    "dpm_2_a": (diffusers.KDPM2AncestralDiscreteScheduler, {}),
    "dpmsolver": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "dpmsolver++": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmsingle": (diffusers.DPMSolverSinglestepScheduler, {"lower_order_final": True}),
}


@functools.cache
def their_scheduler(sampler: str, v_prediction: bool, skip_prk_steps: bool) -> Any:
    """Made once: for two of them it takes half a second."""
    kind, arguments = THEIRS[sampler]
    offset = {} if sampler == "dpmsingle" else {"steps_offset": 1}
    skip = {"skip_prk_steps": True} if skip_prk_steps else {}
    prediction = "v_prediction" if v_prediction else "epsilon"
    return kind(**SCHEDULE, prediction_type=prediction, **arguments, **offset, **skip)


WAYS = {"noise": "{}Pipeline", "image": "{}Img2ImgPipeline", "mask": "{}InpaintPipeline"}


def image_latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def half_mask() -> torch.Tensor:
    """1 where the image is repainted: its lower half."""
    mask = torch.zeros(1, 1, *SHAPE[1:])
    mask[:, :, SHAPE[1] // 2 :] = 1
    return mask


class Pair:
    """Our pipeline and diffusers' around the same U-Net; 2.x predicts v.

    That the U-Nets themselves are equal, and pictures from prompts, is shown elsewhere.
    """

    def __init__(self, variant: str, file: Path):
        self.variant, self.v = variant, variant == "sd2"
        self.ours = StableDiffusionPipeline(StableDiffusionFiles(file), torch.float32, "cpu", v_parameterization=self.v)
        self.texts = {text: self.ours.encode_prompts([text]) for text in (PROMPT, NEGATIVE)}
        name = "StableDiffusionXL" if variant == "sdxl" else "StableDiffusion"
        self.ours.load("unet").register_to_config(sample_size=64)  # diffusers asks for it
        parts = {"unet": self.ours.load("unet"), "vae": self.ours.load_autoencoder(), "scheduler": THEIRS["ddim"][0]()}
        others = dict.fromkeys(["text_encoder", "tokenizer"])
        others |= dict.fromkeys(["text_encoder_2", "tokenizer_2"] if variant == "sdxl" else ["safety_checker"])
        if variant != "sdxl":
            others |= {"feature_extractor": None, "requires_safety_checker": False}
        self.theirs = {
            way: getattr(diffusers, pattern.format(name))(**parts, **others) for way, pattern in WAYS.items()
        }
        for pipeline in self.theirs.values():
            pipeline.set_progress_bar_config(disable=True)

    def request(self, sampler: str, way: str, seed: int = SEED, **fields: Any) -> StableDiffusionRequest:
        over = {} if way == "noise" else {"start_latents": image_latents(), "strength": STRENGTH}
        return StableDiffusionRequest(
            PROMPT,
            NEGATIVE,
            **{"width": SIDE, "height": SIDE, "seed": seed, "sample_steps": STEPS, "scale": SCALE, "steps_offset": 1},
            sampler=sampler,
            conditioning=self.texts[PROMPT],
            negative_conditioning=self.texts[NEGATIVE],
            **{**over, **fields},
        )

    def draw(self, *requests: StableDiffusionRequest, way: str = "noise") -> torch.Tensor:
        hooks = [Inpainting(half_mask())] if way == "mask" else []
        return self.ours.generate_latents(*requests, hooks=hooks)

    def expected(self, sampler: str, way: str) -> torch.Tensor:
        pipeline = self.theirs[way]
        pipeline.scheduler = copy.deepcopy(their_scheduler(sampler, self.v, sampler == "pndm" and way != "noise"))
        generator = torch.Generator().manual_seed(SEED)
        if way != "noise":  # the noise for an image follows on those of the steps
            for _ in range(1 + noises_of_steps(sampler, STEPS)):
                torch.randn(SHAPE, generator=generator)
        over = {} if way == "noise" else {"image": image_latents()[None], "strength": STRENGTH}
        if way == "mask":
            mask = half_mask().repeat_interleave(8, 2).repeat_interleave(8, 3)
            over |= {"mask_image": mask, "masked_image_latents": image_latents()[None]}
        if way != "image":
            over |= {"height": SIDE, "width": SIDE}
        return pipeline(
            **self.embeddings(),
            **over,
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            generator=generator,
            output_type="latent",
        ).images

    def embeddings(self) -> dict[str, torch.Tensor]:
        made = {}
        for prefix, text in (("", PROMPT), ("negative_", NEGATIVE)):
            conditioning = self.texts[text]
            made[f"{prefix}prompt_embeds"] = torch.cat([conditioning[k] for k in conditioning if "hidden" in k], -1)
            if self.variant == "sdxl":
                made[f"{prefix}pooled_prompt_embeds"] = conditioning["pool2"]
        return made


@pytest.fixture(scope="module")
def pairs(few_blocks_sd1, few_blocks_sd2, few_blocks_sdxl) -> Callable[[str], Pair]:
    files = {"sd1": few_blocks_sd1, "sd2": few_blocks_sd2, "sdxl": few_blocks_sdxl}
    return functools.cache(lambda variant: Pair(variant, files[variant]))


FROM_NOISE = ("pndm", "lms", "heun", "dpmsolver", "dpmsingle")
"""The others are compared with whole pipelines in ``test_stable_diffusion_matches_diffusers.py``."""
CASES = [
    *(("sd1", "noise", sampler) for sampler in FROM_NOISE),
    ("sd2", "noise", "dpmsingle"),
    ("sdxl", "noise", "lms"),
    *(("sd1", "mask", sampler) for sampler in SCHEDULERS),
    ("sdxl", "mask", "euler"),
    # What is drawn within a mask is drawn as over an image.
    *(("sd1", "image", sampler) for sampler in ("ddim", "heun")),
    *(
        pytest.param(*case, marks=pytest.mark.thorough)
        for case in (
            *(("sd1", "noise", sampler) for sampler in ("dpm_2", "dpm_2_a")),
            *(("sd2", "mask", sampler) for sampler in ("euler_a", "dpm_2")),
            ("sd2", "noise", "pndm"),
            ("sdxl", "image", "euler"),
        )
    ),
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("variant, way, sampler", CASES)
def test_latents_are_the_same(pairs, variant, way, sampler):
    """``--sampler``, ``--image_path``, ``--mask_path``, ``--strength``, ``--force_scheduler_zero_steps_offset``."""
    pair = pairs(variant)
    latents = pair.draw(pair.request(sampler, way), way=way)
    expected = pair.expected(sampler, way)
    assert latents.shape == expected.shape and expected.abs().max() > 0.1
    assert (latents - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max().item())


BATCHES = [
    ("sd1", "noise", "ddim"),
    ("sdxl", "mask", "dpm_2_a"),
    pytest.param("sd2", "mask", "euler_a", marks=pytest.mark.thorough),
]


@pytest.mark.parametrize("variant, way, sampler", BATCHES)
def test_an_image_does_not_depend_on_its_batch(pairs, variant, way, sampler):
    """``--batch_size``."""
    pair = pairs(variant)
    together = pair.draw(*(pair.request(sampler, way, seed) for seed in range(2)), way=way)
    alone = pair.draw(pair.request(sampler, way, 1), way=way)[0]
    assert (together[1] - alone).abs().max() <= 1e-4 * max(1.0, alone.abs().max().item())
    assert (together[0] - together[1]).abs().max() > 0.01
