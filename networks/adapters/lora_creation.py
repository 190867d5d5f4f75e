"""Building the network of a family for the models at hand: from arguments, or from a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.console import say, warn
from library.errors import UserError
from networks.adapters.lora_arguments import LEARNING_ARGUMENTS, last_match, parse_arguments
from networks.adapters.lora_core import LoRANetwork
from networks.adapters.lora_file import LoRAWeights, read_file, state_dict_of
from networks.adapters.lora_formats import read_modules
from networks.adapters.lora_module import LoRAModule, Regularisation
from networks.adapters.lora_targets import Arguments, Family, Target, find_layers, find_targets

DEFAULT_RANK = 4
DEFAULT_ALPHA = 1.0

TextEncoders = nn.Module | Sequence[nn.Module | None] | None


def build_network(
    family: Family,
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    text_encoder: TextEncoders,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    *,
    network_class: type[LoRANetwork] = LoRANetwork,
    module_class: Callable[..., LoRAModule] = LoRAModule,
    **given: Any,
) -> LoRANetwork:
    """A new network: rank ``network_dim`` (None: 4), alpha ``network_alpha`` (None: 1, 0: the rank).

    ``text_encoder``: one model or a list in the family's order, None for one that isn't there. ``given``: network_args.
    The two classes are those of a kind of LoRA that differs from the plain one. Weights are drawn from torch's global
    generator: text encoders first, each model in its own order. Raises UserError for a wrong argument, and when no
    module would be trained.
    """
    arguments = parse_arguments(given, family.arguments, family.module)
    rank = DEFAULT_RANK if network_dim is None else int(network_dim)
    alpha = DEFAULT_ALPHA if network_alpha is None else float(network_alpha)
    if rank < 1:
        raise UserError(f"--network_dim must be at least 1, not {rank}.")
    if not 0 <= alpha < math.inf:
        raise UserError(f"--network_alpha must be a number, 0 or more, not {alpha:g}.")
    family.check(arguments, unet)
    ranks = _ranks(family, arguments, rank, _encoders(text_encoder), unet)
    if not ranks:
        raise UserError("--network_args leave no module to train; every rank is 0 or every block is left out.")
    conv_alpha = DEFAULT_ALPHA if arguments["conv_alpha"] is None else arguments["conv_alpha"]

    def alpha_of(target: Target) -> float:
        own = family.alpha(target, arguments)
        if own is not None:
            return own
        return conv_alpha if target.is_wide_conv else alpha

    regularisation = _regularisation(arguments, neuron_dropout)
    modules = [
        module_class(
            target,
            module_rank,
            alpha_of(target),
            multiplier,
            regularisation,
            family.split(target) if arguments["split_qkv"] else None,
        )
        for target, module_rank in ranks
    ]
    return _network(network_class(family, arguments, *_by_model(modules)), multiplier)


def build_network_from_weights(
    family: Family,
    multiplier: float,
    file: str | Path | None,
    text_encoder: TextEncoders,
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    neuron_dropout: float | None = None,
    *,
    network_class: type[LoRANetwork] = LoRANetwork,
    module_class: Callable[..., LoRAModule] = LoRAModule,
    **given: Any,
) -> tuple[LoRANetwork, dict[str, Tensor]]:
    """The network that a file (or its tensors ``weights_sd``) holds, with its weights, ranks and alphas.

    Every key form that ``lora_formats`` knows is read. Returns the network and the tensors under this suite's own keys.
    Arguments that choose modules or ranks have no effect, which is said. With ``for_inference`` nothing is trainable.
    Raises UserError when nothing in the file fits the models.
    """
    arguments = parse_arguments(given, family.arguments, family.module)
    family.check(arguments, unet)
    _warn_of_arguments_without_effect(family, arguments)
    source = "the given weights" if file is None else str(file)
    metadata: dict[str, str] = {}
    if weights_sd is None:
        if file is None:
            raise ValueError("either a file or its tensors must be given")
        weights_sd, metadata = read_file(file)
    targets = _all_targets(family, _encoders(text_encoder), unet)
    try:
        found, unexpected = read_modules(weights_sd, targets, family, metadata)
        if not found:
            raise UserError(f"none of the {len(weights_sd)} tensors belongs to a LoRA module of this model.")
        modules = [
            _module_of(module_class, target, found[target.name], multiplier, family, arguments, neuron_dropout)
            for target in targets
            if target.name in found
        ]
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    if unexpected:
        warn(f"{source}: {len(unexpected)} tensors fit no module here and are left out, such as {unexpected[0]}")
    network = _network(network_class(family, arguments, *_by_model(modules)), multiplier)
    if for_inference:
        network.requires_grad_(False).eval()
    return network, state_dict_of(found)


def _module_of(
    module_class: Callable[..., LoRAModule],
    target: Target,
    weights: LoRAWeights,
    multiplier: float,
    family: Family,
    arguments: Arguments,
    neuron_dropout: float | None,
) -> LoRAModule:
    split = family.split(target) if arguments["split_qkv"] else None
    parts = len(split or [0])
    rank = len(weights.down)
    if rank % parts:
        raise UserError(f"{target.name} has rank {rank}, which split_qkv cannot divide into {parts} parts.")
    regularisation = _regularisation(arguments, neuron_dropout)
    module = module_class(target, rank // parts, None, multiplier, regularisation, split, initialise=False)
    module.set_file_weights(weights)
    return module


def _encoders(text_encoder: TextEncoders) -> list[nn.Module | None]:
    if text_encoder is None or isinstance(text_encoder, nn.Module):
        return [text_encoder]
    return list(text_encoder)


def _ranks(
    family: Family, arguments: Arguments, default_rank: int, encoders: Sequence[nn.Module | None], unet: nn.Module
) -> list[tuple[Target, int]]:
    """The modules to train with their ranks.

    For each, the last of these that speaks: --network_dim (conv_dim), the family's own rule, the last matching pattern
    of network_reg_dims. None of them brings back a block that the block selection leaves out.
    """
    with_conv = family.with_conv(arguments)
    patterns = arguments["network_reg_dims"]

    def rank_of(target: Target, default: int) -> int:
        index = last_match(patterns, target.name)
        return default if index is None else patterns[index][1]

    def default_of(target: Target) -> int:
        return (arguments["conv_dim"] or 0) if target.is_wide_conv else default_rank

    chosen: list[tuple[Target, int]] = []
    for index, (encoder, table) in enumerate(zip(encoders, family.text_encoders)):
        if encoder is not None and family.text_encoder_is_trained(index, arguments):
            for target in find_targets(encoder, table, with_conv):
                chosen.append((target, rank_of(target, default_of(target))))
    targets = find_targets(unet, family.transformer, with_conv)
    if not targets:
        raise UserError(f"{family.module} does not fit this model: {type(unet).__name__} has none of its modules.")
    selected = family.selected(targets, arguments) if family.selected else {target.name for target in targets}
    for target in targets:
        own = family.rank(target, arguments)
        if target.name in selected:
            chosen.append((target, rank_of(target, default_of(target) if own is None else own)))
    extra = family.extra_layers(arguments)
    for path, layers in find_layers(unet, family.transformer, extra).items():
        chosen += [(target, rank_of(target, extra[path])) for target in layers if extra[path]]
    _warn_of_idle_patterns(arguments, [target.name for target, _ in chosen])
    chosen = [(target, rank) for target, rank in chosen if rank]
    _warn_of_idle_conv_arguments(arguments, [target for target, _ in chosen])
    return chosen


def _all_targets(family: Family, encoders: Sequence[nn.Module | None], unet: nn.Module) -> list[Target]:
    targets: list[Target] = []
    for encoder, table in zip(encoders, family.text_encoders):
        targets += find_targets(encoder, table, with_conv=True) if encoder is not None else []
    targets += find_targets(unet, family.transformer, with_conv=True)
    for layers in find_layers(unet, family.transformer, family.known_extra_layers).values():
        targets += layers
    return targets


def _regularisation(arguments: Arguments, neuron_dropout: float | None) -> Regularisation:
    dropout = arguments["dropout"] if neuron_dropout is None else float(neuron_dropout)
    if dropout is not None and not 0 <= dropout < 1:
        raise UserError(f"--network_dropout must be at least 0 and below 1, not {dropout:g}.")
    return Regularisation(
        dropout or 0.0,
        arguments["rank_dropout"] or 0.0,
        arguments["module_dropout"] or 0.0,
        arguments["ggpo_sigma"],
        arguments["ggpo_beta"],
    )


def _warn_of_idle_patterns(arguments: Arguments, names: Sequence[str]) -> None:
    for argument in ("network_reg_dims", "network_reg_lrs"):
        for pattern, _ in arguments[argument] or []:
            if not any(pattern.search(name) for name in names):
                warn(f'--network_args: the pattern "{pattern.pattern}" of {argument} matches no trained module')


def _warn_of_idle_conv_arguments(arguments: Arguments, targets: Sequence[Target]) -> None:
    given = [name for name, value in arguments.items() if name.startswith("conv_") and value is not None]
    if given and not any(target.is_wide_conv for target in targets):
        warn(f"--network_args: no wide convolution is trained, so {', '.join(given)} have no effect")


def _warn_of_arguments_without_effect(family: Family, arguments: Arguments) -> None:
    acting = LEARNING_ARGUMENTS | family.learning_arguments
    idle = [name for name, value in arguments.items() if name not in acting and value not in (None, False)]
    if idle:
        warn(f"--network_args: modules and ranks are those of the file; {', '.join(idle)} have no effect")


def _by_model(modules: Sequence[LoRAModule]) -> tuple[list[LoRAModule], list[LoRAModule]]:
    text = [module for module in modules if module.target.table.is_text_encoder]
    return text, [module for module in modules if not module.target.table.is_text_encoder]


def _network(network: LoRANetwork, multiplier: float) -> LoRANetwork:
    network.set_multiplier(multiplier)
    ranks = sorted({module.lora_dim for module in network.loras})
    span = f"rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
    size = sum(parameter.numel() for parameter in network.parameters())
    text, unet = len(network.text_encoder_loras), len(network.unet_loras)
    model = network.family.model_name
    say(f"LoRA with {unet} {model} and {text} text encoder modules, {span}, {size:,} parameters")
    return network
