"""How the tiny models are trained and written: a resumable training run with averaged weights, and float16 files."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.files import writing


@dataclass
class Run:
    """One training run: a step function, its parameters, its length, and where its checkpoint lies."""

    name: str
    modules: dict[str, nn.Module]
    optimizers: list[torch.optim.Optimizer]
    steps: int
    warmup: int
    checkpoint: Path
    average_decay: float

    def train(self, loss_of_step: Callable[[int], tuple[Tensor, str]], save_every: int = 500) -> None:
        """Run the steps that are still missing. ``loss_of_step(step)`` returns the loss and a word for the log."""
        averages = {name: _average(module) for name, module in self.modules.items()}
        start = self._resume(averages)
        rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        parameters = [p for module in self.modules.values() for p in module.parameters() if p.requires_grad]
        mean, begin = 0.0, time.time()
        for step in range(start, self.steps):
            factor = min(1.0, (step + 1) / self.warmup) * (0.5 + 0.5 * math.cos(math.pi * step / self.steps))
            for optimizer, base in zip(self.optimizers, rates):
                for group, rate in zip(optimizer.param_groups, base):
                    group["lr"] = rate * max(factor, 0.01)
            loss, note = loss_of_step(step)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            decay = min(self.average_decay, (step + 1) / (step + 10))
            for name, module in self.modules.items():
                averages[name].update(module, decay)
            mean = loss.item() if step == start else 0.98 * mean + 0.02 * loss.item()
            if (step + 1) % 100 == 0:
                each = (time.time() - begin) / (step + 1 - start)
                print(f"{self.name} {step + 1}/{self.steps} loss {mean:.4f} {note} {each:.3f} s/step", flush=True)
            if (step + 1) % save_every == 0 or step + 1 == self.steps:
                self._save(step + 1, averages, rates)

    def _save(self, step: int, averages: dict[str, Any], rates: list[list[float]]) -> None:
        state = {
            "step": step,
            "rates": rates,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "averages": {name: average.values for name, average in averages.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        temporary = self.checkpoint.with_suffix(".part")
        torch.save(state, temporary)
        temporary.replace(self.checkpoint)

    def _resume(self, averages: dict[str, Any]) -> int:
        if not self.checkpoint.exists():
            return 0
        state = torch.load(self.checkpoint, weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
            averages[name].values = state["averages"][name]
        for optimizer, values, rates in zip(self.optimizers, state["optimizers"], state["rates"]):
            optimizer.load_state_dict(values)
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate
        return state["step"]


class _average:
    """Exponential moving average of a module's parameters."""

    def __init__(self, module: nn.Module):
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, decay: float) -> None:
        current = module.state_dict()
        names = [name for name, value in current.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.values[name] for name in names], [current[name] for name in names], 1 - decay)


def averaged(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The averaged weights of module ``name`` in a run's checkpoint."""
    return torch.load(checkpoint, weights_only=True)["averages"][name]


def save(path: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write ``state``, its numbers in float16 and its bytes as they are, with ``config`` as JSON in the metadata."""
    from safetensors.torch import save as serialised

    tensors = {
        name: (value.detach().half() if value.is_floating_point() else value).contiguous()
        for name, value in state.items()
    }
    metadata = {"format": "pt", **({"config": json.dumps(config)} if config else {})}
    with writing(path) as file:
        file.write(serialised(tensors, metadata))
    print(f"{path} {path.stat().st_size / 1e6:.2f} MB")
