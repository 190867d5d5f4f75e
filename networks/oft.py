"""OFT for Stable Diffusion: orthogonal matrices that turn the outputs of the U-Net's layers.

A layer's outputs are cut into ``network_dim`` blocks, each turned by a matrix of its own, which keeps its length. For
a trained B, Q = B - B^T is skew and its Cayley transform R = (I + Q)(I - Q)^-1 orthogonal; the weight becomes R^T W.
``network_alpha`` times the number of outputs limits the norm of all of a module's Q (COFT).

Files are those of kohya-ss/sd-scripts' ``networks.oft``: ``oft_unet_...``, with the layers' names as for LoRA, and the
keys ``oft_blocks`` [blocks, size, size] and ``alpha``. Text encoders are not trained. https://arxiv.org/abs/2306.07280
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.console import say, warn
from library.errors import UserError
from library.memory.fp8 import write_weight
from networks.adapter_module import AdapterModule, as_float32
from networks.adapter_network import AdapterNetwork, LoadInfo
from networks.lora import UNET, family_of
from networks.lora_arguments import COMMON_ARGUMENTS, flag, parse_arguments, unavailable
from networks.lora_creation import TextEncoders
from networks.lora_file import read_file
from networks.lora_targets import Family, Target, find_targets

MODULE = "networks.oft"
DEFAULT_BLOCKS = 4
DEFAULT_CONSTRAINT = 1e-3
TINY = 1e-8  # keeps the quotient of norms finite where Q is zero

ATTENTION = replace(UNET, prefix="oft_unet", classes=("Attention",))
ALL_LINEAR = replace(UNET, prefix="oft_unet")
NOT_FOR_OFT = unavailable("OFT has no low-rank product that it could act on.")
ARGUMENTS = {
    **{name: NOT_FOR_OFT for name in COMMON_ARGUMENTS if name not in ("network_reg_lrs", "verbose")},
    "enable_all_linear": flag,
    "enable_conv": flag,
}


class OFTModule(AdapterModule):
    """y = R (layer(x) - bias) + bias, in blocks of the outputs; ``oft_blocks`` starts at zero, R at identity.

    With a multiplier m, R is I + m (R - I), as other programs take it.
    """

    def __init__(self, target: Target, blocks: int, constraint: float, multiplier: float = 1.0) -> None:
        """Raises UserError unless ``blocks`` divides the layer's outputs."""
        super().__init__(target, multiplier)
        self.lora_dim = blocks
        self.alpha = as_float32(constraint)
        layer = target.module
        self.outputs = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
        if self.outputs % blocks:
            raise UserError(
                f"{self.lora_name} has {self.outputs} outputs, which --network_dim={blocks} blocks cannot share evenly."
            )
        size = self.outputs // blocks
        self.oft_blocks = nn.Parameter(torch.zeros(blocks, size, size))

    def turn(self) -> Tensor:
        """R - I of each block [blocks, size, size] in float32 at least; a row of outputs times it is their change."""
        blocks = self.oft_blocks.to(torch.promote_types(self.oft_blocks.dtype, torch.float32))
        skew = blocks - blocks.transpose(1, 2)
        norm = skew.norm()
        skew = skew * ((norm.clamp(max=self.alpha * self.outputs) + TINY) / (norm + TINY))
        identity = torch.eye(skew.shape[1], dtype=skew.dtype, device=skew.device)
        with torch.autocast(skew.device.type, enabled=False):
            return torch.linalg.solve(identity - skew, 2 * skew)  # (I + Q)(I - Q)^-1 - I

    def forward(self, x: Tensor) -> Tensor:
        y = self.org_forward(x)
        if self.is_idle:
            return y
        layer = self.org_module
        unbiased = y if layer.bias is None else y - self._channels(layer.bias.to(y.dtype))
        change = self._change(unbiased, self.turn(), 1 if isinstance(layer, nn.Conv2d) else y.dim() - 1)
        multipliers = self.multipliers_of(len(y), y.device)
        strength = self.multiplier if multipliers is None else multipliers.view(-1, *(1 for _ in y.shape[1:]))
        return y + (strength * change).to(y.dtype)

    def _channels(self, values: Tensor) -> Tensor:
        """Values of the outputs in a shape that is added to them."""
        return values.view(-1, 1, 1) if isinstance(self.org_module, nn.Conv2d) else values

    def _change(self, outputs: Tensor, turn: Tensor, dimension: int) -> Tensor:
        """What ``turn`` adds to ``outputs``, whose blocks lie side by side in ``dimension``."""
        blocks = outputs.movedim(dimension, -1).unflatten(-1, turn.shape[:2])
        with torch.autocast(outputs.device.type, enabled=False):
            changes = torch.einsum("...bi,bij->...bj", blocks, turn.to(blocks.dtype))
        return changes.flatten(-2).movedim(-1, dimension)

    @torch.no_grad()
    def merge(self, device: torch.device | str | None = None) -> None:
        """Turn the rows of the layer's weight: computed in float32 on ``device``, kept in the weight's own dtype."""
        weight = self.org_module.weight
        device = weight.device if device is None else device
        rows = weight.to(device, torch.float32)
        change = self._change(rows, self.turn().to(device, torch.float32), 0)
        write_weight(self.org_module, rows + float(self.multiplier) * change)


