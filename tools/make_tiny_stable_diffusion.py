"""Write a tiny Stable Diffusion 1, 2 or XL with random weights, in the layouts and key names of the real files.

``tools/make_tiny_models.py`` has the command line. The U-Net has the real models' blocks (12 input blocks in 1 and 2,
9 in XL), narrow and with fewer transformers; the text encoders have few layers; tokenizers lie beside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from library.files import write_text
from library.lean_imports import diffusers_class
from library.models.clip import ClipConfig, ClipTextEncoder
from library.models.loading import on_meta
from library.models.stable_diffusion.checkpoint import SCALING_FACTORS, Variant
from library.models.stable_diffusion.keys import autoencoder_table, inverted, open_clip_table, renamed, unet_table
from library.randomness import generator
from library.safetensors_io import save_file
from tools.tiny_parts import fill_randomly, transformers_clip_config, write_clip_tokenizer

Layout = Literal["original", "diffusers"]

TIME_ID_WIDTH = 32
END_OF_TEXT = "<|endoftext|>"
FIRST_ENTRY = "!"  # what Stable Diffusion 2 and XL's second encoder pad with: the vocabulary's entry 0


@dataclass(frozen=True)
class Encoder:
    """A text encoder's sizes: its MLP is ``mlp_ratio`` times as wide as its text, its pooled text ``projection``."""

    width: int
    heads: int
    activation: str
    padding: str
    layers: int = 3
    projection: int | None = None
    mlp_ratio: int = 2


@dataclass(frozen=True)
class Shape:
    """What tells one family from another: ``depths`` are the transformers in each level's attention, 0 for none."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: int | tuple[int, ...]
    linear_projection: bool
    encoders: tuple[Encoder, ...]
    open_clip: tuple[bool, ...]
    """Which encoders are stored under OpenCLIP's names in the single file."""
    resnets: int = 2
    """On each level of the U-Net, as in the real models."""
    autoencoder_widths: tuple[int, ...] = (16, 32, 48, 48)
    autoencoder_resnets: int = 2
    groups: int = 8
    """Of the GroupNorms, 32 in the real models."""

    @property
    def attention(self) -> Sequence[bool]:
        """Which levels have transformers."""
        return [depth > 0 for depth in self.depths]


CLIP_L = Encoder(64, 4, "quick_gelu", END_OF_TEXT)
SHAPES: dict[Variant, Shape] = {
    "sd1": Shape((32, 64, 96, 96), (1, 1, 1, 0), 8, False, (CLIP_L,), (False,)),
    "sd2": Shape((32, 64, 96, 96), (1, 1, 1, 0), (2, 4, 6, 6), True, (Encoder(64, 4, "gelu", FIRST_ENTRY),), (True,)),
    "sdxl": Shape(
        (32, 64, 96),
        (0, 1, 2),
        (2, 4, 6),
        True,
        (CLIP_L, Encoder(96, 6, "gelu", FIRST_ENTRY, projection=80)),
        (False, True),
    ),
}
CLASSES: dict[Variant, str] = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
}


def make_tiny_stable_diffusion(
    folder: Path | str,
    variant: Variant = "sd1",
    layout: Layout = "original",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    v_prediction: bool = False,
    shape: Shape | None = None,
) -> Path:
    """Write the model and its tokenizers into ``folder``; the same seed gives the same weights in each layout.

    Returns the single file, or the Diffusers folder. ``v_prediction`` only changes what the files say of themselves.
    ``shape`` is another than the family's in ``SHAPES``.
    """
    folder = Path(folder)
    shape = shape or SHAPES[variant]
    vocabulary = 0
    for index, encoder in enumerate(shape.encoders):
        vocabulary = write_clip_tokenizer(folder / ("tokenizer_2" if index else "tokenizer"), encoder.padding)
    with on_meta():
        modules = build_modules(shape, vocabulary, SCALING_FACTORS[variant])
    states = {}
    for part, module in modules.items():
        fill_randomly(module, seed, f"tiny {variant} {part}")
        states[part] = {name: value.to(dtype).contiguous() for name, value in module.state_dict().items()}
    if layout == "diffusers":
        return _write_diffusers(folder, variant, shape, modules, states, v_prediction)
    return _write_single_file(folder, variant, shape, states, v_prediction)


