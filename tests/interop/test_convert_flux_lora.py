"""convert_flux_lora.py: a LoRA does the same under the names of every program, and diffusers draws the same with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from networks import lora_flux
from networks.convert_flux_lora import main
from tests.networks.lora_tool_files import assert_same, deltas, independent_hashes, metadata, ranks, run
from tests.running import run_as_main, run_in_process

WIDTH, FEED_FORWARD, RANK = 16, 40, 4
DOUBLE = "lora_unet_double_blocks_0"
SINGLE = "lora_unet_single_blocks_0"
SHAPES = {
    **{f"{DOUBLE}_{stream}_attn_qkv": (3 * WIDTH, WIDTH) for stream in ("img", "txt")},
    **{f"{DOUBLE}_{stream}_attn_proj": (WIDTH, WIDTH) for stream in ("img", "txt")},
    **{f"{DOUBLE}_{stream}_mlp_0": (FEED_FORWARD, WIDTH) for stream in ("img", "txt")},
    **{f"{DOUBLE}_{stream}_mlp_2": (WIDTH, FEED_FORWARD) for stream in ("img", "txt")},
    **{f"{DOUBLE}_{stream}_mod_lin": (6 * WIDTH, WIDTH) for stream in ("img", "txt")},
    f"{SINGLE}_linear1": (3 * WIDTH + FEED_FORWARD, WIDTH),
    f"{SINGLE}_linear2": (WIDTH, WIDTH + FEED_FORWARD),
    f"{SINGLE}_modulation_lin": (3 * WIDTH, WIDTH),
    "lora_unet_img_in": (WIDTH, 64),
    "lora_unet_txt_in": (WIDTH, 12),
    "lora_unet_time_in_in_layer": (WIDTH, 256),
    "lora_unet_guidance_in_out_layer": (WIDTH, WIDTH),
    "lora_unet_final_layer_linear": (64, WIDTH),
    "lora_unet_final_layer_adaLN_modulation_1": (2 * WIDTH, WIDTH),
    "lora_te1_text_model_encoder_layers_1_self_attn_q_proj": (10, 10),
    "lora_te3_encoder_block_3_layer_1_DenseReluDense_wi_0": (24, 12),
}
PARTS = {3: (WIDTH,) * 3, 4: (WIDTH, WIDTH, WIDTH, FEED_FORWARD)}
# The same layers in diffusers, written down from its own classes.
ATTENTION = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
BLOCK, LONE = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.0"
IN_DIFFUSERS = {
    f"{DOUBLE}_img_attn_qkv": [f"{BLOCK}.attn.{name}" for name in ATTENTION],
    f"{DOUBLE}_txt_attn_qkv": [f"{BLOCK}.attn.{name}" for name in ADDED],
    f"{DOUBLE}_img_attn_proj": [f"{BLOCK}.attn.to_out.0"],
    f"{DOUBLE}_txt_attn_proj": [f"{BLOCK}.attn.to_add_out"],
    f"{DOUBLE}_img_mlp_0": [f"{BLOCK}.ff.net.0.proj"],
    f"{DOUBLE}_img_mlp_2": [f"{BLOCK}.ff.net.2"],
    f"{DOUBLE}_txt_mlp_0": [f"{BLOCK}.ff_context.net.0.proj"],
    f"{DOUBLE}_txt_mlp_2": [f"{BLOCK}.ff_context.net.2"],
    f"{DOUBLE}_img_mod_lin": [f"{BLOCK}.norm1.linear"],
    f"{DOUBLE}_txt_mod_lin": [f"{BLOCK}.norm1_context.linear"],
    f"{SINGLE}_linear1": [*(f"{LONE}.attn.{name}" for name in ATTENTION), f"{LONE}.proj_mlp"],
    f"{SINGLE}_linear2": [f"{LONE}.proj_out"],
    f"{SINGLE}_modulation_lin": [f"{LONE}.norm.linear"],
    "lora_unet_img_in": ["transformer.x_embedder"],
    "lora_unet_txt_in": ["transformer.context_embedder"],
    "lora_unet_time_in_in_layer": ["transformer.time_text_embed.timestep_embedder.linear_1"],
    "lora_unet_guidance_in_out_layer": ["transformer.time_text_embed.guidance_embedder.linear_2"],
    "lora_unet_final_layer_linear": ["transformer.proj_out"],
    "lora_unet_final_layer_adaLN_modulation_1": ["transformer.norm_out.linear"],
    "lora_te1_text_model_encoder_layers_1_self_attn_q_proj": [
        "text_encoder.text_model.encoder.layers.1.self_attn.q_proj"
    ],
    "lora_te3_encoder_block_3_layer_1_DenseReluDense_wi_0": [
        "text_encoder_2.encoder.block.3.layer.1.DenseReluDense.wi_0"
    ],
}


def kohya_file(path: Path, split: bool = False, alpha: float = 3.0, dtype: torch.dtype = torch.float32) -> Path:
    """With random numbers; ``split`` gives the parts of joined layers ranks of their own, as split_qkv=True does."""
    random = torch.Generator().manual_seed(8)
    tensors: dict[str, Tensor] = {}
    for name, (out, inputs) in SHAPES.items():
        parts = PARTS[len(IN_DIFFUSERS[name])] if split and len(IN_DIFFUSERS[name]) > 1 else (out,)
        ups = [torch.randn(rows, RANK, generator=random) for rows in parts]
        tensors[f"{name}.lora_down.weight"] = torch.randn(RANK * len(parts), inputs, generator=random).to(dtype)
        tensors[f"{name}.lora_up.weight"] = torch.block_diag(*ups).to(dtype)
        tensors[f"{name}.alpha"] = torch.tensor(alpha * len(parts)).to(dtype)
    save_file(tensors, path, {"ss_base_model_version": "flux1", "ss_seed": "5"})
    return path


def as_diffusers(wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The differences of layers [out, in] as diffusers has them: cut into parts, the last modulation turned round."""
    found = {}
    for name, difference in wanted.items():
        theirs = IN_DIFFUSERS[name]
        if name.endswith("adaLN_modulation_1"):
            difference = torch.cat(difference.chunk(2)[::-1])
        rows = PARTS[len(theirs)] if len(theirs) > 1 else (len(difference),)
        found |= dict(zip(theirs, difference.split(rows)))
    return found


