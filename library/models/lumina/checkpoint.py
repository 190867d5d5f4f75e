"""Open a Lumina Image 2.0 transformer file: recognise its layout, infer its sizes, build it on ``meta``, load it.

Layouts read: the original one, the same with ComfyUI's prefix (alone or beside the model's other parts, as Neta Lumina
is published), and Diffusers' (a file, shards, or a model folder).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from library.checkpoints import open_checkpoint
from library.errors import UserError
from library.models.loading import TensorSource, on_meta, origins_of_modules
from library.models.lumina.transformer import LuminaConfig, LuminaTransformer
from library.models.pipeline import OpenedPart
from library.models.recognition import TRANSFORMER_PREFIXES, refuse_unless

UNUSED = ("norm_final.weight",)
"""In the original files, but in no computation."""


@dataclass(frozen=True)
class TransformerFile(OpenedPart[LuminaTransformer]):
    """An opened transformer checkpoint, ready to be loaded."""

    source: TensorSource
    config: LuminaConfig

    def meta_module(self) -> LuminaTransformer:
        """The module on torch's meta device: its structure without its values."""
        with on_meta():
            return LuminaTransformer(self.config)


def open_transformer(path: Path | str, disable_mmap: bool = False, option: str = "") -> TransformerFile:
    """Open ``path`` (a file, one of its shards, a Diffusers folder) by its headers only.

    Raises UserError, naming ``option`` and what the file is, when it isn't a Lumina Image 2.0 transformer.
    """
    checkpoint = open_checkpoint(path, "transformer", disable_mmap, option)
    kind = refuse_unless(checkpoint, {"lumina", "lumina-diffusers"}, "a Lumina Image 2.0 transformer")
    source = TensorSource(checkpoint, TRANSFORMER_PREFIXES)
    if kind.name == "lumina-diffusers":
        counts = {blocks: source.count(rf"{blocks}\.(\d+)\.") for blocks in BLOCK_LISTS}
        source.remap(origins_of_modules(source, diffusers_modules(counts)))
    source.drop(UNUSED)
    return TransformerFile(source, infer_config(source))


def infer_config(source: TensorSource) -> LuminaConfig:
    """Sizes from the shapes of tensors in the original layout. Raises UserError when they contradict each other.

    The position axes have equal shares of a head, unless the file's ``config`` says otherwise.
    """
    dim, patch = source.sizes("x_embedder.weight", 2)
    head_dim = source.sizes("layers.0.attention.q_norm.weight", 1)[0]
    heads = source.sizes("layers.0.attention.out.weight", 2)[1] // head_dim
    time_dim, frequency_dim = source.sizes("t_embedder.mlp.0.weight", 2)
    exceptions = source.exceptions
    axes = exceptions.get("axes_dims", exceptions.get("axes_dim_rope", (head_dim // 3,) * 3))
    try:
        return LuminaConfig(
            dim=dim,
            heads=heads,
            kv_heads=(source.sizes("layers.0.attention.qkv.weight", 2)[0] // head_dim - heads) // 2,
            head_dim=head_dim,
            layers=source.count(r"layers\.(\d+)\."),
            refiner_layers=source.count(r"noise_refiner\.(\d+)\."),
            ffn_dim=source.sizes("layers.0.feed_forward.w1.weight", 2)[0],
            text_dim=source.sizes("cap_embedder.0.weight", 1)[0],
            time_dim=time_dim,
            frequency_dim=frequency_dim,
            latent_channels=patch // 4,
            axes_dims=tuple(axes),
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"{source.checkpoint.label} has sizes that don't fit together: {error}.") from None


# Diffusers' names of whole modules.
OUTER = {
    "x_embedder": "x_embedder",
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "cap_embedder.0": "time_caption_embed.caption_embedder.0",
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
}
BLOCK = {
    "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.out": ("attn.to_out.0",),
    "attention.q_norm": ("attn.norm_q",),
    "attention.k_norm": ("attn.norm_k",),
    "feed_forward.w1": ("feed_forward.linear_1",),
    "feed_forward.w2": ("feed_forward.linear_2",),
    "feed_forward.w3": ("feed_forward.linear_3",),
    "attention_norm1": ("norm1.norm",),
    "attention_norm2": ("norm2",),
    "ffn_norm1": ("ffn_norm1",),
    "ffn_norm2": ("ffn_norm2",),
    "adaLN_modulation.1": ("norm1.linear",),
}
UNMODULATED_BLOCK = {**BLOCK, "attention_norm1": ("norm1",)}
BLOCK_LISTS = {"noise_refiner": BLOCK, "context_refiner": UNMODULATED_BLOCK, "layers": BLOCK}


def diffusers_modules(counts: dict[str, int]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each module with tensors of its own, and the modules whose rows it is made of in the Diffusers layout.

    ``counts`` are the numbers of blocks in each list.
    """
    for name, part in OUTER.items():
        yield name, (part,)
    for blocks, modules in BLOCK_LISTS.items():
        for index in range(counts[blocks]):
            for name, parts in modules.items():
                yield f"{blocks}.{index}.{name}", tuple(f"{blocks}.{index}.{part}" for part in parts)
