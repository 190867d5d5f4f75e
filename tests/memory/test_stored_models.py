"""Whole models with their blocks in 8 bits: loaded, trained through, merged into."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.memory.apply import apply_memory_plan
from library.memory.fp8_compute import FastScaledLinear
from library.memory.plan import MemoryPlan
from library.memory.scaled import FP8, ScaledLinear, ScaledWeight, quantise
from library.memory.storage import BlocksStoredAs, Storage
from library.memory.stored_linear import StoredLinear
from library.models.clip import open_clip
from library.models.flux.checkpoint import open_transformer
from library.models.hunyuan_image.checkpoint import open_transformer as open_hunyuan_image
from library.models.loading import LoadSpec
from library.models.lumina.checkpoint import open_transformer as open_lumina
from library.models.stable_diffusion.checkpoint import open_stable_diffusion
from library.models.t5 import open_t5
from library.randomness import generator
from library.safetensors_io import save_file as our_save_file
from networks import lora, lora_flux, lora_hunyuan_image, lora_lumina
from tools.make_tiny_models import make_tiny_flux


def normal(*shape: int, purpose: str = "x") -> torch.Tensor:
    return torch.randn(*shape, generator=generator(0, purpose))


def flux_output(model):
    guidance = torch.full((2,), 3.5)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(2.0))
    return model(
        img=normal(2, 4, 64), img_ids=ids, txt=normal(2, 3, 64), txt_ids=torch.zeros(3, 3),
        timesteps=torch.tensor([0.3, 0.8]), y=normal(2, 64), guidance=guidance,
    )  # fmt: skip


def lumina_output(model):
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    return model(normal(2, 16, 4, 4), torch.tensor([0.3, 0.8]), normal(2, 3, 64), mask)


def hunyuan_image_output(model):
    text_mask, glyph_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]), torch.tensor([[1, 1, 1], [0, 0, 0]])
    times = torch.tensor([300.0, 800.0])
    return model(normal(2, 64, 4, 4), times, normal(2, 5, 64), text_mask, normal(2, 3, 64), glyph_mask)


def unet_output(model):
    return model(normal(2, 4, 8, 8), torch.tensor([10, 800]), encoder_hidden_states=normal(2, 7, 64)).sample


def dequantised(model, layers):
    """The same numbers in ordinary layers."""
    with torch.no_grad():
        for name, layer in layers.items():
            model.get_submodule(name).weight.copy_(layer.weight)
    return model


def stored_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, StoredLinear)}


def codes(model):
    return {name: layer.codes.view(torch.uint8).clone() for name, layer in stored_layers(model).items()}


STORAGES = [*(Storage("fp8", granularity) for granularity in ("tensor", "channel", "block"))]
STORAGES += [Storage("int8"), Storage("nf4")]


SCALED_ALIKE = pytest.param(Storage("fp8", "channel"), marks=pytest.mark.thorough)
"""By row of the weight, as int8."""


@pytest.fixture(
    params=[SCALED_ALIKE if stored == Storage("fp8", "channel") else stored for stored in STORAGES], ids=str
)
def storage(request):
    return request.param


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
def opened(request):
    """A model file, the module of its networks, and what computes an output."""
    if request.param == "flux":
        return open_transformer(request.getfixturevalue("tiny_flux").transformer), lora_flux, flux_output
    if request.param == "lumina":
        return open_lumina(request.getfixturevalue("tiny_lumina").transformer), lora_lumina, lumina_output
    if request.param == "hunyuan_image":
        file = open_hunyuan_image(request.getfixturevalue("tiny_hunyuan_image").transformer)
        return file, lora_hunyuan_image, hunyuan_image_output
    tiny_sd1 = request.getfixturevalue("tiny_sd1")
    return open_stable_diffusion(tiny_sd1).unet, lora, unet_output


@pytest.mark.parametrize(
    ("opened", "storage"),
    [
        *(("flux", storage) for storage in STORAGES),
        *(("lumina", Storage("nf4")), ("hunyuan_image", Storage("fp8", "block")), ("sd1", Storage("int8"))),
    ],
    indirect=["opened"],
    ids=str,
)
def test_training_is_that_of_the_dequantised_model(opened, storage):
    file, module, output = opened
    model = file.load(LoadSpec.of(BlocksStoredAs(torch.float32, storage)))
    layers = stored_layers(model)
    assert len(layers) > 10
    reference = dequantised(file.load(LoadSpec.of(torch.float32)), layers)
    ours, our_gradients, _ = gradients(module, model, output)
    theirs, their_gradients, _ = gradients(module, reference, output)
    assert torch.equal(ours, theirs)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("opened", "granularity"), [("flux", "tensor"), ("lumina", "channel")], indirect=["opened"])
def test_with_products_in_fp8_it_is_nearly_that(opened, granularity):
    file, module, output = opened
    results = []
    for fast in (True, False):
        model = file.load(LoadSpec.of(BlocksStoredAs(torch.float32, Storage("fp8", granularity, fast))))
        assert {type(layer) for layer in stored_layers(model).values()} == {FastScaledLinear if fast else ScaledLinear}
        out, found, _ = gradients(module, model, output)
        results.append([out, torch.cat([gradient.flatten() for gradient in found.values()])])
    for ours, reference in zip(*results):
        # An output and all gradients, of which each layer's products add some 2.6 %.
        assert 0 < (ours - reference).norm() < (0.06 if module is lora_flux else 0.2) * reference.norm()


COMPILED = [
    Storage("fp8", "block"),
    *(pytest.param(stored, marks=pytest.mark.thorough) for stored in (Storage("fp8", fast=True), Storage("nf4"))),
]


@pytest.mark.parametrize("stored", COMPILED, ids=str)
def test_a_compiled_block_has_no_graph_break_in_any_format(tiny_flux, stored):
    """Layers with a LoRA and layers without, under checkpointing."""
    from torch._dynamo.utils import counters

    model = open_transformer(tiny_flux.transformer).load(LoadSpec.of(BlocksStoredAs(torch.float32, stored)))
    plain, _, network = gradients(lora_flux, model, flux_output)
    torch._dynamo.reset()
    counters.clear()
    blocks = {"single_blocks": list(model.single_blocks)[:1]}
    with apply_memory_plan(blocks, MemoryPlan(checkpointing=True, compiler="eager")):
        for parameter in network.parameters():
            parameter.grad = None
        result = flux_output(model)
        result.square().mean().backward()
    assert torch.equal(result, plain)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()


def test_the_model_stays_near_the_original(tiny_flux, storage):
    file = open_transformer(tiny_flux.transformer)
    with torch.no_grad():
        original = flux_output(file.load(LoadSpec.of(torch.float32)))
        ours = flux_output(file.load(LoadSpec.of(BlocksStoredAs(torch.float32, storage))))
    assert 0 < (ours - original).norm() / original.norm() < (0.3 if storage.kind == "nf4" else 0.1)


def test_embedders_norms_and_final_layers_keep_their_numbers(tiny_flux):
    model = open_transformer(tiny_flux.transformer).load(LoadSpec.of(BlocksStoredAs(torch.bfloat16)))
    assert all(name.startswith(("double_blocks.", "single_blocks.")) for name in stored_layers(model))
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
        model = open_transformer(tmp_path / "flux.safetensors").load(LoadSpec.of(BlocksStoredAs(torch.bfloat16)))
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(layer.codes.view(torch.uint8), codes.view(torch.uint8))
        assert layer.scale.item() == scale


def test_t5_gives_what_the_dequantised_model_gives(tiny_flux):
    file = open_t5(tiny_flux.t5xxl)
    tokens = torch.arange(8).reshape(1, 8)
    ours = file.load(LoadSpec.of(BlocksStoredAs(torch.float32)))
    layers = stored_layers(ours)
    assert len(layers) == 2 * 7
    assert torch.equal(ours(tokens), dequantised(file.load(LoadSpec.of(torch.float32)), layers)(tokens))
    kept = file.load(LoadSpec.of(BlocksStoredAs(torch.float16)))
    assert kept.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32  # overflows in float16


def test_a_lora_is_merged_into_the_format_and_taken_out_again(tiny_flux, storage):
    model = open_transformer(tiny_flux.transformer).load(LoadSpec.of(BlocksStoredAs(torch.float32, storage)))
    before, kind = codes(model), {name: type(layer) for name, layer in stored_layers(model).items()}
    _, _, network = gradients(lora_flux, model, flux_output)
    with torch.no_grad():
        applied = flux_output(model)
        network.backup_weights()
        network.pre_calculation()
        merged = flux_output(model)
        assert (merged - applied).norm() / applied.norm() < (0.3 if storage.kind == "nf4" else 0.1)
        assert any(not torch.equal(before[name], now) for name, now in codes(model).items())
        assert {name: type(layer) for name, layer in stored_layers(model).items()} == kind
        network.restore_weights()
        assert all(torch.equal(before[name], now) for name, now in codes(model).items())
        assert torch.equal(flux_output(model), applied)


def in_fp8(state: dict[str, torch.Tensor], scaled: bool) -> dict[str, torch.Tensor]:
    """A file's matrices cast to 8 bits, or divided by a scale each that stands beside it under ComfyUI's name."""
    made = dict(state)
    for name, value in state.items():
        if not name.endswith(".weight") or value.dim() != 2:
            continue
        stored = quantise(value)
        made[name] = stored.codes if scaled else value.to(FP8)
        if scaled:
            made[name.removesuffix("weight") + "scale_weight"] = stored.scale
            made[name.removesuffix("weight") + "scale_input"] = torch.tensor(1.0)
    return made | ({"scaled_fp8": torch.zeros(2, dtype=FP8)} if scaled else {})


@pytest.mark.parametrize("scaled", [False, True])
def test_training_on_a_file_in_8_bits_is_that_of_its_dequantised_weights(tiny_flux, tmp_path, scaled):
    save_file(in_fp8(load_file(tiny_flux.transformer), scaled), tmp_path / "eighth.safetensors")
    file = open_transformer(tmp_path / "eighth.safetensors")
    kept, dequantised_file = (
        file.load(LoadSpec.of(BlocksStoredAs(torch.float32))),
        file.load(LoadSpec.of(torch.float32)),
    )
    assert len(stored_layers(kept)) > 10
    ours, our_gradients, _ = gradients(lora_flux, kept, flux_output)
    theirs, their_gradients, _ = gradients(lora_flux, dequantised_file, flux_output)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-4, atol=1e-7)


def test_a_diffusers_folder_in_8_bits_is_kept_as_it_is(tiny_flux, tmp_path):
    """There, one of our layers is three or four of the file's."""
    folder = make_tiny_flux(tmp_path / "diffusers", layout="diffusers").transformer
    for shard in (folder / "transformer").glob("*.safetensors"):
        save_file(in_fp8(load_file(shard), scaled=False), shard, {"format": "pt"})
    theirs = open_transformer(folder).load(LoadSpec.of(BlocksStoredAs(torch.bfloat16)))
    save_file(in_fp8(load_file(tiny_flux.transformer), scaled=False), tmp_path / "eighth.safetensors")
    ours = open_transformer(tmp_path / "eighth.safetensors").load(LoadSpec.of(BlocksStoredAs(torch.bfloat16)))
    for name, layer in stored_layers(ours).items():
        other = theirs.get_submodule(name)
        assert torch.equal(layer.codes.view(torch.uint8), other.codes.view(torch.uint8)) and other.scale == 1