def convert(source: Path, target: Path, *arguments: object) -> Path:
    run(main, "--src_path", source, "--dst_path", target, *arguments)
    return target


@pytest.mark.parametrize("split", [False, True], ids=["plain", "split_qkv"])
def test_to_diffusers_and_back(tmp_path, split):
    source = kohya_file(tmp_path / "kohya.safetensors", split)
    converted = convert(source, tmp_path / "ai.safetensors", "--src", "sd-scripts", "--dst", "ai-toolkit")
    assert_same(deltas(converted, "peft"), as_diffusers(deltas(source)), 1e-6)
    assert set(ranks(converted, "peft").values()) == {RANK}
    assert not any(key.endswith(".alpha") for key in load_file(converted))
    comment = "converted from sd-scripts to ai-toolkit"
    assert metadata(converted) == {"ss_base_model_version": "flux1", "ss_seed": "5", "ss_training_comment": comment}

    back = convert(converted, tmp_path / "back.safetensors", "--src", "ai-toolkit", "--dst", "sd-scripts")
    assert_same(deltas(back), deltas(source), 1e-6)
    assert ranks(back) == ranks(source)
    said = metadata(back)
    assert (said["sshs_model_hash"], said["sshs_legacy_hash"]) == independent_hashes(back)
    assert said["ss_network_module"] == "networks.lora_flux" and said["ss_seed"] == "5"


def test_powers_of_two_come_back_bit_for_bit(tmp_path):
    """With a strength of 1/4 both sides are halved, which takes no digits, in bfloat16 either."""
    source = kohya_file(tmp_path / "kohya.safetensors", alpha=1.0, dtype=torch.bfloat16)
    converted = load_file(convert(source, tmp_path / "ai.safetensors", "--dst", "ai-toolkit"))
    for name in ("lora_unet_img_in", f"{DOUBLE}_img_mlp_0"):
        theirs = IN_DIFFUSERS[name][0]
        assert torch.equal(2 * converted[f"{theirs}.lora_A.weight"], load_file(source)[f"{name}.lora_down.weight"])
        assert torch.equal(2 * converted[f"{theirs}.lora_B.weight"], load_file(source)[f"{name}.lora_up.weight"])
    assert {tensor.dtype for tensor in converted.values()} == {torch.bfloat16}