class OFTNetwork(AdapterNetwork[OFTModule]):
    """All OFT modules of one training run or file."""

    def file_tensors(self, loras: Iterable[OFTModule], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Blocks and constraint of each module."""
        tensors: dict[str, Tensor] = {}
        for module in loras:
            tensors[f"{module.lora_name}.alpha"] = torch.tensor(module.alpha, dtype=torch.float32)
            tensors[f"{module.lora_name}.oft_blocks"] = module.oft_blocks.detach()
        return {key: tensor.to("cpu", dtype).contiguous() for key, tensor in tensors.items()}

    def take_tensors(self, tensors: Mapping[str, Tensor]) -> LoadInfo:
        """Take over tensors under the names of these files."""
        missing, unexpected = [], set(tensors)
        for module in self.loras:
            key, alpha = f"{module.lora_name}.oft_blocks", f"{module.lora_name}.alpha"
            if key not in tensors:
                missing.append(key)
                continue
            if tensors[key].shape != module.oft_blocks.shape:
                raise UserError(
                    f"{key} has the shape {list(tensors[key].shape)} where the network needs"
                    f" {list(module.oft_blocks.shape)}; set --network_dim {len(tensors[key])}, or use"
                    " --dim_from_weights."
                )
            with torch.no_grad():
                module.oft_blocks.copy_(tensors[key])
            module.alpha = as_float32(float(tensors[alpha])) if alpha in tensors else module.alpha
            unexpected -= {key, alpha}
        if len(missing) == len(self.loras):
            raise UserError(f"none of the {len(tensors)} tensors belongs to an OFT module of this network.")
        return LoadInfo(missing, sorted(unexpected))


def check_network_args(network_args: Mapping[str, str]) -> None:
    """Refuse wrong arguments before a model is loaded. Raises UserError."""
    parse_arguments(network_args, ARGUMENTS, MODULE)


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: TextEncoders,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> OFTNetwork:
    """A new network for a Stable Diffusion U-Net: its attention layers, or those that the arguments add.

    ``network_dim``: blocks in each layer (None: 4); ``network_alpha``: the constraint (None: 0.001). Raises UserError
    for a wrong argument, a constraint of 0 or less, and a number of blocks that a layer's outputs cannot share.
    """
    blocks = DEFAULT_BLOCKS if network_dim is None else int(network_dim)
    constraint = DEFAULT_CONSTRAINT if network_alpha is None else float(network_alpha)
    if blocks < 1 or constraint <= 0:
        raise UserError(
            f"{MODULE} needs --network_dim of at least 1 and --network_alpha above 0, not {blocks} and {constraint:g}."
        )
    if neuron_dropout:
        network_args["dropout"] = neuron_dropout
    arguments = parse_arguments(network_args, ARGUMENTS, MODULE)
    table = ALL_LINEAR if arguments["enable_all_linear"] else ATTENTION
    rules, tree = family_of(unet, text_encoder, MODULE)
    targets = find_targets(tree, table, with_conv=bool(arguments["enable_conv"]))
    modules = [OFTModule(target, blocks, constraint, multiplier) for target in targets]
    return _network(rules, arguments, modules, multiplier)


def create_network_from_weights(
    multiplier: float,
    file: str | Path | None,
    vae: Any,
    text_encoder: TextEncoders,
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> tuple[OFTNetwork, dict[str, Tensor]]:
    """The network that a file (or its tensors ``weights_sd``) holds. Raises UserError when nothing in it fits."""
    if neuron_dropout:
        network_args["dropout"] = neuron_dropout
    arguments = parse_arguments(network_args, ARGUMENTS, MODULE)
    if arguments["enable_all_linear"] or arguments["enable_conv"]:
        warn("--network_args: modules are those of the file; enable_all_linear and enable_conv have no effect")
    if weights_sd is None:
        if file is None:
            raise ValueError("either a file or its tensors must be given")
        weights_sd = read_file(file)[0]
    source = "the given weights" if file is None else str(file)
    rules, tree = family_of(unet, text_encoder, MODULE)
    found = {key.removesuffix(".oft_blocks"): tensor for key, tensor in weights_sd.items() if "oft_blocks" in key}
    modules = [
        OFTModule(target, len(found[target.name]), DEFAULT_CONSTRAINT, multiplier)
        for target in find_targets(tree, ALL_LINEAR, with_conv=True)
        if target.name in found
    ]
    if not modules:
        raise UserError(f"{source}: none of the {len(weights_sd)} tensors belongs to an OFT module of this model.")
    network = _network(rules, arguments, modules, multiplier)
    try:
        unexpected = network.take_tensors(weights_sd).unexpected_keys
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    if unexpected:
        warn(f"{source}: {len(unexpected)} tensors fit no module here and are left out, such as {unexpected[0]}")
    if for_inference:
        network.requires_grad_(False).eval()
    return network, network.file_tensors(modules)


def _network(
    rules: Family, arguments: Mapping[str, Any], modules: Sequence[OFTModule], multiplier: float
) -> OFTNetwork:
    family = replace(rules, group=lambda target, arguments: (target.table.group, 1.0), text_encoders=())
    network = OFTNetwork(family, arguments, [], list(modules))
    network.set_multiplier(multiplier)
    size = sum(parameter.numel() for parameter in network.parameters())
    say(f"OFT with {len(modules)} U-Net modules, {size:,} parameters")
    return network
