"""Run one training after the other, each described by a file.

    python tools/run_queue.py jobs/*.toml
    python tools/run_queue.py jobs/*.toml --queue_dir overnight --launch_args "--num_processes 2"

A job is a ``--config_file``; its key ``script`` names the training script (``script = "flux_train_network.py"``). All
files are checked before the first run starts. Each run writes its own log into ``--queue_dir``, where ``index.html``
shows how far the queue is, with a link to each run's report. A run that fails does not stop those behind it. The same
command goes on where the queue was ended: what is done is not run again, and a run that was interrupted resumes from
its newest state, if it saves any.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from library import families  # noqa: E402
from library.child_processes import LAUNCHER, end_at_once, press_ctrl_c  # noqa: E402
from library.console import run_script  # noqa: E402
from library.errors import UserError  # noqa: E402
from library.files import write_text  # noqa: E402
from library.html_pages import link_from, render_page  # noqa: E402
from library.options import configured_value, parse_options  # noqa: E402
from library.text_files import parse_json, read_text  # noqa: E402
from library.training.output.checkpoints import OutputFolder  # noqa: E402

STATE_FILE, PAGE = "queue.json", "index.html"
WAITING, RUNNING, DONE, FAILED, INTERRUPTED = "waiting", "running", "done", "failed", "interrupted"
SAVES = ("save_state", "save_state_on_train_end")
LORAS = ("lora", "average")
"""What a run's files of weights are called in the record: the LoRA, and its moving average."""


@dataclass
class Job:
    """A run of the queue: what is written to ``queue.json`` of it."""

    name: str
    """The file's name without ``.toml``; unique in the queue."""
    file: str
    script: str
    digest: str
    """Of the file's content: a job that has changed is a new one."""
    state: str = WAITING
    code: int | None = None
    started: float | None = None
    """Seconds since 1970."""
    seconds: float = 0.0
    """Of all its runs together."""
    last_line: str = ""
    """Of its output, where it failed."""
    outputs: dict[str, str] = field(default_factory=dict)
    """Its LoRA file, the moving average beside it, its report and log: ``lora``, ``average``, ``report``, ``log``."""
    saves_states: bool = False

    @property
    def log(self) -> str:
        """Name of its log in the queue's folder."""
        return f"{self.name}.log"


def read_jobs(patterns: Sequence[str], script: str | None) -> list[Job]:
    """The jobs of the files, in their order. Raises UserError that names everything that is wrong with any of them."""
    jobs: list[Job] = []
    mistakes = []
    for path in _files(patterns):
        try:
            jobs.append(_read_job(path, script))
        except UserError as error:
            text = str(error)
            mistakes.append(text if str(path) in text else f"{path}: {text}")
    for kind, of in (
        ("are both named", lambda job: [job.name]),
        ("write the same file", lambda job: [job.outputs[what] for what in LORAS if what in job.outputs]),
    ):
        first: dict[str, Job] = {}
        for job in jobs:
            for name in of(job):
                other = first.setdefault(name, job)
                if other is not job:
                    mistakes.append(f"{other.file} and {job.file} {kind}, {name}.")
    if mistakes:
        raise UserError("\n".join(mistakes))
    return jobs


