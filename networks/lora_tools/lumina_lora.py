"""LoRA files for Lumina Image 2.0 under this suite's names (see ``known_lora``)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from library.console import say
from library.models.lumina.checkpoint import BLOCK_LISTS, OUTER
from networks.adapters.lora_targets import TargetTable
from networks.lora_lumina import GEMMA_2, LUMINA, TRANSFORMER
from networks.lora_tools.known_lora import KnownLoRA
from networks.lora_tools.metadata import file_entries

VERSION = "lumina2"
"""Of the base model, as metadata name it."""
SHARED_HEADS = 3  # heads of queries for each of keys and values in the published model, where a file does not tell
_NORM = re.compile(r"norm|cap_embedder\.0")
_GEMMA_LAYERS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_DIFFUSERS = re.compile(r"(^|[._])(attn|norm1|norm_out|time_caption_embed)[._]|[._]feed_forward[._]linear_\d$")
_ORIGINAL = re.compile(
    r"(^|[._])(attention|adaLN_modulation|t_embedder|cap_embedder|final_layer)[._]|[._]feed_forward[._]w\d$"
)


class LuminaLoRA(KnownLoRA):
    """A LoRA file for Lumina Image 2.0."""

    model_name = "Lumina Image 2.0"
    rules = LUMINA
    entries = file_entries(VERSION, "networks.lora_lumina")

    def __init__(self, path: Path | str, option: str = "--models", takes_dora: bool = False):
        self._ratio_is_told = False
        super().__init__(path, option, takes_dora)

    @staticmethod
    def layer_paths(blocks: int) -> Iterable[tuple[TargetTable, str]]:
        yield from ((TRANSFORMER, path) for path in OUTER if not _NORM.search(path))
        for number in range(blocks):
            for name, modules in BLOCK_LISTS.items():
                yield from ((TRANSFORMER, f"{name}.{number}.{path}") for path in modules if not _NORM.search(path))
            yield from ((GEMMA_2, f"layers.{number}.{path}") for path in _GEMMA_LAYERS)

    @staticmethod
    def dialect_of(name: str) -> str:
        if name.startswith("lycoris_"):
            return "lycoris"
        if name.startswith("lora_"):
            own = name.startswith("lora_te_") or not _DIFFUSERS.search(name)
            return "sd-scripts" if own else "sd-scripts with Diffusers' paths"
        if name.startswith(("diffusion_model.", "text_encoders.")):
            return "comfyui"
        return "original" if _ORIGINAL.search(name) else "diffusers"

    def rows(self, name: str) -> list[int]:
        whole, width = self.whole(name), self.width(name)
        if not self.targets[name].path.endswith(".attention.qkv"):
            return [self.shapes(str(whole))[1][0]]
        if whole is not None:
            return [width, *[(self.shapes(whole)[1][0] - width) // 2] * 2]
        return [width, *[self._shared_rows(name)] * 2]

    def _shared_rows(self, name: str) -> int:
        """Rows of k and of v: as a part of this module has them, else another module, else as the published model."""
        for other in (name, *self.parts):
            if self.targets[other].path.endswith(".attention.qkv") and self.width(other) == self.width(name):
                whole = self.whole(other)
                if whole is not None:
                    return (self.shapes(whole)[1][0] - self.width(other)) // 2
                for part in (1, 2):
                    if part in self.parts[other]:
                        return self.height(other, part)
        rows = self.width(name) // SHARED_HEADS
        if not self._ratio_is_told:
            self._ratio_is_told = True
            say(
                f"{self.path}: no module shows how many rows keys and values have; {rows} are taken, as in the 2B model"
            )
        return rows
