"""Cache files: ``.npz`` archives that hold several entries, are added to, and are only ever whole.

Written as NumPy writes them (uncompressed), so that any program reads them. The archive's directory holds a checksum of
each array, which tells without reading an array whether it is still the one that was written.
"""

from __future__ import annotations

import io
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy
from numpy.lib import format as npy

from library.errors import UserError
from library.files import writing

# What reading a damaged archive raises.
DAMAGE = (OSError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, NotImplementedError)

# Threads of one process that add to the same file take turns.
_LOCKS = [threading.Lock() for _ in range(64)]


@dataclass(frozen=True)
class ArrayHead:
    """What is known of a stored array without reading it."""

    shape: tuple[int, ...]
    dtype: numpy.dtype
    checksum: int


def encode_array(array: numpy.ndarray) -> bytes:
    """The array in NumPy's file format."""
    buffer = io.BytesIO()
    npy.write_array(buffer, numpy.asanyarray(array), allow_pickle=False)
    return buffer.getvalue()


def checksum(encoded: bytes) -> int:
    """The checksum that the archive's directory will hold for an encoded array."""
    return zlib.crc32(encoded)


def read_heads(path: Path) -> dict[str, ArrayHead]:
    """Shape, dtype and checksum of every array. Raises one of DAMAGE."""
    heads = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                version = npy.read_magic(file)
                read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shape, _, dtype = read(file)
            heads[member.filename.removesuffix(".npy")] = ArrayHead(shape, dtype, member.CRC)
    return heads


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, numpy.ndarray]:
    """The named arrays, their checksums verified. Raises one of DAMAGE (KeyError: there is no such array)."""
    with zipfile.ZipFile(path) as archive:
        encoded = {name: archive.read(f"{name}.npy") for name in names}
    return {name: npy.read_array(io.BytesIO(data), allow_pickle=False) for name, data in encoded.items()}


def read_arrays_for_training(path: Path, names: Iterable[str]) -> dict[str, numpy.ndarray]:
    """As ``read_arrays``; raises UserError naming the file."""
    try:
        return read_arrays(path, names)
    except FileNotFoundError:
        raise UserError(f"{path}: the cache file is gone; start again to have it made.") from None
    except DAMAGE as error:
        reason = str(error).split("\n")[0].strip("'\"")
        raise UserError(f"{path}: the cache file is damaged ({reason}); delete it and start again.") from None


def update(path: Path, encoded: Mapping[str, bytes], keep: Callable[[str], bool]) -> None:
    """Write the encoded arrays into the archive, in one step; others in it stay when ``keep(name)`` says so.

    Safe among the threads of one process. What is left of a damaged archive is given up. Raises UserError when the file
    cannot be written.
    """
    try:
        with _LOCKS[hash(path) % len(_LOCKS)]:
            kept = _readable_members(path, lambda name: name not in encoded and keep(name))
            with writing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for name, data in {**kept, **encoded}.items():
                    archive.writestr(f"{name}.npy", data)
    except OSError as error:
        raise UserError(f"{path}: cannot write the cache file ({error.strerror}).") from None


def _readable_members(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    if not path.exists():
        return {}
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            return {name: archive.read(f"{name}.npy") for name in names if wanted(name)}
    except DAMAGE:
        return {}
