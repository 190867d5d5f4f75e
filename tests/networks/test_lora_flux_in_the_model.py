"""A FLUX network inside its models: enters without a trace, merges to what it computes, trains the same recomputed."""

from __future__ import annotations

import copy

import pytest
import torch

from library.memory.apply import apply_memory_plan
from library.memory.plan import MemoryPlan
from networks import lora_flux
from networks.adapters.lora_file import state_dict_of


def applied(transformer, randomise, text_encoders=(None, None), **arguments):
    network = lora_flux.create_network(1.0, 4, 2.0, None, list(text_encoders), transformer, **arguments)
    randomise(network)
    network.apply_to(list(text_encoders), transformer, any(text_encoders), True)
    return network


@pytest.mark.parametrize("arguments", [{}, {"split_qkv": "True", "in_dims": "2,2,2,2,2"}])
def test_the_merged_model_computes_what_the_model_with_the_network_does(transformer, inputs, randomise, arguments):
    network = applied(transformer, randomise, **arguments)
    for multiplier in (1.0, 0.4):
        network.set_multiplier(multiplier)
        with_network = transformer(**inputs)
        network.backup_weights()
        network.pre_calculation()
        merged = transformer(**inputs)
        torch.testing.assert_close(merged, with_network, rtol=1e-4, atol=1e-4)
        network.restore_weights()
        assert torch.equal(transformer(**inputs), with_network)


