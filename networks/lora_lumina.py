"""LoRA for Lumina Image 2.0: which modules, which arguments, which names other programs use.

Files are those of kohya-ss/sd-scripts' ``networks.lora_lumina``: ``lora_unet_layers_0_attention_qkv`` and so on, and
``lora_te_layers_0_self_attn_q_proj`` for Gemma 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from library.models.lumina.checkpoint import BLOCK_LISTS, OUTER
from networks.adapters.lora_arguments import choice, text, whole_number, whole_numbers
from networks.adapters.lora_core import LoRANetwork
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
    flat_names,
    path_from,
    ranks_by_name,
)
from networks.adapters.network_kind import same_rules

TRANSFORMER = TargetTable("lora_unet", "unet", ("JointTransformerBlock", "FinalLayer"))
GEMMA_2 = TargetTable(
    "lora_te",
    "textencoder",
    ("Gemma2Attention", "Gemma2MLP"),
    file_path=path_from("layers.", ""),
    is_text_encoder=True,
)

RANK_RULES = (
    ("attn_dim", ("attention",)),
    ("mlp_dim", ("feed_forward",)),
    ("mlp_dim", ("mlp",)),
    ("mod_dim", ("modulation",)),
    ("refiner_dim", ("refiner",)),
)
EMBEDDERS = ("x_embedder", "t_embedder", "cap_embedder")
CHOICES = (
    BlockList("layers", ("transformer",), "train_transformer_block_indices"),
    BlockList("noise_refiner", ("refiners", "noise_refiner")),
    BlockList("context_refiner", ("refiners", "context_refiner")),
)


def joined_rows(target: Target) -> list[int] | None:
    """Rows of q, k and v in the modules that hold them together; q has as many as the module has inputs."""
    if not target.path.endswith(".attention.qkv"):
        return None
    assert isinstance(target.module, nn.Linear)
    query = target.module.in_features
    return [query, *[(target.module.out_features - query) // 2] * 2]


def rank_of_embedders(arguments: Arguments) -> Mapping[str, int]:
    """Ranks of the layers that ``embedder_dims`` names, by path."""
    return dict(zip(EMBEDDERS, arguments["embedder_dims"] or []))


def other_names(target: Target) -> Iterable[tuple[str, Part]]:
    """What diffusers, PEFT, ComfyUI and LyCORIS call a module, or the parts of a joined one."""
    path = target.path
    if target.table is GEMMA_2:
        yield f"text_encoders.gemma2_2b.transformer.model.{path}", None
        yield f"lora_te1_{path}".replace(".", "_"), None
        yield from ((f"text_encoder.{model}{path}", None) for model in ("", "model."))
        return
    for name in (path, f"diffusion_model.{path}", f"transformer.{path}", *flat_names(path, ("lycoris",))):
        yield name, None
    parts = diffusers_paths(path)
    for index, part in enumerate(parts):
        number: Part = index if len(parts) > 1 else None
        yield from ((f"{model}{part}", number) for model in ("", "transformer.", "diffusion_model."))
        yield from ((name, number) for name in flat_names(part, ("lora_unet", "lycoris")))


def diffusers_paths(path: str) -> tuple[str, ...]:
    """What diffusers calls a layer of the original transformer, or the parts of a joined one."""
    if path in OUTER:
        return (OUTER[path],)
    blocks, number, module = path.split(".", 2)
    return tuple(f"{blocks}.{number}.{part}" for part in BLOCK_LISTS[blocks].get(module, ()))


LUMINA = Rules(
    transformer=TRANSFORMER,
    text_encoders=(GEMMA_2,),
    rank=ranks_by_name(RANK_RULES),
    selected=blocks_by_arguments(CHOICES),
    extra_layers=rank_of_embedders,
    known_extra_layers=EMBEDDERS,
    split=joined_rows,
    aliases=other_names,
)
NETWORK = LoRAKind(
    "networks.lora_lumina",
    same_rules(LUMINA),
    {
        **{argument: whole_number for argument, _ in RANK_RULES},
        "embedder_dims": whole_numbers(len(EMBEDDERS), ", ".join(EMBEDDERS)),
        "train_blocks": choice("all", "transformer", "refiners", "noise_refiner", "context_refiner"),
        "train_transformer_block_indices": text,
    },
    network_class=LoRANetwork,
    module_class=LoRAModule,
)
check_network_args = NETWORK.check_network_args
create_network = NETWORK.create_network
create_network_from_weights = NETWORK.create_network_from_weights
