"""Cached text encoder outputs: every caption encoded once."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from library.data import npz
from library.data.cache_entries import (
    IDENTITY,
    CacheReport,
    Entry,
    State,
    Writers,
    all_finite,
    cache_stem,
    check_states,
    clean_folders,
    entries_of_rank,
    progress_bar,
    read_identity,
    report_on,
    share_entries,
)
from library.data.captions import fixed_caption
from library.data.dataset import DatasetGroup, Item
from library.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    EncodePrompts = Callable[[list[str]], dict[str, Tensor]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextFormat:
    """How a family's text encoder outputs are stored: ``<image stem><suffix>``."""

    suffix: str
    arrays: Mapping[str, tuple[int | None, ...] | None]
    """Array names with the shapes they must have (None: any size, or any shape)."""
    flags: Mapping[str, bool | int | float] = field(default_factory=dict)
    """Scalar arrays that must have these values."""


def check_text_cacheable(group: DatasetGroup) -> None:
    """Raises UserError when an option gives captions more than one outcome, naming option and place."""
    for item in group.items:
        _fixed_caption(item)


def _fixed_caption(item: Item) -> str:
    try:
        return fixed_caption(item.caption, item.subset.captions)
    except UserError as error:
        raise UserError(f"{item.subset.place} ({item.path.name}): {error}") from None


