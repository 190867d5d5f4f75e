"""Open a HunyuanImage-2.1 transformer file: recognise its layout, infer its sizes, build it on ``meta``, load it.

Layouts read: the original one with joined or with separate queries, keys and values, ComfyUI's names (with its prefix
or without), and Diffusers' (a file, shards, or a model folder).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.checkpoints import open_checkpoint
from library.errors import UserError
from library.models.hunyuan_image.transformer import HunyuanImageConfig, HunyuanImageTransformer
from library.models.loading import Origin, TensorSource, on_meta, origins_of_modules
from library.models.pipeline import OpenedPart
from library.models.recognition import TRANSFORMER_PREFIXES, refuse_unless

LAST_MODULATION = "final_layer.adaLN_modulation.1"


@dataclass(frozen=True)
class TransformerFile(OpenedPart[HunyuanImageTransformer]):
    """An opened transformer checkpoint, ready to be loaded."""

    source: TensorSource
    config: HunyuanImageConfig

    def meta_module(self) -> HunyuanImageTransformer:
        """The module on torch's meta device: its structure without its values."""
        with on_meta():
            return HunyuanImageTransformer(self.config)


def open_transformer(path: Path | str, disable_mmap: bool = False, option: str = "") -> TransformerFile:
    """Open ``path`` (a file, one of its shards, a Diffusers folder) by its headers only.

    Raises UserError, naming ``option`` and what the file is, when it isn't the transformer of HunyuanImage-2.1's base
    version.
    """
    checkpoint = open_checkpoint(path, "transformer", disable_mmap, option)
    kinds = {"hunyuan-image", "hunyuan-image-diffusers"}
    kind = refuse_unless(checkpoint, kinds, "the transformer of HunyuanImage-2.1's base version")
    source = TensorSource(checkpoint, TRANSFORMER_PREFIXES)
    if kind.name == "hunyuan-image-diffusers":
        source.remap(origins_of_modules(source, DIFFUSERS.modules_in(source), swapped=(LAST_MODULATION,)))
    else:
        source.remap(comfyui_origins(source))
        source.remap(origins_of_modules(source, SEPARATE.modules_in(source)))
    return TransformerFile(source, infer_config(source))


