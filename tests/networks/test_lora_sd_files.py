"""LoRA files for Stable Diffusion under other programs' names, and files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models.loading import on_meta
from networks import lora
from tests.networks.stable_diffusion import Tiny, real_unet, shared_tiny_model

REFERENCE = Path(__file__).parent.parent / "reference_data" / "lora_sd15_keys.json"


@pytest.fixture
def make(randomise):
    def network(tiny: Tiny, dim: int = 4, alpha: float = 4.0, **arguments):
        made = lora.create_network(1.0, dim, alpha, None, tiny.encoders, tiny.unet, **arguments)
        randomise(made)
        return made

    return network


def read(tiny: Tiny, tensors):
    return lora.create_network_from_weights(1.0, None, None, tiny.encoders, tiny.unet, tensors)[0]


def same(loaded, network, of_unet: bool = True, of_text: bool = True) -> bool:
    """Whether the network that was read holds just what the given parts of the written one hold."""
    wanted = (network.unet_loras if of_unet else []) + (network.text_encoder_loras if of_text else [])
    found = {module.lora_name: module for module in loaded.loras}
    assert found.keys() == {module.lora_name for module in wanted}
    for module in wanted:
        other = found[module.lora_name]
        assert other.scale == module.scale
        assert torch.equal(other.down_matrix, module.down_matrix) and torch.equal(other.up_matrix, module.up_matrix)
    return True


def diffusers_paths(tiny: Tiny) -> dict[int, str]:
    """What diffusers calls each layer of the U-Net and the text encoders, by the layer's id."""
    paths = {id(module): f"unet.{path}" for path, module in tiny.unet.named_modules()}
    for name, encoder in zip(("text_encoder", "text_encoder_2"), tiny.encoders):
        paths |= {id(module): f"{name}.text_model.{path}" for path, module in encoder.text_model.named_modules()}
    return paths


def under(network, names: dict[int, str], down: str, up: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for module in network.loras:
        if id(module.org_module) in names:
            weights, name = module.file_weights(), names[id(module.org_module)]
            tensors |= {f"{name}.{down}": weights.down.clone(), f"{name}.{up}": weights.up.clone()}
    return tensors


@pytest.mark.parametrize(
    ("variant", "down", "up"),
    [
        ("sd1", "lora.down.weight", "lora.up.weight"),
        ("sd2", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        ("sdxl", "lora_A.weight", "lora_B.weight"),
    ],
)
def test_files_of_diffusers(make, variant, down, up):
    tiny = shared_tiny_model(variant)
    network = make(tiny, conv_dim="4", conv_alpha="4")
    tensors = under(network, diffusers_paths(tiny), down, up)
    assert len(tensors) == 2 * len(network.loras)
    assert same(read(tiny, tensors), network)


@pytest.mark.parametrize("variant", ["sd1", "sdxl"])
def test_files_of_peft_without_the_models_name(make, variant):
    tiny = shared_tiny_model(variant)
    network = make(tiny)
    names = {id(module): f"base_model.model.{path}" for path, module in tiny.unet.named_modules()}
    assert same(read(tiny, under(network, names, "lora_A.weight", "lora_B.weight")), network, of_text=False)


@pytest.mark.parametrize(("variant", "prefix"), [("sd1", "unet."), ("sd2", ""), ("sdxl", "")])
def test_files_of_diffusers_when_it_trained_attention_processors(make, variant, prefix):
    tiny = shared_tiny_model(variant)
    network = make(tiny, network_reg_dims="proj_=0,ff_net=0")
    names = {}
    for path, module in tiny.unet.named_modules():
        block, attention, layer = path.rpartition(".to_")
        if attention:
            names[id(module)] = f"{prefix}{block}.processor.to_{layer.split('.')[0]}_lora"
    tensors = under(network, names, "down.weight", "up.weight")
    assert any(key.endswith("attn1.processor.to_out_lora.up.weight") for key in tensors)
    assert same(read(tiny, tensors), network, of_text=False)


def test_text_encoders_of_that_time(make):
    tiny = shared_tiny_model("sd1")
    network = make(tiny, network_reg_dims="mlp=0")
    theirs = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    names = {}
    for path, module in tiny.encoders[0].text_model.named_modules():
        block, _, layer = path.rpartition(".")
        if layer in theirs:
            names[id(module)] = f"text_encoder.text_model.{block}.{theirs[layer]}_lora"
    assert same(read(tiny, under(network, names, "down.weight", "up.weight")), network, of_unet=False)


@pytest.mark.parametrize("variant", [pytest.param("sd1", marks=pytest.mark.thorough), "sdxl"])
def test_either_layout_of_the_unet_is_read(make, variant):
    """kohya's names with the other layout's paths, and ComfyUI's names with the original ones."""
    from library.models.stable_diffusion.original_names import under_original_names

    tiny = shared_tiny_model(variant, whole=True)
    network = make(tiny, conv_dim="2")
    for prefix, paths in (
        ("lora_unet_", under_original_names(tiny.unet)),
        ("lora_unet_", tiny.unet),
        ("diffusion_model.", under_original_names(tiny.unet)),
    ):
        names = {}
        for path, module in paths.named_modules():
            names[id(module)] = f"{prefix}{path}" if prefix[-1] == "." else f"{prefix}{path}".replace(".", "_")
        tensors = under(network, names, "lora_down.weight", "lora_up.weight")
        for module in network.unet_loras:
            tensors[f"{names[id(module.org_module)]}.alpha"] = torch.tensor(module.alpha)
        assert same(read(tiny, tensors), network, of_text=False)


@pytest.mark.parametrize(("variant", "kinds"), [("sd1", ["l"]), ("sd2", ["h"]), ("sdxl", ["l", "g"])])
def test_text_encoders_of_comfyui(make, variant, kinds):
    tiny = shared_tiny_model(variant)
    network = make(tiny)
    names = {}
    for kind, encoder in zip(kinds, tiny.encoders):
        for path, module in encoder.named_modules():
            names[id(module)] = f"text_encoders.clip_{kind}.transformer.{path}"
    assert same(read(tiny, under(network, names, "lora_A.weight", "lora_B.weight")), network, of_unet=False)


OUTER = {
    "sd1": {
        "conv_in": "conv_in",
        "time_embedding_linear_1": "time_embedding.linear_1",
        "conv_out": "conv_out",
    },
    "sdxl": {
        "input_blocks_0_0": "conv_in",
        "time_embed_2": "time_embedding.linear_2",
        "label_emb_0_0": "add_embedding.linear_1",
        "out_2": "conv_out",
    },
}


@pytest.mark.parametrize("variant", OUTER)
def test_layers_around_the_blocks_are_applied_though_they_are_never_trained(variant):
    tiny = shared_tiny_model(variant)
    tensors, expected = {}, {}
    for name, path in OUTER[variant].items():
        layer = tiny.unet.get_submodule(path)
        out, *rest = layer.weight.shape
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, *rest)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(out, 2, *(1 for _ in rest[1:]))
        expected[f"lora_unet_{name}"] = layer
    trained = lora.create_network(1.0, 1, 1.0, None, None, tiny.unet, conv_dim="1")
    assert not expected.keys() & {module.lora_name for module in trained.loras}
    assert {module.lora_name: module.org_module for module in read(tiny, tensors).loras} == expected


def test_old_files_without_alpha_have_full_strength(make, tmp_path):
    tiny = shared_tiny_model("sd1")
    network = make(tiny, alpha=2.0)
    network.save_weights(tmp_path / "lora.safetensors", torch.float16, None)
    tensors = load_file(tmp_path / "lora.safetensors")
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())
    without = {key: value for key, value in tensors.items() if not key.endswith("alpha")}
    assert {module.scale for module in read(tiny, tensors).loras} == {0.5}
    assert {module.scale for module in read(tiny, without).loras} == {1.0}


