"""resize_lora.py through the command line: what is kept, under which keys, and what the file says about it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from networks import resize_lora
from tests.networks.lora_tool_files import (
    DESCRIBED,
    KEYS,
    SD_LAYERS,
    assert_same,
    deltas,
    independent_hashes,
    metadata,
    ranks,
    run,
    write_lora,
)

CONVOLUTIONS = {name for name, shape in SD_LAYERS.items() if len(shape) == 4}


def resize(source, save_to, *options):
    run(resize_lora.main, "--model", source, "--save_to", save_to, *options)
    return save_to


@pytest.mark.parametrize("form", KEYS)
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_full_rank_keeps_every_difference_and_key(tmp_path, form, alpha):
    source = write_lora(tmp_path / "a.safetensors", rank=6, alpha=alpha, form=form)
    made = resize(source, tmp_path / "b.safetensors", "--new_rank", 6)
    assert_same(deltas(made, form), deltas(source, form), 1e-6)
    assert set(load_file(made)) == set(load_file(source))


def test_a_lower_rank_is_the_best_there_is(tmp_path):
    """Eckart-Young, against torch.linalg.svd of the product in float64; all convolutions get the conv rank."""
    source = write_lora(tmp_path / "a.safetensors", rank=8, alpha=3.0)
    made = resize(source, tmp_path / "b.safetensors", "--new_rank", 3, "--new_conv_rank", 2)
    assert ranks(made) == {name: 2 if name in CONVOLUTIONS else 3 for name in SD_LAYERS}
    before, after = deltas(source), deltas(made)
    for name, rank in ranks(made).items():
        values = torch.linalg.svdvals(before[name])
        assert float((after[name] - before[name]).norm()) == pytest.approx(float(values[rank:].norm()), rel=1e-4)


def test_alpha_goes_with_the_rank(tmp_path):
    source = write_lora(tmp_path / "a.safetensors", rank=8, alpha=4.0)
    made = load_file(resize(source, tmp_path / "b.safetensors", "--new_rank", 2))
    assert {float(tensor) for key, tensor in made.items() if key.endswith(".alpha")} == {1.0}


def test_a_rank_above_the_files_own_adds_nothing(tmp_path):
    source = write_lora(tmp_path / "a.safetensors", rank=4)
    made = resize(source, tmp_path / "b.safetensors", "--new_rank", 32)
    assert set(ranks(made).values()) == {4}
    assert_same(deltas(made), deltas(source), 1e-6)


@pytest.mark.parametrize(
    ("method", "parameter"), [("sv_ratio", 1.5), ("sv_ratio", 3.0), ("sv_fro", 0.9), ("sv_cumulative", 0.7)]
)
def test_dynamic_methods_keep_the_fewest_that_fulfil_them(tmp_path, method, parameter):
    source = write_lora(tmp_path / "a.safetensors", rank=8)
    options = ("--new_rank", 8, "--dynamic_method", method, "--dynamic_param", parameter)
    made = resize(source, tmp_path / "b.safetensors", *options)
    assert len(set(ranks(made).values())) > 1  # each module its own
    for name, rank in ranks(made).items():
        values = torch.linalg.svdvals(deltas(source)[name])
        share = {
            "sv_ratio": lambda k, v=values: parameter if k == len(v) or v[0] / v[k] >= parameter else 0,
            "sv_fro": lambda k, v=values: float(v[:k].norm() / v.norm()),
            "sv_cumulative": lambda k, v=values: float(v[:k].sum() / v.sum()),
        }[method]
        assert share(rank) >= parameter and (rank == 1 or share(rank - 1) < parameter)


def test_new_rank_limits_a_dynamic_method(tmp_path):
    source = write_lora(tmp_path / "a.safetensors", rank=8)
    options = ("--dynamic_method", "sv_fro", "--dynamic_param", 1.0, "--new_rank", 5, "--new_conv_rank", 2)
    made = resize(source, tmp_path / "b.safetensors", *options)
    assert ranks(made) == {name: 2 if name in CONVOLUTIONS else 5 for name in SD_LAYERS}


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_save_precision(tmp_path, precision, dtype):
    source = write_lora(tmp_path / "a.safetensors", rank=6, alpha=1.1)
    made = resize(source, tmp_path / "b.safetensors", "--new_rank", 6, "--save_precision", precision)
    assert {tensor.dtype for tensor in load_file(made).values()} == {dtype}
    assert_same(deltas(made), deltas(source), 2e-3 if dtype == torch.float16 else 1e-2)


def test_small_differences_survive_half_precision(tmp_path):
    """Factors share the singular values: with all of them in one, float16 would lose the digits of the other."""
    source = write_lora(tmp_path / "a.safetensors", rank=6, alpha=6.0)
    tiny = {key: t * 1e-4 if "lora_up" in key else t for key, t in load_file(source).items()}
    save_file(tiny, source)
    made = resize(source, tmp_path / "b.safetensors", "--new_rank", 6, "--save_precision", "fp16")
    assert_same(deltas(made), deltas(source), 2e-3)


def test_metadata_of_a_resized_file(tmp_path):
    described = {
        **DESCRIBED,
        "ss_training_comment": "cats",
        "ss_network_dim": "8",
        "ss_network_args": json.dumps({"conv_dim": "8", "conv_alpha": "2", "dropout": None}),
        "ss_learning_rate": "1e-4",
        "sshs_model_hash": "old",
        "modelspec.hash_sha256": "old",
    }
    source = write_lora(tmp_path / "a.safetensors", rank=8, metadata=described)
    found = metadata(resize(source, tmp_path / "b.safetensors", "--new_rank", 4, "--new_conv_rank", 2))
    assert found["ss_training_comment"] == "dimension is resized from 8 to 4 (conv: 2); cats"
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "1.0")
    assert json.loads(found["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "0.5", "dropout": None}
    assert found["ss_learning_rate"] == "1e-4" and "modelspec.hash_sha256" not in found
    hashes = independent_hashes(tmp_path / "b.safetensors")
    assert (found["sshs_model_hash"], found["sshs_legacy_hash"]) == hashes


def test_metadata_of_equal_and_of_dynamic_ranks(tmp_path):
    source = write_lora(tmp_path / "a.safetensors", rank=8, alpha=4.0)
    found = metadata(resize(source, tmp_path / "b.safetensors", "--new_rank", 4))
    assert found["ss_training_comment"] == "dimension is resized from 8 to 4; "
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "2.0") and "ss_network_args" not in found
    options = ("--new_rank", 4, "--dynamic_method", "sv_fro", "--dynamic_param", 0.5)
    found = metadata(resize(source, tmp_path / "c.safetensors", *options))
    assert found["ss_training_comment"] == "Dynamic resize with sv_fro: 0.5 from 8; "
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("Dynamic", "Dynamic")


def test_the_strength_in_pefts_metadata_is_not_lost(tmp_path):
    """diffusers keeps alpha in the metadata, together with ranks that would be wrong now."""
    settings = {"unet.r": 8, "unet.lora_alpha": 4, "unet.alpha_pattern": {"mid_block.proj": 16}}
    layers = {"unet.down_blocks.0.proj": (12, 10), "unet.mid_block.proj": (12, 10)}
    source = write_lora(
        tmp_path / "a.safetensors", layers, rank=8, alpha=None, form="peft",
        metadata={"lora_adapter_metadata": json.dumps(settings)},
    )  # fmt: skip
    made = resize(source, tmp_path / "b.safetensors", "--new_rank", 8)
    assert "lora_adapter_metadata" not in metadata(made)
    own = deltas(source, "peft")
    wanted = {
        "unet.down_blocks.0.proj": 0.5 * own["unet.down_blocks.0.proj"],
        "unet.mid_block.proj": 2 * own["unet.mid_block.proj"],
    }
    assert_same(deltas(made, "peft"), wanted, 1e-6)


def test_verbose_tells_ranks_and_what_is_kept(tmp_path, capsys):
    source = write_lora(tmp_path / "a.safetensors", rank=8)
    made = resize(source, tmp_path / "b.safetensors", "--new_rank", 3, "--verbose")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(SD_LAYERS) + 1
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    line = next(line for line in lines if line.startswith(name))
    values = torch.linalg.svdvals(deltas(source)[name])[:8]
    kept = (
        f"sum(S) retained: {values[:3].sum() / values.sum():.1%}, fro retained: {values[:3].norm() / values.norm():.1%}"
    )
    assert "rank 8 -> 3, alpha 0.75" in line and kept in line and f"max(S) ratio: {values[0] / values[2]:.1f}" in line
    norms = [float(deltas(made)[key].norm() / deltas(source)[key].norm()) for key in SD_LAYERS]
    assert f"Average Frobenius norm retention: {sum(norms) / len(norms):.2%}" in lines[-1]


def test_other_tensors_pass_through_and_zero_modules_get_rank_one(tmp_path):
    source = write_lora(tmp_path / "a.safetensors", rank=8)
    tensors = load_file(source)
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors[f"{name}.lora_up.weight"].zero_()
    tensors["bundle_emb.cat.string_to_param.*"] = torch.arange(6.0)
    save_file(tensors, source)
    options = ("--new_rank", 8, "--dynamic_method", "sv_cumulative", "--dynamic_param", 0.5)
    made = resize(source, tmp_path / "b.safetensors", *options)
    assert ranks(made)[name] == 1 and not deltas(made)[name].any()
    assert torch.equal(load_file(made)["bundle_emb.cat.string_to_param.*"], torch.arange(6.0))
    assert math.isfinite(sum(float(tensor.sum()) for tensor in load_file(made).values()))
