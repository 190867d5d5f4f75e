"""LoRA files: the same bits back, full strength in every form, other programs' forms read, misfits refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models.flux.checkpoint import DOUBLE, OUTER, SINGLE
from networks import lora_flux
from networks.adapters.lora_file import read_file


@pytest.fixture
def make(transformer, clip, t5, randomise):
    def network(dim=4, alpha=2.0, filled=True, **arguments):
        made = lora_flux.create_network(1.0, dim, alpha, None, [clip, t5], transformer, **arguments)
        if filled:
            randomise(made)
        return made

    return network


def read(path, transformer, clip=None, t5=None, **arguments):
    return lora_flux.create_network_from_weights(1.0, path, None, [clip, t5], transformer, **arguments)[0]


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt"])
@pytest.mark.parametrize("arguments", [{"train_t5xxl": "True"}, {"split_qkv": "True", "in_dims": "1,2,3,4,5"}])
def test_a_reloaded_network_has_the_same_bits(make, tmp_path, suffix, arguments):
    first = make(**arguments)
    first.save_weights(tmp_path / f"lora{suffix}", None, None)
    second = make(alpha=1.0, filled=False, **arguments)
    info = second.load_weights(tmp_path / f"lora{suffix}")
    assert info == ([], []) and str(info) == "all tensors fit"
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items()):
        assert torch.equal(a, b), name
    assert [lora.scale for lora in first.loras] == [lora.scale for lora in second.loras]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_save_precision_rounds_every_tensor_once(make, tmp_path, dtype):
    network = make()
    network.save_weights(tmp_path / "lora.safetensors", dtype, None)
    saved = load_file(tmp_path / "lora.safetensors")
    assert saved and all(tensor.dtype == dtype for tensor in saved.values())
    for key, tensor in network.state_dict().items():
        assert torch.equal(saved[key], tensor.to(dtype))


def test_metadata_and_hashes(make, tmp_path):
    network = make()
    network.save_weights(tmp_path / "a.safetensors", None, {"ss_seed": "1", "modelspec.title": "a"})
    network.save_weights(tmp_path / "b.safetensors", None, {"ss_seed": "2"})
    metadata = {}
    for name in "ab":
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            metadata[name] = file.metadata()
    assert metadata["a"]["ss_seed"] == "1" and metadata["a"]["modelspec.title"] == "a"
    assert re.fullmatch("[0-9a-f]{64}", metadata["a"]["sshs_model_hash"])
    assert metadata["a"]["sshs_model_hash"] == metadata["b"]["sshs_model_hash"]
    assert metadata["a"]["sshs_legacy_hash"] == "e3b0c442"  # shorter than 1 MiB


def test_the_network_from_a_file_has_its_ranks_alphas_and_models(make, transformer, clip, t5, tmp_path):
    make(
        alpha=3.0, train_t5xxl="True", in_dims="1,0,0,0,2", single_dim="7", train_double_block_indices="1"
    ).save_weights(tmp_path / "lora.safetensors", None, None)
    network = read(tmp_path / "lora.safetensors", transformer, clip, t5)
    ranks = {lora.lora_name: lora.lora_dim for lora in network.loras}
    assert ranks["lora_unet_img_in"] == 1 and ranks["lora_unet_single_blocks_0_linear1"] == 7
    assert not any("double_blocks_0" in name for name in ranks)
    assert {lora.alpha for lora in network.loras} == {3.0}
    assert network.train_t5xxl
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_network_from_a_file_trains_with_the_given_arguments(make, transformer, tmp_path):
    make().save_weights(tmp_path / "lora.safetensors", None, None)
    network = read(
        tmp_path / "lora.safetensors", transformer, dropout=0.1, rank_dropout="0.2", network_reg_lrs="mod=5e-5"
    )
    settings = network.loras[0].regularisation
    assert (settings.dropout, settings.rank_dropout) == (0.1, 0.2)
    _, descriptions = network.prepare_optimizer_params_with_multiple_te_lrs(None, None, 1e-3)
    assert descriptions == ["unet reg_lr_0", "unet"]
    with pytest.raises(UserError, match="rank_dropout"):
        read(tmp_path / "lora.safetensors", transformer, rankdropout="0.2")


def test_a_network_for_inference_cannot_train(make, transformer, tmp_path):
    make().save_weights(tmp_path / "lora.safetensors", None, None)
    network = read(tmp_path / "lora.safetensors", transformer, for_inference=True)
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())


def test_files_without_alpha_or_with_an_integer_alpha(make, transformer, tmp_path):
    make(alpha=2.0).save_weights(tmp_path / "lora.safetensors", None, None)
    tensors = load_file(tmp_path / "lora.safetensors")
    integers = {key: value.long() if key.endswith("alpha") else value for key, value in tensors.items()}
    network = lora_flux.create_network_from_weights(1.0, None, None, [None, None], transformer, integers)[0]
    assert {lora.scale for lora in network.loras} == {0.5}
    without = {key: value for key, value in tensors.items() if not key.endswith("alpha")}
    network = lora_flux.create_network_from_weights(1.0, None, None, [None, None], transformer, without)[0]
    assert {lora.scale for lora in network.loras} == {1.0}
    fresh = make(alpha=1.0)
    fresh.load_state_dict(without, strict=False)
    assert {lora.scale for lora in fresh.loras if lora.lora_name.startswith("lora_unet")} == {1.0}


def test_loading_tells_what_did_not_fit(make, transformer, clip, tmp_path):
    make().save_weights(tmp_path / "both.safetensors", None, None)
    only_transformer = lora_flux.create_network(1.0, 4, 1.0, None, [None, None], transformer)
    info = only_transformer.load_weights(tmp_path / "both.safetensors")
    assert not info.missing_keys and len(info.unexpected_keys) == 12 * 3
    assert str(info).startswith("36 tensors of the file fit nowhere, such as lora_te1_")
    only_transformer.save_weights(tmp_path / "transformer.safetensors", None, None)
    info = make().load_weights(tmp_path / "transformer.safetensors")
    assert not info.unexpected_keys and len(info.missing_keys) == 12 * 3
    with pytest.raises(RuntimeError, match="missing"):
        make().load_state_dict(load_file(tmp_path / "transformer.safetensors"))


def test_misfits_are_refused_in_one_sentence(make, transformer, tmp_path):
    path = tmp_path / "lora.safetensors"
    make(dim=8).save_weights(path, None, None)
    with pytest.raises(UserError, match=r"lora.safetensors.*rank 8.*--network_dim 8.*--dim_from_weights"):
        make(dim=4).load_weights(path)

    narrow = {key: value[..., :-1].clone() if "down" in key else value for key, value in load_file(path).items()}
    save_file(narrow, path)
    with pytest.raises(UserError, match=r"lora.safetensors.*made for another model"):
        read(path, transformer)
    with pytest.raises(UserError, match=r"lora.safetensors.*made for another model"):
        make(dim=8).load_weights(path)

    save_file({"lora_unet_input_blocks_1_1_proj_in.lora_down.weight": torch.zeros(4, 8)}, path)
    for load in (lambda: read(path, transformer), lambda: make().load_weights(path)):
        with pytest.raises(UserError, match=r"lora.safetensors.*none of the 1 tensors"):
            load()

    save_file({"lora_unet_single_blocks_0_linear1.hada_w1_a": torch.zeros(4, 8)}, path)
    with pytest.raises(UserError, match="LoHa"):
        read(path, transformer)
    with pytest.raises(UserError, match="missing.safetensors"):
        read(tmp_path / "missing.safetensors", transformer)


def test_a_failing_save_leaves_the_old_file(make, tmp_path):
    network = make()
    network.save_weights(tmp_path / "lora.safetensors", None, {"ss_seed": "1"})
    before = (tmp_path / "lora.safetensors").read_bytes()
    with pytest.raises(TypeError):
        network.save_weights(tmp_path / "lora.safetensors", None, {"ss_seed": 1})
    assert (tmp_path / "lora.safetensors").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["lora.safetensors"]


# ---- split_qkv ----


def test_a_split_network_has_full_strength_in_its_file(make, transformer, inputs, tmp_path):
    network = make(split_qkv="True")
    network.apply_to(None, transformer, False, True)
    expected = transformer(**inputs)
    network.save_weights(tmp_path / "lora.safetensors", None, None)
    network.remove()
    tensors, metadata = read_file(tmp_path / "lora.safetensors")
    assert metadata["ss_network_split_qkv"] == "alpha_times_parts"
    name = "lora_unet_single_blocks_0_linear1"
    assert tensors[f"{name}.lora_down.weight"].shape == (16, 64)
    assert tensors[f"{name}.lora_up.weight"].shape == (448, 16)
    assert tensors[f"{name}.alpha"] == 8.0
    assert tensors["lora_unet_double_blocks_1_txt_attn_qkv.alpha"] == 6.0
    assert tensors["lora_unet_double_blocks_1_txt_attn_proj.alpha"] == 2.0

    for arguments in ({}, {"split_qkv": "True"}):
        loaded = read(tmp_path / "lora.safetensors", transformer, **arguments)
        loaded.apply_to(None, transformer, False, True)
        torch.testing.assert_close(transformer(**inputs), expected, rtol=1e-4, atol=1e-4)
        loaded.remove()


def test_unmarked_files_of_split_networks_are_read_as_they_are(make, transformer, inputs, tmp_path):
    """Other programs leave alpha as it was; what their files do at inference is what is loaded."""
    make(split_qkv="True").save_weights(tmp_path / "lora.safetensors", None, None)
    tensors = load_file(tmp_path / "lora.safetensors")
    for key in tensors:
        if key.endswith(("_qkv.alpha", "linear1.alpha")):
            tensors[key] = torch.tensor(2.0)
    outputs = []
    for arguments in ({}, {"split_qkv": "True"}):
        loaded = lora_flux.create_network_from_weights(
            1.0, None, None, [None, None], transformer, tensors, **arguments
        )[0]
        loaded.apply_to(None, transformer, False, True)
        outputs.append(transformer(**inputs))
        loaded.remove()
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_files_that_cannot_be_split_are_refused(make, transformer, tmp_path):
    make(dim=12).save_weights(tmp_path / "joined.safetensors", None, None)
    with pytest.raises(UserError, match="without split_qkv"):
        read(tmp_path / "joined.safetensors", transformer, split_qkv="True")
    make(dim=4).save_weights(tmp_path / "joined.safetensors", None, None)
    with pytest.raises(UserError, match="cannot divide"):
        read(tmp_path / "joined.safetensors", transformer, split_qkv="True")


def test_the_state_of_a_split_network_continues_bit_for_bit(make):
    first, second = make(split_qkv="True", alpha=0.3), make(split_qkv="True", filled=False)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert [lora.scale for lora in first.loras] == [lora.scale for lora in second.loras]


# ---- forms of other programs ----


def diffusers_names(path: str) -> tuple[str, ...]:
    if path in OUTER:
        return (OUTER[path],)
    blocks, number, module = path.split(".", 2)
    if blocks == "double_blocks":
        return tuple(f"transformer_blocks.{number}.{part}" for part in DOUBLE[module])
    return tuple(f"single_transformer_blocks.{number}.{part}" for part in SINGLE[module])


def separate(network, prefix: str, down: str, up: str) -> dict[str, torch.Tensor]:
    """The transformer part under diffusers' names, joined modules taken apart, strength folded into up."""
    tensors = {}
    for lora in network.unet_loras:
        downs, ups = list(lora.lora_down.parameters()), list(lora.lora_up.parameters())
        for name, down_weight, up_weight in zip(diffusers_names(lora.target.path), downs, ups):
            tensors[f"{prefix}{name}.{down}.weight"] = down_weight.detach()
            tensors[f"{prefix}{name}.{up}.weight"] = up_weight.detach() * lora.scale
    return tensors


