"""Write a tiny model with random weights, in the layouts and key names of the real files, with tokenizers.

It draws nothing that can be recognised: it is for trying out commands and for tests, which load it by the same code as
the real models. Examples: ``python tools/make_tiny_models.py tiny_flux --variant schnell --layout diffusers`` and
``python tools/make_tiny_models.py tiny_sdxl --family sdxl``
"""

from __future__ import annotations

import argparse
import io
import json
import string
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from library.console import run_script
from library.families import FAMILIES, FLUX
from library.files import write_text
from library.lean_imports import transformers_class
from library.models.autoencoder_kl import AutoencoderConfig, AutoencoderKL
from library.models.clip import ClipConfig, ClipTextEncoder
from library.models.flux.chroma import ChromaConfig, ChromaTransformer
from library.models.flux.transformer import FluxConfig, FluxTransformer, rope_axes
from library.models.gemma2 import Gemma2TextEncoder, gemma2_config
from library.models.hunyuan_image.transformer import HunyuanImageConfig, HunyuanImageTransformer
from library.models.lumina.transformer import LuminaConfig, LuminaTransformer
from library.models.t5 import T5TextEncoder
from library.safetensors_io import save_file
from tools.other_layouts import (
    comfyui_name,
    diffusers_autoencoder_config,
    diffusers_autoencoder_state,
    diffusers_hunyuan_image_config,
    diffusers_hunyuan_image_state,
    diffusers_lumina_config,
    diffusers_lumina_state,
    diffusers_transformer_config,
    diffusers_transformer_state,
)
from tools.tiny_hunyuan_autoencoder import tiny_hunyuan_autoencoder, write_diffusers_hunyuan_autoencoder
from tools.tiny_hunyuan_text import (
    make_tiny_byt5,
    make_tiny_qwen2_5_vl,
    write_diffusers_byt5,
    write_diffusers_qwen2_5_vl,
)
from tools.tiny_parts import WORDS, fill_randomly, transformers_clip_config, write_clip_tokenizer

Layout = Literal["original", "comfyui", "diffusers"]
Variant = Literal["dev", "schnell", "chroma"]

TEXT_WIDTH = 64
TEXT_HEADS = 4
AUTOENCODER = AutoencoderConfig(channels=8, multipliers=(1, 1, 2, 2), res_blocks=1, latent_channels=16, groups=8)


@dataclass(frozen=True)
class TinyFlux:
    """The paths of the files written; in the Diffusers layout, all are the model's folder. Chroma has no CLIP-L."""

    transformer: Path
    autoencoder: Path
    clip_l: Path | None
    t5xxl: Path


@dataclass(frozen=True)
class TinyLumina:
    """The paths of the files written; all are one file in ComfyUI's layout and the model's folder in Diffusers'."""

    transformer: Path
    gemma2: Path
    autoencoder: Path


@dataclass(frozen=True)
class TinyHunyuanImage:
    """The paths of the files written; in the Diffusers layout, all are the model's folder."""

    transformer: Path
    text_encoder: Path
    byt5: Path
    autoencoder: Path


def transformer_config(variant: Variant = "dev") -> FluxConfig:
    """Two blocks of each kind, two heads of 32."""
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_heads": 2,
        "depth": 2,
        "depth_single": 2,
        "context_dim": TEXT_WIDTH,
        "mlp_hidden": 256,
        "axes_dims": rope_axes(32),
    }
    if variant == "chroma":
        return ChromaConfig(**sizes, approximator_hidden=48, approximator_layers=2)
    return FluxConfig(**sizes, vector_dim=TEXT_WIDTH, guidance_embed=variant == "dev")


