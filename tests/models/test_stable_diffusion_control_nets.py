"""ControlNet and ControlNet-LLLite files for Stable Diffusion: layouts read, what they become, and files refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.models.lean_imports import diffusers_class
from library.models.stable_diffusion.pipeline import StableDiffusionFiles, StableDiffusionPipeline
from tests.families.stable_diffusion import few_blocks
from tools.make_tiny_control import make_tiny_control_net

OPTION = "--control_net_models"


@pytest.fixture(scope="module")
def sd1(few_blocks_sd1) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(StableDiffusionFiles(few_blocks_sd1), torch.float32, "cpu")


@pytest.fixture(scope="module")
def sdxl(few_blocks_sdxl) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(StableDiffusionFiles(few_blocks_sdxl), torch.float32, "cpu")


def state(pipeline: StableDiffusionPipeline, path: Path) -> dict[str, torch.Tensor]:
    module = pipeline.load_control_net(pipeline.open_control_net(path, OPTION))
    return module.state_dict()


def test_every_layout_of_a_control_net_gives_the_tensors_of_diffusers_own_model(sd1, sdxl, tmp_path):
    for pipeline, variant in ((sd1, "sd1"), (sdxl, "sdxl")):
        shape = few_blocks(variant)
        folder = make_tiny_control_net(tmp_path / variant / "diffusers", variant, "diffusers", shape=shape)
        wanted = diffusers_class("ControlNetModel").from_pretrained(folder).state_dict()
        for layout in ("original", "difference"):
            path = make_tiny_control_net(tmp_path / variant / layout, variant, layout, shape=shape)
            found = state(pipeline, path)
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6 if layout == "difference" else 0)
        assert all(torch.equal(value, wanted[name]) for name, value in state(pipeline, folder).items())
