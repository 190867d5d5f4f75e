"""OFT for every model family: orthogonal matrices that turn the outputs of layers.

A layer's outputs are cut into blocks, each turned by a matrix of its own, which keeps its length. For a trained B,
Q = B - B^T is skew and its Cayley transform R = (I + Q)(I - Q)^-1 orthogonal; the weight becomes R^T W and the bias
stays. ``network_alpha`` times the number of outputs limits the norm of all Q that share a tensor (COFT).

Files are those of kohya-ss/sd-scripts: ``oft_unet_...`` with the layers' names as for LoRA, and the keys ``oft_blocks``
[blocks, size, size] and ``alpha``. Text encoders are not trained. https://arxiv.org/abs/2306.07280
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from library.console import warn
from library.errors import UserError
from networks.adapters.adapter_module import AdapterModule, as_float32
from networks.adapters.adapter_network import AdapterNetwork, LoadInfo
from networks.adapters.lora_arguments import COMMON_ARGUMENTS, flag, unavailable
from networks.adapters.lora_formats import finite_numbers, single_number
from networks.adapters.lora_targets import Arguments, Target, TargetTable, default_group, find_targets
from networks.adapters.network_kind import Models, NetworkKind

DEFAULT_BLOCKS = 4
DEFAULT_CONSTRAINT = 1e-3
TINY = 1e-8  # keeps the quotient of norms finite where Q is zero

NOT_FOR_OFT = unavailable("OFT has no low-rank product that it could act on.")
OFT_ARGUMENTS = {
    **{name: NOT_FOR_OFT for name in COMMON_ARGUMENTS if name not in ("network_reg_lrs", "verbose")},
    "enable_all_linear": flag,
}

PartRows = Callable[[Target], Sequence[int] | None]


def one_tensor(target: Target) -> Sequence[int] | None:
    """No parts: the layer's blocks are one tensor."""
    return None


