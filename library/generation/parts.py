"""Which parts of a pipeline are loaded and where, while an image is made: text encoders, then the rest in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.devices import default_device, named_device

if TYPE_CHECKING:
    import torch


@dataclass
class ReadingOptions:
    """Reading models"""

    tokenizer_cache_dir: str | None = None
    """Folder in which tokenizers are looked for first, and kept when they are downloaded."""
    disable_mmap_load_safetensors: bool = False
    """Read model files without memory maps, which is faster on some network drives."""


@dataclass
class DeviceOptions:
    """Device"""

    device: str | None = None
    """Device (cuda, cuda:1, cpu); unset means the accelerator where there is one."""
    offload: bool = False
    """Keep only the part that works on the device: text encoders, then transformer, then autoencoder."""
    vram_budget: float | None = None
    """GiB of the device (8 for an 8 GB GPU) that images have to fit into: --offload, --stream_text_encoders and
    --blocks_to_swap are chosen so."""

    def torch_device(self) -> torch.device:
        """The device itself. Raises UserError for one that this machine does not have."""
        return default_device() if self.device is None else named_device(self.device)


def computing_in(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Autocast to ``dtype``, as a training with that mixed precision has it; nothing for float32."""
    import torch

    if dtype not in (torch.bfloat16, torch.float16):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


class Parts:
    """Loads a pipeline's parts when their work comes; with ``offload``, parts that do not work are on the CPU.

    ``on_load(part, module, device)`` and ``on_move(part, device)`` are for what belongs to a part without being in it.
    """

    def __init__(
        self,
        pipeline: Any,
        offload: bool,
        on_load: Callable[[str, Any, Any], None],
        on_move: Callable[[str, Any], None],
    ):
        self.pipeline = pipeline
        self.offload = offload
        self.on_load = on_load
        self.on_move = on_move

    @contextlib.contextmanager
    def at_work(self, *parts: str) -> Iterator[None]:
        """While it is active, these parts are loaded and on the device."""
        for part in parts:
            if part not in self.pipeline.modules:
                self._load(part)
            elif self.offload:
                self._move(part, self.pipeline.device)
        try:
            yield
        finally:
            if self.offload:
                for part in parts:
                    self._move(part, "cpu")

    def _load(self, part: str) -> None:
        self.pipeline.load(part)
        try:
            self.on_load(part, self.pipeline.modules[part], self.pipeline.device_of(part))
        except BaseException:  # Ctrl-C too: a session must not continue with a part that is only half prepared
            self.pipeline.release(part)
            raise

    def _move(self, part: str, device: Any) -> None:
        self.pipeline.move(part, device)
        self.on_move(part, device)
