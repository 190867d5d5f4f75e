"""The names and parameters by which trainers call a network module."""

from __future__ import annotations

import importlib
import inspect

import pytest

from library.errors import UserError
from library.families import FAMILIES, by_options, network_modules
from library.training.network.contract import NetworkOptions, check_network_options
from networks import lora_flux
from networks.adapters.lora_core import LoRANetwork


def names(function) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("module", network_modules())
def test_module_functions(module):
    """As positional arguments of other trainers, and with arguments of their own behind them."""
    offered = importlib.import_module(module)
    assert names(offered.create_network)[:7] == [
        "multiplier", "network_dim", "network_alpha", "vae", "text_encoder", "unet", "neuron_dropout",
    ]  # fmt: skip
    assert names(offered.create_network_from_weights)[:7] == [
        "multiplier", "file", "vae", "text_encoder", "unet", "weights_sd", "for_inference",
    ]  # fmt: skip
    assert names(offered.check_network_args) == ["network_args"]
    with pytest.raises(UserError, match=f'{module} has no argument "no_such_argument"'):
        offered.check_network_args({"no_such_argument": "1"})
    for function in (offered.create_network, offered.create_network_from_weights):
        with pytest.raises(UserError, match=f'{module} has no argument "no_such_argument"'):
            function(1.0, 4, 1, None, None, None, no_such_argument="1")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
def test_the_networks_that_are_suggested_are_the_family_s(family):
    assert by_options(family.options_class()()) is family
    theirs = next(name for name in network_modules() if name not in family.networks)
    for given in (None, "networks.no_such_module", theirs):
        with pytest.raises(UserError) as refused:
            check_network_options(NetworkOptions(network_module=given), family)
        assert f"for {family.name} there are {', '.join(family.networks)}." in str(refused.value)
    assert f"--network_module: {theirs} is for " in str(refused.value)
    for name in family.networks:
        check_network_options(NetworkOptions(network_module=name), family)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("apply_to", ["text_encoder", "unet", "apply_text_encoder", "apply_unet"]),
        ("merge_to", ["text_encoder", "unet", "weights", "dtype", "device"]),
        ("set_multiplier", ["multiplier"]),
        ("is_mergeable", []),
        ("backup_weights", []),
        ("restore_weights", []),
        ("pre_calculation", []),
        ("load_weights", ["file"]),
        ("save_weights", ["file", "dtype", "metadata"]),
        ("enable_gradient_checkpointing", []),
        ("prepare_optimizer_params", ["text_encoder_lr", "unet_lr", "default_lr"]),
        ("prepare_optimizer_params_with_multiple_te_lrs", ["text_encoder_lr", "unet_lr", "default_lr"]),
        ("prepare_grad_etc", ["text_encoder", "unet"]),
        ("on_epoch_start", ["text_encoder", "unet"]),
        ("on_step_start", ["text_encoder", "unet"]),
        ("get_trainable_params", []),
        ("apply_max_norm_regularization", ["max_norm", "device"]),
        ("update_grad_norms", []),
        ("update_norms", []),
        ("weight_norms", []),
        ("grad_norms", []),
        ("combined_weight_norms", []),
    ],
)
def test_network_methods(method, parameters):
    assert names(getattr(LoRANetwork, method))[1:] == parameters


def test_the_trainers_own_calls_work(transformer, clip, t5):
    network = lora_flux.create_network(
        1.0, 4, 1, None, [clip, t5], transformer, neuron_dropout=None, dropout=None, train_t5xxl="True"
    )
    network.prepare_network(None)
    network.apply_to([clip, t5], transformer, True, True)
    network.enable_gradient_checkpointing()
    network.prepare_optimizer_params_with_multiple_te_lrs(None, None, 1e-4)
    network.prepare_grad_etc([clip, t5], transformer)
    network.eval()
    network.on_epoch_start([clip, t5], transformer)
    network.on_step_start([clip, t5], transformer)
    assert network.training and len(network.get_trainable_params()) == 2 * len(network.loras)
