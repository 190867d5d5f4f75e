"""Cache files: ``.npz`` archives that hold several entries, are added to, and are only ever whole.

Written as NumPy writes them (uncompressed), so that any program reads them. The archive's directory holds a checksum of
each array, which tells without reading an array whether it is still the one that was written.
"""

from __future__ import annotations

import contextlib
import io
import math
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy
from numpy.lib import format as npy

from library.errors import UserError
from library.files import held, open_regular, write_once, writing

# What reading a damaged archive raises.
DAMAGE = (OSError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, KeyError, RuntimeError)

LARGEST_ARRAY = 1 << 29
"""Bytes of one array, which is more than any cache holds; a small file may say that it unpacks to any number."""

# Threads of one process that add to the same file take turns.
_LOCKS = [threading.Lock() for _ in range(64)]


Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class ArrayHead:
    """What is known of a stored array without reading it."""

    shape: tuple[int, ...]
    dtype: numpy.dtype
    checksum: int

    def fits(self, wanted: Shape | None) -> bool:
        """Whether it is an array of numbers that torch takes, of the ``wanted`` shape."""
        return fits(self.shape, self.dtype, wanted)


def fits(shape: tuple[int, ...], dtype: numpy.dtype, wanted: Shape | None) -> bool:
    """Whether these are numbers that torch takes, of the ``wanted`` shape (None for any, in it for any length)."""
    if dtype.kind not in "fiub" or dtype.itemsize > 8 or not dtype.isnative:
        return False
    return wanted is None or has_shape(shape, wanted)


def has_shape(shape: tuple[int, ...], wanted: Shape) -> bool:
    """Whether a shape is the ``wanted`` one, in which None stands for any length."""
    return len(shape) == len(wanted) and all(want in (None, have) for have, want in zip(shape, wanted))


def encode_array(array: numpy.ndarray) -> bytes:
    """The array in NumPy's file format."""
    buffer = io.BytesIO()
    npy.write_array(buffer, numpy.asanyarray(array), allow_pickle=False)
    return buffer.getvalue()


def checksum(encoded: bytes) -> int:
    """The checksum that the archive's directory will hold for an encoded array."""
    return zlib.crc32(encoded)


def read_heads(path: Path) -> dict[str, ArrayHead]:
    """Shape, dtype and checksum of every array. Raises one of DAMAGE, and UserError for what is not a regular file."""
    heads = {}
    with open_regular(path) as opened, zipfile.ZipFile(opened) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                shape, _, dtype = _read_head(file, member.file_size)
            heads[member.filename.removesuffix(".npy")] = ArrayHead(shape, dtype, member.CRC)
    return heads


def read_arrays(path: Path, names: Iterable[str], if_there: str = "") -> dict[str, numpy.ndarray]:
    """The named arrays, and that with the name ``if_there`` if there is one, their checksums verified.

    Raises one of DAMAGE (KeyError: there is no such array), and UserError for what is not a regular file.
    """
    with open_regular(path) as opened, zipfile.ZipFile(opened) as archive:
        names = [*names, if_there] if f"{if_there}.npy" in archive.NameToInfo else names
        encoded = {name: _content(archive, f"{name}.npy") for name in names}
    return {name: _decoded(data) for name, data in encoded.items()}


def read_arrays_for_training(
    path: Path, wanted: Mapping[str, Shape | None], mark: str = "", is_ours: Callable[[str], bool] = bool
) -> dict[str, numpy.ndarray]:
    """The ``wanted`` arrays, which must be numbers of these shapes (see ``fits``). Raises UserError naming the file.

    So it does if there is a text under the name ``mark``, of which ``is_ours`` is false: another program, which shares
    the folder, has rebuilt the arrays from something else.
    """
    try:
        arrays = read_arrays(path, wanted, if_there=mark)
        text = arrays.pop(mark, None)
    except FileNotFoundError:
        raise UserError(f"{path}: the cache file has disappeared; start again to rebuild it.") from None
    except DAMAGE as error:
        reason = str(error).split("\n")[0].strip("'\"")
        raise UserError(f"{path}: the cache file is damaged ({reason}); delete it and start again.") from None
    if text is not None and not is_ours(str(text)):
        raise UserError(
            f"{path}: another training has rebuilt this cache file with other encoders or options; give each of "
            "them its own copy of the folder, or cache in memory."
        )
    for name, array in arrays.items():
        if not fits(array.shape, array.dtype, wanted[name]):
            raise UserError(
                f'{path}: the cache file is damaged, or of another model: "{name}" is {array.dtype} '
                f"{list(array.shape)}; delete it and start again."
            )
    return arrays


def _read_head(file: IO[bytes], size: int) -> tuple[tuple[int, ...], bool, numpy.dtype]:
    """Shape, whether columns come first, dtype; of an array in NumPy's format that takes ``size`` bytes.

    Raises ValueError unless the array fills them, so that what it says of itself reserves no memory.
    """
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"NumPy's format {version[0]}.{version[1]} is not known")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if any(side < 0 for side in shape) or file.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError("an array has not the size that it says")
    return shape, fortran_order, dtype


def _content(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member's bytes, its checksum verified. Raises one of DAMAGE."""
    size = archive.getinfo(name).file_size
    if size > LARGEST_ARRAY:
        raise ValueError(f"{name} takes {size:,} bytes, at most {LARGEST_ARRAY:,} are read")
    return archive.read(name)


def _decoded(data: bytes) -> numpy.ndarray:
    """The array of NumPy's file format. Raises ValueError, also for arrays of Python objects, which are code."""
    file = io.BytesIO(data)
    shape, fortran_order, dtype = _read_head(file, len(data))
    if dtype.hasobject:
        raise ValueError("an array of Python objects is not read")
    if 0 in shape or not dtype.itemsize:
        return numpy.empty(shape, dtype)
    flat = numpy.frombuffer(data, dtype, offset=file.tell()).copy()
    return flat.reshape(shape, order="F" if fortran_order else "C")


def update(path: Path, encoded: Mapping[str, bytes], keep: Callable[[str], bool]) -> None:
    """Write the encoded arrays into the archive, in one step; others in it stay when ``keep(name)`` says so.

    Safe among threads, and among processes that share the folder. What is left of a damaged archive is given up. Raises
    UserError when the file cannot be written.
    """
    try:
        with _LOCKS[hash(path) % len(_LOCKS)]:
            while not _update_once(path, encoded, keep):
                pass
    except OSError as error:
        raise UserError(f"{path}: cannot write the cache file ({error.strerror}).") from None


def _update_once(path: Path, encoded: Mapping[str, bytes], keep: Callable[[str], bool]) -> bool:
    """False if another process has changed the file in the meantime. Raises OSError and UserError."""
    with held(path) as is_there:
        kept = _readable_members(path, lambda name: name not in encoded and keep(name)) if is_there else {}
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for name, data in {**kept, **encoded}.items():
                archive.writestr(f"{name}.npy", data)
        if is_there or path.is_symlink():  # to nothing
            with writing(path, buffer.tell()) as file:
                file.write(buffer.getbuffer())
            return True
        try:
            write_once(path, buffer.getvalue())
        except FileExistsError:
            return False
        return True


def _readable_members(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The wanted members that are sound arrays."""
    found = {}
    try:
        with open_regular(path) as opened, zipfile.ZipFile(opened) as archive:
            for name in filter(wanted, (member.removesuffix(".npy") for member in archive.namelist())):
                with contextlib.suppress(*DAMAGE):
                    data = _content(archive, f"{name}.npy")
                    _read_head(io.BytesIO(data), len(data))
                    found[name] = data
    except DAMAGE:
        return {}
    return found