def infer_config(source: TensorSource) -> HunyuanImageConfig:
    """Sizes from the shapes of tensors in the original layout. Raises UserError when they contradict each other.

    The position axes have equal shares of a head and the base 256, unless the file's ``config`` says otherwise.
    """
    hidden, in_channels, patch, patch_width = source.sizes("img_in.proj.weight", 4)
    head_dim = source.sizes("double_blocks.0.img_attn_q_norm.weight", 1)[0]
    glyph_hidden, glyph_dim = source.sizes("byt5_in.fc1.weight", 2)
    exceptions = source.exceptions
    axes = exceptions.get("rope_axes_dim", (head_dim // 2,) * 2)
    try:
        if patch != patch_width:
            raise ValueError(f"the patches of {patch_width} x {patch} are not square")
        return HunyuanImageConfig(
            hidden_size=hidden,
            num_heads=hidden // head_dim,
            depth=source.count(r"double_blocks\.(\d+)\."),
            depth_single=source.count(r"single_blocks\.(\d+)\."),
            refiner_depth=source.count(r"txt_in\.individual_token_refiner\.blocks\.(\d+)\."),
            mlp_hidden=source.sizes("double_blocks.0.img_mlp.fc1.weight", 2)[0],
            single_mlp_hidden=source.sizes("single_blocks.0.linear1.weight", 2)[0] - 3 * hidden,
            refiner_mlp_hidden=source.sizes("txt_in.individual_token_refiner.blocks.0.mlp.fc1.weight", 2)[0],
            in_channels=in_channels,
            out_channels=source.sizes("final_layer.linear.weight", 2)[0] // patch**2,
            patch_size=patch,
            text_dim=source.sizes("txt_in.input_embedder.weight", 2)[1],
            glyph_dim=glyph_dim,
            glyph_hidden=glyph_hidden,
            frequency_dim=source.sizes("time_in.mlp.0.weight", 2)[1],
            axes_dims=tuple(axes),
            theta=float(exceptions.get("rope_theta", 256.0)),
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"{source.checkpoint.label} has sizes that don't fit together: {error}.") from None


# ComfyUI replaces parts of the original names; this is the way back.
COMFYUI_NAMES = (
    (re.compile(r"^(time_in|txt_in\.t_embedder)\.in_layer\."), r"\1.mlp.0."),
    (re.compile(r"^(time_in|txt_in\.t_embedder)\.out_layer\."), r"\1.mlp.2."),
    (re.compile(r"^txt_in\.c_embedder\.in_layer\."), "txt_in.c_embedder.linear_1."),
    (re.compile(r"^txt_in\.c_embedder\.out_layer\."), "txt_in.c_embedder.linear_2."),
    (re.compile(r"(_mod|\.modulation)\.lin\."), r"\1.linear."),
    (re.compile(r"_attn\.(qkv|proj)\."), r"_attn_\1."),
    (re.compile(r"_attn\.norm\.([qk])(uery|ey)_norm\.(scale|weight)$"), r"_attn_\1_norm.weight"),
    (re.compile(r"\.norm\.([qk])(uery|ey)_norm\.(scale|weight)$"), r".\1_norm.weight"),
    (re.compile(r"(blocks\.\d+\.(?:\w+_)?mlp)\.0\."), r"\1.fc1."),
    (re.compile(r"(blocks\.\d+\.(?:\w+_)?mlp)\.2\."), r"\1.fc2."),
)


def comfyui_origins(source: TensorSource) -> dict[str, Origin]:
    """The tensors that have ComfyUI's names, under the original ones."""
    origins = {}
    for key in source.names():
        name = key
        for pattern, ours in COMFYUI_NAMES:
            name = pattern.sub(ours, name)
        if name != key and name not in source:
            origins[name] = Origin((key,))
    return origins


# The names of modules in other layouts; a module may be several there, row by row.
Table = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Layout:
    """The names of modules in a layout, keyed by ours: around the lists of blocks, and in a block of each list."""

    outer: Table
    double: Table
    single: Table
    refiner: Table
    lists: tuple[str, str, str]
    """Names of the lists of double blocks, single blocks and the refiner's blocks."""

    def modules(self, counts: Sequence[int]) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each module and its names in the layout; ``counts`` are the numbers of blocks in each list."""
        yield from self.outer.items()
        tables = (self.double, self.single, self.refiner)
        for ours, theirs, count, table in zip(BLOCK_LISTS, self.lists, counts, tables):
            for index in range(count):
                for name, parts in table.items():
                    yield f"{ours}.{index}.{name}", tuple(f"{theirs}.{index}.{part}" for part in parts)

    def modules_in(self, source: TensorSource) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The same for a file of the layout."""
        return self.modules([source.count(rf"{re.escape(name)}\.(\d+)\.") for name in self.lists])


BLOCK_LISTS = ("double_blocks", "single_blocks", "txt_in.individual_token_refiner.blocks")
SEPARATE = Layout(
    outer={},
    double={f"{stream}_attn_qkv": tuple(f"{stream}_attn_{part}" for part in "qkv") for stream in ("img", "txt")},
    single={"linear1": ("linear1_q", "linear1_k", "linear1_v", "linear1_mlp"), "linear2": ("linear2.fc",)},
    refiner={},
    lists=BLOCK_LISTS,
)
DIFFUSERS = Layout(
    outer={
        "img_in.proj": ("x_embedder.proj",),
        "time_in.mlp.0": ("time_guidance_embed.timestep_embedder.linear_1",),
        "time_in.mlp.2": ("time_guidance_embed.timestep_embedder.linear_2",),
        "txt_in.input_embedder": ("context_embedder.proj_in",),
        "txt_in.t_embedder.mlp.0": ("context_embedder.time_text_embed.timestep_embedder.linear_1",),
        "txt_in.t_embedder.mlp.2": ("context_embedder.time_text_embed.timestep_embedder.linear_2",),
        "txt_in.c_embedder.linear_1": ("context_embedder.time_text_embed.text_embedder.linear_1",),
        "txt_in.c_embedder.linear_2": ("context_embedder.time_text_embed.text_embedder.linear_2",),
        "byt5_in.layernorm": ("context_embedder_2.norm",),
        "byt5_in.fc1": ("context_embedder_2.linear_1",),
        "byt5_in.fc2": ("context_embedder_2.linear_2",),
        "byt5_in.fc3": ("context_embedder_2.linear_3",),
        "final_layer.linear": ("proj_out",),
        LAST_MODULATION: ("norm_out.linear",),
    },
    double={
        "img_mod.linear": ("norm1.linear",),
        "txt_mod.linear": ("norm1_context.linear",),
        "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "img_attn_q_norm": ("attn.norm_q",),
        "img_attn_k_norm": ("attn.norm_k",),
        "txt_attn_q_norm": ("attn.norm_added_q",),
        "txt_attn_k_norm": ("attn.norm_added_k",),
        "img_attn_proj": ("attn.to_out.0",),
        "txt_attn_proj": ("attn.to_add_out",),
        "img_mlp.fc1": ("ff.net.0.proj",),
        "img_mlp.fc2": ("ff.net.2",),
        "txt_mlp.fc1": ("ff_context.net.0.proj",),
        "txt_mlp.fc2": ("ff_context.net.2",),
    },
    single={
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "linear2": ("proj_out",),
        "q_norm": ("attn.norm_q",),
        "k_norm": ("attn.norm_k",),
        "modulation.linear": ("norm.linear",),
    },
    refiner={
        "norm1": ("norm1",),
        "norm2": ("norm2",),
        "self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "self_attn_proj": ("attn.to_out.0",),
        "mlp.fc1": ("ff.net.0.proj",),
        "mlp.fc2": ("ff.net.2",),
        "adaLN_modulation.1": ("norm_out.linear",),
    },
    lists=(
        "transformer_blocks",
        "single_transformer_blocks",
        "context_embedder.token_refiner.refiner_blocks",
    ),
)