def outputs(transformer, inputs, tensors, clip=None):
    network = lora_flux.create_network_from_weights(1.0, None, None, [clip, None], transformer, tensors)[0]
    network.apply_to(None, transformer, clip is not None, True)
    result = transformer(**inputs)
    network.remove()
    return network, result


@pytest.mark.parametrize(
    ("prefix", "down", "up"),
    [
        ("transformer.", "lora_A", "lora_B"),
        ("", "lora_A.default", "lora_B.default"),
        ("base_model.model.", "lora_A", "lora_B"),
        ("transformer.", "lora.down", "lora.up"),
    ],
)
def test_files_of_diffusers_and_ai_toolkit_are_joined(make, transformer, inputs, prefix, down, up):
    network = make(split_qkv="True", in_dims="1,2,3,4,5")
    network.apply_to(None, transformer, False, True)
    expected = transformer(**inputs)
    network.remove()
    loaded, result = outputs(transformer, inputs, separate(network, prefix, down, up))
    assert {lora.lora_name for lora in loaded.loras} == {lora.lora_name for lora in network.unet_loras}
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_parts_that_are_missing_stay_untouched(make, transformer, inputs):
    network = make(split_qkv="True")
    tensors = separate(network, "transformer.", "lora_A", "lora_B")
    left_out = {key: value for key, value in tensors.items() if not re.search(r"attn\.to_k|proj_mlp", key)}
    for lora in network.unet_loras:
        if lora.split_rows:
            with torch.no_grad():
                for index in [1, 3] if "linear1" in lora.lora_name else [1] if "img_attn" in lora.lora_name else []:
                    lora.lora_up[index].weight.zero_()
    network.apply_to(None, transformer, False, True)
    expected = transformer(**inputs)
    network.remove()
    loaded, result = outputs(transformer, inputs, left_out)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert {lora.lora_name: lora.lora_dim for lora in loaded.loras}["lora_unet_single_blocks_0_linear1"] == 8


