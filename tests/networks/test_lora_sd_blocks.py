"""Ranks, alphas and learning rates for the blocks of Stable Diffusion's U-Nets, against tables written by hand."""

from __future__ import annotations

import math
import re

import pytest
from torch import nn

from library.errors import UserError
from library.models.loading import on_meta
from networks import lora
from networks.adapters.lora_blocks import SD_BLOCKS, SDXL_BLOCKS
from tests.networks.stable_diffusion import real_unet, shared_tiny_model, tiny_meta_module

# Block -> the modules in it, by the beginning of their names, as kohya-ss/sd-scripts counts them.
SD_TABLE = {
    1: ["down_blocks_0_resnets_0", "down_blocks_0_attentions_0"],
    2: ["down_blocks_0_resnets_1", "down_blocks_0_attentions_1"],
    3: ["down_blocks_0_downsamplers_0"],
    4: ["down_blocks_1_resnets_0", "down_blocks_1_attentions_0"],
    5: ["down_blocks_1_resnets_1", "down_blocks_1_attentions_1"],
    6: ["down_blocks_1_downsamplers_0"],
    7: ["down_blocks_2_resnets_0", "down_blocks_2_attentions_0"],
    8: ["down_blocks_2_resnets_1", "down_blocks_2_attentions_1"],
    9: ["down_blocks_2_downsamplers_0"],
    10: ["down_blocks_3_resnets_0"],
    11: ["down_blocks_3_resnets_1"],
    12: ["mid_block_resnets_0", "mid_block_attentions_0", "mid_block_resnets_1"],
    13: ["up_blocks_0_resnets_0"],
    14: ["up_blocks_0_resnets_1"],
    15: ["up_blocks_0_resnets_2", "up_blocks_0_upsamplers_0"],
    16: ["up_blocks_1_resnets_0", "up_blocks_1_attentions_0"],
    17: ["up_blocks_1_resnets_1", "up_blocks_1_attentions_1"],
    18: ["up_blocks_1_resnets_2", "up_blocks_1_attentions_2", "up_blocks_1_upsamplers_0"],
    19: ["up_blocks_2_resnets_0", "up_blocks_2_attentions_0"],
    20: ["up_blocks_2_resnets_1", "up_blocks_2_attentions_1"],
    21: ["up_blocks_2_resnets_2", "up_blocks_2_attentions_2", "up_blocks_2_upsamplers_0"],
    22: ["up_blocks_3_resnets_0", "up_blocks_3_attentions_0"],
    23: ["up_blocks_3_resnets_1", "up_blocks_3_attentions_1"],
    24: ["up_blocks_3_resnets_2", "up_blocks_3_attentions_2"],
}
SDXL_TABLE = {
    **{1 + n: [f"input_blocks_{n}_"] for n in range(1, 9)},
    **{10 + n: [f"middle_block_{n}_"] for n in range(3)},
    **{13 + n: [f"output_blocks_{n}_"] for n in range(9)},
}
TABLES = {"sd1": SD_TABLE, "sdxl": SDXL_TABLE}


def block_of(name: str, table: dict[int, list[str]]) -> int:
    path = name.removeprefix("lora_unet_")
    (found,) = [block for block, beginnings in table.items() if path.startswith(tuple(beginnings))]
    return found


def is_wide(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)


def made(variant: str, dim: int = 4, alpha: float = 1.0, **arguments: str):
    return lora.create_network(1.0, dim, alpha, None, None, tiny_meta_module(variant, whole=True), **arguments)


def comma(values) -> str:
    return ",".join(f"{value:g}" for value in values)


def rates(network, unet_lr: float = 1.0) -> dict[str, float]:
    groups, descriptions = network.prepare_optimizer_params_with_multiple_te_lrs(None, unet_lr, None)
    return {text: group["lr"] for text, group in zip(descriptions, groups)}


@pytest.mark.parametrize(("variant", "count"), [("sd1", 25), ("sdxl", 23)])
def test_each_block_has_its_rank_and_alpha(variant, count):
    network = made(
        variant,
        block_dims=comma(range(1, count + 1)),
        block_alphas=comma(0.5 * n for n in range(1, count + 1)),
        conv_block_dims=comma(range(count, 0, -1)),
        conv_block_alphas=comma(0.25 * n for n in range(1, count + 1)),
    )
    assert len(network.loras) == len(made(variant, conv_dim="1").loras)
    for module in network.loras:
        block = block_of(module.lora_name, TABLES[variant])
        of_wide, of_others = (count - block, 0.25 * (block + 1)), (block + 1, 0.5 * (block + 1))
        expected = of_wide if is_wide(module.org_module) else of_others
        assert (module.lora_dim, module.alpha) == expected, module.lora_name


