"""networks.lora inside Stable Diffusion's models: it computes what its merge gives, leaves without a trace, trains."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from library.memory.apply import apply_memory_plan
from library.memory.plan import MemoryPlan
from library.models.stable_diffusion.unet import block_lists
from networks import lora
from tests.networks.stable_diffusion import Tiny, tiny_model

WITH_CONV = {"conv_dim": "3", "conv_alpha": "2"}


def applied(tiny: Tiny, randomise, **arguments):
    network = lora.create_network(1.0, 4, 2.0, None, tiny.encoders, tiny.unet, **arguments)
    randomise(network)
    network.apply_to(tiny.encoders, tiny.unet, True, True)
    return network.to(tiny.inputs["sample"].dtype)


def outputs(tiny: Tiny) -> list[torch.Tensor]:
    return [tiny.predict(), *tiny.encode()]


@pytest.mark.parametrize(("variant", "multiplier"), [("sd1", -0.4), ("sdxl", 1.0)])
def test_the_merged_model_computes_what_the_model_with_the_network_does(variant, multiplier, randomise):
    tiny = tiny_model(variant)
    before = outputs(tiny)
    network = applied(tiny, randomise, **WITH_CONV)
    network.set_multiplier(multiplier)
    during = outputs(tiny)
    assert all(not torch.allclose(a, b, atol=1e-2) for a, b in zip(before, during))
    network.backup_weights()
    network.pre_calculation()
    for merged, expected in zip(outputs(tiny), during):
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    network.restore_weights()
    network.remove()
    assert all(torch.equal(a, b) for a, b in zip(outputs(tiny), before))
    assert not any("forward" in vars(module) for module in tiny.unet.modules())


def test_every_layers_weight_is_changed_by_the_product_in_float64(randomise):
    """Merged weights against W + m * alpha / r * up @ down, a convolution's factors joined as convolutions."""
    tiny = tiny_model("sd1", torch.float64)
    original = {module: module.weight.clone() for module in tiny.unet.modules() if hasattr(module, "weight")}
    network = lora.create_network(0.5, 4, 2.0, None, None, tiny.unet, **WITH_CONV).double()
    randomise(network)
    network.merge_to(None, None)
    for module in network.loras:
        down, up = (part.weight.detach() for part in (module.lora_down, module.lora_up))
        if isinstance(module.org_module, nn.Conv2d):
            product = nn.functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
        else:
            product = up @ down
        expected = original[module.org_module] + 0.5 * module.alpha / module.lora_dim * product
        torch.testing.assert_close(module.org_module.weight, expected, rtol=1e-6, atol=1e-6)


def test_a_file_gives_the_network_back(randomise, tmp_path):
    tiny = tiny_model("sdxl")
    fresh = copy.deepcopy(tiny)
    network = applied(tiny, randomise, **WITH_CONV)
    expected = outputs(tiny)
    network.save_weights(tmp_path / "lora.safetensors", None, None)

    loaded, weights = lora.create_network_from_weights(
        1.0, tmp_path / "lora.safetensors", None, fresh.encoders, fresh.unet
    )
    assert [(m.lora_name, m.lora_dim, m.alpha) for m in loaded.loras] == [
        (m.lora_name, m.lora_dim, m.alpha) for m in network.loras
    ]
    loaded.apply_to(fresh.encoders, fresh.unet)
    assert all(torch.equal(a, b) for a, b in zip(outputs(fresh), expected))
    loaded.remove()
    loaded.merge_to(fresh.encoders, fresh.unet, weights, torch.float32, "cpu")
    for merged, wanted in zip(outputs(fresh), expected):
        torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-4)


def test_one_model_alone(randomise):
    tiny = tiny_model("sdxl")
    before = outputs(tiny)
    network = lora.create_network(1.0, 4, 2.0, None, tiny.encoders, tiny.unet)
    randomise(network)
    network.apply_to(tiny.encoders, tiny.unet, False, True)
    assert not network.text_encoder_loras and not any(key.startswith("lora_te") for key in network.state_dict())
    during = outputs(tiny)
    assert not torch.allclose(during[0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(during[1:], before[1:]))


def test_strengths_of_single_items(randomise):
    tiny = tiny_model("sd1")
    network = applied(tiny, randomise, **WITH_CONV)
    network.set_multiplier(torch.tensor([0.0, 0.6]))
    together = tiny.predict()
    for index, multiplier in enumerate([0.0, 0.6]):
        network.set_multiplier(multiplier)
        torch.testing.assert_close(together[index], tiny.predict()[index], rtol=1e-4, atol=1e-4)


def test_recomputed_blocks_give_the_very_same_gradients_with_every_dropout(randomise):
    tiny = tiny_model("sd1")
    arguments = {"rank_dropout": "0.2", "module_dropout": "0.2", "dropout": "0.2"}
    network = applied(tiny, randomise, **WITH_CONV, **arguments).train()
    gradients = []
    for recompute in (False, True):
        tiny.unet.train()
        network.zero_grad()
        torch.manual_seed(3)
        plan = apply_memory_plan(block_lists(tiny.unet), MemoryPlan(checkpointing=recompute))
        with plan, torch.autocast("cpu", torch.bfloat16, enabled=True):
            tiny.predict().float().square().mean().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if "lora_unet" in name})
    stored, recomputed = gradients
    assert sum(grad is not None for grad in stored.values()) > 0.7 * len(stored)
    for name, grad in stored.items():
        assert (grad is None) == (recomputed[name] is None), name
        assert grad is None or torch.equal(grad, recomputed[name]), name