def test_first_weights_and_their_strength(make, tmp_path):
    """--network_weights takes alpha over with the matrices, and says what did not fit."""
    tiny = shared_tiny_model("sd1")
    first = make(tiny, alpha=2.0)
    first.save_weights(tmp_path / "lora.safetensors", None, None)
    network = lora.create_network(1.0, 4, 1.0, None, tiny.encoders, tiny.unet, conv_dim="2")
    info = network.load_weights(tmp_path / "lora.safetensors")
    more = {module.lora_name for module in network.loras} - {module.lora_name for module in first.loras}
    parts = ("alpha", "lora_down.weight", "lora_up.weight")
    assert not info.unexpected_keys and more
    assert sorted(info.missing_keys) == sorted(f"{name}.{part}" for name in more for part in parts)
    assert {module.scale for module in network.loras if "attn1" in module.lora_name} == {0.5}
    other = lora.create_network(1.0, 8, 1.0, None, tiny.encoders, tiny.unet)
    with pytest.raises(UserError, match=r"lora.safetensors.*has rank 4, the network 8; set --network_dim 4"):
        other.load_weights(tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("variant", "other"), [("sd1", "sd2"), ("sd2", "sd1"), ("sd1", "sdxl"), ("sdxl", "sd1"), ("sdxl", "sd2")]
)
def test_files_of_another_variant_are_refused(variant, other):
    tensors = lora.create_network(1.0, 1, 1.0, None, None, real_unet(variant)).state_dict()
    with pytest.raises(UserError, match="the given weights: .*made for another model"):
        lora.create_network_from_weights(1.0, None, None, None, real_unet(other), tensors)


def test_files_of_other_methods_are_named(tmp_path):
    save_file({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.zeros(4, 8)}, tmp_path / "loha.safetensors")
    with pytest.raises(UserError, match=r"loha.safetensors.*LoHa"):
        lora.create_network_from_weights(1.0, tmp_path / "loha.safetensors", None, None, shared_tiny_model("sd1").unet)


def test_the_keys_that_another_trainer_wrote_are_all_understood():
    from diffusers import UNet2DConditionModel

    from library.models.clip import ClipConfig, ClipTextEncoder

    keys = json.loads(REFERENCE.read_text(encoding="utf-8"))
    tensors = {key: torch.ones(shape) for key, (shape, _) in keys.items()}
    with on_meta():
        unet = UNet2DConditionModel(block_out_channels=(32, 64, 64, 64), cross_attention_dim=32)
        text = ClipTextEncoder(ClipConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2))
    network, own = lora.create_network_from_weights(1.0, None, None, text, unet, tensors)
    assert network.state_dict().keys() == own.keys() == tensors.keys()


@pytest.mark.parametrize(
    ("variant", "prefix", "separator", "end"),
    [
        *(("sd1", "lycoris_", "_", ""), ("sdxl", "lora_unet_", "_", ""), ("sd1", "lora_unet_", "_", "_")),
        *(("sdxl", "diffusion_model.", ".", ""), ("sd1", "unet.base_model.model.", ".", "")),
        ("sd1", "base_model.model.unet.", ".", ""),
    ],
)
def test_further_names_of_diffusers_paths(make, variant, prefix, separator, end):
    tiny = shared_tiny_model(variant)
    network = make(tiny)
    paths = {id(module): path for path, module in tiny.unet.named_modules()}
    names = {key: f"{prefix}{path.replace('.', separator)}{end}" for key, path in paths.items()}
    tensors = under(network, names, "lora_A.some_adapter.weight", "lora_B.some_adapter.weight")
    assert same(read(tiny, tensors), network, of_text=False)