def make_tiny_flux(
    folder: Path | str,
    variant: Variant = "dev",
    layout: Layout = "original",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> TinyFlux:
    """Write the models and tokenizers into ``folder``; the same seed gives the same weights in each layout.

    The variant ``chroma`` has no CLIP-L, and in the Diffusers layout T5 in the first text encoder's place.
    """
    folder, is_chroma = Path(folder), variant == "chroma"
    in_first_place = is_chroma and layout == "diffusers"
    t5 = T5TextEncoder(t5_config(write_t5_tokenizer(folder / ("tokenizer" if in_first_place else "tokenizer_2"))))
    config = transformer_config(variant)
    transformer = ChromaTransformer(config) if isinstance(config, ChromaConfig) else FluxTransformer(config)
    modules: dict[str, Any] = {"transformer": transformer, "autoencoder": AutoencoderKL(AUTOENCODER), "t5": t5}
    if not is_chroma:
        modules["clip"] = ClipTextEncoder(clip_config(write_clip_tokenizer(folder / "tokenizer")))
    states: dict[str, dict[str, Tensor]] = {}
    for name, module in modules.items():
        fill_randomly(module, seed, f"tiny {name}")
        states[name] = {key: value.to(dtype).contiguous() for key, value in module.state_dict().items()}
    states["t5"]["shared.weight"] = states["t5"].pop("encoder.embed_tokens.weight")
    if layout == "diffusers":
        texts = {"t5": json.loads(t5.config.to_json_string())}
        if not is_chroma:
            texts["clip"] = transformers_clip_config(modules["clip"].config)
        _write_diffusers(folder, states, transformer.config, texts)
        return TinyFlux(folder, folder, None if is_chroma else folder, folder)
    return _write_single_files(folder, states, "model.diffusion_model." if layout == "comfyui" else "")


def _write_single_files(folder: Path, states: dict[str, dict[str, Tensor]], prefix: str) -> TinyFlux:
    clip_l = folder / "clip_l.safetensors" if "clip" in states else None
    name = "flux" if clip_l else "chroma"
    files = TinyFlux(folder / f"{name}.safetensors", folder / "ae.safetensors", clip_l, folder / "t5xxl.safetensors")
    save_file({prefix + key: value for key, value in states["transformer"].items()}, files.transformer)
    save_file(states["autoencoder"], files.autoencoder, {"config": json.dumps({"norm_num_groups": AUTOENCODER.groups})})
    if clip_l:
        save_file(states["clip"], clip_l, {"config": json.dumps({"num_attention_heads": TEXT_HEADS})})
    save_file(states["t5"], files.t5xxl)
    return files


def make_tiny_chroma(
    folder: Path | str, layout: Layout = "original", seed: int = 0, dtype: torch.dtype = torch.float32
) -> TinyFlux:
    """The variant ``chroma`` of ``make_tiny_flux``."""
    return make_tiny_flux(folder, "chroma", layout, seed, dtype)


LUMINA = LuminaConfig(
    dim=48,
    heads=4,
    kv_heads=2,
    head_dim=12,
    layers=4,
    refiner_layers=1,
    ffn_dim=192,
    text_dim=TEXT_WIDTH,
    time_dim=48,
    frequency_dim=256,
    axes_dims=(4, 4, 4),
)


def make_tiny_lumina(
    folder: Path | str, layout: Layout = "original", seed: int = 0, dtype: torch.dtype = torch.float32
) -> TinyLumina:
    """Write the models into ``folder``; the same seed gives the same weights in each layout.

    In ComfyUI's layout, one file holds all parts.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    modules: dict[str, Any] = {"transformer": LuminaTransformer(LUMINA), "autoencoder": AutoencoderKL(AUTOENCODER)}
    states: dict[str, dict[str, Tensor]] = {}
    for name, module in modules.items():
        fill_randomly(module, seed, f"tiny lumina {name}")
        states[name] = {key: value.to(dtype).contiguous() for key, value in module.state_dict().items()}
    if layout == "diffusers":
        _write_diffusers_lumina(folder, states, tiny_gemma2(LUMINA.text_dim, seed, dtype))
        return TinyLumina(folder, folder, folder)
    states["transformer"]["norm_final.weight"] = torch.ones(LUMINA.dim, dtype=dtype)
    config = {"norm_num_groups": AUTOENCODER.groups}
    if layout == "comfyui":
        gemma2 = tiny_gemma2(LUMINA.text_dim, seed, dtype)
        prefixes = {
            "model.diffusion_model.": states["transformer"],
            "vae.": states["autoencoder"],
            "text_encoders.gemma2_2b.transformer.model.": gemma2.state,
            "text_encoders.": {"spiece_model": gemma2.tokenizer, "gemma2_2b.logit_scale": torch.ones((), dtype=dtype)},
        }
        path = folder / "lumina.safetensors"
        together = {prefix + key: value for prefix, state in prefixes.items() for key, value in state.items()}
        save_file(together, path, {"config": json.dumps({**config, "gemma2": gemma2.exceptions})})
        return TinyLumina(path, path, path)
    files = TinyLumina(folder / "lumina.safetensors", folder / "gemma2.safetensors", folder / "ae.safetensors")
    save_file(states["transformer"], files.transformer)
    make_tiny_gemma2(files.gemma2, LUMINA.text_dim, seed, dtype)
    save_file(states["autoencoder"], files.autoencoder, {"config": json.dumps(config)})
    return files


HUNYUAN_IMAGE = HunyuanImageConfig(
    hidden_size=64,
    num_heads=2,
    depth=2,
    depth_single=2,
    refiner_depth=1,
    mlp_hidden=256,
    single_mlp_hidden=256,
    refiner_mlp_hidden=256,
    text_dim=TEXT_WIDTH,
    glyph_dim=TEXT_WIDTH,
    glyph_hidden=48,
    axes_dims=(16, 16),
)


def make_tiny_hunyuan_image(
    folder: Path | str, layout: Layout = "original", seed: int = 0, dtype: torch.dtype = torch.float32
) -> TinyHunyuanImage:
    """Write the models into ``folder``; the same seed gives the same weights in each layout."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    transformer = HunyuanImageTransformer(HUNYUAN_IMAGE)
    fill_randomly(transformer, seed, "tiny hunyuan image transformer")
    state = {key: value.to(dtype).contiguous() for key, value in transformer.state_dict().items()}
    autoencoder = tiny_hunyuan_autoencoder(seed, dtype)
    if layout == "diffusers":
        parts = {
            "transformer": ("diffusers", "HunyuanImageTransformer2DModel"),
            "vae": ("diffusers", "AutoencoderKLHunyuanImage"),
            "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
            "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration"),
            "tokenizer": ("transformers", "Qwen2Tokenizer"),
            "text_encoder_2": ("transformers", "T5EncoderModel"),
            "tokenizer_2": ("transformers", "ByT5Tokenizer"),
        }
        _write_pipeline("HunyuanImagePipeline", folder, parts, {"shift": 5.0})
        in_diffusers = diffusers_hunyuan_image_state(state, HUNYUAN_IMAGE)
        _write_transformer(folder, in_diffusers, diffusers_hunyuan_image_config(HUNYUAN_IMAGE))
        write_diffusers_qwen2_5_vl(folder, HUNYUAN_IMAGE.text_dim, seed, dtype)
        write_diffusers_byt5(folder, HUNYUAN_IMAGE.glyph_dim, seed, dtype)
        write_diffusers_hunyuan_autoencoder(folder / "vae", autoencoder)
        return TinyHunyuanImage(folder, folder, folder, folder)
    if layout == "comfyui":
        state = {f"model.diffusion_model.{comfyui_name(key)}": value for key, value in state.items()}
    names = ("hunyuan_image", "qwen_2.5_vl_7b", "byt5_small_glyphxl_fp16", "hunyuan_image_2.1_vae_fp16")
    files = TinyHunyuanImage(*(folder / f"{name}.safetensors" for name in names))
    save_file(state, files.transformer)
    make_tiny_qwen2_5_vl(files.text_encoder, HUNYUAN_IMAGE.text_dim, seed, dtype)
    make_tiny_byt5(files.byt5, HUNYUAN_IMAGE.glyph_dim, seed, dtype)
    save_file(autoencoder, files.autoencoder)
    return files


