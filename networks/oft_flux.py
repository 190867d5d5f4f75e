"""OFT for FLUX.1 and Chroma: orthogonal matrices that turn the outputs of the blocks' layers (see ``oft_core``).

Files are those of kohya-ss/sd-scripts' ``networks.oft_flux``: ``oft_unet_double_blocks_0_img_attn_qkv`` and so on, with
a tensor for each part of a joined layer: ``oft_blocks.0`` to ``.2`` for q, k, v, ``.3`` for the feed-forward part of
``linear1``; other layers have ``oft_blocks.0`` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from networks.adapters.lora_arguments import parse_arguments
from networks.adapters.lora_creation import TextEncoders
from networks.adapters.lora_targets import Target, find_targets
from networks.adapters.oft_core import (
    OFT_ARGUMENTS,
    OFTNetwork,
    build_network,
    build_network_from_weights,
    parse_oft_arguments,
)
from networks.lora_flux import FLUX, TRANSFORMER, joined_rows

MODULE = "networks.oft_flux"
TRAINS_TEXT_ENCODERS = False

ALL_LINEAR = replace(TRANSFORMER, prefix="oft_unet")
ATTENTION = replace(ALL_LINEAR, classes=("SelfAttention",))
FAMILY = replace(FLUX, module=MODULE, transformer=ALL_LINEAR, arguments=OFT_ARGUMENTS)


def part_rows(target: Target) -> Sequence[int]:
    """Outputs of q, k, v (and mlp) in the layers that hold them together, else of the layer."""
    assert isinstance(target.module, nn.Linear)
    return joined_rows(target) or [target.module.out_features]


def check_network_args(network_args: Mapping[str, str]) -> None:
    """Refuse wrong arguments before a model is loaded. Raises UserError."""
    parse_arguments(network_args, OFT_ARGUMENTS, MODULE)


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
    """A new network for the attention projections of the double blocks, or with ``enable_all_linear`` for every layer
    of all blocks.

    ``network_dim``: blocks in each part of a layer (None: 4); ``network_alpha``: the constraint (None: 0.001). Raises
    UserError for a wrong argument, a constraint of 0 or less, and a number of blocks that outputs cannot share.
    """
    arguments = parse_oft_arguments(network_args, OFT_ARGUMENTS, MODULE, neuron_dropout)
    targets = find_targets(unet, ALL_LINEAR if arguments["enable_all_linear"] else ATTENTION)
    return build_network(FAMILY, arguments, targets, multiplier, network_dim, network_alpha, part_rows)


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
    arguments = parse_oft_arguments(network_args, OFT_ARGUMENTS, MODULE, neuron_dropout)
    targets = find_targets(unet, ALL_LINEAR)
    return build_network_from_weights(
        FAMILY, arguments, targets, multiplier, file, weights_sd, for_inference, part_rows
    )
