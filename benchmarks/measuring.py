"""What the benchmarks share: programs run and measured as a user runs them, and results as a table and a JSON line.

A benchmark is a list of ``Measure``. Each program prints a table for people and, last, one line of JSON for programs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Measure:
    """One figure. ``limit`` is the target, if there is one: at most that, or at least where ``better`` is "higher"."""

    what: str
    value: float
    unit: str = ""
    limit: float | None = None
    better: Literal["lower", "higher"] = "lower"

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.limit is None:
            return None
        return self.value <= self.limit if self.better == "lower" else self.value >= self.limit

    @property
    def target(self) -> str:
        """The target in signs, such as ``<= 5 s``; empty without one."""
        sign = "<=" if self.better == "lower" else ">="
        return "" if self.limit is None else f"{sign} {self.limit:g} {self.unit}".strip()


@dataclass(frozen=True)
class Usage:
    """What a program took: seconds on the clock, seconds of processor time with all its child processes, its output.

    ``wall_until`` and ``cpu_until`` are the same up to the moment at which it wrote the text that was waited for.
    """

    wall: float
    cpu: float
    output: str
    wall_until: float = 0.0
    cpu_until: float = 0.0


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser whose help is the program's description."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def environment(threads: int = 1) -> dict[str, str]:
    """The environment of measured programs: a fixed number of threads, and no network."""
    return {**os.environ, **ONE_THREAD, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def run_measured(command: Sequence[object], threads: int = 1, cwd: Path = ROOT, until: str | None = None) -> Usage:
    """Run a program to its end and measure it, also up to the moment at which it writes ``until``.

    Ends this process with the program's output when it fails or never writes that.
    """
    words = [str(word) for word in command]
    before, start = _children_cpu_seconds(), time.perf_counter()
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=cwd, env=environment(threads)
    )
    watch = _Watch(process.pid)
    if before is None:
        watch.start()
    assert process.stdout is not None
    output, moment = b"", None
    while chunk := os.read(process.stdout.fileno(), 1 << 16):
        output += chunk
        if moment is None and until is not None and until.encode() in output:
            moment = (time.perf_counter() - start, watch.cpu_seconds())
    process.wait()
    wall = time.perf_counter() - start
    cpu = watch.stop() if before is None else (_children_cpu_seconds() or 0.0) - before
    text = output.decode("utf-8", errors="replace")
    if process.returncode:
        sys.exit(f"{text}\nerror: {' '.join(words)} ended with code {process.returncode}")
    if until is not None and moment is None:
        sys.exit(f"{text}\nerror: {' '.join(words)} never wrote {until!r}")
    return Usage(wall, cpu, text, *(moment or (0.0, 0.0)))


def _children_cpu_seconds() -> float | None:
    """Processor time of all ended child processes and their children; None where the system does not keep it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class _Watch(threading.Thread):
    """Processor time of a running process and its children, as last seen; looked at again and again once started."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.seen: dict[int, float] = {}
        self.ended = threading.Event()

    def cpu_seconds(self) -> float:
        """Look now."""
        import psutil

        try:
            root = psutil.Process(self.pid)
            for part in (root, *root.children(recursive=True)):
                times = part.cpu_times()
                self.seen[part.pid] = times.user + times.system
        except psutil.NoSuchProcess:
            pass  # it ended between two looks; what it took until the last one counts
        return sum(self.seen.values())

    def run(self) -> None:
        while not self.ended.wait(POLL_SECONDS):
            self.cpu_seconds()

    def stop(self) -> float:
        """End the looking; what was seen."""
        self.ended.set()
        self.join()
        return sum(self.seen.values())


class Attempts:
    """Parts of a benchmark, of which some may fail, run out of memory or get no time: the others are still reported."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        """What did not work, in words."""
        self._is_over = False
        signal.signal(signal.SIGTERM, self._end)

    def _end(self, *_: object) -> None:
        raise TimeoutError("the time was up")

    def in_time(self, names: Iterable[str]) -> Iterator[str]:
        """The names of parts, one after another, until SIGTERM; those whose turn never comes are failures."""
        for name in names:
            if self._is_over:
                self.failures.append(f"{name}: no time was left")
            else:
                yield name

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Notes an error that ends the part."""
        try:
            yield
        except Exception as error:
            self._is_over = self._is_over or isinstance(error, TimeoutError)
            first_line = (str(error).strip().splitlines() or [""])[0][:200]
            self.failures.append(f"{name}: {type(error).__name__}: {first_line}")
            print(f"failed: {self.failures[-1]}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """End the program, with an error where a part has failed."""
        if self.failures:
            sys.exit(f"error: {len(self.failures)} parts failed: {'; '.join(self.failures)}")


def peak_memory() -> int:
    """The most memory in bytes that this process has held at once (pages of mapped files in memory included)."""
    from library.training.report.timing import peak_process_memory

    return peak_process_memory()


def present_memory() -> int:
    """The memory in bytes that this process holds now."""
    import psutil

    return psutil.Process().memory_info().rss


def machine(device: str = "cpu", threads: int = 1) -> dict[str, Any]:
    """Where and when a figure was taken."""
    import torch

    device_name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{threads} CPU thread(s)"
    return {
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "device": device_name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def report(
    benchmark: str,
    measures: Sequence[Measure],
    options: argparse.Namespace,
    where: Mapping[str, Any] | None = None,
    **details: Any,
) -> None:
    """Print the table and the JSON line; ``details`` go into the JSON line only."""
    lines = [("", "value", "target", "")]
    for measure in measures:
        verdict = {True: "met", False: "NOT MET", None: ""}[measure.met]
        lines.append((measure.what, f"{measure.value:.4g} {measure.unit}".strip(), measure.target, verdict))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    print(f"\n{benchmark}")
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    print()
    result = {
        "benchmark": benchmark,
        "machine": dict(where or machine()),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "measures": [{**asdict(measure), "met": measure.met} for measure in measures],
        **details,
    }
    print(json.dumps(result), flush=True)
