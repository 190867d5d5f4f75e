"""A small trained module beside a frozen Linear or Conv2d: what the modules of all network kinds share.

It takes the place of the layer's ``forward``, so the layer and its weights stay in the model, and in the model's state
dict, as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from library.memory.stored_linear import write_weight
from networks.adapters.lora_targets import Target


def as_float32(number: float) -> float:
    """What is left of a number in a file, so that a run continues from a state with the very same strength."""
    return torch.tensor(number, dtype=torch.float32, device="cpu").item()


class AdapterModule(nn.Module, ABC):
    """The base of trained modules; a kind of network adds weights, ``forward`` and ``merge``."""

    org_module: nn.Linear | nn.Conv2d
    alpha: float
    lora_dim: int
    """What --network_dim gave it."""

    def __init__(self, target: Target, multiplier: float = 1.0) -> None:
        super().__init__()
        self.target = target
        self.lora_name = target.name
        self.multiplier: float | Tensor = multiplier
        # In __dict__, so that the layer does not become a part of this module.
        self.__dict__["org_module"] = target.module
        self.org_forward: Callable[[Tensor], Tensor] = target.module.forward
        self.applied = False
        self.enabled = True

    @property
    def is_idle(self) -> bool:
        """Whether the layer is to compute as if this module weren't there."""
        return not self.enabled or (not isinstance(self.multiplier, Tensor) and self.multiplier == 0)

    def multipliers_of(self, items: int, device: torch.device) -> Tensor | None:
        """A multiplier [batch] for each item of a batch, where single ones were set; float32.

        Raises ValueError when their number is not the batch's.
        """
        if not isinstance(self.multiplier, Tensor):
            return None
        if self.multiplier.numel() not in (1, items):
            raise ValueError(f"{self.multiplier.numel()} multipliers were set, but the batch has {items} items")
        return self.multiplier.to(device, torch.float32).expand(items)

    def transfer(self, layer: nn.Linear | nn.Conv2d) -> None:
        """Be the module of ``layer``: the same layer of another copy of the model. Must not be applied meanwhile."""
        if self.applied:
            raise RuntimeError(f"{self.lora_name} is in a model; remove it first")
        self.target = replace(self.target, module=layer)
        self.__dict__["org_module"] = layer
        self.org_forward = layer.forward

    def apply_to(self) -> None:
        """Enter the model: take the place of the layer's forward."""
        if not self.applied:
            self.org_forward = self.org_module.forward
            self.org_module.forward = self.forward  # type: ignore[method-assign, assignment]
            self.applied = True

    def remove(self) -> None:
        """Leave the model, also from under another network that was applied later."""
        if not self.applied:
            return
        above: AdapterModule | None = None
        owner: Any = getattr(self.org_module.forward, "__self__", None)
        while isinstance(owner, AdapterModule) and owner is not self:
            above, owner = owner, getattr(owner.org_forward, "__self__", None)
        if owner is not self:
            raise RuntimeError(f"{self.lora_name}: the layer's forward was replaced after this network was applied")
        was_its_own = getattr(self.org_forward, "__self__", None) is self.org_module
        if above is not None:
            above.org_forward = self.org_forward
        elif was_its_own:
            del self.org_module.forward  # the class's own forward shows again
        else:
            self.org_module.forward = self.org_forward  # type: ignore[method-assign]
        self.applied = False

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for ``x`` with the module's effect."""

    @abstractmethod
    def changed(self, weight: Tensor) -> Tensor:
        """What the module makes of a float32 ``weight`` of its layer, at its multiplier."""

    @torch.no_grad()
    def merge(self, device: torch.device | str | None = None) -> None:
        """Change the layer's weight into what the module makes of it.

        It is computed in float32 on ``device`` and kept in the weight's own dtype.
        """
        weight = self.org_module.weight  # of a stored layer this is a copy, so the result is written back below
        device = weight.device if device is None else device
        write_weight(self.org_module, self.changed(weight.to(device, torch.float32)))

    def weight_below(self) -> Tensor:
        """The layer's weight in float32, with the effect of the modules that entered the model before this one."""
        below, owner = [], getattr(self.org_forward, "__self__", None)
        while isinstance(owner, AdapterModule):
            below.append(owner)
            owner = getattr(owner.org_forward, "__self__", None)
        weight = self.org_module.weight.float()
        for module in reversed(below):
            weight = weight if module.is_idle else module.changed(weight)
        return weight

    # alpha is a plain number in memory (a cast of the network must not round it) but a tensor in state dicts.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "alpha"] = torch.tensor(self.alpha, dtype=torch.float32)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: Any, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if prefix + "alpha" in state_dict:
            self.alpha = float(state_dict[prefix + "alpha"])
        else:
            missing.append(prefix + "alpha")
        unexpected[:] = [key for key in unexpected if key != prefix + "alpha"]
