"""DyLoRA for Stable Diffusion: a LoRA that can be cut to a smaller rank after training.

Each step trains the network as it would be at a randomly drawn rank, so that its first ranks alone do as well as they
can. Ranks go by ``unit`` (network_args); of the drawn rank only the last unit is trained, the paper's "frozen" way.
Names and other arguments are those of ``networks.lora``, and so are files; ``extract_lora_from_dylora.py`` cuts them.
https://arxiv.org/abs/2210.07558
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from networks import lora
from networks.adapters.lora_arguments import parse_arguments, unavailable, whole_number
from networks.adapters.lora_core import LoRANetwork
from networks.adapters.lora_creation import DEFAULT_RANK, TextEncoders, build_network, build_network_from_weights
from networks.adapters.lora_module import LoRAModule
from networks.adapters.lora_targets import Family

MODULE = "networks.dylora"
NO_GGPO = unavailable("LoRA-GGPO needs the gradient of all ranks, and DyLoRA has that of a few.")
ARGUMENTS = {**lora.SD.arguments, "unit": whole_number, "ggpo_sigma": NO_GGPO, "ggpo_beta": NO_GGPO}


def _parameters(tensors: Iterable[Tensor]) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(tensor.clone()) for tensor in tensors])


class DyLoRAModule(LoRAModule):
    """A LoRA module in units of some ranks; while it trains, it is cut behind the unit ``drawn``.

    Cut to r of R ranks, it is stronger by sqrt(R / r).
    """

    def __init__(self, *settings: Any, unit: int = 1, **others: Any) -> None:
        self.__dict__["unit"] = unit  # needed while the weights are made
        super().__init__(*settings, **others)
        self.drawn: int | None = None

    unit: int

    @property
    def units(self) -> int:
        """In how many parts the ranks are trained."""
        return self.lora_dim // self.unit

    def _make_weights(self) -> tuple[nn.Module, nn.Module]:
        if self.lora_dim % self.unit:
            raise UserError(
                f"--network_args: unit={self.unit} does not divide the rank {self.lora_dim} of {self.lora_name}."
            )
        down, up = super()._make_weights()
        nn.init.kaiming_uniform_(down.get_parameter("weight"), a=math.sqrt(5))  # as a whole, so that it is LoRA's
        downs = down.get_parameter("weight").detach().chunk(self.units)
        ups = up.get_parameter("weight").detach().flatten(1).chunk(self.units, dim=1)
        return _parameters(downs), _parameters(torch.zeros_like(up) for up in ups)

    def _initialise(self) -> None:
        """Done while the weights were made."""

    @property
    def down_matrix(self) -> Tensor:
        """[rank, in(* height * width)]; gradients reach the drawn unit."""
        return torch.cat(self._weights(self.lora_down))

    @property
    def up_matrix(self) -> Tensor:
        """[out, rank]; gradients reach the drawn unit."""
        return torch.cat(self._weights(self.lora_up), dim=1)

    def _weights(self, units: nn.Module) -> list[Tensor]:
        is_cut = self.training and self.drawn is not None
        weights = [weight.flatten(1) for weight in units.parameters()]
        return [weight.detach() if is_cut and i != self.drawn else weight for i, weight in enumerate(weights)]

    def _up_blocks(self, up: Tensor) -> Sequence[Tensor]:
        return up.chunk(self.units, dim=1)

    def _mask(self, rows: Sequence[int], device: torch.device) -> Tensor | None:
        mask = super()._mask(rows, device)
        if not self.training or self.drawn is None:
            return mask
        rank = (self.drawn + 1) * self.unit
        cut = torch.zeros(self.lora_dim, device=device)
        cut[:rank] = math.sqrt(self.lora_dim / rank)
        return cut.expand(*rows, -1) if mask is None else mask * cut


class DyLoRANetwork(LoRANetwork):
    """A LoRA network whose rank is drawn for each step."""

    def on_step_start(self, text_encoder: Any, unet: Any) -> None:
        """Draw the rank of this step from torch's global generator: the same share of each module's own."""
        share = torch.rand(()).item()
        for module in self.loras:
            if isinstance(module, DyLoRAModule):
                module.drawn = int(share * module.units)


def check_network_args(network_args: Mapping[str, str]) -> None:
    """Refuse wrong arguments before a model is loaded. Raises UserError."""
    _unit(parse_arguments(network_args, ARGUMENTS, MODULE))


def _unit(arguments: Mapping[str, Any]) -> int:
    unit = 1 if arguments["unit"] is None else arguments["unit"]
    if unit < 1:
        raise UserError("--network_args: unit must be at least 1, not 0.")
    return unit


def _rules(text_encoder: TextEncoders, unet: nn.Module, network_args: Mapping[str, Any]) -> tuple[Family, Any, Any]:
    """The family, the tree of its names, and what makes a module."""
    rules, tree = lora.family_of(unet, text_encoder, MODULE)
    rules = replace(rules, arguments=ARGUMENTS, learning_arguments=rules.learning_arguments | {"unit"})
    return rules, tree, partial(DyLoRAModule, unit=_unit(parse_arguments(network_args, ARGUMENTS, MODULE)))


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
    """As ``networks.lora.create_network``. Raises UserError too unless ``conv_dim`` is ``network_dim``, where given."""
    rules, tree, module_class = _rules(text_encoder, unet, network_args)
    conv_dim, rank = network_args.get("conv_dim"), network_dim or DEFAULT_RANK
    if conv_dim is not None and int(conv_dim) != rank:
        raise UserError(f"--network_args: {MODULE} needs conv_dim={rank}, which is --network_dim, not {conv_dim}.")
    return build_network(
        rules, multiplier, network_dim, network_alpha, text_encoder, tree, neuron_dropout,
        network_class=DyLoRANetwork, module_class=module_class, **network_args,
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
    """As ``networks.lora.create_network_from_weights``; the ranks must be multiples of ``unit``."""
    rules, tree, module_class = _rules(text_encoder, unet, network_args)
    return build_network_from_weights(
        rules, multiplier, file, text_encoder, tree, weights_sd, for_inference,
        network_class=DyLoRANetwork, module_class=module_class, **network_args,
    )  # fmt: skip
