"""hunyuan_image_minimal_inference.py draws what diffusers' HunyuanImagePipeline draws from the same noise, to 1e-3.

Diffusers is given the states of the text encoders, which have tests of their own: it also takes text in ``'...'`` as
quoted, and expects the tokens of the full vocabulary. Its guidance counts steps as the options do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hunyuan_image_minimal_inference import HunyuanImageInference, HunyuanImageInferenceOptions
from library.models.hunyuan_image.pipeline import HunyuanImageFiles
from library.models.hunyuan_image.pipeline import HunyuanImagePipeline as OurPipeline
from library.options import parse_options
from networks import lora_hunyuan_image
from tests.generation.drawing import with_lora, write_random_network
from tests.parity.test_hunyuan_image_transformer_matches_diffusers import their_model
from tools.make_tiny_models import HUNYUAN_IMAGE
from tools.other_layouts import diffusers_hunyuan_image_state
from tools.tiny_hunyuan_autoencoder import (
    HUNYUAN_AUTOENCODER,
    diffusers_hunyuan_autoencoder_config,
    diffusers_hunyuan_autoencoder_state,
)

HEIGHT, WIDTH, STEPS, SEED, SCALE = 64, 96, 6, 11, 3.0
CASES = {
    "unguided": ("a big red cat", 1.0, 2, 0.0, 0.0),
    "guided": ("a big red cat", SCALE, 9, 0.0, 0.0),
    "rescaled": ("a big red cat", SCALE, 9, 0.6, 0.0),
    "projected": ("a big red cat", SCALE, 2, 0.0, 0.0),
    "projected, quoting": ('a sign "blue"', SCALE, 3, 0.4, 0.4),
}
"""Prompt, scale, last step of classifier-free guidance, and both rescales."""


@pytest.fixture(scope="module")
def pair(request, tiny_hunyuan_image, tmp_path_factory) -> tuple[list[object], diffusers.HunyuanImagePipeline]:
    """The script's options for a tiny model, and the same model in diffusers, which is given merged weights."""
    tiny, folder = tiny_hunyuan_image, tmp_path_factory.mktemp("parity")
    command: list[object] = [
        *("--dit", tiny.transformer, "--text_encoder", tiny.text_encoder, "--byt5", tiny.byt5),
        *("--vae", tiny.autoencoder, "--image_size", HEIGHT, WIDTH, "--infer_steps", STEPS, "--seed", SEED),
        *("--dtype", "fp32", "--save_path", folder, "--negative_prompt", "small dog"),
    ]
    state = load_file(tiny.transformer)
    if request.param is not None:
        lora = random_lora(tiny, folder / "lora.safetensors")
        state = with_lora(state, "lora_unet_", lora, request.param)
        command += ["--lora_weight", lora, "--lora_multiplier", request.param]
    transformer = their_model(HUNYUAN_IMAGE)
    transformer.load_state_dict(diffusers_hunyuan_image_state(state, HUNYUAN_IMAGE))
    vae = diffusers.AutoencoderKLHunyuanImage.from_config(diffusers_hunyuan_autoencoder_config(HUNYUAN_AUTOENCODER))
    vae.load_state_dict(diffusers_hunyuan_autoencoder_state(load_file(tiny.autoencoder), HUNYUAN_AUTOENCODER))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    theirs = diffusers.HunyuanImagePipeline(scheduler, vae.eval(), None, None, None, None, transformer.eval())
    theirs.set_progress_bar_config(disable=True)
    return command, theirs


def random_lora(tiny: Any, path: Path) -> Path:
    transformer = OurPipeline(HunyuanImageFiles(tiny.transformer), torch.float32, "cpu", parts=("transformer",))
    return write_random_network(path, lora_hunyuan_image, [], transformer.load("transformer"), 1, 2.0)


def in_diffusers(
    theirs: diffusers.HunyuanImagePipeline, texts: dict[str, Tensor], guider: diffusers.AdaptiveProjectedMixGuidance
) -> tuple[Tensor, Tensor]:
    """Latents and image."""
    theirs.register_modules(guider=guider, ocr_guider=guider)
    noise = torch.randn(
        1, 64, HEIGHT // 32, WIDTH // 32, generator=torch.Generator().manual_seed(SEED), dtype=torch.bfloat16
    )
    latents = theirs(
        height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, latents=noise.float(), output_type="latent", **texts
    ).images
    with torch.no_grad():
        image = theirs.vae.decode(latents / theirs.vae.config.scaling_factor, return_dict=False)[0]
    return latents, theirs.image_processor.postprocess(image, "pt")


@pytest.mark.parametrize(
    ("pair", "case"),
    [
        (0.7, "guided"),
        (0.7, "projected, quoting"),
        *(pytest.param(None, case, marks=pytest.mark.thorough) for case in CASES),
    ],
    indirect=["pair"],
)
def test_the_same_latents_and_image(pair, case):
    command, theirs = pair
    prompt, scale, last, rescale, rescale_projected = CASES[case]
    start = "ocr" if '"' in prompt else "general"
    words = [
        *(*command, "--prompt", prompt, "--guidance_scale", scale, f"--apg_start_step_{start}", last),
        *("--guidance_rescale", rescale, "--guidance_rescale_apg", rescale_projected),
    ]
    run = HunyuanImageInference(parse_options(HunyuanImageInferenceOptions, "", [str(word) for word in words]))
    ours = run.prompts()[0]
    run.encode([ours])
    latents = run.latents(ours)
    image = run.decode(latents) / 2 + 0.5
    names = {
        "vlm_embed": "prompt_embeds", "vlm_mask": "prompt_embeds_mask", "byt5_embed": "prompt_embeds_2",
        "byt5_mask": "prompt_embeds_mask_2",
    }  # fmt: skip
    texts = {}
    for (_, role), outputs in ((key[0], outputs) for key, outputs in run.texts.items()):
        prefix = "negative_" if role == "negative" else ""
        texts |= {prefix + theirs_name: outputs[name] for name, theirs_name in names.items()}
    guider = diffusers.AdaptiveProjectedMixGuidance(
        guidance_scale=scale,
        guidance_rescale=rescale,
        adaptive_projected_guidance_scale=10.0,
        adaptive_projected_guidance_momentum=-0.5,
        adaptive_projected_guidance_rescale=10.0,
        adaptive_projected_guidance_start_step=last,
        enabled=scale != 1,
    )
    if rescale_projected:
        assert rescale_projected == rescale, "diffusers has one number for both"
    reference, their_image = in_diffusers(theirs, texts, guider)
    size = reference.abs().max().item()
    assert size > 0.1, "the reference must not be trivially small"
    assert (latents - reference).abs().max() < 1e-3 * max(1.0, size)
    assert (image - their_image).abs().max() < 1e-3
