"""convert_hunyuan_image_lora_to_comfy.py: the names of ComfyUI's model and back; Diffusers computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from library.models.hunyuan_image.transformer import HunyuanImageTransformer
from networks import lora_hunyuan_image
from networks.convert_hunyuan_image_lora_to_comfy import main
from tests.networks.conftest import randomise
from tests.networks.lora_tool_files import assert_same, deltas, independent_hashes, metadata, ranks, run
from tests.parity.test_hunyuan_image_transformer_matches_diffusers import inputs, run_diffusers, their_model
from tests.running import run_in_process
from tools.make_tiny_models import HUNYUAN_IMAGE, fill_randomly
from tools.other_layouts import diffusers_hunyuan_image_state

SAID = {
    "ss_base_model_version": "hunyuan-image-2.1",
    "ss_seed": "5",
    "ss_network_module": "networks.lora_hunyuan_image",
}
HASHES = ("sshs_model_hash", "sshs_legacy_hash")
# The Linear layers in the blocks of ComfyUI's HunyuanImage-2.1, as its classes name them, by sd-scripts' names.
COMFYUI_BLOCKS = {
    "double_blocks": {
        "img_attn_qkv": "img_attn.qkv",
        "img_attn_proj": "img_attn.proj",
        "img_mlp_fc1": "img_mlp.0",
        "img_mlp_fc2": "img_mlp.2",
        "img_mod_linear": "img_mod.lin",
        "txt_attn_qkv": "txt_attn.qkv",
        "txt_attn_proj": "txt_attn.proj",
        "txt_mlp_fc1": "txt_mlp.0",
        "txt_mlp_fc2": "txt_mlp.2",
        "txt_mod_linear": "txt_mod.lin",
    },
    "single_blocks": {"linear1": "linear1", "linear2": "linear2", "modulation_linear": "modulation.lin"},
}
# What Diffusers' class has in their place; q, k, v (and mlp) apart.
DIFFUSERS_BLOCKS = {
    "double_blocks": {
        "img_attn_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "img_attn_proj": ["attn.to_out.0"],
        "img_mlp_fc1": ["ff.net.0.proj"],
        "img_mlp_fc2": ["ff.net.2"],
        "img_mod_linear": ["norm1.linear"],
        "txt_attn_qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "txt_attn_proj": ["attn.to_add_out"],
        "txt_mlp_fc1": ["ff_context.net.0.proj"],
        "txt_mlp_fc2": ["ff_context.net.2"],
        "txt_mod_linear": ["norm1_context.linear"],
    },
    "single_blocks": {
        "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
        "linear2": ["proj_out"],
        "modulation_linear": ["norm.linear"],
    },
}
ROWS = [64, 64, 64, 256]


@pytest.fixture(scope="module")
def model() -> HunyuanImageTransformer:
    ours = HunyuanImageTransformer(HUNYUAN_IMAGE).requires_grad_(False).eval()
    fill_randomly(ours, 1, "convert")
    return ours


def kohya_file(model: HunyuanImageTransformer, path: Path, dtype: torch.dtype | None = None, **arguments: str) -> Path:
    """A file of ``networks.lora_hunyuan_image`` with random numbers."""
    network = lora_hunyuan_image.create_network(1.0, 4, 3.0, None, None, model, **arguments)
    randomise(network, 0.3)
    network.save_weights(path, dtype, SAID)
    return path


def convert(source: Path, name: str, *arguments: str) -> Path:
    target = source.with_name(f"{name}.safetensors")
    run(main, source, target, *arguments)
    return target


def in_diffusers(source: Path, target: Path, prefix: str = "transformer.") -> Path:
    """A file of sd-scripts as a trainer on Diffusers' class writes it, made by the table above."""
    tensors, made = load_file(source), {}
    for name in ranks(source):
        lists, number, layer = name.removeprefix("lora_unet_").replace("_blocks_", "_blocks.").partition(".")
        number, _, layer = layer.partition("_")
        parts = DIFFUSERS_BLOCKS[lists][layer]
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        scale = float(tensors[f"{name}.alpha"]) / len(down)
        blocks = "transformer_blocks" if lists == "double_blocks" else "single_transformer_blocks"
        for part, piece in zip(parts, up.split(ROWS[: len(parts)]) if len(parts) > 1 else [up]):
            made[f"{prefix}{blocks}.{number}.{part}.lora_A.weight"] = scale * down
            made[f"{prefix}{blocks}.{number}.{part}.lora_B.weight"] = piece.clone()
    save_file(made, target)
    return target