def test_merging_a_file_into_a_fresh_model(transformer, inputs, randomise, tmp_path):
    fresh = copy.deepcopy(transformer)
    network = applied(transformer, randomise)
    expected = transformer(**inputs)
    network.save_weights(tmp_path / "lora.safetensors", None, None)
    loaded, weights = lora_flux.create_network_from_weights(
        1.0, tmp_path / "lora.safetensors", None, [None, None], fresh
    )
    loaded.merge_to([None, None], fresh, weights, torch.float32, "cpu")
    torch.testing.assert_close(fresh(**inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_merging_computes_in_float32_and_keeps_the_weights_dtype(transformer, randomise, dtype):
    network = applied(transformer, randomise)
    layer = transformer.double_blocks[0].img_attn.qkv.to(dtype)
    lora = next(lora for lora in network.loras if lora.org_module is layer)
    expected = layer.weight.float() + lora.scale * lora.up_matrix.detach() @ lora.down_matrix.detach()
    lora.merge("cpu")
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.weight.float(), expected.to(dtype).float())


def test_strength_zero_and_removal_give_the_models_own_bits(transformer, inputs, randomise):
    keys = list(transformer.state_dict())
    before = transformer(**inputs)
    network = applied(transformer, randomise)
    assert list(transformer.state_dict()) == keys
    assert not torch.allclose(transformer(**inputs), before)
    network.set_multiplier(0)
    assert torch.equal(transformer(**inputs), before)
    network.set_multiplier(1.0)
    network.set_enabled(False)
    assert torch.equal(transformer(**inputs), before)
    network.set_enabled(True)
    network.remove()
    assert torch.equal(transformer(**inputs), before)
    assert not any("forward" in vars(module) for module in transformer.modules())


def test_strengths_of_single_items_act_throughout_the_model(transformer, inputs, randomise):
    network = applied(transformer, randomise)
    network.set_multiplier(torch.tensor([0.0, 0.6]))
    together = transformer(**inputs)
    for index, multiplier in enumerate([0.0, 0.6]):
        network.set_multiplier(multiplier)
        torch.testing.assert_close(together[index], transformer(**inputs)[index], rtol=1e-4, atol=1e-4)


def gradients(transformer, inputs, network, recompute: bool, autocast: bool):
    network.zero_grad()
    network.train()
    transformer.train()
    torch.manual_seed(11)
    blocks = {"": [*transformer.double_blocks, *transformer.single_blocks]}
    with apply_memory_plan(blocks, MemoryPlan(checkpointing=recompute)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = transformer(**inputs).float().square().mean()
        loss.backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_recomputed_blocks_give_the_very_same_gradients_with_every_dropout(transformer, inputs, randomise, base):
    transformer.to(base)
    network = applied(
        transformer, randomise, neuron_dropout=0.2, rank_dropout="0.2", module_dropout="0.2",
        ggpo_sigma="0.03", ggpo_beta="0.01", split_qkv="True",
    )  # fmt: skip
    gradients(transformer, inputs, network, False, True)
    network.update_grad_norms()
    network.update_norms()
    stored = gradients(transformer, inputs, network, False, True)
    recomputed = gradients(transformer, inputs, network, True, True)
    assert any(grad is not None and grad.abs().max() > 0 for grad in stored.values())
    for name, grad in stored.items():
        assert (grad is None) == (recomputed[name] is None), name
        assert grad is None or torch.equal(grad, recomputed[name]), name


def test_gradients_through_the_model_are_those_of_dense_weights(transformer, inputs, randomise):
    """Every layer replaced by W + scale * up @ down in float64, differentiated by torch alone."""
    transformer.double()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    network = applied(transformer, randomise, in_dims="2,2,2,2,2").double()
    mine = gradients(transformer, inputs, network, True, False)
    network.remove()
    layers = {id(module): name for name, module in transformer.named_modules()}
    delta = {}
    parameters = {name: parameter.detach().requires_grad_() for name, parameter in network.named_parameters()}
    for lora in network.loras:
        down, up = (parameters[f"{lora.lora_name}.{part}.weight"] for part in ("lora_down", "lora_up"))
        delta[f"{layers[id(lora.org_module)]}.weight"] = lora.org_module.weight + lora.scale * up @ down
    output = torch.func.functional_call(transformer, delta, kwargs=inputs)
    theirs = torch.autograd.grad(output.float().square().mean(), list(parameters.values()))
    for (name, grad), reference in zip(mine.items(), theirs):
        torch.testing.assert_close(grad, reference, rtol=1e-5, atol=1e-9, msg=name)


def test_text_encoders_compute_with_their_network(transformer, clip, t5, randomise):
    tokens = torch.arange(6)[None]
    before = [clip(tokens).pooler_output, t5(tokens).last_hidden_state]
    network = applied(transformer, randomise, (clip, t5), train_t5xxl="True")
    during = [clip(tokens).pooler_output, t5(tokens).last_hidden_state]
    assert all(not torch.allclose(a, b) for a, b in zip(before, during))
    network.merge_to(None, None)
    network.remove()
    merged = [clip(tokens).pooler_output, t5(tokens).last_hidden_state]
    for a, b in zip(during, merged):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_model_that_isnt_trained_is_left_alone(transformer, clip, inputs, randomise):
    before = transformer(**inputs)
    network = lora_flux.create_network(1.0, 4, 2.0, None, [clip, None], transformer)
    randomise(network)
    network.apply_to([clip, None], transformer, True, False)
    assert torch.equal(transformer(**inputs), before)
    assert not network.unet_loras
    assert {key.split("_")[1] for key in network.state_dict()} == {"te1"}


def test_training_steps_lower_a_loss(transformer, inputs):
    torch.manual_seed(0)
    network = lora_flux.create_network(1.0, 4, 4.0, None, [None, None], transformer)
    network.apply_to(None, transformer, False, True)
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs(None, None, 1e-2)
    optimizer = torch.optim.AdamW(groups)
    target = torch.randn(2, 16, 64)
    network.on_epoch_start(None, transformer)
    losses = []
    for _ in range(10):
        loss = (transformer(**inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.grad is None for parameter in transformer.parameters())


def test_a_run_with_ggpo_goes_on_from_a_state_to_the_same_bits(transformer, inputs):
    arguments = {"ggpo_sigma": "0.03", "ggpo_beta": "0.01", "split_qkv": "True"}

    def made():
        torch.manual_seed(0)
        network = lora_flux.create_network(1.0, 4, 2.0, None, [None, None], transformer, **arguments)
        network.apply_to(None, transformer, False, True)
        return network, torch.optim.SGD(network.parameters(), 0.1)

    def step(network, optimizer):
        gradients(transformer, inputs, network, True, True)
        network.update_grad_norms()
        network.update_norms()
        optimizer.step()

    network, optimizer = made()
    fresh = {key: value.shape for key, value in network.state_dict().items()}
    for _ in range(2):
        step(network, optimizer)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    step(network, optimizer)
    network.remove()
    resumed, optimizer = made()
    assert {key: value.shape for key, value in state.items()} == fresh
    resumed.load_state_dict(state)
    step(resumed, optimizer)
    for (name, a), b in zip(network.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), name
    assert not any("norm" in key for key in read_keys(resumed))


def read_keys(network):
    return list(state_dict_of({lora.lora_name: lora.file_weights() for lora in network.loras}))


@pytest.mark.thorough
def test_a_compiled_model_computes_and_trains_the_same(transformer, inputs, randomise):
    del transformer.double_blocks[:], transformer.single_blocks[1:]  # double blocks: tests/memory/test_memory_plan.py
    network = applied(transformer, randomise)
    stored = gradients(transformer, inputs, network, False, False)
    torch._dynamo.reset()
    compiled = torch.compile(transformer, backend="aot_eager")
    network.zero_grad()
    compiled(**inputs).float().square().mean().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, stored[name], rtol=1e-4, atol=1e-6)