def test_parts_of_different_rank_and_strength_keep_their_strength(transformer):
    torch.manual_seed(0)
    parts = {"to_q": (2, 64, 1.0), "to_k": (3, 64, 6.0), "to_v": (1, 64, 0.5), "proj_mlp": (4, 256, None)}
    tensors, expected = {}, []
    for part, (rank, rows, alpha) in parts.items():
        key = f"transformer.single_transformer_blocks.1.{'' if part == 'proj_mlp' else 'attn.'}{part}"
        down, up = torch.randn(rank, 64), torch.randn(rows, rank)
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        expected.append((1.0 if alpha is None else alpha / rank) * up @ down)
    network = lora_flux.create_network_from_weights(1.0, None, None, [None, None], transformer, tensors)[0]
    (lora,) = network.loras
    assert lora.lora_name == "lora_unet_single_blocks_1_linear1" and lora.lora_dim == 10
    torch.testing.assert_close(lora.scale * lora.up_matrix @ lora.down_matrix, torch.cat(expected))


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", ""])
def test_files_with_the_original_module_names(make, transformer, clip, inputs, prefix):
    network = make()
    tensors = {}
    for lora in network.loras:
        is_text = lora.target.table.is_text_encoder
        key = ("text_encoders.clip_l.transformer." if is_text else prefix) + lora.target.path
        tensors[f"{key}.lora_A.weight"] = lora.lora_down.weight.detach()
        tensors[f"{key}.lora_B.weight"] = lora.lora_up.weight.detach()
        tensors[f"{key}.alpha"] = torch.tensor(lora.alpha)
    loaded, _ = outputs(transformer, inputs, tensors, clip)
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_files_of_xlabs_and_onetrainer(make, transformer, inputs):
    network = make(alpha=4.0)
    tensors = {}
    for lora in network.unet_loras:
        match = re.fullmatch(r"(double_blocks\.\d)\.(img|txt)_attn\.(qkv|proj)", lora.target.path)
        if match:
            key = f"{match[1]}.processor.{match[3]}_lora{ {'img': 1, 'txt': 2}[match[2]] }"
            tensors[f"{key}.down.weight"] = lora.lora_down.weight.detach()
            tensors[f"{key}.up.weight"] = lora.lora_up.weight.detach()
    loaded, _ = outputs(transformer, inputs, tensors)
    assert len(loaded.loras) == 8
    for lora in loaded.loras:
        assert torch.equal(lora.up_matrix, getattr(network, lora.lora_name).up_matrix)

    down, up = torch.randn(2, 64), torch.randn(64, 2)
    key = "lora_transformer_single_transformer_blocks_0_attn_to_v"
    loaded, _ = outputs(transformer, inputs, {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up})
    product = loaded.loras[0].up_matrix @ loaded.loras[0].down_matrix
    torch.testing.assert_close(product[128:192], up @ down)
    assert torch.count_nonzero(product) == torch.count_nonzero(product[128:192])


