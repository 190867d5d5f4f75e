"""True processes of the scripts without the seconds that each spends on imports.

A fork server, one for each test worker, has imported them; every script that it starts is a child of it with its own
process number, signals, files and exit code. What ``accelerate launch`` itself does is tested with ``running.launch``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
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
    """Starts scripts as children of a process that has imported what they need. A context manager."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fork_server_")
        self._numbers = itertools.count()
        self._answers: queue.Queue[int | None] = queue.Queue()
        self._running: dict[int, Started] = {}
        self._ended: dict[int, int] = {}
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        threading.Thread(target=self._listen, daemon=True).start()
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
        number = next(self._numbers)
        words = [str(argument) for argument in arguments]
        file = output or Path(self._folder.name) / f"{number}.txt"
        request = {
            "number": number,
            "script": script,
            "arguments": words,
            "cwd": str(cwd),
            "environment": {**os.environ, **(environment or {})},
            "output": str(file),
            "limits": dict(limits or {}),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
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
        """End the server and whatever still runs."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._folder.cleanup()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _answer(self) -> int:
        answer = self._answers.get(timeout=120)
        if answer is None:
            raise RuntimeError("the fork server has ended")
        return answer

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
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
