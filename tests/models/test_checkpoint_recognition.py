"""A file of the wrong family is named for what it is, before anything is loaded."""

from __future__ import annotations

import pytest
import torch

from library.checkpoints import open_checkpoint
from library.errors import UserError
from library.models.autoencoder_kl import open_autoencoder
from library.models.byt5 import open_byt5
from library.models.clip import open_clip
from library.models.flux.checkpoint import open_transformer
from library.models.gemma2 import open_gemma2
from library.models.hunyuan_image.checkpoint import open_transformer as open_hunyuan_image
from library.models.lumina.checkpoint import open_transformer as open_lumina
from library.models.qwen2_5_vl import open_qwen2_5_vl
from library.models.recognition import KINDS, recognise
from library.models.t5 import open_t5
from library.safetensors_io import save_file
from tools.make_tiny_models import make_tiny_flux

SD_ATTENTION = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
SDXL_ATTENTION = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
CLIP_QUERY = "text_model.encoder.layers.0.self_attn.q_proj.weight"
T5_QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"

LANGUAGE_MODELS: dict[str, dict[str, tuple[int, ...]]] = {
    "a Gemma 2 text encoder": {"layers.0.pre_feedforward_layernorm.weight": (4,)},
    "a Gemma 3 text encoder": {
        "layers.0.pre_feedforward_layernorm.weight": (4,),
        "layers.0.self_attn.q_norm.weight": (4,),
    },
    "a text encoder of the first Gemma": {
        "layers.0.post_attention_layernorm.weight": (4,),
        "embed_tokens.weight": (256000, 1),
    },
    "a Qwen 3 text encoder": {"layers.0.self_attn.q_norm.weight": (4,)},
    "a Qwen3-VL text encoder": {"layers.0.self_attn.q_norm.weight": (4,), "/visual.patch_embed.proj.bias": (4,)},
    "a Qwen2-VL text encoder": {
        "layers.0.self_attn.q_proj.bias": (4,),
        "/visual.blocks.0.mlp.fc1.weight": (4, 4),
    },
    "a Qwen2.5-VL text encoder": {"layers.0.self_attn.q_proj.bias": (4,)},
    "a language model": {"layers.0.post_attention_layernorm.weight": (4,), "embed_tokens.weight": (32000, 1)},
}

PROMPTS, LATENTS = "txt_in.individual_token_refiner.blocks.0.norm1.weight", "img_in.proj.weight"
GLYPHS = "byt5_in.fc1.weight"
DIFFUSERS_PROMPTS = "context_embedder.token_refiner.refiner_blocks.0.norm1.weight"
DIFFUSERS_LATENTS, DIFFUSERS_GLYPHS = "x_embedder.proj.weight", "context_embedder_2.linear_1.weight"
DIFFUSERS_TIME = "time_guidance_embed.timestep_embedder.linear_1.weight"
JOINED, OF_COMFYUI, SEPARATE = (f"double_blocks.0.img_attn{name}.weight" for name in ("_qkv", ".qkv", "_q"))
IMAGE = {PROMPTS: (4,), LATENTS: (4, 64, 1, 1), GLYPHS: (4, 4)}
IMAGE_IN_DIFFUSERS = {
    **{DIFFUSERS_PROMPTS: (4,), DIFFUSERS_LATENTS: (4, 64, 1, 1), DIFFUSERS_GLYPHS: (4, 4), DIFFUSERS_TIME: (4, 4)},
    "transformer_blocks.0.attn.add_k_proj.weight": (4, 4),
}
HUNYUAN: dict[str, list[dict[str, tuple[int, ...]]]] = {
    "a HunyuanImage-2.1 file": [
        {**IMAGE, JOINED: (4, 4)},
        {**IMAGE, SEPARATE: (4, 4)},
        {**IMAGE, OF_COMFYUI: (4, 4)},
        {f"model.diffusion_model.{key}": shape for key, shape in IMAGE.items()},
    ],
    "a HunyuanImage-2.1 file in the Diffusers layout": [IMAGE_IN_DIFFUSERS],
    "a distilled HunyuanImage-2.1 file (few steps, guidance built in), which cannot be trained": [
        {**IMAGE, JOINED: (4, 4), "time_r_in.mlp.0.weight": (4, 4), "guidance_in.mlp.0.weight": (4, 4)},
        {**IMAGE, OF_COMFYUI: (4, 4), "guidance_in.in_layer.weight": (4, 4)},
        {**IMAGE_IN_DIFFUSERS, "time_guidance_embed.guidance_embedder.linear_1.weight": (4, 4)},
        {**IMAGE_IN_DIFFUSERS, "time_guidance_embed.timestep_embedder_r.linear_1.weight": (4, 4)},
    ],
    "the refiner of HunyuanImage-2.1": [
        {PROMPTS: (4,), LATENTS: (4, 128, 1, 1, 1), "guidance_in.mlp.0.weight": (4, 4), JOINED: (4, 4)},
        {DIFFUSERS_PROMPTS: (4,), DIFFUSERS_LATENTS: (4, 128, 1, 1, 1), DIFFUSERS_TIME: (4, 4)},
    ],
    "a HunyuanVideo file": [
        {PROMPTS: (4,), LATENTS: (4, 16, 1, 2, 2), JOINED: (4, 4), "vector_in.in_layer.weight": (4, 4)},
        {PROMPTS: (4,), LATENTS: (4, 16, 1, 2, 2), OF_COMFYUI: (4, 4), "guidance_in.in_layer.weight": (4, 4)},
        {PROMPTS: (4,), LATENTS: (4, 65, 1, 1, 1), GLYPHS: (4, 4), "vision_in.proj.0.weight": (4,)},
    ],
    "a HunyuanVideo file in the Diffusers layout": [
        {DIFFUSERS_PROMPTS: (4,), DIFFUSERS_LATENTS: (4, 16, 1, 2, 2), "time_text_embed.timestep_embedder.x": (4,)},
        {DIFFUSERS_PROMPTS: (4,), DIFFUSERS_GLYPHS: (4, 4), "time_embed.timestep_embedder.linear_1.weight": (4, 4)},
    ],
}

