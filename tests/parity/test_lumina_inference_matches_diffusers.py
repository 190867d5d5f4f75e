"""lumina_minimal_inference.py draws what diffusers' Lumina2Pipeline draws from the same noise and schedule, to 1e-3.

Diffusers truncates guidance by the number of a step, here it ends with t: the tests give diffusers the share of steps
that are guided here. Its renormalisation sets the length of every row of a latent, here a whole prediction that is too
long is shortened: that is compared with the formula in float64, over predictions of diffusers' transformer.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import diffusers
import numpy
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from library.models.lumina.pipeline import LuminaFiles, LuminaPipeline
from library.options import parse_options
from lumina_minimal_inference import LuminaInference, LuminaInferenceOptions
from networks import lora_lumina
from tests.generation.drawing import with_lora, write_random_network
from tools.make_tiny_models import LUMINA, make_tiny_lumina
from tools.other_layouts import diffusers_lumina_state

PROMPT, NEGATIVE, SYSTEM = "a big red cat on the blue photo", "small dog", "the red"
HEIGHT, WIDTH, STEPS, LENGTH, SEED, SHIFT, SCALE = 48, 64, 6, 40, 11, 6.0, 4.0
TRUNCATION, GUIDED = 0.3, 4
"""Where guidance ends, and how many of the steps come before that."""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Any:
    return make_tiny_lumina(tmp_path_factory.mktemp("original"), seed=4)


@pytest.fixture(scope="module")
def pipeline(files) -> LuminaPipeline:
    return LuminaPipeline(LuminaFiles(**vars(files)), torch.float32, "cpu")


@pytest.fixture(scope="module")
def lora(pipeline, tmp_path_factory) -> Path:
    """A random LoRA of transformer and Gemma 2."""
    parts = ([pipeline.load("gemma2")], pipeline.load("transformer"))
    return write_random_network(tmp_path_factory.mktemp("lora") / "lora.safetensors", lora_lumina, *parts, 1, 2.0)


@pytest.fixture(scope="module")
def pair(request, files, pipeline, lora, tmp_path_factory) -> tuple[list[object], diffusers.Lumina2Pipeline]:
    """The script's options for a tiny model, and the same model in diffusers, which is given merged weights."""
    folder = make_tiny_lumina(tmp_path_factory.mktemp("diffusers"), "diffusers", seed=4).transformer
    theirs = diffusers.Lumina2Pipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    theirs.register_modules(
        tokenizer=pipeline.tokenizer("gemma2"),
        text_encoder=transformers.Gemma2Model.from_pretrained(folder / "text_encoder", attn_logit_softcapping=None),
    )
    command: list[object] = [
        *("--pretrained_model_name_or_path", files.transformer, "--gemma2_path", files.gemma2),
        *("--ae_path", files.autoencoder, "--image_height", HEIGHT, "--image_width", WIDTH, "--steps", STEPS),
        *("--prompt", PROMPT, "--negative_prompt", NEGATIVE, "--system_prompt", SYSTEM, "--seed", SEED),
        *("--gemma2_max_token_length", LENGTH, "--dtype", "fp32", "--gemma2_dtype", "fp32", "--ae_dtype", "fp32"),
        *("--output_dir", tmp_path_factory.mktemp("out"), "--discrete_flow_shift", SHIFT),
    ]
    if request.param is not None:
        original = {name: value for name, value in load_file(files.transformer).items() if name != "norm_final.weight"}
        merged = with_lora(original, "lora_unet_", lora, request.param)
        theirs.transformer.load_state_dict(diffusers_lumina_state(merged, LUMINA))
        theirs.text_encoder.load_state_dict(
            with_lora(theirs.text_encoder.state_dict(), "lora_te_", lora, request.param)
        )
        command += ["--lora_weights", f"{lora};{request.param}"]
    return command, theirs


def drawn(command: list[object], *arguments: object) -> tuple[Tensor, Tensor]:
    """Latents, and pixels in 0..1."""
    words = [str(word) for word in (*command, *arguments)]
    run = LuminaInference(parse_options(LuminaInferenceOptions, "", words))
    prompt = run.prompts()[0]
    run.encode([prompt])
    latents = run.latents(prompt)
    return latents, run.decode(latents) / 2 + 0.5


def noise() -> Tensor:
    return torch.randn(1, 16, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(SEED))


def unshifted() -> numpy.ndarray:
    """What Stable Diffusion 3's scheduler shifts: evenly spaced down to the smallest sigma of a shifted table."""
    return numpy.linspace(1, SHIFT * 0.001 / (1 + (SHIFT - 1) * 0.001), STEPS)


