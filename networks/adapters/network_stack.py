"""Several network files at once on the parts of a pipeline, which may be loaded and released one after another.

A network is built on the parts' meta modules (torch's meta device), so that what does not fit is known before anything
heavy is loaded; each of its modules moves into the real layer when the part is there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints import open_checkpoint
from library.errors import UserError
from library.families import Family
from networks.adapters.adapter_module import AdapterModule
from networks.adapters.adapter_network import AdapterNetwork
from networks.lora_tools.known_lora import family_of
from networks.lora_tools.named_lora import NamedLoRA

KeepKey = Callable[[str], bool]
ChooseModule = Callable[[Collection[str]], ModuleType]
"""The network module (``networks.lora_flux``, ...) that reads a file with these keys."""


@dataclass(frozen=True)
class Place:
    """Where a module belongs: the layer at ``path`` of ``part``; ``meta module`` is its stand-in without values."""

    module: AdapterModule
    path: str
    meta_module: Any


class NetworkStack:
    """Networks that act together, in the order of their files.

    ``text_encoders`` and ``transformer`` are meta modules by the part's name; the encoders stand in the order that the
    family's networks expect, None for one that the model lacks; ``families`` are those whose files
    may be meant for the model. With ``merge`` they change the weights of the parts, else they are computed beside them
    and their multipliers can be changed. ``keep`` says for each file which of its keys are read (None: all).
    Raises UserError, naming the file, for one that cannot be read or fits nothing here.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, float]],
        choose_module: ChooseModule,
        text_encoders: Mapping[str, nn.Module | None],
        transformer: Mapping[str, nn.Module],
        families: Collection[Family],
        merge: bool = False,
        keep: Sequence[KeepKey | None] = (),
    ):
        self.merge = merge
        self.multipliers = [multiplier for _, multiplier in files]
        encoders, (image_model,) = list(text_encoders.values()), transformer.values()
        self.networks = []
        for (path, multiplier), kept in zip(files, keep or [None] * len(files)):
            try:
                self.networks.append(_build(path, multiplier, choose_module, encoders, image_model, kept))
            except UserError:
                _refuse_other_family(path, families)
                raise
        self.places: dict[str, list[Place]] = {}
        for part, meta_module in {**text_encoders, **transformer}.items():
            if meta_module is not None:
                self.places[part] = self._places_in(meta_module)

    @classmethod
    def of_pipeline(
        cls,
        pipeline: Any,
        files: Sequence[tuple[Path, float]],
        choose_module: ChooseModule,
        encoders: Sequence[str],
        families: Collection[Family],
        merge: bool = False,
        keep: Sequence[KeepKey | None] = (),
    ) -> NetworkStack:
        """For the parts of a ``library.models.pipeline.Pipeline``, of whose ``encoders`` some may be lacking."""
        text_encoders = {
            encoder: pipeline.meta_module(encoder) if encoder in pipeline.encoders else None for encoder in encoders
        }
        denoiser = {pipeline.denoiser: pipeline.meta_module(pipeline.denoiser)}
        return cls(files, choose_module, text_encoders, denoiser, families, merge, keep)

    def _places_in(self, meta_module: nn.Module) -> list[Place]:
        paths = {id(module): path for path, module in meta_module.named_modules()}
        modules = [module for network in self.networks for module in network.loras]
        return [Place(m, paths[id(m.org_module)], m.org_module) for m in modules if id(m.org_module) in paths]

    def acts_on(self, *parts: str) -> bool:
        """Whether any file has modules of these parts."""
        return any(self.places.get(part) for part in parts)

    def part_bytes(self, part: str) -> int:
        """The memory of the modules beside ``part``; merged ones take none."""
        if self.merge:
            return 0
        modules = [place.module for place in self.places.get(part, [])]
        return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())

    def modules_in(self, part: str, model: nn.Module) -> list[AdapterModule]:
        """The modules of ``part``, now those of the layers of ``model``; they do not act yet."""
        self.leave(part)
        places = self.places.get(part, [])
        for place in places:
            layer: Any = model.get_submodule(place.path)
            place.module.transfer(layer)
        return [place.module for place in places]

    def enter(self, part: str, model: nn.Module, device: torch.device | str) -> None:
        """Put the modules of ``part`` into ``model``, which works on ``device``, or their effect into its weights."""
        for module in self.modules_in(part, model):
            if self.merge:
                module.merge(device)
            else:
                module.to(device)
                module.apply_to()
        if self.merge:
            self.leave(part)

    def merged_weight(self, part: str, path: str, weight: Tensor) -> Tensor:
        """``weight``, that of the Linear at ``path`` of ``part``, with the files' effect, in its dtype.

        For a model that is never loaded as a whole. ``weight`` may be changed.
        """
        places = [place for place in self.places.get(part, []) if place.path == path]
        if not places:
            return weight
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        for place in places:
            place.module.transfer(layer)
            place.module.merge()
            place.module.transfer(place.meta_module)
        return layer.weight.detach()

    def leave(self, part: str) -> None:
        """Take the modules out of ``part``, so that nothing here keeps it in memory; merged weights stay merged."""
        for place in reversed(self.places.get(part, [])):
            place.module.remove()
            place.module.transfer(place.meta_module)
            place.module.to("cpu")

    def move(self, part: str, device: torch.device | str) -> None:
        """Follow ``part`` to ``device``."""
        if not self.merge:
            for place in self.places.get(part, []):
                place.module.to(device)

    def set_multipliers(self, multipliers: Sequence[float]) -> None:
        """New strengths, one for each file. Raises ValueError for another number of them, or after a merge."""
        if self.merge or len(multipliers) != len(self.networks):
            raise ValueError(f"{len(multipliers)} multipliers for {len(self.networks)} networks, merged: {self.merge}")
        self.multipliers = list(multipliers)
        for network, multiplier in zip(self.networks, multipliers):
            network.set_multiplier(multiplier)


def lora_or_oft(lora: ModuleType, oft: ModuleType) -> ChooseModule:
    """A choice between two network modules of a family: OFT by the names of its tensors, else LoRA."""
    return lambda keys: oft if any(key.startswith("oft_unet_") for key in keys) else lora


def _build(
    path: Path,
    multiplier: float,
    choose: ChooseModule,
    encoders: list[nn.Module | None],
    transformer: nn.Module,
    keep: KeepKey | None,
) -> AdapterNetwork[Any]:
    module = choose(open_checkpoint(path).keys())
    network, _ = module.create_network_from_weights(
        multiplier, path, None, encoders, transformer, for_inference=True, keep=keep
    )
    return network


def _refuse_other_family(path: Path, families: Collection[Family]) -> None:
    """Raises UserError when a file that fits nothing says that it is for another model."""
    try:
        family = family_of(NamedLoRA(path))
    except UserError:
        return  # it is no LoRA; what the network module says about it is clearer
    if family is not None and family not in families:
        wanted = " or ".join(family.lora_name for family in families)
        raise UserError(f"{path} is a LoRA for {family.lora_name}; one for {wanted} is needed here.") from None
