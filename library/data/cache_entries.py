"""Entries of caches: which of them are missing, who makes them, and the threads that write."""

from __future__ import annotations

import functools
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy

from library.data import npz
from library.data.dataset import Item
from library.data.images import image_extensions
from library.data.items import shortened
from library.data.threads import in_threads
from library.errors import UserError
from library.files import remove_stale_temporaries

if TYPE_CHECKING:
    from tqdm import tqdm

State = Literal["missing", "valid", "stale", "damaged", "not finite"]

# The array that says what an entry was made from.
IDENTITY = "identity"

WRITE_THREADS = 4
WRITES_WAITING = 16


@dataclass
class CacheReport:
    """What became of the entries of a cache on this process."""

    subject: str
    kept: int = 0
    made: int = 0
    rebuilt: Counter[str] = field(default_factory=Counter)
    """Entries that were there but could not be used, by reason."""

    def line(self) -> str:
        """One sentence for the log."""
        text = f"{self.subject}: {self.kept} kept, {self.made} made"
        if total := self.rebuilt.total():
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.rebuilt.items()))
            text += f", {total} rebuilt ({reasons})"
        return text


@dataclass
class Entry:
    """One cache entry and the items that use it."""

    item: Item
    """Any one of the items; it is what the entry is made from."""
    items: list[Item]
    file: str | None
    """The path of the cache file; None in memory. Text, because most entries of a large dataset need no more."""
    signature: tuple[Hashable, ...]
    """What must be equal for items to share an entry."""
    state: State = "missing"

    @functools.cached_property
    def path(self) -> Path | None:
        """The cache file; None in memory."""
        return None if self.file is None else Path(self.file)


def cache_stem(item: Item) -> str:
    """The image's path without its extension (which it lacks when only cache files are left of it)."""
    stem, extension = os.path.splitext(path := str(item.path))
    return stem if extension in image_extensions() else path


def share_entries(
    wanted: Iterable[tuple[Hashable, Item, str | None, tuple[Hashable, ...]]], explain: Callable[[Entry, Item], str]
) -> list[Entry]:
    """One entry for all items with the same key. Raises UserError when their signatures differ."""
    entries: dict[Hashable, Entry] = {}
    for key, item, file, signature in wanted:
        entry = entries.get(key)
        if entry is None:
            entry = entries[key] = Entry(item, [], file, signature)
        if entry.signature != signature:
            raise UserError(explain(entry, item))
        entry.items.append(item)
    return list(entries.values())


def check_states(entries: Sequence[Entry], check: Callable[[Entry], State], *, skip_check: bool) -> None:
    """Set the state of every entry on disk; with ``skip_check`` a file that exists is valid."""

    there = _existing(entry.file for entry in entries if entry.file is not None)
    found = [entry for entry in entries if entry.file in there]
    states: Sequence[State] = ["valid"] * len(found) if skip_check else in_threads(check, found)
    for entry, state in zip(found, states):
        entry.state = state


def _existing(paths: Iterable[str]) -> set[str]:
    """Those of ``paths`` that exist; each folder is listed once."""
    names: dict[str, set[str]] = {}
    there = set()
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in names:
            try:
                names[folder] = set(os.listdir(folder))
            except OSError:
                names[folder] = set()
        if name in names[folder]:
            there.add(path)
    return there


Share = tuple[int, int]
"""Which of how many processes: number (from 0) and count."""
FolderShares = Callable[[Sequence[Path]], Sequence[Share]]
"""For each of some folders, which process this one is among those that see it; every process asks at once."""


def entries_of_process(entries: Sequence[Entry], shares: FolderShares) -> list[Entry]:
    """The entries that this process makes: on disk every file belongs to one process, in memory each makes all."""
    files = {file: number for number, file in enumerate(dict.fromkeys(e.file for e in entries if e.file is not None))}
    folders = list(dict.fromkeys(map(os.path.dirname, files)))
    share_of = dict(zip(folders, shares(list(map(Path, folders)))))

    def is_own(file: str) -> bool:
        number, count = share_of[os.path.dirname(file)]
        return files[file] % count == number

    return [entry for entry in entries if entry.file is None or is_own(entry.file)]


def require_images(entries: Iterable[Entry]) -> None:
    """Raises UserError when an entry must be made from an image that is not there."""
    lost = [entry.item.key for entry in entries if not entry.item.exists]
    if lost:
        raise UserError("\n".join(["There is neither a usable latent cache nor an image for:", *shortened(lost)]))


def report_on(entries: Sequence[Entry], subject: str) -> CacheReport:
    """The report once every entry that was not valid has been made."""
    made = [entry for entry in entries if entry.state != "valid"]
    rebuilt = Counter(str(entry.state) for entry in made if entry.state != "missing")
    return CacheReport(subject, len(entries) - len(made), len(made), rebuilt)


def clean_folders(entries: Iterable[Entry]) -> None:
    """Remove what killed runs have left half-written beside the cache files."""
    for folder in {os.path.dirname(entry.file) for entry in entries if entry.file is not None}:
        remove_stale_temporaries(Path(folder))


def progress_bar(total: int, title: str, unit: str, *, shown: bool) -> tqdm:
    """A progress bar in plain ASCII, with a rate."""
    from tqdm import tqdm

    return tqdm(total=total, desc=title, unit=unit, ascii=True, disable=not shown or not total)


class Writers:
    """Threads that store results beside the encoder's work; the first error is raised at the next chance."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(WRITE_THREADS, thread_name_prefix="cache-writer")
        self._pending: deque[Future[None]] = deque()

    def submit(self, store: Callable[..., None], *arguments: Any) -> None:
        """Run ``store(*arguments)`` in a thread; waits while too many are waiting."""
        self._pending.append(self._pool.submit(store, *arguments))
        while self._pending and (self._pending[0].done() or len(self._pending) > WRITES_WAITING):
            self._pending.popleft().result()

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            for future in self._pending:
                future.result()


def in_batches(entries: Sequence[Entry], size: int, alike: Callable[[Entry], Hashable]) -> Iterator[list[Entry]]:
    """Slices of at most ``size`` entries that are alike, in order."""
    batch: list[Entry] = []
    for entry in entries:
        if batch and (len(batch) == size or alike(entry) != alike(batch[0])):
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch


def all_finite(arrays: Mapping[str, numpy.ndarray]) -> bool:
    """Whether floating-point arrays hold neither NaN nor infinity."""
    floating = [array for array in arrays.values() if numpy.issubdtype(array.dtype, numpy.floating)]
    return all(bool(numpy.isfinite(array).all()) for array in floating)


def require_finite_arrays(path: Path, arrays: Mapping[str, numpy.ndarray]) -> None:
    """Raises UserError that names the cache file and the array in which there is NaN or infinity."""
    for name, array in arrays.items():
        if not all_finite({name: array}):
            raise UserError(
                f'{path}: the cache file holds numbers that are not finite in "{name}"; delete it and start again.'
            )


def read_identity(path: Path, name: str) -> dict[str, Any]:
    """What an entry says it was made from. Raises one of npz.DAMAGE."""
    text = npz.read_arrays(path, [name])[name].item()
    written = json.loads(text) if isinstance(text, str) else None
    if not isinstance(written, dict) or not isinstance(written.get("arrays"), dict):
        raise ValueError("the identity is not what was written")
    return written
