"""Which blocks of a model are streamed, so that the device has as much memory as requested for something else.

Streaming a block frees its weights on the device, less the ring of slots that all streamed blocks share. For the same
memory, blocks with few bytes for their computing time cost least: their copies hide behind the work of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from library.memory.plan import Streaming
from library.memory.streaming import slot_sizes

BlockSizes = Mapping[str, Sequence[int]]
"""The bytes of each block that can be streamed, list by list, in the order in which the blocks run."""
Place = tuple[str, int]


@dataclass(frozen=True)
class StreamedBlocks:
    """Streamed blocks of a model of these ``sizes``."""

    sizes: BlockSizes
    places: tuple[Place, ...]
    """(list, index), in the order in which they run."""
    slots: int

    @property
    def bytes(self) -> int:
        """Of the streamed blocks in host memory."""
        return sum(self.sizes[name][index] for name, index in self.places)

    @property
    def ring_bytes(self) -> int:
        """Of the slots on the device."""
        return sum(slot_sizes([self.sizes[name][index] for name, index in self.places], self.slots))

    @property
    def freed(self) -> int:
        """Bytes that the device no longer has to hold."""
        return self.bytes - self.ring_bytes

    @property
    def bytes_per_step(self) -> int:
        """Copied to the device in a forward and a backward pass, after the first."""
        sizes = [self.sizes[name][index] for name, index in self.places]
        return sum(sizes[self.slots :]) + sum(sizes[: -self.slots])

    def counts(self) -> dict[str, int]:
        """How many blocks of each list are streamed."""
        return {name: sum(place[0] == name for place in self.places) for name in self.sizes}

    def streaming(self, pinned: bool) -> Streaming:
        """What a memory plan says of it."""
        return Streaming(self.places, self.slots, pinned)


def choose_blocks(sizes: BlockSizes, freed: int, slots: int, first: Literal["small", "large"]) -> StreamedBlocks:
    """The fewest blocks whose streaming frees ``freed`` bytes; all of them where even that is not enough.

    Blocks of the ``first`` size are taken first, and of one size as many as needed, evenly spaced, so that copies and
    computation alternate.
    """
    order = [(name, index) for name, blocks in sizes.items() for index in range(len(blocks)) if blocks[index]]
    by_size: dict[int, list[Place]] = {}
    for name, index in order:
        by_size.setdefault(sizes[name][index], []).append((name, index))
    chosen: list[Place] = []
    found = StreamedBlocks(sizes, (), slots)
    for size in sorted(by_size, reverse=first == "large"):
        alike = by_size[size]
        for count in range(1, len(alike) + 1):
            if found.freed >= freed and found.places:
                return found
            spaced = [alike[(2 * number + 1) * len(alike) // (2 * count)] for number in range(count)]
            found = StreamedBlocks(sizes, tuple(sorted({*chosen, *spaced}, key=order.index)), slots)
        chosen += alike
    return found
