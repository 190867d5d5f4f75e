"""A function in a child of this process that is forked, and how much memory a call takes there; on Linux.

The child has imported all that this process has, so it costs no more than the function.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STATUS = Path("/proc/self/status")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""
linux_only = pytest.mark.skipif(not STATUS.exists(), reason="memory is read from Linux's /proc")


def in_a_child(function: Callable[[], Any]) -> Any:
    """What the function returns in a forked child, as JSON passes it on."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        failed = 1
        try:
            give_back()
            os.write(writing, json.dumps(function()).encode())
            failed = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(failed)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child failed; its traceback is above"
    return json.loads(answer)


def keep_freed_memory(is_kept: bool) -> None:
    """Whether glibc keeps what is freed for what is allocated next, or gives large pieces back to the system at once.

    To keep it saves a run of a tiny model a twentieth of its time. Elsewhere than on glibc, nothing is done.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(libc, "mallopt"):
        for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            libc.mallopt(parameter, 1 << 30 if is_kept else 1 << 17)  # the latter is glibc's own


def give_back() -> None:
    """Memory that is free but still counts as the process's own must not be used again by what is measured."""
    gc.collect()
    keep_freed_memory(False)
    ctypes.CDLL(None).malloc_trim(0)


def memory(entry: str) -> int:
    """An entry of the process's memory in bytes: ``RssAnon`` is its own now, ``VmHWM`` the peak with mapped files."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[entry].split()[0]) * 1024


def growth(call: Callable[[], object]) -> int:
    """By how many bytes a call's peak of memory passes what was there, looked at a thousand times a second.

    Pages of mapped files do not count: the system keeps as many of them as there is room for.
    """
    give_back()
    before, peak, done = memory("RssAnon"), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = call()
    done.set()
    watcher.join()
    del kept
    return peak - before
