"""The FLUX.1 pipeline: what training and inference ask of it."""

from __future__ import annotations

import json

import pytest
import torch

from library.checkpoints import open_checkpoint
from library.errors import UserError
from library.memory.apply import apply_memory_plan
from library.memory.plan import MemoryPlan
from library.models.flux.pipeline import FluxFiles, FluxPipeline, FluxRequest
from library.safetensors_io import save_file
from tools.make_tiny_models import TinyFlux, make_tiny_flux

LENGTH = 16


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> TinyFlux:
    return make_tiny_flux(tmp_path_factory.mktemp("tiny"), seed=2)


def open_pipeline(files: TinyFlux, **arguments) -> FluxPipeline:
    arguments.setdefault("t5xxl_max_token_length", LENGTH)
    return FluxPipeline(FluxFiles(**vars(files)), torch.float32, "cpu", **arguments)


@pytest.fixture(scope="module")
def pipeline(files) -> FluxPipeline:
    return open_pipeline(files)


def test_conditioning_has_the_arrays_that_caches_hold(pipeline):
    conditioning = pipeline.encode_prompts(["a red cat", "the big green dog on a photo"])
    shapes = {name: tuple(value.shape) for name, value in conditioning.items()}
    assert shapes == {
        "l_pooled": (2, 64),
        "t5_out": (2, LENGTH, 64),
        "txt_ids": (2, LENGTH, 3),
        "t5_attn_mask": (2, LENGTH),
    }
    assert conditioning["txt_ids"].abs().sum() == 0
    mask = conditioning["t5_attn_mask"]
    assert not mask.is_floating_point() and mask[0].tolist() == sorted(mask[0].tolist(), reverse=True)
    assert not any(value.requires_grad for value in conditioning.values())


def test_a_prompt_is_encoded_the_same_alone_and_in_a_batch(pipeline):
    prompts = ["a red cat", "", "the big green dog on a photo of the ring " * 5]
    together = pipeline.encode_prompts(prompts)
    for index, prompt in enumerate(prompts):
        for name, value in pipeline.encode_prompts([prompt]).items():
            torch.testing.assert_close(together[name][index : index + 1], value, atol=1e-5, rtol=1e-5)


def test_text_lengths_follow_the_variant(files, tmp_path):
    schnell = make_tiny_flux(tmp_path, "schnell")
    for given, length in ((files, 512), (schnell, 256)):
        opened = open_pipeline(given, t5xxl_max_token_length=None)
        assert opened.text_lengths == {"clip_l": 77, "t5xxl": length}
        assert opened.tokenize(["a cat"])["t5_tokens"].shape == (1, length)


def test_the_attention_mask_reaches_t5_and_the_transformer_only_when_asked_for(files, pipeline):
    masking = open_pipeline(files, apply_t5_attn_mask=True)
    prompt = ["a cat"]
    plain, masked = pipeline.encode_prompts(prompt), masking.encode_prompts(prompt)
    assert (plain["t5_out"] - masked["t5_out"]).abs().max() > 1e-3
    latents, timesteps, guidance = torch.randn(1, 16, 4, 4), torch.tensor([0.5]), torch.tensor([1.0])
    changed = dict(masked)
    changed["t5_out"] = torch.where(masked["t5_attn_mask"][..., None] > 0, masked["t5_out"], 100.0)
    float_mask = masked | {"t5_attn_mask": masked["t5_attn_mask"].float()}  # as caches give it
    expected = masking.predict(latents, timesteps, masked, guidance)
    assert torch.equal(masking.predict(latents, timesteps, changed, guidance), expected)
    assert torch.equal(masking.predict(latents, timesteps, float_mask, guidance), expected)
    assert not torch.equal(pipeline.predict(latents, timesteps, changed, guidance), expected)


@pytest.mark.parametrize("trained", [(), ("clip_l",), ("t5xxl",), ("clip_l", "t5xxl")])
def test_gradients_flow_through_the_trained_encoders_only(files, trained):
    pipeline = open_pipeline(files)
    for module in pipeline.load_text_encoders():
        module.requires_grad_(True)
    conditioning = pipeline.encode_tokens(pipeline.tokenize(["a cat"]), trained=trained)
    assert conditioning["l_pooled"].requires_grad == ("clip_l" in trained)
    assert conditioning["t5_out"].requires_grad == ("t5xxl" in trained)


