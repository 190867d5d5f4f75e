"""The network of all LoRA modules, for every model family.

What distinguishes the families is declared in ``lora_flux`` and its siblings (see ``lora_targets``); ``lora_kind``
builds from that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from library.errors import UserError
from networks.adapters.adapter_network import AdapterNetwork, LoadInfo
from networks.adapters.lora_file import FULL_STRENGTH, SPLIT_MARK, state_dict_of
from networks.adapters.lora_formats import read_modules
from networks.adapters.lora_module import NORMS, LoRAModule
from networks.adapters.low_rank import product_norm


class LoRANetwork(AdapterNetwork[LoRAModule]):
    """All LoRA modules of one training run or file."""

    optional_state = NORMS

    def trained_parts(self, lora: LoRAModule) -> list[tuple[nn.Module, bool]]:
        """Down and up."""
        return [(lora.lora_down, False), (lora.lora_up, True)]

    @property
    def summary(self) -> str:
        """How many modules of which ranks, and their size."""
        ranks = sorted({module.lora_dim for module in self.loras})
        span = f"rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
        size = sum(parameter.numel() for parameter in self.parameters())
        text, unet = len(self.text_encoder_loras), len(self.unet_loras)
        return f"LoRA with {unet} {self.rules.model_name} and {text} text encoder modules, {span}, {size:,} parameters"

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
        count, mean, largest = torch.stack([shrunk.sum().to(norms), norms.mean(), norms.max()]).tolist()
        return int(count), mean, largest

    def update_norms(self) -> None:
        """After each optimizer step's backward pass, for GGPO; without it nothing is computed."""
        for lora in self._with_norms():
            lora.update_norms()

    def update_grad_norms(self) -> None:
        """As ``update_norms``; to be called while the gradients are there."""
        for lora in self._with_norms():
            lora.update_grad_norms()

    def _with_norms(self) -> list[LoRAModule]:
        return [lora for lora in self.loras if lora.weight_norm is not None]

    def weight_norms(self) -> Tensor | None:
        """Norm of each module's product [modules], for the log; None unless GGPO is on."""
        tracked = self._with_norms()
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

    def require_trainable(self) -> None:
        """Raises UserError for DoRA."""
        refuse_dora([lora.lora_name for lora in self.loras if lora.magnitudes])

    def file_tensors(self, loras: Iterable[LoRAModule], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Down, up and alpha of each module. Raises UserError for DoRA."""
        self.require_trainable()
        return state_dict_of({lora.lora_name: lora.file_weights() for lora in loras}, dtype)

    def file_marks(self) -> dict[str, str]:
        """How joined modules were trained."""
        return {SPLIT_MARK: FULL_STRENGTH} if any(lora.split_rows for lora in self.loras) else {}

    def take_tensors(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> LoadInfo:
        """Take over tensors under any names that ``lora_formats`` knows."""
        modules, unexpected = read_modules(tensors, [lora.target for lora in self.loras], self.rules, metadata)
        if not modules:
            raise UserError(
                f"none of the {len(tensors)} tensors belongs to a LoRA module of this network; it was made for another"
                " model or by another method."
            )
        refuse_dora([name for name, weights in modules.items() if weights.magnitudes])
        for lora in self.loras:
            if lora.lora_name in modules:
                lora.set_file_weights(modules[lora.lora_name])
        absent = [lora for lora in self.loras if lora.lora_name not in modules]
        return LoadInfo(list(self.file_tensors(absent)), unexpected)


def refuse_dora(names: Sequence[str]) -> None:
    """Raises UserError for a network of which these modules have DoRA's scales."""
    if names:
        raise UserError(
            f"the file holds DoRA scales ({len(names)} modules, such as {names[0]}), which act on images and in merges"
            " but are not trained here; train DoRA with --network_module lycoris.kohya and --network_args algo=lora"
            " dora_wd=True."
        )
