"""OFT for Stable Diffusion: orthogonal matrices that turn the outputs of the U-Net's layers (see ``oft_core``).

Files are those of kohya-ss/sd-scripts' ``networks.oft``: one tensor ``oft_blocks`` for each layer. Trained are the
attention layers, or those that the arguments add.
"""

from __future__ import annotations

from dataclasses import replace

from networks.adapters.lora_arguments import flag
from networks.adapters.oft_core import OFT_ARGUMENTS, OFTKind
from networks.lora import UNET, rules_of

TRAINS_TEXT_ENCODERS = False

ALL_LINEAR = replace(UNET, prefix="oft_unet")
ATTENTION = replace(ALL_LINEAR, classes=("Attention",))

NETWORK = OFTKind(
    module="networks.oft",
    fit=rules_of,
    arguments={**OFT_ARGUMENTS, "enable_conv": flag},
    all_linear=ALL_LINEAR,
    attention=ATTENTION,
)
check_network_args = NETWORK.check_network_args
create_network = NETWORK.create_network
create_network_from_weights = NETWORK.create_network_from_weights