class TextCache:
    """The text encoder outputs of every image of a group.

    Captions are encoded with prefix, suffix and separators applied. As ``LatentCache`` otherwise; ``identity`` names
    encoders and their options. Raises UserError for options that make captions change.
    """

    def __init__(
        self,
        group: DatasetGroup,
        format: TextFormat,
        *,
        to_disk: bool,
        skip_check: bool = False,
        identity: str = "",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.format = format
        self.identity = identity
        self.to_disk = to_disk
        self.rank, self.world_size = rank, world_size
        wanted: list[tuple[Any, Item, Path | None, tuple[Any, ...]]] = []
        for item in group.items:
            caption = _fixed_caption(item)
            path = item.path.with_name(f"{cache_stem(item)}{format.suffix}") if to_disk else None
            wanted.append((path or caption, item, path, (caption,)))
        entries = share_entries(wanted, self._explain_conflict)
        if to_disk:
            check_states(entries, self._check, skip_check=skip_check)
            for entry in entries:
                self._attach(entry, DiskText(entry, format))
        self.entries = entries_of_rank(entries, rank, world_size)

    @property
    def missing(self) -> int:
        """Entries that this process must make; when 0 the encoders are not needed."""
        return sum(entry.state != "valid" for entry in self.entries)

    @property
    def states(self) -> Counter[str]:
        """This process's entries by state."""
        return Counter(str(entry.state) for entry in self.entries)

    @property
    def missing_bytes(self) -> int | None:
        """About the size of the outputs that this process must make; None when their shapes are not known ahead."""
        values = 0
        for shape in self.format.arrays.values():
            if shape is None or None in shape:
                return None
            values += math.prod(side for side in shape if side is not None)
        return 4 * values * self.missing

    def fill(self, encode: EncodePrompts, *, batch_size: int = 1) -> CacheReport:
        """Encode what is missing, each caption once.

        ``encode`` takes captions and gives named tensors, batch first. Raises UserError when outputs are not finite, do
        not have the format's shapes, or a file cannot be written.
        """
        import torch

        report = report_on(self.entries, "text encoder cache")
        by_caption: dict[str, list[Entry]] = {}
        for entry in self.entries:
            if entry.state != "valid":
                by_caption.setdefault(str(entry.signature[0]), []).append(entry)
        captions = list(by_caption)
        if self.world_size == 1:
            clean_folders(entry for entries in by_caption.values() for entry in entries)
        bar = progress_bar(len(captions), "caching captions", "caption", shown=self.rank == 0)
        with Writers() as writers, bar, torch.no_grad():
            for start in range(0, len(captions), batch_size):
                batch = captions[start : start + batch_size]
                outputs = encode(batch)
                writers.submit(self._store, [by_caption[caption] for caption in batch], outputs)
                bar.update(len(batch))
        log.info(report.line())
        return report

    def _explain_conflict(self, entry: Entry, item: Item) -> str:
        if entry.item.path != item.path:
            return (
                f"{entry.item.path} and {item.path.name} have different captions and would share one text cache file; "
                "rename one of them, or cache in memory (--cache_text_encoder_outputs alone)."
            )
        return (
            f"{item.path}: this image has two different captions, which one cache file cannot hold; give it the same "
            "caption options in each dataset, or cache in memory (--cache_text_encoder_outputs alone)."
        )

    def _attach(self, entry: Entry, source: Any) -> None:
        for item in entry.items:
            item.text = source

    def _check(self, entry: Entry) -> State:
        """Whether the stored arrays are there, fit, and were made from this caption by these encoders."""
        assert entry.path is not None
        names = [*self.format.arrays, *self.format.flags]
        try:
            heads = npz.read_heads(entry.path)
            if any(name not in heads for name in names):
                return "missing"
            if not all(_fits(heads[name].shape, shape) for name, shape in self.format.arrays.items()):
                return "stale"
            flags = npz.read_arrays(entry.path, self.format.flags)
            if any(flags[name].item() != value for name, value in self.format.flags.items()):
                return "stale"
            if IDENTITY not in heads:
                return "valid" if all_finite(npz.read_arrays(entry.path, self.format.arrays)) else "not finite"
            written = read_identity(entry.path, IDENTITY)
        except npz.DAMAGE:
            return "damaged"
        sums = {name: heads[name].checksum for name in self.format.arrays}
        return "valid" if written == self._identity(entry, sums) else "stale"

    def _identity(self, entry: Entry, sums: Mapping[str, int]) -> dict[str, Any]:
        caption = hashlib.blake2b(str(entry.signature[0]).encode("utf-8"), digest_size=16).hexdigest()
        return {"version": 1, "encoder": self.identity, "caption": caption, "arrays": dict(sums)}

    def _store(self, entries_of_captions: list[list[Entry]], outputs: dict[str, Tensor]) -> None:
        outputs = {name: outputs[name].detach().cpu() for name in self.format.arrays}
        for row, entries in enumerate(entries_of_captions):
            tensors = {name: tensor[row].clone() for name, tensor in outputs.items()}
            self._require_sound(tensors, entries[0])
            for entry in entries:
                if entry.path is None:
                    self._attach(entry, MemoryText(tensors))
                else:
                    self._write(entry, tensors)
                entry.state = "valid"

    def _require_sound(self, tensors: dict[str, Tensor], entry: Entry) -> None:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise UserError(f'The text encoders gave values that are not finite for "{entry.signature[0]}".')
            if not _fits(tuple(tensor.shape), self.format.arrays[name]):
                raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, not {self.format.arrays[name]}")

    def _write(self, entry: Entry, tensors: dict[str, Tensor]) -> None:
        assert entry.path is not None
        encoded = {name: npz.encode_array(_storable(tensor)) for name, tensor in tensors.items()}
        sums = {name: npz.checksum(data) for name, data in encoded.items()}
        encoded |= {name: npz.encode_array(numpy.array(value)) for name, value in self.format.flags.items()}
        encoded[IDENTITY] = npz.encode_array(numpy.array(json.dumps(self._identity(entry, sums))))
        npz.update(entry.path, encoded, keep=lambda name: True)


@dataclass
class MemoryText:
    """Text encoder outputs kept in memory, in the encoder's dtype."""

    tensors: dict[str, Tensor]

    def read(self) -> dict[str, Tensor]:
        """Named tensors of one caption."""
        return self.tensors


class DiskText:
    """Text encoder outputs read from a cache file each time; floating point comes as float32."""

    def __init__(self, entry: Entry, format: TextFormat) -> None:
        assert entry.path is not None
        self.path, self.names = entry.path, list(format.arrays)

    def read(self) -> dict[str, Tensor]:
        """Named tensors of one caption. Raises UserError naming the file."""
        import torch

        arrays = npz.read_arrays_for_training(self.path, self.names)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...] | None) -> bool:
    if wanted is None:
        return True
    return len(shape) == len(wanted) and all(want in (None, have) for have, want in zip(shape, wanted))


def _storable(tensor: Tensor) -> numpy.ndarray:
    """NumPy has no bfloat16: such tensors are stored as float32."""
    import torch

    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
