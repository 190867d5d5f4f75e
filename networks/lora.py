"""LoRA for Stable Diffusion 1.x, 2.x and XL: which modules, which arguments, which names other programs use.

Files are those of kohya-ss/sd-scripts' ``networks.lora``. The U-Net's modules have diffusers' paths in 1.x and 2.x
(``lora_unet_down_blocks_0_attentions_0_proj_in``) and those of the original code in XL
(``lora_unet_input_blocks_4_1_proj_in``). A single text encoder is ``lora_te``, XL's are ``lora_te1`` and ``lora_te2``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from library.errors import UserError
from library.models.stable_diffusion.keys import inverted, renamed, unet_table
from library.models.stable_diffusion.original_names import under_original_names
from networks.adapters.lora_arguments import unavailable
from networks.adapters.lora_blocks import BLOCK_ARGUMENTS, BLOCK_LEARNING_ARGUMENTS, SD_BLOCKS, SDXL_BLOCKS, BlockLayout
from networks.adapters.lora_core import LoRANetwork
from networks.adapters.lora_kind import LoRAKind
from networks.adapters.lora_module import LoRAModule
from networks.adapters.lora_targets import Rules, Target, TargetTable, flat_names, path_from

UNET = TargetTable(
    "lora_unet",
    "unet",
    ("Transformer2DModel",),
    conv_classes=("ResnetBlock2D", "Downsample2D", "Upsample2D"),
)


def text_encoder_table(prefix: str, group: str) -> TargetTable:
    """The targets of a CLIP text encoder under the names that begin with ``prefix``."""
    return TargetTable(
        prefix,
        group,
        ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"),
        file_path=path_from("layers.", "text_model.encoder."),
        is_text_encoder=True,
    )


TEXT_ENCODER = text_encoder_table("lora_te", "textencoder")
TEXT_ENCODER_1 = text_encoder_table("lora_te1", "textencoder 1")
TEXT_ENCODER_2 = text_encoder_table("lora_te2", "textencoder 2")

# Paths in the original U-Net -> diffusers' paths; told are the levels with transformers, the finest first.
SD_PATHS = unet_table(2, (True, True, True, False))
SDXL_PATHS = unet_table(2, (False, True, True))
SD_ORIGINAL_PATHS = inverted(SD_PATHS)
# Diffusers' training scripts once gave the layers of attention processors names of their own.
OLD_ENCODER_NAMES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def other_names(target: Target) -> Iterable[tuple[str, None]]:
    """What diffusers, PEFT, ComfyUI, OneTrainer and LyCORIS call a module, and how other layouts of its U-Net would."""
    for name in _encoder_names(target) if target.table.is_text_encoder else _unet_names(target.path):
        yield name, None


def _unet_names(path: str) -> Iterable[str]:
    diffusers = renamed(path, SDXL_PATHS)
    original = path if diffusers is not None else renamed(path, SD_ORIGINAL_PATHS)
    diffusers = path if diffusers is None else diffusers
    attention, found, layer = diffusers.rpartition(".to_")
    for name in (diffusers, original):
        if name is not None:
            yield from (name, f"unet.{name}", f"diffusion_model.{name}", *flat_names(name, ("lora_unet", "lycoris")))
    if found:
        old = f"{attention}.processor.to_{layer.removesuffix('.0')}"
        yield from (old, f"unet.{old}")


def _encoder_names(target: Target) -> Iterable[str]:
    path, is_second = target.path, target.table is TEXT_ENCODER_2
    block, _, layer = path.rpartition(".")
    for name in (path, path.removeprefix("text_model."), f"{block}.{OLD_ENCODER_NAMES.get(layer, layer)}"):
        yield f"text_encoder{'_2' if is_second else ''}.{name}"
    clip = f"clip_{'g' if is_second else 'l'}"
    yield from (f"text_encoders.{clip}.transformer.{path}", f"{clip}.{path}")
    if target.table is TEXT_ENCODER:
        yield f"text_encoders.clip_h.transformer.{path}"
        yield f"lora_te1_{path}".replace(".", "_")


def _rules(text_encoders: tuple[TargetTable, ...], blocks: BlockLayout, outer: tuple[str, ...]) -> Rules:
    """Stable Diffusion's rules for a U-Net with ``blocks``; ``outer`` are paths of its layers outside of them."""
    return Rules(
        transformer=UNET,
        text_encoders=text_encoders,
        check=blocks.check,
        with_conv=blocks.with_conv,
        rank=blocks.rank,
        alpha=blocks.alpha,
        selected=blocks.selected,
        group=blocks.group,
        known_extra_layers=outer,
        aliases=other_names,
        model_name="U-Net",
    )


SD = _rules((TEXT_ENCODER,), SD_BLOCKS, ("conv_in", "time_embedding", "conv_out"))
SDXL = _rules((TEXT_ENCODER_1, TEXT_ENCODER_2), SDXL_BLOCKS, ("time_embed", "label_emb", "input_blocks.0", "out"))


def rules_of(unet: nn.Module, text_encoders: Sequence[nn.Module | None]) -> tuple[Rules, nn.Module]:
    """The rules for diffusers' UNet2DConditionModel (or its ``under_original_names``), and the tree that has its names.

    XL's is recognised by its embedding of sizes; one of diffusers is shown under the original names. Raises UserError
    when there are more text encoders than such a model has.
    """
    is_xl = hasattr(unet, "label_emb") or getattr(unet, "add_embedding", None) is not None
    rules, model = (SDXL, SDXL_BLOCKS.model) if is_xl else (SD, SD_BLOCKS.model)
    if len(text_encoders) > len(rules.text_encoders):
        raise UserError(f"{len(text_encoders)} text encoders were given, but {model} has {len(rules.text_encoders)}.")
    return rules, under_original_names(unet) if is_xl and hasattr(unet, "down_blocks") else unet


NETWORK = LoRAKind(
    "networks.lora",
    rules_of,
    {
        **BLOCK_ARGUMENTS,
        "split_qkv": unavailable("Query, key and value are separate layers in Stable Diffusion."),
    },
    BLOCK_LEARNING_ARGUMENTS,
    network_class=LoRANetwork,
    module_class=LoRAModule,
)
check_network_args = NETWORK.check_network_args
create_network = NETWORK.create_network
create_network_from_weights = NETWORK.create_network_from_weights
