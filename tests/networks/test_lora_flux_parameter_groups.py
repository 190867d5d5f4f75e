"""Which parameters learn at which rate, and under which names the rates are logged."""

from __future__ import annotations

import pytest
import torch

from library.errors import UserError
from networks import lora_flux


@pytest.fixture
def make(transformer, clip, t5):
    def network(**arguments):
        return lora_flux.create_network(1.0, 4, 1.0, None, [clip, t5], transformer, **arguments)

    return network


def rates(network, *given):
    """{description: learning rate} and {parameter name: learning rate}."""
    groups, descriptions = network.prepare_optimizer_params_with_multiple_te_lrs(*given)
    assert len(groups) == len(descriptions)
    by_parameter = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(by_parameter) == sum(len(group["params"]) for group in groups)
    found = {name: by_parameter.get(id(parameter)) for name, parameter in network.named_parameters()}
    return {text: group["lr"] for text, group in zip(descriptions, groups)}, found


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None, 1e-3), (1e-3, 1e-3, 1e-3)),
        (([], None, 1e-3), (1e-3, 1e-3, 1e-3)),
        (([1e-4], 2e-3, 1e-3), (1e-4, 1e-4, 2e-3)),
        ((1e-4, 2e-3, 1e-3), (1e-4, 1e-4, 2e-3)),
        (([1e-4, 1e-5], None, 1e-3), (1e-4, 1e-5, 1e-3)),
        (([1e-4, None], None, 1e-3), (1e-4, 1e-3, 1e-3)),
        (([0, 1e-5], None, 1e-3), (None, 1e-5, 1e-3)),
        (([1e-4, 0.0], 0, 1e-3), (1e-4, None, None)),
        (([1e-4, 1e-5], None, None), (1e-4, 1e-5, None)),
    ],
)
def test_learning_rates_of_the_models(make, given, expected):
    network = make(train_t5xxl="True")
    described, found = rates(network, *given)
    labels = ("textencoder 1", "textencoder 2", "unet")
    assert described == {label: rate for label, rate in zip(labels, expected) if rate}
    prefixes = dict(zip(("lora_te1", "lora_te3", "lora_unet"), expected))
    for name, rate in found.items():
        assert rate == prefixes[name[: name.index("_", 5)]]


def test_one_text_encoder_has_the_first_rate(make):
    described, _ = rates(make(), [1e-4, 1e-5], None, 1e-3)
    assert described == {"textencoder 1": 1e-4, "unet": 1e-3}


def test_modules_without_a_rate_are_frozen_but_saved(make, tmp_path):
    from safetensors.torch import load_file

    network = make()
    network.apply_to(None, None)
    network.prepare_optimizer_params_with_multiple_te_lrs([0], None, 1e-3)
    network.prepare_grad_etc(None, None)
    trained = network.get_trainable_params()
    assert len(trained) == 2 * len(network.unet_loras)
    assert all(not parameter.requires_grad for lora in network.text_encoder_loras for parameter in lora.parameters())
    network.save_weights(tmp_path / "a.safetensors", None, None)
    assert sum(key.startswith("lora_te1") for key in load_file(tmp_path / "a.safetensors")) == 12 * 3


def test_rates_can_be_given_again(make):
    network = make()
    network.prepare_optimizer_params_with_multiple_te_lrs([0], None, 1e-3)
    network.prepare_optimizer_params_with_multiple_te_lrs([1e-4], None, 1e-3)
    assert len(network.get_trainable_params()) == len(list(network.parameters()))


def test_no_rate_at_all_is_refused(make):
    with pytest.raises(UserError, match="nothing to train"):
        make().prepare_optimizer_params_with_multiple_te_lrs([0], 0, 1e-3)


def test_the_last_matching_pattern_gives_the_rate(make):
    network = make(network_reg_lrs=r"single_blocks=2e-3,single_blocks_(0|10)_=5e-4,te1_.*fc=3e-5,linear2=0")
    described, found = rates(network, [1e-4], None, 1e-3)
    assert described == {
        "textencoder 1": 1e-4,
        "textencoder 1 reg_lr_2": 3e-5,
        "unet": 1e-3,
        "unet reg_lr_0": 2e-3,
        "unet reg_lr_1": 5e-4,
    }
    assert found["lora_unet_single_blocks_0_linear1.lora_down.weight"] == 5e-4
    assert found["lora_unet_single_blocks_1_linear1.lora_up.weight"] == 2e-3
    assert found["lora_unet_single_blocks_1_linear2.lora_up.weight"] is None
    assert found["lora_te1_text_model_encoder_layers_1_mlp_fc2.lora_up.weight"] == 3e-5