def build_modules(shape: Shape, vocabulary: int, scaling_factor: float = 0.18215) -> dict[str, Any]:
    """diffusers' and transformers' modules of a model, by the names of their Diffusers folders."""
    unet_class = diffusers_class("UNet2DConditionModel")
    autoencoder_class = diffusers_class("AutoencoderKL")
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in shape.depths]
    sizes = {
        "block_out_channels": shape.widths,
        "layers_per_block": shape.resnets,
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "transformer_layers_per_block": [depth or 1 for depth in shape.depths],
        "attention_head_dim": shape.heads,
        "norm_num_groups": shape.groups,
        "cross_attention_dim": sum(encoder.width for encoder in shape.encoders),
        "use_linear_projection": shape.linear_projection,
        "sample_size": 8,
    }
    pooled = shape.encoders[-1].projection
    if pooled is not None:
        sizes |= {"addition_embed_type": "text_time", "addition_time_embed_dim": TIME_ID_WIDTH}
        sizes |= {"projection_class_embeddings_input_dim": pooled + 6 * TIME_ID_WIDTH}
    modules: dict[str, Any] = {
        "unet": unet_class(**sizes),
        "vae": autoencoder_class(
            block_out_channels=shape.autoencoder_widths,
            down_block_types=["DownEncoderBlock2D"] * len(shape.autoencoder_widths),
            up_block_types=["UpDecoderBlock2D"] * len(shape.autoencoder_widths),
            layers_per_block=shape.autoencoder_resnets,
            norm_num_groups=shape.groups,
            scaling_factor=scaling_factor,
            sample_size=64,
        ),
    }
    for index, encoder in enumerate(shape.encoders):
        config = encoder_config(encoder, vocabulary)
        modules["text_encoder_2" if index else "text_encoder"] = ClipTextEncoder(config, encoder.projection)
    return modules


def encoder_config(encoder: Encoder, vocabulary: int) -> ClipConfig:
    """The sizes of a text encoder."""
    return ClipConfig(
        vocab_size=vocabulary,
        hidden_size=encoder.width,
        intermediate_size=encoder.mlp_ratio * encoder.width,
        num_hidden_layers=encoder.layers,
        num_attention_heads=encoder.heads,
        hidden_act=encoder.activation,
    )


# The single file


