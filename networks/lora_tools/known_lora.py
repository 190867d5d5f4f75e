"""LoRA files of one model family under this suite's names, whatever program wrote them; no model is needed.

A family's own module (``flux_lora``, ``lumina_lora``) says which layers its models have and what joined ones hold.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, cast

import torch

from library.errors import UserError
from library.families import FAMILIES, Family, load, lora_family
from networks.adapters.lora_file import LoRAWeights
from networks.adapters.lora_formats import join_parts, plain_name, refuse_repetition, whole_module
from networks.adapters.lora_targets import Part, Rules, Target, TargetTable
from networks.lora_tools.named_lora import NamedLoRA

MOST_BLOCKS = 1000


class KnownLoRA(NamedLoRA):
    """A LoRA file of any dialect, opened by its header; ``modules`` are the names of the family's network module.

    ``targets`` are the layers by these names, ``parts`` the file's names by part (see ``lora_targets.Part``),
    ``unmatched`` the file's modules that are none of the family's.
    """

    model_name: ClassVar[str]
    """As messages name the family's models."""
    rules: ClassVar[Rules]
    entries: ClassVar[Mapping[str, str]]
    """What a file says of itself, without which programs do not know it (see ``metadata.file_entries``)."""

    def __init__(self, path: Path | str, option: str = "--models", takes_dora: bool = False):
        super().__init__(path, option, takes_dora)
        numbers = [int(number) for name in self.keys for number in re.findall(r"(?<=[._])\d{1,9}(?=[._])", name)]
        known = _known_names(self.layer_paths, self.rules.aliases, min(max(numbers, default=0) + 1, MOST_BLOCKS))
        self.targets: dict[str, Target] = {}
        self.parts: dict[str, dict[Part, str]] = {}
        self.unmatched: list[str] = []
        for name in self.keys:
            if plain_name(name) not in known:
                self.unmatched.append(name)
                continue
            target, part = known[plain_name(name)]
            self.targets[target.name] = target
            parts = self.parts.setdefault(target.name, {})
            try:
                refuse_repetition(target.name, part, parts)
            except UserError as error:
                raise self._named(error) from None
            parts[part] = name
        self.modules = self.parts.keys()
        for name in self.modules:
            self._check_parts(name)

    @staticmethod
    @abstractmethod
    def layer_paths(blocks: int) -> Iterable[tuple[TargetTable, str]]:
        """Every layer that a LoRA can act on, in models of up to ``blocks`` blocks of each kind."""

    @staticmethod
    @abstractmethod
    def dialect_of(name: str) -> str:
        """The program whose manner of naming modules ``name`` (without wrappers) follows."""

    @abstractmethod
    def rows(self, name: str) -> list[int]:
        """Rows of a module's parts: [out] of one that is not joined, else those of q, k, v (and others)."""

    def refuse_special(self) -> None:
        """Raises UserError for a file of the family that holds more than LoRA."""

    def require_known(self) -> None:
        """Raises UserError that lists every module and tensor that belongs to no layer of the family.

        Also for a file whose metadata say that it is for another family with files of its own, since names may be the
        same there.
        """
        told = lora_family((), self.metadata.get("ss_base_model_version", ""))
        if told and not self.unmatched and type(self) is not _kinds().get(told, type(self)):
            raise UserError(
                f"{self.label} is for {told.lora_name}, as its ss_base_model_version says; a LoRA for {self.model_name}"
                " is needed here."
            )
        self.refuse_special()
        unknown = [*self.unmatched, *self.others]
        if unknown:
            family = None if self.modules else family_of(NamedLoRA(self.path))
            other = f" It is for {family.lora_name}." if family else ""
            raise UserError(
                f"{self.label}: {len(unknown)} of its modules and tensors belong to no layer of {self.model_name}: "
                f"{', '.join(unknown)}.{other}"
            )

    @property
    def dialects(self) -> set[str]:
        """Which programs' names are in the file."""
        return {self.dialect_of(plain_name(name)) for name in self.keys}

    def _check_parts(self, name: str) -> None:
        rows = self.rows(name)
        for part, own in self.parts[name].items():
            down, up = self.shapes(own)
            heights = accumulate(rows[part:]) if isinstance(part, int) else [sum(rows)]
            if len(down) != 2 or down[1] != self.width(name) or min(rows) < 0 or up[0] not in heights:
                raise UserError(
                    f"{self.label}: the matrices of {own}, {list(up)} and {list(down)}, do not fit {name}; the file is"
                    " damaged or for another model."
                )

    def width(self, name: str) -> int:
        """Inputs of a module's layer."""
        return self.shapes(next(iter(self.parts[name].values())))[0][1]

    def height(self, name: str, part: Part) -> int:
        """Outputs of the part of a module's layer that the file has under ``part``."""
        return self.shapes(self.parts[name][part])[1][0]

    def whole(self, name: str) -> str | None:
        """The file's name of the module where it stands for the whole layer."""
        return next((own for part, own in self.parts[name].items() if not isinstance(part, int)), None)

    def layer_shape(self, name: str) -> tuple[int, ...]:
        """The shape [out, in] of the layer's weight."""
        return sum(self.rows(name)), self.width(name)

    def rank(self, name: str) -> int:
        """The rank that ``load`` gives."""
        return len(self.load(name).down)

    def load(self, name: str, device: torch.device | str = "cpu") -> LoRAWeights:
        """The module, of a joined layer as one. Raises UserError when its matrices hold infinity or NaN."""
        parts = {part: super(KnownLoRA, self).load(own, device) for part, own in self.parts[name].items()}
        whole = whole_module(parts)
        return _joined(parts, self.rows(name)) if whole is None else whole


