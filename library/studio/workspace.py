"""What the studio keeps in its folder: jobs (files of options), dataset files, runs, the queue."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library import families
from library.child_processes import LAUNCHER
from library.errors import UserError
from library.families import Family
from library.files import write_text
from library.options import SCRIPT, declared_options
from library.studio.folders import Roots
from library.studio.forms import Form, form_of_keys
from library.studio.runs import SETTINGS, Kind, Record, Run, Runs
from library.studio.settings_files import read_settings, settings_text, title_of, value_text
from library.text_files import parse_json, read_text

ROOT = Path(__file__).resolve().parents[2]
JOB_NAME = re.compile(r"\w[\w.-]{0,79}")
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names that Windows keeps for devices."""
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".avif")
"""Suffixes of images that runs write."""
FOLDER = "{folder}"
"""In a command: the run's folder."""


@dataclass(frozen=True)
class Script:
    """A script that reads a file of options."""

    file: str
    family: Family
    trains: bool

    @property
    def title(self) -> str:
        """As the page names it."""
        if self.trains:
            return f"{self.family.name}: train a LoRA"
        having = [family.name for family in families.FAMILIES if family.inference == self.family.inference]
        return f"{', '.join(having)}: generate images"

    @property
    def options_class(self) -> Any:
        """The class of its options, imported now."""
        assert self.family.inference is not None or self.trains
        return self.family.options_class() if self.trains else families.load(str(self.family.inference))


@dataclass(frozen=True)
class Preset:
    """A file of ``configs/``."""

    path: Path
    script: str
    title: str


@dataclass(frozen=True)
class Job:
    """A file of options in the studio's folder."""

    name: str
    path: Path
    script: str


def scripts() -> dict[str, Script]:
    """Every script that the studio starts, by its file's name: the training scripts first."""
    found = {family.file: Script(family.file, family, True) for family in families.FAMILIES}
    for family in families.FAMILIES:
        if family.inference_script:
            found.setdefault(f"{family.inference_script}.py", Script(f"{family.inference_script}.py", family, False))
    return found


def script_of(keys: Mapping[str, Any], stem: str = "") -> str | None:
    """The script that a file of options is for: by its key, its network module, or the model that begins its name."""
    named = str(keys.get(SCRIPT, ""))
    for file in scripts():
        if named and named.removesuffix(".py") == file.removesuffix(".py"):
            return file
    if named:
        return None
    having = [family.file for family in families.FAMILIES if keys.get("network_module") in family.networks]
    if len(having) == 1:
        return having[0]
    models = {model: family.file for family in families.FAMILIES for model in family.model_names}
    begins = [model for model in models if stem == model or stem.startswith(f"{model}_")]
    return models[max(begins, key=len)] if begins else None


def require_name(name: str, what: str) -> str:
    """The name, if files can have it everywhere. Raises UserError."""
    if not JOB_NAME.fullmatch(name) or RESERVED.fullmatch(name) or name.endswith("."):
        raise UserError(f"{what} is made of letters, digits, dots, hyphens and underscores, up to 80.")
    return name