def test_split_layers_give_a_smaller_file(tmp_path):
    """Than the same layers without the knowledge that their parts are apart."""
    source = kohya_file(tmp_path / "kohya.safetensors", split=True)
    converted = convert(source, tmp_path / "ai.safetensors", "--dst", "diffusers")
    assert converted.stat().st_size < source.stat().st_size


def test_comfyui_names_and_back(tmp_path):
    source = kohya_file(tmp_path / "kohya.safetensors")
    converted = convert(source, tmp_path / "comfyui.safetensors", "--dst", "comfyui")
    names = set(deltas(converted))
    assert "diffusion_model.double_blocks.0.img_attn.qkv" in names
    assert "text_encoders.clip_l.transformer.text_model.encoder.layers.1.self_attn.q_proj" in names
    back = convert(converted, tmp_path / "back.safetensors", "--dst", "sd-scripts")
    theirs, ours = load_file(source), load_file(back)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_numbers_can_be_stored_in_another_format(tmp_path):
    source = kohya_file(tmp_path / "kohya.safetensors")
    options = ("--dst", "ai-toolkit", "--save_precision", "bf16", "--no_metadata")
    converted = convert(source, tmp_path / "ai.safetensors", *options)
    assert {tensor.dtype for tensor in load_file(converted).values()} == {torch.bfloat16}
    assert metadata(converted) == {}


def test_diffusers_own_converter_gives_the_same(tmp_path):
    """At full width, which it has built in, for one block of each kind."""
    from diffusers import FluxPipeline

    random, tensors = torch.Generator().manual_seed(2), {}
    for name, shape in ((f"{DOUBLE}_txt_attn_qkv", (9216, 3072)), (f"{SINGLE}_linear1", (21504, 3072))):
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, shape[1], generator=random)
        tensors[f"{name}.lora_up.weight"] = torch.randn(shape[0], 2, generator=random)
        tensors[f"{name}.alpha"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / "kohya.safetensors")
    theirs = FluxPipeline.lora_state_dict(tmp_path / "kohya.safetensors")
    ours = load_file(convert(tmp_path / "kohya.safetensors", tmp_path / "ai.safetensors", "--dst", "ai-toolkit"))
    assert theirs.keys() == ours.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-6, atol=1e-7)


def diffusers_file(path: Path, names: list[str], rank: int = RANK, **said: str) -> Path:
    """As AI-toolkit writes it: no alphas."""
    random, tensors = torch.Generator().manual_seed(3), {}
    for name in names:
        rows = FEED_FORWARD if name.endswith("proj_mlp") else WIDTH
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, WIDTH, generator=random)
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=random)
    save_file(tensors, path, said or None)
    return path


def test_missing_parts_are_zero_and_come_out_missing_again(tmp_path):
    names = [f"{LONE}.attn.to_q", f"{LONE}.attn.to_v", f"{BLOCK}.attn.add_k_proj"]
    source = diffusers_file(tmp_path / "ai.safetensors", names)
    kohya = convert(source, tmp_path / "kohya.safetensors", "--dst", "sd-scripts")
    linear1 = deltas(kohya)[f"{SINGLE}_linear1"]
    assert linear1.shape == (7 * WIDTH, WIDTH), "a feed-forward of four times the width, as FLUX.1 has"
    assert not linear1[WIDTH : 2 * WIDTH].any() and not linear1[3 * WIDTH :].any()
    back = convert(kohya, tmp_path / "back.safetensors", "--dst", "ai-toolkit")
    assert_same(deltas(back, "peft"), deltas(source, "peft"), 1e-6)


def test_an_alpha_that_peft_keeps_in_the_metadata_counts(tmp_path):
    settings = '{"transformer.lora_alpha": 2, "transformer.alpha_pattern": {"single_transformer_blocks.0.proj_mlp": 8}}'
    names = [f"{BLOCK}.attn.to_out.0", f"{LONE}.proj_mlp"]
    source = diffusers_file(tmp_path / "peft.safetensors", names, lora_adapter_metadata=settings)
    kohya = convert(source, tmp_path / "kohya.safetensors", "--dst", "sd-scripts")
    plain = deltas(source, "peft")
    found = deltas(kohya)
    torch.testing.assert_close(found[f"{DOUBLE}_img_attn_proj"], plain[names[0]] * 2 / RANK)
    torch.testing.assert_close(found[f"{SINGLE}_linear1"][3 * WIDTH :], plain[names[1]] * 8 / RANK)