@pytest.mark.parametrize("arguments", [{"rank_dropout": "0.5"}, {"module_dropout": "0.5"}, {"dropout": "0.5"}])
def test_dropouts_act_in_training_only(randomise, arguments):
    tiny = tiny_model("sd1")
    network = applied(tiny, randomise, **arguments).train()
    assert not torch.equal(tiny.predict(), tiny.predict())
    network.eval()
    assert torch.equal(tiny.predict(), tiny.predict())


def test_training_steps_lower_a_loss():
    tiny = tiny_model("sdxl")
    torch.manual_seed(0)
    network = lora.create_network(1.0, 4, 4.0, None, tiny.encoders, tiny.unet, **WITH_CONV)
    network.apply_to(tiny.encoders, tiny.unet)
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs([1e-2], 1e-2, None)
    optimizer = torch.optim.AdamW(groups)
    network.on_epoch_start(tiny.encoders, tiny.unet)
    target = torch.randn(2, 4, 8, 8)
    losses = []
    for _ in range(6):
        text = torch.cat(tiny.encode(), dim=-1)
        tiny.inputs["encoder_hidden_states"] = text
        loss = (tiny.predict() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.grad is None for parameter in tiny.unet.parameters())
    assert all(module.up_matrix.any() for module in network.text_encoder_loras[-12:-6])


def test_norms_are_limited_and_counted(randomise):
    tiny = tiny_model("sd1")
    network = applied(tiny, randomise, **WITH_CONV)
    products = [(module.scale * module.up_matrix @ module.down_matrix).norm().item() for module in network.loras]
    limit = sorted(products)[len(products) // 2]
    count, mean, largest = network.apply_max_norm_regularization(limit, "cpu")
    assert count == sum(norm > limit * (1 + 1e-6) for norm in products)
    assert largest == pytest.approx(limit)
    assert mean == pytest.approx(sum(min(norm, limit) for norm in products) / len(products), rel=1e-3)


@pytest.mark.parametrize(
    ("variant", "given", "expected"),
    [
        ("sd1", ([1e-4], 1e-3, None), {"textencoder": 1e-4, "unet": 1e-3}),
        ("sdxl", ([1e-4], 1e-3, None), {"textencoder 1": 1e-4, "textencoder 2": 1e-4, "unet": 1e-3}),
        ("sdxl", ([1e-4, 2e-5], None, 1e-3), {"textencoder 1": 1e-4, "textencoder 2": 2e-5, "unet": 1e-3}),
        ("sdxl", ([0, 2e-5], 1e-3, None), {"textencoder 2": 2e-5, "unet": 1e-3}),
    ],
)
def test_learning_rates_of_the_models(variant, given, expected):
    tiny = tiny_model(variant)
    network = lora.create_network(1.0, 4, 1.0, None, tiny.encoders, tiny.unet)
    groups, descriptions = network.prepare_optimizer_params_with_multiple_te_lrs(*given)
    assert {text: group["lr"] for text, group in zip(descriptions, groups)} == expected
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    labels = {"lora_te_": "textencoder", "lora_te1": "textencoder 1", "lora_te2": "textencoder 2", "lora_une": "unet"}
    for name, parameter in network.named_parameters():
        assert (id(parameter) in trained) == (labels[name[:8]] in expected)


def test_loraplus_and_ggpo_work_here_too(randomise):
    tiny = tiny_model("sd1")
    arguments = {"loraplus_lr_ratio": "16", "loraplus_text_encoder_lr_ratio": "4"}
    network = applied(tiny, randomise, ggpo_sigma="0.03", ggpo_beta="0.01", **arguments, **WITH_CONV)
    groups, descriptions = network.prepare_optimizer_params(1e-4, 1e-3)
    assert dict(zip(descriptions, (group["lr"] for group in groups))) == pytest.approx(
        {"textencoder": 1e-4, "textencoder plus": 4e-4, "unet": 1e-3, "unet plus": 1.6e-2}
    )
    (tiny.predict().square().mean() + tiny.encode()[0].square().mean()).backward()
    network.update_grad_norms()
    network.update_norms()
    linear = sum(isinstance(module.org_module, nn.Linear) for module in network.loras)
    assert network.combined_weight_norms().shape == (linear,)
    network.train()
    assert not torch.equal(tiny.predict(), tiny.predict())


def test_a_model_without_numbers_is_enough_to_see_what_would_be_trained():
    tiny = tiny_model("sdxl")
    models = [module.to("meta") for module in (*tiny.encoders, tiny.unet)]
    network = lora.create_network(1.0, 2, 1.0, None, models[:-1], models[-1], ggpo_sigma="0.1", ggpo_beta="0.1")
    network.apply_to(None, None)
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs([1e-4], 1e-4, None)
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(p.numel() for p in network.parameters())
    assert all(parameter.device.type == "cpu" for parameter in network.parameters())