@pytest.mark.parametrize("split", ["False", "True"], ids=["plain", "split_qkv"])
def test_every_key_is_one_that_comfyui_s_model_has(model, tmp_path, split):
    """Its rule: ``lora_unet_`` and the path of any weight of its model, with underscores for dots."""
    converted = convert(kohya_file(model, tmp_path / "kohya.safetensors", split_qkv=split), "comfyui")
    weights = [
        f"{blocks}.{number}.{path}"
        for blocks, layers in COMFYUI_BLOCKS.items()
        for number in range(2)
        for path in layers.values()
    ]
    names = {f"lora_unet_{path}".replace(".", "_") for path in weights}
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(load_file(converted)) == {f"{name}.{part}" for name in names for part in parts}
    assert len(names) == 2 * 13


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_there_and_back_no_bit_changes_and_twice_is_once(model, tmp_path, dtype):
    source = kohya_file(model, tmp_path / "kohya.safetensors", dtype, split_qkv="True")
    there = convert(source, "there")
    back = convert(there, "back", "--reverse")
    tensors, found = load_file(source), load_file(back)
    assert found.keys() == tensors.keys() and metadata(back) == metadata(source)
    assert all(torch.equal(found[key], tensors[key]) and found[key].dtype == tensors[key].dtype for key in tensors)
    for once, twice in ((there, convert(there, "there_twice")), (back, convert(back, "back_twice", "--reverse"))):
        assert once.read_bytes() == twice.read_bytes()
    assert convert(source, "never", "--reverse").read_bytes() == back.read_bytes()


def test_metadata_are_kept_and_only_hashes_are_new(model, tmp_path):
    source = kohya_file(model, tmp_path / "kohya.safetensors", train_blocks="single")
    converted = convert(source, "comfyui")
    said = metadata(converted)
    assert {key: value for key, value in said.items() if key not in HASHES} == SAID
    assert tuple(said[key] for key in HASHES) == independent_hashes(converted)
    stale, bare = (tmp_path / f"{name}.safetensors" for name in ("stale", "bare"))
    save_file(load_file(source), stale, {**SAID, "sshs_model_hash": "old", "modelspec.hash_sha256": "old"})
    assert metadata(convert(stale, "fresh")) == said
    save_file(load_file(source), bare)
    assert metadata(convert(bare, "bare_comfyui")) == {}
    assert metadata(convert(bare, "bare_back", "--reverse"))["ss_base_model_version"] == "hunyuan-image-2.1"


@pytest.mark.parametrize("split", ["False", "True"], ids=["plain", "split_qkv"])
def test_diffusers_names_are_read_in_both_directions(model, tmp_path, split):
    source = kohya_file(model, tmp_path / "kohya.safetensors", split_qkv=split)
    theirs = in_diffusers(source, tmp_path / "diffusers.safetensors")
    assert_same(deltas(convert(theirs, "kohya_again", "--reverse")), deltas(source), 1e-6)
    assert_same(deltas(convert(theirs, "comfyui")), deltas(convert(source, "direct")), 1e-6)


def test_alpha_in_the_settings_of_peft_counts(tmp_path):
    name = "transformer.single_transformer_blocks.0.proj_out"
    tensors = {f"{name}.lora_A.weight": torch.ones(4, 320), f"{name}.lora_B.weight": torch.ones(64, 4)}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": '{"transformer.lora_alpha": 8}'})
    converted = convert(tmp_path / "a.safetensors", "b")
    assert float(load_file(converted)["lora_unet_single_blocks_0_linear2.alpha"]) == 8
    assert metadata(converted) == {}