def test_a_rank_of_0_leaves_a_block_out_and_lists_that_are_missing_take_the_common_values():
    network = made("sd1", 8, 3.0, block_dims=comma([0] * 12 + [2] + [5] * 12), conv_dim="3", conv_alpha="2")
    linear = {block_of(m.lora_name, SD_TABLE): m for m in network.loras if isinstance(m.org_module, nn.Linear)}
    wide = {m.lora_dim for m in network.loras if is_wide(m.org_module)}
    assert set(linear) == set(range(12, 25))
    assert {block: (m.lora_dim, m.alpha) for block, m in linear.items()} == {
        block: (2 if block == 12 else 5, 3.0) for block in range(12, 25)
    }
    assert wide == {3}
    assert {m.alpha for m in made("sdxl", 8, 3.0, block_alphas=comma([7] * 23)).loras} == {7.0}
    alone = made("sdxl", 8, conv_block_dims=comma([2] * 23))
    assert {m.lora_dim for m in alone.loras} == {2, 8} and len(alone.loras) == len(made("sdxl", conv_dim="1").loras)


def test_text_encoders_are_not_in_blocks():
    tiny = shared_tiny_model("sd1", whole=True)
    network = lora.create_network(
        1.0, 4, 1.0, None, tiny.encoders, tiny.unet,
        block_dims=comma([2] * 25), block_alphas=comma([9] * 25), down_lr_weight="zeros",
    )  # fmt: skip
    assert {(m.lora_dim, m.alpha) for m in network.text_encoder_loras} == {(4, 1.0)}
    _, descriptions = network.prepare_optimizer_params_with_multiple_te_lrs([1e-4], 1e-3, None)
    assert descriptions[0] == "textencoder" and all(text.startswith("unet_block") for text in descriptions[1:])


HALF = math.sqrt(0.5)
SINE_9 = [0.0, 0.19509, 0.38268, 0.55557, HALF, 0.83147, 0.92388, 0.98079, 1.0]
ONES = [1.0] * 12


@pytest.mark.parametrize(
    ("given", "down", "middle", "up"),
    [
        ({"down_lr_weight": comma(range(12))}, list(range(12)), [1], ONES),
        ({"up_lr_weight": "2,,3"}, ONES, [1], [2, 0, 3] + [1] * 9),
        ({"up_lr_weight": "0.5"}, ONES, [1], [0.5] + [1] * 11),
        ({"down_lr_weight": comma(range(20)), "mid_lr_weight": "0.25"}, list(range(12)), [0.25], ONES),
        ({"mid_lr_weight": "0.5,7,8"}, ONES, [0.5], ONES),
        ({"down_lr_weight": "linear"}, [n / 11 for n in range(12)], [1], ONES),
        ({"down_lr_weight": "reverse_linear+.5"}, [1.5 - n / 11 for n in range(12)], [1], ONES),
        ({"up_lr_weight": "zeros+0.75"}, ONES, [1], [0.75] * 12),
        ({"up_lr_weight": "linear", "block_lr_zero_threshold": "0.5"}, ONES, [1],
         [0] * 6 + [n / 11 for n in range(6, 12)]),
        ({"mid_lr_weight": "0.1", "down_lr_weight": "0.1,0.2", "block_lr_zero_threshold": "0.1"},
         [0, 0.2] + [1] * 10, [0], ONES),
    ],
)  # fmt: skip
def test_factors_of_stable_diffusion_1(given, down, middle, up):
    expected = [float(weight) for weight in [*down, *middle, *up]]
    network = made("sd1", conv_dim="1", **given)
    for module in network.loras:
        assert expected[block_of(module.lora_name, SD_TABLE)] > 0
    blocks = [block for block in SD_TABLE if expected[block] > 0]
    assert rates(network, 2.0) == pytest.approx({f"unet_block{block}": 2 * expected[block] for block in sorted(blocks)})


