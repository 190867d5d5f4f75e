"""Which modules of a model get LoRA, under which names, with which rank: what a family declares.

A family has ``Rules`` made of ``TargetTable``s (one per model) and a few rules. Names in files are
``<prefix>_<module path with dots as underscores>``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from library.errors import UserError

Arguments = Mapping[str, Any]  # parsed network_args by name; None where not given
Part = int | Literal["swapped"] | None
"""What of a layer a name in a file stands for: None for the whole, "swapped" for the whole with the halves of its rows
exchanged, a number for rows of a joined layer, beginning with its part of that number."""


def same_path(path: str) -> str:
    """The module path as LoRA names use it, unchanged."""
    return path


def path_from(anchor: str, prefix: str) -> Callable[[str], str]:
    """A ``file_path`` that replaces whatever stands before ``anchor`` by ``prefix``.

    Libraries wrap text encoders differently from version to version; the names in files must not follow them.
    """

    def file_path(path: str) -> str:
        position = path.find(anchor)
        return prefix + path[position:] if position >= 0 else path

    return file_path


@dataclass(frozen=True)
class TargetTable:
    """The LoRA targets of one model."""

    prefix: str
    """``lora_unet``, ``lora_te1``, ..."""
    group: str
    """Label of its parameter group: ``unet``, ``textencoder 1``, ..."""
    classes: tuple[str, ...]
    """Class names; every Linear and Conv2d inside modules of these classes is a target."""
    conv_classes: tuple[str, ...] = ()
    """As ``classes``, but only when wide convolutions are requested (``Rules.with_conv``)."""
    ends: tuple[str, ...] = ("",)
    """Of these layers, those whose module path has one of these ends."""
    file_path: Callable[[str], str] = same_path
    """Module path -> the path that names the module in files."""
    is_text_encoder: bool = False


@dataclass(frozen=True)
class Target:
    """One Linear or Conv2d that can get LoRA."""

    path: str
    """Its path in files, with dots."""
    module: nn.Linear | nn.Conv2d
    table: TargetTable

    @property
    def name(self) -> str:
        """The LoRA name: prefix and path, joined by underscores."""
        return f"{self.table.prefix}.{self.path}".replace(".", "_")

    @property
    def is_wide_conv(self) -> bool:
        """A convolution that sees neighbours; 1x1 convolutions are treated like Linear layers."""
        return isinstance(self.module, nn.Conv2d) and self.module.kernel_size != (1, 1)


def default_group(target: Target, arguments: Arguments) -> tuple[str, float]:
    """The learning rate group of its table, at the full rate."""
    return target.table.group, 1.0


def conv_dim_is_given(arguments: Arguments) -> bool:
    """Whether ``conv_dim`` includes wide convolutions."""
    return bool(arguments["conv_dim"])


def no_split(target: Target) -> list[int] | None:
    """The layer stays whole."""
    return None


@dataclass(frozen=True)
class Rules:
    """What distinguishes the networks of one model family."""

    transformer: TargetTable
    text_encoders: tuple[TargetTable, ...]
    """In the order of the text encoders."""
    check: Callable[[Arguments, nn.Module], None] = field(default=lambda arguments, transformer: None)
    """Raises UserError where ``arguments`` don't fit the model."""
    with_conv: Callable[[Arguments], bool] = conv_dim_is_given
    """Whether the table's ``conv_classes`` are targets too."""
    rank: Callable[[Target, Arguments], int | None] = field(default=lambda target, arguments: None)
    """Rank that the family's own arguments give a transformer module; None: no opinion, 0: no LoRA."""
    alpha: Callable[[Target, Arguments], float | None] = field(default=lambda target, arguments: None)
    """Alpha that the family's own arguments give a module; None: --network_alpha (conv_alpha)."""
    selected: Callable[[Sequence[Target], Arguments], set[str]] | None = None
    """Names of the transformer modules to train (block selection); None: all."""
    extra_layers: Callable[[Arguments], Mapping[str, int]] = field(default=lambda arguments: {})
    """Module path -> rank of transformer layers outside the table's classes; 0: none."""
    known_extra_layers: tuple[str, ...] = ()
    """All paths ``extra_layers`` can name; a file may hold any of them."""
    text_encoder_is_trained: Callable[[int, Arguments], bool] = field(default=lambda index, arguments: True)
    split: Callable[[Target], list[int] | None] = no_split
    """Rows of the parts that ``split_qkv`` separates in a module; None: not a joined module."""
    group: Callable[[Target, Arguments], tuple[str, float]] = default_group
    """Label of a module's parameter group and the factor on its learning rate."""
    aliases: Callable[[Target], Iterable[tuple[str, Part]]] = field(default=lambda target: ())
    """Names that other programs give a module or a part of it (see lora_formats)."""
    model_name: str = "transformer"
    """What messages call the model that isn't a text encoder."""