class Workspace:
    """The studio's folder."""

    def __init__(self, folder: Path, roots: Roots, launch_arguments: Sequence[str] = ()) -> None:
        self.folder, self.roots, self.launch_arguments = folder.resolve(), roots, list(launch_arguments)
        self.present = Path.cwd()
        """The folder in which scripts run, so that relative paths mean what they mean on a command line."""
        self.runs = Runs(self.folder / "runs")
        self.queue_folder = self.folder / "queue"

    # ---- jobs --------------------------------------------------------------------------------------------------------

    def jobs(self) -> list[Job]:
        """Every job, by name."""
        folder = self.folder / "jobs"
        names = sorted(path.stem for path in folder.glob("*.toml")) if folder.is_dir() else []
        return [job for job in map(self.job, names) if job]

    def job_path(self, name: str) -> Path:
        """The file of a job. Raises UserError for a name that none can have."""
        return self.folder / "jobs" / f"{require_name(name, 'A job name')}.toml"

    def job(self, name: str) -> Job | None:
        """The job of a name; None where there is none."""
        try:
            path = self.job_path(name)
        except UserError:
            return None
        if path.is_symlink() or not path.is_file():
            return None
        try:
            script = script_of(read_settings(path))
        except UserError:
            script = None
        return Job(name, path, script or "")

    def form(self, job: Job) -> Form:
        """The job's options as a form. Raises UserError when its file cannot be read or names no script."""
        keys = read_settings(job.path)
        if job.script not in scripts():
            raise UserError(f'{job.path}: the key "{SCRIPT}" names none of {", ".join(scripts())}.')
        return form_of_keys(job.script, scripts()[job.script].options_class, keys)

    def new_job(self, name: str, script: str, keys: Mapping[str, Any]) -> Job:
        """A job with the keys of another file. Raises UserError when the name is taken."""
        path = self.job_path(name)
        if path.exists():
            raise UserError(f"There is a job {name} already; choose another name.")
        self.write_job(path, script, {key: value for key, value in keys.items() if key != SCRIPT})
        return Job(name, path, script)

    def write_job(self, path: Path, script: str, values: Mapping[str, Any]) -> None:
        """Write a job's file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, settings_text(script, values))

    def presets(self) -> list[Preset]:
        """The files of ``configs/``, with the title that their first line gives them."""
        found = []
        for path in sorted((ROOT / "configs").glob("*.toml"), key=_by_numbers):
            script = script_of(read_settings(path), path.stem)
            if script:
                found.append(Preset(path, script, title_of(path)))
        return found

    # ---- runs --------------------------------------------------------------------------------------------------------

    def command(self, script: str, settings: str, kind: Kind = "training") -> list[str]:
        """The words that start a script with a file of options."""
        launch = ["accelerate", "launch", *self.launch_arguments] if kind == "training" else ["python"]
        return [*launch, script, "--config_file", settings]

    def start(self, job: Job, kind: Kind) -> Run:
        """Start a job as it stands in its file: the run keeps a copy of it. Raises UserError for a wrong value."""
        form = self.form(job)
        if form.wrong:
            raise UserError(" ".join(entry.error for entry in form.wrong))
        values, script = form.values(), scripts()[job.script]
        if kind in ("training", "images"):
            kind = "training" if script.trains else "images"
        launch = kind == "training" or (kind == "check" and self.launch_arguments)
        words = [sys.executable, *(["-m", LAUNCHER, *self.launch_arguments] if launch else [])]
        words += [str(ROOT / script.file), "--config_file", f"{FOLDER}/{SETTINGS}"]
        environment = {}
        if kind == "training" and not (values.get("report") or values.get("no_report")):
            words.append("--report")
        elif kind == "check":
            words.append("--dry_run")
        elif kind == "data":
            words += ["--debug_dataset", "--output_dir", FOLDER, "--output_name", "data"]
            if "network_module" not in values:
                words += ["--network_module", script.family.networks[0]]
            environment = {"DISPLAY": "", "WAYLAND_DISPLAY": ""}  # the page shows the images, no window does
        record = Record(kind, job.name, job.script, words, str(self.present), time.time(), environment=environment)
        record.output_dir, record.output_name = self._outputs(script, values, kind)
        record.saves_states = bool(values.get("save_state") or values.get("save_state_on_train_end"))
        return self.runs.start(record, settings_text(job.script, values))

    def _outputs(self, script: Script, values: Mapping[str, Any], kind: Kind) -> tuple[str, str]:
        """The folder that a run writes into, and the beginning of its files' names."""
        if kind in ("check", "data"):
            return "", ""
        options = declared_options(script.options_class)
        name = next(option for option in ("outdir", "output_dir") if option in options)
        folder = values.get(name) or options[name].default or "."
        return str(self.present / folder), str(values.get("output_name") or "")

    def resume(self, run: Run) -> None:
        """Start a training that has ended again, from its newest state. Raises UserError where that cannot be."""
        if run.record.kind != "training":
            raise UserError("Only a training can be resumed.")
        if not run.record.saves_states:
            raise UserError("This run saved no states: turn on save_state in its job, and start it again.")
        words = [word for word in run.record.words if word not in ("--resume", "latest")]
        self.runs.resume(run, [*words, "--resume", "latest"])

    def samples(self, run: Run) -> list[Path]:
        """The images that a run has made, the newest last."""
        record = run.record
        if not record.output_dir or record.kind == "queue":
            return []
        folder = Path(record.output_dir) / ("sample" if record.kind == "training" else "")
        prefix = f"{record.output_name}_" if record.output_name and record.kind == "training" else ""
        return images_of(folder, prefix, record.first_started)

    def files(self, run: Run) -> list[Path]:
        """The networks and states that a training has written, the newest last."""
        record = run.record
        if record.kind != "training":
            return []
        name = re.escape(record.output_name) if record.output_name else r"(last|epoch|at)"
        pattern = re.compile(rf"{name}([-.].*)?")
        endings = (".safetensors", ".ckpt", ".pt", "-state")
        found = [
            (entry.stat().st_mtime, entry)
            for entry in _entries(Path(record.output_dir))
            if pattern.fullmatch(entry.name) and entry.name.endswith(endings)
        ]
        return [path for changed, path in sorted(found) if changed >= record.first_started - 1]

    def report(self, run: Run) -> Path | None:
        """The report of a training, or the contact sheet; None while there is none."""
        record = run.record
        if record.kind == "data":
            path = run.folder / "data.dataset.html"
        elif record.kind == "training":
            path = Path(record.output_dir) / f"{record.output_name or 'last'}.report.html"
        else:
            return None
        earlier = record.kind == "training" and path.is_file() and path.stat().st_mtime < record.first_started - 1
        return path if path.is_file() and not path.is_symlink() and not earlier else None

    # ---- data --------------------------------------------------------------------------------------------------------

    def write_dataset(self, name: str, folder: Path, keys: Mapping[str, Any], repeats: int) -> Path:
        """Write a dataset file over one folder; returns its path. Raises UserError for a name that none can have."""
        path = self.folder / "datasets" / f"{require_name(name, 'A dataset name')}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ["[[datasets]]", *(f"{key} = {value_text(value)}" for key, value in keys.items() if value is not None)]
        lines += ["", "[[datasets.subsets]]", f"image_dir = {value_text(folder.as_posix())}"]
        lines += [f"num_repeats = {repeats}"]
        write_text(path, "\n".join(lines) + "\n")
        return path

    # ---- the queue ---------------------------------------------------------------------------------------------------

    def queued(self) -> list[str]:
        """Names of the jobs in the queue, in order; those whose files are gone are left out."""
        try:
            names = parse_json(read_text(self.queue_folder / "order.json"), "order.json")
        except UserError:
            return []
        known = {job.name for job in self.jobs()}
        return [name for name in names if name in known] if isinstance(names, list) else []

    def set_queue(self, names: Sequence[str]) -> None:
        """Put jobs into the queue, in this order."""
        self.queue_folder.mkdir(parents=True, exist_ok=True)
        write_text(self.queue_folder / "order.json", json.dumps(list(dict.fromkeys(names)), indent=1))

    def queue_run(self) -> Run | None:
        """The run of the queue that goes on now."""
        return next((run for run in self.runs.all() if run.record.kind == "queue" and run.state == "running"), None)

    def queue_states(self) -> dict[str, dict[str, Any]]:
        """What ``tools/run_queue.py`` has written of each job: ``queue.json``."""
        try:
            jobs = parse_json(read_text(self.queue_folder / "queue.json"), "queue.json")["jobs"]
            return {str(entry["name"]): dict(entry) for entry in jobs}
        except (KeyError, TypeError, UserError):
            return {}

    def start_queue(self, retry_failed: bool = False) -> Run:
        """Start the jobs of the queue, one after the other. Raises UserError when there are none, or it runs."""
        names = self.queued()
        if not names:
            raise UserError("The queue is empty.")
        if self.queue_run() is not None:
            raise UserError("The queue is running.")
        words = [sys.executable, *self.queue_words(names)[1:], *(["--retry_failed"] if retry_failed else [])]
        words[1] = str(ROOT / words[1])
        return self.runs.start(Record("queue", "queue", "run_queue.py", words, str(self.present), time.time()))

    def stop_queue(self) -> None:
        """Ask the queue for its end, as ``Run.stop``; does nothing where none runs."""
        run = self.queue_run()
        if run is not None:
            run.stop()

    def queue_words(self, names: Sequence[str]) -> list[str]:
        """The command that runs the queue."""
        files = [str(self.job_path(name)) for name in names]
        launch = ["--launch_args", shlex.join(self.launch_arguments)] if self.launch_arguments else []
        return ["python", "tools/run_queue.py", *files, "--queue_dir", str(self.queue_folder), *launch]


def _by_numbers(path: Path) -> list[int | str]:
    """To sort files of a GPU with 8 GB before those of one with 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.stem)]


def images_of(folder: Path, prefix: str, since: float) -> list[Path]:
    """The images directly in a folder whose names begin so, written since then, the newest last; no links."""
    found = []
    for path in _entries(folder):
        if path.name.startswith(prefix) and path.suffix.lower() in IMAGES and path.is_file():
            changed = path.stat().st_mtime
            if changed >= since - 1:
                found.append((changed, path))
    return [path for _, path in sorted(found)]


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, without links and hidden files; nothing where there is no folder."""
    try:
        return [path for path in folder.iterdir() if not path.is_symlink() and not path.name.startswith(".")]
    except OSError:
        return []
