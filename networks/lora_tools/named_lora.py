"""LoRA files read without a model: modules under the names that the file gives them, one at a time.

What a file holds is known from its header, so that a mistake is found before anything is computed. Key forms are those
of ``lora_formats``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

import torch

from library.checkpoints import open_checkpoint
from library.errors import UserError
from library.families import Family, lora_family
from networks.adapters.lora_file import LoRAWeights, with_adapter_config
from networks.adapters.lora_formats import check_shapes, grouped_keys, read_module
from networks.lora_tools.arithmetic import layer_shape


class NamedLoRA:
    """A LoRA file, opened by its header.

    ``modules`` are the names of its modules, ``keys`` their tensors, ``others`` the keys that belong to no module.
    Raises UserError naming ``option`` for a file that cannot be read, is no LoRA, or whose matrices do not fit; unless
    it ``takes_dora``, also for DoRA's scales, because what these do to a weight is no low-rank sum.
    """

    modules: Collection[str]

    def __init__(self, path: Path | str, option: str = "--models", takes_dora: bool = False):
        self.path = Path(path)
        self.checkpoint = open_checkpoint(path, option=option)
        self.label = self.checkpoint.label
        self.metadata = with_adapter_config(path, self.checkpoint.metadata)
        try:
            self.keys, self.others = grouped_keys(self.checkpoint)
            if not takes_dora:
                self.refuse_dora("it can be merged into a model, and drawn with")
            self.modules = self.keys.keys()
            if not self.keys:
                raise UserError(f"{self.label} contains no LoRA modules; a LoRA file is needed here.")
            for name in self.keys:
                self._check(name)
        except UserError as error:
            raise self._named(error) from None

    def _named(self, error: UserError) -> UserError:
        """The error with the file's name before it."""
        return error if str(error).startswith(self.label) else UserError(f"{self.label}: {error}")

    def _check(self, name: str) -> None:
        down, up = self.shapes(name)
        check_shapes(name, down, up if len(up) == len(down) else ())

    def shapes(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of down and up."""
        keys = self.keys[name]
        return self.checkpoint.shape(keys.down), self.checkpoint.shape(keys.up)

    def layer_shape(self, name: str) -> tuple[int, ...]:
        """The shape [out, in] or [out, in, kh, kw] of the layer's weight."""
        return layer_shape(*self.shapes(name))

    def rank(self, name: str) -> int:
        return self.shapes(name)[0][0]

    def load(self, name: str, device: torch.device | str = "cpu") -> LoRAWeights:
        """The module's matrices in the file's dtype. Raises UserError as ``lora_formats.read_module`` does."""
        try:
            return read_module(partial(self.checkpoint.load, device=device), name, self.keys[name], self.metadata)
        except UserError as error:
            raise self._named(error) from None

    @property
    def family(self) -> Family | None:
        """The model family that the names (or the metadata) tell; None where they do not."""
        return lora_family(self.modules, self.metadata.get("ss_base_model_version", ""))

    def require_family(self, wanted: Collection[Family], advice: str = "") -> None:
        """Raises UserError unless the file is for one of these families; ``advice`` says what else to do."""
        if self.family not in wanted:
            what = f"is for {self.family.lora_name}" if self.family else "is for another kind of model"
            raise UserError(
                f"{self.label} {what} (it has a module {next(iter(self.modules))}); a LoRA for"
                f" {' or '.join(family.lora_name for family in wanted)} is needed here.{' ' + advice if advice else ''}"
            )

    def refuse_dora(self, advice: str) -> None:
        """Raises UserError for a file with DoRA's scales; ``advice`` says what can be done with it."""
        scales = next((keys.magnitudes for keys in self.keys.values() if keys.magnitudes is not None), None)
        if scales is not None:
            raise UserError(
                f'{self.label} holds DoRA weights ("{scales}"), which depend on the model and cannot be read here;'
                f" {advice}."
            )

    def refuse_other_tensors(self) -> None:
        """Raises UserError that lists tensors which belong to no LoRA module."""
        if self.others:
            raise UserError(
                f"{self.label} holds {len(self.others)} tensors that belong to no LoRA module, so they cannot be"
                f" merged: {', '.join(self.others)}."
            )


def kernel_is_wide(shape: Sequence[int]) -> bool:
    """Whether a layer's shape is that of a convolution that sees neighbours."""
    return any(size != 1 for size in shape[2:])


def without_1x1(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A layer's shape without a kernel of 1x1, since such a convolution and a Linear layer take the same LoRA."""
    return shape if kernel_is_wide(shape) else shape[:2]
