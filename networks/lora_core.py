"""The network of all LoRA modules, for every model family.

``LoRANetwork`` has the methods that the trainers and kohya-ss/sd-scripts expect of a network module. What distinguishes
the families is declared in ``lora_flux`` and its siblings (see ``lora_targets``); ``lora_creation`` builds from that.

LoRA+: https://arxiv.org/abs/2402.12354.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from library.console import say
from library.errors import UserError
from networks.lora_arguments import last_match
from networks.lora_file import FULL_STRENGTH, SPLIT_MARK, read_file, state_dict_of, write_file
from networks.lora_formats import read_modules
from networks.lora_module import NORMS, LoRAModule
from networks.lora_targets import Arguments, Family
from networks.low_rank import product_norm


class LoadInfo(NamedTuple):
    """What a file and a network did not have in common; keys as in files."""

    missing_keys: list[str]
    unexpected_keys: list[str]

    def __str__(self) -> str:
        parts = [
            f"{len(keys)} {meaning}, such as {keys[0]}"
            for keys, meaning in (
                (self.missing_keys, "tensors of the network are not in the file"),
                (self.unexpected_keys, "tensors of the file fit nowhere"),
            )
            if keys
        ]
        return "; ".join(parts) or "all tensors fit"


class LoRANetwork(nn.Module):
    """All LoRA modules of one training run or file.

    ``text_encoder_loras`` and ``unet_loras`` hold the modules by model; both are children under their names in files.
    """

    def __init__(
        self, family: Family, arguments: Arguments, text_encoder_loras: list[LoRAModule], unet_loras: list[LoRAModule]
    ) -> None:
        super().__init__()
        self.family = family
        self.arguments = arguments
        self.text_encoder_loras = text_encoder_loras
        self.unet_loras = unet_loras
        self.multiplier: float | Tensor = 1.0
        self.train_t5xxl = False
        self.backups: dict[str, Tensor] = {}
        self.frozen: set[nn.Parameter] = set()
        for lora in self.loras:
            self.add_module(lora.lora_name, lora)

    @property
    def loras(self) -> list[LoRAModule]:
        """Every module, text encoders first."""
        return self.text_encoder_loras + self.unet_loras

    # ---- entering and leaving the models ----

    def apply_to(self, text_encoder: Any, unet: Any, apply_text_encoder: bool = True, apply_unet: bool = True) -> None:
        """Put the modules into the models they were made for; those of a model that isn't wanted are dropped."""
        for wanted, loras in ((apply_text_encoder, self.text_encoder_loras), (apply_unet, self.unet_loras)):
            for lora in loras:
                if wanted:
                    lora.apply_to()
                else:
                    delattr(self, lora.lora_name)
            if not wanted:
                loras.clear()

    def remove(self) -> None:
        """Leave the models as they were before ``apply_to``."""
        for lora in self.loras:
            lora.remove()

    def set_multiplier(self, multiplier: float | Tensor) -> None:
        """Strength of the whole network: one number, or a tensor [batch] with one for each item; 0 costs nothing."""
        self.multiplier = multiplier
        for lora in self.loras:
            lora.multiplier = multiplier

    def set_enabled(self, enabled: bool) -> None:
        """Switch all modules on or off; off, the model is the base model."""
        for lora in self.loras:
            lora.enabled = enabled

    def is_mergeable(self) -> bool:
        """True: ``merge_to`` works for this kind of network."""
        return True

    def merge_to(
        self,
        text_encoder: Any,
        unet: Any,
        weights: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Add the network to the weights of its models for good.

        ``weights``: tensors of a file to use instead of the network's own. Sums are computed in float32 on ``device``
        (where the weight is, if None); each weight keeps its own dtype, whatever ``dtype`` says.
        """
        if weights is not None:
            self.load_state_dict(weights, strict=False)
        for lora in self.loras:
            lora.merge(device)

    def backup_weights(self) -> None:
        """Keep a copy of every weight that a merge would change."""
        self.backups = {lora.lora_name: lora.org_module.weight.detach().clone() for lora in self.loras}

    @torch.no_grad()
    def restore_weights(self) -> None:
        """Put back, bit for bit, what ``backup_weights`` kept, and use the modules again."""
        for lora in self.loras:
            lora.org_module.weight.copy_(self.backups[lora.lora_name])
        self.set_enabled(True)

    def pre_calculation(self) -> None:
        """Merge the network, at its present multiplier, until ``restore_weights``."""
        self.merge_to(None, None)
        self.set_enabled(False)

    # ---- training ----

    def prepare_network(self, options: Any) -> None:
        """Nothing to prepare: everything came with ``create_network``."""

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: the modules are recomputed with the blocks they are in."""

    def prepare_optimizer_params(
        self,
        text_encoder_lr: float | Sequence[float] | None = None,
        unet_lr: float | None = None,
        default_lr: float | None = None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """As ``prepare_optimizer_params_with_multiple_te_lrs``, with one learning rate for all text encoders."""
        rates = list(text_encoder_lr) if isinstance(text_encoder_lr, Sequence) else [text_encoder_lr]
        return self.prepare_optimizer_params_with_multiple_te_lrs(rates, unet_lr, default_lr)

    def prepare_optimizer_params_with_multiple_te_lrs(
        self,
        text_encoder_lr: Sequence[float | None] | float | None = None,
        unet_lr: float | None = None,
        default_lr: float | None = None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups ``{"params", "lr"}`` and a description of each.

        ``text_encoder_lr``: one rate for each text encoder, or one for all; what is None takes ``default_lr``. Modules
        whose rate comes out as 0 or None are frozen, though they stay in the network and its files.
        """
        rates = self._text_encoder_rates(text_encoder_lr)
        groups: dict[str, dict[str, Any]] = {}
        used: dict[str, float] = {}
        self.frozen.clear()
        for lora in self.loras:
            table = lora.target.table
            given = rates[self.family.text_encoders.index(table)] if table.is_text_encoder else unet_lr
            label, rate = self._learning_rate(lora, default_lr if given is None else given)
            used[lora.lora_name] = rate or 0.0
            plus = self._loraplus_ratio(table.is_text_encoder)
            for part, ratio, suffix in (
                (lora.lora_down, 1.0, ""),
                (lora.lora_up, plus or 1.0, " plus" if plus else ""),
            ):
                if rate:
                    group = groups.setdefault(label + suffix, {"params": [], "lr": rate * ratio})
                    group["params"].extend(part.parameters())
                else:
                    self.frozen.update(part.parameters())
        self.prepare_grad_etc(None, None)
        if not groups:
            raise UserError("every learning rate of the network is 0 or unset, so there is nothing to train.")
        if self.arguments.get("verbose"):
            say(self._table(used))
        return list(groups.values()), list(groups)

    def _text_encoder_rates(self, given: Sequence[float | None] | float | None) -> list[float | None]:
        count = max(len(self.family.text_encoders), 1)
        rates = list(given) if isinstance(given, Sequence) else [given]
        if not rates:
            rates = [None]
        return rates * count if len(rates) == 1 else rates + rates[-1:] * (count - len(rates))

    def _learning_rate(self, lora: LoRAModule, base: float | None) -> tuple[str, float | None]:
        """Label of the module's group and its learning rate: ``network_reg_lrs``' last match, else the model's."""
        label, factor = self.family.group(lora.target, self.arguments)
        patterns = self.arguments.get("network_reg_lrs")
        index = last_match(patterns, lora.lora_name)
        if patterns and index is not None:
            return f"{label} reg_lr_{index}", patterns[index][1]
        return label, None if base is None else base * factor

    def _loraplus_ratio(self, is_text_encoder: bool) -> float | None:
        """How much faster ups learn than downs; None or 0: not at all."""
        own = self.arguments.get("loraplus_text_encoder_lr_ratio" if is_text_encoder else "loraplus_unet_lr_ratio")
        return own if own is not None else self.arguments.get("loraplus_lr_ratio")

    def _table(self, rates: Mapping[str, float]) -> str:
        width = max(len(lora.lora_name) for lora in self.loras)
        lines = [f"{'module':{width}}  rank  alpha     learning rate"]
        for lora in self.loras:
            lines.append(f"{lora.lora_name:{width}}  {lora.lora_dim:4}  {lora.alpha:<8g}  {rates[lora.lora_name]:g}")
        return "\n".join(lines)

    def prepare_grad_etc(self, text_encoder: Any, unet: Any) -> None:
        """Let the weights that have a learning rate be trained."""
        for parameter in self.parameters():
            parameter.requires_grad_(parameter not in self.frozen)

    def get_trainable_params(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def on_epoch_start(self, text_encoder: Any, unet: Any) -> None:
        """Put the network into training mode."""
        self.train()

    def on_step_start(self, text_encoder: Any, unet: Any) -> None:
        """Nothing to do."""

    # ---- norms ----

    def apply_max_norm_regularization(
        self, max_norm: float, device: torch.device | str | None = None
    ) -> tuple[int, float, float]:
        """Shrink every module whose product is longer than ``max_norm``.

        Returns how many were, and the mean and the largest norm after it.
        """
        results = [lora.limit_norm(max_norm) for lora in self.loras]
        norms = torch.stack([norm.to("cpu" if device is None else device) for norm, _ in results])
        shrunk = torch.stack([was_shrunk.to(norms.device) for _, was_shrunk in results])
        return int(shrunk.sum()), float(norms.mean()), float(norms.max())

    def update_norms(self) -> None:
        """After each optimizer step's backward pass, for GGPO; without it nothing is computed."""
        for lora in self.loras:
            lora.update_norms()

    def update_grad_norms(self) -> None:
        """As ``update_norms``; to be called while the gradients are there."""
        for lora in self.loras:
            lora.update_grad_norms()

    def weight_norms(self) -> Tensor | None:
        """Norm of each module's product [modules], for the log; None unless GGPO is on."""
        tracked = [lora for lora in self.loras if lora.combined_norms is not None]
        norms = [lora.scale * product_norm(lora.down_matrix.detach(), lora.up_matrix.detach()) for lora in tracked]
        return torch.stack(norms).float() if norms else None

    def grad_norms(self) -> Tensor | None:
        """Mean row norm of each module's gradient [modules]; None unless GGPO is on."""
        norms = [lora.grad_norms.mean() for lora in self.loras if lora.grad_norms is not None]
        return torch.stack(norms) if norms else None

    def combined_weight_norms(self) -> Tensor | None:
        """Mean row norm of each merged weight [modules]; None unless GGPO is on."""
        norms = [lora.combined_norms.mean() for lora in self.loras if lora.combined_norms is not None]
        return torch.stack(norms) if norms else None

    # ---- files ----

    def save_weights(self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the file (its suffix gives the format), in ``dtype`` or as trained. Appears complete or not at all."""
        tensors = state_dict_of({lora.lora_name: lora.file_weights() for lora in self.loras}, dtype)
        if any(lora.split_rows for lora in self.loras):
            metadata = {**(metadata or {}), SPLIT_MARK: FULL_STRENGTH}
        write_file(file, tensors, metadata)

    def load_weights(self, file: str | Path) -> LoadInfo:
        """Take over a file's tensors. Raises UserError when it fits nothing here, or only with another rank."""
        try:
            return self._take(read_file(file)[0])
        except UserError as error:
            message = str(error)
            raise UserError(message if str(file) in message else f"{file}: {message}") from None

    def _take(self, tensors: Mapping[str, Tensor]) -> LoadInfo:
        modules, unexpected = read_modules(tensors, [lora.target for lora in self.loras], self.family)
        if not modules:
            raise UserError(
                f"none of the {len(tensors)} tensors belongs to a LoRA module of this network; it was made for another"
                " model or by another method."
            )
        for lora in self.loras:
            if lora.lora_name in modules:
                lora.set_file_weights(modules[lora.lora_name])
        absent = [lora for lora in self.loras if lora.lora_name not in modules]
        return LoadInfo(list(state_dict_of({lora.lora_name: lora.file_weights() for lora in absent})), unexpected)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Takes its own state dict as well as the tensors of a file (see ``load_weights``)."""
        own = {key for key in self.state_dict() if not key.endswith(NORMS)}
        if own <= state_dict.keys():
            return super().load_state_dict(state_dict, strict, assign)
        info = self._take(state_dict)
        if strict and (info.missing_keys or info.unexpected_keys):
            raise RuntimeError(
                f"LoRA tensors don't fit: missing {info.missing_keys}, unexpected {info.unexpected_keys}"
            )
        return info