class OFTModule(AdapterModule):
    """y = R (layer(x) - bias) + bias, in blocks of the outputs; ``oft_blocks`` start at zero, R at identity.

    With a multiplier m, R is I + m (R - I), as other programs take it.
    """

    def __init__(
        self,
        target: Target,
        blocks: int,
        constraint: float,
        multiplier: float = 1.0,
        part_rows: Sequence[int] | None = None,
    ) -> None:
        """``part_rows``: outputs of the layer's parts (q, k, v, ...). Each has ``blocks`` blocks in a tensor of its
        own, ``oft_blocks.0`` and so on; with None the only tensor is ``oft_blocks``.

        Raises UserError unless ``blocks`` divides the outputs of every part.
        """
        super().__init__(target, multiplier)
        self.lora_dim = blocks
        self.alpha = as_float32(constraint)
        layer = target.module
        outputs = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
        self.part_rows = list(part_rows or [outputs])
        if sum(self.part_rows) != outputs:
            raise ValueError(f"{self.lora_name}: parts {self.part_rows} don't add up to {outputs} outputs")
        for rows in self.part_rows:
            if rows % blocks:
                raise UserError(
                    f"{self.lora_name} has {rows} outputs, which --network_dim={blocks} blocks cannot share evenly."
                )
        tensors = [nn.Parameter(torch.zeros(blocks, rows // blocks, rows // blocks)) for rows in self.part_rows]
        self.oft_blocks: nn.Parameter | nn.ParameterList
        self.oft_blocks = tensors[0] if part_rows is None else nn.ParameterList(tensors)

    def turns(self) -> list[Tensor]:
        """R - I of each block, [blocks, size, size] for each part, in float32 at least.

        A row of outputs times it is their change.
        """
        return [self._turn(blocks, rows) for blocks, rows in zip(self.parameters(), self.part_rows)]

    def _turn(self, blocks: Tensor, rows: int) -> Tensor:
        blocks = blocks.to(torch.promote_types(blocks.dtype, torch.float32))
        skew = blocks - blocks.transpose(1, 2)
        norm = skew.norm()
        skew = skew * ((norm.clamp(max=self.alpha * rows) + TINY) / (norm + TINY))
        identity = torch.eye(skew.shape[1], dtype=skew.dtype, device=skew.device)
        with torch.autocast(skew.device.type, enabled=False):
            return torch.linalg.solve(identity - skew, 2 * skew)  # (I + Q)(I - Q)^-1 - I

    def forward(self, x: Tensor) -> Tensor:
        y = self.org_forward(x)
        if self.is_idle:
            return y
        layer = self.org_module
        unbiased = y if layer.bias is None else y - self._channels(layer.bias.to(y.dtype))
        change = self._change(unbiased, 1 if isinstance(layer, nn.Conv2d) else y.dim() - 1)
        multipliers = self.multipliers_of(len(y), y.device)
        strength = self.multiplier if multipliers is None else multipliers.view(-1, *(1 for _ in y.shape[1:]))
        return y + (strength * change).to(y.dtype)

    def _channels(self, values: Tensor) -> Tensor:
        """Values of the outputs in a shape that is added to them."""
        return values.view(-1, 1, 1) if isinstance(self.org_module, nn.Conv2d) else values

    def _change(self, outputs: Tensor, dimension: int) -> Tensor:
        """What the turns add to ``outputs``, which lie side by side in ``dimension``."""
        parts = outputs.movedim(dimension, -1).split(self.part_rows, dim=-1)
        changes = []
        with torch.autocast(outputs.device.type, enabled=False):
            for part, turn in zip(parts, self.turns()):
                blocks = part.unflatten(-1, turn.shape[:2])
                changes.append(torch.einsum("...bi,bij->...bj", blocks, turn.to(blocks)).flatten(-2))
        joined = changes[0] if len(changes) == 1 else torch.cat(changes, dim=-1)
        return joined.movedim(-1, dimension)

    @torch.no_grad()
    def changed(self, weight: Tensor) -> Tensor:
        """The weight with its rows turned."""
        return weight + float(self.multiplier) * self._change(weight, 0)


class OFTNetwork(AdapterNetwork[OFTModule]):
    """All OFT modules of one training run or file."""

    @property
    def summary(self) -> str:
        """How many modules, and their size."""
        size = sum(parameter.numel() for parameter in self.parameters())
        return f"OFT with {len(self.loras)} {self.rules.model_name} modules, {size:,} parameters"

    def file_tensors(self, loras: Iterable[OFTModule], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Blocks and constraint of each module."""
        tensors: dict[str, Tensor] = {}
        for module in loras:
            tensors[f"{module.lora_name}.alpha"] = torch.tensor(module.alpha, dtype=torch.float32)
            for name, parameter in module.named_parameters():
                tensors[f"{module.lora_name}.{name}"] = parameter.detach()
        return {key: tensor.to("cpu", dtype).contiguous() for key, tensor in tensors.items()}

    def take_tensors(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> LoadInfo:
        """Take over tensors under the names of these files."""
        missing, unexpected, found = [], set(tensors), 0
        for module in self.loras:
            alpha = f"{module.lora_name}.alpha"
            module.alpha = as_float32(single_number(alpha, tensors[alpha])) if alpha in tensors else module.alpha
            unexpected.discard(alpha)
            for name, parameter in module.named_parameters():
                key = f"{module.lora_name}.{name}"
                if key not in tensors:
                    missing.append(key)
                    continue
                _copy_blocks(key, finite_numbers(key, tensors[key]), parameter)
                unexpected.discard(key)
                found += 1
        if not found:
            raise UserError(f"none of the {len(tensors)} tensors belongs to an OFT module of this network.")
        return LoadInfo(missing, sorted(unexpected))


@torch.no_grad()
def _copy_blocks(key: str, given: Tensor, own: nn.Parameter) -> None:
    if given.shape == own.shape:
        own.copy_(given)
        return
    sizes = f"{key} has the shape {list(given.shape)} where the network needs {list(own.shape)}"
    if given.dim() == 3 and len(given) != len(own):
        raise UserError(f"{sizes}; set --network_dim {len(given)}, or use --dim_from_weights.")
    raise UserError(f"{sizes}; it was made for another model.")


@dataclass(frozen=True, kw_only=True)
class OFTKind(NetworkKind[OFTNetwork]):
    """OFT: ``network_dim`` blocks in each part of a layer (None: 4), constraint ``network_alpha`` (None: 0.001).

    Raises UserError for numbers that no layer can have, and for a number of blocks that its outputs cannot share.
    """

    all_linear: TargetTable
    """Every layer that can be trained, under the names in files."""
    attention: TargetTable
    """Those that are trained without ``enable_all_linear``."""
    part_rows: PartRows = one_tensor

    def new_network(
        self, models: Models, arguments: Arguments, network_dim: int | None, network_alpha: float | None
    ) -> OFTNetwork:
        blocks = DEFAULT_BLOCKS if network_dim is None else int(network_dim)
        constraint = DEFAULT_CONSTRAINT if network_alpha is None else float(network_alpha)
        if blocks < 1 or not 0 < constraint < math.inf:
            raise UserError(
                f"{self.module} needs --network_dim of at least 1 and --network_alpha above 0, not {blocks} and"
                f" {constraint:g}."
            )
        table = self.all_linear if arguments["enable_all_linear"] else self.attention
        targets = find_targets(models.unet, table, with_conv=bool(arguments.get("enable_conv")))
        if not targets:
            raise UserError(f"{self.module} does not fit this model, which has none of its modules.")
        if constraint >= 1:
            warn(
                f"--network_alpha {constraint:g} hardly limits the turns of OFT; {DEFAULT_CONSTRAINT:g} is usual, and"
                " 1 is what counts where it is not given"
            )
        return _network(models, arguments, [self._module(target, blocks, constraint) for target in targets])

    def network_of_tensors(
        self, models: Models, arguments: Arguments, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> tuple[OFTNetwork, dict[str, Tensor], LoadInfo]:
        blocks = _block_counts(tensors)
        targets = find_targets(models.unet, self.all_linear, with_conv=True)
        modules = [self._module(target, blocks[target.name]) for target in targets if target.name in blocks]
        if not modules:
            raise UserError(f"none of the {len(tensors)} tensors belongs to an OFT module of this model.")
        network = _network(models, arguments, modules)
        info = network.take_tensors(tensors)
        return network, network.file_tensors(modules), info

    def _module(self, target: Target, blocks: int, constraint: float = DEFAULT_CONSTRAINT) -> OFTModule:
        return OFTModule(target, blocks, constraint, part_rows=self.part_rows(target))


def _network(models: Models, arguments: Arguments, modules: list[OFTModule]) -> OFTNetwork:
    """Of the transformer or U-Net alone, with one learning rate."""
    return OFTNetwork(replace(models.rules, group=default_group, text_encoders=()), arguments, [], modules)


def _block_counts(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of blocks of each module. Raises UserError for blocks that are no stack of square matrices."""
    counts = {}
    for key, tensor in tensors.items():
        name, found, _ = key.partition(".oft_blocks")
        if found:
            if tensor.dim() != 3 or 0 in tensor.shape or tensor.shape[1] != tensor.shape[2]:
                raise UserError(f'"{key}" has the shape {list(tensor.shape)}, where [blocks, size, size] is needed.')
            counts[name] = len(tensor)
    return counts
