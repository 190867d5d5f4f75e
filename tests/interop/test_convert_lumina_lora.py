"""convert_lumina_lora.py: a LoRA does the same under the names of every program, and diffusers computes the same."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.errors import UserError
from library.models.lumina.transformer import LuminaTransformer
from networks import lora_lumina
from networks.convert_lumina_lora import main
from tests.networks.conftest import randomise
from tests.networks.lora_tool_files import assert_same, deltas, independent_hashes, metadata, ranks, run
from tests.running import run_in_process
from tools.make_tiny_models import LUMINA, fill_randomly
from tools.other_layouts import diffusers_lumina_config, diffusers_lumina_state

pytestmark = pytest.mark.skipif(find_spec("peft") is None, reason="diffusers loads LoRA through peft")

CONFIG = replace(LUMINA, layers=2)
QUERY, SHARED = CONFIG.heads * CONFIG.head_dim, CONFIG.kv_heads * CONFIG.head_dim
ROWS = [QUERY, SHARED, SHARED]
TEXT = {"lora_te_layers_1_self_attn_q_proj": (32, 32), "lora_te_layers_0_mlp_down_proj": (32, 64)}
KEYS = ("lora_down.weight", "lora_up.weight", "alpha")
# The same layers in diffusers, written down from its own class.
BLOCK = {
    "attention_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "attention_out": ["attn.to_out.0"],
    "feed_forward_w1": ["feed_forward.linear_1"],
    "feed_forward_w2": ["feed_forward.linear_2"],
    "feed_forward_w3": ["feed_forward.linear_3"],
    "adaLN_modulation_1": ["norm1.linear"],
}
OUTER = {
    "x_embedder": "x_embedder",
    "t_embedder_mlp_0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder_mlp_2": "time_caption_embed.timestep_embedder.linear_2",
    "cap_embedder_1": "time_caption_embed.caption_embedder.1",
    "final_layer_linear": "norm_out.linear_2",
    "final_layer_adaLN_modulation_1": "norm_out.linear_1",
}
IN_DIFFUSERS = {f"lora_unet_{name}": [f"transformer.{theirs}"] for name, theirs in OUTER.items()} | {
    f"lora_unet_{blocks}_{number}_{name}": [f"transformer.{blocks}.{number}.{part}" for part in parts]
    for blocks, count in (("layers", 2), ("noise_refiner", 1), ("context_refiner", 1))
    for number in range(count)
    for name, parts in BLOCK.items()
    if not (blocks == "context_refiner" and name.startswith("adaLN"))
}


@pytest.fixture(scope="module")
def models() -> tuple[LuminaTransformer, nn.Module]:
    """The same tiny transformer here and in diffusers."""
    from diffusers import Lumina2Transformer2DModel

    ours = LuminaTransformer(CONFIG).requires_grad_(False).eval()
    fill_randomly(ours, 1, "convert")
    theirs = Lumina2Transformer2DModel.from_config(diffusers_lumina_config(CONFIG)).eval()
    theirs.load_state_dict(diffusers_lumina_state(ours.state_dict(), CONFIG), strict=True)
    return ours, theirs


def kohya_file(model: nn.Module, path: Path, alpha: float = 3.0, text: bool = False, **arguments: str) -> Path:
    """A file of ``networks.lora_lumina`` with random numbers, of rank 4; ``text`` adds two modules of Gemma."""
    network = lora_lumina.create_network(1.0, 4, alpha, None, [None], model, **arguments)
    randomise(network, 0.3)
    network.save_weights(path, None, {"ss_base_model_version": "lumina2", "ss_seed": "5"})
    if text:
        random, tensors = torch.Generator().manual_seed(3), load_file(path)
        for name, (out, inputs) in TEXT.items():
            tensors[f"{name}.lora_down.weight"] = torch.randn(4, inputs, generator=random)
            tensors[f"{name}.lora_up.weight"] = torch.randn(out, 4, generator=random)
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
        save_file(tensors, path, metadata(path))
    return path


def as_diffusers(wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The differences of layers [out, in] as diffusers has them: q, k and v apart."""
    found = {}
    for name, difference in wanted.items():
        theirs = IN_DIFFUSERS[name]
        found |= dict(zip(theirs, difference.split(ROWS) if len(theirs) > 1 else [difference]))
    return found


def convert(source: Path, name: str, *arguments: object) -> Path:
    target = source.with_name(f"{name}.safetensors")
    run(main, "--src_path", source, "--dst_path", target, *arguments)
    return target


