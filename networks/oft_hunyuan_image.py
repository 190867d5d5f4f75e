"""OFT for HunyuanImage-2.1: orthogonal matrices that turn the outputs of the blocks' layers (see ``oft_core``).

Names are ``oft_unet_double_blocks_0_img_attn_qkv`` and so on, with a tensor for each part of a joined layer:
``oft_blocks.0`` to ``.2`` for q, k, v, ``.3`` for the feed-forward part of ``linear1``; other layers have
``oft_blocks.0`` alone. Trained are the attention projections of the double blocks, or with ``enable_all_linear`` every
layer that ``networks.lora_hunyuan_image`` trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from networks.adapters.lora_targets import Target
from networks.adapters.network_kind import same_rules
from networks.adapters.oft_core import OFT_ARGUMENTS, OFTKind
from networks.lora_hunyuan_image import HUNYUAN_IMAGE, TRANSFORMER, joined_rows

TRAINS_TEXT_ENCODERS = False

ALL_LINEAR = replace(TRANSFORMER, prefix="oft_unet")
ATTENTION = replace(ALL_LINEAR, ends=("_attn_qkv", "_attn_proj"))


def part_rows(target: Target) -> Sequence[int]:
    """Outputs of q, k, v (and mlp) in the layers that hold them together, else of the layer."""
    assert isinstance(target.module, nn.Linear)
    return joined_rows(target) or [target.module.out_features]


NETWORK = OFTKind(
    module="networks.oft_hunyuan_image",
    fit=same_rules(HUNYUAN_IMAGE),
    arguments=OFT_ARGUMENTS,
    all_linear=ALL_LINEAR,
    attention=ATTENTION,
    part_rows=part_rows,
)
check_network_args = NETWORK.check_network_args
create_network = NETWORK.create_network
create_network_from_weights = NETWORK.create_network_from_weights
