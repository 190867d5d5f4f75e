"""networks.oft: rotations of outputs, against the formula written out in float64."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.errors import UserError
from library.models.loading import on_meta
from networks import oft
from networks.adapters.lora_targets import Target
from networks.adapters.oft_core import OFTModule
from tests.networks.stable_diffusion import real_unet, tiny_meta_module, tiny_model


def rotations(blocks: Tensor, alpha: float) -> Tensor:
    """R of each block: Cayley's transform of the skew part, whose norm over all blocks is limited."""
    skew = blocks.double() - blocks.double().transpose(1, 2)
    limit = alpha * blocks.shape[0] * blocks.shape[1]
    skew = skew * min(1.0, limit / skew.norm().item())
    identity = torch.eye(blocks.shape[1], dtype=torch.float64)
    return (identity + skew) @ torch.linalg.inv(identity - skew)


def turned(weight: Tensor, blocks: Tensor, alpha: float, multiplier: float = 1.0) -> Tensor:
    """The weight of a layer after OFT, as kohya-ss/sd-scripts and ComfyUI compute it: R^T on each block of rows."""
    identity = torch.eye(blocks.shape[1], dtype=torch.float64)
    r = multiplier * (rotations(blocks, alpha) - identity) + identity
    rows = weight.double().reshape(*blocks.shape[:2], -1)
    return torch.einsum("knm,knp->kmp", r, rows).reshape(weight.shape)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 12), (2, 5, 6)),
    "linear without bias": (lambda: nn.Linear(6, 12, bias=False), (3, 6)),
    "convolution": (lambda: nn.Conv2d(6, 12, 3, stride=2, padding=1), (2, 6, 8, 8)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("alpha", [1.0, 0.02])
def test_the_layer_computes_with_the_turned_weight(kind, alpha):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer, x = make().double().requires_grad_(False), torch.randn(*shape, dtype=torch.float64)
    weight = layer.weight.clone()
    module = OFTModule(Target("layer", layer, oft.ALL_LINEAR), 3, alpha).double()
    nn.init.normal_(module.oft_blocks)
    module.apply_to()
    for multiplier in (1.0, -0.5):
        module.multiplier = multiplier
        result = layer(x)
        expected = turned(weight, module.oft_blocks.detach(), module.alpha, multiplier)
        module.remove()
        layer.weight.copy_(expected)
        torch.testing.assert_close(result, layer(x), rtol=1e-6, atol=1e-6)
        layer.weight.copy_(weight)
        module.merge()
        torch.testing.assert_close(layer.weight, expected, rtol=1e-5, atol=1e-5)
        layer.weight.copy_(weight)
        module.apply_to()


def test_lengths_of_outputs_and_angles_between_them_stay():
    torch.manual_seed(0)
    layer = nn.Linear(6, 12).requires_grad_(False)
    before = layer.weight.clone()
    module = OFTModule(Target("layer", layer, oft.ALL_LINEAR), 3, 1.0)
    nn.init.normal_(module.oft_blocks)
    module.merge()
    for old, new in zip(before.split(4), layer.weight.split(4)):
        assert not torch.allclose(old, new, atol=0.1)
        torch.testing.assert_close(old.t() @ old, new.t() @ new, rtol=1e-4, atol=1e-5)  # of any two inputs' outputs


def test_a_new_network_changes_nothing_and_still_learns():
    tiny = tiny_model("sd1")
    before = tiny.predict()
    network = oft.create_network(1.0, 4, 1.0, None, tiny.encoders, tiny.unet, enable_conv="True")
    network.apply_to(tiny.encoders, tiny.unet)
    assert torch.equal(tiny.predict(), before)
    groups, descriptions = network.prepare_optimizer_params_with_multiple_te_lrs([1e-3], 1e-2, None)
    assert descriptions == ["unet"] and groups[0]["lr"] == 1e-2
    optimizer, losses = torch.optim.AdamW(groups), []
    target = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        loss = (tiny.predict() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in network.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    network.set_multiplier(0.0)
    assert torch.equal(tiny.predict(), before)


@pytest.mark.parametrize(
    ("variant", "autocast"), [("sd1", True), pytest.param("sdxl", False, marks=pytest.mark.thorough)]
)
def test_merged_loaded_and_applied_are_one(variant, autocast, randomise, tmp_path):
    tiny = tiny_model(variant)
    network = oft.create_network(
        1.0, 4, 0.01, None, tiny.encoders, tiny.unet, enable_all_linear="true", enable_conv="true"
    )
    randomise(network, 0.3)
    network.apply_to(tiny.encoders, tiny.unet)
    network.set_multiplier(0.7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        applied = tiny.predict().float()
        network.backup_weights()
        network.pre_calculation()
        merged = tiny.predict().float()
        tolerance = 0.1 if autocast else 1e-4
        torch.testing.assert_close(merged, applied, rtol=tolerance, atol=tolerance)
    network.restore_weights()
    network.save_weights(tmp_path / "oft.safetensors", None, {"ss_seed": "1"})
    network.remove()
    loaded, tensors = oft.create_network_from_weights(0.7, tmp_path / "oft.safetensors", None, tiny.encoders, tiny.unet)
    assert tensors.keys() == load_file(tmp_path / "oft.safetensors").keys()
    loaded.apply_to(tiny.encoders, tiny.unet)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(tiny.predict().float(), applied, rtol=1e-5, atol=1e-5)


def test_strengths_of_single_items(randomise):
    tiny = tiny_model("sd1")
    network = oft.create_network(1.0, 4, 1.0, None, None, tiny.unet, enable_conv="True")
    randomise(network, 0.02)
    network.apply_to(None, tiny.unet)
    network.set_multiplier(torch.tensor([0.0, 0.6]))
    together = tiny.predict()
    for index, multiplier in enumerate([0.0, 0.6]):
        network.set_multiplier(multiplier)
        torch.testing.assert_close(together[index], tiny.predict()[index], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("variant", "attention", "linear", "with_conv"), [("sd1", 128, 192, 278), ("sdxl", 560, 722, 788)]
)
def test_modules_of_the_published_models(variant, attention, linear, with_conv):
    """Attention alone has eight layers in each transformer block: 16 of them in 1.x, 70 in XL."""
    unet = real_unet(variant)

    def count(**arguments) -> int:
        with on_meta():
            return len(oft.create_network(1.0, 4, 1e-3, None, None, unet, **arguments).loras)

    assert count() == attention
    assert count(enable_all_linear="True") == linear
    assert count(enable_all_linear="True", enable_conv="True") == with_conv
    assert count(enable_all_linear="False", enable_conv="False") == attention


def test_keys_and_shapes_of_files(tmp_path):
    network = oft.create_network(1.0, None, None, None, None, tiny_meta_module("sdxl"))
    network.save_weights(tmp_path / "oft.safetensors", torch.float16, None)
    tensors = load_file(tmp_path / "oft.safetensors")
    name = "oft_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0"
    assert tensors[f"{name}.oft_blocks"].shape == (4, 16, 16)
    assert tensors[f"{name}.alpha"].shape == () and tensors[f"{name}.alpha"] == torch.tensor(1e-3).half()
    assert all(re.fullmatch(r"oft_unet_\w+\.(oft_blocks|alpha)", key) for key in tensors)
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())


def test_first_weights_and_states(randomise, tmp_path):
    unet = tiny_meta_module("sd1", whole=True)
    first = oft.create_network(1.0, 4, 0.1, None, None, unet)
    randomise(first)
    first.save_weights(tmp_path / "oft.safetensors", None, None)
    second = oft.create_network(1.0, 4, 0.5, None, None, unet)
    assert second.load_weights(tmp_path / "oft.safetensors") == ([], [])
    third = oft.create_network(1.0, 4, 0.5, None, None, unet)
    third.load_state_dict(first.state_dict())
    for network in (second, third):
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), network.parameters()))
        assert {module.alpha for module in network.loras} == {first.loras[0].alpha}
    wider = oft.create_network(1.0, 4, 0.5, None, None, unet, enable_all_linear="True")
    info = wider.load_weights(tmp_path / "oft.safetensors")
    assert len(info.missing_keys) == 192 - 128 and not info.unexpected_keys
    with pytest.raises(UserError, match=r"oft.safetensors: .*set --network_dim 4"):
        oft.create_network(1.0, 8, 0.5, None, None, unet).load_weights(tmp_path / "oft.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enable_conv": "yes"}, "enable_conv must be True or False"),
        ({"conv_dim": "4"}, "conv_dim cannot be used here. OFT has no low-rank product"),
        ({"dropout": 0.1}, "dropout cannot be used here"),
        ({"loraplus_lr_ratio": "4"}, "loraplus_lr_ratio cannot be used here"),
        ({"enable_convs": "True"}, r'networks.oft has no argument "enable_convs". Did you mean "enable_conv"'),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        oft.check_network_args(arguments)


def test_what_cannot_be_trained_is_refused(tmp_path):
    unet = tiny_meta_module("sd1")
    for dim, alpha, message in (
        (5, 1.0, r"oft_unet_\w+ has 32 outputs, which --network_dim=5 blocks cannot share"),
        (0, 1.0, "--network_dim of at least 1"),
        (4, 0, "--network_alpha above 0"),
    ):
        with pytest.raises(UserError, match=message):
            oft.create_network(1.0, dim, alpha, None, None, unet)
    with pytest.raises(UserError, match="dropout cannot be used here"):
        oft.create_network(1.0, 4, 1.0, None, None, unet, neuron_dropout=0.1)
    network = oft.create_network(1.0, 4, 1.0, None, None, unet)
    assert not hasattr(network, "apply_max_norm_regularization")  # so --scale_weight_norms is refused
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    for load in (
        lambda: network.load_weights(tmp_path / "lora.safetensors"),
        lambda: oft.create_network_from_weights(1.0, tmp_path / "lora.safetensors", None, None, unet),
    ):
        with pytest.raises(UserError, match=r"lora.safetensors: none of the 1 tensors belongs to an OFT module"):
            load()