def in_diffusers(theirs: diffusers.Lumina2Pipeline, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Latents and image by ``Lumina2Pipeline``, whose scheduler shifts the sigmas."""
    assert theirs.scheduler.config.shift == SHIFT
    kept: dict[str, Tensor] = {}

    def keep(pipeline: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        kept.update(values)
        return {}

    image = theirs(
        PROMPT, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, negative_prompt=NEGATIVE, latents=noise(),
        sigmas=unshifted(), system_prompt=SYSTEM, max_sequence_length=LENGTH, cfg_normalization=False,
        output_type="pt", callback_on_step_end=keep, **arguments,
    ).images  # fmt: skip
    return kept["latents"], image


UNGUIDED = (("--guidance_scale", 1), {"guidance_scale": 1.0})
GUIDED_ALWAYS = (("--guidance_scale", SCALE, "--cfg_trunc_ratio", 1), {"guidance_scale": SCALE})
TRUNCATED = (
    ("--guidance_scale", SCALE, "--cfg_trunc_ratio", TRUNCATION),
    {"guidance_scale": SCALE, "cfg_trunc_ratio": (GUIDED + 0.5) / STEPS},
)


@pytest.mark.parametrize(
    ("pair", "ours", "diffusers"),
    [
        pytest.param(None, *UNGUIDED, marks=pytest.mark.thorough),
        pytest.param(None, *GUIDED_ALWAYS, marks=pytest.mark.thorough),
        (None, *TRUNCATED),
        (0.7, *GUIDED_ALWAYS),
    ],
    indirect=["pair"],
    ids=["unguided", "guided", "truncated", "with a LoRA"],
)
def test_the_same_latents_and_image(pair, ours, diffusers):
    command, theirs = pair
    latents, image = drawn(command, "--renorm_cfg", 0, *ours)
    reference, their_image = in_diffusers(theirs, **diffusers)
    scale = reference.abs().max().item()
    assert scale > 0.1, "the reference must not be trivially small"
    assert (latents - reference).abs().max() < 1e-3 * max(1.0, scale)
    assert (image - their_image).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("pair", "truncation", "renorm"),
    [pytest.param(None, 1, 2.0, marks=pytest.mark.thorough), (None, TRUNCATION, 0.7)],
    indirect=["pair"],
)
def test_renormalised_guidance_is_the_formula_over_diffusers_predictions(pair, truncation, renorm):
    command, theirs = pair
    given = ("--guidance_scale", SCALE, "--cfg_trunc_ratio", truncation, "--renorm_cfg", renorm)
    latents, _ = drawn(command, *given)
    reference, shortened = by_the_formula(theirs, truncation, renorm)
    assert shortened > 0 and (renorm < 2 or shortened < STEPS), "predictions are too long, with a large limit some"
    assert (latents - reference).abs().max() < 1e-3 * reference.abs().max()


@torch.no_grad()
def by_the_formula(theirs: diffusers.Lumina2Pipeline, truncation: float, renorm: float) -> tuple[Tensor, int]:
    """Latents in float64, and in how many steps a guided velocity was shortened."""
    positive, positive_mask, negative, negative_mask = theirs.encode_prompt(
        PROMPT, True, NEGATIVE, system_prompt=SYSTEM, max_sequence_length=LENGTH
    )
    u = unshifted()
    sigmas = [*(SHIFT * u / (1 + (SHIFT - 1) * u)), 0.0]
    latents, shortened = noise().double(), 0

    def velocity(text: Tensor, mask: Tensor, time: float) -> Tensor:
        """Image minus noise."""
        return theirs.transformer(latents.float(), torch.tensor([time]).float(), text, mask, return_dict=False)[
            0
        ].double()

    for sigma, following in itertools.pairwise(sigmas):
        guided = towards = velocity(positive, positive_mask, 1 - sigma)
        if 1 - sigma < truncation:
            away = velocity(negative, negative_mask, 1 - sigma)
            guided = away + SCALE * (towards - away)
            longest, length = renorm * towards.square().sum().sqrt(), guided.square().sum().sqrt()
            if length >= longest:
                guided, shortened = guided * longest / length, shortened + 1
        latents = latents + (sigma - following) * guided
    return latents.float(), shortened


def test_as_many_steps_are_guided_as_diffusers_is_told():
    u = unshifted()
    assert sum(1 - SHIFT * u / (1 + (SHIFT - 1) * u) < TRUNCATION) == GUIDED
