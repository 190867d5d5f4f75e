"""networks.oft_flux: names, sizes and rotations of FLUX.1's layers, against the formula written out in float64."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.errors import UserError
from library.memory.apply import apply_memory_plan
from library.memory.plan import MemoryPlan
from library.models.flux.transformer import FluxConfig, FluxTransformer
from library.models.loading import on_meta
from networks import lora_flux, oft_flux
from networks.adapters.oft_core import OFTModule


def turned(weight: Tensor, parts: list[Tensor], alpha: float, multiplier: float) -> Tensor:
    """The weight after OFT: each part's rows in blocks, each block times R^T; the norm limit counts a part's rows."""
    pieces, row = [], 0
    for blocks in parts:
        number, size, _ = blocks.shape
        rows = weight[row : row + number * size].double()
        row += number * size
        skew = blocks.double() - blocks.double().transpose(1, 2)
        skew = skew * min(1.0, alpha * number * size / skew.norm().item())
        identity = torch.eye(size, dtype=torch.float64)
        rotation = (identity + skew) @ torch.linalg.inv(identity - skew)
        effect = multiplier * (rotation - identity) + identity
        pieces += [effect[block].T @ rows[block * size : (block + 1) * size] for block in range(number)]
    assert row == len(weight)
    return torch.cat(pieces)


def make(transformer: nn.Module, alpha: float | None = 0.01, dim: int | None = 4, **arguments: object):
    return oft_flux.create_network(1.0, dim, alpha, None, [None, None], transformer, **arguments)


ATTENTION = {
    f"oft_unet_double_blocks_{block}_{stream}_attn_{part}"
    for block in range(2)
    for stream in ("img", "txt")
    for part in ("qkv", "proj")
}


def test_the_attention_of_the_double_blocks_or_every_layer_of_all_blocks(transformer):
    assert {module.lora_name for module in make(transformer).loras} == ATTENTION
    assert {module.lora_name for module in make(transformer, enable_all_linear="False").loras} == ATTENTION
    names = [lora.lora_name for lora in lora_flux.create_network(1.0, 4, 1, None, [None], transformer).loras]
    every = {name.replace("lora_unet", "oft_unet") for name in names}
    assert {module.lora_name for module in make(transformer, enable_all_linear="True").loras} == every


def test_a_file_has_a_tensor_for_each_part_and_the_default_constraint(transformer, tmp_path):
    make(transformer, None, None, enable_all_linear="true").save_weights(tmp_path / "oft.safetensors", None, None)
    tensors = load_file(tmp_path / "oft.safetensors")
    shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
    small, large = [4, 16, 16], [4, 64, 64]  # parts of 64 and of 256 outputs
    expected = {
        "double_blocks_0_img_attn_qkv": [small] * 3,
        "double_blocks_1_txt_attn_proj": [small],
        "double_blocks_0_img_mlp_0": [large],
        "double_blocks_0_txt_mod_lin": [[4, 96, 96]],
        "single_blocks_1_linear1": [small] * 3 + [large],
        "single_blocks_1_linear2": [small],
        "single_blocks_0_modulation_lin": [[4, 48, 48]],
    }
    for name, parts in expected.items():
        own = {key: shape for key, shape in shapes.items() if key.startswith(f"oft_unet_{name}.")}
        assert own == {
            **{f"oft_unet_{name}.oft_blocks.{index}": shape for index, shape in enumerate(parts)},
            f"oft_unet_{name}.alpha": [],
        }
    assert {tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")} == {torch.tensor(1e-3).item()}


@pytest.mark.parametrize("alpha", [0.5, 0.002])
def test_every_layer_is_turned_by_the_formula(transformer, inputs, randomise, alpha):
    fresh = copy.deepcopy(transformer).double()
    plain = copy.deepcopy(fresh)
    network = make(transformer, alpha, enable_all_linear="True")
    randomise(network, 0.3)
    layers = {id(module): name for name, module in transformer.named_modules()}
    double = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    for multiplier in (1.0, -0.4):
        network.set_multiplier(multiplier)
        for module in network.loras:
            name = layers[id(module.org_module)]
            weight = plain.get_submodule(name).weight
            blocks = [tensor.detach() for tensor in module.parameters()]
            fresh.get_submodule(name).weight.copy_(turned(weight, blocks, module.alpha, multiplier))
        expected = fresh(**double).float()
        network.apply_to(None, transformer, False, True)
        applied = transformer(**inputs)
        network.backup_weights()
        network.pre_calculation()
        merged = transformer(**inputs)
        network.restore_weights()
        network.remove()
        torch.testing.assert_close(applied, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain(**double).float()).abs().max() > 0.05


def test_the_gradient_is_that_of_the_formula():
    torch.manual_seed(0)
    layer = nn.Linear(6, 24).double().requires_grad_(False)
    target = lora_flux.Target("linear1", layer, oft_flux.ALL_LINEAR)
    module = OFTModule(target, 2, 0.01, 0.7, [4, 4, 4, 12]).double()
    for blocks in module.parameters():
        nn.init.normal_(blocks)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    module.apply_to()
    layer(x).square().sum().backward()
    parameters = [blocks.detach().clone().requires_grad_() for blocks in module.parameters()]
    pieces = []
    for blocks, rows in zip(parameters, layer.weight.split([4, 4, 4, 12])):
        skew = blocks - blocks.transpose(1, 2)
        skew = skew * (module.alpha * len(rows) / skew.norm()).clamp(max=1.0)
        identity = torch.eye(blocks.shape[1], dtype=torch.float64)
        rotation = (identity + skew) @ torch.linalg.inv(identity - skew)
        effect = 0.7 * (rotation - identity) + identity
        pieces.append(torch.einsum("knm,knp->kmp", effect, rows.reshape(2, -1, 6)).reshape(rows.shape))
    nn.functional.linear(x, torch.cat(pieces), layer.bias).square().sum().backward()
    for mine, reference in zip(module.parameters(), parameters):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-6, atol=1e-9)


def test_a_file_brings_back_its_modules_constraint_and_output(transformer, inputs, randomise, tmp_path):
    plain = copy.deepcopy(transformer)
    network = make(transformer, 0.02, dim=2, enable_all_linear="True")
    randomise(network, 0.3)
    network.apply_to(None, transformer, False, True)
    expected = transformer(**inputs)
    path = tmp_path / "oft.safetensors"
    network.save_weights(path, None, {"ss_seed": "1"})
    loaded, tensors = oft_flux.create_network_from_weights(1.0, path, None, None, plain, for_inference=True)
    assert not loaded.get_trainable_params() and len(loaded.loras) == len(network.loras)
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in load_file(path).items())
    loaded.save_weights(tmp_path / "again.safetensors", None, {"ss_seed": "1"})
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    loaded.apply_to(None, plain)
    assert torch.equal(plain(**inputs), expected)
    loaded.remove()
    loaded.merge_to(None, plain, tensors, torch.float32, "cpu")
    torch.testing.assert_close(plain(**inputs), expected, rtol=1e-4, atol=1e-4)


def test_a_lora_beside_it_is_turned_too_applied_or_merged(transformer, inputs, randomise):
    lora = lora_flux.create_network(1.0, 4, 4.0, None, [None, None], transformer)
    oft = make(transformer, 0.02)
    for network in (lora, oft):
        randomise(network)
        network.apply_to(None, transformer)
    together = transformer(**inputs)
    for network in (oft, lora):
        network.remove()
    lora.merge_to(None, transformer)
    oft.merge_to(None, transformer)
    torch.testing.assert_close(transformer(**inputs), together, rtol=1e-4, atol=1e-4)


def test_first_weights_and_their_misfits(transformer, randomise, messages, tmp_path):
    first = make(transformer, 0.02)
    randomise(first)
    path = tmp_path / "oft.safetensors"
    first.save_weights(path, None, None)
    second = make(transformer, 0.5)
    assert second.load_weights(path) == ([], [])
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert {module.alpha for module in second.loras} == {first.loras[0].alpha}
    with pytest.raises(UserError, match=r"oft.safetensors: .*set --network_dim 4"):
        make(transformer, 0.5, dim=8).load_weights(path)
    tensors = load_file(path)
    tensors["oft_unet_double_blocks_9_img_attn_qkv.oft_blocks.0"] = torch.zeros(4, 16, 16)
    del tensors["oft_unet_double_blocks_0_img_attn_qkv.oft_blocks.1"]
    save_file(tensors, path)
    oft_flux.create_network_from_weights(1.0, path, None, None, transformer)
    absent = "oft_unet_double_blocks_9_img_attn_qkv"
    assert re.search(rf"1 of its \d+ modules fit no layer of this model .*: {absent}$", messages[-2])
    assert "1 tensors are not in it" in messages[-1]


def test_full_size_models_have_blocks_of_768_in_every_part():
    with on_meta():
        model = FluxTransformer(FluxConfig())
        attention = make(model)
        every = make(model, enable_all_linear="True")
    assert len(attention.loras) == 19 * 2 * 2 and len(every.loras) == 304
    sizes = {module.lora_name: [tuple(p.shape) for p in module.parameters()] for module in every.loras}
    assert sizes["oft_unet_double_blocks_18_txt_attn_qkv"] == [(4, 768, 768)] * 3
    assert sizes["oft_unet_single_blocks_37_linear1"] == [(4, 768, 768)] * 3 + [(4, 3072, 3072)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: make(model, enable_all_linear="yes"), "enable_all_linear must be True or False"),
        (lambda model: make(model, enable_conv="True"), 'networks.oft_flux has no argument "enable_conv"'),
        (lambda model: make(model, train_blocks="single"), 'networks.oft_flux has no argument "train_blocks"'),
        (lambda model: make(model, split_qkv="True"), "split_qkv cannot be used here. OFT has no low-rank product"),
        (lambda model: make(model, neuron_dropout=0.1), "dropout cannot be used here"),
        (lambda model: make(model, dim=5), r"oft_unet_\w+ has 64 outputs, which --network_dim=5 blocks cannot share"),
        (lambda model: make(model, dim=0), "--network_dim of at least 1"),
        (lambda model: make(model, alpha=0), "--network_alpha above 0"),
        (lambda model: make(nn.Linear(2, 2)), "networks.oft_flux does not fit this model"),
    ],
)
def test_wrong_settings_are_refused(transformer, call, message):
    with pytest.raises(UserError, match=message):
        call(transformer)


def test_a_constraint_that_hardly_limits_is_pointed_out(transformer, messages):
    make(transformer, 0.5)
    assert not any("network_alpha" in message for message in messages)
    make(transformer, 1)
    assert any("--network_alpha 1 hardly limits" in message for message in messages)


def test_files_of_other_methods_are_refused(transformer, tmp_path):
    lora_flux.create_network(1.0, 4, 1, None, [None], transformer).save_weights(tmp_path / "lora.safetensors", None, {})
    with pytest.raises(UserError, match="belongs to an OFT module"):
        oft_flux.create_network_from_weights(1.0, tmp_path / "lora.safetensors", None, None, transformer)
    make(transformer).save_weights(tmp_path / "oft.safetensors", None, {})
    with pytest.raises(UserError, match="holds OFT weights"):
        lora_flux.create_network_from_weights(1.0, tmp_path / "oft.safetensors", None, [None], transformer)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_in_bfloat16_it_stays_close_and_recomputed_blocks_have_the_same_gradients(transformer, inputs, randomise, base):
    network = make(transformer, 0.02, enable_all_linear="True")
    randomise(network, 0.1)
    network.apply_to(None, transformer)
    exact = transformer(**inputs)
    transformer.to(base)
    blocks = {"": [*transformer.double_blocks, *transformer.single_blocks]}

    def step(recompute: bool) -> tuple[Tensor, list[Tensor]]:
        network.zero_grad()
        with apply_memory_plan(blocks, MemoryPlan(checkpointing=recompute)):
            with torch.autocast("cpu", torch.bfloat16):
                result = transformer(**inputs)
            result.float().square().mean().backward()
        return result.float(), [parameter.grad.clone() for parameter in network.parameters()]

    (stored, grads), (_, again) = step(False), step(True)
    torch.testing.assert_close(stored, exact, rtol=0.1, atol=0.15)
    assert all(torch.equal(a, b) for a, b in zip(grads, again))
    assert any(grad.any() for grad in grads)