def test_gradient_checkpointing_of_encoders_changes_no_gradient(files):
    pipeline = open_pipeline(files)
    clip, t5 = pipeline.load_text_encoders()
    weights = [clip.text_model.encoder.layers[0].mlp.fc1.weight, t5.encoder.block[0].layer[0].SelfAttention.q.weight]

    def gradients() -> list[torch.Tensor]:
        for weight in weights:
            weight.requires_grad_(True).grad = None
        conditioning = pipeline.encode_prompts(["a cat", "dog"], trained=("clip_l", "t5xxl"))
        (conditioning["l_pooled"].square().mean() + conditioning["t5_out"].square().mean()).backward()
        return [weight.grad.clone() for weight in weights]

    expected = gradients()
    calls = []
    clip.text_model.encoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for module in (clip, t5):
        apply_memory_plan(module.block_lists(), MemoryPlan(checkpointing=True))
    for actual, wanted in zip(gradients(), expected):
        torch.testing.assert_close(actual, wanted, atol=1e-7, rtol=1e-5)
    assert len(calls) == 2


def test_one_encoder_alone_is_enough_where_the_other_is_cached(files):
    pipeline = open_pipeline(files)
    conditioning = pipeline.encode_prompts(["a cat"], encoders=("clip_l",))
    assert conditioning.keys() == {"l_pooled"} and pipeline.modules.keys() == {"clip_l"}


def test_images_become_latents_that_decode_to_images(pipeline):
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    latents = pipeline.encode_images(pixels, [torch.Generator().manual_seed(seed) for seed in (1, 2)])
    assert latents.shape == (2, 16, 4, 6) and latents.dtype == torch.float32
    assert pipeline.decode_latents(latents).shape == pixels.shape
    assert (pipeline.latent_stride, pipeline.latent_channels) == (8, 16)


def test_an_image_that_overflows_is_black_with_a_warning_that_says_what_gave_it(files, caplog):
    half = open_pipeline(files, dtypes={"autoencoder": torch.float16})
    block = half.load_autoencoder().decoder.mid.block_1
    block.conv1.weight.fill_(6e4)
    assert torch.equal(half.decode_latents(torch.ones(1, 16, 2, 3)), torch.full((1, 3, 16, 24), -1.0))
    assert "in float16 its values overflow: run it in bfloat16 or float32" in caplog.text
    caplog.clear()
    whole = open_pipeline(files)
    assert whole.decode_latents(torch.ones(1, 16, 2, 3)).isfinite().all() and not caplog.records
    whole.decode_latents(torch.full((1, 16, 2, 3), float("nan")))
    assert "the transformer gave NaN latents" in caplog.text and "overflow" not in caplog.text


def test_prediction_is_the_transformers_velocity(pipeline):
    conditioning = pipeline.encode_prompts(["a cat", "a dog"])
    latents, timesteps = torch.randn(2, 16, 4, 6), torch.tensor([0.1, 0.9])
    velocity = pipeline.predict(latents, timesteps, conditioning, torch.tensor([1.0, 1.0]))
    assert velocity.shape == latents.shape
    with pytest.raises(ValueError, match="guidance"):
        pipeline.predict(latents, timesteps, conditioning)


def test_the_same_seed_gives_the_same_image_from_prompts_and_from_conditioning(pipeline):
    request = FluxRequest("a cat", width=32, height=48, seed=3, sample_steps=2, negative_prompt="dog", scale=2.0)
    encoded = FluxRequest(width=32, height=48, seed=3, sample_steps=2, scale=2.0,
                             conditioning=pipeline.encode_prompts(["a cat"]),
                             negative_conditioning=pipeline.encode_prompts(["dog"]))  # fmt: skip
    first, second = pipeline.generate(request), pipeline.generate(encoded)
    assert first.size == (32, 48) and first.mode == "RGB" and first.tobytes() == second.tobytes()
    request.seed = 4
    assert pipeline.generate(request).tobytes() != first.tobytes()


def test_classifier_free_guidance_needs_a_scale_and_leads_away_from_the_empty_prompt(pipeline):
    def latents(**arguments) -> torch.Tensor:
        return pipeline.generate_latents(FluxRequest("a cat", width=32, height=32, seed=1, sample_steps=2, **arguments))

    plain = latents()
    assert torch.equal(latents(negative_prompt="dog"), plain)
    assert not torch.allclose(latents(scale=3.0), plain)
    assert torch.equal(latents(negative_prompt="", scale=3.0), latents(scale=3.0))


