"""LoRA and OFT for HunyuanImage-2.1: modules, ranks and names, from each argument of the network modules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from library.errors import UserError
from library.models.hunyuan_image.transformer import HunyuanImageConfig, HunyuanImageTransformer
from library.models.loading import on_meta
from networks import lora_hunyuan_image, oft_hunyuan_image
from tests.networks.conftest import randomise
from tests.networks.lora_tool_files import assert_same, metadata
from tests.parity.test_hunyuan_image_transformer_matches_diffusers import inputs
from tests.running import lycoris_package
from tools.make_tiny_models import HUNYUAN_IMAGE, fill_randomly

REFERENCE = Path(__file__).parent.parent / "reference_data" / "lora_hunyuan_image_keys.json"
DOUBLE = tuple(
    f"{stream}_{part}"
    for stream in ("img", "txt")
    for part in ("attn_qkv", "attn_proj", "mlp_fc1", "mlp_fc2", "mod_linear")
)
SINGLE = ("linear1", "linear2", "modulation_linear")


@pytest.fixture(scope="module")
def hunyuan() -> HunyuanImageTransformer:
    model = HunyuanImageTransformer(HUNYUAN_IMAGE).requires_grad_(False)
    fill_randomly(model, 1, "lora")
    return model


def given_words(value: object) -> str:
    """A test's name by the arguments that are given; names of modules have no order."""
    is_given = isinstance(value, dict) and all(isinstance(word, str) for word in value.values())
    return " ".join(f"{name}={word}" for name, word in value.items()) if is_given else "modules"  # type: ignore[attr-defined]


def ranks(model: nn.Module, dim: int = 4, **arguments: str) -> dict[str, int]:
    """Rank by name without its prefix."""
    network = lora_hunyuan_image.create_network(1.0, dim, 1.0, None, [None, None], model, **arguments)
    return {lora.lora_name.removeprefix("lora_unet_"): lora.lora_dim for lora in network.loras}


def block_names(kind: str, *numbers: int) -> set[str]:
    """The modules of blocks of a kind."""
    parts = {"double": DOUBLE, "single": SINGLE}[kind]
    return {f"{kind}_blocks_{number}_{part}" for number in numbers for part in parts}


EVERY = block_names("double", 0, 1) | block_names("single", 0, 1)


def velocity(model: HunyuanImageTransformer) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(HUNYUAN_IMAGE, (5, 8), (3, 0)))


def test_a_saved_file_has_the_keys_shapes_and_dtypes_of_the_reference(hunyuan, tmp_path):
    network = lora_hunyuan_image.create_network(1.0, 4, 2.0, None, [None, None], hunyuan)
    network.save_weights(tmp_path / "lora.safetensors", None, {})
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        found = {key: [part.get_shape(), part.get_dtype()] for key, part in slices.items()}
    assert found == json.loads(REFERENCE.read_text(encoding="utf-8"))


def test_the_published_model_has_320_modules_in_its_blocks_and_none_elsewhere():
    with on_meta():
        model = HunyuanImageTransformer(HunyuanImageConfig())
    network = lora_hunyuan_image.create_network(1.0, 1, 1.0, None, [None, None], model)
    assert len(network.unet_loras) == 20 * 10 + 40 * 3 and not network.text_encoder_loras
    assert sum(parameter.numel() for parameter in network.parameters()) == 5_877_760
    assert network.lora_unet_single_blocks_39_linear1.lora_up.weight.shape == (7 * 3584, 1)
    assert lora_hunyuan_image.TRAINS_TEXT_ENCODERS is oft_hunyuan_image.TRAINS_TEXT_ENCODERS is False


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ({}, EVERY),
        ({"train_blocks": "double"}, block_names("double", 0, 1)),
        ({"train_blocks": "single"}, block_names("single", 0, 1)),
        ({"train_double_block_indices": "1"}, block_names("double", 1) | block_names("single", 0, 1)),
        ({"train_single_block_indices": "none"}, block_names("double", 0, 1)),
        (
            {"train_double_block_indices": "0", "train_single_block_indices": "0-1", "network_reg_dims": "blocks_1=9"},
            block_names("double", 0) | block_names("single", 0, 1),
        ),
    ],
    ids=given_words,
)
def test_block_selection(hunyuan, arguments, kept):
    assert set(ranks(hunyuan, **arguments)) == kept


