"""Whole models with their blocks in 8 bits: loaded, trained through, merged into."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.memory.fp8 import FP8, BlocksInFp8, Fp8Linear, quantise
from library.models.flux.checkpoint import open_transformer
from library.models.stable_diffusion.checkpoint import open_stable_diffusion
from library.models.t5 import open_t5
from library.randomness import generator
from networks import lora, lora_flux


def normal(*shape: int, purpose: str = "x") -> torch.Tensor:
    return torch.randn(*shape, generator=generator(0, purpose))


def flux_output(model):
    guidance = torch.full((2,), 3.5)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return model(
        img=normal(2, 16, 64), img_ids=ids, txt=normal(2, 5, 64), txt_ids=torch.zeros(5, 3),
        timesteps=torch.tensor([0.3, 0.8]), y=normal(2, 64), guidance=guidance,
    )  # fmt: skip


def unet_output(model):
    return model(normal(2, 4, 8, 8), torch.tensor([10, 800]), encoder_hidden_states=normal(2, 7, 64)).sample


def dequantised(model, layers):
    """The same numbers in ordinary layers."""
    with torch.no_grad():
        for name, layer in layers.items():
            model.get_submodule(name).weight.copy_(layer.weight)
    return model


def fp8_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Fp8Linear)}


def gradients(module, model, output):
    """Output and gradients of a LoRA with weights of its own in ``model``."""
    torch.manual_seed(0)
    network = module.create_network(1.0, 4, 4.0, None, [], model)
    network.apply_to([], model, False, True)
    for parameter in network.parameters():
        parameter.data = 0.1 * normal(*parameter.shape, purpose="lora")
    network.prepare_grad_etc(None, model)
    result = output(model)
    result.square().mean().backward()
    return result.detach(), {name: p.grad for name, p in network.named_parameters()}, network


@pytest.fixture
def opened(request, tiny_flux, tiny_sd1):
    if request.param == "flux":
        return open_transformer(tiny_flux.transformer), lora_flux, flux_output
    return open_stable_diffusion(tiny_sd1).unet, lora, unet_output


@pytest.mark.parametrize("opened", ["flux", "sd1"], indirect=True)
def test_training_is_that_of_the_dequantised_model(opened):
    file, module, output = opened
    model = file.load(BlocksInFp8(torch.float32), "cpu")
    layers = fp8_layers(model)
    assert len(layers) > 10
    reference = dequantised(file.load(torch.float32, "cpu"), layers)
    ours, our_gradients, _ = gradients(module, model, output)
    theirs, their_gradients, _ = gradients(module, reference, output)
    assert torch.equal(ours, theirs)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-5, atol=1e-7)


def test_the_model_stays_near_the_original(tiny_flux):
    file = open_transformer(tiny_flux.transformer)
    original = flux_output(file.load(torch.float32, "cpu"))
    with torch.no_grad():
        ours = flux_output(file.load(BlocksInFp8(torch.float32), "cpu"))
    assert (ours - original).norm() / original.norm() < 0.1


def test_embedders_norms_and_final_layers_keep_their_numbers(tiny_flux):
    model = open_transformer(tiny_flux.transformer).load(BlocksInFp8(torch.bfloat16), "cpu")
    assert all(name.startswith(("double_blocks.", "single_blocks.")) for name in fp8_layers(model))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_file_in_8_bits_is_kept_as_it_is(tiny_flux, tmp_path):
    state = load_file(tiny_flux.transformer)
    name = "double_blocks.0.img_mlp.0.weight"
    stored = quantise(state[name])
    plain = {**state, name: state[name].to(FP8)}
    scaled = {**state, name: stored.codes, name.replace(".weight", ".scale_weight"): stored.scale}
    scaled["scaled_fp8"] = torch.zeros(2, dtype=FP8)
    for tensors, codes, scale in ((plain, plain[name], 1.0), (scaled, stored.codes, stored.scale.item())):
        save_file(tensors, tmp_path / "flux.safetensors")
        model = open_transformer(tmp_path / "flux.safetensors").load(BlocksInFp8(torch.bfloat16), "cpu")
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(layer.codes.view(torch.uint8), codes.view(torch.uint8))
        assert layer.scale.item() == scale


def test_t5_gives_what_the_dequantised_model_gives(tiny_flux):
    file = open_t5(tiny_flux.t5xxl)
    tokens = torch.arange(8).reshape(1, 8)
    ours = file.load(BlocksInFp8(torch.float32), "cpu")
    layers = fp8_layers(ours)
    assert len(layers) == 2 * 7
    assert torch.equal(ours(tokens), dequantised(file.load(torch.float32, "cpu"), layers)(tokens))
    kept = file.load(BlocksInFp8(torch.float16), "cpu")
    assert kept.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32  # overflows in float16


def test_a_lora_is_merged_into_8_bits_and_taken_out_again(tiny_flux):
    model = open_transformer(tiny_flux.transformer).load(BlocksInFp8(torch.float32), "cpu")
    before = {name: layer.codes.view(torch.uint8).clone() for name, layer in fp8_layers(model).items()}
    _, _, network = gradients(lora_flux, model, flux_output)
    with torch.no_grad():
        applied = flux_output(model)
        network.backup_weights()
        network.pre_calculation()
        merged = flux_output(model)
        assert (merged - applied).norm() / applied.norm() < 0.1
        assert any(not torch.equal(before[n], layer.codes.view(torch.uint8)) for n, layer in fp8_layers(model).items())
        network.restore_weights()
        assert all(torch.equal(before[n], layer.codes.view(torch.uint8)) for n, layer in fp8_layers(model).items())
        assert torch.equal(flux_output(model), applied)