@pytest.mark.parametrize(
    ("given", "down", "middle", "up"),
    [
        ({"down_lr_weight": "sine"}, SINE_9, [1] * 3, [1] * 9),
        ({"up_lr_weight": "cosine"}, [1] * 9, [1] * 3, SINE_9[::-1]),
        ({"up_lr_weight": "cosine+0.5"}, [1] * 9, [1] * 3, [0.5 + weight for weight in SINE_9[::-1]]),
        ({"mid_lr_weight": "0.5"}, [1] * 9, [0.5, 1, 1], [1] * 9),
        ({"mid_lr_weight": "0,2,0", "down_lr_weight": "zeros"}, [0] * 9, [0, 2, 0], [1] * 9),
    ],
)
def test_factors_of_stable_diffusion_xl(given, down, middle, up):
    expected = [1.0, *down, *middle, *up, 1.0]  # embeddings and the last layer count, but have no modules
    network = made("sdxl", conv_dim="1", **given)
    blocks = [block for block in SDXL_TABLE if expected[block] > 0]
    found = rates(network)
    assert found == pytest.approx({f"unet_block{block}": expected[block] for block in sorted(blocks)}, abs=1e-5)


def test_what_becomes_of_lists_of_another_length_is_said(messages):
    made("sd1", down_lr_weight="0.5", up_lr_weight=comma(range(13)))
    said = [text for text in messages if "lr_weight" in text]
    assert [re.sub(".*: ", "", text) for text in said] == [
        "down_lr_weight has 1 factors, Stable Diffusion 1.x and 2.x takes 12; the other 11 get 1"
        " (zeros+0.5 means 0.5 for all)",
        "up_lr_weight has 13 factors, Stable Diffusion 1.x and 2.x takes 12; the rest is left out",
    ]
    made("sdxl", block_lr_zero_threshold="0.5")
    assert any("block_lr_zero_threshold has no effect without" in text for text in messages)


def test_lists_of_the_wrong_length_are_refused():
    with pytest.raises(UserError, match=r"block_dims must have 25 values for Stable Diffusion 1\.x and 2\.x.*not 23"):
        made("sd1", block_dims=comma([4] * 23))
    with pytest.raises(UserError, match="conv_block_alphas must have 23 values for Stable Diffusion XL.*not 25"):
        made("sdxl", conv_block_alphas=comma([4] * 25))


@pytest.mark.parametrize("argument", [{"block_dims": comma([4] * 25)}, {"up_lr_weight": "sine"}])
def test_other_topologies_are_refused_only_where_blocks_are_named(argument):
    from diffusers import UNet2DConditionModel

    with on_meta():
        unet = UNet2DConditionModel(
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    assert lora.create_network(1.0, 4, 1.0, None, None, unet).loras
    name = next(iter(argument))
    with pytest.raises(UserError, match=rf"{name} cannot be used with this model.*12 \+ 1 \+ 12 blocks"):
        lora.create_network(1.0, 4, 1.0, None, None, unet, **argument)


def test_a_network_from_a_file_learns_block_by_block(tmp_path):
    made("sd1").save_weights(tmp_path / "lora.safetensors", None, None)
    unet = tiny_meta_module("sd1", whole=True)
    network, _ = lora.create_network_from_weights(
        1.0, tmp_path / "lora.safetensors", None, None, unet, down_lr_weight="zeros+0.5", mid_lr_weight="0"
    )
    assert len(network.loras) == 192
    found = rates(network)
    assert found == {f"unet_block{block}": 0.5 if block < 12 else 1.0 for block in
                     (1, 2, 4, 5, 7, 8, *range(16, 25))}  # fmt: skip
    frozen = [m for m in network.loras if not m.lora_up.weight.requires_grad]
    assert {block_of(m.lora_name, SD_TABLE) for m in frozen} == {12}


def test_blocks_loraplus_and_patterns_together():
    network = made("sdxl", up_lr_weight="zeros", down_lr_weight="zeros", mid_lr_weight="0,0.5,0",
                   loraplus_unet_lr_ratio="4", network_reg_lrs="proj_in=0.3")  # fmt: skip
    assert rates(network) == pytest.approx({
        "unet_block11 reg_lr_0": 0.3, "unet_block11 reg_lr_0 plus": 1.2, "unet_block11": 0.5, "unet_block11 plus": 2.0,
    })  # fmt: skip


@pytest.mark.parametrize(("variant", "layout"), [("sd1", SD_BLOCKS), ("sdxl", SDXL_BLOCKS)])
def test_every_target_of_the_published_model_has_a_block(variant, layout):
    network = lora.create_network(1.0, 1, 1.0, None, None, real_unet(variant), conv_dim="1")
    found = {layout.index(module.target.path) for module in network.loras}
    assert found == set(TABLES[variant])
