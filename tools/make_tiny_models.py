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
from torch import Tensor, nn

from library.files import write_text
from library.models.autoencoder_kl import LATENT_SCALE, LATENT_SHIFT, AutoencoderConfig, AutoencoderKL
from library.models.clip import ClipTextEncoder
from library.models.flux.checkpoint import DOUBLE, DOUBLE_NORMS, OUTER, SINGLE, SINGLE_NORMS
from library.models.flux.transformer import FluxConfig, FluxTransformer, rope_axes
from library.models.t5 import T5TextEncoder
from library.models.tokenizer_files import byte_characters
from library.randomness import generator
from library.safetensors_io import save_file

Layout = Literal["original", "comfyui", "diffusers"]
Variant = Literal["dev", "schnell"]

TEXT_WIDTH = 64
TEXT_HEADS = 4
WORDS = "a the of on and big small red green blue yellow purple black white circle square ring cat dog photo background"
AUTOENCODER = AutoencoderConfig(channels=8, multipliers=(1, 1, 2, 2), res_blocks=1, latent_channels=16, groups=8)


@dataclass(frozen=True)
class TinyFlux:
    """The paths of the files written; in the Diffusers layout, all are the model's folder."""

    transformer: Path
    autoencoder: Path
    clip_l: Path
    t5xxl: Path


def transformer_config(variant: Variant = "dev") -> FluxConfig:
    """Two blocks of each kind, two heads of 32."""
    return FluxConfig(
        hidden_size=64,
        num_heads=2,
        depth=2,
        depth_single=2,
        context_dim=TEXT_WIDTH,
        vector_dim=TEXT_WIDTH,
        mlp_hidden=256,
        axes_dims=rope_axes(32),
        guidance_embed=variant == "dev",
    )


def fill_randomly(module: nn.Module, seed: int, purpose: str) -> None:
    """Give each parameter values that depend on the seed and its name only: activations stay near unit variance."""
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator(seed, purpose, name))
        is_norm_weight = parameter.dim() == 1 and not name.endswith("bias")
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
        parameter.data = 1 + 0.1 * values if is_norm_weight else values / fan_in**0.5
        parameter.requires_grad_(False)


def make_tiny_flux(
    folder: Path | str,
    variant: Variant = "dev",
    layout: Layout = "original",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> TinyFlux:
    """Write the four models and two tokenizers into ``folder``; the same seed gives the same weights in each layout."""
    folder = Path(folder)
    clip_vocabulary = write_clip_tokenizer(folder / "tokenizer")
    t5_vocabulary = write_t5_tokenizer(folder / "tokenizer_2")
    transformer = FluxTransformer(transformer_config(variant))
    autoencoder = AutoencoderKL(AUTOENCODER)
    clip, t5 = ClipTextEncoder(clip_config(clip_vocabulary)), T5TextEncoder(t5_config(t5_vocabulary))
    modules = {"transformer": transformer, "autoencoder": autoencoder, "clip": clip, "t5": t5}
    states: dict[str, dict[str, Tensor]] = {}
    for name, module in modules.items():
        fill_randomly(module, seed, f"tiny {name}")
        states[name] = {key: value.to(dtype).contiguous() for key, value in module.state_dict().items()}
    states["t5"]["shared.weight"] = states["t5"].pop("encoder.embed_tokens.weight")
    if layout == "diffusers":
        _write_diffusers(folder, states, transformer.config, clip.config, t5.config)
        return TinyFlux(folder, folder, folder, folder)
    return _write_single_files(folder, states, "model.diffusion_model." if layout == "comfyui" else "")


def _write_single_files(folder: Path, states: dict[str, dict[str, Tensor]], prefix: str) -> TinyFlux:
    files = TinyFlux(*(folder / f"{name}.safetensors" for name in ("flux", "ae", "clip_l", "t5xxl")))
    save_file({prefix + key: value for key, value in states["transformer"].items()}, files.transformer)
    save_file(states["autoencoder"], files.autoencoder)
    save_file(states["clip"], files.clip_l, {"config": json.dumps({"num_attention_heads": TEXT_HEADS})})
    save_file(states["t5"], files.t5xxl)
    return files


def clip_config(vocabulary: int) -> Any:
    from transformers.models.clip.configuration_clip import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=TEXT_HEADS,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def t5_config(vocabulary: int) -> Any:
    from transformers.models.t5.configuration_t5 import T5Config

    return T5Config(
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


def write_clip_tokenizer(folder: Path, pad_token: str = "<|endoftext|>") -> int:
    """A byte-level BPE without merges, as vocab.json and merges.txt; returns its number of entries."""
    folder.mkdir(parents=True, exist_ok=True)
    characters = byte_characters()
    entries = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    write_text(folder / "vocab.json", json.dumps({entry: index for index, entry in enumerate(entries)}))
    write_text(folder / "merges.txt", "#version: 0.2\n")
    write_text(
        folder / "tokenizer_config.json",
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad_token}),
    )
    return len(entries)


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
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()