def test_incomplete_modules_are_reported(make, transformer, messages):
    state = {key: value for key, value in make().state_dict().items() if key.startswith("lora_unet")}
    del state["lora_unet_single_blocks_0_linear2.lora_up.weight"]
    network, _ = lora_flux.create_network_from_weights(1.0, None, None, [None, None], transformer, state)
    assert len(network.loras) == 25
    name = "lora_unet_single_blocks_0_linear2"
    assert any("1 of its 26 modules fit no layer" in said and said.endswith(f": {name}") for said in messages)


def test_reference_keys_are_all_understood(transformer, tmp_path):
    from pathlib import Path

    reference = Path(__file__).parent.parent / "reference_data" / "lora_flux_keys.json"
    keys = json.loads(reference.read_text(encoding="utf-8"))
    tensors = {key: torch.ones(shape) for key, (shape, _) in keys.items()}
    network = lora_flux.create_network(1.0, 4, 1.0, None, [None, None], transformer)
    assert network.load_state_dict(tensors) is not None
    assert network.state_dict().keys() == tensors.keys()


def test_the_last_layer_of_a_file_is_applied_though_it_is_never_trained(transformer, inputs):
    down, up = torch.randn(2, 64), torch.randn(128, 2)
    key = "lora_unet_final_layer_adaLN_modulation_1"
    network, _ = outputs(transformer, inputs, {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up})
    assert network.loras[0].org_module is transformer.final_layer.adaLN_modulation[1]
