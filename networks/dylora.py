"""DyLoRA for Stable Diffusion: a LoRA that can be cut to a smaller rank after training.

Each step trains the network as it would be at a randomly drawn rank, so that its first ranks alone do as well as they
can. Ranks go by ``unit`` (network_args); of the drawn rank only the last unit is trained, the paper's "frozen" way.
Names and other arguments are those of ``networks.lora``, and so are files; ``extract_lora_from_dylora.py`` cuts them.
https://arxiv.org/abs/2210.07558
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from networks import lora
from networks.adapters.lora_arguments import unavailable, whole_number
from networks.adapters.lora_core import LoRANetwork
from networks.adapters.lora_kind import DEFAULT_RANK, LoRAKind
from networks.adapters.lora_module import LoRAModule
from networks.adapters.lora_targets import Arguments
from networks.adapters.network_kind import Models

NO_GGPO = unavailable("LoRA-GGPO needs the gradient of all ranks, and DyLoRA has that of a few.")


def ranks_at_once(name: str, value: Any) -> int:
    """A whole number, 1 or more. Raises UserError."""
    unit = whole_number(name, value)
    if unit < 1:
        raise UserError(f"--network_args: {name} must be at least 1, not 0.")
    return unit


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

    def _kernels(self) -> tuple[Tensor, Tensor]:
        kernel = self.org_module.weight.shape[1:]
        return self.down_matrix.reshape(-1, *kernel), self.up_matrix[..., None, None]

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


@dataclass(frozen=True)
class DyLoRAKind(LoRAKind):
    """DyLoRA: of a file too, the ranks must be multiples of ``unit``."""

    def module_settings(self, arguments: Arguments) -> dict[str, Any]:
        """The ranks that are trained together."""
        return {"unit": arguments["unit"] or 1}

    def new_network(
        self, models: Models, arguments: Arguments, network_dim: int | None, network_alpha: float | None
    ) -> LoRANetwork:
        """Raises UserError too unless ``conv_dim`` is ``network_dim``, where given."""
        conv_dim, rank = arguments["conv_dim"], network_dim or DEFAULT_RANK
        if conv_dim is not None and conv_dim != rank:
            raise UserError(
                f"--network_args: {self.module} needs conv_dim={rank}, which is --network_dim, not {conv_dim}."
            )
        return super().new_network(models, arguments, network_dim, network_alpha)


NETWORK = DyLoRAKind(
    "networks.dylora",
    lora.rules_of,
    {**lora.NETWORK.arguments, "unit": ranks_at_once, "ggpo_sigma": NO_GGPO, "ggpo_beta": NO_GGPO},
    lora.NETWORK.learning_arguments | {"unit"},
    network_class=DyLoRANetwork,
    module_class=DyLoRAModule,
)
check_network_args = NETWORK.check_network_args
create_network = NETWORK.create_network
create_network_from_weights = NETWORK.create_network_from_weights
