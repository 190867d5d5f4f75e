"""The networks of gen_img.py: merged, computed beside the layers, or computed into the weights for each batch."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.checkpoints import open_checkpoint
from library.console import show, warn
from library.errors import UserError, did_you_mean
from library.families import SDXL, STABLE_DIFFUSION
from library.generation.network_options import NetworkFile, NetworkOptions, parse_network_files, strengths
from library.lycoris import NAME as LYCORIS
from library.memory.stored_linear import stored_weight, write_weight
from library.models.stable_diffusion.regions import Change
from networks.adapters.adapter_module import AdapterModule
from networks.adapters.lycoris_modules import LycorisFile
from networks.adapters.network_stack import NetworkStack

if TYPE_CHECKING:
    from library.models.stable_diffusion.pipeline import StableDiffusionPipeline

MODULES = tuple(dict.fromkeys((*STABLE_DIFFUSION.networks, *SDXL.networks, LYCORIS)))
"""What ``--network_module`` may name here."""


def open_networks(options: NetworkOptions, pipeline: StableDiffusionPipeline) -> ImageNetworks:
    """The networks that the options name, checked against the structure of the model.

    Raises UserError for options that do not fit together and for files that do not fit the model.
    """
    files = parse_network_files(options)
    for file in files:
        if file.module not in MODULES:
            raise UserError(
                f'--network_module: "{file.module}" is unknown here; known are {", ".join(MODULES)}.'
                f"{did_you_mean(file.module, MODULES)}"
            )
        if options.network_show_meta:
            metadata = open_checkpoint(file.path).metadata
            show(f"{file.path}: {json.dumps(metadata, indent=4, sort_keys=True) if metadata else 'no metadata'}")
    return ImageNetworks(files, pipeline, options.network_pre_calc)


class ImageNetworks:
    """Networks in the order of their files: those that are merged first, then those whose strengths can change.

    With ``pre_calc`` the weights are recomputed when strengths change, and restored, to the bit, when a
    part is left. LyCORIS networks always act that way, and with them all others: what they make of a weight depends on
    what the networks before them have made of it.
    """

    def __init__(self, files: Sequence[NetworkFile], pipeline: StableDiffusionPipeline, pre_calc: bool = False):
        self.files = list(files)
        self.pipeline = pipeline
        meta_modules = {part: pipeline.meta_module(part) for part in (*pipeline.encoders, "unet") if files}
        self.opened = [_open(file, pipeline, meta_modules) for file in files]
        self.acting = [opened for file, opened in zip(files, self.opened) if not file.merged]
        self.pre_calc = pre_calc or any(isinstance(opened, LycorisFile) for opened in self.acting)
        self.entered: dict[str, list[list[AdapterModule]]] = {}
        """The modules of each acting network, by part."""
        self.calculated: dict[str, CalculatedWeights] = {}

    @property
    def multipliers(self) -> list[float]:
        """The strength of each file."""
        return [opened.multipliers[0] for opened in self.opened]

    @property
    def networks(self) -> list[Any]:
        """The acting networks, as prompt modules are given them."""
        return [opened if isinstance(opened, LycorisFile) else opened.networks[0] for opened in self.acting]

    def strengths(self, own: Sequence[float] | None) -> tuple[float, ...]:
        """The strengths of the acting networks for a prompt with ``own`` ones (``--am``), or none."""
        return strengths(self.files, own)

    def set_multipliers(self, multipliers: Sequence[float], *parts: str) -> None:
        """New strengths of the acting networks. Raises ValueError for another number of them.

        ``parts`` are those that work next, all if none is named: what ``pre_calc`` computes is computed for these.
        """
        if len(multipliers) != len(self.acting):
            raise ValueError(f"{len(multipliers)} multipliers for {len(self.acting)} networks")
        for opened, multiplier in zip(self.acting, multipliers):
            if opened.multipliers[0] != multiplier:
                opened.set_multipliers([multiplier])
        for part in parts or self.calculated:
            if part in self.calculated and self.calculated[part].strengths != list(multipliers):
                self._calculate(part)

    def _calculate(self, part: str) -> None:
        self._rest(part)
        self.calculated[part].calculate([opened.multipliers[0] for opened in self.acting])

    def acts_on(self, *parts: str) -> bool:
        """Whether any file has modules of these parts."""
        return any(opened.acts_on(*parts) for opened in self.opened)

    def part_bytes(self, part: str) -> int:
        """The memory of the modules beside ``part``; merged ones take none."""
        return sum(opened.part_bytes(part) for opened in self.acting)

    def enter(self, part: str, model: nn.Module, device: torch.device | str) -> None:
        """Let the networks act on ``part``, which was loaded as ``model`` and works on ``device``."""
        self.leave(part)
        for file, opened in zip(self.files, self.opened):
            if file.merged:
                for module in opened.modules_in(part, model):
                    if not module.is_idle:
                        module.merge(device)
                opened.leave(part)
        modules = [list(opened.modules_in(part, model)) for opened in self.acting]
        self.entered[part] = modules
        self.move(part, device)
        if self.pre_calc:
            self.calculated[part] = CalculatedWeights([m for network in modules for m in network], device)
            self._calculate(part)
        else:
            self._apply(part)

    def leave(self, part: str) -> None:
        """Take the networks out of ``part``; merged weights stay merged, computed ones are restored."""
        if part in self.calculated:
            self._rest(part)
            self.calculated.pop(part).restore()
        self.entered.pop(part, None)
        for opened in reversed(self.acting):
            opened.leave(part)

    def move(self, part: str, device: torch.device | str) -> None:
        """Follow ``part`` to ``device``."""
        for network in self.entered.get(part, []):
            for module in network:
                module.to(device)

    @contextlib.contextmanager
    def changes(self, part: str) -> Iterator[dict[nn.Module, list[Change | None]]]:
        """While it is active, the networks do not act on ``part`` by themselves: what each would add to which layer.

        Given are, by layer, the changes of each acting network, None where it has none. What ``pre_calc`` has computed
        is restored meanwhile.
        """
        networks = self.entered.get(part, [])
        if part in self.calculated:
            self._rest(part)
            self.calculated[part].restore()
        for network in reversed(networks):
            for module in reversed(network):
                module.remove()
        found: dict[nn.Module, list[Change | None]] = {}
        for number, network in enumerate(networks):
            for module in network:
                found.setdefault(module.org_module, [None] * len(networks))[number] = partial(_change, module)
        try:
            yield found
        finally:
            if part in self.calculated:
                self._calculate(part)
            else:
                self._apply(part)

    def _apply(self, part: str) -> None:
        for network in self.entered[part]:
            for module in network:
                module.apply_to()

    def _rest(self, part: str) -> None:
        """Streamed weights may be written to after this."""
        if part in self.pipeline.applied:
            self.pipeline.applied[part].rest()


class CalculatedWeights:
    """The weights of the layers of ``modules``, with the modules' effect in them or as they were (kept on the CPU)."""

    def __init__(self, modules: Sequence[AdapterModule], device: torch.device | str):
        self.modules = list(modules)
        self.device = device
        self.strengths: list[float] = []
        """Those of the networks with which the weights were calculated."""
        layers: dict[int, Any] = {id(module.org_module): module.org_module for module in modules}
        self.kept = [(layer, _copy(stored_weight(layer)), _copy(layer.bias)) for layer in layers.values()]

    def calculate(self, strengths: Sequence[float]) -> None:
        """The modules' effect in the order of the modules, whose networks now have these ``strengths``."""
        self.restore()
        self.strengths = list(strengths)
        for module in self.modules:
            if not module.is_idle:
                module.merge(self.device)

    @torch.no_grad()
    def restore(self) -> None:
        """What the layers had, to the bit."""
        for layer, weight, bias in self.kept:
            write_weight(layer, weight)
            if bias is None:
                layer.bias = None
            else:
                layer.bias.copy_(bias)


def _copy(weight: Any) -> Any:
    return weight.detach().to("cpu", copy=True) if isinstance(weight, Tensor) else copy.deepcopy(weight)


def _change(module: AdapterModule, x: Tensor, y: Tensor) -> Tensor:
    """What a module that is in no model adds to ``y``, the output of its layer for ``x``."""
    own = module.org_forward
    module.org_forward = lambda _: y
    try:
        return module(x) - y
    finally:
        module.org_forward = own


def _open(
    file: NetworkFile, pipeline: StableDiffusionPipeline, meta_modules: Mapping[str, nn.Module]
) -> NetworkStack | LycorisFile:
    if file.module == LYCORIS:
        return LycorisFile(file.path, file.multiplier, pipeline, file.arguments)
    module: Any = importlib.import_module(file.module)
    if file.arguments:
        warn(
            f"--network_args: {', '.join(file.arguments)} of {file.module} concern training and have no effect on "
            "images"
        )
    return NetworkStack(
        [(file.path, file.multiplier)],
        lambda keys: module,
        {encoder: meta_modules[encoder] for encoder in pipeline.encoders},
        {"unet": meta_modules["unet"]},
        [SDXL if pipeline.variant == "sdxl" else STABLE_DIFFUSION],
    )
