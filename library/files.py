"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from library.console import size_text
from library.errors import NO_ROOM, UserError
from library.processes import MARK, ProcessMark, this_process

TEMPORARY_NAME = re.compile(rf"^\.({MARK})-[0-9a-f]{{8}}\.part(\.\w+)?$")
SILENCE = 3600.0
"""Seconds without a write after which another machine's temporary file is taken for that of a dead process."""
_tidied: set[Path] = set()
"""Folders from which this process has removed what killed ones had left."""


def require_regular(path: Path | str) -> None:
    """Raises UserError for a pipe or a device, which could keep a reader waiting for ever, and OSError as stat does."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UserError(f"{path} is not a regular file.")


def open_regular(path: Path | str) -> IO[bytes]:
    """The file, open for reading. Raises UserError for what is not a regular file, OSError as ``open`` does."""
    require_regular(path)
    return open(path, "rb")


def open_without_waiting(path: str, flags: int) -> int:
    """An opener for ``open`` that does not wait for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def temporary_path(path: Path) -> Path:
    """A hidden sibling of ``path`` that ``remove_stale_temporaries`` recognises; its name holds the writing process.

    The name is short whatever ``path`` is called, so that each name which a file may have can be written. What killed
    processes have left in the folder is removed when this process first writes there.
    """
    if path.parent not in _tidied:
        _tidied.add(path.parent)
        remove_stale_temporaries(path.parent)
    return path.with_name(f".{this_process()}-{uuid.uuid4().hex[:8]}.part")


def replace_when_complete(temporary: Path, path: Path) -> None:
    """Flush ``temporary`` to disk and give it the name ``path`` in one step."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def explaining_full_disk(path: Path, size: int | Callable[[], int]) -> Iterator[None]:
    """Around the writing of ``path``, which takes ``size`` bytes: OSError says how many of them are missing.

    What was written of it has to be removed inside. With other reasons than a full disk the error stays as it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        needed = size if isinstance(size, int) else size()
        raise OSError(error.errno, f"{os.strerror(error.errno)}: {_room(path, needed)}", str(path)) from None


def _room(path: Path, needed: int) -> str:
    """How much room there is for a file of this many bytes."""
    free = free_bytes(path.parent)
    if needed > free:
        return f"{size_text(needed)} needed, {size_text(free)} free, {size_text(needed - free)} missing"
    return f"{size_text(needed)} needed, and {size_text(free)} free: a quota or a limit on the size of files is reached"


@contextlib.contextmanager
def writing(path: Path | str, size: int = 0) -> Iterator[IO[Any]]:
    """Open a file for binary writing that takes the name ``path`` when the block ends well, and vanishes when not.

    New files get the permissions that the user's umask gives. Raises OSError as ``open`` does; on a full disk it says
    how much is missing for ``size`` bytes, or for those that were written if they are more.
    """
    path = Path(path)
    temporary = temporary_path(path)
    written = 0
    with explaining_full_disk(path, lambda: max(size, written)):
        try:
            with open(temporary, "wb") as file:
                try:
                    yield file
                finally:
                    with contextlib.suppress(OSError, ValueError):
                        written = file.tell()
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text with ``\\n`` line ends, complete or not at all."""
    data = text.encode("utf-8", "backslashreplace")  # a name that is no UTF-8; in JSON this is its escape
    with writing(path, len(data)) as file:
        file.write(data)


def write_new(names: Iterable[Path], data: bytes) -> Path:
    """Write ``data`` under the first of ``names`` (in one folder) that is free; returns it.

    Complete or not at all, and never over a file that is there, whoever writes beside this process.
    """
    names = iter(names)
    path = next(names)
    temporary = temporary_path(path)
    with explaining_full_disk(path, len(data)):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            while True:
                try:
                    return _name_once(temporary, path)
                except FileExistsError:
                    path = next(names)
        finally:
            temporary.unlink(missing_ok=True)


def write_once(path: Path, data: bytes) -> None:
    """Write a file that is not there yet, complete or not at all. Raises FileExistsError if it is there."""
    try:
        write_new([path], data)
    except StopIteration:
        raise FileExistsError(path) from None


@contextlib.contextmanager
def held(path: Path) -> Iterator[bool]:
    """Let nobody else who asks for this change a file; gives whether there is one, which is then safe to replace.

    Where files cannot be locked, as on Windows, it only looks.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where a file that is open could not be replaced either
        yield path.exists()
        return
    while path.exists():
        try:
            file = _opened(path)
        except FileNotFoundError:
            continue
        with file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                is_current = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            except FileNotFoundError:
                is_current = False
            if is_current:  # and not the one that a process before this has replaced
                yield True
                return
    yield False


def _opened(path: Path) -> IO[bytes]:
    """A regular file, open for writing if possible, as locks of network file systems need it. Raises UserError."""
    open_regular(path).close()
    try:
        return open(path, "rb+")
    except PermissionError:
        return open(path, "rb")


def remove_whole(path: Path) -> None:
    """Remove a file or a folder, if there is one; a folder is never seen half-removed under its name."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    aside = temporary_path(path)
    os.replace(path, aside)
    shutil.rmtree(aside)


def _name_once(temporary: Path, path: Path) -> Path:
    """Give a file a name that no other has. Raises FileExistsError."""
    try:
        os.link(temporary, path)  # unlike a renaming, this fails where the name is taken
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(temporary, path)
    return path


def stale_temporaries(folder: Path) -> list[Path]:
    """Temporary files and folders in ``folder`` that a process which no longer runs has left behind.

    Those of another machine, whose processes cannot be seen, count when nobody has written to them for ``SILENCE``.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name.startswith(".") and ".part" in entry.name]
    except OSError:
        return []
    matches = [match for name in names if (match := TEMPORARY_NAME.match(name))]
    return [folder / match[0] for match in matches if _is_stale(folder / match[0], match[1])]


def _is_stale(path: Path, text: str) -> bool:
    mark = ProcessMark.parse(text)
    assert mark is not None
    if mark.is_here:
        return not mark.runs
    try:
        parts = [path, *path.iterdir()] if path.is_dir() and not path.is_symlink() else [path]
        return time.time() - max(part.lstat().st_mtime for part in parts) > SILENCE
    except OSError:
        return False


def remove_stale_temporaries(folder: Path) -> None:
    """Remove what ``stale_temporaries`` finds, as far as possible."""
    for entry in stale_temporaries(folder):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                entry.unlink()


def require_writable_folder(folder: Path, option: str, read_only: bool = False) -> None:
    """Make ``folder``, prove that a file can be written there, and remove what killed runs left half-written in it.

    With ``read_only`` nothing is made: the permissions of the folder, or of the nearest one above it that exists, are
    trusted. Raises UserError naming ``option`` when writing is not possible.
    """
    try:
        if read_only:
            _require_permission(folder)
            return
        folder.mkdir(parents=True, exist_ok=True)
        probe = temporary_path(folder / "probe")
        probe.touch()
        probe.unlink()
        remove_stale_temporaries(folder)
    except OSError as error:
        raise UserError(
            f"{option}: cannot write in {folder} ({error.strerror}); choose a folder you can write to."
        ) from None


def nearest_folder(folder: Path) -> Path:
    """``folder`` if it exists, else the nearest above it that does."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def free_bytes(folder: Path) -> int:
    """What is free on the disk of ``folder``, which need not exist yet."""
    return shutil.disk_usage(nearest_folder(folder)).free


def _require_permission(folder: Path) -> None:
    """Raises OSError when ``folder`` could not be made or written in."""
    existing = nearest_folder(folder)
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