def test_sides_are_rounded_up_to_whole_positions(pipeline):
    image = pipeline.generate(FluxRequest("a cat", width=33, height=47, seed=1, sample_steps=1))
    assert image.size == (48, 48)


def test_generating_leaves_the_global_random_state_alone(pipeline):
    before = torch.random.get_rng_state()
    pipeline.generate(FluxRequest("a cat", width=32, height=32, seed=None, sample_steps=1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_parts_are_loaded_once_unloaded_and_loaded_again(files):
    pipeline = open_pipeline(files)
    assert pipeline.modules == {}
    transformer = pipeline.load_transformer()
    assert pipeline.load_transformer() is transformer
    pipeline.release("transformer")
    again = pipeline.load_transformer()
    assert again is not transformer
    for key, value in again.state_dict().items():
        assert torch.equal(value, transformer.state_dict()[key])
    pipeline.load_text_encoders()
    pipeline.release("text_encoders")
    assert pipeline.modules.keys() == {"transformer"}
    assert {name: [*blocks] for name, blocks in pipeline.block_lists().items()} == {
        "double_blocks": [*again.double_blocks],
        "single_blocks": [*again.single_blocks],
    }


def test_parts_may_have_dtypes_of_their_own(files):
    pipeline = open_pipeline(files, dtypes={"autoencoder": torch.bfloat16, "clip_l": torch.float16})
    pipeline.load_autoencoder(), pipeline.load_text_encoders()
    dtypes = {part: module.dtype for part, module in pipeline.modules.items()}
    assert dtypes == {"autoencoder": torch.bfloat16, "clip_l": torch.float16, "t5xxl": torch.float32}
    latents = pipeline.encode_images(torch.zeros(1, 3, 16, 16), None)
    assert latents.dtype == torch.float32


def test_parts_are_found_in_a_model_folder_and_in_an_all_in_one_file(tmp_path, files, pipeline):
    folder = make_tiny_flux(tmp_path / "diffusers", layout="diffusers", seed=2).transformer
    prefixes = {
        "transformer": "model.diffusion_model.",
        "autoencoder": "vae.",
        "clip_l": "text_encoders.clip_l.transformer.",
        "t5xxl": "text_encoders.t5xxl.transformer.",
    }
    parts = {}
    for part, prefix in prefixes.items():
        checkpoint = open_checkpoint(getattr(files, part))
        parts |= {prefix + key: checkpoint.load(key) for key in checkpoint}
    told = {}
    for part in ("clip_l", "autoencoder"):
        told |= json.loads(open_checkpoint(getattr(files, part)).metadata["config"])
    save_file(parts, files.transformer.parent / "all.safetensors", {"config": json.dumps(told)})
    request = FluxRequest("a red cat", width=32, height=32, seed=1, sample_steps=2)
    expected = pipeline.generate_latents(request)
    for path in (folder, files.transformer.parent / "all.safetensors"):
        whole = FluxPipeline(FluxFiles(path), torch.float32, "cpu", t5xxl_max_token_length=LENGTH)
        torch.testing.assert_close(whole.generate_latents(request), expected, atol=1e-5, rtol=1e-5)


def test_a_part_that_is_not_given_is_asked_for_by_its_option(files):
    with pytest.raises(UserError, match="^--clip_l is missing"):
        FluxPipeline(FluxFiles(files.transformer, files.autoencoder), torch.float32, "cpu")
    opened = FluxPipeline(FluxFiles(files.transformer), torch.float32, "cpu", parts=("transformer",))
    assert opened.text_lengths["t5xxl"] == 512


def test_parts_that_do_not_belong_together_are_named(tmp_path, files):
    checkpoint = open_checkpoint(files.transformer)
    state = {key: checkpoint.load(key) for key in checkpoint}
    state["txt_in.weight"] = torch.zeros(64, 4096)
    save_file(state, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match=r"--t5xxl: .* gives 64 channels, but the transformer .*4096"):
        open_pipeline(TinyFlux(tmp_path / "flux.safetensors", files.autoencoder, files.clip_l, files.t5xxl))


def test_an_autoencoder_in_float32_computes_in_it_under_autocast(pipeline):
    """As --no_half_vae asks for: sample images are drawn inside the trainer's mixed precision."""
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = pipeline.decode_latents(latents)
    encoded = pipeline.encode_images(pixels, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pipeline.decode_latents(latents), pixels)
        assert torch.equal(pipeline.encode_images(pixels, None), encoded)