def test_diffusers_computes_the_same_with_its_own_names(model, tmp_path):
    pytest.importorskip("peft", reason="diffusers loads LoRA through peft")
    theirs = their_model(HUNYUAN_IMAGE).eval()
    theirs.load_state_dict(diffusers_hunyuan_image_state(model.state_dict(), HUNYUAN_IMAGE), strict=True)
    given = inputs(HUNYUAN_IMAGE, (5, 8), (3, 0))
    source = kohya_file(model, tmp_path / "kohya.safetensors")
    file = in_diffusers(source, tmp_path / "diffusers.safetensors")
    theirs.load_lora_adapter(str(file))
    loaded = {name for name, _ in theirs.named_modules() if name.endswith(".lora_A.default_0")}
    assert len(loaded) == len(deltas(file, "peft")) == 2 * (8 + 6) + 2 * (4 + 2)

    def outputs() -> Tensor:
        with torch.no_grad():
            return model(**given)

    plain = outputs()
    for path in (source, file, convert(source, "comfyui")):
        network, _ = lora_hunyuan_image.create_network_from_weights(1.0, path, None, None, model, for_inference=True)
        network.apply_to(None, model, False, True)
        hooked = outputs()
        network.remove()
        assert (hooked - plain).abs().max() > 0.1
        torch.testing.assert_close(run_diffusers(theirs, given), hooked, rtol=1e-4, atol=1e-4)


def test_what_is_not_known_is_refused_and_nothing_written(model, tmp_path):
    source = kohya_file(model, tmp_path / "kohya.safetensors", train_blocks="single")
    tensors, out = load_file(source), tmp_path / "out.safetensors"

    def refused(tensors: dict[str, Tensor], message: str, said: dict[str, str] | None = None) -> None:
        save_file(tensors, tmp_path / "theirs.safetensors", said)
        for direction in ([], ["--reverse"]):
            with pytest.raises(UserError, match=message):
                run(main, tmp_path / "theirs.safetensors", out, *direction)
        assert not out.exists()

    for name in ("lora_unet_double_blocks_0_img_mod_linearear", "lora_unet_single_blocks_0_linear3"):
        more = {f"{name}.lora_down.weight": torch.ones(1, 64), f"{name}.lora_up.weight": torch.ones(64, 1)}
        refused({**tensors, **more}, f"1 of its modules and tensors belong to no layer of HunyuanImage-2.1: {name}")
    refused({**tensors, "surplus": torch.ones(1)}, "belong to no layer of HunyuanImage-2.1: surplus")
    refused({"weight": torch.ones(2, 2)}, "contains no LoRA modules")
    broken = {**tensors, "lora_unet_single_blocks_0_linear2.lora_up.weight": torch.full((64, 4), torch.inf)}
    refused(broken, "linear2.lora_up.weight.* not finite")
    twice = {key.replace("modulation_linear", "modulation_lin"): tensor.clone() for key, tensor in tensors.items()}
    refused({**tensors, **twice}, "holds lora_unet_single_blocks_0_modulation_linear twice")
    refused(tensors, "is for Lumina Image 2.0, as its ss_base_model_version says", {"ss_base_model_version": "lumina2"})
    with pytest.raises(UserError, match="dst_path: .* is one of the inputs"):
        run(main, source, source)


def test_it_is_a_program(model, tmp_path):
    source = kohya_file(model, tmp_path / "kohya.safetensors", train_blocks="single")
    done = run_in_process("networks/convert_hunyuan_image_lora_to_comfy.py", source, tmp_path / "new.safetensors")
    assert done.returncode == 0, done.stderr
    missing = run_in_process("networks/convert_hunyuan_image_lora_to_comfy.py", tmp_path / "no.safetensors", source)
    assert missing.returncode == 2 and "does not exist" in missing.stderr
