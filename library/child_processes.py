"""Stopping what another program has started: as Ctrl-C in its terminal would, or at once."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any

LAUNCHER = "accelerate.commands.launch"
"""The module of ``accelerate launch``."""


def press_ctrl_c(process: Any) -> None:
    """Ask a process (anything with a ``pid``) to end, as Ctrl-C does; a launcher's trainings in place of a launcher.

    A launcher would end with a traceback while what it has launched ends its step; so it is left to wait. On Windows
    everything in the console of this process is asked.
    """
    if os.name == "nt":
        os.kill(0, signal.CTRL_C_EVENT)  # type: ignore[attr-defined]
        return
    import psutil

    with contextlib.suppress(psutil.Error):
        for one in _those_who_work(psutil.Process(process.pid)):
            with contextlib.suppress(psutil.Error):
                one.send_signal(signal.SIGINT)


def end_at_once(process: Any) -> None:
    """Kill a process and everything that it has started."""
    import psutil

    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(process.pid)
        for one in (*parent.children(recursive=True), parent):
            with contextlib.suppress(psutil.Error):
                one.kill()


def _those_who_work(process: Any) -> list[Any]:
    """The process, or what it has launched if it only waits for that."""
    import psutil

    with contextlib.suppress(psutil.Error):
        if LAUNCHER in process.cmdline():
            return [one for child in process.children() for one in _those_who_work(child)] or [process]
    return [process]