# Names (with widths where they count) as they stand in published files.
FILES = {
    "a Stable Diffusion XL file": {SDXL_ATTENTION: (4, 2048), "conditioner.embedders.1.model.ln_final.weight": (4,)},
    "a Stable Diffusion 1.x file": {SD_ATTENTION: (4, 768), "first_stage_model.encoder.conv_in.weight": (4,)},
    "a Stable Diffusion 2.x file": {SD_ATTENTION: (4, 1024)},
    "a Chroma file": {"distilled_guidance_layer.in_proj.weight": (4, 4), "double_blocks.0.img_attn.qkv.weight": (4, 4)},
    "a Chroma Radiance file": {
        "distilled_guidance_layer.in_proj.weight": (4, 4),
        "double_blocks.0.img_attn.qkv.weight": (4, 4),
        "nerf_blocks.0.norm.scale": (4,),
    },
    "x0-prediction": {
        "distilled_guidance_layer.in_proj.weight": (4, 4),
        "double_blocks.0.img_attn.qkv.weight": (4, 4),
        "__x0__": (0,),
    },
    "a FLUX.2 file": {
        "double_blocks.0.img_attn.qkv.weight": (4, 4),
        "img_in.weight": (4, 4),
        "single_stream_modulation.lin.weight": (4, 4),
    },
    "a Stable Diffusion 3 file": {"model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": (4, 4)},
    "a Lumina Image 2.0 file": {
        "model.diffusion_model.cap_embedder.1.weight": (4, 4),
        "model.diffusion_model.context_refiner.0.attention.qkv.weight": (4, 4),
    },
    "a Lumina Image 2.0 file in the Diffusers layout": {
        "time_caption_embed.caption_embedder.1.weight": (4, 4),
        "context_refiner.0.attn.to_q.weight": (4, 4),
    },
    "a Z-Image file": {
        "model.diffusion_model.cap_embedder.1.weight": (4, 4),
        "model.diffusion_model.context_refiner.0.attention.qkv.weight": (4, 4),
        "model.diffusion_model.cap_pad_token": (1, 4),
    },
    "an OmniGen2 file": {
        "time_caption_embed.caption_embedder.1.weight": (4, 4),
        "context_refiner.0.attn.to_q.weight": (4, 4),
        "ref_image_refiner.0.attn.to_q.weight": (4, 4),
    },
    "a FLUX.1 file": {
        key: (4, 4) for key in ("double_blocks.0.img_attn.qkv.weight", "img_in.weight", "vector_in.in_layer.weight")
    },
    **{f"{name}{' ' * index}": keys for name, files in HUNYUAN.items() for index, keys in enumerate(files)},
    "a LoRA file": {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 4)},
    "a LoRA file ": {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 4)},
    "a CLIP-L text encoder": {CLIP_QUERY: (768, 768)},
    "a CLIP-G text encoder": {CLIP_QUERY: (1280, 1280)},
    "a T5 text encoder": {T5_QUERY: (4, 4096)},
    "a ByT5 text encoder": {T5_QUERY: (4, 1472), "shared.weight": (384, 1472)},
    "a glyph ByT5 text encoder": {T5_QUERY: (4, 1472), "shared.weight": (1510, 1472)},
    "a FLUX ControlNet file": {"controlnet_blocks.0.weight": (4, 4), "double_blocks.0.img_attn.qkv.weight": (4, 4)},
    "a Stable Diffusion autoencoder": {
        "encoder.down.0.block.0.conv1.weight": (4, 4, 3, 3),
        "decoder.conv_in.weight": (4, 4, 3, 3),
        "quant_conv.weight": (4, 4, 1, 1),
    },
    "a HunyuanImage autoencoder": {
        "encoder.down.0.block.0.conv1.weight": (4, 4, 3, 3),
        "decoder.conv_in.weight": (4, 64, 3, 3),
    },
    "a HunyuanImage autoencoder in the Diffusers layout": {
        "encoder.down_blocks.0.conv1.weight": (4, 4, 3, 3),
        "decoder.conv_in.weight": (4, 64, 3, 3),
    },
    **{
        f"{description}{' ' * index}": {
            key[1:] if key.startswith("/") else prefix + key: size
            for key, size in {"layers.0.self_attn.q_proj.weight": (4, 4), **keys}.items()
        }
        for index, prefix in enumerate(("", "model.", "language_model.model."))
        for description, keys in LANGUAGE_MODELS.items()
    },
    "not a checkpoint of a known kind": {"something.else": (4,)},
}


