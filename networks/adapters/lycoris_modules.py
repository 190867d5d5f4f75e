"""Modules of the published package ``lycoris-lora`` among the modules of this suite, for drawing images.

The package's modules change a layer's weight and bias. Here the change is held whole, so that such a module can be
merged, taken out again and limited to a region as any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.checkpoints import open_checkpoint
from library.console import warn
from library.errors import UserError
from library.generation.lora_files import left_out, module_of
from library.lycoris import open_lycoris
from library.memory.stored_linear import write_weight
from library.models.stable_diffusion.original_names import under_original_names
from networks.adapters.adapter_module import AdapterModule
from networks.adapters.lora_targets import Target, TargetTable

if TYPE_CHECKING:
    from library.models.stable_diffusion.pipeline import StableDiffusionPipeline

TABLE = TargetTable("lora_unet", "unet", ())


class LycorisAdapter(AdapterModule):
    """One of the package's modules, ``lora``, for whatever it changes: a Linear, a convolution or a norm."""

    def __init__(self, lora: Any, merges_scale_twice: bool):
        super().__init__(Target(lora.lora_name, lora.org_module[0], TABLE))
        self.lora_name = lora.lora_name
        if merges_scale_twice:
            lora.scale = lora.scale**0.5
        self.lora = lora.float()
        self.change: tuple[Any, dict[str, Tensor]] | None = None
        """The multiplier and the change of weight and bias at it."""

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias (None: unchanged) that the module makes of the layer's, in float32."""
        weight = self.org_module.weight
        self.lora.to(weight.device)
        merged, bias = self.lora.get_merged_weight(float(self.multiplier), weight.shape, weight.device)
        return merged.float(), None if bias is None else bias.float()

    def forward(self, x: Tensor) -> Tensor:
        y = self.org_forward(x)
        if self.is_idle:
            return y
        if self.change is None or self.change[0] != self.multiplier:
            self.change = (self.multiplier, self._change())
        return y + self.lora.op(
            x, **{name: tensor.to(x) for name, tensor in self.change[1].items()}, **self.lora.kw_dict
        )

    def changed(self, weight: Tensor) -> Tensor:
        """The weight with what the module adds to its layer's own."""
        return weight + self._change()["weight"].to(weight)

    @torch.no_grad()
    def _change(self) -> dict[str, Tensor]:
        """What is added to the weight and, where the module has one, to the bias; in the weight's dtype."""
        layer = self.org_module
        weight, bias = self.merged()
        change = {"weight": (weight - layer.weight.float()).to(layer.weight.dtype)}
        if bias is not None:
            change["bias"] = (bias if layer.bias is None else bias - layer.bias.float()).to(layer.weight.dtype)
        return change

    @torch.no_grad()
    def merge(self, device: torch.device | str | None = None) -> None:
        """Change the layer's weight, and its bias if the module has one; a layer without gets one."""
        layer = self.org_module
        weight, bias = self.merged()
        write_weight(layer, weight)
        if bias is not None and layer.bias is not None:
            layer.bias.copy_(bias)
        elif bias is not None:
            layer.bias = nn.Parameter(bias.to(layer.weight), requires_grad=False)


class LycorisFile:
    """In the place of a ``NetworkStack`` of one file; its modules are made when the part that they change is there.

    Raises UserError where the package is missing and for a file that is none of its own.
    """

    def __init__(self, path: Path, multiplier: float, pipeline: StableDiffusionPipeline, arguments: Mapping[str, str]):
        try:
            self.module = open_lycoris()
        except ImportError as error:
            raise UserError(f"--network_module lycoris.kohya needs the package lycoris-lora: {error}.") from None
        self.module.check_network_args(arguments)
        self.path = path
        self.arguments: dict[str, Any] = dict(arguments)
        self.multipliers = [multiplier]
        self.is_xl = pipeline.variant == "sdxl"
        self.encoders = pipeline.encoders
        prefixes = ("lora_unet_", *(("lora_te1_", "lora_te2_") if self.is_xl else ("lora_te_",)))
        self.prefixes: dict[str, str] = dict(zip(("unet", *self.encoders), prefixes))
        keys = open_checkpoint(path).keys()
        self.parts = {part for part, prefix in self.prefixes.items() if any(key.startswith(prefix) for key in keys)}
        if not self.parts:
            raise UserError(f"{path}: none of its tensors belongs to a module that lycoris.kohya knows in this model.")
        others = [module_of(key) for key in keys if not key.startswith(tuple(prefixes))]
        if others:
            warn(f"{path}: {left_out(others, map(module_of, keys))}")
        self.modules: dict[str, list[LycorisAdapter]] = {}

    def acts_on(self, *parts: str) -> bool:
        """Whether the file has modules of these parts."""
        return not self.parts.isdisjoint(parts)

    def part_bytes(self, part: str) -> int:
        """The memory of the modules beside ``part``, once they are there."""
        return sum(p.numel() * p.element_size() for m in self.modules.get(part, []) for p in m.parameters())

    def modules_in(self, part: str, model: nn.Module) -> list[LycorisAdapter]:
        """The modules for the layers of ``model``; they do not act yet. Raises UserError when nothing fits it."""
        self.leave(part)
        if part not in self.parts:
            return []
        tree: nn.Module = nn.Module()
        if part == "unet":
            tree = under_original_names(model) if self.is_xl else model
        encoders = [model if encoder == part else nn.Module() for encoder in self.encoders]
        prefix = self.prefixes[part]
        network, _ = self.module.create_network_from_weights(
            self.multipliers[0],
            self.path,
            None,
            encoders if self.is_xl else encoders[0],
            tree,
            keep=lambda key: key.startswith(prefix),
            **self.arguments,
        )
        network.requires_grad_(False).eval()
        found = [lora for lora in network.loras if not lora.not_supported]
        modules = [LycorisAdapter(lora, type(lora) in self.module.merge_scale_twice) for lora in found]
        for module in modules:
            module.multiplier = self.multipliers[0]
        self.modules[part] = modules
        return modules

    def leave(self, part: str) -> None:
        """Let the modules of ``part`` go."""
        for module in reversed(self.modules.pop(part, [])):
            module.remove()

    def set_multipliers(self, multipliers: Sequence[float]) -> None:
        """A new strength, of the only file."""
        self.multipliers = list(multipliers)
        for modules in self.modules.values():
            for module in modules:
                module.multiplier = self.multipliers[0]