def test_the_last_pattern_that_matches_gives_rank_and_rate(hunyuan):
    found = ranks(hunyuan, network_reg_dims=r"attn=2,img_attn_qkv=8,linear\d=0")
    assert found == {
        name: 8 if "img_attn_qkv" in name else 2 if "attn" in name else 4
        for name in EVERY
        if not name.endswith(("linear1", "linear2"))
    }
    network = lora_hunyuan_image.create_network(
        1.0, 4, 1.0, None, None, hunyuan, network_reg_lrs="double=1e-2,double_blocks_1=0", loraplus_lr_ratio="4"
    )
    groups, labels = network.prepare_optimizer_params_with_multiple_te_lrs([1e-3], 1e-4, 1e-5)
    rates = dict(zip(labels, (group["lr"] for group in groups)))
    assert rates == {"unet": 1e-4, "unet plus": 4e-4, "unet reg_lr_0": 1e-2, "unet reg_lr_0 plus": 4e-2}


@pytest.mark.parametrize(
    ("name", "rows"),
    [("double_blocks_0_txt_attn_qkv", [64, 64, 64]), ("single_blocks_1_linear1", [64, 64, 64, 256])],
)
def test_split_parts_have_ranks_of_their_own_and_the_file_their_strength(hunyuan, tmp_path, name, rows):
    """As a pair for each part; joined in the file, whose alpha is raised with the rank."""
    network = lora_hunyuan_image.create_network(1.0, 2, 1.0, None, None, hunyuan, split_qkv="True")
    assert [part.weight.shape[0] for part in getattr(network, f"lora_unet_{name}").lora_up] == rows
    randomise(network)
    plain = velocity(hunyuan)
    network.apply_to(None, hunyuan, False, True)
    trained = velocity(hunyuan)
    network.remove()
    path = tmp_path / "split.safetensors"
    network.save_weights(path, None, {})
    tensors, parts = load_file(path), len(rows)
    assert tensors[f"lora_unet_{name}.alpha"] == parts
    assert tensors[f"lora_unet_{name}.lora_down.weight"].shape == (2 * parts, 64)
    for part, up in enumerate(tensors[f"lora_unet_{name}.lora_up.weight"].split(rows)):
        assert not up[:, [column for column in range(2 * parts) if column // 2 != part]].any()
    assert metadata(path)["ss_network_split_qkv"] == "alpha_times_parts"
    loaded, _ = lora_hunyuan_image.create_network_from_weights(1.0, path, None, None, hunyuan, for_inference=True)
    loaded.apply_to(None, hunyuan, False, True)
    torch.testing.assert_close(velocity(hunyuan), trained, rtol=1e-4, atol=1e-5)
    loaded.remove()
    assert (trained - plain).abs().max() > 0.02


# ---- other programs' names -------------------------------------------------------------------------------------------

# Layer of the original transformer -> its path in ComfyUI, its parts in Tencent's code, its parts in diffusers.
PATHS = {
    "double_blocks.1.img_attn_qkv": ("double_blocks.1.img_attn.qkv", [f"double_blocks.1.img_attn_{p}" for p in "qkv"],
                                     [f"transformer_blocks.1.attn.to_{p}" for p in "qkv"]),
    "double_blocks.0.txt_attn_qkv": ("double_blocks.0.txt_attn.qkv", [f"double_blocks.0.txt_attn_{p}" for p in "qkv"],
                                     [f"transformer_blocks.0.attn.add_{p}_proj" for p in "qkv"]),
    "double_blocks.0.img_attn_proj": ("double_blocks.0.img_attn.proj", None, ["transformer_blocks.0.attn.to_out.0"]),
    "double_blocks.0.txt_attn_proj": ("double_blocks.0.txt_attn.proj", None, ["transformer_blocks.0.attn.to_add_out"]),
    "double_blocks.1.img_mlp.fc1": ("double_blocks.1.img_mlp.0", None, ["transformer_blocks.1.ff.net.0.proj"]),
    "double_blocks.1.img_mlp.fc2": ("double_blocks.1.img_mlp.2", None, ["transformer_blocks.1.ff.net.2"]),
    "double_blocks.1.txt_mlp.fc1": ("double_blocks.1.txt_mlp.0", None, ["transformer_blocks.1.ff_context.net.0.proj"]),
    "double_blocks.1.txt_mlp.fc2": ("double_blocks.1.txt_mlp.2", None, ["transformer_blocks.1.ff_context.net.2"]),
    "double_blocks.1.img_mod.linear": ("double_blocks.1.img_mod.lin", None, ["transformer_blocks.1.norm1.linear"]),
    "double_blocks.1.txt_mod.linear": ("double_blocks.1.txt_mod.lin", None,
                                       ["transformer_blocks.1.norm1_context.linear"]),
    "single_blocks.1.linear1": ("single_blocks.1.linear1",
                                [f"single_blocks.1.linear1_{p}" for p in ("q", "k", "v", "mlp")],
                                [*(f"single_transformer_blocks.1.attn.to_{p}" for p in "qkv"),
                                 "single_transformer_blocks.1.proj_mlp"]),
    "single_blocks.0.linear2": ("single_blocks.0.linear2", ["single_blocks.0.linear2.fc"],
                                ["single_transformer_blocks.0.proj_out"]),
    "single_blocks.0.modulation.linear": ("single_blocks.0.modulation.lin", None,
                                          ["single_transformer_blocks.0.norm.linear"]),
    "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": (
        "txt_in.individual_token_refiner.blocks.0.self_attn.qkv", None,
        [f"context_embedder.token_refiner.refiner_blocks.0.attn.to_{p}" for p in "qkv"]),
    "txt_in.individual_token_refiner.blocks.0.mlp.fc1": (
        "txt_in.individual_token_refiner.blocks.0.mlp.0", None,
        ["context_embedder.token_refiner.refiner_blocks.0.ff.net.0.proj"]),
    "txt_in.c_embedder.linear_2": ("txt_in.c_embedder.out_layer", None,
                                   ["context_embedder.time_text_embed.text_embedder.linear_2"]),
    "time_in.mlp.0": ("time_in.in_layer", None, ["time_guidance_embed.timestep_embedder.linear_1"]),
    "byt5_in.fc3": ("byt5_in.fc3", None, ["context_embedder_2.linear_3"]),
    "final_layer.linear": ("final_layer.linear", None, ["proj_out"]),
}  # fmt: skip
PLAIN, PEFT = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")
DIALECTS = {  # whose paths, what stands before them, the separator, the names of down and up
    "sd-scripts": ("original", "lora_unet_", "_", PLAIN),
    "sd-scripts converted for ComfyUI": ("comfyui", "lora_unet_", "_", PLAIN),
    "comfyui": ("comfyui", "diffusion_model.", ".", PEFT),
    "diffusion_model of the original": ("original", "diffusion_model.", ".", PEFT),
    "separate q, k, v": ("separate", "diffusion_model.", ".", PEFT),
    "original": ("original", "", ".", PEFT),
    "lycoris": ("original", "lycoris_", "_", PLAIN),
    "diffusers": ("diffusers", "transformer.", ".", PEFT),
    "peft": ("diffusers", "base_model.model.", ".", ("lora_A.default.weight", "lora_B.default.weight")),
    "lycoris of diffusers": ("diffusers", "lycoris_", "_", PLAIN),
    "lora_unet of diffusers": ("diffusers", "lora_unet_", "_", PLAIN),
}


def parts_of(path: str, paths: str) -> list[str]:
    comfyui, separate, diffusers = PATHS[path]
    known = {"comfyui": [comfyui], "separate": separate or [path], "diffusers": diffusers}
    return known.get(paths, [path])


@pytest.mark.parametrize("name", DIALECTS)
def test_networks_read_the_names_of_other_programs(name, hunyuan, messages):
    paths, prefix, separator, (down_key, up_key) = DIALECTS[name]
    random = torch.Generator().manual_seed(6)
    tensors, wanted = {}, {}
    for path in PATHS:
        layer = hunyuan.get_submodule(path)
        down = torch.randn(3, layer.in_features, generator=random)
        up = torch.randn(layer.out_features, 3, generator=random)
        wanted["lora_unet_" + path.replace(".", "_")] = up.double() @ down.double()
        names = parts_of(path, paths)
        pieces = up.split([64, 64, 64, up.shape[0] - 192][: len(names)]) if len(names) > 1 else [up]
        for part, piece in zip(names, pieces):
            module = prefix + part.replace(".", separator)
            tensors |= {f"{module}.{down_key}": down.clone(), f"{module}.{up_key}": piece.clone()}
    network, _ = lora_hunyuan_image.create_network_from_weights(1.0, None, None, None, hunyuan, tensors)
    found = {m.lora_name: m.scale * m.up_matrix.double() @ m.down_matrix.double() for m in network.loras}
    assert_same({key: delta.detach() for key, delta in found.items()}, wanted, 1e-7)
    assert not any("fit no layer" in message for message in messages)


# ---- wrong arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_double_blocks_indices": "1"}, 'Did you mean "train_double_block_indices"'),
        ({"train_t5xxl": "True"}, 'networks.lora_hunyuan_image has no argument "train_t5xxl"'),
        ({"img_attn_dim": "4"}, 'no argument "img_attn_dim"'),
        ({"in_dims": "1,2,3,4,5"}, 'no argument "in_dims"'),
        ({"network_reg_dim": "a=4"}, 'Did you mean "network_reg_dims"'),
        ({"train_blocks": "refiner"}, "one of all, single, double"),
        ({"split_qkv": "yes"}, "True or False"),
        ({"ggpo_beta": "0.01"}, "ggpo_sigma"),
    ],
)
def test_a_wrong_argument_is_refused_before_a_model_is_loaded(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        lora_hunyuan_image.check_network_args(arguments)
    assert "--network_args" in str(error.value) and "\n" not in str(error.value)


def test_blocks_that_the_model_lacks_and_other_models_are_refused(hunyuan, transformer, messages):
    with pytest.raises(UserError, match="train_single_block_indices names block 2, but this model has .* 0 to 1"):
        ranks(hunyuan, train_single_block_indices="1-2")
    with pytest.raises(UserError, match="networks.lora_hunyuan_image does not fit this model: FluxTransformer"):
        ranks(transformer)
    assert set(ranks(hunyuan, conv_dim="4", conv_alpha="1")) == EVERY
    assert any("no wide convolution is trained, so conv_dim, conv_alpha have no effect" in line for line in messages)


# ---- OFT and LyCORIS -------------------------------------------------------------------------------------------------


def test_oft_turns_the_attention_or_every_layer_and_its_file_has_a_tensor_for_each_part(hunyuan, tmp_path, messages):
    attention = oft_hunyuan_image.create_network(1.0, 4, 0.02, None, [None], hunyuan)
    every = oft_hunyuan_image.create_network(1.0, 4, 0.02, None, [None], hunyuan, enable_all_linear="True")
    named = {module.lora_name.removeprefix("oft_unet_") for module in attention.loras}
    assert named == {name for name in EVERY if "_attn_" in name}
    assert {module.lora_name for module in every.loras} == {f"oft_unet_{name}" for name in EVERY}
    randomise(every, 0.3)
    every.save_weights(tmp_path / "oft.safetensors", None, {})
    shapes = {key: list(tensor.shape) for key, tensor in load_file(tmp_path / "oft.safetensors").items()}
    name = "oft_unet_single_blocks_1_linear1.oft_blocks"
    assert [shapes[f"{name}.{part}"] for part in range(4)] == [[4, 16, 16]] * 3 + [[4, 64, 64]]
    assert shapes["oft_unet_double_blocks_0_img_mod_linear.oft_blocks.0"] == [4, 96, 96]
    loaded, _ = oft_hunyuan_image.create_network_from_weights(
        1.0, tmp_path / "oft.safetensors", None, [None], hunyuan, for_inference=True
    )
    plain = velocity(hunyuan)
    every.apply_to(None, hunyuan, False, True)
    turned = velocity(hunyuan)
    every.remove()
    loaded.apply_to(None, hunyuan, False, True)
    assert torch.equal(velocity(hunyuan), turned) and (turned - plain).abs().max() > 0.02
    loaded.remove()
    assert not any("left out" in message for message in messages)


def test_lycoris_finds_the_same_layers(hunyuan):
    package = lycoris_package()
    attention = {name for name in EVERY if "_attn_" in name}
    for preset, wanted in (("full", EVERY), ("attn-mlp", EVERY), ("attn-only", attention), ("full", EVERY)):
        network = package.create_network(1.0, 2, 1.0, None, [], hunyuan, preset=preset)
        assert {lora.lora_name.removeprefix("lora_unet_") for lora in network.loras} == wanted, preset
