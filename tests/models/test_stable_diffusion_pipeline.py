"""The Stable Diffusion pipeline: what training, samples and image generation ask of it."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from library.errors import UserError
from library.memory.apply import apply_memory_plan
from library.memory.plan import MemoryPlan
from library.memory.storage import BlocksStoredAs
from library.models.stable_diffusion.pipeline import (
    StableDiffusionFiles,
    StableDiffusionPipeline,
    StableDiffusionRequest,
    time_ids,
)

QUICK = StableDiffusionRequest(
    "a red cat", "a dog", width=64, height=64, seed=5, sample_steps=2, scale=3.0, sampler="euler"
)


def open_pipeline(path, dtype: torch.dtype = torch.float32, **arguments: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(StableDiffusionFiles(path), dtype, "cpu", **arguments)


@pytest.fixture(scope="module")
def sd1(few_blocks_sd1) -> StableDiffusionPipeline:
    return open_pipeline(few_blocks_sd1)


@pytest.fixture(scope="module")
def sd2(few_blocks_sd2) -> StableDiffusionPipeline:
    return open_pipeline(few_blocks_sd2)


@pytest.fixture(scope="module")
def sdxl(few_blocks_sdxl) -> StableDiffusionPipeline:
    return open_pipeline(few_blocks_sdxl)


def latents(pipeline: StableDiffusionPipeline, **changes: Any) -> torch.Tensor:
    return pipeline.generate_latents(dataclasses.replace(QUICK, **changes))


# Files and parts


def test_parts_are_those_of_the_family(sd1, sd2, sdxl):
    for pipeline, variant in ((sd1, "sd1"), (sd2, "sd2")):
        assert (pipeline.variant, pipeline.parts) == (variant, ("unet", "autoencoder", "text_encoder"))
        assert pipeline.encoders == ("text_encoder",) and pipeline.files.text_encoder_2 is None
    assert sdxl.parts == ("unet", "autoencoder", "text_encoder", "text_encoder_2")
    assert sdxl.encoders == ("text_encoder", "text_encoder_2")
    for pipeline in (sd1, sd2, sdxl):
        files = {file for part in pipeline.parts for file in getattr(pipeline.files, part).source.checkpoint.files}
        assert len(files) == 1
    assert [pipeline.latent_scale for pipeline in (sd1, sd2, sdxl)] == [0.18215, 0.18215, 0.13025]
    assert (sd1.latent_channels, sd1.latent_stride) == (4, 8)


def test_nothing_is_loaded_before_it_is_needed_and_everything_can_be_let_go(few_blocks_sdxl):
    pipeline = open_pipeline(few_blocks_sdxl)
    assert pipeline.modules == {}
    first = pipeline.encode_prompts(["a cat"], ["text_encoder"])
    assert pipeline.modules.keys() == {"text_encoder"} and first.keys() == {"hidden_state1"}
    pipeline.encode_prompts(["a cat"])
    pipeline.load_autoencoder()
    pipeline.move("text_encoders", "cpu")
    pipeline.release("text_encoders")
    assert pipeline.modules.keys() == {"autoencoder"}
    pipeline.release("autoencoder")
    assert pipeline.modules == {}
    assert torch.equal(pipeline.encode_prompts(["a cat"])["hidden_state1"], first["hidden_state1"])


def test_meta_modules_have_the_parts_structure_and_no_numbers(sdxl):
    loaded = {"unet": sdxl.load_transformer(), "autoencoder": sdxl.load_autoencoder()}
    loaded |= dict(zip(sdxl.encoders, sdxl.load_text_encoders()))
    for part in sdxl.parts:
        meta_module = sdxl.meta_module(part)
        shapes = {name: tuple(value.shape) for name, value in meta_module.named_parameters()}
        assert shapes == {name: tuple(value.shape) for name, value in loaded[part].named_parameters()}
        assert all(value.is_meta for value in meta_module.parameters())


def test_each_part_has_its_own_number_format(few_blocks_sdxl):
    dtypes = {"autoencoder": torch.float32, "text_encoder": None}
    pipeline = open_pipeline(few_blocks_sdxl, torch.bfloat16, dtypes=dtypes)
    assert {parameter.dtype for parameter in pipeline.load_transformer().parameters()} == {torch.bfloat16}
    assert pipeline.load_autoencoder().dtype == torch.float32
    assert [encoder.dtype for encoder in pipeline.load_text_encoders()] == [torch.float32, torch.bfloat16]
    found = latents(pipeline)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert pipeline.encode_images(torch.zeros(1, 3, 16, 16), None).dtype == torch.float32


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"clip_skip": 4}, "--clip_skip must be between 1 and 3"),
        ({"max_token_length": 100}, "--max_token_length must be 75, 150 or 225"),
        ({"attention_backend": "fast"}, '"fast" is unknown'),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_loaded(tiny_sd1, arguments, message):
    with pytest.raises(UserError, match=message):
        open_pipeline(tiny_sd1, **arguments)


# Text


@pytest.mark.parametrize("max_token_length, positions", [(None, 77), (75, 77), (150, 152), (225, 227)])
def test_conditioning_has_the_arrays_that_caches_hold(few_blocks_sd2, few_blocks_sdxl, max_token_length, positions):
    prompts = ["a cat", "the big green dog on a photo " * 9]
    conditioning = open_pipeline(few_blocks_sd2, max_token_length=max_token_length).encode_prompts(prompts)
    assert {name: tuple(value.shape) for name, value in conditioning.items()} == {"hidden_state": (2, positions, 64)}
    conditioning = open_pipeline(few_blocks_sdxl, max_token_length=max_token_length).encode_prompts(prompts)
    shapes = {name: tuple(value.shape) for name, value in conditioning.items()}
    expected = {"hidden_state1": (2, positions, 64), "hidden_state2": (2, positions, 96), "pool2": (2, 80)}
    assert shapes == expected and not any(value.requires_grad for value in conditioning.values())


def test_a_prompt_is_encoded_the_same_alone_and_in_a_batch(few_blocks_sdxl):
    pipeline = open_pipeline(few_blocks_sdxl, max_token_length=150, weighted_captions=True)
    prompts = ["a (red:1.4) cat", "", "the big [green] dog on a photo of the ring " * 5]
    together = pipeline.encode_prompts(prompts)
    for index, prompt in enumerate(prompts):
        for name, value in pipeline.encode_prompts([prompt]).items():
            torch.testing.assert_close(together[name][index : index + 1], value, atol=1e-5, rtol=1e-5)


def test_brackets_are_weights_only_when_captions_are_weighted(few_blocks_sd1, sd1):
    weighted = open_pipeline(few_blocks_sd1, weighted_captions=True)
    plain = sd1.encode_prompts(["a cat"])["hidden_state"]
    ratio = weighted.encode_prompts(["a (cat:1.5)"])["hidden_state"] / plain
    expected = torch.ones(77)
    expected[2:5] = 1.5  # the tiny vocabulary spells: "a", then "c", "a", "t"
    torch.testing.assert_close(ratio[0], expected[:, None].expand(-1, 64), atol=1e-4, rtol=1e-4)
    assert not torch.equal(sd1.encode_prompts(["a (cat:1.5)"])["hidden_state"], plain)


def test_blocks_in_8_bits_draw_nearly_the_same(few_blocks_sdxl, sdxl):
    in_8_bits = BlocksStoredAs(torch.float32)
    pipeline = open_pipeline(few_blocks_sdxl, dtypes={"unet": in_8_bits, "text_encoder": in_8_bits})
    expected, found = latents(sdxl), latents(pipeline)
    assert 0 < (found - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("trained", [(), ("text_encoder",), ("text_encoder_2",), ("text_encoder", "text_encoder_2")])
def test_gradients_flow_through_the_trained_encoders_only(few_blocks_sdxl, trained):
    pipeline = open_pipeline(few_blocks_sdxl)
    for module in pipeline.load_text_encoders():
        module.requires_grad_(True)
    conditioning = pipeline.encode_prompts(["a cat"], trained=trained)
    assert conditioning["hidden_state1"].requires_grad == ("text_encoder" in trained)
    assert conditioning["hidden_state2"].requires_grad == ("text_encoder_2" in trained)
    assert conditioning["pool2"].requires_grad == ("text_encoder_2" in trained)


def test_gradient_checkpointing_of_encoders_changes_no_gradient(few_blocks_sdxl):
    pipeline = open_pipeline(few_blocks_sdxl)
    encoders = pipeline.load_text_encoders()
    weights = [encoder.text_model.encoder.layers[0].mlp.fc1.weight for encoder in encoders]

    def gradients() -> list[torch.Tensor]:
        for weight in weights:
            weight.requires_grad_(True).grad = None
        conditioning = pipeline.encode_prompts(["a cat", "dog"], trained=pipeline.encoders)
        sum(value.square().mean() for value in conditioning.values()).backward()
        return [weight.grad.clone() for weight in weights]

    expected = gradients()
    calls = []
    encoders[1].text_model.encoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for encoder in encoders:
        apply_memory_plan(encoder.block_lists(), MemoryPlan(checkpointing=True))
    for actual, wanted in zip(gradients(), expected):
        torch.testing.assert_close(actual, wanted, atol=1e-7, rtol=1e-5)
    assert len(calls) == 2, "the layer ran once forward and once again for the gradient"


# Images


def test_an_images_latents_do_not_depend_on_its_batch(sd1):
    pixels = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = sd1.encode_images(pixels, generators(1, 2, 3))
    assert together.shape == (3, 4, 4, 6) and together.dtype == torch.float32
    torch.testing.assert_close(together[1:2], sd1.encode_images(pixels[1:2], generators(2)), atol=1e-5, rtol=1e-5)
    assert sd1.decode_latents(sd1.latent_scale * together).shape == pixels.shape
    with pytest.raises(ValueError, match="2 generators for 3 images"):
        sd1.encode_images(pixels, generators(1, 2))


def test_a_half_precision_autoencoder_that_overflows_says_what_helps(few_blocks_sd1, caplog):
    half = open_pipeline(few_blocks_sd1, torch.float16)
    kept = open_pipeline(few_blocks_sd1, torch.float16, dtypes={"autoencoder": torch.float32})
    for pipeline in (half, kept):
        autoencoder = pipeline.load_autoencoder()
        residual_blocks = autoencoder.encoder.down_blocks[0].resnets[0], autoencoder.decoder.mid_block.resnets[0]
        for layer in (autoencoder.encoder.conv_in, autoencoder.decoder.conv_in, *(b.conv2 for b in residual_blocks)):
            layer.bias.fill_(6e4)  # the sum of two is more than float16 can hold
    with pytest.raises(UserError, match="in float16 its values overflow: add --no_half_vae"):
        half.encode_images(torch.zeros(1, 3, 16, 16), None)
    assert kept.encode_images(torch.zeros(1, 3, 16, 16), None).isfinite().all()
    assert kept.decode_latents(torch.zeros(1, 4, 2, 2)).isfinite().all() and not caplog.records
    assert torch.equal(half.decode_latents(torch.zeros(1, 4, 2, 2)), torch.full((1, 3, 16, 16), -1.0))
    assert "add --no_half_vae" in caplog.text
    caplog.clear()
    kept.decode_latents(torch.full((1, 4, 2, 2), float("nan")))
    assert "no_half_vae" not in caplog.text and "the U-Net gave NaN latents" in caplog.text


def test_the_autoencoder_computes_in_its_own_format_within_autocast_too(sd1):
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = sd1.encode_images(pixels, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sd1.encode_images(pixels, None), expected)
        inside = sd1.decode_latents(expected)
    assert torch.equal(inside, sd1.decode_latents(expected))


# Predictions


@pytest.mark.parametrize("variant", ["sd1", "sdxl"])
def test_predictions_of_a_batch_are_those_of_its_items(request, variant):
    pipeline = request.getfixturevalue(variant)
    conditioning = pipeline.encode_prompts(["a cat", "a dog"])
    if variant == "sdxl":
        conditioning["time_ids"] = torch.cat(
            (time_ids((64, 64), (0, 0), (64, 64)), time_ids((99, 80), (3, 4), (64, 72)))
        )
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    together = pipeline.predict(noisy, timesteps, conditioning)
    assert together.shape == noisy.shape and together.dtype == torch.float32
    for item in range(2):
        alone = {name: value[item : item + 1] for name, value in conditioning.items()}
        one = pipeline.predict(noisy[item : item + 1], timesteps[item : item + 1], alone)
        torch.testing.assert_close(together[item : item + 1], one, atol=1e-4, rtol=1e-4)


def test_sizes_are_not_rounded_to_a_half_format(few_blocks_sdxl):
    """bfloat16 cannot tell 1001 from 1000."""
    pipeline = open_pipeline(few_blocks_sdxl, torch.bfloat16)
    seen = []
    unet = pipeline.load_transformer()
    unet.add_time_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    conditioning = pipeline.encode_prompts(["a cat"]) | {"time_ids": time_ids((1001, 1003), (5, 7), (1024, 999))}
    pipeline.predict(torch.zeros(1, 4, 8, 8), torch.tensor([500]), conditioning)
    assert seen[0].tolist() == [1001, 1003, 5, 7, 1024, 999]


@pytest.mark.parametrize("variant", ["sd1", "sdxl"])
def test_split_attention_gives_the_same_predictions_and_gradients(request, variant, few_blocks_sd1, few_blocks_sdxl):
    plain = request.getfixturevalue(variant)
    split = open_pipeline({"sd1": few_blocks_sd1, "sdxl": few_blocks_sdxl}[variant], attention_backend="split")
    conditioning = plain.encode_prompts(["a cat", "a dog"]) | {
        "time_ids": time_ids((64, 64), (0, 0), (64, 64)).repeat(2, 1)
    }
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    results = []
    for pipeline in (plain, split):
        latents = noisy.clone().requires_grad_(True)
        out = pipeline.predict(latents, timesteps, conditioning)
        out.square().mean().backward()
        results.append((out.detach(), latents.grad))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)
    processors = {type(processor).__name__ for processor in split.load_transformer().attn_processors.values()}
    assert processors == {"BackendProcessor"}


@pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="xformers is installed")
def test_a_missing_attention_package_is_named_at_once(few_blocks_sd1):
    with pytest.raises(UserError, match="needs the package xformers"):
        open_pipeline(few_blocks_sd1, attention_backend="xformers")


def test_a_dry_run_can_do_everything_without_numbers(few_blocks_sdxl, monkeypatch):
    pipeline = open_pipeline(few_blocks_sdxl, attention_backend="split")
    pipeline.load_tokenizers()
    for part in pipeline.parts:
        monkeypatch.setattr(getattr(pipeline.files, part).source, "reads_values", False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = pipeline.encode_images(torch.zeros(2, 3, 64, 48), [torch.Generator().manual_seed(0)] * 2)
        assert found.shape == (2, 4, 8, 6) and pipeline.decode_latents(found).shape == (2, 3, 64, 48)
        conditioning = pipeline.encode_prompts(["a cat", "a dog"], trained=pipeline.encoders)
        conditioning["time_ids"] = torch.zeros(2, 6)
        assert pipeline.predict(found, torch.tensor([1, 2]), conditioning).shape == found.shape


# Images


def test_a_request_draws_an_image(sd1):
    """With every sampler: ``tests/parity/test_stable_diffusion_image_to_image_matches_diffusers.py``."""
    image = sd1.generate(dataclasses.replace(QUICK, width=72))
    assert image.size == (72, 64) and image.mode == "RGB"
    assert len(set(image.tobytes())) > 10


def test_a_seed_gives_one_image_whatever_was_drawn_before(sdxl):
    for sampler in ("euler_a", "ddim"):
        first = latents(sdxl, sampler=sampler)
        latents(sdxl, sampler=sampler, seed=6, prompt="something else")
        torch.randn(3)
        assert torch.equal(latents(sdxl, sampler=sampler), first)
        assert not torch.equal(latents(sdxl, sampler=sampler, seed=6), first)
    assert not torch.equal(latents(sdxl, seed=None), latents(sdxl, seed=None))


def test_drawing_leaves_the_global_generator_alone(sd1):
    torch.manual_seed(4)
    before = torch.get_rng_state()
    latents(sd1, sampler="euler_a")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("asked, given", [((64, 64), (64, 64)), ((79, 71), (72, 64)), ((8, 20), (64, 64))])
def test_sides_are_rounded_down_to_the_latent_stride(sd1, asked, given):
    height, width = asked
    found = latents(sd1, height=height, width=width, sample_steps=1)
    assert tuple(found.shape[-2:]) == (given[0] // 8, given[1] // 8)


def test_guidance_of_one_or_less_leaves_the_negative_prompt_out(sd1):
    assert torch.equal(latents(sd1, scale=1.0), latents(sd1, scale=0.0, negative_prompt="other"))
    assert not torch.equal(latents(sd1), latents(sd1, negative_prompt="other"))
    assert torch.equal(latents(sd1, negative_prompt=None), latents(sd1, negative_prompt=""))


@pytest.mark.parametrize("variant", ["sd1", "sdxl"])
def test_encoded_prompts_draw_the_same_image(request, variant):
    pipeline = request.getfixturevalue(variant)
    expected = latents(pipeline)
    encoded = {"conditioning": pipeline.encode_prompts(["a red cat"])}
    encoded |= {"negative_conditioning": pipeline.encode_prompts(["a dog"])}
    torch.testing.assert_close(latents(pipeline, prompt="", negative_prompt="", **encoded), expected)


def test_time_ids_in_the_conditioning_win_over_the_requests_sizes(sdxl):
    sizes = time_ids((512, 600), (8, 9), (64, 80))
    encoded = {
        name: sdxl.encode_prompts([text]) | {"time_ids": sizes}
        for name, text in (("conditioning", "a red cat"), ("negative_conditioning", "a dog"))
    }
    expected = latents(sdxl, original_size=(512, 600), crop=(8, 9), target_size=(64, 80))
    torch.testing.assert_close(latents(sdxl, **encoded), expected)
    assert not torch.equal(latents(sdxl), expected)


def test_a_request_may_decide_on_zero_terminal_snr(few_blocks_sd2, sd2):
    rescaled = open_pipeline(few_blocks_sd2, v_parameterization=True, zero_terminal_snr=True)
    plain = open_pipeline(few_blocks_sd2, v_parameterization=True)
    plain.modules = rescaled.modules = sd2.modules
    assert torch.equal(latents(rescaled), latents(plain, zero_terminal_snr=True))
    assert torch.equal(latents(plain), latents(rescaled, zero_terminal_snr=False))
    assert not torch.equal(latents(rescaled), latents(plain))


def test_an_unknown_sampler_is_refused_before_anything_is_loaded(few_blocks_sd1):
    pipeline = open_pipeline(few_blocks_sd1)
    with pytest.raises(UserError, match='"unipc" is not a sampler'):
        latents(pipeline, sampler="unipc")
    assert pipeline.modules == {}
