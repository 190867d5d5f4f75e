"""A diffusers U-Net under the original code's names: the same layers, each once, where checkpoints have them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.models.stable_diffusion.keys import renamed, unet_table
from library.models.stable_diffusion.original_names import under_original_names
from tests.networks.stable_diffusion import real_unet, shared_tiny_model, tiny_model

LEVELS = {"sd1": (True, True, True, False), "sd2": (True, True, True, False), "sdxl": (False, True, True)}
TENSORS = {"sd1": 686, "sd2": 686, "sdxl": 1680}  # of the U-Net in the published single files


def own_parameters(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if list(module.parameters(recurse=False))}


@pytest.mark.parametrize("variant", LEVELS)
def test_every_layer_is_there_once_under_the_name_that_checkpoints_have(variant):
    unet = real_unet(variant)
    tree = under_original_names(unet)
    paths = {id(module): path for path, module in own_parameters(unet).items()}
    table = unet_table(2, LEVELS[variant])
    layers = own_parameters(tree)
    assert {path: renamed(path, table) for path in layers} == {path: paths[id(layer)] for path, layer in layers.items()}
    assert len(layers) == len(paths)
    assert len(tree.state_dict()) == len(unet.state_dict()) == TENSORS[variant]


def test_names_that_diffusers_itself_converts():
    """diffusers' reader of single files finds every tensor under the name that the tree gives it."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = shared_tiny_model("sdxl", whole=True).unet
    tensors = {f"model.diffusion_model.{key}": value for key, value in under_original_names(unet).state_dict().items()}
    converted = convert_ldm_unet_checkpoint(tensors, dict(unet.config))
    own = unet.state_dict()
    assert converted.keys() == own.keys()
    assert all(converted[key].data_ptr() == own[key].data_ptr() for key in own)


def test_blocks_have_the_classes_that_network_modules_look_for():
    tree = under_original_names(real_unet("sdxl"))
    classes = {path: type(module).__name__ for path, module in tree.named_modules()}
    assert classes["input_blocks.4.0"] == classes["middle_block.2"] == "ResnetBlock2D"
    assert classes["input_blocks.4.1"] == classes["middle_block.1"] == "Transformer2DModel"
    assert classes["input_blocks.3.0"] == "Downsample2D" and classes["output_blocks.2.2"] == "Upsample2D"
    counts = {name: list(classes.values()).count(name) for name in set(classes.values())}
    assert counts["ResnetBlock2D"] == 17 and counts["Transformer2DModel"] == 11
    assert counts["Downsample2D"] == counts["Upsample2D"] == 2


def test_what_is_changed_in_the_tree_is_changed_in_the_model():
    tiny = tiny_model("sdxl", whole=True)
    before, keys = tiny.predict(), list(tiny.unet.state_dict())
    tree = under_original_names(tiny.unet)
    layer = tree.get_submodule("output_blocks.3.1.transformer_blocks.0.attn2.to_v")
    original = layer.forward
    layer.forward = lambda x: original(x) + 1
    assert not torch.allclose(tiny.predict(), before)
    del layer.forward
    assert torch.equal(tiny.predict(), before)
    assert list(tiny.unet.state_dict()) == keys
