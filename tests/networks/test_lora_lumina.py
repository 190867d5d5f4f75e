"""networks.lora_lumina and networks.oft_lumina: modules, ranks and names, from each of their arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from library.errors import UserError
from library.models.gemma2 import Gemma2TextEncoder, gemma2_config
from library.models.loading import on_meta
from library.models.lumina.transformer import LuminaConfig, LuminaTransformer
from networks import lora_lumina, oft_lumina
from networks.adapters.lora_arguments import COMMON_ARGUMENTS
from tests.networks.conftest import randomise
from tests.networks.lora_tool_files import assert_same, deltas, metadata

REFERENCE = Path(__file__).parent.parent / "reference_data" / "lora_lumina_keys.json"
# The sizes of the model whose file is the reference.
SIZES = LuminaConfig(
    dim=64, heads=4, kv_heads=2, head_dim=16, layers=2, refiner_layers=2, ffn_dim=256, text_dim=32, time_dim=64,
    axes_dims=(4, 6, 6),
)  # fmt: skip
GEMMA = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16,
}  # fmt: skip
GEMMA_PARTS = [*(f"self_attn_{part}_proj" for part in "qkvo"), *(f"mlp_{part}_proj" for part in ("gate", "up", "down"))]
LISTS = ("layers", "noise_refiner", "context_refiner")
ATTENTION = ("attention_qkv", "attention_out")
FEED_FORWARD = tuple(f"feed_forward_w{number}" for number in (1, 2, 3))
MODULATION = ("adaLN_modulation_1",)
FINAL = {"final_layer_linear", "final_layer_adaLN_modulation_1"}
EMBEDDERS = ("x_embedder", "t_embedder_mlp_0", "t_embedder_mlp_2", "cap_embedder_1")


@pytest.fixture(scope="module")
def lumina() -> LuminaTransformer:
    torch.manual_seed(0)
    model = LuminaTransformer(SIZES).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def gemma() -> Gemma2TextEncoder:
    return Gemma2TextEncoder(gemma2_config(GEMMA)).requires_grad_(False)


def given_words(value: object) -> str:
    """A test's name by the arguments that are given; names of modules have no order."""
    is_given = isinstance(value, dict) and all(isinstance(word, str) for word in value.values())
    return " ".join(f"{name}={word}" for name, word in value.items()) if is_given else "modules"  # type: ignore[attr-defined]


def ranks(model: nn.Module, gemma: nn.Module | None = None, dim: int = 4, **arguments: str) -> dict[str, int]:
    """Rank by name without the prefix of the transformer's."""
    network = lora_lumina.create_network(1.0, dim, 1.0, None, [gemma], model, **arguments)
    return {lora.lora_name.removeprefix("lora_unet_"): lora.lora_dim for lora in network.loras}


def block_names(*lists: str, parts: tuple[str, ...] = (*ATTENTION, *FEED_FORWARD, *MODULATION)) -> set[str]:
    """The modules of two blocks in each list; those of the caption have no modulation."""
    names = {f"{name}_{number}_{part}" for name in lists or LISTS for number in range(2) for part in parts}
    return {name for name in names if not (name.startswith("context") and name.endswith(MODULATION))}


def test_a_saved_file_has_the_keys_shapes_and_dtypes_of_the_reference(lumina, tmp_path):
    network = lora_lumina.create_network(1.0, 4, 2.0, None, [None], lumina)
    network.save_weights(tmp_path / "lora.safetensors", None, {})
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        found = {key: [part.get_shape(), part.get_dtype()] for key, part in slices.items()}
    assert found == json.loads(REFERENCE.read_text(encoding="utf-8"))


def test_the_published_model_has_180_modules_and_gemma_182():
    with on_meta():
        model = LuminaTransformer(LuminaConfig())
        encoder = Gemma2TextEncoder(gemma2_config({**GEMMA, "num_hidden_layers": 26}))
    network = lora_lumina.create_network(1.0, 1, 1.0, None, [encoder], model, embedder_dims="[1,1,1]")
    assert (len(network.unet_loras), len(network.text_encoder_loras)) == (180 + 4, 182)
    assert network.lora_unet_layers_25_attention_qkv.lora_up.weight.shape == (3840, 1)


