"""LoRA files for transformers of double and single blocks under this suite's names: what joined layers hold."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from library.console import say
from networks.lora_tools.known_lora import KnownLoRA

FEED_FORWARD_RATIO = 4  # of the published models, where a file does not tell


class StreamLoRA(KnownLoRA):
    """A LoRA file for a transformer whose double blocks join q, k and v, and whose single blocks also join the
    feed-forward part (``linear1``) and what follows (``linear2``)."""

    joined: ClassVar[tuple[str, ...]]
    """Ends of the paths of layers that hold q, k and v together."""
    feed_forward: ClassVar[tuple[str, str]]
    """Ends of the paths of a double block's two feed-forward layers."""

    def __init__(self, path: Path | str, option: str = "--models", takes_dora: bool = False):
        self._ratio_is_told = False
        super().__init__(path, option, takes_dora)

    def rows(self, name: str) -> list[int]:
        whole, path, width = self.whole(name), self.targets[name].path, self.width(name)
        if path.endswith(self.joined):
            return [width] * 3
        if not path.endswith(".linear1"):
            return [self.shapes(str(whole))[1][0]]
        if whole is not None:
            return [width] * 3 + [self.shapes(whole)[1][0] - 3 * width]
        return [width] * 3 + [self.height(name, 3) if 3 in self.parts[name] else self._feed_forward_rows(width)]

    def _feed_forward_rows(self, width: int) -> int:
        """Of a single block whose feed-forward part has no module: as other modules have it, else the usual ratio."""
        first, second = self.feed_forward
        for name, parts in self.parts.items():
            path, whole = self.targets[name].path, self.whole(name)
            if path.endswith(".linear1") and (3 in parts or whole is not None):
                return self.height(name, 3) if whole is None else self.shapes(whole)[1][0] - 3 * width
            if whole is not None and path.endswith(first):
                return self.shapes(whole)[1][0]
            if whole is not None and path.endswith((".linear2", second)):
                columns = self.shapes(whole)[0][1]
                return columns - width if path.endswith(".linear2") else columns
        if not self._ratio_is_told:
            self._ratio_is_told = True
            say(
                f"{self.path}: no module shows the size of the feed-forward layers; {FEED_FORWARD_RATIO} times"
                f" {width} is taken, as {self.model_name} has it"
            )
        return FEED_FORWARD_RATIO * width