@pytest.mark.parametrize(
    ("arguments", "text_ratio", "unet_ratio"),
    [
        ({"loraplus_lr_ratio": "16"}, 16, 16),
        ({"loraplus_unet_lr_ratio": "4"}, None, 4),
        ({"loraplus_text_encoder_lr_ratio": "4"}, 4, None),
        ({"loraplus_lr_ratio": "16", "loraplus_text_encoder_lr_ratio": "4"}, 4, 16),
    ],
)
def test_loraplus_raises_the_rate_of_ups_only(make, arguments, text_ratio, unet_ratio):
    described, found = rates(make(**arguments), [1e-4], 1e-3, None)
    expected = {"textencoder 1": 1e-4, "unet": 1e-3}
    for label, ratio in (("textencoder 1", text_ratio), ("unet", unet_ratio)):
        if ratio:
            expected[f"{label} plus"] = expected[label] * ratio
    assert described == pytest.approx(expected)
    for name, rate in found.items():
        label = "textencoder 1" if name.startswith("lora_te1") else "unet"
        assert rate == pytest.approx(expected.get(f"{label} plus" if "lora_up" in name else label, expected[label]))


def test_loraplus_and_patterns_together(make):
    described, _ = rates(make(loraplus_lr_ratio="2", network_reg_lrs="linear1=1e-2"), [0], 1e-3, None)
    assert described == pytest.approx(
        {"unet": 1e-3, "unet plus": 2e-3, "unet reg_lr_0": 1e-2, "unet reg_lr_0 plus": 2e-2}
    )


def test_loraplus_reaches_the_parts_of_split_modules(make):
    network = make(loraplus_lr_ratio="2", split_qkv="True")
    _, found = rates(network, [0], 1e-3, None)
    assert found["lora_unet_single_blocks_0_linear1.lora_up.3.weight"] == 2e-3
    assert found["lora_unet_single_blocks_0_linear1.lora_down.3.weight"] == 1e-3


def test_the_single_rate_form_of_other_trainers(make):
    network = make()
    groups, descriptions = network.prepare_optimizer_params(1e-4, 2e-3, 1e-3)
    assert (descriptions, [group["lr"] for group in groups]) == (["textencoder 1", "unet"], [1e-4, 2e-3])
    groups, _ = network.prepare_optimizer_params(1e-4, 2e-3)
    assert [group["lr"] for group in groups] == [1e-4, 2e-3]


def test_verbose_prints_every_module_with_rank_alpha_and_rate(make, messages):
    network = make(verbose="True", single_mod_dim="9", network_reg_lrs="modulation=0.5")
    network.prepare_optimizer_params_with_multiple_te_lrs([1e-4], 1e-3, None)
    lines = [line.split() for line in messages[-1].splitlines()]
    table = {line[0]: line[1:] for line in lines}
    assert table["lora_unet_single_blocks_1_modulation_lin"] == ["9", "1", "0.5"]
    assert table["lora_te1_text_model_encoder_layers_0_mlp_fc1"] == ["4", "1", "0.0001"]
    assert len(table) == 1 + len(network.loras)


def test_norm_limits_of_the_whole_network(make, randomise):
    network = make()
    randomise(network, 1.0)
    products = [lora.scale * (lora.up_matrix @ lora.down_matrix).norm().item() for lora in network.loras]
    limit = sorted(products)[len(products) // 2]
    count, mean, largest = network.apply_max_norm_regularization(limit, torch.device("cpu"))
    expected = [min(norm, limit) for norm in products]
    assert count == sum(norm > limit * (1 + 1e-6) for norm in products)
    assert mean == pytest.approx(sum(expected) / len(expected)) and largest == pytest.approx(limit)


def test_norms_for_the_log_exist_only_with_ggpo(make, transformer, inputs, randomise):
    network = make()
    network.update_norms()
    assert network.weight_norms() is network.grad_norms() is network.combined_weight_norms() is None
    network = make(ggpo_sigma="0.03", ggpo_beta="0.01")
    randomise(network)
    network.apply_to(None, transformer, False, True)
    transformer(**inputs).square().mean().backward()
    network.update_grad_norms()
    network.update_norms()
    for norms in (network.weight_norms(), network.grad_norms(), network.combined_weight_norms()):
        assert norms.shape == (26,) and (norms > 0).all()
