"""One LoRA module: a low-rank product added to a frozen Linear or Conv2d.

LoRA: https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError
from library.memory.stored_linear import StoredLinear
from library.randomness import generator
from networks.adapters.adapter_module import AdapterModule, as_float32
from networks.adapters.lora_file import LoRAWeights, Magnitudes, decomposed
from networks.adapters.lora_targets import Target
from networks.adapters.low_rank import (
    add_low_rank,
    gradient_row_norms,
    linear_plus_low_rank,
    product_norm,
    product_row_norms,
)

NORMS = ("grad_norms", "combined_norms")
GGPO_ROWS = 1000  # rows of a weight matrix from which its mean row norm is estimated


class BareLinear(nn.Linear):
    """Left as allocated, for ``LoRAModule`` to fill: on a large model drawing every weight twice takes seconds."""

    def reset_parameters(self) -> None:
        pass


class BareConv2d(nn.Conv2d):
    """As ``BareLinear``."""

    def reset_parameters(self) -> None:
        pass


def _matrix(weight: Any) -> Tensor:
    return weight if weight.ndim == 2 else weight.flatten(1)


def _matrices(parts: Any) -> list[Tensor]:
    """The weight of each layer in a list, as a matrix. (To search for ``parameters()`` would take longer.)"""
    return [_matrix(layer.weight) for layer in parts]


@dataclass(frozen=True)
class Regularisation:
    """What happens in training only."""

    dropout: float = 0.0
    """Of the values between down and up."""
    rank_dropout: float = 0.0
    """Of whole ranks, for each item of a batch."""
    module_dropout: float = 0.0
    """Of the whole module, for one call."""
    ggpo_sigma: float | None = None
    ggpo_beta: float | None = None

    @property
    def has_ggpo(self) -> bool:
        """Whether LoRA-GGPO is on."""
        return self.ggpo_sigma is not None and self.ggpo_beta is not None


PLAIN = Regularisation()
"""None of it."""


class LoRAModule(AdapterModule):
    """y = layer(x) + multiplier * (alpha / rank) * up(down(x)) for one Linear or Conv2d.

    ``split_rows``: the rows of the layer's parts (q, k, v, ...), each of which gets a down and an up of its own rank
    ``lora_dim``. Their sum is computed as one addition with a block-diagonal up.
    """

    def __init__(
        self,
        target: Target,
        rank: int,
        alpha: float | None,
        multiplier: float = 1.0,
        regularisation: Regularisation | None = None,
        split_rows: Sequence[int] | None = None,
        initialise: bool = True,
    ) -> None:
        """``alpha`` None or 0 means ``rank``. Weights are float32 on the CPU, drawn from torch's global generator."""
        super().__init__(target, multiplier)
        self.lora_dim = rank
        self.alpha = as_float32(alpha or rank)
        self.regularisation = PLAIN if regularisation in (None, PLAIN) else regularisation
        self.split_rows = list(split_rows) if split_rows else None
        self.magnitudes: tuple[Magnitudes, ...] = ()
        """DoRA's scales, of a file that is read for images or merging."""
        self.lora_down, self.lora_up = self._make_weights()
        if initialise:
            self._initialise()
        self.weight_norm: Tensor | None = None
        self.grad_norms: Tensor | None = None
        self.combined_norms: Tensor | None = None
        if self.regularisation.has_ggpo and isinstance(self.org_module, nn.Linear):
            self._estimate_weight_norm()

    # ---- weights ----

    def _make_weights(self) -> tuple[nn.Module, nn.Module]:
        layer, rank = self.org_module, self.lora_dim
        if isinstance(layer, nn.Conv2d):
            if layer.groups != 1:
                raise ValueError(f"{self.lora_name}: grouped convolutions are not supported")
            geometry: dict[str, Any] = {
                name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
            }
            down = BareConv2d(layer.in_channels, rank, bias=False, **geometry)
            return down, BareConv2d(rank, layer.out_channels, 1, bias=False)
        if self.split_rows is None:
            return BareLinear(layer.in_features, rank, False), BareLinear(rank, layer.out_features, False)
        if sum(self.split_rows) != layer.out_features:
            raise ValueError(f"{self.lora_name}: parts {self.split_rows} don't add up to {layer.out_features} rows")
        downs = [BareLinear(layer.in_features, rank, False) for _ in self.split_rows]
        return nn.ModuleList(downs), nn.ModuleList(BareLinear(rank, rows, False) for rows in self.split_rows)

    def _initialise(self) -> None:
        for down in self.lora_down.parameters():
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        for up in self.lora_up.parameters():
            nn.init.zeros_(up)

    @property
    def parts(self) -> int:
        """Parts with a low-rank product of their own: 1, or those of ``split_rows``."""
        return 1 if self.split_rows is None else len(self.split_rows)

    @property
    def scale(self) -> float:
        """alpha / rank, without the multiplier."""
        return self.alpha / self.lora_dim

    @property
    def down_matrix(self) -> Tensor:
        """[parts * rank, in], of a convolution [rank, in * height * width]."""
        down = self.lora_down
        return _matrix(down.weight) if self.split_rows is None else torch.cat(_matrices(down))

    @property
    def up_matrix(self) -> Tensor:
        """[out, parts * rank]."""
        up = self.lora_up
        return _matrix(up.weight) if self.split_rows is None else torch.block_diag(*_matrices(up))

    def file_weights(self) -> LoRAWeights:
        """The module as files hold it: parts joined, and alpha raised with the rank so that the strength stays."""
        down, up = self.down_matrix.detach(), self.up_matrix.detach()
        if isinstance(self.org_module, nn.Conv2d):
            down, up = down.reshape(-1, *self.org_module.weight.shape[1:]), up[..., None, None]
        return LoRAWeights(down, up, self.alpha * self.parts, self.magnitudes)

    def set_file_weights(self, weights: LoRAWeights) -> None:
        """Take over what ``file_weights`` gives. Raises UserError when the shapes are others."""
        rank = weights.down.shape[0]
        if rank != self.lora_dim * self.parts:
            advice = f"set --network_dim {rank // self.parts}, or use --dim_from_weights"
            raise UserError(f"{self.lora_name}: the file has rank {rank}, the network {self.lora_dim}; {advice}.")
        mine = self.file_weights()
        for given, own in ((weights.down, mine.down), (weights.up, mine.up)):
            if given.numel() != own.numel() or given.flatten(1).shape != own.flatten(1).shape:
                raise UserError(
                    f"{self.lora_name}: the file has a tensor of shape {list(given.shape)} where this model needs"
                    f" {list(own.shape)}; it was made for another model."
                )
        with torch.no_grad():
            downs, ups = list(self.lora_down.parameters()), list(self.lora_up.parameters())
            for part, own in zip(weights.down.chunk(len(downs)), downs):
                own.copy_(part.reshape(own.shape))
            for part, own in zip(self._up_blocks(weights.up), ups):
                own.copy_(part.reshape(own.shape))
        self.alpha = as_float32(weights.alpha / self.parts)
        self.magnitudes = weights.magnitudes

    def _up_blocks(self, up: Tensor) -> Sequence[Tensor]:
        """The parts of a joined up: its diagonal blocks. Raises UserError when it isn't block-diagonal."""
        if self.split_rows is None:
            return [up]
        rows = up.split(self.split_rows)
        blocks = [part.chunk(self.parts, dim=1)[index] for index, part in enumerate(rows)]
        if torch.count_nonzero(up) != sum(torch.count_nonzero(block) for block in blocks):
            raise UserError(f"{self.lora_name}: the file was trained without split_qkv and cannot be split.")
        return blocks

    # With GGPO the norms are in state dicts too, so that a run resumes from a state as if it had not stopped.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight_norm is not None:
            nothing_yet = torch.zeros(len(self.up_matrix))
            for name in NORMS:
                value = getattr(self, name)
                destination[prefix + name] = nothing_yet if value is None else value

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: Any, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        for name in NORMS:
            value = state_dict.get(prefix + name)
            if value is not None:
                setattr(self, name, value.detach().clone() if value.any() else None)
        own = {prefix + name for name in NORMS}
        unexpected[:] = [key for key in unexpected if key not in own]

    # ---- in the model ----

    @torch.no_grad()
    def changed(self, weight: Tensor) -> Tensor:
        """The weight with the product added, which DoRA scales."""
        multiplier = float(self.multiplier)
        return weight + multiplier * self._decomposition(weight) if self.magnitudes else self._sum(weight, multiplier)

    def _sum(self, weight: Tensor, multiplier: float) -> Tensor:
        down, up = (matrix.to(weight.device, torch.float32) for matrix in (self.down_matrix, self.up_matrix))
        return weight.flatten(1).addmm(up, down, alpha=self.scale * multiplier).reshape(weight.shape)

    def _decomposition(self, weight: Tensor) -> Tensor:
        """What DoRA adds to a weight at a multiplier of 1."""
        return decomposed(self._sum(weight, 1.0), self.magnitudes) - weight

    @torch.no_grad()
    def _forward_decomposed(self, x: Tensor) -> Tensor:
        y, layer = self.org_forward(x), self.org_module
        change = self._decomposition(self.weight_below()).to(x.dtype)
        if isinstance(layer, nn.Conv2d):
            added = layer._conv_forward(x, change, None)
        else:
            added = F.linear(x, change)
        multipliers = self.multipliers_of(len(y), y.device)
        strength = self.multiplier if multipliers is None else multipliers.view(-1, *(1 for _ in y.shape[1:]))
        return y + (strength * added).to(y.dtype)

    # ---- forward ----

    def forward(self, x: Tensor) -> Tensor:
        if self.is_idle:
            return self.org_forward(x)
        if self.magnitudes:
            return self._forward_decomposed(x)
        training, settings, multiplier = self.training, self.regularisation, self.multiplier
        scale = self.scale if isinstance(multiplier, Tensor) else self.scale * multiplier
        if training and settings is not PLAIN:
            if settings.module_dropout > 0 and torch.rand(()).item() < settings.module_dropout:
                return self.org_forward(x)
            if settings.rank_dropout > 0:
                scale /= 1 - settings.rank_dropout
        layer = self.org_module
        if isinstance(layer, nn.Conv2d):
            return self._forward_conv(x, scale)
        mask = self._mask(x.shape[:-1], x.device)
        if self._is_plain_frozen_linear():
            y = linear_plus_low_rank(layer, x, self.down_matrix, self.up_matrix, scale, mask)
        else:
            y = add_low_rank(self.org_forward(x), x, self.down_matrix, self.up_matrix, scale, mask)
        if training and self.combined_norms is not None and self.grad_norms is not None:
            y = y + self._perturbation(x.detach(), y.dtype)
        return y

    def _is_plain_frozen_linear(self) -> bool:
        """Whether the layer does what nn.Linear does, so that its product and ours can be one operation."""
        layer = self.org_module
        forward = type(layer).forward
        return (
            (forward is nn.Linear.forward or forward is StoredLinear.forward)
            and getattr(self.org_forward, "__func__", None) is forward
            and (isinstance(layer, StoredLinear) or not layer.weight.requires_grad)
            and ((bias := layer.bias) is None or not bias.requires_grad)
        )

    def _forward_conv(self, x: Tensor, scale: float) -> Tensor:
        y, layer = self.org_forward(x), self.org_module
        assert isinstance(layer, nn.Conv2d)
        down, up = self._kernels()
        hidden = layer._conv_forward(x, down, None)  # with the layer's own stride, padding and dilation
        mask = self._mask((x.shape[0], *hidden.shape[2:]), x.device)
        if mask is not None:
            hidden = hidden * mask.movedim(-1, 1).to(hidden.dtype)
        return torch.add(y, F.conv2d(hidden, up).to(y.dtype), alpha=scale)

    def _kernels(self) -> tuple[Tensor, Tensor]:
        """Of a convolution: down [rank, in, height, width] and up [out, rank, 1, 1]."""
        return self.lora_down.weight, self.lora_up.weight  # type: ignore[return-value]

    def _mask(self, rows: Sequence[int], device: torch.device) -> Tensor | None:
        """Factors [*rows, parts * rank] of the values between down and up: dropouts and multipliers of single items.

        ``rows`` are the input's dimensions but the last; the first is the batch.
        """
        settings, mask = self.regularisation, None
        if settings is PLAIN and not isinstance(self.multiplier, Tensor):
            return None
        ranks = self.lora_dim * self.parts
        if self.training and settings.dropout > 0:
            mask = F.dropout(torch.ones(*rows, ranks, device=device), settings.dropout)
        per_item = (rows[0], *(1 for _ in rows[1:]), -1)
        if self.training and settings.rank_dropout > 0:
            kept = (torch.rand(rows[0], ranks, device=device) > settings.rank_dropout).float().view(per_item)
            mask = kept if mask is None else mask * kept
        multipliers = self.multipliers_of(rows[0], device)
        if multipliers is not None:
            factors = multipliers.view(*per_item[:-1], 1)
            mask = factors if mask is None else mask * factors
        return None if mask is None else mask.expand(*rows, ranks)

    # ---- norms, and the perturbation of LoRA-GGPO ----

    def _estimate_weight_norm(self) -> None:
        weight = self.org_module.weight.detach().flatten(1)
        if len(weight) > GGPO_ROWS:
            order = torch.randperm(len(weight), generator=generator(0, "ggpo rows", self.lora_name))
            weight = weight[order[:GGPO_ROWS].to(weight.device)]
        self.weight_norm = weight.float().norm(dim=1).mean()

    @torch.no_grad()
    def update_norms(self) -> None:
        """Row norms [out] of the merged weight, taken as the mean row norm of W and the exact one of up @ down."""
        if self.weight_norm is not None:
            rows = product_row_norms(self.down_matrix, self.up_matrix).float()
            self.combined_norms = (self.weight_norm.to(rows).square() + rows.square()).sqrt()

    @torch.no_grad()
    def update_grad_norms(self) -> None:
        """Row norms [out] of the gradient of the merged weight; left as they are when there is no gradient."""
        parameters = list(self.parameters())
        if self.weight_norm is None or all(parameter.grad is None for parameter in parameters):
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]  # None: not trained
        grad_downs = [grad.flatten(1) for grad in grads[: self.parts]]
        grad_ups = [grad.flatten(1) for grad in grads[self.parts :]]
        norms = gradient_row_norms(self.down_matrix, self.up_matrix, torch.cat(grad_downs), torch.block_diag(*grad_ups))
        self.grad_norms = (self.scale * norms).float()

    @torch.no_grad()
    def _perturbation(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x @ P^T with normal P whose rows are the larger, the larger the weights and the steeper the loss."""
        assert self.combined_norms is not None and self.grad_norms is not None
        settings = self.regularisation
        sigma, beta = settings.ggpo_sigma or 0.0, settings.ggpo_beta or 0.0
        deviation = sigma * self.combined_norms.to(x.device) + beta * self.grad_norms.to(x.device).square()
        deviation = deviation / math.sqrt(len(deviation))
        noise = torch.randn(len(deviation), self.down_matrix.shape[1], device=x.device, dtype=dtype)
        return F.linear(x.to(dtype), noise) * deviation.to(dtype)

    @torch.no_grad()
    def limit_norm(self, limit: float, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Shrink both matrices so that the norm of (alpha / rank) * up @ down is at most ``limit``.

        Returns that norm after shrinking and whether the module was shrunk (0-dim tensors).
        """
        norm = (self.scale * product_norm(self.down_matrix, self.up_matrix)).float()
        ratio = limit / norm.clamp(min=limit)
        for parameter in self.parameters():
            parameter.mul_(ratio.sqrt().to(parameter.dtype))
        return norm * ratio, norm > limit
