"""The network of all adapter modules of a run, for every kind of module and every model family.

``AdapterNetwork`` has the methods that the trainers and kohya-ss/sd-scripts expect of a network module; a kind of
network (``lora_core``, ``oft``) adds what its files hold.

LoRA+: https://arxiv.org/abs/2402.12354.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from library.console import say, warn
from library.errors import UserError
from library.memory.stored_linear import StoredWeight, stored_weight, write_weight
from networks.adapters.adapter_module import AdapterModule
from networks.adapters.lora_arguments import last_match
from networks.adapters.lora_file import read_file, write_file
from networks.adapters.lora_targets import Arguments, Rules

Module = TypeVar("Module", bound=AdapterModule)


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


class AdapterNetwork(nn.Module, ABC, Generic[Module]):
    """All modules of one training run or file.

    ``text_encoder_loras`` and ``unet_loras`` hold the modules by model; both are children under their names in files.
    """

    optional_state: tuple[str, ...] = ()
    """Ends of names in the state dict that another one may lack."""

    def __init__(
        self, rules: Rules, arguments: Arguments, text_encoder_loras: list[Module], unet_loras: list[Module]
    ) -> None:
        super().__init__()
        self.rules = rules
        self.arguments = arguments
        self.text_encoder_loras = text_encoder_loras
        self.unet_loras = unet_loras
        self.multiplier: float | Tensor = 1.0
        self.backups: dict[str, StoredWeight] = {}
        for lora in self.loras:
            self.add_module(lora.lora_name, lora)
        self.frozen = set(self.parameters())
        for lora in self.loras:
            for part, _ in self.trained_parts(lora):
                self.frozen.difference_update(part.parameters())

    @property
    def loras(self) -> list[Module]:
        """Every module, text encoders first."""
        return self.text_encoder_loras + self.unet_loras

    @property
    @abstractmethod
    def summary(self) -> str:
        """The network's modules and size, as the log gives them."""

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

    def require_trainable(self) -> None:
        """Raises UserError for a network that can be applied and merged, but not trained."""

    def remove(self) -> None:
        """Leave the models as they were before ``apply_to``."""
        for lora in self.loras:
            lora.remove()

    def set_multiplier(self, multiplier: float | Tensor) -> None:
        """Strength of the whole network: one number, or a tensor [batch] with one for each item; 0 costs nothing."""
        self.multiplier = multiplier
        for lora in self.loras:
            vars(lora)["multiplier"] = multiplier  # every step does it, and a module's own way takes far longer

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
        self.backups = {lora.lora_name: copy.deepcopy(stored_weight(lora.org_module)) for lora in self.loras}

    @torch.no_grad()
    def restore_weights(self) -> None:
        """Put back, bit for bit, what ``backup_weights`` kept, and use the modules again."""
        for lora in self.loras:
            write_weight(lora.org_module, self.backups[lora.lora_name])
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
        self._warn_of_idle_rates(text_encoder_lr)
        groups: dict[str, dict[str, Any]] = {}
        used: dict[str, float] = {}
        self.frozen.clear()
        for lora in self.loras:
            table = lora.target.table
            given = rates[self.rules.text_encoders.index(table)] if table.is_text_encoder else unet_lr
            label, rate = self._learning_rate(lora, default_lr if given is None else given)
            used[lora.lora_name] = rate or 0.0
            plus = self._loraplus_ratio(table.is_text_encoder)
            self.frozen.update(lora.parameters())
            for part, is_up in self.trained_parts(lora) if rate else ():
                suffix = " plus" if is_up and plus else ""
                ratio = plus if is_up and plus else 1.0
                group = groups.setdefault(label + suffix, {"params": [], "lr": (rate or 0.0) * ratio})
                group["params"].extend(part.parameters())
                self.frozen.difference_update(part.parameters())
        self.prepare_grad_etc(None, None)
        if not groups:
            raise UserError("every learning rate of the network is 0 or unset, so there is nothing to train.")
        if self.arguments.get("verbose"):
            say(self._table(used))
        return list(groups.values()), list(groups)

    def trained_parts(self, lora: Module) -> list[tuple[nn.Module, bool]]:
        """The parts of a module that are trained, and of each whether it is an up, which LoRA+ trains faster."""
        return [(lora, False)]

    def _text_encoder_rates(self, given: Sequence[float | None] | float | None) -> list[float | None]:
        count = max(len(self.rules.text_encoders), 1)
        rates = list(given) if isinstance(given, Sequence) else [given]
        if not rates:
            rates = [None]
        return rates * count if len(rates) == 1 else rates + rates[-1:] * (count - len(rates))

    def _warn_of_idle_rates(self, given: Sequence[float | None] | float | None) -> None:
        """Of several learning rates for text encoders, name those whose encoder isn't trained."""
        if not isinstance(given, Sequence) or len(given) < 2:
            return
        trained = {lora.target.table for lora in self.text_encoder_loras}
        tables = [*self.rules.text_encoders, *(None for _ in given)]
        idle = [f"{rate:g}" for rate, table in zip(given, tables) if rate and table not in trained]
        if idle:
            warn(f"--text_encoder_lr: {' and '.join(idle)} has no effect, because that text encoder is not trained")

    def _learning_rate(self, lora: Module, base: float | None) -> tuple[str, float | None]:
        """Label of the module's group and its learning rate: ``network_reg_lrs``' last match, else the model's."""
        label, factor = self.rules.group(lora.target, self.arguments)
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

    def train(self, mode: bool = True) -> AdapterNetwork[Module]:
        """Switch all modules to training mode or out of it; hundreds of them are not gone through for nothing."""
        already = self.training == mode and all(lora.training == mode for lora in self.loras)
        return self if already else super().train(mode)

    def on_epoch_start(self, text_encoder: Any, unet: Any) -> None:
        """Put the network into training mode."""
        self.train()

    def on_step_start(self, text_encoder: Any, unet: Any) -> None:
        """Nothing to do."""

    # ---- files ----

    @abstractmethod
    def file_tensors(self, loras: Iterable[Module], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The tensors of some modules as files hold them, in ``dtype`` or as trained."""

    @abstractmethod
    def take_tensors(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> LoadInfo:
        """Take over the tensors of a file. Raises UserError when nothing fits."""

    def file_marks(self) -> dict[str, str]:
        """Metadata without which the file would be misread."""
        return {}

    def save_weights(self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the file (its suffix gives the format), in ``dtype`` or as trained. Appears complete or not at all."""
        write_file(file, self.file_tensors(self.loras, dtype), {**(metadata or {}), **self.file_marks()})

    def load_weights(self, file: str | Path) -> LoadInfo:
        """Take over a file's tensors. Raises UserError when it fits nothing here, or only with another rank."""
        try:
            return self.take_tensors(*read_file(file))
        except UserError as error:
            message = str(error)
            raise UserError(message if str(file) in message else f"{file}: {message}") from None

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Takes its own state dict as well as the tensors of a file (see ``load_weights``)."""
        own = {key for key in self.state_dict() if not key.endswith(self.optional_state)}
        if own <= state_dict.keys():
            return super().load_state_dict(state_dict, strict, assign)
        info = self.take_tensors(state_dict)
        if strict and (info.missing_keys or info.unexpected_keys):
            raise RuntimeError(f"tensors don't fit: missing {info.missing_keys}, unexpected {info.unexpected_keys}")
        return info