def test_scales_of_parts_that_become_one_layer_are_respected(tiny_flux, tmp_path):
    folder = make_tiny_flux(tmp_path / "diffusers", layout="diffusers").transformer
    for shard in (folder / "transformer").glob("*.safetensors"):
        save_file(in_fp8(load_file(shard), scaled=True), shard, {"format": "pt"})
    for index in (folder / "transformer").glob("*.index.json"):
        index.unlink()  # it does not name the scales
    file = open_transformer(folder)
    name = "double_blocks.0.img_attn.qkv"
    layer = file.load(LoadSpec.of(BlocksStoredAs(torch.float32))).get_submodule(name)
    numbers = file.load(LoadSpec.of(torch.float32)).get_submodule(name).weight
    original = load_file(tiny_flux.transformer)[f"{name}.weight"]
    assert (numbers - original).norm() < 0.04 * original.norm()
    assert torch.equal(layer.weight, numbers)  # kept as they are: each row with the scale of its part
    assert len(layer.scale.unique()) == 3


@pytest.mark.parametrize("granularity", ["channel", "block"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_scales_of_every_shape_are_kept_with_their_file(tiny_flux, tmp_path, granularity, scale_dtype):
    """Whichever kind of fp8 is wanted; and where none is, they are multiplied out."""
    state, meant = load_file(tiny_flux.transformer), {}
    for name, value in list(state.items()):
        if value.dim() == 2 and name.startswith(("double_blocks.", "single_blocks.")):
            made = quantise(value, FP8, granularity)
            scale = made.scale.to(scale_dtype)
            meant[name] = ScaledWeight(made.codes, scale)
            state[name], state[name.removesuffix("weight") + "scale_weight"] = made.codes, scale
    save_file(state, tmp_path / "scaled.safetensors")
    file = open_transformer(tmp_path / "scaled.safetensors")
    dense = file.load(LoadSpec.of(torch.float32)).state_dict()
    for wanted in (Storage("fp8"), Storage("fp8", "block")):
        layers = stored_layers(file.load(LoadSpec.of(BlocksStoredAs(torch.float32, wanted))))
        assert {f"{name}.weight" for name in layers} == meant.keys()
        for name, layer in layers.items():
            stored = meant[f"{name}.weight"]
            assert torch.equal(layer.codes.view(torch.uint8), stored.codes.view(torch.uint8))
            is_by_block = granularity == "block" and stored.scale.shape[1] > 1  # one for all of a row is the row's
            assert layer.stored_weight.granularity == ("block" if is_by_block else "channel")
            assert torch.equal(layer.scale.flatten(), stored.scale.float().flatten())
            assert layer.scale.dtype == (scale_dtype if is_by_block else torch.float32)
            assert torch.equal(dense[f"{name}.weight"], layer.weight)


def test_scales_that_fit_no_rows_are_one_sentence(tiny_flux, tmp_path):
    state = load_file(tiny_flux.transformer)
    name = "single_blocks.1.linear2"
    state[f"{name}.weight"] = state[f"{name}.weight"].to(FP8)
    state[f"{name}.scale_weight"] = torch.ones(len(state[f"{name}.weight"]), 7)
    save_file(state, tmp_path / "scaled.safetensors")
    with pytest.raises(UserError, match=f'the scales of "{name}.weight" are neither one, nor one for each row, nor'):
        open_transformer(tmp_path / "scaled.safetensors").load(LoadSpec.of(BlocksStoredAs(torch.float32)))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_file_in_8_bit_floats_is_rounded_from_its_numbers_to_other_formats(tiny_flux, tmp_path, kind):
    state = load_file(tiny_flux.transformer)
    key = "single_blocks.1.linear2.weight"
    state[key] = state[key].to(torch.float8_e5m2)
    our_save_file(state, tmp_path / "eighth.safetensors")
    file = open_transformer(tmp_path / "eighth.safetensors")
    layer = file.load(LoadSpec.of(BlocksStoredAs(torch.float32, Storage(kind)))).get_submodule(key[:-7])
    numbers = file.load(LoadSpec.of(torch.float32)).state_dict()[key]
    assert (layer.weight - numbers).norm() < 0.12 * numbers.norm()


@pytest.mark.parametrize("name", ["float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_other_8_bit_formats_are_numbers_to_read_but_none_to_keep(tiny_flux, tmp_path, name):
    state = load_file(tiny_flux.transformer)
    key = "single_blocks.1.linear2.weight"
    other = {**state, key: state[key].to(getattr(torch, name))}
    our_save_file(other, tmp_path / "other.safetensors")
    file = open_transformer(tmp_path / "other.safetensors")
    assert torch.equal(file.load(LoadSpec.of(torch.float32)).state_dict()[key], other[key].float())
    sentence = rf'"{re.escape(key)}" is {name}, but weights are kept in 8 bits as float8_e4m3fn only'
    with pytest.raises(UserError, match=sentence):
        file.source.require_e4m3fn()
    with pytest.raises(UserError, match=sentence):
        file.load(LoadSpec.of(BlocksStoredAs(torch.bfloat16)))


# Text encoders


def t5_output(model):
    return model(torch.arange(16).reshape(2, 8), torch.tensor([[1] * 8, [1] * 5 + [0] * 3]))


def clip_output(model):
    return model(torch.arange(16).reshape(2, 8), end_of_text=7)


@pytest.mark.parametrize(("part", "output"), [("clip_l", clip_output), ("t5xxl", t5_output)])
def test_training_a_text_encoder_is_that_of_the_dequantised_one(tiny_flux, part, output):
    file = open_clip(tiny_flux.clip_l) if part == "clip_l" else open_t5(tiny_flux.t5xxl)
    transformer = open_transformer(tiny_flux.transformer).load(LoadSpec.of(torch.float32))

    def trained(encoder):
        torch.manual_seed(0)
        encoders = [encoder, None] if part == "clip_l" else [None, encoder]
        network = lora_flux.create_network(1.0, 4, 4.0, None, encoders, transformer, train_t5xxl="True")
        network.apply_to(encoders, transformer, True, False)
        for parameter in network.parameters():
            parameter.data = 0.1 * normal(*parameter.shape, purpose="lora")
        result = output(encoder)
        result.square().mean().backward()
        return result.detach(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}

    kept = file.load(LoadSpec.of(BlocksStoredAs(torch.float32)))
    layers = stored_layers(kept)
    ours, our_gradients = trained(kept)
    theirs, their_gradients = trained(dequantised(file.load(LoadSpec.of(torch.float32)), layers))
    assert torch.equal(ours, theirs)
    assert len(our_gradients) == 2 * len(layers) and our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("part_dtype", [torch.float16, BlocksStoredAs(torch.float16)])
def test_t5_in_float16_stays_finite_where_its_feed_forward_passes_float16s_range(tiny_flux, tmp_path, part_dtype):
    state = load_file(tiny_flux.t5xxl)
    for name in state:
        if name.endswith(".wo.weight"):
            state[name] *= 3e5
    save_file(state, tmp_path / "t5.safetensors")
    file = open_t5(tmp_path / "t5.safetensors")
    encoder = file.load(LoadSpec.of(part_dtype))
    if isinstance(part_dtype, BlocksStoredAs):  # the last matrix takes a quarter of what it would take in float32
        assert encoder.encoder.block[0].layer[1].DenseReluDense.wo.codes.dtype == FP8
    tokens = torch.arange(8).reshape(1, 8)
    wide = BlocksStoredAs(torch.float32) if isinstance(part_dtype, BlocksStoredAs) else torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        ours = encoder(tokens)
    with torch.no_grad():
        reference = file.load(LoadSpec.of(wide))(tokens)
        middle = file.load(LoadSpec.of(wide)).encoder(input_ids=tokens, output_hidden_states=True).hidden_states[1]
    assert middle.abs().max() > 65504
    assert (ours.float() - reference).norm() < 0.01 * reference.norm()


# Chroma


@pytest.mark.parametrize("is_in_8_bits", [False, True])
def test_chromas_approximator_keeps_its_numbers(tiny_chroma, tmp_path, is_in_8_bits):
    """It gives every modulation of every block, so a rounding there would be everywhere."""
    path = tiny_chroma.transformer
    if is_in_8_bits:
        path = tmp_path / "eighth.safetensors"
        save_file(in_fp8(load_file(tiny_chroma.transformer), scaled=True), path)
    model = open_transformer(path, model_type="chroma").load(LoadSpec.of(BlocksStoredAs(torch.bfloat16)))
    layers = stored_layers(model)
    assert len(layers) > 10 and all(name.startswith(("double_blocks.", "single_blocks.")) for name in layers)
    assert {parameter.dtype for parameter in model.distilled_guidance_layer.parameters()} == {torch.bfloat16}