@pytest.mark.parametrize(("given", "wanted"), [("flux", "chroma"), ("chroma", "flux")])
def test_the_other_model_type_is_advised(tmp_path, given, wanted):
    path = write(tmp_path / "model.safetensors", FILES["a FLUX.1 file" if given == "flux" else "a Chroma file"])
    with pytest.raises(UserError, match=rf"Give --model_type {given} for this file\.$"):
        open_transformer(path, model_type=wanted)


def write(path, shapes: dict[str, tuple[int, ...]]):
    save_file({key: torch.zeros(shape, dtype=torch.float16) for key, shape in shapes.items()}, path)
    return path


@pytest.mark.parametrize("description", [name for name in FILES if name != "a FLUX.1 file"])
def test_what_is_given_for_the_transformer_is_named(tmp_path, description):
    path = write(tmp_path / "model.safetensors", FILES[description])
    with pytest.raises(UserError) as error:
        open_transformer(path, option="--pretrained_model_name_or_path")
    message = str(error.value)
    assert message.startswith(f"--pretrained_model_name_or_path: {path}") and "a FLUX.1 transformer" in message
    assert description.strip() in message and message.count("\n") == 0


@pytest.mark.parametrize("description", [name for name in FILES if name != "a Chroma file"])
def test_what_is_given_for_chroma_is_named(tmp_path, description):
    path = write(tmp_path / "model.safetensors", FILES[description])
    with pytest.raises(UserError, match="a Chroma transformer") as error:
        open_transformer(path, option="--ckpt_path", model_type="chroma")
    assert description.strip() in str(error.value) and str(error.value).count("\n") == 0


@pytest.mark.parametrize("description", [name for name in FILES if not name.startswith("a Gemma 2")])
def test_what_is_given_for_gemma_2_is_named(tmp_path, description):
    path = write(tmp_path / "model.safetensors", FILES[description])
    with pytest.raises(UserError) as error:
        open_gemma2(path, option="--gemma2")
    message = str(error.value)
    assert message.startswith(f"--gemma2: {path}") and description.strip() in message and "\n" not in message


