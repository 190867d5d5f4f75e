"""networks.lora: which modules of Stable Diffusion's models get LoRA, under which names, with which rank."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.models.loading import on_meta
from library.models.stable_diffusion.original_names import under_original_names
from networks import lora
from tests.networks.stable_diffusion import real_encoders, real_unet, shared_tiny_model

REFERENCE = Path(__file__).parent.parent / "reference_data" / "lora_sd15_keys.json"


def made(unet, encoders=None, dim=1, alpha=1.0, **arguments):
    return lora.create_network(1.0, dim, alpha, None, encoders, unet, **arguments)


def names(network) -> list[str]:
    return [module.lora_name for module in network.loras]


# Counts of LoRA files in the wild, and of what kohya-ss/sd-scripts reports when it starts.
@pytest.mark.parametrize(
    ("variant", "attention", "with_conv", "text"),
    [("sd1", 192, 278, 72), ("sd2", 192, 278, 138), ("sdxl", 722, 788, 264)],
)
def test_counts_of_the_published_models(variant, attention, with_conv, text):
    unet, encoders = real_unet(variant), real_encoders(variant)
    assert len(made(unet, conv_dim="1").unet_loras) == with_conv
    # Once, a network with convolutions changed the list of targets for all that came after it.
    network = made(unet, encoders)
    assert (len(network.unet_loras), len(network.text_encoder_loras)) == (attention, text)
    assert len(set(names(network))) == len(network.loras)


def test_keys_and_shapes_of_a_file_that_another_trainer_wrote():
    from diffusers import UNet2DConditionModel

    from library.models.clip import ClipConfig, ClipTextEncoder

    keys = json.loads(REFERENCE.read_text(encoding="utf-8"))
    with on_meta():
        unet = UNet2DConditionModel(block_out_channels=(32, 64, 64, 64), cross_attention_dim=32)
        text = ClipTextEncoder(ClipConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2))
    network = made(unet, text, dim=4)
    types = {torch.float32: "F32"}
    mine = {key: [list(value.shape), types[value.dtype]] for key, value in network.state_dict().items()}
    assert mine == keys


# Names from LoRA files for SDXL that are in use.
SDXL_NAMES = """
lora_te1_text_model_encoder_layers_0_self_attn_q_proj
lora_te1_text_model_encoder_layers_11_mlp_fc2
lora_te2_text_model_encoder_layers_31_self_attn_out_proj
lora_unet_input_blocks_1_0_emb_layers_1
lora_unet_input_blocks_1_0_in_layers_2
lora_unet_input_blocks_3_0_op
lora_unet_input_blocks_4_0_skip_connection
lora_unet_input_blocks_4_1_proj_in
lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0
lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_0_proj
lora_unet_middle_block_0_out_layers_3
lora_unet_middle_block_1_transformer_blocks_9_ff_net_2
lora_unet_output_blocks_2_1_proj_out
lora_unet_output_blocks_2_2_conv
lora_unet_output_blocks_5_2_conv
lora_unet_output_blocks_8_0_skip_connection
""".split()

SD_NAMES = """
lora_te_text_model_encoder_layers_0_self_attn_q_proj
lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0
lora_unet_down_blocks_0_downsamplers_0_conv
lora_unet_down_blocks_3_resnets_1_time_emb_proj
lora_unet_mid_block_attentions_0_proj_in
lora_unet_mid_block_resnets_1_conv2
lora_unet_up_blocks_0_upsamplers_0_conv
lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj
lora_unet_up_blocks_3_resnets_0_conv_shortcut
""".split()


@pytest.mark.parametrize(("variant", "expected"), [("sdxl", SDXL_NAMES), ("sd1", SD_NAMES)])
def test_names_of_files_in_use(variant, expected):
    found = names(made(real_unet(variant), real_encoders(variant), conv_dim="1"))
    assert set(expected) <= set(found)


def test_the_tree_of_original_names_and_the_model_itself_give_one_network():
    unet = real_unet("sdxl")
    direct, through_tree = made(unet), made(under_original_names(unet))
    assert names(direct) == names(through_tree)
    assert [a.org_module for a in direct.loras] == [b.org_module for b in through_tree.loras]


def test_text_encoders_are_named_by_their_place():
    encoders = real_encoders("sdxl")
    unet = real_unet("sdxl")
    assert {name[:8] for name in names(made(unet, [None, encoders[1]])) if "_te" in name} == {"lora_te2"}
    tiny = shared_tiny_model("sd1")
    single, unet = tiny.encoders[0], tiny.unet
    assert names(made(unet, single)) == names(made(unet, [single]))
    assert not made(unet, [None]).text_encoder_loras
    with pytest.raises(UserError, match="2 text encoders were given, but Stable Diffusion 1.x and 2.x has 1"):
        made(unet, [single, single])


def test_wide_convolutions_have_their_own_rank_and_alpha():
    tiny = shared_tiny_model("sd1")
    network = made(tiny.unet, tiny.encoders, dim=8, alpha=4, conv_dim="3", conv_alpha="2")
    for module in network.loras:
        is_wide = isinstance(module.org_module, nn.Conv2d) and module.org_module.kernel_size == (3, 3)
        assert (module.lora_dim, module.alpha) == ((3, 2) if is_wide else (8, 4)), module.lora_name
    kernel = network.lora_unet_down_blocks_0_downsamplers_0_conv
    assert kernel.lora_down.weight.shape == (3, 32, 3, 3) and kernel.lora_up.weight.shape == (32, 3, 1, 1)
    assert network.lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight.shape == (8, 32, 1, 1)
    assert {module.alpha for module in made(tiny.unet, conv_dim="3").loras} == {1.0}


def test_defaults_are_rank_4_and_alpha_1_and_alpha_0_is_the_rank():
    unet = shared_tiny_model("sd1").unet
    network = lora.create_network(1.0, None, None, None, None, unet)
    assert {(module.lora_dim, module.alpha) for module in network.loras} == {(4, 1.0)}
    network = lora.create_network(1.0, 8, 0, None, None, unet)
    assert {module.scale for module in network.loras} == {1.0}


def test_the_last_matching_pattern_gives_the_rank():
    unet = real_unet("sd1")
    network = made(unet, dim=2, network_reg_dims=r"attn1=3,down_blocks_0=0,to_q$=5")
    for module in network.unet_loras:
        name = module.lora_name
        expected = 5 if name.endswith("to_q") else 3 if "attn1" in name else 2
        assert module.lora_dim == expected
        assert "down_blocks_0" not in name or name.endswith("to_q")


def test_dropouts_reach_every_module():
    tiny = shared_tiny_model("sdxl")
    network = lora.create_network(
        1.0, 2, 1, None, tiny.encoders, tiny.unet, neuron_dropout=0.1, rank_dropout="0.2", module_dropout="0.3"
    )
    settings = {(m.regularisation.dropout, m.regularisation.rank_dropout, m.regularisation.module_dropout)
                for m in network.loras}  # fmt: skip
    assert settings == {(0.1, 0.2, 0.3)}


def test_the_same_seed_gives_the_same_network():
    unet = shared_tiny_model("sd1").unet
    networks = []
    for _ in range(2):
        torch.manual_seed(5)
        networks.append(made(unet, dim=2, conv_dim="2"))
    for (name, a), b in zip(networks[0].state_dict().items(), networks[1].state_dict().values()):
        assert torch.equal(a, b), name
    assert all(not module.up_matrix.any() and module.down_matrix.any() for module in networks[0].loras)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conv_dims": "4"}, r'networks.lora has no argument "conv_dims". Did you mean "conv_dim"\?'),
        ({"split_qkv": "True"}, "split_qkv cannot be used here. Query, key and value are separate layers"),
        ({"conv_dim": "x"}, "conv_dim must be a whole number"),
        ({"module_dropout": "1"}, "module_dropout must be at least 0 and below 1"),
        ({"block_dims": "1,x"}, "block_dims must be a whole number"),
        ({"down_lr_weight": "sinus"}, "down_lr_weight .*one of sine, cosine, linear, reverse_linear, zeros"),
        ({"up_lr_weight": "sine+x"}, "up_lr_weight must be a number"),
        ({"mid_lr_weight": "zeros"}, "mid_lr_weight must be a number"),
        ({"mid_lr_weight": ""}, "mid_lr_weight must be a number"),
        ({"down_lr_weight": "1,-1"}, "down_lr_weight must be a number, 0 or more"),
    ],
)
def test_wrong_arguments_are_refused_before_any_model_is_loaded(arguments, message):
    with pytest.raises(UserError, match=message):
        lora.check_network_args(arguments)


def test_arguments_that_the_check_lets_through():
    lora.check_network_args({"conv_dim": "4", "split_qkv": "False", "block_dims": ",".join(["4"] * 25)})
    lora.check_network_args({"down_lr_weight": "0.5", "mid_lr_weight": ",1,", "up_lr_weight": "cosine+.25"})


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(UserError, match=r"networks\.lora does not fit this model: Linear"):
        made(nn.Linear(2, 2))


def test_arguments_without_effect_are_named(messages, tmp_path):
    unet = shared_tiny_model("sd1", whole=True).unet
    network = made(unet, conv_alpha="2")
    assert any(re.search("no wide convolution is trained, so conv_alpha have no effect", text) for text in messages)
    network.save_weights(tmp_path / "lora.safetensors", None, None)
    lora.create_network_from_weights(
        1.0, tmp_path / "lora.safetensors", None, None, unet, conv_dim="4", block_dims=",".join(["4"] * 25),
        rank_dropout="0.1", down_lr_weight="sine",
    )  # fmt: skip
    assert any("those of the file; conv_dim, block_dims have no effect" in text for text in messages)