# The Diffusers layout


def _write_diffusers(
    folder: Path, states: dict[str, dict[str, Tensor]], config: FluxConfig, clip: Any, t5: Any
) -> None:
    parts = {
        "transformer": ("diffusers", "FluxTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "T5EncoderModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "T5TokenizerFast"),
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    }
    for part in parts:
        (folder / part).mkdir(parents=True, exist_ok=True)
    write_text(folder / "model_index.json", json.dumps({"_class_name": "FluxPipeline", **parts}))
    scheduler = {"_class_name": parts["scheduler"][1], "use_dynamic_shifting": config.guidance_embed, "shift": 1.0}
    write_text(folder / "scheduler" / "scheduler_config.json", json.dumps(scheduler))
    write_text(folder / "transformer" / "config.json", json.dumps(diffusers_transformer_config(config)))
    write_text(folder / "vae" / "config.json", json.dumps(diffusers_autoencoder_config(AUTOENCODER)))
    write_text(folder / "text_encoder" / "config.json", clip.to_json_string())
    write_text(folder / "text_encoder_2" / "config.json", t5.to_json_string())
    _save_shards(diffusers_transformer_state(states["transformer"], config), folder / "transformer", 2)
    save_file(
        diffusers_autoencoder_state(states["autoencoder"], AUTOENCODER),
        folder / "vae" / "diffusion_pytorch_model.safetensors",
    )
    save_file(states["clip"], folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    save_file(states["t5"], folder / "text_encoder_2" / "model.safetensors", {"format": "pt"})


def _save_shards(state: dict[str, Tensor], folder: Path, count: int) -> None:
    names = [f"diffusion_pytorch_model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
    keys = sorted(state)
    weight_map = {key: names[index * count // len(keys)] for index, key in enumerate(keys)}
    for name in names:
        save_file({key: state[key] for key in keys if weight_map[key] == name}, folder / name, {"format": "pt"})
    total = sum(value.nbytes for value in state.values())
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    write_text(folder / "diffusion_pytorch_model.safetensors.index.json", index_text)


def diffusers_transformer_config(config: FluxConfig) -> dict[str, Any]:
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": config.in_channels,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_dim,
        "pooled_projection_dim": config.vector_dim,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": list(config.axes_dims),
    }


def diffusers_transformer_state(state: dict[str, Tensor], config: FluxConfig) -> dict[str, Tensor]:
    """The transformer's tensors under Diffusers' names."""
    modules = {ours: (theirs,) for ours, theirs in OUTER.items()}
    norms: dict[str, str] = {}
    for index in range(config.depth):
        prefix, theirs = f"double_blocks.{index}.", f"transformer_blocks.{index}."
        modules |= {prefix + name: tuple(theirs + part for part in parts) for name, parts in DOUBLE.items()}
        norms |= {prefix + name: theirs + part for name, part in DOUBLE_NORMS.items()}
    for index in range(config.depth_single):
        prefix, theirs = f"single_blocks.{index}.", f"single_transformer_blocks.{index}."
        modules |= {prefix + name: tuple(theirs + part for part in parts) for name, parts in SINGLE.items()}
        norms |= {prefix + name: theirs + part for name, part in SINGLE_NORMS.items()}
    converted = {}
    for key, value in state.items():
        module, kind = key.rsplit(".", 1)
        if module in norms:
            converted[f"{norms[module]}.weight"] = value
            continue
        if module == "final_layer.adaLN_modulation.1":
            value = torch.cat(tuple(reversed(value.chunk(2))))
        parts = modules[module]
        rows = [config.hidden_size] * 3 + [config.mlp_hidden]
        for part, piece in zip(parts, value.split(rows[: len(parts)]) if len(parts) > 1 else (value,)):
            converted[f"{part}.{kind}"] = piece.contiguous()
    return converted


def diffusers_autoencoder_config(config: AutoencoderConfig) -> dict[str, Any]:
    levels = len(config.multipliers)
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [config.channels * multiplier for multiplier in config.multipliers],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": config.res_blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "scaling_factor": LATENT_SCALE,
        "shift_factor": LATENT_SHIFT,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
    }


AUTOENCODER_NAMES = {
    "mid.block_1.": "mid_block.resnets.0.",
    "mid.block_2.": "mid_block.resnets.1.",
    "mid.attn_1.norm.": "mid_block.attentions.0.group_norm.",
    "mid.attn_1.q.": "mid_block.attentions.0.to_q.",
    "mid.attn_1.k.": "mid_block.attentions.0.to_k.",
    "mid.attn_1.v.": "mid_block.attentions.0.to_v.",
    "mid.attn_1.proj_out.": "mid_block.attentions.0.to_out.0.",
    ".downsample.": ".downsamplers.0.",
    ".upsample.": ".upsamplers.0.",
    ".block.": ".resnets.",
    "nin_shortcut.": "conv_shortcut.",
    "norm_out.": "conv_norm_out.",
}


def diffusers_autoencoder_state(state: dict[str, Tensor], config: AutoencoderConfig) -> dict[str, Tensor]:
    """The autoencoder's tensors under Diffusers' names."""
    converted = {}
    last = len(config.multipliers) - 1
    for key, value in state.items():
        name = key
        for ours, theirs in AUTOENCODER_NAMES.items():
            name = name.replace(ours, theirs)
        for level in range(last + 1):
            name = name.replace(f"encoder.down.{level}.", f"encoder.down_blocks.{level}.")
            name = name.replace(f"decoder.up.{level}.", f"decoder.up_blocks.{last - level}.")
        is_projection = ".attentions.0.to_" in name and value.dim() == 4
        converted[name] = value[:, :, 0, 0].contiguous() if is_projection else value
    return converted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--family", choices=("flux", "sd1", "sd2", "sdxl"), default="flux", help="which model")
    parser.add_argument("--variant", choices=get_args(Variant), help="FLUX.1: with or without guidance embedding")
    parser.add_argument("--layout", choices=get_args(Layout), default="original", help="whose key names and files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    parser.add_argument("--v_prediction", action="store_true", help="Stable Diffusion: a file that says it predicts v")
    arguments = parser.parse_args()
    if arguments.family == "flux":
        if arguments.v_prediction:
            parser.error("--v_prediction is for Stable Diffusion")
        files = make_tiny_flux(arguments.folder, arguments.variant or "dev", arguments.layout, arguments.seed)
        print("\n".join(str(path) for path in dict.fromkeys(vars(files).values())))
        return
    from tools.make_tiny_stable_diffusion import make_tiny_stable_diffusion

    if arguments.layout == "comfyui" or arguments.variant:
        parser.error("--variant and --layout comfyui are for FLUX.1")
    path = make_tiny_stable_diffusion(
        arguments.folder, arguments.family, arguments.layout, arguments.seed, v_prediction=arguments.v_prediction
    )
    print(path)


if __name__ == "__main__":
    main()
