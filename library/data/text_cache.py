"""Cached text encoder outputs: every caption encoded once."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy

from library.data import npz
from library.data.cache_base import Cache
from library.data.cache_entries import (
    IDENTITY,
    CacheReport,
    Entry,
    FolderShares,
    State,
    cache_stem,
    require_finite_arrays,
)
from library.data.captions import fixed_caption
from library.data.dataset import DatasetGroup, Item
from library.errors import NotFiniteError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    EncodePrompts = Callable[[list[str]], dict[str, Tensor]]


@dataclass(frozen=True)
class TextFormat:
    """How a family's text encoder outputs are stored: ``<image stem><suffix>``."""

    suffix: str
    arrays: Mapping[str, tuple[int | None, ...] | None]
    """Array names with the shapes they must have (None: any size, or any shape)."""
    flags: Mapping[str, bool | int | float] = field(default_factory=dict)
    """Scalar arrays that must have these values."""
    lengths: Mapping[str, str] = field(default_factory=dict)
    """Arrays that are stored as long as the caption is, and the mask whose ones say so: a caption's entry then does not
    depend on those that were encoded together with it."""


def check_text_cacheable(group: DatasetGroup) -> None:
    """Raises UserError when an option gives captions more than one outcome, naming option and place."""
    free: dict[int, bool] = {}  # by subset: whether no option of it can make a caption change
    for item in group.items:
        rules, subset = item.subset.captions, id(item.subset)
        if subset not in free:
            free[subset] = not rules.enable_wildcard and not rules.changing_options()
        if not free[subset]:
            _fixed_caption(item)


def _fixed_caption(item: Item) -> str:
    try:
        return fixed_caption(item.caption, item.subset.captions)
    except UserError as error:
        raise UserError(f"{item.subset.place} ({item.path.name}): {error}") from None


class TextCache(Cache):
    """The text encoder outputs of every image of a group.

    Captions are encoded with prefix, suffix and separators applied. As ``LatentCache`` otherwise; ``identity`` names
    encoders and their options. Raises UserError for options that make captions change.
    """

    subject = "text encoder cache"
    progress = ("caching captions", "caption")
    attribute = "text"

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
        shares: FolderShares | None = None,
    ) -> None:
        self.format = format
        wanted: list[tuple[Any, Item, str | None, tuple[Any, ...]]] = []
        for item in group.items:
            caption = _fixed_caption(item)
            file = f"{cache_stem(item)}{format.suffix}" if to_disk else None
            wanted.append((file or caption, item, file, (caption,)))
        super().__init__(
            wanted,
            to_disk=to_disk,
            skip_check=skip_check,
            identity=identity,
            rank=rank,
            world_size=world_size,
            shares=shares,
        )

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
        by_caption: dict[str, list[Entry]] = {}
        for entry in self.todo:
            by_caption.setdefault(str(entry.signature[0]), []).append(entry)
        captions = list(by_caption)
        with self._filling(len(captions)) as (writers, bar, report):
            for start in range(0, len(captions), batch_size):
                batch = captions[start : start + batch_size]
                outputs = encode(batch)
                writers.submit(self._store, [by_caption[caption] for caption in batch], outputs)
                bar.update(len(batch))
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

    def _on_disk(self, entry: Entry) -> DiskText:
        return DiskText(self, entry)

    def _made_arrays(self, entry: Entry) -> list[str]:
        return list(self.format.arrays)

    def _unfit(self, entry: Entry, heads: Mapping[str, npz.ArrayHead]) -> State | None:
        assert entry.path is not None
        if any(name not in heads for name in (*self.format.arrays, *self.format.flags)):
            return "missing"
        if not all(heads[name].fits(shape) for name, shape in self.format.arrays.items()):
            return "stale"
        flags = npz.read_arrays(entry.path, self.format.flags)
        return "stale" if any(flags[name].item() != value for name, value in self.format.flags.items()) else None

    def _is_current(self, entry: Entry, written: dict[str, Any], sums: Mapping[str, int]) -> bool:
        return written == self._identity(entry) | {"arrays": dict(sums)}

    def _identity(self, entry: Entry) -> dict[str, Any]:
        """What an entry is made from, as it is written into the file."""
        caption = hashlib.blake2b(str(entry.signature[0]).encode("utf-8"), digest_size=16).hexdigest()
        return {"version": 1, "encoder": self.identity, "caption": caption}

    def _store(self, entries_of_captions: list[list[Entry]], outputs: dict[str, Tensor]) -> None:
        outputs = {name: outputs[name].detach().cpu() for name in self.format.arrays}
        for row, entries in enumerate(entries_of_captions):
            tensors = {name: tensor[row].clone() for name, tensor in self._cut(outputs, row).items()}
            self._require_sound(tensors, entries[0])
            for entry in entries:
                if entry.path is None:
                    self._attach(entry, MemoryText(tensors))
                else:
                    self._write_text(entry, tensors)
                entry.state = "valid"

    def _cut(self, outputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
        """The outputs, in which arrays with ``lengths`` end where the caption of that row does."""
        counts = {name: int(outputs[mask][row].sum()) for name, mask in self.format.lengths.items()}
        return {name: tensor[:, : counts[name]] if name in counts else tensor for name, tensor in outputs.items()}

    def _require_sound(self, tensors: dict[str, Tensor], entry: Entry) -> None:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise NotFiniteError(f'The text encoders gave values that are not finite for "{entry.signature[0]}".')
            wanted = self.format.arrays[name]
            if wanted is not None and not npz.has_shape(tuple(tensor.shape), wanted):
                raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, not {wanted}")

    def _write_text(self, entry: Entry, tensors: dict[str, Tensor]) -> None:
        arrays = {name: _storable(tensor) for name, tensor in tensors.items()}
        arrays |= {name: numpy.array(value) for name, value in self.format.flags.items()}
        self._write(entry, arrays, self._identity(entry))


@dataclass
class MemoryText:
    """Text encoder outputs kept in memory, in the encoder's dtype."""

    tensors: dict[str, Tensor]

    def read(self) -> dict[str, Tensor]:
        """Named tensors of one caption."""
        return self.tensors


class DiskText:
    """Text encoder outputs read from a cache file each time; floating point comes as float32."""

    def __init__(self, cache: TextCache, entry: Entry) -> None:
        self.cache, self.entry = cache, entry

    def read(self) -> dict[str, Tensor]:
        """Named tensors of one caption. Raises UserError naming the file."""
        import torch

        path = self.entry.path
        assert path is not None
        arrays = npz.read_arrays_for_training(path, self.cache.format.arrays, IDENTITY, self.cache.is_ours)
        require_finite_arrays(path, arrays)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _storable(tensor: Tensor) -> numpy.ndarray:
    """NumPy has no bfloat16: such tensors are stored as float32."""
    import torch

    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
