"""LyCORIS files in an inference script: read by the published package and merged into the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints import open_checkpoint
from library.errors import UserError
from library.lycoris import open_lycoris

if TYPE_CHECKING:
    import torch
    from torch import nn


class LycorisStack:
    """In the place of ``networks.adapters.network_stack.NetworkStack``: files that change the weights of ``denoiser``.

    ``keep`` says for each file which of its keys are read (None: all). Raises UserError where the package is missing,
    and, when the model is there, for a file of which nothing fits it.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, float]],
        denoiser: str,
        keep: Sequence[Callable[[str], bool] | None] = (),
    ) -> None:
        try:
            self.module = open_lycoris()
        except ImportError as error:
            raise UserError(f"--lycoris needs the package lycoris-lora: {error}.") from None
        self.files, self.denoiser = list(files), denoiser
        self.keep = list(keep) or [None] * len(self.files)
        self.multipliers = [multiplier for _, multiplier in files]

    def acts_on(self, *parts: str) -> bool:
        """Whether any file has modules of these parts."""
        return bool(self.files) and self.denoiser in parts

    def enter(self, part: str, model: nn.Module, device: torch.device | str) -> None:
        """Change the weights of ``model`` if it is the denoiser."""
        if part != self.denoiser:
            return
        for (path, multiplier), keep in zip(self.files, self.keep):
            if keep is not None and not any(map(keep, open_checkpoint(path).keys())):
                raise UserError(f"{path}: the patterns leave none of its modules.")
            network, _ = self.module.create_network_from_weights(multiplier, path, None, [], model, keep=keep)
            self.module.merge(network, multiplier)

    def part_bytes(self, part: str) -> int:
        """Memory on the device beside the part: none, as the files are merged."""
        return 0

    def leave(self, part: str) -> None:
        """Merged weights stay merged."""

    def move(self, part: str, device: torch.device | str) -> None:
        """Nothing is kept beside the model."""

    def set_multipliers(self, multipliers: Sequence[float]) -> None:
        """Raises UserError: merged files keep their strengths."""
        raise UserError("multipliers of files that --lycoris merged cannot change.")
