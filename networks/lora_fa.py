"""LoRA-FA for Stable Diffusion: LoRA whose downs stay as they were drawn, so that only ups are trained.

Half the parameters, and the inputs of Linear layers need not be kept for the backward pass. Files, names and arguments
are those of ``networks.lora``. https://arxiv.org/abs/2308.03303
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from networks import lora
from networks.adapters.lora_core import LoRANetwork
from networks.adapters.lora_module import LoRAModule


class LoRAFANetwork(LoRANetwork):
    """A LoRA network that trains no down."""

    def trained_parts(self, lora: LoRAModule) -> list[tuple[nn.Module, bool]]:
        """The up alone."""
        return [(lora.lora_up, True)]


NETWORK = replace(lora.NETWORK, module="networks.lora_fa", network_class=LoRAFANetwork)
check_network_args = NETWORK.check_network_args
create_network = NETWORK.create_network
create_network_from_weights = NETWORK.create_network_from_weights
