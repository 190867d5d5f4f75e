"""Open a FLUX.1 or Chroma transformer file: recognise its layout, infer its sizes, build it on ``meta``, load it.

Layouts read: the original one, the same with ComfyUI's prefix, and Diffusers' (a file, shards, or a model folder).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from library.checkpoints import Checkpoint, open_checkpoint
from library.errors import UserError
from library.models.flux.chroma import ChromaConfig, ChromaTransformer
from library.models.flux.transformer import FluxConfig, FluxTransformer, rope_axes
from library.models.loading import Origin, TensorSource, on_meta, origins_of_modules
from library.models.pipeline import OpenedPart
from library.models.recognition import APPROXIMATOR, TRANSFORMER_PREFIXES, Kind, recognise, refuse_unless

ModelType = Literal["flux", "chroma"]
Variant = Literal["dev", "schnell", "chroma"]
NAMES = {"flux": "a FLUX.1 transformer", "chroma": "a Chroma transformer"}
LAST_LAYER = "final_layer.linear.weight"
SPECIAL_INPUTS = {128: "Depth or Canny", 384: "Fill"}


@dataclass(frozen=True)
class TransformerFile(OpenedPart[FluxTransformer | ChromaTransformer]):
    """An opened transformer checkpoint, ready to be loaded."""

    source: TensorSource
    config: FluxConfig

    @property
    def variant(self) -> Variant:
        """``chroma``; ``dev`` where the model is guidance-distilled (dev, Krea, Kontext); else ``schnell``."""
        if isinstance(self.config, ChromaConfig):
            return "chroma"
        return "dev" if self.config.guidance_embed else "schnell"

    @property
    def model_type(self) -> ModelType:
        """What ``--model_type`` calls it."""
        return "chroma" if self.variant == "chroma" else "flux"

    def meta_module(self) -> FluxTransformer | ChromaTransformer:
        """The module on torch's meta device: its structure without its values."""
        with on_meta():
            if isinstance(self.config, ChromaConfig):
                return ChromaTransformer(self.config)
            return FluxTransformer(self.config)


def open_transformer(
    path: Path | str, disable_mmap: bool = False, option: str = "", model_type: ModelType | None = "flux"
) -> TransformerFile:
    """Open ``path`` (a file, one of its shards, a Diffusers folder) by its headers only; ``model_type`` None: either.

    Raises UserError, naming ``option`` and what the file is, when it isn't a text-to-image transformer of that type.
    """
    checkpoint = open_checkpoint(path, "transformer", disable_mmap, option)
    kind = _wanted_kind(checkpoint, model_type)
    source = TensorSource(checkpoint, TRANSFORMER_PREFIXES)
    if kind.name.endswith("-diffusers"):
        source.remap(diffusers_origins(source))
    in_channels = source.sizes("img_in.weight", 2)[1]
    if in_channels != source.sizes(LAST_LAYER, 2)[0]:
        special = SPECIAL_INPUTS.get(in_channels, "a special kind")
        raise UserError(
            f"{checkpoint.label} is a FLUX.1 model with extra image inputs ({special}: {in_channels} input channels); "
            "a text-to-image model (dev, schnell, Krea, Kontext) is needed here."
        )
    return TransformerFile(source, infer_config(source))


def _wanted_kind(checkpoint: Checkpoint, model_type: ModelType | None) -> Kind:
    """The checkpoint's kind. Raises UserError; a file of the other type comes with the option that it needs."""
    types: tuple[ModelType, ...] = ("flux", "chroma") if model_type is None else (model_type,)
    kinds = {f"{name}{layout}" for name in types for layout in ("", "-diffusers")}
    other: ModelType = "flux" if model_type == "chroma" else "chroma"
    found = recognise(checkpoint, TRANSFORMER_PREFIXES)
    if model_type is not None and found is not None and found.name.removesuffix("-diffusers") == other:
        what = f"with --model_type {model_type}, " if model_type == "chroma" else ""
        raise UserError(
            f"{checkpoint.label} is {found.description}; {what}{NAMES[model_type]} is needed here. "
            f"Give --model_type {other} for this file."
        )
    return refuse_unless(checkpoint, kinds, " or ".join(NAMES[name] for name in types), TRANSFORMER_PREFIXES)


