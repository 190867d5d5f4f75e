"""Checkpoint files of the published models' sizes that hold a header and a hole: plans need no more, and no disk does.

Names and shapes are those of the real files; values are zeros that nobody reads.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.models.loading import on_meta
from tools.make_tiny_models import TinyFlux, TinyHunyuanImage, TinyLumina, gemma_tokenizer, write_t5_tokenizer

T5_VOCABULARY = 32128
CLIP_VOCABULARY = 49408
FORMATS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}


def write_hollow(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Path:
    """A safetensors file with these names and shapes, floating-point tensors in ``dtype``."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        kept = dtype if tensor.is_floating_point() else tensor.dtype
        start, end = end, end + tensor.numel() * kept.itemsize
        header[name] = {"dtype": FORMATS[kept], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def full_flux(folder: Path, variant: str = "flux") -> TinyFlux:
    """FLUX.1 dev or Chroma in bfloat16, T5-XXL, CLIP-L (not for Chroma) and the autoencoder."""
    from library.models.autoencoder_kl import AutoencoderConfig, AutoencoderKL
    from library.models.clip import ClipTextEncoder
    from library.models.flux.chroma import ChromaConfig, ChromaTransformer
    from library.models.flux.transformer import FluxConfig, FluxTransformer
    from library.models.t5 import T5TextEncoder
    from tools.make_tiny_models import t5_config
    from tools.make_tiny_stable_diffusion import encoder_config

    write_t5_tokenizer(folder / "tokenizer_2")
    t5 = t5_config(T5_VOCABULARY)
    t5.d_model, t5.d_kv, t5.d_ff, t5.num_layers, t5.num_heads = 4096, 64, 10240, 24, 64
    is_chroma = variant == "chroma"
    modules: dict[str, Any] = {}
    with on_meta():
        transformer = ChromaTransformer(ChromaConfig()) if is_chroma else FluxTransformer(FluxConfig())
        modules["clip_l"] = ClipTextEncoder(encoder_config(_clip_l(), CLIP_VOCABULARY))
        modules |= {"ae": AutoencoderKL(AutoencoderConfig()), "t5xxl": T5TextEncoder(t5)}
    states = {name: module.state_dict() for name, module in modules.items()}
    states["t5xxl"]["shared.weight"] = states["t5xxl"].pop("encoder.embed_tokens.weight")
    dtypes = {"ae": torch.float32, "clip_l": torch.float16, "t5xxl": torch.float16}
    paths = {name: write_hollow(folder / f"{name}.safetensors", states[name], dtypes[name]) for name in states}
    model = write_hollow(folder / f"{variant}.safetensors", transformer.state_dict(), torch.bfloat16)
    return TinyFlux(model, paths["ae"], None if is_chroma else paths["clip_l"], paths["t5xxl"])


def _clip_l() -> Any:
    from tools.make_tiny_stable_diffusion import CLIP_L

    return replace(CLIP_L, width=768, heads=12, layers=12, mlp_ratio=4)


def full_lumina(folder: Path) -> TinyLumina:
    """Lumina Image 2.0 in bfloat16, Gemma 2 in float16 and the autoencoder; the tokenizer is a small one."""
    from library.models.autoencoder_kl import AutoencoderConfig, AutoencoderKL
    from library.models.gemma2 import Gemma2TextEncoder, gemma2_config
    from library.models.lumina.transformer import LuminaConfig, LuminaTransformer

    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.model").write_bytes(gemma_tokenizer())
    sizes = {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    with on_meta():
        modules = {"lumina": LuminaTransformer(LuminaConfig()), "ae": AutoencoderKL(AutoencoderConfig())}
        modules["gemma2"] = Gemma2TextEncoder(gemma2_config(sizes))
    states = {name: module.state_dict() for name, module in modules.items()}
    states["gemma2"] = {f"model.{name}": tensor for name, tensor in states["gemma2"].items()}
    dtypes = {"lumina": torch.bfloat16, "gemma2": torch.float16, "ae": torch.float32}
    paths = {name: write_hollow(folder / f"{name}.safetensors", states[name], dtypes[name]) for name in states}
    return TinyLumina(paths["lumina"], paths["gemma2"], paths["ae"])


def full_hunyuan_image(folder: Path) -> TinyHunyuanImage:
    """HunyuanImage-2.1 and Qwen2.5-VL in bfloat16, the glyph ByT5 and the autoencoder in float16; a small tokenizer."""
    from library.models.autoencoder_hunyuan import HunyuanAutoencoder, HunyuanAutoencoderConfig
    from library.models.hunyuan_image.transformer import HunyuanImageConfig, HunyuanImageTransformer
    from library.models.qwen2_5_vl import Qwen25VLTextEncoder, qwen2_5_vl_config
    from library.models.t5 import T5TextEncoder
    from tools.make_tiny_models import t5_config
    from tools.tiny_hunyuan_text import write_qwen_tokenizer

    write_qwen_tokenizer(folder / "tokenizer")
    qwen = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    qwen |= {"num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128}
    byt5 = t5_config(1510)
    byt5.d_model, byt5.d_kv, byt5.d_ff, byt5.num_layers, byt5.num_heads = 1472, 64, 3584, 12, 6
    with on_meta():
        modules = {
            "hunyuan_image": HunyuanImageTransformer(HunyuanImageConfig()),
            "qwen": Qwen25VLTextEncoder(qwen2_5_vl_config(qwen)),
            "byt5": T5TextEncoder(byt5),
            "vae": HunyuanAutoencoder(HunyuanAutoencoderConfig()),
        }
    states = {name: module.state_dict() for name, module in modules.items()}
    states["byt5"]["shared.weight"] = states["byt5"].pop("encoder.embed_tokens.weight")
    states["qwen"] = {f"model.{name}": tensor for name, tensor in states["qwen"].items()}
    first = [name for name in states["qwen"] if name.startswith("model.layers.0.")]
    for layer in (26, 27):  # in the file, but not in the module
        renamed = {name.replace(".0.", f".{layer}.", 1): states["qwen"][name] for name in first}
        states["qwen"] |= renamed
    dtypes = {"hunyuan_image": torch.bfloat16, "qwen": torch.bfloat16, "byt5": torch.float16, "vae": torch.float16}
    paths = {name: write_hollow(folder / f"{name}.safetensors", states[name], dtypes[name]) for name in states}
    return TinyHunyuanImage(*(paths[name] for name in ("hunyuan_image", "qwen", "byt5", "vae")))


def full_stable_diffusion(folder: Path, variant: str = "sdxl") -> Path:
    """The single file of Stable Diffusion XL or 1.5 in float16."""
    from tools.make_tiny_stable_diffusion import FIRST_ENTRY, SHAPES, Encoder, build_modules, original_tensors

    clip_g = Encoder(1280, 20, "gelu", FIRST_ENTRY, layers=32, projection=1280, mlp_ratio=4)
    full = {"autoencoder_widths": (128, 256, 512, 512), "groups": 32}
    shapes = {
        "sd1": replace(SHAPES["sd1"], widths=(320, 640, 1280, 1280), encoders=(_clip_l(),), **full),
        "sdxl": replace(
            SHAPES["sdxl"],
            widths=(320, 640, 1280),
            depths=(0, 2, 10),
            heads=(5, 10, 20),
            encoders=(_clip_l(), clip_g),
            **full,
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with on_meta():
        modules = build_modules(shapes[variant], CLIP_VOCABULARY)
        states = {part: module.state_dict() for part, module in modules.items()}
        tensors = original_tensors(shapes[variant], states)
    return write_hollow(folder / f"{variant}.safetensors", tensors, torch.float16)