def test_every_layer_of_the_blocks_and_of_gemma(lumina, gemma):
    found = ranks(lumina, gemma)
    text = {f"lora_te_layers_{number}_{part}" for number in range(2) for part in GEMMA_PARTS}
    assert found == dict.fromkeys(block_names() | FINAL | text, 4)


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ({"attn_dim": "9"}, dict.fromkeys(block_names(parts=ATTENTION), 9)),
        ({"mlp_dim": "9"}, dict.fromkeys(block_names(parts=FEED_FORWARD), 9)),
        ({"mod_dim": "9"}, dict.fromkeys(block_names(parts=MODULATION) | {"final_layer_adaLN_modulation_1"}, 9)),
        ({"refiner_dim": "9"}, dict.fromkeys(block_names("noise_refiner", "context_refiner"), 9)),
        (
            {"refiner_dim": "9", "attn_dim": "7", "mod_dim": "0"},
            {
                **dict.fromkeys(block_names("noise_refiner", "context_refiner"), 9),
                **dict.fromkeys(block_names(parts=ATTENTION), 7),
                **dict.fromkeys(block_names(parts=MODULATION) | {"final_layer_adaLN_modulation_1"}, 0),
            },
        ),
        ({"embedder_dims": "[5,6,7]"}, dict(zip(EMBEDDERS, (5, 6, 6, 7)))),
        ({"embedder_dims": "5, 0, 7"}, dict(zip(EMBEDDERS, (5, 0, 0, 7)))),
        ({"embedder_dims": "1,1,1", "mlp_dim": "0"}, {**dict.fromkeys(block_names(parts=FEED_FORWARD), 0),
                                                      **dict.fromkeys(EMBEDDERS, 1)}),
        (
            {"attn_dim": "0", "network_reg_dims": r"layers_1=8,layers_\d_attention_qkv=6,final_layer=0"},
            {
                **dict.fromkeys(block_names(parts=ATTENTION), 0),
                **{f"layers_1_{part}": 8 for part in (*ATTENTION, *FEED_FORWARD, *MODULATION)},
                **{f"layers_{number}_attention_qkv": 6 for number in range(2)},
                **dict.fromkeys(FINAL, 0),
            },
        ),
    ],
    ids=given_words,
)  # fmt: skip
def test_ranks(lumina, arguments, changed):
    """0 leaves a module out; of several rules for a module the first counts, then the last pattern."""
    wanted = {**dict.fromkeys(block_names() | FINAL, 4), **changed}
    assert ranks(lumina, **arguments) == {name: rank for name, rank in wanted.items() if rank}


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ({"train_blocks": "all"}, block_names() | FINAL),
        ({"train_blocks": "transformer"}, block_names("layers")),
        ({"train_blocks": "refiners"}, block_names("noise_refiner", "context_refiner")),
        ({"train_blocks": "noise_refiner"}, block_names("noise_refiner")),
        ({"train_blocks": "context_refiner"}, block_names("context_refiner")),
        (
            {"train_transformer_block_indices": "1"},
            {name for name in block_names() | FINAL if not name.startswith("layers_0")},
        ),
        ({"train_transformer_block_indices": "none"}, block_names("noise_refiner", "context_refiner") | FINAL),
        (
            {"train_blocks": "transformer", "train_transformer_block_indices": "0-0"},
            {name for name in block_names("layers") if name.startswith("layers_0")},
        ),
    ],
    ids=given_words,
)
def test_block_selection(lumina, arguments, kept):
    assert set(ranks(lumina, **arguments)) == kept


def test_patterns_and_rates_reach_gemma(lumina, gemma):
    network = lora_lumina.create_network(
        1.0, 4, 1.0, None, [gemma], lumina, network_reg_dims=r"lora_te_.*_mlp_=0,_self_attn_q=2",
        network_reg_lrs="layers_0=1e-2,final=0", loraplus_unet_lr_ratio="4",
    )  # fmt: skip
    assert {lora.lora_dim for lora in network.text_encoder_loras} == {2, 4} and len(network.text_encoder_loras) == 8
    groups, labels = network.prepare_optimizer_params_with_multiple_te_lrs([1e-3], 1e-4, 1e-5)
    rates = dict(zip(labels, (group["lr"] for group in groups)))
    assert rates == {
        "textencoder reg_lr_0": 1e-2, "textencoder": 1e-3, "unet": 1e-4, "unet plus": 4e-4,
        "unet reg_lr_0": 1e-2, "unet reg_lr_0 plus": 4e-2,
    }  # fmt: skip
    assert not network.lora_unet_final_layer_linear.lora_up.weight.requires_grad