def flat_names(path: str, prefixes: Iterable[str]) -> Iterable[str]:
    """A path behind each prefix, joined by underscores; of a list of one layer, also without the layer's number."""
    for prefix in prefixes:
        name = f"{prefix}.{path}".replace(".", "_")
        yield from (name, name.removesuffix("_0")) if path.endswith(".to_out.0") else (name,)


def find_targets(model: nn.Module, table: TargetTable, with_conv: bool = False) -> list[Target]:
    """Every Linear and Conv2d inside modules of the table's classes, each once, in the model's own order."""
    classes = table.classes + (table.conv_classes if with_conv else ())
    parents = [(path, module) for path, module in model.named_modules() if type(module).__name__ in classes]
    found: dict[str, Target] = {}
    for parent_path, parent in parents:
        for path, target in _layers(parent, parent_path, table):
            found.setdefault(path, target)
    return list(found.values())


def find_layers(model: nn.Module, table: TargetTable, paths: Iterable[str]) -> dict[str, list[Target]]:
    """Per path the Linear and Conv2d layers at or below it; a path that the model lacks has none."""
    modules = dict(model.named_modules())
    return {path: [t for _, t in _layers(modules[path], path, table)] if path in modules else [] for path in paths}


def _layers(parent: nn.Module, parent_path: str, table: TargetTable) -> Iterable[tuple[str, Target]]:
    for child_path, module in parent.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            path = ".".join(part for part in (parent_path, child_path) if part)
            if path.endswith(table.ends):
                yield path, Target(table.file_path(path), module, table)


def ranks_by_name(rules: Sequence[tuple[str, tuple[str, ...]]]) -> Callable[[Target, Arguments], int | None]:
    """A ``Rules.rank`` from rules (argument, parts): the argument's value for names that contain all the parts.

    The first rule whose argument is given and whose parts match applies.
    """

    def rank(target: Target, arguments: Arguments) -> int | None:
        for argument, parts in rules:
            if arguments.get(argument) is not None and all(part in target.name for part in parts):
                return arguments[argument]
        return None

    return rank


@dataclass(frozen=True)
class BlockList:
    """A list of blocks in a transformer and the network_args that choose from it."""

    path: str
    """Its path, such as ``double_blocks``."""
    chosen_by: tuple[str, ...]
    """Values of ``train_blocks`` beside ``all`` that leave it in."""
    indices: str | None = None
    """Argument that lists the blocks to train (see ``parse_indices``); None: always all of them."""


def blocks_by_arguments(block_lists: Sequence[BlockList]) -> Callable[[Sequence[Target], Arguments], set[str]]:
    """A ``Rules.selected`` from ``train_blocks`` and the arguments that list blocks.

    Modules outside of the lists are trained with ``train_blocks=all``, the default. Raises UserError when an argument
    names a block that the model doesn't have.
    """

    def selected(targets: Sequence[Target], arguments: Arguments) -> set[str]:
        train_blocks = arguments["train_blocks"] or "all"
        rest = {target.name for target in targets}
        names: set[str] = set()
        for blocks in block_lists:
            mine = [target for target in targets if target.path.startswith(f"{blocks.path}.")]
            numbers = {target.name: int(target.path.split(".")[1]) for target in mine}
            rest -= numbers.keys()
            given = arguments[blocks.indices] if blocks.indices else None
            count = max(numbers.values(), default=-1) + 1
            chosen = parse_indices("all" if given is None else given, count, blocks.indices or "")
            if train_blocks in ("all", *blocks.chosen_by):
                names.update(name for name, number in numbers.items() if number in chosen)
        return names | rest if train_blocks == "all" else names

    return selected


def parse_indices(text: str, count: int, argument: str) -> set[int]:
    """Block numbers from ``all``, ``none`` or a list such as ``0,1,8-12``.

    Raises UserError when a number isn't below ``count`` or the text is none of these.
    """
    text = text.strip()
    if text == "all":
        return set(range(count))
    chosen: set[int] = set()
    for part in [] if text in ("", "none") else text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UserError(
                f'--network_args: {argument} "{text}" must be "all", "none" or a list of numbers and ranges such as'
                f' "0,1,4-7", not "{part.strip()}".'
            )
        if last >= count:
            raise UserError(
                f"--network_args: {argument} names block {last}, but this model has the blocks 0 to {count - 1}."
                if count
                else f"--network_args: {argument} names block {last}, but this model has no such blocks."
            )
        chosen.update(range(first, last + 1))
    return chosen
