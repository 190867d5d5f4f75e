"""LoRA-FA for Stable Diffusion: LoRA whose downs stay as they were drawn, so that only ups are trained.

Half the parameters, and the inputs of Linear layers need not be kept for the backward pass. Files, names and arguments
are those of ``networks.lora``. https://arxiv.org/abs/2308.03303
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from networks.adapters.lora_arguments import parse_arguments
from networks.adapters.lora_core import LoRANetwork
from networks.adapters.lora_creation import TextEncoders, build_network, build_network_from_weights
from networks.adapters.lora_module import LoRAModule
from networks.lora import SD, family_of

MODULE = "networks.lora_fa"


class LoRAFANetwork(LoRANetwork):
    """A LoRA network that trains no down."""

    def trained_parts(self, lora: LoRAModule) -> list[tuple[nn.Module, bool]]:
        """The up alone."""
        return [(lora.lora_up, True)]


def check_network_args(network_args: Mapping[str, str]) -> None:
    """Refuse wrong arguments before a model is loaded. Raises UserError."""
    parse_arguments(network_args, SD.arguments, MODULE)


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: TextEncoders,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> LoRANetwork:
    """As ``networks.lora.create_network``."""
    rules, tree = family_of(unet, text_encoder, MODULE)
    return build_network(
        rules, multiplier, network_dim, network_alpha, text_encoder, tree, neuron_dropout,
        network_class=LoRAFANetwork, **network_args,
    )  # fmt: skip


def create_network_from_weights(
    multiplier: float,
    file: str | Path | None,
    vae: Any,
    text_encoder: TextEncoders,
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    **network_args: Any,
) -> tuple[LoRANetwork, dict[str, Tensor]]:
    """As ``networks.lora.create_network_from_weights``."""
    rules, tree = family_of(unet, text_encoder, MODULE)
    return build_network_from_weights(
        rules, multiplier, file, text_encoder, tree, weights_sd, for_inference,
        network_class=LoRAFANetwork, **network_args,
    )  # fmt: skip