def _files(patterns: Sequence[str]) -> list[Path]:
    """The files that the patterns name; cmd and PowerShell leave ``*`` to programs."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        names = sorted(glob.glob(pattern)) if glob.has_magic(pattern) and not Path(pattern).exists() else [pattern]
        if not names:
            raise UserError(f"no file is named like {pattern}.")
        found.update(dict.fromkeys(map(Path, names)))
    return list(found)


def _read_job(path: Path, script: str | None) -> Job:
    if path.suffix != ".toml" or not path.is_file():
        raise UserError(f"{path}: there is no such .toml file.")
    words = ["--config_file", str(path)]
    family = _family(configured_value(words, "script") or script, configured_value(words, "network_module"))
    options = parse_options(family.options_class(), "", words)
    saving = options.saving
    files = OutputFolder(saving, read_only=True, averages=options.optimizer.ema_decay is not None)
    written = dict(zip(LORAS, map(str, files.with_average(files.final_file()))))
    return Job(
        name=path.stem,
        file=str(path),
        script=family.file,
        digest=hashlib.sha256(path.read_bytes()).hexdigest(),
        outputs={**written, "report": str(files.final_file().with_suffix(".report.html"))},
        saves_states=any(getattr(saving, option) for option in SAVES) and not options.resume.resume,
    )


def _family(script: Any, network_module: Any) -> families.Family:
    """The family of a script; without one, of a network module that only one family has."""
    scripts = {family.file: family for family in families.FAMILIES}
    if script is not None:
        named = scripts.get(str(script)) or scripts.get(f"{script}.py")
        if named is None:
            raise UserError(f'script = "{script}" is none of {", ".join(scripts)}.')
        return named
    having = [family for family in families.FAMILIES if network_module in family.networks]
    if len(having) != 1:
        raise UserError(f'the key "script" is missing: name one of {", ".join(scripts)}, here or with --script.')
    return having[0]


class Queue:
    """The jobs, and a folder with their logs, their states and the page. Use as a context manager while it runs."""

    def __init__(self, jobs: list[Job], folder: Path, launch_arguments: Sequence[str] = ()) -> None:
        self.jobs, self.folder, self.launch_arguments = jobs, folder, list(launch_arguments)
        folder.mkdir(parents=True, exist_ok=True)
        for job in jobs:
            job.outputs["log"] = str(folder / job.log)

    def take_up(self) -> None:
        """Go on from what ``queue.json`` says of an earlier run of the queue: jobs whose files are the same."""
        path = self.folder / STATE_FILE
        if not path.exists():
            return
        try:
            earlier = {
                (entry["name"], entry["digest"]): Job(**entry) for entry in parse_json(read_text(path), path)["jobs"]
            }
        except (KeyError, TypeError, UserError):
            raise UserError(f"{path} is not the record of a queue; remove it, or give another --queue_dir.") from None
        for job in self.jobs:
            before = earlier.get((job.name, job.digest))
            if before is None:
                continue
            state = INTERRUPTED if before.state == RUNNING else before.state
            job.state, job.code, job.seconds, job.last_line = state, before.code, before.seconds, before.last_line
            job.started = before.started

    def run(self, again: bool = False) -> int:
        """Run what is not done; returns how many have failed. ``again``: failed ones too.

        Raises KeyboardInterrupt when the run in hand was ended by Ctrl-C.
        """
        for number, job in enumerate(self.jobs, 1):
            place = f"{number}/{len(self.jobs)} {job.name}"
            if job.state == DONE or (job.state == FAILED and not again):
                how = "is done" if job.state == DONE else f"has failed before (exit code {job.code})"
                more = "" if job.state == DONE else "; --retry_failed runs it again"
                print(f"{place}: {how}{more}", flush=True)
                continue
            self._run(job, place)
        return sum(job.state == FAILED for job in self.jobs)

    def _run(self, job: Job, place: str) -> None:
        resumes = job.saves_states and job.state in (INTERRUPTED, FAILED)
        words = [sys.executable, "-m", LAUNCHER, *self.launch_arguments, str(ROOT / job.script)]
        words += ["--config_file", job.file, *(["--resume", "auto"] if resumes else [])]
        job.state, job.code, job.last_line, job.started = RUNNING, None, "", time.time()
        self.write()
        print(f"{place}: {'resumes' if resumes else 'starts'}; its log is {self.folder / job.log}", flush=True)
        before, start = job.seconds, time.monotonic()
        try:
            with open(self.folder / job.log, "ab") as log:
                log.write(f"$ {shlex.join(words)}\n".encode())
                log.flush()
                job.code = self._wait_for(self.start(words, log), job)
            job.state = DONE if job.code == 0 else FAILED
        finally:
            job.seconds = before + time.monotonic() - start
            if job.state == FAILED:
                job.last_line = last_line(self.folder / job.log)
            self.write()
            ended = f"failed with exit code {job.code}: {job.last_line}" if job.state == FAILED else job.state
            print(f"{place}: {ended} after {_time(job.seconds)}", flush=True)

    def start(self, words: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start a command that writes into ``log``, where no Ctrl-C of this terminal reaches it (but on Windows)."""
        return subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)

    def _wait_for(self, process: subprocess.Popen[bytes], job: Job) -> int:
        """Its exit code. The first Ctrl-C lets it end its step and save, the second ends it now, the third kills."""
        try:
            with _other_wishes_to_end():
                return process.wait()
        except KeyboardInterrupt:
            job.state = INTERRUPTED
            self.write()
            for ask in (press_ctrl_c, press_ctrl_c, end_at_once):
                if os.name != "nt":  # there it has reached the run already
                    ask(process)
                with contextlib.suppress(KeyboardInterrupt):
                    process.wait()
                    break
            raise

    def write(self) -> None:
        """Write the record and the page."""
        write_text(self.folder / STATE_FILE, json.dumps({"jobs": [asdict(job) for job in self.jobs]}, indent=1))
        page = self.folder / PAGE
        with contextlib.suppress(OSError):  # the page only tells
            write_text(page, render_page("queue.html", "Queue", {"jobs": [self._row(job, page) for job in self.jobs]}))

    def _row(self, job: Job, page: Path) -> dict[str, Any]:
        there = {what: path for what, path in job.outputs.items() if Path(path).exists()}
        started = "" if job.started is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started))
        return {
            "name": job.name,
            "script": job.script,
            "state": job.state if job.state != FAILED else f"failed with exit code {job.code}",
            "kind": job.state,
            "started": started,
            "took": _time(job.seconds) if job.seconds else "",
            "error": job.last_line,
            "links": {what: link_from(page, Path(path).resolve()) for what, path in there.items()},
        }


