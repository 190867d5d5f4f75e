"""A LoRA for FLUX.1 does the same under the names of every program: in a network, and converted."""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from library.errors import UserError
from networks import lora_flux
from networks.convert_flux_lora import main
from networks.lora_tools.conversion import ConvertedTensors
from networks.lora_tools.flux_lora import FluxLoRA
from networks.lora_tools.flux_tools import CONVERSIONS
from tests.networks.lora_tool_files import assert_same, deltas, metadata, ranks, run, write_lora

WIDTH = 64
ONE_BLOCK = {  # layer of the original transformer -> its parts in diffusers; the numbers are of blocks
    "double_blocks.1.img_attn.qkv": [f"transformer_blocks.1.attn.to_{name}" for name in "qkv"],
    "double_blocks.1.txt_attn.qkv": [f"transformer_blocks.1.attn.add_{name}_proj" for name in "qkv"],
    "double_blocks.1.img_attn.proj": ["transformer_blocks.1.attn.to_out.0"],
    "double_blocks.1.txt_attn.proj": ["transformer_blocks.1.attn.to_add_out"],
    "double_blocks.1.img_mlp.0": ["transformer_blocks.1.ff.net.0.proj"],
    "double_blocks.1.txt_mlp.2": ["transformer_blocks.1.ff_context.net.2"],
    "double_blocks.1.txt_mod.lin": ["transformer_blocks.1.norm1_context.linear"],
    "single_blocks.0.linear1": [
        *(f"single_transformer_blocks.0.attn.to_{name}" for name in "qkv"),
        "single_transformer_blocks.0.proj_mlp",
    ],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
    "single_blocks.0.modulation.lin": ["single_transformer_blocks.0.norm.linear"],
    "img_in": ["x_embedder"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}
CLIP = "text_model.encoder.layers.1.self_attn.out_proj"
T5 = "encoder.block.0.layer.1.DenseReluDense.wi_1"

Factors = dict[str, tuple[Tensor, Tensor]]  # layer -> down, up; the strength is 1


@pytest.fixture
def factors(transformer, clip, t5) -> Factors:
    """A LoRA of rank 3 for a layer of each kind."""
    random = torch.Generator().manual_seed(6)
    layers = {path: transformer.get_submodule(path) for path in ONE_BLOCK}
    layers |= {CLIP: clip.get_submodule(CLIP.removeprefix("text_model.")), T5: t5.get_submodule(T5)}
    return {
        path: (
            torch.randn(3, layer.in_features, generator=random),
            torch.randn(layer.out_features, 3, generator=random),
        )
        for path, layer in layers.items()
    }


def kohya_name(path: str) -> str:
    prefix = {CLIP: "lora_te1", T5: "lora_te3"}.get(path, "lora_unet")
    return f"{prefix}_{path.replace('.', '_')}"


def original_names(factors: Factors, prefix: str, clip: str, t5: str) -> Factors:
    texts = {CLIP: clip, T5: t5}
    return {f"{texts.get(path, prefix)}{path}": both for path, both in factors.items()}


def diffusers_names(factors: Factors, prefix: str, separator: str, clip: str, t5: str) -> Factors:
    named: Factors = {}
    for path, (down, up) in factors.items():
        if path in (CLIP, T5):
            named[{CLIP: clip, T5: t5}[path]] = (down, up)
            continue
        if path == "final_layer.adaLN_modulation.1":
            up = torch.cat((up[WIDTH:], up[:WIDTH]))
        parts = ONE_BLOCK[path]
        rows = [len(up)] if len(parts) == 1 else [WIDTH, WIDTH, WIDTH, len(up) - 3 * WIDTH][: len(parts)]
        for part, piece in zip(parts, up.split(rows)):
            named[prefix + part.replace(".", separator)] = (down, piece)
    return named


def xlabs_names(factors: Factors) -> tuple[Factors, set[str]]:
    """What it has modules for: of the single blocks, q, k and v as one, and the second layer."""
    block, lone = "double_blocks.1.processor", "single_blocks.0.processor"
    named = {
        f"{block}.qkv_lora1": factors["double_blocks.1.img_attn.qkv"],
        f"{block}.qkv_lora2": factors["double_blocks.1.txt_attn.qkv"],
        f"{block}.proj_lora1": factors["double_blocks.1.img_attn.proj"],
        f"{block}.proj_lora2": factors["double_blocks.1.txt_attn.proj"],
        f"{lone}.qkv_lora": factors["single_blocks.0.linear1"],
        f"{lone}.proj_lora": factors["single_blocks.0.linear2"],
    }
    down, up = named[f"{lone}.qkv_lora"]
    named[f"{lone}.qkv_lora"] = (down, up[: 3 * WIDTH])
    kept = {f"double_blocks.1.{s}_attn.{name}" for s in ("img", "txt") for name in ("qkv", "proj")}
    return named, kept | {"single_blocks.0.linear1", "single_blocks.0.linear2"}


MORE_NAMES = {  # diffusers' paths with what stands before them, between their parts, and after them
    "a named adapter": ("transformer.", ".", ""),
    "wrapped by peft": ("transformer.base_model.model.", ".", ""),
    "wrapped twice": ("base_model.model.transformer.", ".", ""),
    "lora_unet": ("lora_unet_", "_", ""),
    "lora_unet with an underscore": ("lora_unet_", "_", "_"),
    "lycoris": ("lycoris_", "_", ""),
    "diffusion_model": ("diffusion_model.", ".", ""),
}


def dialect(name: str, factors: Factors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The file's tensors, and what each layer must get by this suite's names."""
    down_key, up_key = ".lora_A.weight", ".lora_B.weight"
    everything = set(factors)
    te, te2 = f"text_encoder.{CLIP}", f"text_encoder_2.{T5}"
    if name == "diffusers":
        named = diffusers_names(factors, "transformer.", ".", te, te2)
    elif name == "older diffusers":
        named = diffusers_names(factors, "transformer.", ".", te.replace("out_proj", "to_out_lora"), te2)
        down_key, up_key = ".lora.down.weight", ".lora.up.weight"
    elif name == "diffusers with transformers 5":
        named = diffusers_names(factors, "transformer.", ".", te.replace("text_model.", ""), te2)
    elif name == "onetrainer":
        texts = (f"lora_te1_{CLIP.replace('.', '_')}", f"lora_te2_{T5.replace('.', '_')}")
        named = diffusers_names(factors, "lora_transformer_", "_", *texts)
        down_key, up_key = ".lora_down.weight", ".lora_up.weight"
    elif name == "comfyui":
        texts = ("text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer.")
        named = original_names(factors, "diffusion_model.", *texts)
    elif name in ("bfl", "bfl of peft"):
        everything -= {CLIP, T5}
        prefix = "base_model.model." if name == "bfl of peft" else ""
        named = original_names({path: factors[path] for path in everything}, prefix, "", "")
    elif name in MORE_NAMES:
        everything -= {CLIP, T5}
        prefix, separator, end = MORE_NAMES[name]
        named = diffusers_names({path: factors[path] for path in everything}, prefix, separator, "", "")
        named = {f"{module}{end}": both for module, both in named.items()}
        if name == "lycoris":
            down_key, up_key = ".lora_down.weight", ".lora_up.weight"
        if name == "a named adapter":
            down_key, up_key = ".lora_A.my-style_1.weight", ".lora_B.my-style_1.weight"
    else:
        named, everything = xlabs_names(factors)
        down_key, up_key = ".down.weight", ".up.weight"
    tensors: dict[str, Tensor] = {}
    for module, (down, up) in named.items():
        old = module.endswith("_lora") and name == "older diffusers"
        tensors[module + (".down.weight" if old else down_key)] = down.clone()
        tensors[module + (".up.weight" if old else up_key)] = up.clone()
    wanted = {}
    for path in everything:
        down, up = (tensor.double() for tensor in factors[path])
        wanted[kohya_name(path)] = up @ down
        if name == "xlabs" and path.endswith("linear1"):
            wanted[kohya_name(path)][3 * WIDTH :] = 0
    return tensors, wanted


DIALECTS = (
    *("diffusers", "older diffusers", "diffusers with transformers 5", "onetrainer"),
    *("comfyui", "bfl", "bfl of peft", "xlabs"),
)


@pytest.mark.parametrize("name", (*DIALECTS, *MORE_NAMES))
def test_networks_read_it(name, factors, transformer, clip, t5, messages):
    tensors, wanted = dialect(name, factors)
    network, _ = lora_flux.create_network_from_weights(1.0, None, None, [clip, t5], transformer, tensors)
    found = {lora.lora_name: lora.scale * lora.up_matrix.double() @ lora.down_matrix.double() for lora in network.loras}
    assert_same({key: delta.detach() for key, delta in found.items()}, wanted, 1e-7)
    assert not any("fit no layer" in message for message in messages)


@pytest.mark.parametrize("name", DIALECTS)
def test_it_is_converted(name, factors, tmp_path):
    tensors, wanted = dialect(name, factors)
    save_file(tensors, tmp_path / "theirs.safetensors")
    source = {"older": "diffusers", "onetrainer": "onetrainer"}.get(name.split()[0], name.split()[0])
    given = ("--src_path", tmp_path / "theirs.safetensors", "--dst_path", tmp_path / "ours.safetensors")
    run(main, *given, "--src", source)
    assert_same(deltas(tmp_path / "ours.safetensors"), wanted, 1e-7)
    assert set(ranks(tmp_path / "ours.safetensors").values()) == {3}, "parts that share their down become one again"
    said = metadata(tmp_path / "ours.safetensors")
    form = "ai-toolkit" if source == "diffusers" else source
    assert said["ss_training_comment"] == f"converted from {form} to sd-scripts"
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("3", "3.0")


@pytest.mark.parametrize("name", MORE_NAMES)
def test_further_names_are_read_by_the_tools(name, factors, tmp_path):
    tensors, wanted = dialect(name, factors)
    save_file(tensors, tmp_path / "theirs.safetensors")
    run(main, "--src_path", tmp_path / "theirs.safetensors", "--dst_path", tmp_path / "ours.safetensors")
    assert_same(deltas(tmp_path / "ours.safetensors"), wanted, 1e-7)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def converted(source: Path, name: str, *arguments: object) -> Path:
    target = source.with_name(f"{name}.safetensors")
    run(main, "--src_path", source, "--dst_path", target, *arguments)
    return target


LAYERS = {
    "lora_unet_double_blocks_0_img_attn_qkv": (48, 16),
    "lora_unet_single_blocks_0_linear1": (112, 16),
    "lora_unet_single_blocks_0_linear2": (16, 80),
    "lora_unet_final_layer_adaLN_modulation_1": (32, 16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [0.25, 1.0, 4.0, 32.0])
def test_powers_of_two_lose_nothing_there_and_back(tmp_path, dtype, alpha):
    """Compared in float64, as equal numbers."""
    source = write_lora(tmp_path / "a.safetensors", LAYERS, rank=4, alpha=alpha, dtype=dtype)
    back = converted(converted(source, "ai", "--dst", "ai-toolkit"), "back")
    assert {tensor.dtype for tensor in load_file(converted(source, "b", "--dst", "peft")).values()} == {dtype}
    before, after = deltas(source), deltas(back)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def part_file(path: Path, parts: dict[str, tuple[int, int]], **alphas: float) -> Path:
    """Parts of a single block of width 16: rows and rank of each; alpha where one is given."""
    random, tensors = torch.Generator().manual_seed(3), {}
    for part, (rows, rank) in parts.items():
        name = f"transformer.single_transformer_blocks.0.{part}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, 16, generator=random)
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=random)
        if part.split(".")[-1] in alphas:
            tensors[f"{name}.alpha"] = torch.tensor(alphas[part.split(".")[-1]])
    save_file(tensors, path)
    return path


UNEQUAL = {"attn.to_q": (16, 2), "attn.to_k": (16, 3), "attn.to_v": (16, 1), "proj_mlp": (40, 6)}


def test_parts_of_any_rank_come_back_as_they_were(tmp_path):
    """Their ranks add up to 12, which says nothing of how to take them apart; the zeros in the up do."""
    source = part_file(tmp_path / "ai.safetensors", UNEQUAL)
    kohya = converted(source, "kohya")
    assert ranks(kohya) == {"lora_unet_single_blocks_0_linear1": 12}
    back, before = load_file(converted(kohya, "back", "--dst", "ai-toolkit")), load_file(source)
    assert back.keys() == before.keys() and all(torch.equal(back[key], before[key]) for key in before)


def test_parts_of_any_strength_keep_it(tmp_path):
    source = part_file(tmp_path / "ai.safetensors", UNEQUAL, to_q=1.0, to_v=-3.0, proj_mlp=0.0)
    kohya = converted(source, "kohya")
    wanted = torch.cat([deltas(source, "peft")[f"transformer.single_transformer_blocks.0.{part}"] for part in UNEQUAL])
    torch.testing.assert_close(deltas(kohya)["lora_unet_single_blocks_0_linear1"], wanted, rtol=1e-6, atol=1e-6)
    silent = part_file(tmp_path / "silent.safetensors", UNEQUAL, to_q=0.0, to_k=0.0, to_v=0.0, proj_mlp=0.0)
    assert not deltas(converted(silent, "b"))["lora_unet_single_blocks_0_linear1"].any()


def test_an_alpha_that_the_number_format_lacks_loses_no_strength(tmp_path):
    source = write_lora(tmp_path / "a.safetensors", LAYERS, rank=4, alpha=1.2345678)
    made = converted(converted(source, "ai", "--dst", "comfyui"), "b", "--save_precision", "bf16")
    found = load_file(made)
    name = "lora_unet_single_blocks_0_linear2"
    strength = float(found[f"{name}.alpha"]) / 4
    up = load_file(source)[f"{name}.lora_up.weight"] * (1.2345678 / 4 / strength)
    assert torch.equal(found[f"{name}.lora_up.weight"], up.bfloat16())


# ---- what PEFT says of alpha -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_the_settings_beside_a_file_of_peft_count(tmp_path, transformer, factors, rslora):
    """Against PEFT's own layers: ``adapter_config.json`` holds the alpha, the first pattern that fits wins."""
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig, PeftModel, get_peft_model

    config = {"attention_head_dim": 32, "num_attention_heads": 2, "num_layers": 2, "num_single_layers": 1}
    config |= {"joint_attention_dim": 48, "pooled_projection_dim": 32, "axes_dims_rope": (4, 14, 14)}
    theirs = FluxTransformer2DModel(**config)
    settings = LoraConfig(
        r=4, lora_alpha=10, target_modules=["to_q", "ff.net.2", "proj_mlp"], init_lora_weights=False,
        alpha_pattern={"0.attn.to_q": 3, "attn.to_q|nothing": 5}, use_rslora=rslora,
    )  # fmt: skip
    model = get_peft_model(theirs, settings)
    assert isinstance(model, PeftModel)
    model.save_pretrained(tmp_path)
    saved = tmp_path / "adapter_model.safetensors"
    blocks, lone = model.base_model.model.transformer_blocks, model.base_model.model.single_transformer_blocks
    wanted = {
        "lora_unet_double_blocks_0_img_attn_qkv": (blocks[0].attn.to_q, slice(0, 64)),
        "lora_unet_double_blocks_1_img_attn_qkv": (blocks[1].attn.to_q, slice(0, 64)),
        "lora_unet_double_blocks_1_img_mlp_2": (blocks[1].ff.net[2], slice(None)),
        "lora_unet_single_blocks_0_linear1": (lone[0].proj_mlp, slice(192, None)),
    }
    found = deltas(converted(saved, "kohya", "--src", "peft"))
    network, _ = lora_flux.create_network_from_weights(1.0, saved, None, [None, None], transformer)
    for name, (layer, rows) in wanted.items():
        delta = layer.get_delta_weight("default").detach()
        torch.testing.assert_close(found[name][rows], delta.double(), rtol=1e-5, atol=1e-5)
        lora = getattr(network, name)
        here = lora.scale * lora.up_matrix @ lora.down_matrix
        torch.testing.assert_close(here[rows].detach(), delta, rtol=1e-5, atol=1e-5)
    assert "lora_adapter_metadata" not in metadata(tmp_path / "kohya.safetensors")


# ---- what is said and refused ----------------------------------------------------------------------------------------


def test_the_size_of_layers_without_a_module_is_taken_from_others_or_told(tmp_path, capsys):
    only_q = part_file(tmp_path / "a.safetensors", {"attn.to_q": (16, 2)})
    assert deltas(converted(only_q, "b"))["lora_unet_single_blocks_0_linear1"].shape == (48 + 64, 16)
    assert capsys.readouterr().err.count("no module shows the size of the feed-forward layers; 4 times 16") == 1
    name = "transformer.transformer_blocks.5.ff.net.2"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 40), f"{name}.lora_B.weight": torch.ones(16, 2)}
    save_file({**load_file(only_q), **tensors}, tmp_path / "c.safetensors")
    found = deltas(converted(tmp_path / "c.safetensors", "d"))
    assert found["lora_unet_single_blocks_0_linear1"].shape == (48 + 40, 16)
    assert "no module shows" not in capsys.readouterr().err


