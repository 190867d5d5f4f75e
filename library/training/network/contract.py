"""The trained network: its options, how its module is found, and the calls that every network module answers.

A network module (``networks.lora_flux``, a third party's ``lycoris.kohya``) offers ``create_network`` and
``create_network_from_weights``; what they return answers ``REQUIRED_METHODS``. The contract is that of
kohya-ss/sd-scripts, so that published modules plug in. An error inside a third party's function keeps its traceback.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.checkpoints import load_tensors, open_checkpoint
from library.console import say
from library.errors import UserError
from library.families import FAMILIES, Family, network_modules
from library.lycoris import NAME as LYCORIS
from library.lycoris import LycorisModule, open_lycoris

REQUIRED_METHODS = (
    *("apply_to", "set_multiplier", "prepare_grad_etc", "on_epoch_start", "load_weights", "save_weights"),
    *("state_dict", "load_state_dict", "parameters", "train", "eval", "to"),
)
"""What training calls of every network, beside one of ``OPTIMIZER_METHODS``."""
OPTIMIZER_METHODS = ("prepare_optimizer_params_with_multiple_te_lrs", "prepare_optimizer_params")


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
    """Probability, 0 to 1, that a rank's value is dropped in a training step."""
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


def check_network_options(options: NetworkOptions, family: Family) -> None:
    """Everything about the network that can be known before models load. Raises UserError.

    ``family``: whose network modules are suggested; those of the other families are refused.
    """
    if not options.network_module:
        raise UserError(f"--network_module is missing; for {family.name} there are {', '.join(family.networks)}.")
    parse_network_args(options)
    if options.network_train_unet_only and options.network_train_text_encoder_only:
        raise UserError("--network_train_unet_only and --network_train_text_encoder_only are mutually exclusive.")
    if options.dim_from_weights and not options.network_weights:
        raise UserError("--dim_from_weights needs --network_weights.")
    if len(options.base_weights_multiplier or []) > len(options.base_weights or []):
        raise UserError("--base_weights_multiplier has more values than --base_weights has files.")
    for name in ("network_dim", "network_dropout", "scale_weight_norms"):
        value = getattr(options, name)
        if value is not None and value < 0:
            raise UserError(f"--{name} must not be negative, but is {value}.")
    given = [("--network_weights", options.network_weights)] if options.network_weights else []
    for option, path in [*given, *(("--base_weights", path) for path in options.base_weights or [])]:
        if not Path(path).is_file():
            raise UserError(f"There is no LoRA file {path}.")
        if Path(path).suffix == ".safetensors":
            open_checkpoint(path, option=option)  # its header is sound
    find_network_module(options.network_module, family)


def find_network_module(name: str, family: Family) -> None:
    """Raises UserError when no module of that name can be found, or one that is for other families than ``family``.

    Nothing is imported but the module's packages.
    """
    offered = f"for {family.name} there are {', '.join(family.networks)}"
    if name not in family.networks and name in network_modules():
        others = " and ".join(other.name for other in FAMILIES if name in other.networks)
        raise UserError(f"--network_module: {name} is for {others}; {offered}.")
    try:
        found = importlib.util.find_spec("lycoris" if name == LYCORIS else name)
    except (ImportError, ValueError):
        found = None
    if found is None:
        if name.partition(".")[0] == "lycoris":
            raise UserError(f"--network_module: {name} is not installed; install it with: pip install lycoris-lora")
        raise UserError(f'--network_module: there is no module "{name}"; {offered}.')


def import_network_module(options: NetworkOptions) -> Any:
    """The module of ``--network_module``, which may check ``--network_args`` itself (``check_network_args``).

    Raises UserError when it cannot be imported, lacks ``create_network`` or refuses its arguments.
    """
    name = options.network_module or ""
    if str(Path(__file__).parents[3]) not in sys.path:
        sys.path.insert(0, str(Path(__file__).parents[3]))
    try:
        module: Any = open_lycoris() if name == LYCORIS else importlib.import_module(name)
    except ImportError as error:
        raise UserError(f'--network_module: "{name}" cannot be imported: {error}.') from None
    if not hasattr(module, "create_network"):
        raise UserError(f'--network_module: "{name}" has no create_network; it is not a network module.')
    needing = "--dim_from_weights" if options.dim_from_weights else "--base_weights" if options.base_weights else ""
    if needing and not hasattr(module, "create_network_from_weights"):
        raise UserError(f'--network_module: "{name}" has no create_network_from_weights, which {needing} needs.')
    if hasattr(module, "check_network_args"):
        module.check_network_args(parse_network_args(options))
    return module


def without_gaps(text_encoders: Any) -> Any:
    """A list of text encoders with an empty module for each None, because third parties walk through all of them."""
    from torch import nn

    if not isinstance(text_encoders, list):
        return text_encoders
    return [nn.Module() if encoder is None else encoder for encoder in text_encoders]


def create_network(module: Any, options: NetworkOptions, vae: Any, text_encoders: Any, unet: Any) -> Any:
    """Build the network as the options ask.

    ``text_encoders``: one model or a list, as the family has it. Raises UserError when the module builds none, or one
    that lacks what this run needs.
    """
    arguments: dict[str, Any] = parse_network_args(options)
    if "dropout" not in arguments:
        arguments["dropout"] = options.network_dropout
    text_encoders = without_gaps(text_encoders)
    if options.dim_from_weights:
        network, _ = module.create_network_from_weights(
            1, options.network_weights, vae, text_encoders, unet, **arguments
        )
    else:
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
    _require_methods(network, options)
    return network


