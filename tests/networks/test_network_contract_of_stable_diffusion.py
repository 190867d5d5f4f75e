"""Stable Diffusion's network modules answer every call of the trainers."""

from __future__ import annotations

import pytest
import torch

from networks import dylora, lora, lora_fa, oft
from networks.adapters.adapter_network import AdapterNetwork
from tests.networks.stable_diffusion import tiny_model


@pytest.mark.parametrize(
    ("module", "variant"),
    [(lora, "sdxl"), (lora_fa, "sd2"), (dylora, "sd1"), (oft, "sdxl")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_trainers_own_calls_work(module, variant, tmp_path):
    tiny = tiny_model(variant)
    encoders = tiny.encoders[0] if variant == "sd1" else tiny.encoders
    before = tiny.predict()
    torch.manual_seed(0)
    network = module.create_network(1.0, 4, 1, None, encoders, tiny.unet, neuron_dropout=None, dropout=None)
    assert isinstance(network, AdapterNetwork)
    network.prepare_network(None)
    network.apply_to(encoders, tiny.unet, True, True)
    network.enable_gradient_checkpointing()
    groups, descriptions = network.prepare_optimizer_params_with_multiple_te_lrs([1e-4], 5e-2, 1e-4)
    assert len(groups) == len(descriptions)
    network.prepare_grad_etc(encoders, tiny.unet)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in network.get_trainable_params()}
    optimizer = torch.optim.AdamW(groups)
    network.eval()
    network.on_epoch_start(encoders, tiny.unet)
    assert network.training
    for _ in range(2):
        network.on_step_start(encoders, tiny.unet)
        network.set_multiplier(1.0)
        (tiny.predict().square().mean() + sum(hidden.square().mean() for hidden in tiny.encode())).backward()
        for update in (network.update_grad_norms, network.update_norms) if hasattr(network, "update_norms") else ():
            update()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    network.eval()
    trained = tiny.predict()
    assert not torch.equal(trained, before)
    network.save_weights(tmp_path / "network.safetensors", None, {"ss_seed": "0"})
    network.remove()
    assert torch.equal(tiny.predict(), before)

    loaded, weights = module.create_network_from_weights(
        1, tmp_path / "network.safetensors", None, encoders, tiny.unet, for_inference=True
    )
    assert not loaded.training and not loaded.get_trainable_params()
    loaded.merge_to(encoders, tiny.unet, weights, torch.float32, "cpu")
    torch.testing.assert_close(tiny.predict(), trained, rtol=1e-4, atol=1e-4)