def refused(tmp_path: Path, tensors: dict[str, Tensor], message: str, *arguments: object) -> None:
    save_file(tensors, tmp_path / "theirs.safetensors")
    with pytest.raises(UserError, match=message):
        converted(tmp_path / "theirs.safetensors", "new", *arguments)
    assert not (tmp_path / "new.safetensors").exists()


def test_a_control_lora_is_named(tmp_path):
    module = "double_blocks.0.img_attn.proj.lora_"
    tensors = {f"{module}A.weight": torch.ones(2, 4), f"{module}B.weight": torch.ones(4, 2)}
    refused(tmp_path, {**tensors, f"{module}B.bias": torch.ones(4)}, "Control LoRA of Black Forest Labs.*B.bias")
    norm = {"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(4)}
    refused(tmp_path, {**tensors, **norm}, "Control LoRA of Black Forest Labs.*query_norm")


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "Stable Diffusion XL"),
        ("lora_unet_double_blocks_0_img_attn_q_fc1", "HunyuanImage-2.1"),
        ("lora_unet_layers_0_attention_qkv", "Lumina Image 2.0"),
    ],
)
def test_a_lora_for_another_model_is_named(tmp_path, name, family):
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(4, 2)}
    refused(tmp_path, tensors, f"{name}.* It is for {re.escape(family)}", "--dst", "ai-toolkit")