def test_xlabs_onetrainer_and_bare_names_are_read(tmp_path):
    shapes = {
        "double_blocks.0.processor.qkv_lora2": f"{DOUBLE}_txt_attn_qkv",
        "lora_transformer_transformer_blocks_0_ff_net_2": f"{DOUBLE}_img_mlp_2",
        "double_blocks.0.img_mlp.0": f"{DOUBLE}_img_mlp_0",
    }
    random, tensors = torch.Generator().manual_seed(3), {}
    for name, ours in shapes.items():
        out, inputs = SHAPES[ours]
        tensors[f"{name}.down.weight"] = torch.randn(RANK, inputs, generator=random)
        tensors[f"{name}.up.weight"] = torch.randn(out, RANK, generator=random)
    save_file(tensors, tmp_path / "mixed.safetensors")
    kohya = convert(tmp_path / "mixed.safetensors", tmp_path / "kohya.safetensors", "--dst", "sd-scripts")
    wanted = {shapes[name]: difference for name, difference in deltas(tmp_path / "mixed.safetensors", "plain").items()}
    assert_same(deltas(kohya), wanted, 1e-6)


def test_what_cannot_be_converted_is_refused_and_nothing_is_written(tmp_path):
    source, target = kohya_file(tmp_path / "kohya.safetensors"), tmp_path / "out.safetensors"
    tensors = load_file(source)
    strange = tmp_path / "strange.safetensors"
    for extra in ("lora_unet_input_blocks_1.lora_down.weight", "lora_unet_other.lora_down.weight"):
        tensors[extra] = torch.ones(2, 4)
        tensors[extra.replace("down", "up")] = torch.ones(4, 2)
    save_file(tensors, strange)
    with pytest.raises(UserError, match=r"2 of its modules.*: lora_unet_input_blocks_1, lora_unet_other\."):
        convert(strange, target, "--dst", "ai-toolkit")
    with pytest.raises(UserError, match="--src xlabs: .* has the names of sd-scripts"):
        convert(source, target, "--src", "xlabs", "--dst", "ai-toolkit")
    with pytest.raises(UserError, match="is one of the inputs"):
        convert(source, source, "--dst", "ai-toolkit")
    with pytest.raises(UserError, match="has the names of sd-scripts already"):
        convert(source, target)
    save_file({**load_file(source), "lora_unet_img_in.dora_scale": torch.ones(16)}, tmp_path / "dora.safetensors")
    with pytest.raises(UserError, match="DoRA"):
        convert(tmp_path / "dora.safetensors", target, "--dst", "ai-toolkit")
    assert not target.exists()


def test_the_guides_name_for_the_script_runs(tmp_path):
    source = kohya_file(tmp_path / "kohya.safetensors")
    arguments = ("--src", "sd-scripts", "--dst", "ai-toolkit", "--src_path", source, "--dst_path")
    for script, name in (("convert_flux_lora.py", "a"), ("networks/convert_flux_lora.py", "b")):
        done = run_as_main(script, *arguments, tmp_path / f"{name}.safetensors")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    done = run_in_process("networks/convert_flux_lora.py", *arguments[:4])
    assert done.returncode == 2 and "--src_path needs" in done.stderr


# --- the image ---

PROMPT, SIZE, STEPS, SEED, LENGTH = "a big red cat on the blue photo", 64, 3, 11, 24


def image_here(files, lora: Path) -> Tensor:
    """[3, H, W] in 0..1, drawn by flux_minimal_inference.py."""
    from flux_minimal_inference import FluxInference, FluxInferenceOptions
    from library.options import parse_options

    words = ["--ckpt_path", files.transformer, "--clip_l", files.clip_l, "--t5xxl", files.t5xxl]
    words += ["--ae", files.autoencoder, "--dtype", "fp32", "--lora_weights", f"{lora};1.0", "--prompt", PROMPT]
    words += ["--width", SIZE, "--height", SIZE, "--steps", STEPS, "--seed", SEED, "--guidance", "2.5"]
    words += ["--t5xxl_max_token_length", LENGTH, "--output_dir", lora.parent]
    script = FluxInference(parse_options(FluxInferenceOptions, "", [str(word) for word in words]))
    prompt = script.prompts()[0]
    script.encode([prompt])
    return script.decode(script.latents(prompt))[0] / 2 + 0.5


