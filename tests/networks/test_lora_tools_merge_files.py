"""merge_lora.py, sdxl_merge_lora.py and svd_merge_lora.py: LoRA files merged into one, through the command line."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from networks import merge_lora, sdxl_merge_lora, svd_merge_lora
from networks.lora_tools.block_weights import BLOCKS, PRESETS, block_of
from tests.networks.lora_tool_files import (
    DESCRIBED,
    SD_LAYERS,
    SDXL_LAYERS,
    assert_same,
    deltas,
    independent_hashes,
    metadata,
    ranks,
    run,
    write_lora,
)


@pytest.fixture
def two(tmp_path):
    """Two files of different ranks, alphas and modules."""
    fewer = {name: shape for name, shape in SD_LAYERS.items() if "mid_block" not in name}
    return (
        write_lora(tmp_path / "a.safetensors", rank=4, alpha=2.0, conv_rank=2),
        write_lora(tmp_path / "b.safetensors", fewer, rank=3, alpha=6.0, seed=1),
    )


def weighted_sum(paths, ratios):
    total: dict[str, torch.Tensor] = {}
    for path, ratio in zip(paths, ratios):
        for name, delta in deltas(path).items():
            total[name] = total.get(name, 0) + ratio * delta
    return total


@pytest.mark.parametrize("options", [[], ["--concat"], ["--shuffle"], ["--concat", "--shuffle"]])
def test_the_merged_file_is_the_weighted_sum(two, tmp_path, options):
    run(merge_lora.main, "--models", *two, "--ratios", 0.7, -0.4, "--save_to", tmp_path / "m.safetensors", *options)
    assert_same(deltas(tmp_path / "m.safetensors"), weighted_sum(two, [0.7, -0.4]), 1e-6)


def test_one_file_at_half_ratio_is_half_of_it(two, tmp_path):
    """kohya-ss/sd-scripts counted a ratio twice: a file at 0.5 had a quarter of its strength."""
    run(merge_lora.main, "--models", two[0], "--ratios", 0.5, "--save_to", tmp_path / "m.safetensors")
    assert_same(deltas(tmp_path / "m.safetensors"), weighted_sum(two[:1], [0.5]), 1e-6)
    assert ranks(tmp_path / "m.safetensors") == ranks(two[0])


def test_one_file_at_full_ratio_keeps_its_bits(two, tmp_path):
    run(merge_lora.main, "--models", two[0], "--ratios", 1, "--save_to", tmp_path / "m.safetensors")
    first, second = load_file(two[0]), load_file(tmp_path / "m.safetensors")
    assert set(first) == set(second) and all(torch.equal(first[key], second[key]) for key in first)


def test_concat_gives_the_sum_of_the_ranks_and_merging_the_smallest_that_is_enough(two, tmp_path):
    both = [two[0], two[1], two[0]]
    for name, options in (("concat", ["--concat"]), ("merge", [])):
        path = tmp_path / f"{name}.safetensors"
        run(merge_lora.main, "--models", *both, "--ratios", 1, 1, 0.5, "--save_to", path, *options)
        assert_same(deltas(path), weighted_sum(both, [1, 1, 0.5]), 1e-6)
    own = [ranks(path) for path in both]
    assert ranks(tmp_path / "concat.safetensors") == {
        name: sum(found.get(name, 0) for found in own) for name in SD_LAYERS
    }
    assert ranks(tmp_path / "merge.safetensors") == {
        name: sum(found.get(name, 0) for found in own[:2]) for name in SD_LAYERS
    }


def test_shuffling_changes_the_order_of_ranks_only_and_always_alike(two, tmp_path):
    for name, options in (("plain", []), ("first", ["--shuffle"]), ("second", ["--shuffle"])):
        path = tmp_path / f"{name}.safetensors"
        run(merge_lora.main, "--models", *two, "--ratios", 1, 1, "--concat", "--save_to", path, *options)
    plain, first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("plain", "first", "second"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2.lora_down.weight"
    assert not torch.equal(first[key], plain[key])
    assert torch.equal(first[key].sort(dim=0).values, plain[key].sort(dim=0).values)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ([], torch.float32),
        (["--precision", "bf16"], torch.bfloat16),
        (["--precision", "bf16", "--save_precision", "float"], torch.float32),
        (["--save_precision", "fp16"], torch.float16),
    ],
)
def test_number_formats(two, tmp_path, options, dtype):
    run(merge_lora.main, "--models", *two, "--ratios", 0.7, -0.4, "--save_to", tmp_path / "m.safetensors", *options)
    tensors = load_file(tmp_path / "m.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    if "--precision" in options:
        assert all(torch.equal(t, t.bfloat16().to(dtype)) for key, t in tensors.items() if "lora_" in key[-20:])
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert_same(
        deltas(tmp_path / "m.safetensors"),
        weighted_sum(two, [0.7, -0.4]),
        2e-2 if "--precision" in options else tolerance,
    )


def test_a_module_whose_ratios_are_all_zero_is_left_out(two, tmp_path):
    run(merge_lora.main, "--models", *two, "--ratios", 0, 1, "--save_to", tmp_path / "m.safetensors")
    assert_same(deltas(tmp_path / "m.safetensors"), deltas(two[1]), 1e-6)


# ---- metadata ----------------------------------------------------------------------------------------------------


def test_metadata_and_hashes(tmp_path):
    base = {
        **DESCRIBED,
        "ss_sd_model_name": "base.safetensors",
        "ss_sd_model_hash": "01234567",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.resolution": "768x768",
        "ss_learning_rate": "1.0",
    }
    first = write_lora(tmp_path / "a.safetensors", metadata={**base, "modelspec.title": "Cats", "ss_vae_name": "x"})
    second = write_lora(tmp_path / "b.safetensors", seed=1, alpha=1.0, metadata={**base, "ss_vae_name": "y"})
    path = tmp_path / "cats_and_b.safetensors"
    run(merge_lora.main, "--models", first, second, "--ratios", 1, 1, "--save_to", path)
    found = metadata(path)
    wanted = {
        **DESCRIBED,
        "ss_network_dim": "8",
        "ss_network_alpha": "4.0",
        "ss_network_args": json.dumps({"conv_dim": "8", "conv_alpha": "4.0"}),
        "ss_sd_model_name": "base.safetensors",
        "ss_sd_model_hash": "01234567",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.resolution": "768x768",
        "modelspec.title": "cats_and_b",
        "modelspec.merged_from": "Cats, b",
    }
    assert {key: found.get(key) for key in wanted} == wanted
    assert "ss_learning_rate" not in found and "ss_vae_name" not in found
    assert (found["sshs_model_hash"], found["sshs_legacy_hash"]) == independent_hashes(path)


def test_different_ranks_and_alphas_are_called_dynamic(two, tmp_path):
    run(merge_lora.main, "--models", *two, "--ratios", 1, 1, "--save_to", tmp_path / "m.safetensors")
    found = metadata(tmp_path / "m.safetensors")
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("Dynamic", "Dynamic")


def test_no_metadata_leaves_what_is_needed(two, tmp_path):
    run(merge_lora.main, "--models", *two, "--ratios", 1, 1, "--save_to", tmp_path / "m.safetensors", "--no_metadata")
    assert set(metadata(tmp_path / "m.safetensors")) == {
        *DESCRIBED, "ss_network_dim", "ss_network_alpha", "ss_network_args", "sshs_model_hash", "sshs_legacy_hash",
    }  # fmt: skip


def test_files_that_disagree_on_their_base_are_told_of(two, tmp_path, capsys):
    other = write_lora(tmp_path / "o.safetensors", metadata={**DESCRIBED, "ss_base_model_version": "sd_v1_v"})
    run(merge_lora.main, "--models", two[0], other, "--ratios", 1, 1, "--save_to", tmp_path / "m.safetensors")
    assert metadata(tmp_path / "m.safetensors")["ss_base_model_version"] == "sd_v1"
    assert "differ in ss_base_model_version (sd_v1, sd_v1_v)" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".ckpt", ".pt"])
def test_pickled_files_are_read_and_written(two, tmp_path, suffix):
    torch.save(load_file(two[0]), tmp_path / f"a{suffix}")
    path = tmp_path / f"m{suffix}"
    run(merge_lora.main, "--models", tmp_path / f"a{suffix}", two[1], "--ratios", 1, 1, "--save_to", path)
    save_file(torch.load(path, weights_only=True), tmp_path / "again.safetensors")
    assert_same(deltas(tmp_path / "again.safetensors"), weighted_sum(two, [1, 1]), 1e-6)


# ---- Stable Diffusion XL and block weights ---------------------------------------------------------------------


def test_sdxl_files_of_both_naming_schemes_meet(tmp_path):
    block = "transformer_blocks_0_attn1_to_q"
    diffusers_names = {
        f"input_blocks_4_1_{block}": f"down_blocks_1_attentions_0_{block}",
        "middle_block_1_proj_in": "mid_block_attentions_0_proj_in",
        "output_blocks_2_1_transformer_blocks_1_ff_net_2": "up_blocks_0_attentions_2_transformer_blocks_1_ff_net_2",
        "input_blocks_1_0_in_layers_2": "down_blocks_0_resnets_0_conv1",
    }
    pairs = {f"lora_unet_{ours}": f"lora_unet_{theirs}" for ours, theirs in diffusers_names.items()}
    first = write_lora(tmp_path / "a.safetensors", SDXL_LAYERS, metadata=None)
    layers = {theirs: SDXL_LAYERS[ours] for ours, theirs in pairs.items()}
    second = write_lora(tmp_path / "b.safetensors", layers, seed=1, metadata=None)
    path = tmp_path / "m.safetensors"
    run(sdxl_merge_lora.main, "--models", first, second, "--ratios", 1, 0.5, "--save_to", path)
    wanted = deltas(first)
    for ours, theirs in pairs.items():
        wanted[ours] = wanted[ours] + 0.5 * deltas(second)[theirs]
    assert_same(deltas(path), wanted, 1e-6)


def test_block_weights_count_once_and_reach_their_blocks(tmp_path, capsys):
    path = write_lora(tmp_path / "a.safetensors", SDXL_LAYERS)
    blocks = PRESETS[12][1]
    weights = {block: 0.1 * (index + 1) for index, block in enumerate(blocks)} | {"OUT02": 0.0}
    made = tmp_path / "m.safetensors"
    lbw = json.dumps([weights[block] for block in blocks])
    run(sdxl_merge_lora.main, "--models", path, "--ratios", 0.5, "--lbws", lbw, "--save_to", made)
    factors = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": weights["BASE"],
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj": weights["BASE"],
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": weights["IN04"],
        "lora_unet_middle_block_1_proj_in": weights["MID"],
        "lora_unet_input_blocks_1_0_in_layers_2": 1.0,  # IN01 is not in a list of 12
    }
    assert_same(deltas(made), {name: 0.5 * factor * deltas(path)[name] for name, factor in factors.items()}, 1e-6)
    assert "1 modules, such as lora_unet_input_blocks_1_0_in_layers_2, lie in blocks" in capsys.readouterr().err


def test_svd_merge_with_block_weights_of_sd(tmp_path):
    path = write_lora(tmp_path / "a.safetensors")
    lbw = json.dumps([0.5] + [0.0] * 25)
    made = tmp_path / "m.safetensors"
    run(
        svd_merge_lora.main, "--models", path, "--ratios", 1, "--lbws", lbw, "--save_to", made, "--clamp_quantile", 1,
        "--new_rank", 4,
    )  # fmt: skip
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    assert_same(deltas(made), {name: 0.5 * deltas(path)[name]}, 1e-6)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("lora_te_text_model_encoder_layers_3_mlp_fc1", "BASE"),
        ("lora_te2_text_model_encoder_layers_3_mlp_fc1", "BASE"),
        ("lora_unet_down_blocks_0_resnets_0_conv1", "IN01"),
        ("lora_unet_down_blocks_0_downsamplers_0_conv", "IN03"),
        ("lora_unet_down_blocks_1_attentions_1_proj_in", "IN05"),
        ("lora_unet_down_blocks_3_resnets_1_conv2", "IN11"),
        ("lora_unet_mid_block_resnets_1_conv1", "MID"),
        ("lora_unet_up_blocks_0_upsamplers_0_conv", "OUT02"),
        ("lora_unet_up_blocks_1_attentions_0_proj_in", "OUT03"),
        ("lora_unet_up_blocks_3_attentions_2_proj_out", "OUT11"),
        ("lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_0_proj", "IN08"),
        ("lora_unet_middle_block_1_proj_in", "MID"),
        ("lora_unet_output_blocks_2_2_conv", "OUT02"),
        ("lora_unet_time_embedding_linear_1", None),
        ("lora_unet_conv_in", None),
    ],
)
def test_blocks_of_names(name, block):
    """The blocks of the original U-Net; spec of the short lists: where LoRA without convolutions has modules."""
    assert block_of(name) == block


def test_every_trained_module_lies_in_a_block_that_the_short_lists_name(tiny_sd1, tiny_sdxl):
    """Against the names of real networks: 17 and 12 numbers reach every module of a LoRA without convolutions."""
    from library.models.stable_diffusion.checkpoint import open_stable_diffusion
    from networks.lora_tools.stable_diffusion_layers import parts_of

    for path, short, long in ((tiny_sd1, 17, 26), (tiny_sdxl, 12, 20)):
        _, parts = parts_of(open_stable_diffusion(path))
        for with_conv, length in ((False, short), (True, long)):
            found = {block_of(target.name) for part in parts for target in part.trained_layers(with_conv)}
            assert found <= set(PRESETS[length][1]) and len(PRESETS[length][1]) == length
            assert with_conv or found == set(PRESETS[length][1])
    assert len(BLOCKS) == 26


# ---- svd_merge_lora.py ---------------------------------------------------------------------------------------


def test_svd_merge_at_full_rank_is_the_sum(two, tmp_path):
    path = tmp_path / "m.safetensors"
    run(
        svd_merge_lora.main, "--models", *two, "--ratios", 0.7, -0.4, "--save_to", path, "--new_rank", 7,
        "--clamp_quantile", 1,
    )  # fmt: skip
    assert_same(deltas(path), weighted_sum(two, [0.7, -0.4]), 1e-6)


def test_svd_merge_is_the_best_approximation_of_its_rank(two, tmp_path):
    path = tmp_path / "m.safetensors"
    run(
        svd_merge_lora.main, "--models", *two, "--ratios", 0.7, -0.4, "--save_to", path, "--new_rank", 3,
        "--new_conv_rank", 2, "--clamp_quantile", 1,
    )  # fmt: skip
    found, wanted = deltas(path), weighted_sum(two, [0.7, -0.4])
    for name, rank in ranks(path).items():
        assert rank == (2 if "conv1" in name else 3)
        values = torch.linalg.svdvals(wanted[name])
        assert float((found[name] - wanted[name]).norm()) == pytest.approx(float(values[rank:].norm()), rel=1e-4)
    described = metadata(path)
    assert (described["ss_network_dim"], described["ss_network_alpha"]) == ("3", "3.0")
    assert json.loads(described["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "2.0"}


def test_svd_merge_clamps_at_the_quantile(two, tmp_path):
    for quantile in ("1", "0.99"):
        path = tmp_path / f"{quantile}.safetensors"
        run(svd_merge_lora.main, "--models", *two, "--ratios", 1, 1, "--save_to", path, "--clamp_quantile", quantile)
    default = tmp_path / "default.safetensors"
    run(svd_merge_lora.main, "--models", *two, "--ratios", 1, 1, "--save_to", default)
    free, cut, usual = (
        load_file(path) for path in (tmp_path / "1.safetensors", tmp_path / "0.99.safetensors", default)
    )
    assert all(torch.equal(cut[key], usual[key]) for key in cut)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2"
    keys = [f"{name}.lora_up.weight", f"{name}.lora_down.weight"]
    limit = float(torch.quantile(torch.cat([free[key].flatten() for key in keys]).abs(), 0.98))
    for key in keys:
        assert torch.allclose(cut[key], free[key].clamp(-limit, limit), atol=1e-7)
