"""Every layout gives the tensors of diffusers' converters, and modules that compute what its and transformers' do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.checkpoints import open_checkpoint
from library.models.clip import ClipTextEncoder
from library.models.loading import LoadSpec
from library.models.stable_diffusion.checkpoint import StableDiffusionModel, open_stable_diffusion
from library.models.stable_diffusion.unet import set_attention_backend
from tools.make_tiny_stable_diffusion import make_tiny_stable_diffusion

VARIANTS = ["sd1", "sd2", "sdxl"]
START, END = 512, 513  # of the tiny vocabulary


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def original(variant, request) -> StableDiffusionModel:
    return open_stable_diffusion(request.getfixturevalue(f"tiny_{variant}"))


@pytest.fixture(scope="module")
def folder(variant, tmp_path_factory):
    return make_tiny_stable_diffusion(tmp_path_factory.mktemp(variant), variant, "diffusers")


def numbers(source) -> dict[str, Tensor]:
    return {name: source.load(name, None, "cpu") for name in source.names()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape and torch.equal(actual[name], value), name


def file_tensors(model: StableDiffusionModel) -> dict[str, Tensor]:
    checkpoint = model.unet.source.checkpoint
    return {key: checkpoint.load(key) for key in checkpoint}


def test_the_unet_of_a_single_file_is_the_one_that_diffusers_converts(original):
    expected = single_file_utils.convert_ldm_unet_checkpoint(file_tensors(original), original.unet.config)
    assert_same(numbers(original.unet.source), expected)


def test_the_vae_of_a_single_file_is_the_one_that_diffusers_converts(original):
    expected = single_file_utils.convert_ldm_vae_checkpoint(file_tensors(original), original.autoencoder.config)
    assert_same(numbers(original.autoencoder.source), expected)


def reference_encoder_states(variant: str, tensors: dict[str, Tensor], model: StableDiffusionModel) -> list[Any]:
    """What diffusers makes of the text encoders in a single file."""
    if variant == "sd1":
        return [single_file_utils.convert_ldm_clip_checkpoint(tensors)]
    last = CLIPTextModel(CLIPTextConfig(**model.text_encoders[-1].sizes))
    if variant == "sd2":
        converted = single_file_utils.convert_open_clip_checkpoint(last, tensors)
        # diffusers knows the unused last layer by the real model's number.
        unused = f"text_model.encoder.layers.{last.config.num_hidden_layers}."
        return [{name: value for name, value in converted.items() if not name.startswith(unused)}]
    first = single_file_utils.convert_ldm_clip_checkpoint(tensors, remove_prefix="conditioner.embedders.0.transformer.")
    second = single_file_utils.convert_open_clip_checkpoint(last, tensors, prefix="conditioner.embedders.1.model.")
    return [first, second]


def test_the_text_encoders_of_a_single_file_are_those_that_diffusers_converts(variant, original):
    for file, state in zip(
        original.text_encoders, reference_encoder_states(variant, file_tensors(original), original), strict=True
    ):
        state.pop("text_model.embeddings.position_ids", None)
        if file.projection_size is None:
            state.pop("text_projection.weight", None)
        assert_same(numbers(file.source), state)


@pytest.mark.parametrize("variant", ["sd1", pytest.param("sd2", marks=pytest.mark.thorough), "sdxl"], indirect=True)
def test_both_layouts_load_to_the_same_modules(variant, original, folder):
    opened = open_stable_diffusion(folder)
    assert opened.variant == original.variant == variant
    pairs = [(opened.unet, original.unet), (opened.autoencoder, original.autoencoder)]
    pairs += list(zip(opened.text_encoders, original.text_encoders, strict=True))
    for first, second in pairs:
        modules = [file.load(LoadSpec.of(torch.float32)) for file in (first, second)]
        assert_same(modules[0].state_dict(), modules[1].state_dict())
        for module in modules:
            assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())
            assert not any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])


@pytest.mark.parametrize("variant", ["sd1", pytest.param("sd2", marks=pytest.mark.thorough), "sdxl"], indirect=True)
def test_the_unet_predicts_what_diffusers_own_does_to_the_bit(original, folder):
    """Gradients too: our forwards of its blocks leave out only what changes nothing."""
    reference = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
    draw = torch.Generator().manual_seed(1)
    config = original.unet.config
    inputs: dict[str, Any] = {
        "sample": torch.randn(2, 4, 12, 8, generator=draw),
        "timestep": torch.tensor([10, 900]),
        "encoder_hidden_states": torch.randn(2, 7, config["cross_attention_dim"], generator=draw),
    }
    if original.variant == "sdxl":
        sizes = torch.tensor([[512, 768, 0, 32, 512, 768]]).repeat(2, 1)
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 80, generator=draw), "time_ids": sizes}
    unet = original.unet.load(LoadSpec.of(torch.float32)).requires_grad_(False)
    set_attention_backend(unet, "sdpa")

    def results(module: Any) -> tuple[Tensor, Tensor]:
        sample = inputs["sample"].clone().requires_grad_()
        out = module(**{**inputs, "sample": sample}).sample
        return out.detach(), *torch.autograd.grad(out.square().mean(), sample)

    expected = results(reference.requires_grad_(False))
    assert expected[0].std() > 0.1 and expected[1].any()
    assert all(torch.equal(one, two) for one, two in zip(results(unet), expected))
    replaced = {type(module).__name__ for module in unet.modules() if "forward" in vars(module)}
    assert replaced == {"UNet2DConditionModel", "Attention", "ResnetBlock2D"}


@torch.no_grad()
def test_the_vae_encodes_and_decodes_as_diffusers_own(original, folder):
    reference = AutoencoderKL.from_pretrained(folder, subfolder="vae").eval()
    vae = original.autoencoder.load(LoadSpec.of(torch.float32))
    pixels = torch.rand(1, 3, 64, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = reference.encode(pixels).latent_dist
    actual = vae.encode(pixels).latent_dist
    torch.testing.assert_close(actual.parameters, expected.parameters, atol=1e-5, rtol=1e-5)
    decoded = reference.decode(expected.mean).sample
    torch.testing.assert_close(vae.decode(expected.mean).sample, decoded, atol=1e-5, rtol=1e-5)
    assert vae.config.scaling_factor == reference.config.scaling_factor


def tokens() -> Tensor:
    rows = torch.randint(1, START, (2, 77), generator=torch.Generator().manual_seed(2))
    rows[:, 0] = START
    rows[0, 9:] = END
    rows[1, 30:] = 0
    rows[1, 30] = END
    return rows


@torch.no_grad()
def test_text_encoders_give_the_hidden_states_and_pooled_text_of_transformers(original, folder):
    for index, file in enumerate(original.text_encoders):
        is_projected = index == 1
        reference_class = CLIPTextModelWithProjection if is_projected else CLIPTextModel
        reference = reference_class.from_pretrained(folder, subfolder="text_encoder_2" if index else "text_encoder")
        expected = reference.eval()(tokens(), output_hidden_states=True)
        encoder = file.load(LoadSpec.of(torch.float32))
        actual = encoder.text_model(tokens())
        assert len(actual.hidden_states) == len(expected.hidden_states) == 4
        for ours, theirs in zip(actual.hidden_states, expected.hidden_states):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        pooled = expected.text_embeds if is_projected else expected.pooler_output
        torch.testing.assert_close(encoder(tokens(), END), pooled, atol=1e-5, rtol=1e-5)
        assert (encoder.text_projection is not None) == is_projected


@torch.no_grad()
def test_the_projection_of_a_single_file_is_applied_from_the_right(tiny_sdxl):
    """The file's parameter P is used as ``x @ P``; a linear layer holds its transpose."""
    parameter = open_checkpoint(tiny_sdxl).load("conditioner.embedders.1.model.text_projection")
    encoder: ClipTextEncoder = open_stable_diffusion(tiny_sdxl).text_encoders[1].load(LoadSpec.of(torch.float32))
    hidden = encoder.text_model(tokens()).last_hidden_state
    ends = hidden[torch.arange(2), torch.tensor([9, 30])]
    torch.testing.assert_close(encoder(tokens(), END), ends @ parameter, atol=1e-5, rtol=1e-5)
