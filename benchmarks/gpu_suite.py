"""Everything that a GPU can show, in one command and at most eight minutes: its tests, then the full-size programs.

    python benchmarks/gpu_suite.py                                # on a GPU
    python benchmarks/gpu_suite.py --device cpu --size tiny       # the same programs, small, where there is none
    python benchmarks/gpu_suite.py --list                         # what would run, in which order, for how long at most

Most important first. Each program has a process of its own, a time limit, and what is left of the whole time; one that
fails, runs out of memory or out of time keeps what it has measured, and the next one runs. Nothing is downloaded. What
needs a package that isn't installed is left out, and the table says so. Figures go to one JSON file and one Markdown
file in ``--output``. The exit code is 1 where a program or a test failed, whatever the targets say.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import ROOT, environment, machine, parser
from benchmarks.run_all import measures
from library.files import write_text

SECONDS = 480.0
TO_REPORT = 10.0
"""Seconds that a program has to report what it has measured when its time is up."""
TRAINING = ("accelerate", "transformers", "pydantic", "tomli", "toml", "PIL", "tensorboard")
"""What tests need that run a training script."""
TRAINS = "each_format_trains"
"""The test among those of storage formats that does."""
FOR_EVERY_TEST = ("pytest", "hypothesis", "safetensors", "numpy")


@dataclass(frozen=True)
class Job:
    """A program or a file of tests."""

    name: str
    words: list[str]
    """What Python is given."""
    seconds: float
    """The most that it may take on a GPU."""
    needs: tuple[str, ...] = ()
    """Packages without which it is left out."""
    is_tests: bool = False


@dataclass
class Outcome:
    """What became of a job."""

    name: str
    state: str
    """In words: ``ran``, or what prevented it."""
    seconds: float = 0.0
    failed: bool = False
    results: list[dict[str, Any]] = field(default_factory=list)
    """The JSON lines that it printed."""
    remarks: list[str] = field(default_factory=list)
    end_of_output: str = ""


def jobs(device: str, size: str) -> list[Job]:
    """All of them, most important first."""

    def tests(*names: str, seconds: float, only: str = "", needs: Sequence[str] = ()) -> Job:
        marked = ["-m", "gpu"] if device != "cpu" else []
        marked += ["--noconftest"] if missing(TRAINING) and not needs else []
        words = [
            "-m",
            "pytest",
            "-q",
            "--import-mode=importlib",
            "-p",
            "no:cacheprovider",
            *marked,
            *(["-k", only] if only else []),
        ]
        paths = [f"tests/gpu/test_{name}_on_cuda.py" for name in names]
        label = f"tests: {', '.join(names)}" + (f" ({only})" if only else "")
        return Job(label, [*words, *paths], seconds, (*FOR_EVERY_TEST, *needs), is_tests=True)

    def program(name: str, *more: str, seconds: float) -> Job:
        words = [f"benchmarks/{name}.py", "--device", device, "--size", size, *more]
        return Job(" ".join([name, *more]), words, seconds)

    without = " and not nf4" if missing(["bitsandbytes"]) else ""
    trains = (*TRAINING, "bitsandbytes")
    found = [
        tests("streaming", "steps", "attention", seconds=85),
        program("block_streaming", seconds=130),
        program("train_step", seconds=130),
        tests("storage_formats", seconds=40, only=f"not {TRAINS}{without}"),
        program("formats", seconds=40),
        tests("flux_training", seconds=60, needs=trains),
        tests("storage_formats", seconds=60, only=TRAINS, needs=trains),
        program("compile", seconds=100),
        program("train_step", "--variant", "chroma", "--ways", "checkpointed", seconds=40),
    ]
    if size == "full":
        found.append(program("train_step", "--resolution", "512", "--ways", "checkpointed", "plain", seconds=40))
    found.append(tests("stable_diffusion_training", seconds=60, needs=(*trains, "diffusers")))
    found.append(tests("text_to_image_families", seconds=60, needs=(*trains, "diffusers")))
    return found


def missing(packages: Sequence[str]) -> list[str]:
    """Those that aren't installed."""
    return [package for package in packages if importlib.util.find_spec(package) is None]


