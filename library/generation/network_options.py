"""Networks (LoRA and others) of gen_img.py: which files act, how strongly, and whether they are merged."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from library.console import say
from library.errors import UserError
from library.generation.lora_files import LoraFile, one_each


@dataclass
class NetworkOptions:
    """Networks"""

    network_module: list[str] = field(default_factory=list)
    """Python module of each network: networks.lora, networks.lora_fa, networks.dylora, networks.oft, lycoris.kohya."""
    network_weights: list[str] = field(default_factory=list)
    """File of each network."""
    network_mul: list[float] = field(default_factory=list)
    """Strength of each network; 1.0 where missing."""
    network_args: list[str] = field(default_factory=list)
    """Further settings for each network as one string: "key=value;key=value", commas are understood too."""
    network_show_meta: bool = False
    """Print the metadata of the files."""
    network_merge: bool = False
    """Merge all networks into the model's weights: as fast as the model alone, but --am has no effect."""
    network_merge_n_models: int | None = None
    """Merge the first N networks; the others stay as they are, and --am counts from them."""
    network_pre_calc: bool = False
    """Compute the weights with all networks before each batch: as fast as the model alone, and --am has its effect."""
    network_regional_mask_max_color_codes: int | None = None
    """How many regions the colours of --mask_path stand for (1 red, 2 green, 3 yellow, 4 blue, 5 magenta, 6 cyan,
    7 white); unset means that each of its three channels is a region."""


@dataclass(frozen=True)
class NetworkFile(LoraFile):
    """A file of ``--network_weights``."""

    module: str = "networks.lora"
    """Name of the network module that reads it."""
    arguments: Mapping[str, str] = field(default_factory=dict)
    """Its ``--network_args``."""
    merged: bool = False
    """Whether it becomes part of the model's weights, so that its strength stays."""


def parse_network_files(options: NetworkOptions) -> list[NetworkFile]:
    """The networks that the options name, in their order. Raises UserError for options that do not fit together."""
    modules, weights = options.network_module, options.network_weights
    if weights and not modules:
        raise UserError("--network_weights needs --network_module, such as networks.lora, once for each file.")
    if len(weights) < len(modules):
        raise UserError(
            f"--network_weights: {len(weights)} of {len(modules)} files are given, one for each module; there is no "
            f"weight for {modules[len(weights)]}."
        )
    for option, values in (("network_weights", weights), ("network_mul", options.network_mul)):
        if len(values) > len(modules):
            raise UserError(
                f"--{option} has more values ({len(values)}) than --network_module has modules ({len(modules)})."
            )
    if len(options.network_args) > len(modules):
        raise UserError(
            f"--network_args takes one string for each network, but {len(options.network_args)} are given for "
            f'{len(modules)}; write several settings of a network as "key=value;key=value".'
        )
    for number in options.network_mul:
        if not math.isfinite(number):
            raise UserError(f"--network_mul must be finite numbers, not {number}.")
    merged = _merged_count(options)
    files = []
    for index, (module, given) in enumerate(zip(modules, weights)):
        path = Path(given)
        if not path.is_file():
            raise UserError(f"--network_weights: there is no file {path}.")
        arguments = one_each(modules, options.network_args, "")[index]
        multiplier = one_each(modules, options.network_mul, 1.0)[index]
        files.append(
            NetworkFile(path, multiplier, module=module, arguments=parse_arguments(arguments), merged=index < merged)
        )
    _say_what_has_no_effect(options)
    return files


def parse_arguments(text: str) -> dict[str, str]:
    """``key=value;key=value`` or ``key=value,key=value`` as a dictionary. Raises UserError for an entry without =.

    A comma is a separator only where a key follows, so that values may hold commas.
    """
    arguments = {}
    for entry in re.split(r";|,(?=\s*\w+\s*=)", text):
        key, equals, value = entry.partition("=")
        if entry.strip() and not (equals and key.strip()):
            raise UserError(f'--network_args: "{entry.strip()}" must have the form key=value.')
        if entry.strip():
            arguments[key.strip()] = value.strip()
    return arguments


def strengths(files: Sequence[NetworkFile], own: Sequence[float] | None) -> tuple[float, ...]:
    """A strength for each of ``files`` that is not merged.

    They are those of the files, or a prompt's ``own`` ones (``--am``), of which the last counts for missing ones too.
    """
    acting = [file for file in files if not file.merged]
    if not own:
        return tuple(file.multiplier for file in acting)
    return tuple(one_each([str(file.path) for file in acting], own, own[-1]))


def _merged_count(options: NetworkOptions) -> int:
    first = options.network_merge_n_models
    if first is not None and first < 0:
        raise UserError(f"--network_merge_n_models must be 0 or more, not {first}.")
    if options.network_merge and options.network_pre_calc:
        raise UserError("--network_merge and --network_pre_calc are mutually exclusive.")
    if first is None:
        return len(options.network_module) if options.network_merge else 0
    if first > len(options.network_module):
        raise UserError(
            f"--network_merge_n_models {first}: only {len(options.network_module)} networks are given with "
            "--network_module."
        )
    return first


def _say_what_has_no_effect(options: NetworkOptions) -> None:
    if not options.network_module:
        for name in _given(options):
            say(f"--{name} has no effect without --network_module")


def _given(options: NetworkOptions) -> Iterator[str]:
    for name in ("network_show_meta", "network_merge", "network_merge_n_models", "network_pre_calc"):
        if getattr(options, name):
            yield name
