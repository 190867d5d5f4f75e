"""The trained network of a run: made, put into the base model, and placed on the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from library.console import say
from library.devices import place
from library.options import all_values
from library.training.network.contract import create_network, load_first_weights
from library.training.training_options import TrainingOptions


def build_network(module: Any, options: TrainingOptions, text_encoders: Any, base: Any, trains_text: bool) -> Any:
    """Create the network of a network module, put it into the base model, and load its first weights.

    ``text_encoders`` and ``base`` are as the module takes them; ``trains_text``: whether any text encoder is trained.
    Raises UserError when the module builds no network, or the file of ``--network_weights`` doesn't fit.
    """
    chosen = options.network
    network = create_network(module, chosen, None, text_encoders, base)
    if hasattr(network, "prepare_network"):
        network.prepare_network(SimpleNamespace(**all_values(options)))
    network.apply_to(text_encoders, base, trains_text, not chosen.network_train_text_encoder_only)
    if chosen.network_weights:
        say(f"loaded {chosen.network_weights}: {load_first_weights(network, chosen.network_weights)}")
    if options.precision.gradient_checkpointing and hasattr(network, "enable_gradient_checkpointing"):
        network.enable_gradient_checkpointing()
    return network


def place_network(network: Any, text_encoders: Any, base: Any, device: Any, dtype: Any) -> None:
    """Put the network on the device, in the dtype that it is trained in, and let its weights be trained."""
    place(network, device, dtype)
    network.prepare_grad_etc(text_encoders, base)
