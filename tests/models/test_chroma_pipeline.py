"""The pipeline with Chroma: one text encoder, a text mask that is always on, no embedded guidance."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.models.flux.pipeline import ChromaPipeline, FluxFiles, FluxRequest
from tools.make_tiny_models import TinyFlux, make_tiny_chroma, make_tiny_flux


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> TinyFlux:
    return make_tiny_chroma(tmp_path_factory.mktemp("tiny"), seed=2)


def open_pipeline(files: TinyFlux, **arguments) -> ChromaPipeline:
    return ChromaPipeline(FluxFiles(**vars(files)), torch.float32, "cpu", **arguments)


@pytest.fixture(scope="module")
def pipeline(files) -> ChromaPipeline:
    return open_pipeline(files)


def image(pipeline: ChromaPipeline, **arguments) -> torch.Tensor:
    request = {"prompt": "a red cat", "width": 64, "height": 48, "seed": 3, "sample_steps": 2, **arguments}
    return pipeline.generate_latents(FluxRequest(**request))


def test_t5_alone_gives_the_conditioning(pipeline):
    assert pipeline.encoders == ("t5xxl",) and "clip_l" not in pipeline.parts and pipeline.apply_t5_attn_mask
    conditioning = pipeline.encode_prompts(["a cat", "a dog"])
    assert not conditioning.pop("l_pooled").any()  # what other programs look for in cache files
    shapes = {name: tuple(value.shape) for name, value in conditioning.items()}
    assert shapes == {"t5_out": (2, 512, 64), "txt_ids": (2, 512, 3), "t5_attn_mask": (2, 512)}


def test_the_image_does_not_depend_on_the_text_length(files, pipeline):
    """T5 and the transformer see neither the padding nor how much of it there is."""
    short = open_pipeline(files, t5xxl_max_token_length=24)
    for arguments in ({}, {"negative_prompt": "", "scale": 4.0}):
        torch.testing.assert_close(image(short, **arguments), image(pipeline, **arguments), rtol=1e-5, atol=1e-5)


def test_an_empty_negative_prompt_guides(pipeline):
    plain, guided = image(pipeline), image(pipeline, negative_prompt="", scale=4.0)
    assert (plain - guided).abs().max() > 1e-2


def test_the_embedded_guidance_is_zero_whatever_is_asked(pipeline):
    assert torch.equal(image(pipeline, guidance_scale=0.0), image(pipeline, guidance_scale=7.0))


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_every_layout_draws_the_same_image(tmp_path, pipeline, layout):
    made = make_tiny_chroma(tmp_path, layout, seed=2)
    if layout == "diffusers":  # the folder alone is enough
        made = TinyFlux(made.transformer, None, None, None)
    assert torch.equal(image(open_pipeline(made)), image(pipeline))


def test_keys_of_which_only_some_have_a_prefix_are_read(tmp_path, files, pipeline):
    from safetensors.torch import load_file, save_file

    state = load_file(files.transformer)
    mixed = {"model.diffusion_model." * (number % 2) + key: value for number, (key, value) in enumerate(state.items())}
    save_file(mixed, tmp_path / "mixed.safetensors")
    other = open_pipeline(TinyFlux(tmp_path / "mixed.safetensors", files.autoencoder, None, files.t5xxl))
    assert torch.equal(image(other), image(pipeline))


class Wrapper(nn.Module):
    """What accelerate or a compiler puts around a module: only the call passes through."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs: object, **named: object) -> object:
        return self.module(*inputs, **named)


def test_a_wrapped_transformer_may_take_the_place_of_the_loaded_one(files, pipeline):
    other = open_pipeline(files)
    other.modules["transformer"] = Wrapper(other.load_transformer())
    assert torch.equal(image(other), image(pipeline))


def test_a_flux_folder_is_named(tmp_path):
    folder = FluxFiles(make_tiny_flux(tmp_path, layout="diffusers").transformer)
    with pytest.raises(UserError, match="is a FLUX.1 file in the Diffusers layout.*Give --model_type flux"):
        ChromaPipeline(folder, torch.float32, "cpu")


def test_t5_is_asked_for_by_its_option(files):
    alone = FluxFiles(files.transformer, files.autoencoder)
    with pytest.raises(UserError, match="--t5xxl is missing"):
        ChromaPipeline(alone, torch.float32, "cpu")