@pytest.mark.parametrize("alpha", [1.0, 3.0, 4.0])
@pytest.mark.parametrize("split", ["False", "True"], ids=["plain", "split_qkv"])
def test_to_diffusers_and_back(models, tmp_path, split, alpha):
    source = kohya_file(models[0], tmp_path / "kohya.safetensors", alpha, split_qkv=split, embedder_dims="2,3,4")
    converted = convert(source, "diffusers", "--src", "sd-scripts", "--dst", "diffusers")
    assert_same(deltas(converted, "peft"), as_diffusers(deltas(source)), 1e-6)
    assert not any(key.endswith(".alpha") for key in load_file(converted))
    comment = "converted from sd-scripts to diffusers"
    assert metadata(converted) == {"ss_base_model_version": "lumina2", "ss_seed": "5", "ss_training_comment": comment}

    back = convert(converted, "back", "--src", "peft", "--dst", "sd-scripts")
    assert_same(deltas(back), deltas(source), 1e-6)
    assert ranks(back) == ranks(source), "parts that share their down become one again"
    said = metadata(back)
    assert (said["sshs_model_hash"], said["sshs_legacy_hash"]) == independent_hashes(back)
    assert said["ss_network_module"] == "networks.lora_lumina" and said["ss_seed"] == "5"
    ours, theirs = load_file(back), load_file(source)
    unscaled = [name for name, rank in ranks(source).items() if theirs[f"{name}.alpha"] == rank]
    assert len(unscaled) == {1.0: 0, 3.0: 2, 4.0: 26}[alpha], "of 29; where nothing is folded, all bits come back"
    for name in unscaled:
        assert all(torch.equal(ours[f"{name}.{part}"], theirs[f"{name}.{part}"]) for part in KEYS)


def test_comfyui_names_and_back_bit_for_bit(models, tmp_path):
    source = kohya_file(models[0], tmp_path / "kohya.safetensors", text=True, embedder_dims="2,3,4")
    converted = convert(source, "comfyui", "--dst", "comfyui")
    assert {
        "diffusion_model.layers.0.attention.qkv",
        "diffusion_model.final_layer.adaLN_modulation.1",
        "diffusion_model.cap_embedder.1",
        "text_encoders.gemma2_2b.transformer.model.layers.1.self_attn.q_proj",
        "text_encoders.gemma2_2b.transformer.model.layers.0.mlp.down_proj",
    } <= set(deltas(converted))
    back = convert(converted, "back", "--src", "comfyui")
    theirs, ours = load_file(source), load_file(back)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)


@pytest.mark.parametrize("split", ["False", "True"], ids=["plain", "split_qkv"])
def test_diffusers_computes_the_same_with_the_converted_file(models, tmp_path, split):
    ours, theirs = models
    random = torch.Generator().manual_seed(2)
    latents, text = torch.randn(2, 16, 4, 6, generator=random), torch.randn(2, 5, CONFIG.text_dim, generator=random)
    time, mask = torch.tensor([0.2, 0.7]), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

    def outputs() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return ours(latents, time, text, mask), theirs(latents, time, text, mask.bool()).sample

    plain, _ = outputs()
    source = kohya_file(ours, tmp_path / "kohya.safetensors", split_qkv=split, embedder_dims="2,3,4")
    converted = convert(source, "diffusers", "--dst", "diffusers")
    network, _ = lora_lumina.create_network_from_weights(1.0, source, None, [None], ours, for_inference=True)
    network.apply_to(None, ours, False, True)
    theirs.load_lora_adapter(converted)
    loaded = {name for name, _ in theirs.named_modules() if name.endswith(".lora_A.default_0")}
    hooked, other = outputs()
    theirs.unload_lora()
    network.remove()
    assert len(loaded) == len(deltas(converted, "peft")) == sum(map(len, IN_DIFFUSERS.values()))
    assert (hooked - plain).abs().max() > 0.1
    torch.testing.assert_close(other, hooked, rtol=1e-4, atol=1e-4)
    states = {key: value.clone() for key, value in ours.state_dict().items()}
    network.merge_to(None, ours)
    torch.testing.assert_close(outputs()[0], hooked, rtol=1e-4, atol=1e-4)
    ours.load_state_dict(states)


def test_the_pipeline_of_diffusers_takes_the_file(models, tmp_path):
    from diffusers import Lumina2Pipeline

    source = kohya_file(models[0], tmp_path / "kohya.safetensors", embedder_dims="2,3,4")
    found = Lumina2Pipeline.lora_state_dict(convert(source, "diffusers", "--dst", "peft"))
    assert {key.rpartition(".lora_")[0] for key in found} == {part for parts in IN_DIFFUSERS.values() for part in parts}