def test_matrices_that_do_not_fit_their_layer_are_named(tmp_path):
    for module, out in (("lora_unet_single_blocks_0_linear1", 20), ("lora_unet_double_blocks_0_img_attn_qkv", 40)):
        tensors = {f"{module}.lora_down.weight": torch.ones(2, 16), f"{module}.lora_up.weight": torch.ones(out, 2)}
        refused(tmp_path, tensors, f"the matrices of {module}.* do not fit", "--dst", "ai-toolkit")


def test_a_layer_under_two_names_is_refused(tmp_path):
    tensors = {}
    for name in ("lora_unet_single_blocks_0_linear1", "transformer.single_transformer_blocks.0.attn.to_q"):
        out = 112 if name.startswith("lora") else 16
        tensors |= {f"{name}.lora_A.weight": torch.ones(2, 16), f"{name}.lora_B.weight": torch.ones(out, 2)}
    refused(tmp_path, tensors, "holds lora_unet_single_blocks_0_linear1 twice")


def test_the_files_story_goes_on_and_stale_entries_end(tmp_path):
    said = {"ss_seed": "7", "ss_training_comment": "mine", "sshs_model_hash": "old", "modelspec.hash_sha256": "old"}
    said |= {"modelspec.title": "cat", "ss_network_split_qkv": "alpha_times_parts", "ss_network_dim": "32"}
    said |= {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 1})}
    source = write_lora(tmp_path / "a.safetensors", LAYERS, rank=4, alpha=2.0, metadata=said)
    found = metadata(converted(source, "ai", "--dst", "diffusers"))
    assert found == {
        "ss_seed": "7", "modelspec.title": "cat", "ss_network_dim": "4", "ss_network_alpha": "4.0",
        "ss_training_comment": "converted from sd-scripts to diffusers; mine",
    }  # fmt: skip
    only_needed = metadata(converted(tmp_path / "ai.safetensors", "b", "--no_metadata"))
    only_needed = {key: value for key, value in only_needed.items() if not key.startswith("sshs_")}
    assert only_needed == {
        "ss_v2": "False", "ss_base_model_version": "flux1", "ss_network_module": "networks.lora_flux",
        "ss_network_dim": "4", "ss_network_alpha": "4.0",
    }  # fmt: skip


def test_memory_holds_little_more_than_one_module(tmp_path):
    layers = {f"lora_unet_single_blocks_{number}_linear1": (448, 64) for number in range(30)}
    write_lora(tmp_path / "a.safetensors", layers, rank=16)
    one = 4 * 16 * (448 + 64)

    def held() -> int:
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, Tensor) and thing.device.type == "cpu"]
        tensors = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]  # of a dry run before this test
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())

    before = held()
    made = ConvertedTensors(CONVERSIONS, FluxLoRA(tmp_path / "a.safetensors"), "ai-toolkit", None)
    for key in sorted(made.described)[10::100]:
        made.load(key)
        assert held() - before < 4 * one