@contextlib.contextmanager
def _other_wishes_to_end() -> Iterator[None]:
    """SIGTERM, and the end of the terminal, are as Ctrl-C."""

    def ended(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    former = [signal.signal(number, ended) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, former):
            signal.signal(number, handler)


def last_line(log: Path, length: int = 300) -> str:
    """The last line of a log that says something, preferably that of an error."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.path.getsize(log) - 20_000))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    errors = [line for line in lines if re.match(r"(error: |[\w.]*(Error|Exception)\b)", line)]
    outside = [line for line in errors if "CalledProcessError" not in line]  # accelerate's own words come last
    return "".join((outside or lines)[-1:])[:length]


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def main() -> None:
    """Run the queue. The exit code is 1 where a run has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", help="files of options, in the order in which they run")
    parser.add_argument("--queue_dir", default="queue", help="folder of logs and page (%(default)s)")
    parser.add_argument("--script", help="training script of files that don't name one")
    parser.add_argument("--launch_args", default="", help="options of accelerate launch, as one text")
    parser.add_argument("--retry_failed", action="store_true", help="run those again that have failed before")
    parser.add_argument("--afresh", action="store_true", help="forget an earlier run of the queue: run every job")
    given = parser.parse_args()
    jobs = read_jobs(given.jobs, given.script)
    queue = Queue(jobs, Path(given.queue_dir), shlex.split(given.launch_args))
    if not given.afresh:
        queue.take_up()
    queue.write()
    print(f"{len(jobs)} jobs; {queue.folder / PAGE} shows how far they are", flush=True)
    failed = queue.run(given.retry_failed)
    print(f"{len(jobs) - failed} of {len(jobs)} jobs are done{f', {failed} failed' if failed else ''}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_script(main)