def image_in_diffusers(folder: Path, lora: Path | None) -> Tensor:
    from diffusers import FluxPipeline

    from library.randomness import draw_noise, seeded_generator

    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    noise = draw_noise((SIZE * SIZE // 256, 64), [seeded_generator(SEED)])
    return pipeline(
        PROMPT, height=SIZE, width=SIZE, num_inference_steps=STEPS, max_sequence_length=LENGTH, guidance_scale=2.5,
        latents=noise, output_type="pt",
    ).images[0]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "split", [pytest.param("False", id="plain", marks=pytest.mark.thorough), pytest.param("True", id="split_qkv")]
)
def test_a_trained_lora_draws_the_same_image_in_diffusers(flux_command, tiny_flux, dataset_toml, tmp_path, split):
    """Trained with CLIP-L, converted by the command line, loaded by ``load_lora_weights``."""
    from tools.make_tiny_models import make_tiny_flux

    folder = make_tiny_flux(tmp_path / "diffusers", layout="diffusers").transformer
    done = run_in_process(
        "flux_train_network.py",
        *(*flux_command, "--dataset_config", dataset_toml(), "--output_dir", tmp_path, "--output_name", "lora"),
        *(
            "--max_train_steps",
            "4",
            "--learning_rate",
            "4e-2",
            "--network_args",
            f"split_qkv={split}",
            "--cache_latents",
        ),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lora = tmp_path / "lora.safetensors"
    done = run_in_process(
        "convert_flux_lora.py",
        *("--src", "sd-scripts", "--dst", "ai-toolkit", "--src_path", lora, "--dst_path", tmp_path / "ai.safetensors"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    here, there = image_here(tiny_flux, lora), image_in_diffusers(folder, tmp_path / "ai.safetensors")
    assert (here - there).abs().max() < 1e-3
    assert (there - image_in_diffusers(folder, None)).abs().max() > 0.05, "the LoRA must change the image"
    assert any(key.startswith("text_encoder.") for key in load_file(tmp_path / "ai.safetensors"))
    if split == "True":
        assert (tmp_path / "ai.safetensors").stat().st_size < lora.stat().st_size


def test_files_that_diffusers_saves_come_back(tmp_path):
    """Through peft's own state dict and ``save_lora_weights``."""
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from tools.make_tiny_models import transformer_config
    from tools.other_layouts import diffusers_transformer_config

    config = transformer_config()
    theirs = FluxTransformer2DModel.from_config(diffusers_transformer_config(config))
    layers = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "ff.net.2"]
    theirs.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=layers, init_lora_weights=False))
    adapter_metadata = {"r": 3, "lora_alpha": 6, "target_modules": layers}
    FluxPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(theirs),
        transformer_lora_adapter_metadata=adapter_metadata,
    )
    saved = tmp_path / "pytorch_lora_weights.safetensors"
    kohya = convert(saved, tmp_path / "kohya.safetensors", "--src", "diffusers", "--dst", "sd-scripts")
    found = deltas(kohya)
    single = theirs.single_transformer_blocks[1]
    parts = [single.attn.to_q, single.attn.to_k, single.attn.to_v, single.proj_mlp]
    wanted = torch.cat([part.get_delta_weight("default") for part in parts]).double()
    torch.testing.assert_close(found["lora_unet_single_blocks_1_linear1"], wanted, rtol=1e-5, atol=1e-6)

    from library.models.flux.transformer import FluxTransformer

    network, _ = lora_flux.create_network_from_weights(1.0, saved, None, [None, None], FluxTransformer(config))
    lora = network.lora_unet_single_blocks_1_linear1
    difference = lora.scale * lora.up_matrix @ lora.down_matrix
    torch.testing.assert_close(difference.double(), wanted, rtol=1e-5, atol=1e-6)