def clip_config(vocabulary: int) -> ClipConfig:
    """The sizes of FLUX.1's tiny CLIP-L."""
    return ClipConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=TEXT_HEADS,
    )


def t5_config(vocabulary: int) -> Any:
    return transformers_class("t5.configuration_t5", "T5Config")(
        vocab_size=vocabulary,
        d_model=TEXT_WIDTH,
        d_kv=TEXT_WIDTH // TEXT_HEADS,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=TEXT_HEADS,
        feed_forward_proj="gated-gelu",
        use_cache=False,
        is_encoder_decoder=False,
    )


def write_t5_tokenizer(folder: Path) -> int:
    """A small sentencepiece model, as spiece.model; returns its number of entries."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS, *string.printable.split(), *WORDS.split()]),
        model_writer=model,
        model_type="unigram",
        vocab_size=200,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    write_text(folder / "tokenizer_config.json", json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    return tokenizer_entries(model.getvalue())


# Gemma 2


@dataclass(frozen=True)
class TinyGemma2:
    """A Gemma 2 before it is written."""

    config: Any
    state: dict[str, Tensor]
    """Without a prefix."""
    tokenizer: Tensor
    """The bytes of its tokenizer.model."""
    exceptions: dict[str, int]
    """What a file has to say because its shapes don't."""