def _write_single_file(
    folder: Path, variant: Variant, shape: Shape, states: Mapping[str, Mapping[str, Tensor]], v_prediction: bool
) -> Path:
    tensors = original_tensors(shape, states)
    tensors["betas"] = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    tensors["alphas_cumprod"] = torch.cumprod(1 - tensors["betas"], dim=0)
    metadata = {"config": json.dumps(exceptions(shape))}
    if v_prediction and variant == "sdxl":
        tensors |= {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    elif v_prediction:
        metadata["modelspec.prediction_type"] = "v"
    path = folder / f"{variant}.safetensors"
    save_file(tensors, path, metadata)
    return path


def original_tensors(shape: Shape, states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all parts, given by the names of their Diffusers folders, under the single file's names."""
    tensors: dict[str, Tensor] = {}
    names = inverted(unet_table(shape.resnets, shape.attention))
    for name, value in states["unet"].items():
        tensors[f"model.diffusion_model.{renamed(name, names) or name}"] = value
    names = inverted(autoencoder_table(len(shape.autoencoder_widths), shape.autoencoder_resnets))
    for name, value in states["vae"].items():
        if ".attentions.0.to_" in name and value.dim() == 2:
            value = value[..., None, None]
        tensors[f"first_stage_model.{renamed(name, names) or name}"] = value
    for index, (encoder, is_open_clip) in enumerate(zip(shape.encoders, shape.open_clip)):
        prefix = f"conditioner.embedders.{index}." if len(shape.encoders) > 1 else "cond_stage_model."
        state = states["text_encoder_2" if index else "text_encoder"]
        if is_open_clip:
            state = open_clip_state(state, encoder)
        else:
            state = {**state, "text_model.embeddings.position_ids": torch.arange(77).expand(1, -1).contiguous()}
        tensors |= {prefix + ("model." if is_open_clip else "transformer.") + name: state[name] for name in state}
    return tensors


def exceptions(shape: Shape) -> dict[str, Any]:
    """What a loader cannot tell from the shapes of so narrow a model."""
    exceptions: dict[str, Any] = {
        "unet": {"attention_head_dim": shape.heads, "norm_num_groups": shape.groups},
        "vae": {"norm_num_groups": shape.groups},
    }
    for index, encoder in enumerate(shape.encoders):
        exceptions["text_encoder_2" if index else "text_encoder"] = {"num_attention_heads": encoder.heads}
    return exceptions


def open_clip_state(state: Mapping[str, Tensor], encoder: Encoder) -> dict[str, Tensor]:
    """A text encoder's tensors under OpenCLIP's names, with what its files hold beside them.

    Without a projection of its own, it gets a last layer that Stable Diffusion 2 leaves out.
    """
    names = inverted(open_clip_table(encoder.layers))
    made: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "text_model.embeddings.position_embedding.weight":
            made["positional_embedding"] = value
        elif name == "text_projection.weight":
            made["text_projection"] = value.t().contiguous()
        elif "_proj." not in name or "out_proj" in name:
            made[renamed(name, names) or name] = value
    for layer in range(encoder.layers):
        theirs = f"text_model.encoder.layers.{layer}.self_attn"
        for kind in ("weight", "bias"):
            parts = [state[f"{theirs}.{part}_proj.{kind}"] for part in ("q", "k", "v")]
            made[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    if encoder.projection is None:
        last = f"transformer.resblocks.{encoder.layers - 1}."
        unused = {name: 2 * value for name, value in made.items() if name.startswith(last)}
        made |= {name.replace(last, f"transformer.resblocks.{encoder.layers}."): unused[name] for name in unused}
        values = torch.randn(encoder.width, encoder.width, generator=generator(0, "tiny", "unused projection"))
        made["text_projection"] = values.to(made["positional_embedding"].dtype)
    made["logit_scale"] = torch.tensor(4.6052)
    return made


# The Diffusers folder


def _write_diffusers(
    folder: Path,
    variant: Variant,
    shape: Shape,
    modules: Mapping[str, Any],
    states: Mapping[str, Mapping[str, Tensor]],
    v_prediction: bool,
) -> Path:
    classes: dict[str, Any] = {
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "scheduler": ("diffusers", "DDIMScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
    }
    if variant == "sdxl":
        classes |= {"text_encoder_2": ("transformers", "CLIPTextModelWithProjection")}
        classes |= {"tokenizer_2": ("transformers", "CLIPTokenizer"), "force_zeros_for_empty_prompt": True}
    else:
        classes |= {"safety_checker": (None, None), "requires_safety_checker": False}
    classes |= {"feature_extractor": (None, None), "image_encoder": (None, None)}
    write_text(folder / "model_index.json", json.dumps({"_class_name": CLASSES[variant], **classes}))
    for part, module in modules.items():
        is_text = part.startswith("text_encoder")
        if is_text:
            encoder = shape.encoders[part == "text_encoder_2"]
            config = transformers_clip_config(module.config, encoder.projection, encoder.padding == END_OF_TEXT)
        else:
            config = json.loads(module.to_json_string())
        (folder / part).mkdir(parents=True, exist_ok=True)
        write_text(folder / part / "config.json", json.dumps(config))
        name = "model.safetensors" if is_text else "diffusion_pytorch_model.safetensors"
        save_file(states[part], folder / part / name, {"format": "pt"})
    scheduler = {
        "_class_name": classes["scheduler"][1],
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "v_prediction" if v_prediction else "epsilon",
        "rescale_betas_zero_snr": v_prediction and variant == "sdxl",
    }
    (folder / "scheduler").mkdir(exist_ok=True)
    write_text(folder / "scheduler" / "scheduler_config.json", json.dumps(scheduler))
    return folder
