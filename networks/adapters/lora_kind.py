"""LoRA of every family as a kind of network: from arguments, or from a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from library.console import warn
from library.errors import UserError
from networks.adapters.adapter_network import LoadInfo
from networks.adapters.lora_arguments import last_match
from networks.adapters.lora_core import LoRANetwork
from networks.adapters.lora_file import LoRAWeights, state_dict_of
from networks.adapters.lora_formats import read_modules
from networks.adapters.lora_module import LoRAModule, Regularisation
from networks.adapters.lora_targets import Arguments, Rules, Target, find_layers, find_targets
from networks.adapters.network_kind import Models, NetworkKind

DEFAULT_RANK = 4
DEFAULT_ALPHA = 1.0


@dataclass(frozen=True)
class LoRAKind(NetworkKind[LoRANetwork]):
    """LoRA; rank ``network_dim`` (None: 4), alpha ``network_alpha`` (None: 1, 0: the rank).

    Of files, every key form that ``lora_formats`` knows is read.
    """

    network_class: type[LoRANetwork] = LoRANetwork
    module_class: type[LoRAModule] = LoRAModule

    def module_settings(self, arguments: Arguments) -> dict[str, Any]:
        """What the modules of this kind are made with beside what every LoRA module takes."""
        return {}

    def check(self, models: Models, arguments: Arguments) -> None:
        models.rules.check(arguments, models.unet)

    def new_network(
        self, models: Models, arguments: Arguments, network_dim: int | None, network_alpha: float | None
    ) -> LoRANetwork:
        rules = models.rules
        rank = DEFAULT_RANK if network_dim is None else int(network_dim)
        alpha = DEFAULT_ALPHA if network_alpha is None else float(network_alpha)
        if rank < 1:
            raise UserError(f"--network_dim must be at least 1, not {rank}.")
        if not 0 <= alpha < math.inf:
            raise UserError(f"--network_alpha must be a number, 0 or more, not {alpha:g}.")
        ranks = self._ranks(models, arguments, rank)
        if not ranks:
            raise UserError("--network_args leave no module to train; every rank is 0 or every block is left out.")
        conv_alpha = DEFAULT_ALPHA if arguments["conv_alpha"] is None else arguments["conv_alpha"]

        def alpha_of(target: Target) -> float:
            own = rules.alpha(target, arguments)
            if own is not None:
                return own
            return conv_alpha if target.is_wide_conv else alpha

        make = self._module_maker(arguments)
        modules = [
            make(target, module_rank, alpha_of(target), split_rows=_split(rules, target, arguments))
            for target, module_rank in ranks
        ]
        return self.network_class(rules, arguments, *_by_model(modules))

    def network_of_tensors(
        self, models: Models, arguments: Arguments, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> tuple[LoRANetwork, dict[str, Tensor], LoadInfo]:
        rules = models.rules
        targets = _all_targets(models)
        found, unexpected = read_modules(tensors, targets, rules, metadata)
        if not found:
            raise UserError(f"none of the {len(tensors)} tensors belongs to a LoRA module of this model.")
        make = self._module_maker(arguments)
        modules = [
            _module_of_file(make, target, found[target.name], _split(rules, target, arguments))
            for target in targets
            if target.name in found
        ]
        network = self.network_class(rules, arguments, *_by_model(modules))
        return network, state_dict_of(found), LoadInfo([], unexpected)

    def _ranks(self, models: Models, arguments: Arguments, default_rank: int) -> list[tuple[Target, int]]:
        """The modules to train with their ranks.

        For each, the last of these that speaks: --network_dim (conv_dim), the rules' own, the last matching pattern
        of network_reg_dims. None of them brings back a block that the block selection leaves out.
        """
        rules, encoders, unet = models
        with_conv = rules.with_conv(arguments)
        patterns = arguments["network_reg_dims"]

        def rank_of(target: Target, default: int) -> int:
            index = last_match(patterns, target.name)
            return default if index is None else patterns[index][1]

        def default_of(target: Target) -> int:
            return (arguments["conv_dim"] or 0) if target.is_wide_conv else default_rank

        chosen: list[tuple[Target, int]] = []
        for index, (encoder, table) in enumerate(zip(encoders, rules.text_encoders)):
            if encoder is not None and rules.text_encoder_is_trained(index, arguments):
                for target in find_targets(encoder, table, with_conv):
                    chosen.append((target, rank_of(target, default_of(target))))
        targets = find_targets(unet, rules.transformer, with_conv)
        if not targets:
            raise UserError(f"{self.module} does not fit this model: {type(unet).__name__} has none of its modules.")
        selected = rules.selected(targets, arguments) if rules.selected else {target.name for target in targets}
        for target in targets:
            own = rules.rank(target, arguments)
            if target.name in selected:
                chosen.append((target, rank_of(target, default_of(target) if own is None else own)))
        extra = rules.extra_layers(arguments)
        for path, layers in find_layers(unet, rules.transformer, extra).items():
            chosen += [(target, rank_of(target, extra[path])) for target in layers if extra[path]]
        _warn_of_idle_patterns(arguments, [target.name for target, _ in chosen])
        chosen = [(target, rank) for target, rank in chosen if rank]
        _warn_of_idle_conv_arguments(arguments, [target for target, _ in chosen])
        return chosen

    def _module_maker(self, arguments: Arguments) -> Callable[..., LoRAModule]:
        regularisation = Regularisation(
            arguments["dropout"] or 0.0,
            arguments["rank_dropout"] or 0.0,
            arguments["module_dropout"] or 0.0,
            arguments["ggpo_sigma"],
            arguments["ggpo_beta"],
        )
        return partial(self.module_class, regularisation=regularisation, **self.module_settings(arguments))


def _split(rules: Rules, target: Target, arguments: Arguments) -> list[int] | None:
    """Rows of the parts of a module that are to be trained separately."""
    return rules.split(target) if arguments["split_qkv"] else None


def _module_of_file(
    make: Callable[..., LoRAModule], target: Target, weights: LoRAWeights, split: list[int] | None
) -> LoRAModule:
    parts = len(split or [0])
    rank = len(weights.down)
    if rank % parts:
        raise UserError(f"{target.name} has rank {rank}, which split_qkv cannot divide into {parts} parts.")
    module = make(target, rank // parts, None, split_rows=split, initialise=False)
    module.set_file_weights(weights)
    return module


def _all_targets(models: Models) -> list[Target]:
    rules, encoders, unet = models
    targets: list[Target] = []
    for encoder, table in zip(encoders, rules.text_encoders):
        targets += find_targets(encoder, table, with_conv=True) if encoder is not None else []
    targets += find_targets(unet, rules.transformer, with_conv=True)
    for layers in find_layers(unet, rules.transformer, rules.known_extra_layers).values():
        targets += layers
    return targets


def _warn_of_idle_patterns(arguments: Arguments, names: Sequence[str]) -> None:
    for argument in ("network_reg_dims", "network_reg_lrs"):
        for pattern, _ in arguments[argument] or []:
            if not any(pattern.search(name) for name in names):
                warn(f'--network_args: the pattern "{pattern.pattern}" of {argument} matches no trained module')


def _warn_of_idle_conv_arguments(arguments: Arguments, targets: Sequence[Target]) -> None:
    given = [name for name, value in arguments.items() if name.startswith("conv_") and value is not None]
    if given and not any(target.is_wide_conv for target in targets):
        warn(f"--network_args: no wide convolution is trained, so {', '.join(given)} have no effect")


def _by_model(modules: Sequence[LoRAModule]) -> tuple[list[LoRAModule], list[LoRAModule]]:
    text = [module for module in modules if module.target.table.is_text_encoder]
    return text, [module for module in modules if not module.target.table.is_text_encoder]