def family_of(lora: NamedLoRA) -> Family | None:
    """The model family that a file is for, whatever program's names it has; None where nothing says it."""
    return lora.family or next((family for family, kind in _kinds().items() if _knows_all(kind, lora.path)), None)


def _kinds() -> dict[Family, type[KnownLoRA]]:
    return {family: load(family.lora_files) for family in FAMILIES if family.lora_files}


def open_known(paths: Sequence[str], option: str = "--models") -> list[KnownLoRA]:
    """The files, all of the family that the first is for; none where that family's files have no class of their own.

    Raises UserError for files that cannot be read or are not all of one family.
    """
    found = family_of(NamedLoRA(paths[0], option))
    kind = next((kind for family, kind in _kinds().items() if family is found), None)
    loras = [kind(path, option) for path in paths] if kind else []
    for lora in loras:
        lora.require_known()
    return loras


def _knows_all(kind: type[KnownLoRA], path: Path) -> bool:
    try:
        return not kind(path).unmatched
    except UserError:
        return False


@cache
def _known_names(
    layer_paths: Callable[[int], Iterable[tuple[TargetTable, str]]],
    aliases: Callable[[Target], Iterable[tuple[str, Part]]],
    blocks: int,
) -> dict[str, tuple[Target, Part]]:
    """Every name that a program gives a layer or a part of it; the targets have names and paths but no modules."""
    known: dict[str, tuple[Target, Part]] = {}
    for table, path in layer_paths(blocks):
        target = Target(path, cast(Any, None), table)
        known |= {alias: (target, part) for alias, part in aliases(target)}
        known[target.name] = (target, None)
    return known


def _joined(parts: Mapping[Part, LoRAWeights], rows: list[int]) -> LoRAWeights:
    """Parts as one module; parts that share their down, as those of a module that was taken apart, become it again."""
    positions = sorted(part for part in parts if isinstance(part, int))
    found = [parts[position] for position in positions]
    first = found[0]
    is_shared = (
        not any(weights.magnitudes for weights in found)
        and len(found) == len(rows)
        and all(weights.alpha == first.alpha and torch.equal(weights.down, first.down) for weights in found)
    )
    if is_shared:
        return LoRAWeights(first.down, torch.cat([weights.up for weights in found]), first.alpha)
    return join_parts(found, positions, rows)
