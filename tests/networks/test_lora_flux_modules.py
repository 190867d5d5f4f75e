"""Which modules a FLUX network has, with which rank, from each of its arguments."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.models.flux.transformer import FluxTransformer
from networks import lora_flux
from networks.adapters.lora_targets import parse_indices

REFERENCE = Path(__file__).parent.parent / "reference_data" / "lora_flux_keys.json"
DOUBLE = ["mod_lin", "attn_qkv", "attn_proj", "mlp_0", "mlp_2"]
SINGLE = ["linear1", "linear2", "modulation_lin"]


def ranks(transformer: nn.Module, text_encoders=(None, None), dim=4, **arguments) -> dict[str, int]:
    """Rank by name without the prefix."""
    network = lora_flux.create_network(1.0, dim, 1.0, None, list(text_encoders), transformer, **arguments)
    return {lora.lora_name.removeprefix("lora_unet_"): lora.lora_dim for lora in network.loras}


def test_a_saved_file_has_the_keys_shapes_and_dtypes_of_the_reference(transformer, tmp_path):
    from safetensors import safe_open

    network = lora_flux.create_network(1.0, 4, 2.0, None, [None, None], transformer)
    network.apply_to(None, transformer, False, True)
    network.save_weights(tmp_path / "lora.safetensors", None, {})
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        found = {key: [part.get_shape(), part.get_dtype()] for key, part in slices.items()}
    assert found == json.loads(REFERENCE.read_text(encoding="utf-8"))


def test_every_linear_of_the_blocks_is_a_target_and_nothing_else(transformer):
    names = [f"double_blocks_{i}_{s}_{part}" for i in range(2) for s in ("img", "txt") for part in DOUBLE]
    names += [f"single_blocks_{i}_{part}" for i in range(2) for part in SINGLE]
    assert ranks(transformer) == dict.fromkeys(names, 4)


def test_text_encoder_modules_have_the_names_that_other_programs_know(transformer, clip, t5):
    found = set(ranks(transformer, (clip, t5), train_t5xxl="True"))
    clip_parts = [f"self_attn_{p}_proj" for p in "qkv"] + ["self_attn_out_proj", "mlp_fc1", "mlp_fc2"]
    t5_parts = [f"layer_0_SelfAttention_{p}" for p in "qkvo"]
    t5_parts += [f"layer_1_DenseReluDense_{p}" for p in ("wi_0", "wi_1", "wo")]
    expected = {f"lora_te1_text_model_encoder_layers_{i}_{part}" for i in range(2) for part in clip_parts}
    expected |= {f"lora_te3_encoder_block_{i}_{part}" for i in range(2) for part in t5_parts}
    assert {name for name in found if name.startswith("lora_te")} == expected


@pytest.mark.parametrize("attributes", [["text_model"], ["model", "text_model"], ["clip"]])
def test_names_do_not_depend_on_how_a_text_encoder_is_wrapped(transformer, clip, t5, attributes):
    plain = set(ranks(transformer, (clip, t5), train_t5xxl="True"))
    wrapped = []
    for encoder in (clip, t5):
        for attribute in reversed(attributes):
            outer = nn.Module()
            outer.add_module(attribute, encoder)
            encoder = outer
        wrapped.append(encoder)
    assert set(ranks(transformer, wrapped, train_t5xxl="True")) == plain


def test_the_suites_own_text_encoders_have_these_names(transformer, clip, t5):
    from library.models.clip import ClipTextEncoder
    from library.models.t5 import T5TextEncoder

    own = (ClipTextEncoder(clip.config), T5TextEncoder(t5.config))
    assert set(ranks(transformer, own, train_t5xxl="True")) == set(ranks(transformer, (clip, t5), train_t5xxl="True"))


def test_t5_is_trained_only_on_request(transformer, clip, t5):
    network = lora_flux.create_network(1.0, 4, 1.0, None, [clip, t5], transformer)
    assert len(network.text_encoder_loras) == 12 and not network.train_t5xxl
    network = lora_flux.create_network(1.0, 4, 1.0, None, [clip, t5], transformer, train_t5xxl="True")
    assert len(network.text_encoder_loras) == 12 + 14 and network.train_t5xxl
    network = lora_flux.create_network(1.0, 4, 1.0, None, [None, t5], transformer, train_t5xxl="True")
    assert len(network.text_encoder_loras) == 14


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("img_attn_dim", ["img_attn_qkv", "img_attn_proj"]),
        ("txt_attn_dim", ["txt_attn_qkv", "txt_attn_proj"]),
        ("img_mlp_dim", ["img_mlp_0", "img_mlp_2"]),
        ("txt_mlp_dim", ["txt_mlp_0", "txt_mlp_2"]),
        ("img_mod_dim", ["img_mod_lin"]),
        ("txt_mod_dim", ["txt_mod_lin"]),
        ("single_dim", ["linear1", "linear2"]),
        ("single_mod_dim", ["modulation_lin"]),
    ],
)
def test_a_layer_rank_applies_to_its_layers_only_and_zero_leaves_them_out(transformer, argument, parts):
    everything = ranks(transformer)
    chosen = {name for name in everything if name.endswith(tuple(parts))}
    assert chosen
    assert ranks(transformer, **{argument: "9"}) == {name: 9 if name in chosen else 4 for name in everything}
    assert ranks(transformer, **{argument: "0"}) == {name: 4 for name in everything if name not in chosen}


def test_in_dims_adds_conditioning_layers(transformer):
    added = {name: rank for name, rank in ranks(transformer, in_dims="[5,2,0,3,6]").items() if "blocks" not in name}
    assert added == {
        "img_in": 5, "time_in_in_layer": 2, "time_in_out_layer": 2,
        "guidance_in_in_layer": 3, "guidance_in_out_layer": 3, "txt_in": 6,
    }  # fmt: skip
    assert ranks(transformer, in_dims="5,2,0,3,6") == ranks(transformer, in_dims="[5, 2, 0, 3, 6]")


def test_in_dims_skips_layers_that_the_model_lacks(transformer):
    schnell = FluxTransformer(replace(transformer.config, guidance_embed=False))
    assert "guidance_in_in_layer" not in ranks(schnell, in_dims="2,2,2,2,2")


def blocks(found: dict[str, int]) -> set[str]:
    return {name.split("_")[0] + name.split("_")[2] for name in found}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"double0", "double1", "single0", "single1"}),
        ({"train_blocks": "single"}, {"single0", "single1"}),
        ({"train_blocks": "double"}, {"double0", "double1"}),
        ({"train_double_block_indices": "1"}, {"double1", "single0", "single1"}),
        ({"train_double_block_indices": "none"}, {"single0", "single1"}),
        ({"train_double_block_indices": ""}, {"single0", "single1"}),
        ({"train_double_block_indices": "all", "train_single_block_indices": "0-1"}, None),
        ({"train_double_block_indices": "none", "train_single_block_indices": "0"}, {"single0"}),
        ({"train_blocks": "double", "train_single_block_indices": "0"}, {"double0", "double1"}),
    ],
)
def test_block_selection(transformer, arguments, expected):
    assert blocks(ranks(transformer, **arguments)) == (expected or {"double0", "double1", "single0", "single1"})


def test_block_numbers_as_in_the_guide():
    assert parse_indices("0,1,5,8", 19, "a") == {0, 1, 5, 8}
    assert parse_indices("0,1,4-5,7", 19, "a") == {0, 1, 4, 5, 7}
    assert parse_indices("3,10,20-25,37", 38, "a") == {3, 10, 20, 21, 22, 23, 24, 25, 37}
    assert parse_indices("all", 3, "a") == {0, 1, 2}
    assert parse_indices("none", 3, "a") == parse_indices("", 3, "a") == set()


@pytest.mark.parametrize("text", ["2", "0-2", "1-0", "x", "0,,1", "-1", "1.5"])
def test_wrong_block_numbers_are_refused_with_the_models_own_range(transformer, text):
    with pytest.raises(UserError, match="train_single_block_indices"):
        ranks(transformer, train_single_block_indices=text)
    with pytest.raises(UserError, match="0 to 1"):
        ranks(transformer, train_single_block_indices="2")


def test_the_last_matching_pattern_gives_the_rank(transformer):
    found = ranks(transformer, network_reg_dims="double_blocks=7,img_attn=8,attn_qkv=9,txt_mod=0")
    assert found["double_blocks_0_img_mlp_0"] == 7
    assert found["double_blocks_0_img_attn_proj"] == 8
    assert found["double_blocks_1_img_attn_qkv"] == 9
    assert found["double_blocks_0_txt_attn_qkv"] == 9
    assert found["single_blocks_0_linear1"] == 4
    assert "double_blocks_0_txt_mod_lin" not in found


def test_a_pattern_wins_over_a_layer_rank_but_not_over_block_selection(transformer):
    found = ranks(
        transformer,
        single_mod_dim="0",
        train_double_block_indices="0",
        network_reg_dims=r"single.*_modulation.*=6,img_attn=8",
    )
    assert found["single_blocks_0_modulation_lin"] == 6
    assert found["double_blocks_0_img_attn_qkv"] == 8
    assert "double1" not in blocks(found)


def test_patterns_reach_text_encoders_and_in_layers(transformer, clip):
    found = ranks(transformer, (clip, None), in_dims="1,0,0,0,0", network_reg_dims=r"te1_.*_fc\d=3,img_in=5")
    assert found["lora_te1_text_model_encoder_layers_0_mlp_fc1"] == 3
    assert found["lora_te1_text_model_encoder_layers_0_self_attn_q_proj"] == 4
    assert found["img_in"] == 5


def test_patterns_may_hold_commas_and_equals_signs(transformer):
    found = ranks(transformer, network_reg_dims=r"single_blocks_\d{1,2}_(?=linear)=6, img_mod=7")
    assert found["single_blocks_1_linear2"] == 6
    assert found["single_blocks_1_modulation_lin"] == 4
    assert found["double_blocks_1_img_mod_lin"] == 7


def test_an_alpha_of_zero_means_the_rank(transformer):
    for dim, alpha, expected in ((4, 1.0, 0.25), (4, 0, 1.0), (8, None, 0.125), (None, None, 0.25)):
        network = lora_flux.create_network(1.0, dim, alpha, None, [None, None], transformer)
        assert {lora.scale for lora in network.loras} == {expected}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_atn_dim": "4"}, 'Did you mean "img_attn_dim"'),
        ({"block_dims": "4"}, 'has no argument "block_dims"'),
        ({"zzzzzz": "4"}, "train_blocks"),
        ({"img_attn_dim": "4.5"}, "whole number"),
        ({"img_attn_dim": "-1"}, "0 or more"),
        ({"in_dims": "1,2,3"}, "5 whole numbers"),
        ({"train_blocks": "both"}, "all, single, double"),
        ({"split_qkv": "yes"}, "True or False"),
        ({"train_t5xxl": "1"}, "True or False"),
        ({"rank_dropout": "1"}, "below 1"),
        ({"module_dropout": "nan"}, "a number"),
        ({"network_reg_dims": "img_attn"}, "pattern=number"),
        ({"network_reg_dims": "img_(attn=4"}, "not a regular expression"),
        ({"network_reg_dims": "img=1e-3"}, "whole number"),
        ({"network_reg_lrs": "img=4,txt=x"}, "txt=x"),
        ({"ggpo_sigma": "0.03"}, "ggpo_beta"),
        ({"train_blocks": "double", "train_double_block_indices": "none"}, "no module to train"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_sentence(transformer, arguments, message):
    with pytest.raises(UserError) as error:
        ranks(transformer, **arguments)
    assert message in str(error.value)
    assert "--network_args" in str(error.value) and "\n" not in str(error.value)


def test_wrong_ranks_and_models_are_refused(transformer, clip):
    with pytest.raises(UserError, match="--network_dim"):
        ranks(transformer, dim=0)
    with pytest.raises(UserError, match="--network_dropout"):
        ranks(transformer, neuron_dropout=1.0)
    with pytest.raises(UserError, match="does not fit this model"):
        ranks(clip)


def test_arguments_of_other_programs_habit_are_accepted(transformer):
    """Trainers pass ``dropout`` beside ``neuron_dropout``; FLUX has no convolutions, but conv_dim is often given."""
    network = lora_flux.create_network(
        1.0, 4, 1.0, None, [None, None], transformer, neuron_dropout=None, dropout="0.25", conv_dim="4", conv_alpha="1"
    )
    assert {lora.regularisation.dropout for lora in network.loras} == {0.25}


def test_initial_weights_follow_torchs_global_generator(transformer):
    def made(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return lora_flux.create_network(1.0, 4, 1.0, None, [None, None], transformer).state_dict()

    first, again, other = made(5), made(5), made(6)
    assert all(torch.equal(first[key], again[key]) for key in first)
    key = "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"
    assert not torch.equal(first[key], other[key])
    bound = 1 / 64**0.5  # Kaiming uniform with a = sqrt(5)
    values = torch.cat([value.flatten() for name, value in first.items() if "down" in name and value.shape[1] == 64])
    assert values.abs().max() <= bound
    assert abs(values.std().item() - bound / 3**0.5) < 0.02 * bound
    assert all(not value.any() for name, value in first.items() if "lora_up" in name)


def test_patterns_that_can_have_no_effect_are_pointed_out(transformer, messages):
    ranks(transformer, network_reg_dims="linear1=0,img_atn=8", network_reg_lrs="vector=1e-3,linear2=1e-3")
    warnings = [message for message in messages if "pattern" in message]
    assert len(warnings) == 2
    assert '"img_atn" of network_reg_dims' in warnings[0] and '"vector" of network_reg_lrs' in warnings[1]
