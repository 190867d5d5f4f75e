"""ControlNet and ControlNet-LLLite files for Stable Diffusion: layouts read, what they become, and files refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from library.lean_imports import diffusers_class
from library.models.loading import on_meta
from library.models.stable_diffusion.checkpoint import open_stable_diffusion
from library.models.stable_diffusion.control_net import load_control_net, open_control_net
from library.models.stable_diffusion.control_net_lllite import LLLiteFile, LLLiteModule, open_lllite
from library.models.stable_diffusion.pipeline import StableDiffusionFiles, StableDiffusionPipeline
from tests.families.stable_diffusion import few_blocks
from tests.full_size import full_stable_diffusion, write_hollow
from tools.make_tiny_control import make_tiny_control_net, make_tiny_lllite

OPTION = "--control_net_models"


@pytest.fixture(scope="module")
def pipelines(few_blocks_sd1, few_blocks_sdxl) -> dict[str, StableDiffusionPipeline]:
    files = {"sd1": few_blocks_sd1, "sdxl": few_blocks_sdxl}
    return {v: StableDiffusionPipeline(StableDiffusionFiles(path), torch.float32, "cpu") for v, path in files.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("control")


def loaded(pipeline: StableDiffusionPipeline, path: Path) -> dict[str, Tensor]:
    return load_control_net(open_control_net(path, pipeline.files.unet), pipeline).state_dict()


@pytest.mark.parametrize("variant", [pytest.param("sd1", marks=pytest.mark.thorough), "sdxl"])
def test_every_layout_of_a_control_net_gives_the_tensors_of_diffusers_own_model(pipelines, variant, tmp_path):
    shape = few_blocks(variant)
    folder = make_tiny_control_net(tmp_path / "diffusers", variant, "diffusers", shape=shape)
    wanted = load_file(folder / "diffusion_pytorch_model.safetensors")
    for layout in ("original", "difference", "diffusers"):
        path = (
            folder if layout == "diffusers" else make_tiny_control_net(tmp_path / layout, variant, layout, shape=shape)
        )
        found = loaded(pipelines[variant], path)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6 if layout == "difference" else 0)


def test_original_names_become_those_that_diffusers_converts_them_to(pipelines, tmp_path):
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    path = make_tiny_control_net(tmp_path, "sd1", shape=few_blocks("sd1"))
    pipeline = pipelines["sd1"]
    opened = open_control_net(path, pipeline.files.unet)
    config = dict(diffusers_class("ControlNetModel")(**opened.config).config)
    theirs = convert_controlnet_checkpoint(load_file(path), config)
    ours = loaded(pipeline, path)
    assert {name for name in theirs if not torch.equal(theirs[name], ours[name])} == set()
    assert theirs.keys() == ours.keys()


def test_a_file_without_the_prefix_and_one_in_a_whole_model_are_the_same(pipelines, few_blocks_sd1, tmp_path):
    path = make_tiny_control_net(tmp_path, "sd1", shape=few_blocks("sd1"))
    expected = loaded(pipelines["sd1"], path)
    bare = {name.removeprefix("control_model."): value for name, value in load_file(path).items()}
    save_file(bare, tmp_path / "bare.safetensors")
    torch.save({"state_dict": {**load_file(few_blocks_sd1), **load_file(path)}}, tmp_path / "whole.pth")
    for name in ("bare.safetensors", "whole.pth"):
        ours = loaded(pipelines["sd1"], tmp_path / name)
        assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)


def test_files_that_are_no_control_net_of_the_model_are_refused_in_one_sentence(pipelines, few_blocks_sd1, tmp_path):
    xl = make_tiny_control_net(tmp_path / "xl", "sdxl", shape=few_blocks("sdxl"))
    wide = make_tiny_control_net(tmp_path / "wide", "sd1")
    whole = load_file(make_tiny_control_net(tmp_path / "sd1", "sd1", shape=few_blocks("sd1")))
    hints = whole["control_model.input_hint_block.0.weight"]
    save_file({**whole, "control_model.input_hint_block.0.weight": hints[:, :1].clone()}, tmp_path / "grey.safetensors")
    whole.pop("control_model.zero_convs.1.0.weight")
    save_file(whole, tmp_path / "damaged.safetensors")
    cases = {
        xl: "belongs to another model",
        wide: "belongs to another model",
        few_blocks_sd1: "a ControlNet for Stable Diffusion",
        tmp_path / "damaged.safetensors": "1 tensor is missing",
        tmp_path / "grey.safetensors": "takes hints of 1 channels, where an image has 3",
        tmp_path / "nothing.safetensors": "does not exist",
    }
    for path, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            open_control_net(path, pipelines["sd1"].files.unet, OPTION)
        assert str(caught.value).startswith(OPTION) and "\n" not in str(caught.value)


# ---- LLLite ----------------------------------------------------------------------------------------------------------


def opened_lllite(pipeline: StableDiffusionPipeline, path: Path) -> LLLiteFile:
    return open_lllite(path, pipeline.files.unet, pipeline.variant)


def test_an_lllite_file_has_a_module_for_each_layer_that_it_names(pipelines, folder):
    path = make_tiny_lllite(folder, shape=few_blocks("sdxl"))
    modules = opened_lllite(pipelines["sdxl"], path).load(torch.float32, "cpu")
    assert "input_blocks.4.1.transformer_blocks.0.attn1.to_q" in modules
    assert "middle_block.1.transformer_blocks.0.attn2.to_q" in modules
    stored = load_file(path)
    for layer, module in modules.items():
        for name, value in module.state_dict().items():
            assert torch.equal(value, stored[f"lllite_unet_{layer.replace('.', '_')}.{name}"])


def test_an_lllite_module_is_its_formula(pipelines):
    for level, layers in enumerate([((3, 4, 4), (4, 8, 2)), ((3, 4, 4), (4, 8, 4)), ((3, 4, 4), (4, 4, 4), (4, 8, 2))]):
        torch.manual_seed(level)
        module = LLLiteModule(layers, 16, 6)
        hints, rows = torch.randn(2, 3, 64, 96), 4
        size = (8 >> level, 12 >> level)
        x = torch.randn(rows, size[0] * size[1], 16)
        seen = hints
        for index, layer in enumerate(module.conditioning1[::2]):
            seen = F.conv2d(F.relu(seen) if index else seen, layer.weight, layer.bias, layer.stride)
        assert seen.shape == (2, 8, *size)
        tokens = torch.cat([seen.flatten(2).transpose(1, 2)] * 2)
        down = F.relu(F.linear(x, module.down[0].weight, module.down[0].bias))
        mid = F.relu(F.linear(torch.cat([tokens, down], dim=2), module.mid[0].weight, module.mid[0].bias))
        expected = F.linear(mid, module.up[0].weight, module.up[0].bias)
        torch.testing.assert_close(module(x, module.hint_map(hints, (8, 12))), expected)
        # Of latents with an odd number of rows, halved sizes are rounded up.
        assert module.hint_map(hints, (7, 11)).shape[1] == -(-7 // 2**level) * -(-11 // 2**level)


def test_lllite_files_that_cannot_be_used_are_refused_in_one_sentence(pipelines, folder, tmp_path):
    path = make_tiny_lllite(folder, shape=few_blocks("sdxl"))
    stored = load_file(path)
    for change, message in {
        "unknown": "the U-Net has no layer for 1 of its",
        "missing": "is missing",
        "narrow": "belongs to another model",
        "other": "holds no ControlNet-LLLite",
        "grey": "from an image's 3 channels on",
    }.items():
        tensors = dict(stored)
        first = next(iter(tensors)).split(".")[0]
        if change == "unknown":
            tensors |= {
                key.replace(first, "lllite_unet_input_blocks_99_1_transformer_blocks_0_attn1_to_q"): value.clone()
                for key, value in tensors.items()
                if key.startswith(first + ".")
            }
        elif change == "missing":
            tensors.pop(f"{first}.mid.0.bias")
        elif change == "grey":
            tensors[f"{first}.conditioning1.0.weight"] = tensors[f"{first}.conditioning1.0.weight"][:, :1].clone()
        elif change == "narrow":
            for name, axis in (("down.0.weight", 1), ("up.0.weight", 0), ("up.0.bias", 0)):
                tensors[f"{first}.{name}"] = tensors[f"{first}.{name}"].narrow(axis, 0, 3).clone()
        else:
            tensors = {"a": torch.zeros(1)}
        save_file(tensors, tmp_path / f"{change}.safetensors")
        with pytest.raises(UserError, match=message):
            opened_lllite(pipelines["sdxl"], tmp_path / f"{change}.safetensors")
    with pytest.raises(UserError, match="is for Stable Diffusion XL; this is Stable Diffusion 1.x"):
        opened_lllite(pipelines["sd1"], path)


# ---- the published models' sizes -------------------------------------------------------------------------------------

XL = {
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "attention_head_dim": (5, 10, 20),
    "addition_embed_type": "text_time",
}
PUBLISHED = {
    "sd1": {"cross_attention_dim": 768},
    "sdxl": {
        **XL,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
    },
    "sdxl small": {**XL, "down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D"},
}
"""Configurations of published files, where they differ from the defaults of diffusers' class and from the U-Net's."""
OF_UNET = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")


@pytest.fixture(scope="module")
def full_unet(tmp_path_factory) -> Callable[[str], Any]:
    """The U-Net of a file of the published size."""
    folder = tmp_path_factory.mktemp("full")
    return cache(lambda variant: open_stable_diffusion(full_stable_diffusion(folder, variant)).unet)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_sizes_of_published_control_nets_are_inferred_from_the_shapes(full_unet, tmp_path, kind):
    unet = full_unet(kind.split()[0])
    config = {**PUBLISHED[kind], **{name: unet.config[name] for name in OF_UNET if name in unet.config}}
    with on_meta():
        published = diffusers_class("ControlNetModel")(**config)
    path = write_hollow(tmp_path / "control.safetensors", published.state_dict(), torch.float16)
    opened = open_control_net(path, unet).meta_module()
    shapes = [{name: value.shape for name, value in module.state_dict().items()} for module in (opened, published)]
    assert shapes[0] == shapes[1]
    heads = [[m.heads for m in module.modules() if type(m).__name__ == "Attention"] for module in (opened, published)]
    assert heads[0] == heads[1]