def run(job: Job, seconds: float, threads: int = 1) -> Outcome:
    """Run a job for at most ``seconds``, then let it report, then end it with all that it has started."""
    lacking = missing(job.needs)
    if lacking:
        return Outcome(job.name, f"left out: without {', '.join(lacking)}")
    if seconds <= TO_REPORT:
        return Outcome(job.name, "left out: no time was left")
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *job.words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env={**environment(threads), "PYTHONUNBUFFERED": "1"},
        start_new_session=os.name == "posix",
    )
    state = "ran"
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds - TO_REPORT))
    except subprocess.TimeoutExpired:
        state = "ended by its time limit"
        process.terminate()
        try:
            output, _ = process.communicate(timeout=TO_REPORT)
        except subprocess.TimeoutExpired:
            _end_all(process)
            output, _ = process.communicate()
    text = output.decode("utf-8", errors="replace")
    if process.returncode and state == "ran":
        state = f"ended with code {process.returncode}"
    outcome = Outcome(job.name, state, time.perf_counter() - start, state != "ran", end_of_output=text[-4000:])
    for line in text.splitlines():
        if line.startswith('{"benchmark"'):
            outcome.results.append(json.loads(line))
    lines = [line for line in text.strip().splitlines() if line]
    if job.is_tests and lines:
        outcome.remarks.append(lines[-1].strip("= "))
        outcome.remarks += [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    for result in outcome.results:
        outcome.remarks += [f"failed: {failure}" for failure in result.get("failures", [])]
        outcome.remarks += [f"left out: {skipped}" for skipped in result.get("skipped", [])]
    return outcome


def _end_all(process: subprocess.Popen[bytes]) -> None:
    """End a program and what it has started."""
    if os.name == "posix":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def markdown(outcomes: Sequence[Outcome], where: dict[str, Any]) -> str:
    """All figures as a table, and what became of each job."""
    place = (
        f"{where['date']}, {where['device']}, {where['processor']}, Python {where['python']}, torch {where['torch']}"
    )
    lines = [place, "", "| job | what became of it | seconds |", "| --- | --- | ---: |"]
    for outcome in outcomes:
        words = "; ".join([outcome.state, *outcome.remarks]).replace("|", "/")
        lines.append(f"| {outcome.name} | {words} | {outcome.seconds:.0f} |")
    lines += ["", "| program | figure | value | target | met |", "| --- | --- | ---: | ---: | :---: |"]
    for outcome in outcomes:
        for measure in (measure for result in outcome.results for measure in measures(result)):
            met = {True: "yes", False: "**no**", None: ""}[measure.met]
            value = f"{measure.value:.4g} {measure.unit}".strip()
            lines.append(f"| `{outcome.name}` | {measure.what} | {value} | {measure.target} | {met} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all, keep the figures after each, print them."""
    arguments = parser(__doc__)
    arguments.add_argument("--device", default="cuda", help="cuda or cpu")
    arguments.add_argument("--size", choices=["tiny", "full"], default="full", help="of the models")
    arguments.add_argument("--seconds", type=float, default=SECONDS, help="for everything together")
    arguments.add_argument("--output", type=Path, default=Path("gpu_suite_results"), help="folder of the two files")
    arguments.add_argument("--only", nargs="+", metavar="WORD", help="jobs whose names contain one of these")
    arguments.add_argument("--list", action="store_true", help="only say what would run")
    options = arguments.parse_args()
    chosen = [
        job
        for job in jobs(options.device, options.size)
        if not options.only or any(word in job.name for word in options.only)
    ]
    if options.list:
        for job in chosen:
            lacking = missing(job.needs)
            note = f" (left out: without {', '.join(lacking)})" if lacking else ""
            print(f"{job.seconds:4.0f} s at most: {' '.join(job.words)}{note}")
        return
    where = _machine(options)
    deadline = time.perf_counter() + options.seconds
    outcomes: list[Outcome] = []
    for job in chosen:
        left = deadline - time.perf_counter()
        print(f"{job.name} ...", flush=True)
        is_cpu = options.device == "cpu"  # one thread, as everywhere, and no limit but the whole time
        outcomes.append(run(job, left if is_cpu else min(left, job.seconds), 1 if is_cpu else os.cpu_count() or 1))
        print(f"  {outcomes[-1].state}, {outcomes[-1].seconds:.0f} s", flush=True)
        write_files(options, outcomes, where)
    print("\n" + markdown(outcomes, where))
    failed = [outcome.name for outcome in outcomes if outcome.failed]
    if failed:
        sys.exit(f"error: {len(failed)} of {len(outcomes)} jobs failed: {'; '.join(failed)}")


def write_files(options: argparse.Namespace, outcomes: Sequence[Outcome], where: dict[str, Any]) -> None:
    """What is known so far, so that nothing is lost when this program is ended, too."""
    options.output.mkdir(parents=True, exist_ok=True)
    whole = {"machine": where, "size": options.size, "jobs": [vars(outcome) for outcome in outcomes]}
    write_text(options.output / "results.json", json.dumps(whole, indent=1) + "\n")
    write_text(options.output / "results.md", markdown(outcomes, where))


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    """Where the figures are taken. Ends the program where there is no such device."""
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA device here; --device cpu --size tiny tries the programs without one.")
    return machine(options.device, 1)


if __name__ == "__main__":
    main()
