"""Several network files on parts that come and go: checked before they are loaded, exact when they are there."""

from __future__ import annotations

import copy
import gc
import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from library.errors import UserError
from library.families import FLUX
from library.models.flux.transformer import FluxTransformer
from library.models.loading import on_meta
from networks import lora_flux, oft_flux
from networks.adapters.network_stack import NetworkStack


def choose(keys):
    return oft_flux if any(key.startswith("oft_") for key in keys) else lora_flux


@pytest.fixture
def meta_module(transformer) -> FluxTransformer:
    with on_meta():
        return FluxTransformer(transformer.config)


@pytest.fixture
def stack(meta_module):
    def make(*files, merge: bool = False) -> NetworkStack:
        encoders = {"clip_l": None, "t5xxl": None}
        return NetworkStack(files, choose, encoders, {"transformer": meta_module}, families=[FLUX], merge=merge)

    return make


@pytest.fixture
def file(transformer, tmp_path):
    """A file with random weights."""

    def make(name: str, module=lora_flux, alpha: float = 2.0):
        network = module.create_network(1.0, 4, alpha, None, None, transformer)
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        path = tmp_path / f"{name}.safetensors"
        network.save_weights(path, None, {})
        return path

    return make


def output(model: nn.Module, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)


def one_by_one(model: nn.Module, *files) -> nn.Module:
    """A copy of the model into which each file is merged by its own network."""
    model = copy.deepcopy(model)
    for path, multiplier in files:
        network, _ = choose(load_file(path)).create_network_from_weights(multiplier, path, None, None, model)
        network.merge_to(None, model)
    return model


@pytest.mark.parametrize("merge", [False, True], ids=["beside", "merged"])
def test_files_act_in_their_order(stack, file, transformer, inputs, merge):
    """An OFT file turns what the LoRA before it has made, not what one after it makes."""
    lora, turn = (file("lora"), 0.8), (file("turned", oft_flux, 0.5), 1.2)
    plain = output(transformer, inputs)
    results = []
    for files in ((lora, turn), (turn, lora)):
        model = copy.deepcopy(transformer)
        stack(*files, merge=merge).enter("transformer", model, "cpu")
        results.append(output(model, inputs))
        expected = output(one_by_one(transformer, *files), inputs)
        assert (results[-1] - expected).abs().max() < 1e-4 * expected.abs().max()
        assert (expected - plain).abs().max() > 1e-2
    assert (results[0] - results[1]).abs().max() > 1e-3


def test_what_left_is_as_before_and_is_not_kept_in_memory(stack, file, transformer, inputs):
    whole = stack((file("lora"), 1.0), (file("another"), 0.5))
    model = copy.deepcopy(transformer)
    before = output(model, inputs)
    whole.enter("transformer", model, "cpu")
    during = output(model, inputs)
    whole.leave("transformer")
    assert torch.equal(output(model, inputs), before) and not torch.equal(during, before)
    memory = weakref.ref(model)
    del model
    gc.collect()
    assert memory() is None
    again = copy.deepcopy(transformer)
    whole.enter("transformer", again, "cpu")
    assert torch.equal(output(again, inputs), during)


def test_multipliers_change_what_is_not_merged(stack, file, transformer, inputs):
    path = file("lora")
    changed, given = stack((path, 1.0)), stack((path, 0.3))
    changed.set_multipliers([0.3])
    outputs = []
    for each in (changed, given):
        model = copy.deepcopy(transformer)
        each.enter("transformer", model, "cpu")
        outputs.append(output(model, inputs))
    assert torch.equal(*outputs)
    with pytest.raises(ValueError):
        changed.set_multipliers([1.0, 1.0])
    with pytest.raises(ValueError):
        stack((path, 1.0), merge=True).set_multipliers([0.3])


def test_alphas_in_the_metadata_of_peft_count(stack, file, transformer, inputs, tmp_path):
    """diffusers and PEFT write no alpha tensors; what is not the rank stands in the metadata."""
    path, peft = file("lora", alpha=1.0), tmp_path / "peft.safetensors"
    tensors = {key: tensor for key, tensor in load_file(path).items() if not key.endswith(".alpha")}
    save_file(tensors, peft, {"lora_adapter_metadata": json.dumps({"lora_alpha": 1.0, "r": 4})})
    outputs = []
    for name in (path, peft):
        model = copy.deepcopy(transformer)
        stack((name, 1.0)).enter("transformer", model, "cpu")
        outputs.append(output(model, inputs))
    assert torch.equal(*outputs)


def test_comfyuis_names(stack, file, transformer, inputs, tmp_path):
    path, comfy = file("lora"), tmp_path / "comfy.safetensors"
    paths = {f"lora_unet_{name}".replace(".", "_"): name for name, _ in transformer.named_modules()}
    renamed = {}
    for key, tensor in load_file(path).items():
        name, _, end = key.partition(".")
        renamed[f"diffusion_model.{paths[name]}.{end}"] = tensor
    save_file(renamed, comfy)
    outputs = []
    for name in (path, comfy):
        model = copy.deepcopy(transformer)
        stack((name, 0.7)).enter("transformer", model, "cpu")
        outputs.append(output(model, inputs))
    assert torch.equal(*outputs)


def test_a_file_that_fits_in_part_acts_in_part_and_is_counted_and_named(
    stack, file, transformer, inputs, tmp_path, messages
):
    whole = file("whole")
    tensors = load_file(whole)
    names = [f"lora_unet_double_blocks_{number}_img_mod_lin" for number in (5, 6, 7, 8)]
    for name in names:
        tensors |= {f"{name}.lora_down.weight": torch.ones(4, 64), f"{name}.lora_up.weight": torch.ones(384, 4)}
    save_file(tensors, tmp_path / "other.safetensors")
    first = stack((whole, 1.0))
    first.enter("transformer", transformer, "cpu")
    expected = output(transformer, inputs)
    assert not any("left out" in said for said in messages)
    first.leave("transformer")
    stack((tmp_path / "other.safetensors", 1.0)).enter("transformer", transformer, "cpu")
    assert torch.equal(output(transformer, inputs), expected)
    (said,) = (said for said in messages if "left out" in said)
    modules = len({key.partition(".")[0] for key in tensors})
    assert said.startswith(f"{tmp_path / 'other.safetensors'}: 4 of its {modules} modules fit no layer of this model")
    assert said.endswith(f": {', '.join(names[:3])} and 1 more")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "is a LoRA for Stable Diffusion XL"),
        ("lora_unet_layers_0_attention_qkv", "is a LoRA for Lumina Image 2.0"),
        ("transformer.layers.0.attn.to_out.0", "is a LoRA for Lumina Image 2.0"),
        ("diffusion_model.layers.0.feed_forward.w1", "is a LoRA for Lumina Image 2.0"),
        ("lora_unet_nowhere", "none of the 2 tensors belongs to a LoRA module of this model"),
    ],
)
def test_a_file_that_fits_nothing_is_refused_by_its_name(stack, tmp_path, name, sentence):
    path = tmp_path / "foreign.safetensors"
    save_file({f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(8, 2)}, path)
    with pytest.raises(UserError, match=rf"foreign\.safetensors.*{sentence}"):
        stack((path, 1.0))


def test_another_method_is_refused_by_its_name(stack, tmp_path):
    path = tmp_path / "loha.safetensors"
    save_file({"lora_unet_double_blocks_0_img_attn_proj.hada_w1_a": torch.ones(2, 8)}, path)
    with pytest.raises(UserError, match="LoHa"):
        stack((path, 1.0))