def infer_config(source: TensorSource) -> FluxConfig:
    """Sizes from the shapes of tensors in the original layout; a ControlNet has no last layer.

    Raises UserError when they contradict each other.
    """
    hidden, in_channels = source.sizes("img_in.weight", 2)
    head_dim = source.sizes("double_blocks.0.img_attn.norm.query_norm.scale", 1)[0]
    exceptions = source.exceptions
    try:
        return _config_class(source)(
            hidden_size=hidden,
            num_heads=hidden // head_dim,
            depth=source.count(r"double_blocks\.(\d+)\."),
            depth_single=source.count(r"single_blocks\.(\d+)\."),
            in_channels=in_channels,
            out_channels=source.sizes(LAST_LAYER, 2)[0] if LAST_LAYER in source else in_channels,
            context_dim=source.sizes("txt_in.weight", 2)[1],
            mlp_hidden=source.sizes("double_blocks.0.img_mlp.0.weight", 2)[0],
            axes_dims=tuple(exceptions.get("axes_dims_rope", rope_axes(head_dim))),
            theta=float(exceptions.get("theta", 10000.0)),
            qkv_bias="double_blocks.0.img_attn.qkv.bias" in source,
            **_own_sizes(source),
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"{source.checkpoint.label} has sizes that don't fit together: {error}.") from None


def _config_class(source: TensorSource) -> type[FluxConfig]:
    return ChromaConfig if APPROXIMATOR in source else FluxConfig


def _own_sizes(source: TensorSource) -> dict[str, Any]:
    """The sizes that only one of the two families has."""
    if APPROXIMATOR in source:
        width, inputs = source.sizes(APPROXIMATOR, 2)
        return {
            "approximator_in": inputs,
            "approximator_hidden": width,
            "approximator_layers": source.count(r"distilled_guidance_layer\.layers\.(\d+)\."),
        }
    return {
        "vector_dim": source.sizes("vector_in.in_layer.weight", 2)[1],
        "time_dim": source.sizes("time_in.in_layer.weight", 2)[1],
        "guidance_embed": "guidance_in.in_layer.weight" in source,
    }


# Diffusers' names of whole modules; {} is "weight" or "bias".
OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
# Of Chroma's approximator; {} is the number of a layer.
APPROXIMATOR_OUTER = ("distilled_guidance_layer.in_proj", "distilled_guidance_layer.out_proj")
APPROXIMATOR_LAYER = {
    "distilled_guidance_layer.layers.{}.in_layer": "distilled_guidance_layer.layers.{}.linear_1",
    "distilled_guidance_layer.layers.{}.out_layer": "distilled_guidance_layer.layers.{}.linear_2",
}
APPROXIMATOR_NORM = ("distilled_guidance_layer.norms.{}.scale", "distilled_guidance_layer.norms.{}.weight")


def diffusers_origins(source: TensorSource) -> dict[str, Origin]:
    """For each tensor of the original layout, the Diffusers tensors it is made of (rows in that order)."""
    modules: dict[str, tuple[str, ...]] = {name: (part,) for name, part in OUTER.items()}
    modules |= {name: (name,) for name in APPROXIMATOR_OUTER}
    norms: dict[str, str] = {}
    for index in range(source.count(r"distilled_guidance_layer\.layers\.(\d+)\.")):
        modules |= {name.format(index): (part.format(index),) for name, part in APPROXIMATOR_LAYER.items()}
        scale, weight = (name.format(index) for name in APPROXIMATOR_NORM)
        norms[scale] = weight
    for ours, theirs, block_modules, block_norms in (
        ("double_blocks", "transformer_blocks", DOUBLE, DOUBLE_NORMS),
        ("single_blocks", "single_transformer_blocks", SINGLE, SINGLE_NORMS),
    ):
        for index in range(source.count(rf"{theirs}\.(\d+)\.")):
            for name, parts in block_modules.items():
                modules[f"{ours}.{index}.{name}"] = tuple(f"{theirs}.{index}.{part}" for part in parts)
            for name, part in block_norms.items():
                norms[f"{ours}.{index}.{name}.scale"] = f"{theirs}.{index}.{part}.weight"
    of_norms = {scale: Origin((weight,)) for scale, weight in norms.items() if weight in source}
    return origins_of_modules(source, modules.items(), swapped=("final_layer.adaLN_modulation.1",)) | of_norms