def make_tiny_gemma2(
    path: Path | str, hidden: int = 48, seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 3
) -> Path:
    """Write a Gemma 2 as one file with its tokenizer inside, as it is published for ComfyUI.

    ``hidden``, the width of its states, is a multiple of 4.
    """
    made = tiny_gemma2(hidden, seed, dtype, layers)
    state = {f"model.{name}": value for name, value in made.state.items()} | {"spiece_model": made.tokenizer}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, {"config": json.dumps(made.exceptions)})
    return Path(path)


def tiny_gemma2(hidden: int, seed: int, dtype: torch.dtype, layers: int = 3) -> TinyGemma2:
    """What ``make_tiny_gemma2`` writes."""
    tokenizer = gemma_tokenizer()
    sizes = {
        "vocab_size": tokenizer_entries(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
    }
    encoder = Gemma2TextEncoder(gemma2_config(sizes))
    fill_randomly(encoder, seed, "tiny gemma2")
    state = {name: value - 1 if value.dim() == 1 else value for name, value in encoder.state_dict().items()}
    state = {name: value.to(dtype).contiguous() for name, value in state.items()}
    return TinyGemma2(encoder.config, state, torch.tensor(list(tokenizer), dtype=torch.uint8), {"head_dim": 16})


def gemma_tokenizer(words: str = WORDS, entries: int = 400) -> bytes:
    """A small sentencepiece model of Gemma's kind: pairs of pieces are merged, and unknown characters become bytes."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words, *string.printable.split(), *words.split()]),
        model_writer=model,
        model_type="bpe",
        vocab_size=entries,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["<mask>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "\u2581\u2581", "<table>"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def tokenizer_entries(model: bytes) -> int:
    """The number of entries of a sentencepiece model."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()


# The Diffusers layout


def _write_diffusers(
    folder: Path, states: dict[str, dict[str, Tensor]], config: FluxConfig, texts: dict[str, dict[str, Any]]
) -> None:
    """``texts`` are the configurations of the text encoders by their names in ``states``."""
    is_chroma = isinstance(config, ChromaConfig)
    text_parts = {"text_encoder": "t5"} if is_chroma else {"text_encoder": "clip", "text_encoder_2": "t5"}
    parts = {
        "transformer": ("diffusers", diffusers_transformer_config(config)["_class_name"]),
        "vae": ("diffusers", "AutoencoderKL"),
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    }
    for part, name in text_parts.items():
        classes = ("CLIPTextModel", "CLIPTokenizer") if name == "clip" else ("T5EncoderModel", "T5TokenizerFast")
        parts |= {part: ("transformers", classes[0])}
        parts |= {part.replace("text_encoder", "tokenizer"): ("transformers", classes[1])}
    is_shifted = is_chroma or config.guidance_embed
    scheduler = {"use_dynamic_shifting": is_shifted, "shift": 1.0}
    transformer = diffusers_transformer_state(states["transformer"], config)
    _write_pipeline("ChromaPipeline" if is_chroma else "FluxPipeline", folder, parts, scheduler)
    _write_transformer(folder, transformer, diffusers_transformer_config(config))
    _write_autoencoder(folder, states["autoencoder"])
    for part, name in text_parts.items():
        write_text(folder / part / "config.json", json.dumps(texts[name]))
        save_file(states[name], folder / part / "model.safetensors", {"format": "pt"})


def _write_diffusers_lumina(folder: Path, states: dict[str, dict[str, Tensor]], gemma2: TinyGemma2) -> None:
    parts = {
        "transformer": ("diffusers", "Lumina2Transformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "Gemma2Model"),
        "tokenizer": ("transformers", "GemmaTokenizerFast"),
    }
    _write_pipeline("Lumina2Pipeline", folder, parts, {"shift": 6.0})
    _write_transformer(folder, diffusers_lumina_state(states["transformer"], LUMINA), diffusers_lumina_config(LUMINA))
    _write_autoencoder(folder, states["autoencoder"])
    write_text(folder / "text_encoder" / "config.json", gemma2.config.to_json_string())
    save_file(gemma2.state, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer" / "tokenizer.model").write_bytes(gemma2.tokenizer.numpy().tobytes())
    settings = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False}
    write_text(folder / "tokenizer" / "tokenizer_config.json", json.dumps(settings))


def _write_pipeline(name: str, folder: Path, parts: dict[str, tuple[str, str]], scheduler: dict[str, Any]) -> None:
    """The folders of ``parts`` (library and class of each), the index that names them and the scheduler's file."""
    for part in parts:
        (folder / part).mkdir(parents=True, exist_ok=True)
    write_text(folder / "model_index.json", json.dumps({"_class_name": name, **parts}))
    settings = {"_class_name": parts["scheduler"][1], **scheduler}
    write_text(folder / "scheduler" / "scheduler_config.json", json.dumps(settings))


def _write_transformer(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    write_text(folder / "transformer" / "config.json", json.dumps(config))
    _save_shards(state, folder / "transformer", 2)


def _write_autoencoder(folder: Path, state: dict[str, Tensor]) -> None:
    write_text(folder / "vae" / "config.json", json.dumps(diffusers_autoencoder_config(AUTOENCODER)))
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(diffusers_autoencoder_state(state, AUTOENCODER), vae)


def _save_shards(state: dict[str, Tensor], folder: Path, count: int) -> None:
    names = [f"diffusion_pytorch_model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
    keys = sorted(state)
    weight_map = {key: names[index * count // len(keys)] for index, key in enumerate(keys)}
    for name in names:
        save_file({key: state[key] for key in keys if weight_map[key] == name}, folder / name, {"format": "pt"})
    total = sum(value.nbytes for value in state.values())
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    write_text(folder / "diffusion_pytorch_model.safetensors.index.json", index_text)


def main() -> None:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    models = [name for family in FAMILIES for name in family.model_names]
    parser.add_argument("--family", choices=models, default="flux", help="which model")
    parser.add_argument("--variant", choices=("dev", "schnell"), help="FLUX.1: with or without guidance embedding")
    parser.add_argument("--layout", choices=get_args(Layout), default="original", help="whose key names and files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    parser.add_argument("--v_prediction", action="store_true", help="Stable Diffusion: a file that says it predicts v")
    arguments = parser.parse_args()
    others = {"lumina": make_tiny_lumina, "hunyuan_image": make_tiny_hunyuan_image}
    is_flux = arguments.family in FLUX.model_names
    if arguments.variant and arguments.family != "flux":
        parser.error("--variant is for FLUX.1")
    if arguments.v_prediction and (is_flux or arguments.family in others):
        parser.error("--v_prediction is for Stable Diffusion")
    if is_flux:
        variant = "chroma" if arguments.family == "chroma" else arguments.variant or "dev"
        files: Any = make_tiny_flux(arguments.folder, variant, arguments.layout, arguments.seed)
    elif arguments.family in others:
        files = others[arguments.family](arguments.folder, arguments.layout, arguments.seed)
    else:
        from tools.make_tiny_stable_diffusion import make_tiny_stable_diffusion

        if arguments.layout == "comfyui":
            parser.error("--layout comfyui is not for Stable Diffusion, whose files are the same in ComfyUI")
        path = make_tiny_stable_diffusion(
            arguments.folder, arguments.family, arguments.layout, arguments.seed, v_prediction=arguments.v_prediction
        )
        print(path)
        return
    print("\n".join(str(path) for path in dict.fromkeys(vars(files).values()) if path))


if __name__ == "__main__":
    run_script(main)