def _require_methods(network: Any, options: NetworkOptions) -> None:
    """Raises UserError that names what a third party's network lacks."""
    missing = [name for name in REQUIRED_METHODS if not hasattr(network, name)]
    if not any(hasattr(network, name) for name in OPTIMIZER_METHODS):
        missing.append(OPTIMIZER_METHODS[1])
    if missing:
        raise UserError(
            f"--network_module: the network of {options.network_module} lacks {', '.join(missing)}, which training "
            "calls; it was written for another trainer."
        )
    if options.scale_weight_norms and not hasattr(network, "apply_max_norm_regularization"):
        raise UserError(f"--scale_weight_norms does not work with {options.network_module}; leave it out.")


def merge_base_weights(module: Any, options: NetworkOptions, vae: Any, text_encoders: Any, unet: Any) -> None:
    """Merge ``--base_weights`` into the base model, each with its multiplier."""
    multipliers = list(options.base_weights_multiplier or [])
    text_encoders = without_gaps(text_encoders)
    for index, path in enumerate(options.base_weights or []):
        multiplier = multipliers[index] if index < len(multipliers) else 1.0
        network, weights = module.create_network_from_weights(
            multiplier, path, vae, text_encoders, unet, for_inference=True
        )
        if isinstance(module, LycorisModule):
            module.merge(network, multiplier)
            continue
        parameter = next(unet.parameters())
        network.merge_to(text_encoders, unet, weights, parameter.dtype, parameter.device)


def load_first_weights(network: Any, path: str) -> str:
    """Let the network take over the file of ``--network_weights``; returns what fitted, in words.

    Networks load a file leniently. Raises UserError where that would lose it in silence: nothing of it fits, other
    ranks, or another alpha: LyCORIS saves the file's, but keeps the strength that it was made with.
    """
    if Path(path).suffix == ".safetensors" and not type(network).__module__.startswith("networks."):
        load_tensors(path, finite=True)  # a third party's network would take over anything
    own = {name: tensor.clone() for name, tensor in network.state_dict().items() if name.endswith(".alpha")}
    try:
        info = network.load_weights(path)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise UserError(
            f"--network_weights: {path} holds tensors of other sizes than this network; give the --network_dim and "
            "--network_args that it was trained with, or --dim_from_weights."
        ) from error
    missing, unexpected = _incompatible_keys(info)
    if missing is None or unexpected is None:
        return str(info)
    state = network.state_dict()
    weights = {name for name in state if not name.endswith(".alpha")}
    if weights and weights <= set(missing):
        raise UserError(
            f"--network_weights: nothing in {path} fits this network; it was made for another model "
            "or a different network type."
        )
    changed = [name for name, alpha in own.items() if not _same_number(alpha, state[name])]
    if changed and type(network).__module__.startswith("lycoris."):
        raise UserError(
            f"--network_weights: {path} was trained with other alphas than this network has, such as "
            f"{state[changed[0]].item():g} in place of {own[changed[0]].item():g}; give the --network_alpha and "
            "--network_args that it was trained with, or --dim_from_weights."
        )
    parts = [
        f"{len(keys)} {meaning}, such as {keys[0]}"
        for keys, meaning in (
            (missing, "tensors of the network are not in the file"),
            (unexpected, "tensors of the file fit nowhere"),
        )
        if keys
    ]
    return "; ".join(parts) or "all tensors fit"


def _incompatible_keys(info: Any) -> tuple[list[str] | None, list[str] | None]:
    """Missing and unexpected keys from what ``load_weights`` returns; None when it doesn't say."""
    if isinstance(info, dict):
        return list(info.get("missing keys", [])), list(info.get("unexpected keys", []))
    return getattr(info, "missing_keys", None), getattr(info, "unexpected_keys", None)


def _same_number(one: Any, two: Any) -> bool:
    return abs(one.item() - two.item()) <= 1e-2 * abs(one.item())  # a file may hold it as bfloat16


def training_state(network: Any) -> dict[str, Any]:
    """The tensors from which ``restore_training_state`` continues exactly.

    A third party's ``state_dict`` may hold what its files hold (products of two parameters, for example); parameters
    and buffers are stored as they are, in its place or beside it.
    """
    return {**network.state_dict(), **dict(network.named_parameters()), **dict(network.named_buffers())}


def restore_training_state(network: Any, tensors: dict[str, Any]) -> None:
    """Take over what ``training_state`` gave. Raises KeyError or RuntimeError when it is of another network."""
    import torch

    raw = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    beside = raw.keys() - network.state_dict().keys()
    network.load_state_dict({name: tensor for name, tensor in tensors.items() if name not in beside})
    with torch.no_grad():
        for name, place in raw.items():
            place.copy_(tensors[name])


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
        if rates and len(set(rates)) > 1:
            say(f"this network has one learning rate for all text encoders: {first:g}")
        method = network.prepare_optimizer_params
        count = len(inspect.signature(method).parameters)
        result = method(first, unet_lr, learning_rate) if count >= 3 else method(first, unet_lr)
    groups, names = result if isinstance(result, tuple) else (result, None)
    if isinstance(groups, list) and not groups:
        raise UserError("every learning rate of the network is 0 or unset, so there is nothing to train.")
    return groups, names
