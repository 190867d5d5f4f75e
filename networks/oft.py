"""OFT for Stable Diffusion: orthogonal matrices that turn the outputs of the U-Net's layers (see ``oft_core``).

Files are those of kohya-ss/sd-scripts' ``networks.oft``: one tensor ``oft_blocks`` for each layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from networks.adapters.lora_arguments import flag, parse_arguments
from networks.adapters.lora_creation import TextEncoders
from networks.adapters.lora_targets import find_targets
from networks.adapters.oft_core import (
    OFT_ARGUMENTS,
    OFTNetwork,
    build_network,
    build_network_from_weights,
    parse_oft_arguments,
)
from networks.lora import UNET, family_of

MODULE = "networks.oft"
TRAINS_TEXT_ENCODERS = False

ATTENTION = replace(UNET, prefix="oft_unet", classes=("Attention",))
ALL_LINEAR = replace(UNET, prefix="oft_unet")
ARGUMENTS = {**OFT_ARGUMENTS, "enable_conv": flag}


def check_network_args(network_args: Mapping[str, str]) -> None:
    """Refuse wrong arguments before a model is loaded. Raises UserError."""
    parse_arguments(network_args, ARGUMENTS, MODULE)


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: TextEncoders,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> OFTNetwork:
    """A new network for a Stable Diffusion U-Net: its attention layers, or those that the arguments add.

    ``network_dim``: blocks in each layer (None: 4); ``network_alpha``: the constraint (None: 0.001). Raises UserError
    for a wrong argument, a constraint of 0 or less, and a number of blocks that a layer's outputs cannot share.
    """
    arguments = parse_oft_arguments(network_args, ARGUMENTS, MODULE, neuron_dropout)
    table = ALL_LINEAR if arguments["enable_all_linear"] else ATTENTION
    rules, tree = family_of(unet, text_encoder, MODULE)
    targets = find_targets(tree, table, with_conv=bool(arguments["enable_conv"]))
    family = replace(rules, module=MODULE)
    return build_network(family, arguments, targets, multiplier, network_dim, network_alpha)


def create_network_from_weights(
    multiplier: float,
    file: str | Path | None,
    vae: Any,
    text_encoder: TextEncoders,
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> tuple[OFTNetwork, dict[str, Tensor]]:
    """The network that a file (or its tensors ``weights_sd``) holds. Raises UserError when nothing in it fits."""
    arguments = parse_oft_arguments(network_args, ARGUMENTS, MODULE, neuron_dropout)
    rules, tree = family_of(unet, text_encoder, MODULE)
    targets = find_targets(tree, ALL_LINEAR, with_conv=True)
    family = replace(rules, module=MODULE)
    return build_network_from_weights(family, arguments, targets, multiplier, file, weights_sd, for_inference)
