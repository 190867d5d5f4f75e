"""networks.lora_fa: files of LoRA, of which only ups are trained."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import nn

from networks import lora, lora_fa
from tests.networks.stable_diffusion import tiny_model


def made(module, tiny, **arguments):
    torch.manual_seed(0)
    return module.create_network(1.0, 4, 2.0, None, tiny.encoders, tiny.unet, **arguments)


def test_it_starts_with_the_numbers_and_keys_of_lora(tmp_path):
    tiny = tiny_model("sdxl")
    for module, name in ((lora, "lora"), (lora_fa, "fa")):
        made(module, tiny, conv_dim="2").save_weights(tmp_path / f"{name}.safetensors", None, None)
    theirs, mine = (load_file(tmp_path / f"{name}.safetensors") for name in ("lora", "fa"))
    assert theirs.keys() == mine.keys() and all(torch.equal(theirs[key], mine[key]) for key in theirs)


def test_only_ups_are_trained_and_downs_stay_as_they_are():
    tiny = tiny_model("sd1")
    network = made(lora_fa, tiny, conv_dim="2", loraplus_lr_ratio="4")
    network.apply_to(tiny.encoders, tiny.unet)
    network.prepare_grad_etc(None, None)
    assert len(network.get_trainable_params()) == len(network.loras)
    groups, descriptions = network.prepare_optimizer_params_with_multiple_te_lrs([0.01], 0.01, None)
    assert descriptions == ["textencoder plus", "unet plus"] and {group["lr"] for group in groups} == {0.04}
    assert {id(p) for group in groups for p in group["params"]} == {id(m.lora_up.weight) for m in network.loras}
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(groups)
    (tiny.predict().square().mean() + tiny.encode()[0].square().mean()).backward()
    optimizer.step()
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.endswith("lora_up.weight") for name in changed)


def test_ups_get_the_gradients_that_lora_gives_them(randomise):
    gradients = []
    for module in (lora, lora_fa):
        tiny = tiny_model("sd1")
        network = made(module, tiny, conv_dim="2")
        randomise(network)
        network.apply_to(tiny.encoders, tiny.unet)
        network.prepare_grad_etc(None, None)
        tiny.predict().square().mean().backward()
        gradients.append({m.lora_name: m.lora_up.weight.grad for m in network.unet_loras})
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=1e-5, atol=1e-8, msg=name)


def kept_for_backward(layer: nn.Module, x: torch.Tensor) -> list[torch.Size]:
    """Shapes of what a call keeps, without the parameters."""
    shapes = []
    parameters = {p.data_ptr() for p in layer.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    return shapes


def test_inputs_of_linear_layers_are_not_kept():
    x = torch.randn(2, 50, 32)
    for module, is_kept in ((lora, True), (lora_fa, False)):
        tiny = tiny_model("sd1")
        network = made(module, tiny)
        network.apply_to(tiny.encoders, tiny.unet)
        network.prepare_grad_etc(None, None)
        layer = tiny.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
        assert (torch.Size([100, 32]) in kept_for_backward(layer, x)) == is_kept


def test_a_network_from_a_file_trains_ups_only_too(randomise, tmp_path):
    tiny = tiny_model("sd1")
    network = made(lora, tiny)
    randomise(network)
    network.save_weights(tmp_path / "lora.safetensors", None, None)
    loaded, _ = lora_fa.create_network_from_weights(1.0, tmp_path / "lora.safetensors", None, tiny.encoders, tiny.unet)
    loaded.prepare_grad_etc(None, None)
    assert len(loaded.get_trainable_params()) == len(loaded.loras) == len(network.loras)


def test_ggpo_works_with_downs_that_have_no_gradient(randomise):
    tiny = tiny_model("sd1")
    network = made(lora_fa, tiny, ggpo_sigma="0.1", ggpo_beta="0.1")
    randomise(network)
    network.apply_to(tiny.encoders, tiny.unet)
    network.prepare_grad_etc(None, None)
    tiny.predict().square().mean().backward()
    network.update_grad_norms()
    module = network.lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q
    expected = module.scale * (module.lora_up.weight.grad @ module.lora_down.weight).norm(dim=1)
    torch.testing.assert_close(module.grad_norms, expected.detach())
