"""LoRA for FLUX.1 and Chroma: which modules, which arguments, which names other programs use.

Files are those of kohya-ss/sd-scripts' ``networks.lora_flux``: ``lora_unet_double_blocks_0_img_attn_qkv`` and so on,
``lora_te1_`` for CLIP-L and ``lora_te3_`` for T5-XXL.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from library.checkpoints import open_checkpoint
from library.console import warn
from library.models.flux.checkpoint import DOUBLE, OUTER, SINGLE
from networks.adapters.lora_arguments import choice, flag, text, whole_number, whole_numbers
from networks.adapters.lora_core import LoRANetwork
from networks.adapters.lora_formats import plain_name
from networks.adapters.lora_kind import LoRAKind
from networks.adapters.lora_module import LoRAModule
from networks.adapters.lora_targets import (
    Arguments,
    BlockList,
    Part,
    Rules,
    Target,
    TargetTable,
    blocks_by_arguments,
    find_targets,
    flat_names,
    path_from,
    ranks_by_name,
)
from networks.adapters.network_kind import Models, same_rules

TRANSFORMER = TargetTable("lora_unet", "unet", ("DoubleStreamBlock", "SingleStreamBlock"))
CLIP_L = TargetTable(
    "lora_te1",
    "textencoder 1",
    ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"),
    file_path=path_from("layers.", "text_model.encoder."),
    is_text_encoder=True,
)
T5XXL = TargetTable(
    "lora_te3",
    "textencoder 2",
    ("T5Attention", "T5DenseGatedActDense"),
    file_path=path_from("block.", "encoder."),
    is_text_encoder=True,
)

RANK_RULES = (
    ("img_attn_dim", ("img_attn",)),
    ("txt_attn_dim", ("txt_attn",)),
    ("img_mlp_dim", ("img_mlp",)),
    ("txt_mlp_dim", ("txt_mlp",)),
    ("img_mod_dim", ("img_mod",)),
    ("txt_mod_dim", ("txt_mod",)),
    ("single_dim", ("single_blocks", "linear")),
    ("single_mod_dim", ("modulation",)),
)
LAST_MODULATION = "final_layer.adaLN_modulation.1"  # diffusers keeps the halves of its rows in another order
IN_LAYERS = ("img_in", "time_in", "vector_in", "guidance_in", "txt_in")
T5_NAMES = (
    *("lora_te3_", *(f"lora_te{number}_encoder_block_" for number in ("", 1, 2))),
    *("text_encoder_2.", "text_encoders.t5xxl.", "t5."),
)
BLOCK_LISTS = (
    BlockList("double_blocks", ("double",), "train_double_block_indices"),
    BlockList("single_blocks", ("single",), "train_single_block_indices"),
)


def joined_rows(target: Target) -> list[int] | None:
    """Rows of q, k, v (and mlp) in the modules that hold them together."""
    if not target.path.endswith((".img_attn.qkv", ".txt_attn.qkv", ".linear1")):
        return None
    assert isinstance(target.module, nn.Linear)
    hidden = target.module.in_features
    rest = target.module.out_features - 3 * hidden
    return [hidden] * 3 + ([rest] if rest else [])


def rank_of_in_layers(arguments: Arguments) -> Mapping[str, int]:
    """Ranks of the input layers that ``in_dims`` names, by path."""
    return dict(zip(IN_LAYERS, arguments["in_dims"] or []))


def warn_of_missing_layers(arguments: Arguments, transformer: nn.Module) -> None:
    """Name the ranks for layers that this model lacks: schnell has no guidance, Chroma neither it nor modulations."""
    names = [target.name for target in find_targets(transformer, TRANSFORMER)]
    idle = [
        argument
        for argument, parts in RANK_RULES
        if arguments[argument] and not any(all(part in name for part in parts) for name in names)
    ]
    lacking = [
        layer for layer, rank in rank_of_in_layers(arguments).items() if rank and not hasattr(transformer, layer)
    ]
    if names and (idle or lacking):
        idle += [f"in_dims for {', '.join(lacking)}"] if lacking else []
        warn(f"--network_args: this model has no such layers, so there is no effect of {'; '.join(idle)}")


def other_names(target: Target) -> Iterable[tuple[str, Part]]:
    """What diffusers, PEFT, AI-toolkit, ComfyUI, OneTrainer, LyCORIS, XLabs call a module or parts of a joined one."""
    path = target.path
    if target.table is CLIP_L:
        yield from ((f"text_encoders.clip_l.transformer.{path}", None), (f"clip_l.{path}", None))
        for inner in (path, path.removeprefix("text_model.")):  # transformers 5 has no text_model
            yield f"text_encoder.{inner}", None
            yield "text_encoder." + re.sub(r"self_attn\.(q|k|v|out)_proj", r"self_attn.to_\1", inner), None
    elif target.table is T5XXL:
        for model in ("text_encoder_2.", "text_encoders.t5xxl.transformer.", "t5."):
            yield f"{model}{path}", None
        # Where T5 is the only text encoder, as for Chroma, OneTrainer gives it no number and ComfyUI a 1.
        yield from ((f"{prefix}_{path}".replace(".", "_"), None) for prefix in ("lora_te2", "lora_te", "lora_te1"))
    else:
        for name in (path, f"diffusion_model.{path}", f"transformer.{path}"):
            yield name, None
        yield from ((name, None) for name in flat_names(path, ("lycoris",)))
        yield from _xlabs_names(path)
        parts = diffusers_paths(path)
        if path == "img_in":
            yield "transformer.img_in.proj", None
        yield from ((f"transformer.{path}.{index}", index) for index in range(len(parts)) if len(parts) > 1)
        for index, part in enumerate(parts):
            number: Part = "swapped" if path == LAST_MODULATION else index if len(parts) > 1 else None
            yield from ((f"{model}{part}", number) for model in ("", "transformer.", "diffusion_model."))
            for name in flat_names(part, ("lora_transformer", "lora_unet", "lycoris")):
                yield name, number


def diffusers_paths(path: str) -> tuple[str, ...]:
    """What diffusers calls a layer of the original transformer, or the parts of a joined one."""
    if path in OUTER:
        return (OUTER[path],)
    blocks, number, module = path.split(".", 2)
    names, prefix = (DOUBLE, "") if blocks == "double_blocks" else (SINGLE, "single_")
    return tuple(f"{prefix}transformer_blocks.{number}.{part}" for part in names.get(module, ()))


def _xlabs_names(path: str) -> Iterable[tuple[str, Part]]:
    """XLabs numbers the streams: 1 is the image's, 2 the text's. Of linear1 it trains q, k and v as one."""
    match = re.fullmatch(r"(double_blocks\.\d+)\.(img|txt)_attn\.(qkv|proj)", path)
    if match:
        yield f"{match[1]}.processor.{match[3]}_lora{1 if match[2] == 'img' else 2}", None
    match = re.fullmatch(r"(single_blocks\.\d+)\.linear([12])", path)
    if match:  # here "_lora" reads as the beginning of "_lora.down"
        yield (f"{match[1]}.processor.qkv", 0) if match[2] == "1" else (f"{match[1]}.processor.proj", None)


FLUX = Rules(
    transformer=TRANSFORMER,
    text_encoders=(CLIP_L, T5XXL),
    check=warn_of_missing_layers,
    rank=ranks_by_name(RANK_RULES),
    selected=blocks_by_arguments(BLOCK_LISTS),
    extra_layers=rank_of_in_layers,
    known_extra_layers=(*IN_LAYERS, "final_layer"),
    text_encoder_is_trained=lambda index, arguments: index == 0 or bool(arguments["train_t5xxl"]),
    split=joined_rows,
    aliases=other_names,
)


def holds_t5xxl(file: str | Path) -> bool:
    """Whether a LoRA file has modules of T5-XXL. Raises UserError when it cannot be opened."""
    return any(plain_name(key).startswith(T5_NAMES) for key in open_checkpoint(file).keys())  # noqa: SIM118


class FluxLoRANetwork(LoRANetwork):
    """A LoRA network whose ``train_t5xxl`` says whether T5-XXL is trained."""

    @property
    def train_t5xxl(self) -> bool:
        """Whether the network has modules of T5-XXL."""
        return any(lora.target.table is T5XXL for lora in self.text_encoder_loras)


@dataclass(frozen=True)
class FluxLoRAKind(LoRAKind):
    """LoRA for a FLUX.1 or Chroma transformer and its text encoders [CLIP-L, T5-XXL], either may be None."""

    def new_network(
        self, models: Models, arguments: Arguments, network_dim: int | None, network_alpha: float | None
    ) -> LoRANetwork:
        network = super().new_network(models, arguments, network_dim, network_alpha)
        if arguments["train_t5xxl"] and not network.train_t5xxl:
            warn("--network_args: train_t5xxl has no effect, because T5-XXL is not trained in this run")
        return network


NETWORK = FluxLoRAKind(
    "networks.lora_flux",
    same_rules(FLUX),
    {
        **{argument: whole_number for argument, _ in RANK_RULES},
        "in_dims": whole_numbers(len(IN_LAYERS), ", ".join(IN_LAYERS)),
        "train_double_block_indices": text,
        "train_single_block_indices": text,
        "train_blocks": choice("all", "single", "double"),
        "train_t5xxl": flag,
    },
    network_class=FluxLoRANetwork,
    module_class=LoRAModule,
)
check_network_args = NETWORK.check_network_args
create_network = NETWORK.create_network
create_network_from_weights = NETWORK.create_network_from_weights
