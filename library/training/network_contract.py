"""The trained network: its options, how its module is found, and the calls that every network module answers.

A network module (``networks.lora_flux``, a third party's ``lycoris.kohya``) offers ``create_network`` and
``create_network_from_weights``; what they return is used only through the functions here. The contract is that of
kohya-ss/sd-scripts, so that published modules plug in.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import UserError


@dataclass
class NetworkOptions:
    """Network"""

    network_module: str | None = None
    """Python module of the network to train, for example networks.lora_flux."""
    network_dim: int | None = None
    """Rank of the network; unset means the module's own default."""
    network_alpha: float = 1
    """Scale of the network: its effect is multiplied by alpha / rank."""
    network_dropout: float | None = None
    """Chance, 0 to 1, that a rank's value is dropped in a training step."""
    network_args: list[str] | None = None
    """Further settings of the network module, key=value each."""
    network_weights: str | None = None
    """LoRA file whose weights the training starts with."""
    dim_from_weights: bool = False
    """Take the ranks from the file of --network_weights."""
    network_train_unet_only: bool = False
    """Train only the U-Net or transformer part."""
    network_train_text_encoder_only: bool = False
    """Train only the text encoder part."""
    scale_weight_norms: float | None = None
    """Largest norm of a module's weights; larger ones are scaled down after each step."""
    base_weights: list[str] | None = None
    """LoRA files that are merged into the base model before training."""
    base_weights_multiplier: list[float] | None = None
    """Strength of each of --base_weights; 1.0 where missing."""


def parse_network_args(options: NetworkOptions) -> dict[str, str]:
    """``--network_args`` as a dictionary. Raises UserError for an entry without ``=``."""
    arguments = {}
    for entry in options.network_args or []:
        key, equals, value = entry.partition("=")
        if not equals:
            raise UserError(f'--network_args: "{entry}" must have the form key=value.')
        arguments[key.strip()] = value
    return arguments


def check_network_options(options: NetworkOptions) -> None:
    """Everything about the network that can be known before models load. Raises UserError."""
    if not options.network_module:
        raise UserError("--network_module is missing; for a LoRA name one like networks.lora_flux.")
    parse_network_args(options)
    if options.network_train_unet_only and options.network_train_text_encoder_only:
        raise UserError("--network_train_unet_only and --network_train_text_encoder_only exclude each other.")
    if options.dim_from_weights and not options.network_weights:
        raise UserError("--dim_from_weights needs --network_weights.")
    if len(options.base_weights_multiplier or []) > len(options.base_weights or []):
        raise UserError("--base_weights_multiplier has more values than --base_weights has files.")
    for name in ("network_dim", "network_dropout", "scale_weight_norms"):
        value = getattr(options, name)
        if value is not None and value < 0:
            raise UserError(f"--{name} must not be negative, but is {value}.")
    for path in [options.network_weights, *(options.base_weights or [])]:
        if path and not Path(path).is_file():
            raise UserError(f"There is no LoRA file {path}.")
    find_network_module(options.network_module)


def find_network_module(name: str) -> None:
    """Raises UserError when no module of that name can be found; nothing is imported but its packages."""
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise UserError(f'--network_module: there is no module "{name}"; this suite has {", ".join(own_modules())}.')


def own_modules() -> list[str]:
    """The network modules of this suite."""
    folder = Path(__file__).parents[2] / "networks"
    return sorted(
        f"networks.{path.stem}"
        for path in folder.glob("*.py")
        if re.search(r"^def create_network\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    )


def import_network_module(options: NetworkOptions) -> Any:
    """The module of ``--network_module``, which may check ``--network_args`` itself (``check_network_args``).

    Raises UserError when it cannot be imported, lacks ``create_network`` or refuses its arguments.
    """
    name = options.network_module or ""
    if str(Path(__file__).parents[2]) not in sys.path:
        sys.path.insert(0, str(Path(__file__).parents[2]))
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f'--network_module: "{name}" cannot be imported: {error}.') from None
    if not hasattr(module, "create_network"):
        raise UserError(f'--network_module: "{name}" has no create_network; it is not a network module.')
    if hasattr(module, "check_network_args"):
        module.check_network_args(parse_network_args(options))
    return module


def create_network(module: Any, options: NetworkOptions, vae: Any, text_encoders: Any, unet: Any) -> Any:
    """Build the network as the options ask. Raises UserError when the module builds none."""
    arguments: dict[str, Any] = parse_network_args(options)
    if "dropout" not in arguments:
        arguments["dropout"] = options.network_dropout
    if options.dim_from_weights:
        network, _ = module.create_network_from_weights(
            1, options.network_weights, vae, text_encoders, unet, **arguments
        )
        return network
    network = module.create_network(
        1.0,
        options.network_dim,
        options.network_alpha,
        vae,
        text_encoders,
        unet,
        neuron_dropout=options.network_dropout,
        **arguments,
    )
    if network is None:
        raise UserError(f"--network_module: {options.network_module} built no network with these settings.")
    return network


def merge_base_weights(module: Any, options: NetworkOptions, vae: Any, text_encoders: Any, unet: Any) -> None:
    """Merge ``--base_weights`` into the base model, each with its multiplier."""
    multipliers = list(options.base_weights_multiplier or [])
    for index, path in enumerate(options.base_weights or []):
        multiplier = multipliers[index] if index < len(multipliers) else 1.0
        network, weights = module.create_network_from_weights(
            multiplier, path, vae, text_encoders, unet, for_inference=True
        )
        parameter = next(unet.parameters())
        network.merge_to(text_encoders, unet, weights, parameter.dtype, parameter.device)


def optimizer_groups(
    network: Any, text_encoder_lrs: list[float] | None, unet_lr: float | None, learning_rate: float
) -> tuple[Any, list[str] | None]:
    """Parameter groups and their descriptions (None when the module gives none).

    Modules differ in which of the two methods they have and in how many arguments it takes; the signature decides, so
    that an error raised inside the method is not hidden.
    """
    rates = text_encoder_lrs or None
    if hasattr(network, "prepare_optimizer_params_with_multiple_te_lrs"):
        result = network.prepare_optimizer_params_with_multiple_te_lrs(rates, unet_lr, learning_rate)
    else:
        first = rates[0] if rates else None
        method = network.prepare_optimizer_params
        count = len(inspect.signature(method).parameters)
        result = method(first, unet_lr, learning_rate) if count >= 3 else method(first, unet_lr)
    return result if isinstance(result, tuple) else (result, None)