@pytest.mark.parametrize("description", [name for name in FILES if not name.startswith("a Qwen2.5-VL")])
def test_what_is_given_for_hunyuan_images_text_encoders_is_named(tmp_path, description):
    path = write(tmp_path / "model.safetensors", FILES[description])
    for opener, option in ((open_qwen2_5_vl, "--text_encoder"), (open_byt5, "--byt5")):
        if opener is open_byt5 and "ByT5" in description:
            continue
        with pytest.raises(UserError) as error:
            opener(path, option=option)
        message = str(error.value)
        assert message.startswith(f"{option}: {path}") and description.strip() in message and "\n" not in message


@pytest.mark.parametrize("description", [name for name in FILES if "Lumina" not in name])
def test_what_is_given_for_lumina_is_named(tmp_path, description):
    path = write(tmp_path / "model.safetensors", FILES[description])
    with pytest.raises(UserError, match="a Lumina Image 2.0 transformer is needed here") as error:
        open_lumina(path, option="--pretrained_model_name_or_path")
    assert description.strip() in str(error.value) and str(error.value).count("\n") == 0


@pytest.mark.parametrize("description", [name for name in FILES if not name.startswith("a HunyuanImage-2.1 file")])
def test_what_is_given_for_hunyuan_image_is_named(tmp_path, description):
    path = write(tmp_path / "model.safetensors", FILES[description])
    with pytest.raises(UserError, match="the transformer of HunyuanImage-2.1's base version is needed here") as error:
        open_hunyuan_image(path, option="--pretrained_model_name_or_path")
    assert description.strip() in str(error.value) and str(error.value).count("\n") == 0


def test_parts_that_were_mixed_up_are_named(tmp_path):
    files = make_tiny_flux(tmp_path)
    for opener, path, description in (
        (open_clip, files.t5xxl, "a T5 text encoder"),
        (open_t5, files.clip_l, "a CLIP-L text encoder"),
        (open_autoencoder, files.transformer, "a FLUX.1 file"),
        (open_transformer, files.autoencoder, r"a FLUX autoencoder \(AE\)"),
    ):
        with pytest.raises(UserError, match=f"is {description}; .* is needed here"):
            opener(path)


@pytest.mark.parametrize(("width", "name"), [(128, "Depth or Canny"), (384, "Fill")])
def test_flux_models_with_image_inputs_are_named(tmp_path, width, name):
    files = make_tiny_flux(tmp_path)
    checkpoint = open_checkpoint(files.transformer)
    state = {key: checkpoint.load(key) for key in checkpoint}
    state["img_in.weight"] = torch.zeros(64, width)
    save_file(state, tmp_path / "special.safetensors")
    with pytest.raises(UserError, match=name):
        open_transformer(tmp_path / "special.safetensors")


@pytest.mark.parametrize(
    ("suffix", "name"),
    [
        (".absmax", "bitsandbytes"),
        (".quant_state.bitsandbytes__nf4", "bitsandbytes"),
        (".qweight", "integer-quantised"),
    ],
)
def test_quantised_layouts_are_named(tmp_path, suffix, name):
    files = make_tiny_flux(tmp_path)
    checkpoint = open_checkpoint(files.transformer)
    state = {key: checkpoint.load(key) for key in checkpoint}
    quantised = (
        "single_blocks.0.linear1.weight"
        if suffix.startswith((".absmax", ".quant_state"))
        else "single_blocks.0.linear1"
    )
    state[quantised + suffix] = torch.zeros(4, dtype=torch.uint8)
    save_file(state, tmp_path / "quantised.safetensors")
    with pytest.raises(UserError, match=name):
        open_transformer(tmp_path / "quantised.safetensors")


def test_every_kind_can_be_reached(tmp_path):
    """No kind stands below a more general one that takes its files."""
    for kind in KINDS:
        shapes: dict[str, tuple[int, ...]] = {key + "x" * key.endswith("."): (8, 8, 1, 1) for key in kind.keys}
        if kind.sized is not None:
            key, axis, size = kind.sized
            shapes[key] = tuple(size if index == axis else 8 for index in range(2))
        recognised = recognise(open_checkpoint(write(tmp_path / "file.safetensors", shapes)))
        assert recognised is not None and recognised.description == kind.description
