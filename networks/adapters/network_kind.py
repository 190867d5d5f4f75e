"""A kind of network: the functions by which trainers call a network module, written once for every family.

A user-facing module (``networks.lora_flux``, ``networks.oft``, ...) makes one object of a kind (``LoRAKind``,
``OFTKind``) from its own rules and offers the object's methods under the names of the contract of kohya-ss/sd-scripts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor, nn

from library.console import say, warn
from library.errors import UserError
from library.generation.lora_files import left_out, module_of
from networks.adapters.adapter_network import AdapterNetwork, LoadInfo
from networks.adapters.lora_arguments import LEARNING_ARGUMENTS, Parser, parse_arguments
from networks.adapters.lora_file import read_file
from networks.adapters.lora_targets import Arguments, Rules

TextEncoders = nn.Module | Sequence[nn.Module | None] | None
Network = TypeVar("Network", bound=AdapterNetwork[Any])
Fit = Callable[[nn.Module, Sequence[nn.Module | None]], tuple[Rules, nn.Module]]
"""The rules for a U-Net or transformer and its text encoders, and the tree whose paths are those of LoRA files."""


class Models(NamedTuple):
    """What a network is made for."""

    rules: Rules
    text_encoders: list[nn.Module | None]
    """In the order of the rules, None for one that isn't there."""
    unet: nn.Module
    """The U-Net or transformer, as a tree whose paths are those of LoRA files."""


def same_rules(rules: Rules) -> Fit:
    """A ``Fit`` for families whose rules do not depend on the model."""
    return lambda unet, text_encoders: (rules, unet)


@dataclass(frozen=True)
class NetworkKind(ABC, Generic[Network]):
    """What a network module is made of; a kind adds how it makes a new network and one of a file's tensors."""

    module: str
    """Name in messages, as given to --network_module."""
    fit: Fit
    arguments: Mapping[str, Parser]
    """network_args beyond the common ones: name -> parser (see ``lora_arguments``)."""
    learning_arguments: frozenset[str] = frozenset()
    """Those of ``arguments`` that also act on a network from a file: they concern learning, not which modules exist."""

    def check_network_args(self, network_args: Mapping[str, str]) -> None:
        """Refuse wrong arguments before a model is loaded. Raises UserError."""
        self._parsed(network_args, None)

    def create_network(
        self,
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: Any,
        text_encoder: TextEncoders,
        unet: nn.Module,
        neuron_dropout: float | None = None,
        **network_args: Any,
    ) -> Network:
        """A new network for a U-Net or transformer and its text encoders.

        ``text_encoder``: one model or a list in the family's order, None for one that isn't there; ``unet``: the U-Net
        or transformer. ``network_dim``, ``network_alpha``: None means the kind's default. Weights are drawn from
        torch's global generator: text encoders first, each model in its own order. Raises UserError for a wrong
        argument, and when no module would be trained.
        """
        arguments = self._parsed(network_args, neuron_dropout)
        models = self._models(text_encoder, unet)
        self.check(models, arguments)
        network = self.new_network(models, arguments, network_dim, network_alpha)
        network.set_multiplier(multiplier)
        say(network.summary)
        return network

    def create_network_from_weights(
        self,
        multiplier: float,
        file: str | Path | None,
        vae: Any,
        text_encoder: TextEncoders,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor] | None = None,
        for_inference: bool = False,
        neuron_dropout: float | None = None,
        keep: Callable[[str], bool] | None = None,
        **network_args: Any,
    ) -> tuple[Network, dict[str, Tensor]]:
        """The network that a file (or its tensors ``weights_sd``) holds, with its weights, ranks and alphas.

        With ``keep``, only those of its tensors whose key it says yes to. Returns the network and the tensors under
        this suite's own keys. Arguments that choose modules or ranks have no effect, and a warning names them. With
        ``for_inference`` nothing is trainable, and DoRA's scales act. Raises UserError when nothing in the file fits
        the models, and for DoRA without ``for_inference``.
        """
        arguments = self._parsed(network_args, neuron_dropout)
        models = self._models(text_encoder, unet)
        self.check(models, arguments)
        self._warn_of_arguments_without_effect(arguments)
        source = "the given weights" if file is None else str(file)
        metadata: dict[str, str] = {}
        if weights_sd is None:
            if file is None:
                raise ValueError("either a file or its tensors must be given")
            weights_sd, metadata = read_file(file)
        if keep is not None:
            weights_sd = {key: tensor for key, tensor in weights_sd.items() if keep(key)}
        try:
            network, tensors, info = self.network_of_tensors(models, arguments, weights_sd, metadata)
            if not for_inference:
                network.require_trainable()
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        network.set_multiplier(multiplier)
        say(network.summary)
        if info.unexpected_keys:
            warn(f"{source}: {left_out(map(module_of, info.unexpected_keys), map(module_of, weights_sd))}")
        if info.missing_keys:
            warn(
                f"{source}: {len(info.missing_keys)} tensors are not in it, so that these parts stay as they are, such "
                f"as {info.missing_keys[0]}"
            )
        if for_inference:
            network.requires_grad_(False).eval()
        return network, tensors

    def check(self, models: Models, arguments: Arguments) -> None:
        """Raises UserError where the arguments do not fit the models."""

    @abstractmethod
    def new_network(
        self, models: Models, arguments: Arguments, network_dim: int | None, network_alpha: float | None
    ) -> Network:
        """As ``create_network``, with typed arguments."""

    @abstractmethod
    def network_of_tensors(
        self, models: Models, arguments: Arguments, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> tuple[Network, dict[str, Tensor], LoadInfo]:
        """The network that a file's tensors make, the tensors that it uses, and what did not fit."""

    def _parsed(self, network_args: Mapping[str, Any], neuron_dropout: float | None) -> Arguments:
        if neuron_dropout is not None and not 0 <= neuron_dropout < 1:
            raise UserError(f"--network_dropout must be at least 0 and below 1, not {neuron_dropout:g}.")
        given = dict(network_args) if neuron_dropout is None else {**network_args, "dropout": neuron_dropout}
        return parse_arguments(given, self.arguments, self.module)

    def _models(self, text_encoder: TextEncoders, unet: nn.Module) -> Models:
        alone = text_encoder is None or isinstance(text_encoder, nn.Module)
        encoders: list[nn.Module | None] = [text_encoder] if alone else list(text_encoder)  # type: ignore
        rules, tree = self.fit(unet, encoders)
        return Models(rules, encoders, tree)

    def _warn_of_arguments_without_effect(self, arguments: Arguments) -> None:
        acting = LEARNING_ARGUMENTS | self.learning_arguments
        idle = [name for name, value in arguments.items() if name not in acting and value not in (None, False)]
        if idle:
            warn(f"--network_args: modules and ranks are those of the file; {', '.join(idle)} have no effect")