def test_gemma_is_named_where_diffusers_cannot_load_it(models, tmp_path, capsys):
    source = kohya_file(models[0], tmp_path / "kohya.safetensors", text=True)
    converted = convert(source, "diffusers", "--dst", "diffusers")
    said = " ".join(capsys.readouterr().err.split())
    assert "2 modules of the text encoder, such as lora_te_layers_" in said
    assert "are left out, because Diffusers cannot load them" in said
    assert all(name.startswith("transformer.") for name in deltas(converted, "peft"))
    alone = tmp_path / "alone.safetensors"
    save_file({key: value for key, value in load_file(source).items() if key.startswith("lora_te")}, alone)
    with pytest.raises(UserError, match="modules of the text encoder alone, .*--dst comfyui converts them"):
        convert(alone, "out", "--dst", "diffusers")
    assert set(deltas(convert(alone, "out", "--dst", "comfyui"))) == {
        "text_encoders.gemma2_2b.transformer.model.layers.1.self_attn.q_proj",
        "text_encoders.gemma2_2b.transformer.model.layers.0.mlp.down_proj",
    }


def parts_file(path: Path, **parts: int) -> Path:
    """q, k and v of a layer with ranks of their own, as other programs write them."""
    random, tensors = torch.Generator().manual_seed(3), {}
    for part, rank in parts.items():
        name = f"transformer.layers.0.attn.{part}"
        rows = QUERY if part == "to_q" else SHARED
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, CONFIG.dim, generator=random)
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=random)
    save_file(tensors, path)
    return path


def test_parts_with_downs_of_their_own_are_joined_block_diagonally(tmp_path):
    source = parts_file(tmp_path / "a.safetensors", to_q=2, to_k=3, to_v=1)
    joined = convert(source, "kohya")
    assert ranks(joined) == {"lora_unet_layers_0_attention_qkv": 6}
    assert float(load_file(joined)["lora_unet_layers_0_attention_qkv.alpha"]) == 6
    assert_same(as_diffusers(deltas(joined)), deltas(source, "peft"), 1e-7)
    back, before = load_file(convert(joined, "back", "--dst", "diffusers")), load_file(source)
    assert back.keys() == before.keys() and all(torch.equal(back[key], before[key]) for key in before)


def test_a_query_alone_takes_the_rows_that_other_modules_or_the_published_model_have(tmp_path, capsys):
    source = parts_file(tmp_path / "a.safetensors", to_q=2)
    joined = load_file(convert(source, "kohya"))["lora_unet_layers_0_attention_qkv.lora_up.weight"]
    assert joined.shape == (QUERY + 2 * (QUERY // 3), 2) and not joined[QUERY:].any()
    assert f"{QUERY // 3} are taken, as in the 2B model" in " ".join(capsys.readouterr().err.split())
    more = load_file(source)
    more["lora_unet_layers_1_attention_qkv.lora_down.weight"] = torch.ones(1, CONFIG.dim)
    more["lora_unet_layers_1_attention_qkv.lora_up.weight"] = torch.ones(sum(ROWS), 1)
    save_file(more, source)
    joined = load_file(convert(source, "kohya"))["lora_unet_layers_0_attention_qkv.lora_up.weight"]
    assert joined.shape == (sum(ROWS), 2)


def test_what_cannot_be_converted_is_refused(models, tmp_path):
    source = kohya_file(models[0], tmp_path / "kohya.safetensors")
    with pytest.raises(UserError, match="--src comfyui: .* has the names of sd-scripts"):
        convert(source, "out", "--src", "comfyui")
    with pytest.raises(UserError, match="has the names of sd-scripts already"):
        convert(source, "out")
    with pytest.raises(UserError, match="--src_path needs the LoRA file"):
        run(main, "--dst_path", tmp_path / "out.safetensors")
    flux = {f"lora_unet_double_blocks_0_img_attn_proj.lora_{role}.weight": torch.ones(4, 4) for role in ("down", "up")}
    save_file(flux, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match="belong to no layer of Lumina Image 2.0: .*It is for FLUX.1"):
        convert(tmp_path / "flux.safetensors", "out")
    assert not (tmp_path / "out.safetensors").exists()


def test_it_is_a_program(models, tmp_path):
    source = kohya_file(models[0], tmp_path / "kohya.safetensors")
    given = ("--src_path", source, "--dst_path", tmp_path / "bf16.safetensors", "--save_precision", "bf16")
    done = run_in_process("networks/convert_lumina_lora.py", *given, "--dst", "diffusers", "--no_metadata")
    assert done.returncode == 0, done.stderr
    assert {tensor.dtype for tensor in load_file(tmp_path / "bf16.safetensors").values()} == {torch.bfloat16}
    assert metadata(tmp_path / "bf16.safetensors") == {}
