"""What every cache is: entries with their states, the ones to make, the identity in each file, memory or disk."""

from __future__ import annotations

import contextlib
import json
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy

from library.data import npz
from library.data.cache_entries import (
    IDENTITY,
    CacheReport,
    Entry,
    FolderShares,
    State,
    Writers,
    all_finite,
    check_states,
    clean_folders,
    entries_of_process,
    progress_bar,
    read_identity,
    report_on,
    share_entries,
)
from library.data.dataset import Item

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger(__name__)


class Cache(ABC):
    """A cache of what an encoder gives for the items of a group, in memory or in files.

    Made with its entries, it looks at what is on disk; a subclass's ``fill`` makes the rest; from then on the items
    have their source. ``identity`` names the encoder: entries made with another one are stale. On disk every entry is
    made by one of ``world_size`` processes.
    """

    subject: ClassVar[str]
    """What the cache is called in reports."""
    progress: ClassVar[tuple[str, str]]
    """Title and unit of the progress bar."""
    attribute: ClassVar[str]
    """The attribute of items that holds their source."""

    def __init__(
        self,
        wanted: Iterable[tuple[Hashable, Item, str | None, tuple[Hashable, ...]]],
        *,
        to_disk: bool,
        skip_check: bool,
        identity: str,
        rank: int,
        world_size: int,
        shares: FolderShares | None = None,
    ) -> None:
        """``wanted`` gives for each use of an item the entry's key, the item, its file and what must agree.

        ``shares``: how the processes share the folders of files; without it, all of them share each.
        Raises UserError for items that would share an entry and do not agree.
        """
        self.to_disk, self.identity, self.skip_check = to_disk, identity, skip_check
        self.rank, self.world_size = rank, world_size
        entries = share_entries(wanted, self._explain_conflict)
        if to_disk:
            check_states(entries, self._check, skip_check=skip_check)
            for entry in entries:
                self._attach(entry, self._on_disk(entry))
        self.entries = entries_of_process(entries, shares or (lambda folders: [(rank, world_size)] * len(folders)))

    @property
    def todo(self) -> list[Entry]:
        """The entries that this process must make."""
        return [entry for entry in self.entries if entry.state != "valid"]

    @property
    def missing(self) -> int:
        """How many entries this process must make; when 0 the encoder is not needed."""
        return len(self.todo)

    @property
    def states(self) -> Counter[str]:
        """This process's entries by state."""
        return Counter(str(entry.state) for entry in self.entries)

    @property
    @abstractmethod
    def missing_bytes(self) -> int | None:
        """About the size of what this process must make; None when it is not known ahead."""

    @contextlib.contextmanager
    def _filling(self, total: int) -> Iterator[tuple[Writers, tqdm, CacheReport]]:
        """Around the making of all that is missing: threads that write, a progress bar of ``total``, the report."""
        import torch

        report = report_on(self.entries, self.subject)
        if self.world_size == 1:
            clean_folders(self.todo)
        bar = progress_bar(total, *self.progress, shown=self.rank == 0)
        with Writers() as writers, bar, torch.no_grad():
            yield writers, bar, report
        log.info(report.line())

    def is_ours(self, written: str) -> bool:
        """Whether the identity that stands in a file is one of this cache's encoder; any if nothing is checked."""
        return self.skip_check or f'"encoder": {json.dumps(self.identity)}' in written

    def _attach(self, entry: Entry, source: Any) -> None:
        for item in entry.items:
            setattr(item, self.attribute, source)

    def _check(self, entry: Entry) -> State:
        """Whether the stored arrays are there, fit, and were made from this item by this encoder."""
        assert entry.path is not None
        try:
            heads = npz.read_heads(entry.path)
            problem = self._unfit(entry, heads)
            if problem is not None:
                return problem
            made, mark = self._made_arrays(entry), f"{IDENTITY}{self._key_suffix(entry)}"
            if mark not in heads:
                return "valid" if all_finite(npz.read_arrays(entry.path, made)) else "not finite"
            written = read_identity(entry.path, mark)
        except npz.DAMAGE:
            return "damaged"
        return "valid" if self._is_current(entry, written, {n: heads[n].checksum for n in made}) else "stale"

    def _write(
        self,
        entry: Entry,
        arrays: Mapping[str, numpy.ndarray],
        identity: dict[str, Any],
        keep: Callable[[str], bool] = lambda name: True,
    ) -> None:
        """Write the arrays of an entry and its identity, with the checksums of those that the encoder made.

        Raises UserError when the file cannot be written.
        """
        assert entry.path is not None
        encoded = {name: npz.encode_array(array) for name, array in arrays.items()}
        identity["arrays"] = {name: npz.checksum(encoded[name]) for name in self._made_arrays(entry)}
        mark = f"{IDENTITY}{self._key_suffix(entry)}"
        encoded[mark] = npz.encode_array(numpy.array(json.dumps(identity)))
        npz.update(entry.path, encoded, keep=keep)

    def _key_suffix(self, entry: Entry) -> str:
        """What the array names of this entry end in, when a file holds several."""
        return ""

    @abstractmethod
    def _explain_conflict(self, entry: Entry, item: Item) -> str:
        """The sentence for an item that would share ``entry`` but differs."""

    @abstractmethod
    def _on_disk(self, entry: Entry) -> Any:
        """The source that reads an entry's file."""

    @abstractmethod
    def _made_arrays(self, entry: Entry) -> list[str]:
        """The names of the arrays that the encoder made."""

    @abstractmethod
    def _unfit(self, entry: Entry, heads: Mapping[str, npz.ArrayHead]) -> State | None:
        """The state of a file whose arrays cannot be used, whatever made them. Raises one of npz.DAMAGE."""

    @abstractmethod
    def _is_current(self, entry: Entry, written: dict[str, Any], sums: Mapping[str, int]) -> bool:
        """Whether the identity ``written`` is that of this item, encoder and of arrays with these checksums."""
