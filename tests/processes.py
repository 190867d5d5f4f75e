"""True processes of the scripts without the seconds that each spends on imports.

A fork server, one for all test workers, has imported them; every script that it starts is a child of it with its own
process number, signals, files and exit code. What ``accelerate launch`` itself does is tested with ``running.launch``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Started:
    """A script that was started: like subprocess.Popen, with its output (both streams, in order) as ``output``."""

    def __init__(self, pid: int, words: list[str], output: Path):
        self.pid, self.words, self.output_file = pid, words, output
        self._code: int | None = None
        self._ended = threading.Event()

    @property
    def returncode(self) -> int | None:
        """None while it runs; the exit code, or minus the number of the signal that ended it."""
        return self._code

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.output_file.read_text(encoding="utf-8", errors="replace") if self.output_file.exists() else ""

    def poll(self) -> int | None:
        """``returncode`` now."""
        return self._code

    def wait(self, timeout: float = 300) -> int:
        """Its exit code when it has ended; kills it and raises TimeoutExpired after ``timeout`` seconds."""
        if not self._ended.wait(timeout):
            self.kill()
            raise subprocess.TimeoutExpired(self.words, timeout, self.output)
        assert self._code is not None
        return self._code

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once, with whatever it has started; returns when it is gone."""
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self._ended.wait(60)

    def _end(self, code: int) -> None:
        self._code = code
        self._ended.set()


class ForkServer:
    """Starts scripts as children of a process that has imported what they need. A context manager.

    Who gives the same ``folder`` shares that process: the first one starts it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._outputs = tempfile.TemporaryDirectory(prefix="fork_server_")
        self._numbers = itertools.count()
        self._answers: queue.Queue[int | None] = queue.Queue()
        self._running: dict[int, Started] = {}
        self._ended: dict[int, int] = {}
        self._lock = threading.Lock()
        self._connection = _connect(folder)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self._answer()

    def start(
        self,
        script: str,
        *arguments: object,
        cwd: Path = ROOT,
        environment: Mapping[str, str] | None = None,
        output: Path | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> Started:
        """Start ``script`` (``flux_train_network.py``, ``tools/cache_latents.py``).

        ``environment`` is added to this process's own, ``output`` is the file that it prints to, and ``limits`` are
        resource limits by name (``{"RLIMIT_FSIZE": 1000}``).
        """
        words = [str(argument) for argument in arguments]
        file = output or Path(self._outputs.name) / f"{next(self._numbers)}.txt"
        request = {
            "script": script,
            "arguments": words,
            "cwd": str(cwd),
            "environment": {**os.environ, **(environment or {})},
            "output": str(file),
            "limits": dict(limits or {}),
        }
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        started = Started(self._answer(), [script, *words], file)
        with self._lock:
            self._running[started.pid] = started
            if started.pid in self._ended:
                self._finish(started.pid, self._ended.pop(started.pid))
        return started

    def run(self, script: str, *arguments: object, timeout: float = 300, **how: object) -> Started:
        """Start ``script`` and wait for its end."""
        started = self.start(script, *arguments, **how)  # type: ignore[arg-type]
        started.wait(timeout)
        return started

    def close(self) -> None:
        """End whatever still runs, and the server if nobody else uses it."""
        self._connection.shutdown(socket.SHUT_WR)
        self._listener.join(60)
        self._connection.close()
        self._outputs.cleanup()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _answer(self) -> int:
        answer = self._answers.get(timeout=600)
        if answer is None:
            raise RuntimeError("the fork server has ended")
        return answer

    def _listen(self) -> None:
        with contextlib.suppress(OSError), self._connection.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                event = json.loads(line)
                if "ended" in event:
                    with self._lock:
                        if event["ended"] in self._running:
                            self._finish(event["ended"], event["code"])
                        else:
                            self._ended[event["ended"]] = event["code"]
                else:
                    self._answers.put(event.get("started", 0))
        self._answers.put(None)

    def _finish(self, pid: int, code: int) -> None:
        self._running.pop(pid)._end(code)


def _connect(folder: Path) -> socket.socket:
    """A connection to the server of this folder, which is started if there is none."""
    import fcntl

    address = str(folder / "fork_server")
    connection = socket.socket(socket.AF_UNIX)
    with open(f"{address}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            connection.connect(address)
            return connection
        except OSError:
            Path(address).unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()
            connection.connect(address)
            subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("fork_server.py")), str(listener.fileno()), address],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
    return connection