def test_gemma_is_dropped_from_the_file_when_it_is_not_applied(lumina, gemma, tmp_path):
    network = lora_lumina.create_network(1.0, 4, 1.0, None, [gemma], lumina)
    assert len(network.text_encoder_loras) == 14
    network.apply_to([gemma], lumina, False, True)
    network.remove()
    network.save_weights(tmp_path / "lora.safetensors", None, {})
    assert all(key.startswith("lora_unet_") for key in load_file(tmp_path / "lora.safetensors"))


def outputs(model: LuminaTransformer) -> torch.Tensor:
    random = torch.Generator().manual_seed(5)
    latents, text = torch.randn(2, 16, 4, 6, generator=random), torch.randn(2, 5, 32, generator=random)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        return model(latents, torch.tensor([0.2, 0.7]), text, mask)


def test_split_parts_have_ranks_of_their_own_and_the_file_their_strength(lumina, tmp_path):
    """As three pairs on the rows of q, k and v; joined in the file, whose alpha is raised with the rank."""
    network = lora_lumina.create_network(1.0, 2, 1.0, None, [None], lumina, split_qkv="True")
    lora = network.lora_unet_layers_0_attention_qkv
    assert [part.weight.shape[0] for part in lora.lora_up] == [64, 32, 32]
    randomise(network)
    plain = outputs(lumina)
    network.apply_to(None, lumina, False, True)
    trained = outputs(lumina)
    network.remove()
    network.save_weights(tmp_path / "split.safetensors", None, {})
    tensors = load_file(tmp_path / "split.safetensors")
    name = "lora_unet_layers_0_attention_qkv"
    assert tensors[f"{name}.alpha"] == 3 and tensors[f"{name}.lora_down.weight"].shape == (6, 64)
    rows = tensors[f"{name}.lora_up.weight"].split([64, 32, 32])
    assert all(not part[:, [c for c in range(6) if c // 2 != i]].any() for i, part in enumerate(rows))
    assert tensors["lora_unet_layers_0_attention_out.alpha"] == 1
    assert metadata(tmp_path / "split.safetensors")["ss_network_split_qkv"] == "alpha_times_parts"
    loaded, _ = lora_lumina.create_network_from_weights(
        1.0, tmp_path / "split.safetensors", None, [None], lumina, for_inference=True
    )
    loaded.apply_to(None, lumina, False, True)
    torch.testing.assert_close(outputs(lumina), trained, rtol=1e-5, atol=1e-6)
    loaded.remove()
    assert (trained - plain).abs().max() > 0.02


def test_a_file_brings_back_its_modules_and_ranks_embedders_too(lumina, gemma, tmp_path):
    arguments = {"attn_dim": "2", "mod_dim": "0", "embedder_dims": "1,2,3", "train_transformer_block_indices": "1"}
    network = lora_lumina.create_network(1.0, 4, 2.0, None, [gemma], lumina, **arguments)
    randomise(network)
    path = tmp_path / "lora.safetensors"
    network.save_weights(path, None, {})
    loaded, tensors = lora_lumina.create_network_from_weights(1.0, path, None, [gemma], lumina)
    assert {m.lora_name: m.lora_dim for m in loaded.loras} == {m.lora_name: m.lora_dim for m in network.loras}
    assert all(torch.equal(tensors[key], tensor) for key, tensor in load_file(path).items())
    network.apply_to([gemma], lumina)
    applied = outputs(lumina)
    network.remove()
    states = {key: value.clone() for key, value in lumina.state_dict().items()}
    loaded.merge_to([None], lumina)
    torch.testing.assert_close(outputs(lumina), applied, rtol=1e-4, atol=1e-5)
    lumina.load_state_dict(states)


# ---- other programs' names -------------------------------------------------------------------------------------------

PARTS = {  # layer of the original transformer -> its parts in diffusers, written down from its class
    "layers.1.attention.qkv": [f"layers.1.attn.to_{part}" for part in "qkv"],
    "layers.1.attention.out": ["layers.1.attn.to_out.0"],
    "layers.0.feed_forward.w1": ["layers.0.feed_forward.linear_1"],
    "noise_refiner.1.feed_forward.w2": ["noise_refiner.1.feed_forward.linear_2"],
    "context_refiner.0.feed_forward.w3": ["context_refiner.0.feed_forward.linear_3"],
    "context_refiner.1.attention.qkv": [f"context_refiner.1.attn.to_{part}" for part in "qkv"],
    "noise_refiner.0.adaLN_modulation.1": ["noise_refiner.0.norm1.linear"],
    "final_layer.linear": ["norm_out.linear_2"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear_1"],
    "x_embedder": ["x_embedder"],
    "t_embedder.mlp.0": ["time_caption_embed.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["time_caption_embed.timestep_embedder.linear_2"],
    "cap_embedder.1": ["time_caption_embed.caption_embedder.1"],
}
TEXT = "layers.1.self_attn.o_proj"
DIALECTS = {  # what stands before a layer's path, the separator, the names of down and up, Gemma's; and whose paths
    "comfyui": ("diffusion_model.", ".", "lora_down.weight", "lora_up.weight",
                "text_encoders.gemma2_2b.transformer.model.", "original"),
    "comfyui with lora_A": ("diffusion_model.", ".", "lora_A.weight", "lora_B.weight", None, "original"),
    "original": ("", ".", "lora_A.weight", "lora_B.weight", None, "original"),
    "lycoris": ("lycoris_", "_", "lora_down.weight", "lora_up.weight", None, "original"),
    "lycoris in kohya's names": ("lora_unet_", "_", "lora_down.weight", "lora_up.weight", "lora_te1_", "original"),
    "diffusers": ("transformer.", ".", "lora_A.weight", "lora_B.weight", "text_encoder.", "diffusers"),
    "peft": ("base_model.model.", ".", "lora_A.default.weight", "lora_B.default.weight", None, "diffusers"),
    "peft in diffusers": ("transformer.base_model.model.", ".", "lora_A.a.weight", "lora_B.a.weight",
                          "text_encoder.base_model.model.", "diffusers"),
    "lora_unet": ("lora_unet_", "_", "lora_down.weight", "lora_up.weight", None, "diffusers"),
    "lycoris of diffusers": ("lycoris_", "_", "lora_down.weight", "lora_up.weight", None, "diffusers"),
    "diffusion_model of diffusers": ("diffusion_model.", ".", "lora_A.weight", "lora_B.weight", None, "diffusers"),
}  # fmt: skip


@pytest.mark.parametrize("name", DIALECTS)
def test_networks_read_the_names_of_other_programs(name, lumina, gemma, messages):
    prefix, separator, down_key, up_key, text_prefix, paths = DIALECTS[name]
    random = torch.Generator().manual_seed(6)
    tensors, wanted = {}, {}
    for path, parts in [*PARTS.items(), *([(TEXT, [])] if text_prefix else [])]:
        layer = (gemma if path == TEXT else lumina).get_submodule(path)
        down = torch.randn(3, layer.in_features, generator=random)
        up = torch.randn(layer.out_features, 3, generator=random)
        own = f"{'lora_te' if path == TEXT else 'lora_unet'}_{path.replace('.', '_')}"
        wanted[own] = up.double() @ down.double()
        names = parts if paths == "diffusers" and parts else [path]
        pieces = up.split([64, 32, 32]) if len(names) == 3 else [up]
        for part, piece in zip(names, pieces):
            module = (text_prefix if path == TEXT else prefix) + part.replace(".", separator)
            tensors |= {f"{module}.{down_key}": down.clone(), f"{module}.{up_key}": piece.clone()}
    network, _ = lora_lumina.create_network_from_weights(1.0, None, None, [gemma], lumina, tensors)
    found = {m.lora_name: m.scale * m.up_matrix.double() @ m.down_matrix.double() for m in network.loras}
    assert_same({key: delta.detach() for key, delta in found.items()}, wanted, 1e-7)
    assert not any("fit no layer" in message for message in messages)


def test_comfyui_maps_every_name(lumina, tmp_path):
    """Its rule, written down: ``lora_unet_`` and the path of any weight below diffusion_model, with underscores."""
    key_map = {
        "lora_unet_" + key.removesuffix(".weight").replace(".", "_"): f"diffusion_model.{key}"
        for key in lumina.state_dict()
        if key.endswith(".weight")
    }
    network = lora_lumina.create_network(1.0, 4, 2.0, None, [None], lumina, embedder_dims="1,2,3", split_qkv="True")
    network.save_weights(tmp_path / "lora.safetensors", None, {})
    for name, delta in deltas(tmp_path / "lora.safetensors").items():
        key = key_map[name].removeprefix("diffusion_model.")
        assert lumina.state_dict()[key].shape == delta.shape


# ---- wrong arguments -------------------------------------------------------------------------------------------------


def test_the_arguments_are_these():
    assert set(lora_lumina.NETWORK.arguments) == {
        *("attn_dim", "mlp_dim", "mod_dim", "refiner_dim", "embedder_dims", "train_blocks"),
        "train_transformer_block_indices",
    }
    shared = {"split_qkv", "verbose", "rank_dropout", "module_dropout", "loraplus_lr_ratio", "network_reg_dims"}
    assert {*shared, "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio", "ggpo_sigma"} <= set(COMMON_ARGUMENTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"atn_dim": "4"}, 'Did you mean "attn_dim"'),
        ({"in_dims": "1,2,3"}, 'networks.lora_lumina has no argument "in_dims"'),
        ({"train_double_block_indices": "1"}, 'Did you mean "train_transformer_block_indices"'),
        ({"mlp_dim": "4.5"}, "whole number"),
        ({"refiner_dim": "-1"}, "0 or more"),
        ({"embedder_dims": "1,2"}, r"3 whole numbers separated by commas \(x_embedder, t_embedder, cap_embedder\)"),
        ({"train_blocks": "double"}, "one of all, transformer, refiners, noise_refiner, context_refiner"),
        ({"split_qkv": "yes"}, "True or False"),
        ({"network_reg_lrs": "layers"}, "pattern=number"),
        ({"ggpo_beta": "0.01"}, "ggpo_sigma"),
    ],
)
def test_a_wrong_argument_is_refused_before_a_model_is_loaded(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        lora_lumina.check_network_args(arguments)
    assert "--network_args" in str(error.value) and "\n" not in str(error.value)


def test_block_numbers_that_the_model_lacks_and_other_models_are_refused(lumina, transformer):
    with pytest.raises(UserError, match="train_transformer_block_indices names block 2, but this model has .* 0 to 1"):
        ranks(lumina, train_transformer_block_indices="1-2")
    with pytest.raises(UserError, match="no module to train"):
        ranks(lumina, train_blocks="transformer", train_transformer_block_indices="none")
    with pytest.raises(UserError, match="networks.lora_lumina does not fit this model: FluxTransformer"):
        ranks(transformer)


# ---- OFT -------------------------------------------------------------------------------------------------------------


def test_oft_turns_the_attention_or_every_layer_and_its_file_has_a_tensor_for_each_part(lumina, tmp_path, messages):
    attention = oft_lumina.create_network(1.0, 4, 0.02, None, [None], lumina)
    every = oft_lumina.create_network(1.0, 4, 0.02, None, [None], lumina, enable_all_linear="True")
    assert {module.lora_name for module in attention.loras} == {f"oft_unet_{n}" for n in block_names(parts=ATTENTION)}
    assert {module.lora_name for module in every.loras} == {f"oft_unet_{name}" for name in block_names() | FINAL}
    randomise(every, 0.3)
    every.save_weights(tmp_path / "oft.safetensors", None, {})
    shapes = {key: list(tensor.shape) for key, tensor in load_file(tmp_path / "oft.safetensors").items()}
    name = "oft_unet_noise_refiner_1_attention_qkv.oft_blocks"
    assert [shapes[f"{name}.{part}"] for part in range(3)] == [[4, 16, 16], [4, 8, 8], [4, 8, 8]]
    assert shapes["oft_unet_layers_0_adaLN_modulation_1.oft_blocks.0"] == [4, 64, 64]
    loaded, _ = oft_lumina.create_network_from_weights(
        1.0, tmp_path / "oft.safetensors", None, [None], lumina, for_inference=True
    )
    plain = outputs(lumina)
    every.apply_to(None, lumina, False, True)
    turned = outputs(lumina)
    every.remove()
    loaded.apply_to(None, lumina, False, True)
    assert torch.equal(outputs(lumina), turned) and (turned - plain).abs().max() > 0.02
    loaded.remove()
    states = {key: value.clone() for key, value in lumina.state_dict().items()}
    loaded.merge_to(None, lumina)
    torch.testing.assert_close(outputs(lumina), turned, rtol=1e-4, atol=1e-5)
    lumina.load_state_dict(states)
    assert not any("left out" in message for message in messages)
