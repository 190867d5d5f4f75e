"""flux_minimal_inference.py draws what diffusers draws from the same noise: float32, within 1e-4 of the scale.

Diffusers' ChromaPipeline makes numbers (0 and 1) of its text mask, which attention then adds to its scores; here it has
the boolean mask that is meant.
"""

from __future__ import annotations

import diffusers
import pytest
import torch

from flux_minimal_inference import FluxInference, FluxInferenceOptions
from library.models.flux.transformer import pack_latents
from library.options import parse_options
from library.randomness import draw_noise, seeded_generator
from tools.make_tiny_models import make_tiny_flux

PROMPT, NEGATIVE = "a big red cat on the blue photo", "small dog"
HEIGHT, WIDTH, STEPS, LENGTH, SEED = 48, 64, 4, 24, 11


def masked_chroma_pipeline() -> type:
    """ChromaPipeline with the boolean mask that Chroma was trained with."""

    class MaskedChromaPipeline(diffusers.ChromaPipeline):
        def _get_t5_prompt_embeds(self, *arguments, **keywords):
            states, mask = super()._get_t5_prompt_embeds(*arguments, **keywords)
            return states, mask.bool()

    return MaskedChromaPipeline


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    """The script's options for a tiny model, and the same model in diffusers."""
    files = make_tiny_flux(tmp_path_factory.mktemp("original"), request.param, seed=4)
    folder = make_tiny_flux(tmp_path_factory.mktemp("diffusers"), request.param, "diffusers", seed=4).transformer
    kind = masked_chroma_pipeline() if request.param == "chroma" else diffusers.FluxPipeline
    theirs = kind.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    command = ["--ckpt_path", files.transformer, "--t5xxl", files.t5xxl, "--ae", files.autoencoder]
    command += ["--model_type", "chroma"] if request.param == "chroma" else ["--clip_l", files.clip_l]
    command += ["--height", HEIGHT, "--width", WIDTH, "--steps", STEPS, "--t5xxl_max_token_length", LENGTH]
    command += ["--prompt", PROMPT, "--seed", SEED, "--dtype", "fp32", "--guidance", "2.5"]
    return [*command, "--output_dir", tmp_path_factory.mktemp("out")], theirs


def drawn(command, *arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed latents, and pixels in 0..1."""
    run = FluxInference(parse_options(FluxInferenceOptions, "", [str(word) for word in (*command, *arguments)]))
    prompt = run.prompts()[0]
    run.encode([prompt])
    latents = run.latents(prompt)
    return pack_latents(latents), run.decode(latents)[0] / 2 + 0.5


def expected(theirs, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed latents, and pixels in 0..1."""
    noise = draw_noise((HEIGHT * WIDTH // 256, 64), [seeded_generator(SEED)])
    kept = {}

    def keep(pipeline, step, timestep, values):
        kept.update(values)
        return {}

    image = theirs(
        PROMPT, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, max_sequence_length=LENGTH, latents=noise,
        output_type="pt", callback_on_step_end=keep, **arguments,
    ).images[0]  # fmt: skip
    return kept["latents"], image


@pytest.mark.parametrize(
    ("pair", "negative"),
    [
        ("dev", NEGATIVE),
        ("chroma", NEGATIVE),
        ("schnell", None),
        *(
            pytest.param(*case, marks=pytest.mark.thorough)
            for case in (("dev", None), ("dev", ""), ("chroma", ""), ("chroma", None))
        ),
    ],
    indirect=["pair"],
)
def test_the_same_latents_and_image(pair, negative):
    command, theirs = pair
    guided = [] if negative is None else ["--cfg_scale", "3", "--negative_prompt", negative]
    if isinstance(theirs, diffusers.ChromaPipeline):
        arguments = {"guidance_scale": 1.0 if negative is None else 3.0, "negative_prompt": negative}
    else:
        arguments = {"guidance_scale": 2.5, "true_cfg_scale": 3.0, "negative_prompt": negative}
    latents, image = drawn(command, *guided)
    reference, their_image = expected(theirs, **arguments)
    scale = reference.abs().max().item()
    assert scale > 0.1, "the reference must not be trivially small"
    assert (latents - reference).abs().max() < 1e-4 * max(1.0, scale)
    assert (image - their_image).abs().max() < 1e-3
