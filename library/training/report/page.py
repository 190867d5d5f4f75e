"""The training report: one HTML page beside the LoRA with curves, samples, settings and files of a run.

``RunReport`` listens to the run and writes the page (``library/page_templates/report.html``). What it knows stands in
the page itself as JSON, so a resumed run reads it back and continues. Nothing that happens here ends a training.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from library.console import size_text, warn
from library.data.summary import group_facts
from library.errors import UserError
from library.files import write_text
from library.html_pages import link_from, read_page_data, render_page
from library.options import SECRETS, declared_options, option_value
from library.training.output.sample_images import Samples
from library.training.report.curves import Curve
from library.training.report.description import start_facts
from library.training.report.report_options import report_is_wanted
from library.training.report.samples import SampleGrid
from library.training.report.timing import RunClock, peak_device_memory, peak_process_memory
from library.training.report.wording import left_out_text, length_lines, network_lines, rate_text

if TYPE_CHECKING:
    from library.training.progress import Progress
    from library.training.run_facts import RunFacts

FORMAT = "training-report"
VERSION = 1
RATE_POINTS = 500
"""About how often in a run the learning rates are noted."""
LONGEST_SILENCE = 60.0
"""Seconds after which the page is rewritten although nothing happened but steps."""
LARGEST_SHARE = 0.005
"""Share of the time that those writings may take."""

P = ParamSpec("P")


@dataclass(frozen=True)
class ReportHead:
    """What a report says about a run from its first moment on."""

    name: str
    what: str
    """Model family and network, one line."""
    session: str
    """The id that a resumed run shares with the run it continues."""
    started_at: float
    """When this process began, seconds since 1970."""
    steps: int
    steps_per_epoch: int
    epochs: int
    first_step: int
    """Steps that were done before this process began."""
    settings: Sequence[Mapping[str, Any]]
    data: Sequence[Mapping[str, Any]]
    facts: Sequence[tuple[str, str]]
    """Name and value, in the order in which they are shown."""


def _listening(
    method: Callable[Concatenate[RunReport, P], None],
) -> Callable[Concatenate[RunReport, P], None]:
    """Make a method of ``RunReport`` do nothing when there is no page, and warn instead of raising."""

    @functools.wraps(method)
    def listen(self: RunReport, *arguments: P.args, **keywords: P.kwargs) -> None:
        if self.path is None:
            return
        try:
            with self.clock.part("report"):
                method(self, *arguments, **keywords)
        except OSError as error:  # a full disk may have room again at the next writing
            self._warn_once(f"{error.strerror or error}; it is tried again")
        except Exception as error:  # a mistake in a page must not cost anyone a training
            self._warn_once(f"{type(error).__name__}: {error}; it ends here")
            self.path = None

    return listen


class RunReport:
    """Collects what a run says and writes it as a page.

    As a context manager around the training it notes an end by an error. ``path`` None: every method does nothing.
    With ``resumed``, a page of the same session at ``path`` is continued; what it holds after the first step is
    forgotten. ``measure`` gives names and values that are shown beside the facts, asked at every writing.
    """

    def __init__(
        self,
        path: Path | None,
        head: ReportHead,
        resumed: bool = False,
        clock: RunClock | None = None,
        measure: Callable[[], Sequence[tuple[str, str]]] = list,
    ) -> None:
        self.path = path
        self.head = head
        self.clock = clock or RunClock()
        self.measure = measure
        self.curves: dict[str, Curve] = {}
        self.rates: dict[str, Curve] = {}
        self.samples = SampleGrid()
        self.files: list[dict[str, Any]] = []
        self.earlier: list[dict[str, Any]] = []
        self.removed_files = 0
        self.step = head.first_step
        self.state, self.reason = "running", ""
        self.trains_since = time.time()
        self._step_losses: list[float] = []
        self._written_at, self._writing_took, self._warned = 0.0, 0.0, False
        if resumed:
            self._continue()

    # ---- what the run tells -----------------------------------------------------------------------------------------

    def __enter__(self) -> RunReport:
        self.trains_since = time.time()
        self.write()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.end("interrupted", "Ctrl-C")
        elif error is not None:
            self.end("failed", str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")

    @_listening
    def add_loss(self, step: int, loss: float, ends_step: bool, rates: Callable[[], Mapping[str, float]]) -> None:
        """Note a micro-batch's loss; ``step`` counts the updates done. ``rates`` is asked now and then."""
        self._step_losses.append(loss)
        if not ends_step:
            return
        self.step = step
        self._add("loss", step, sum(self._step_losses) / len(self._step_losses))
        self._step_losses = []
        if (
            step == self.head.first_step + 1
            or step % max(1, self.head.steps // RATE_POINTS) == 0
            or step == self.head.steps
        ):
            for name, rate in rates().items():
                self.rates.setdefault(name, Curve()).add(step, rate)
        if time.monotonic() - self._written_at > max(LONGEST_SILENCE, self._writing_took / LARGEST_SHARE):
            self.write()

    @_listening
    def add_epoch_average(self, step: int, average: float) -> None:
        """Note the average loss of the epoch that ended after ``step``."""
        self._add("loss epoch", step, average)

    @_listening
    def add_validation(self, kind: str, step: int, loss: float) -> None:
        """Note a validation loss; ``kind`` is step or epoch, ``step`` counts the updates done in either case."""
        self._add(f"validation {kind}", step, loss)

    @_listening
    def add_samples(self, step: int, epoch: int | None, samples: Samples) -> None:
        """Note the images that were generated at a moment, by all processes; they are read from the sample folder."""
        assert self.path is not None
        self.samples.add(self.path, step, epoch, samples.prompts, samples.images(step, epoch))

    @_listening
    def add_file(self, path: Path, step: int) -> None:
        """Note a network's file or a state's folder that was written."""
        assert self.path is not None
        size = sum(part.stat().st_size for part in path.iterdir()) if path.is_dir() else path.stat().st_size
        kind = "state" if path.is_dir() else "network"
        entry = {"name": path.name, "kind": kind, "size": size, "step": step, "time": time.time()}
        entry["link"] = link_from(self.path, path)
        self.files = [known for known in self.files if known["name"] != path.name] + [entry]

    def end(self, state: str, reason: str = "") -> None:
        """Note how the run ended (finished, interrupted, failed) and write the page for the last time."""
        self.state, self.reason = state, reason[:2000]
        self.write()

    @_listening
    def write(self) -> None:
        """Write the page, complete or not at all."""
        assert self.path is not None
        begin = self._written_at = time.monotonic()
        there = [entry for entry in self.files if (self.path.parent / entry["name"]).exists()]
        self.removed_files += len(self.files) - len(there)
        self.files = there
        write_text(self.path, render_page("report.html", f"{self.head.name}: {self.state}", self.document()))
        self._writing_took = time.monotonic() - begin

    # ---- the page's data --------------------------------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        """Everything that the page shows, as JSON."""
        head, now = self.head, time.time()
        this = {
            "started": head.started_at,
            "trains_since": self.trains_since,
            "until": now,
            "from_step": head.first_step,
            "to_step": self.step,
            "state": self.state,
        }
        return {
            "format": FORMAT,
            "version": VERSION,
            "session": head.session,
            "name": head.name,
            "what": head.what,
            "written": now,
            "status": {"state": self.state, "reason": self.reason, "step": self.step},
            "plan": {"steps": head.steps, "steps_per_epoch": head.steps_per_epoch, "epochs": head.epochs},
            "runs": [*self.earlier, this],
            "curves": {name: curve.document() for name, curve in self.curves.items()},
            "rates": self._rates(),
            "samples": self.samples.document(),
            "files": self.files,
            "removed_files": self.removed_files,
            "facts": [list(pair) for pair in (*head.facts, *self.measure())],
            "times": {part: round(seconds, 2) for part, seconds in self.clock.seconds.items() if seconds >= 0.01},
            "data": list(head.data),
            "settings": list(head.settings),
        }

    def _rates(self) -> list[dict[str, Any]]:
        """Learning rates; groups that have the same one share a curve."""
        found: list[dict[str, Any]] = []
        for tag, curve in self.rates.items():
            document, factor = curve.document(), tag.startswith("lr/d*lr")
            name = tag.removeprefix("lr/d*lr").removeprefix("lr/").strip("/") or "all groups"
            for known in found:
                if known["curve"] == document and known["factor"] == factor:
                    known["names"].append(name)
                    known["tags"].append(tag)
                    break
            else:
                found.append({"names": [name], "tags": [tag], "factor": factor, "curve": document})
        return found

    def _add(self, name: str, step: int, value: float) -> None:
        self.curves.setdefault(name, Curve()).add(step, value)

    @_listening
    def _continue(self) -> None:
        """Take over the page of the run that this one resumes, as far as this run repeats nothing of it."""
        assert self.path is not None
        page = read_page_data(self.path)
        if not isinstance(page, dict) or page.get("format") != FORMAT or page.get("version") != VERSION:
            return
        if page.get("session") != self.head.session:
            return  # another run of the same name
        step = self.head.first_step
        try:
            curves = {name: Curve.from_document(entry) for name, entry in page["curves"].items()}
            rates = {tag: Curve.from_document(entry["curve"]) for entry in page["rates"] for tag in entry["tags"]}
            samples = SampleGrid(page["samples"])
            files = [dict(entry) for entry in page["files"] if entry["step"] <= step]
            earlier, removed = list(page["runs"]), int(page["removed_files"])
        except (AttributeError, KeyError, TypeError, ValueError):
            warn(f"{self.path}: the report of the resumed run cannot be read; a new one begins.")
            return
        for curve in (*curves.values(), *rates.values()):
            curve.cut(step)
        samples.cut(step)
        if earlier and earlier[-1]["state"] == "running":
            earlier[-1]["state"] = "interrupted"  # by something that left no time to say so
        self.curves = {name: curve for name, curve in curves.items() if curve.points}
        self.rates = {tag: curve for tag, curve in rates.items() if curve.points}
        self.samples, self.files, self.earlier, self.removed_files = samples, files, earlier, removed

    def _warn_once(self, problem: str) -> None:
        if not self._warned:
            warn(f"the report {self.path} cannot be written: {problem}. The training continues.")
            self._warned = True


# ---- from a run to its description -----------------------------------------------------------------------------------


def open_report(run: RunFacts, clock: RunClock) -> RunReport:
    """The report of a run that is about to train; it does nothing where none is wanted or on other processes."""
    options, progress, samples = run.options, run.progress, bool(run.outputs.samples.prompts)
    wanted = run.is_main and report_is_wanted(options.report, samples, run.data.validation is not None)
    name = options.saving.output_name or "last"
    head = ReportHead(
        name=name,
        what=_headline(run),
        session=f"{progress.session_id:08x}",
        started_at=progress.process_started_at,
        steps=run.plan.max_steps,
        steps_per_epoch=run.plan.steps_per_epoch,
        epochs=run.plan.epochs,
        first_step=progress.step,
        settings=describe_settings(options) if wanted else [],
        data=_data(run) if wanted else [],
        facts=_facts(run) if wanted else [],
    )
    path = run.outputs.files.folder / f"{name}.report.html" if wanted else None
    return RunReport(path, head, run.outputs.saved is not None, clock, lambda: measured(progress, clock))


def _headline(run: RunFacts) -> str:
    network = run.options.network
    parts = [run.family, str(network.network_module)]
    if network.network_dim is not None:
        parts.append(f"rank {network.network_dim}")
    return ", ".join(parts)


def describe_settings(options: Any) -> list[dict[str, Any]]:
    """Every option as name, value, default, whether they differ, heading and meaning; secrets are left out."""
    found = []
    for name, option in declared_options(type(options)).items():
        value = option_value(options, option)
        if name in SECRETS:
            continue
        entry = {"name": name, "value": _plain(value), "default": _plain(option.default)}
        found.append({**entry, "changed": value != option.default, "group": option.title, "help": option.help})
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _data(run: RunFacts) -> list[dict[str, Any]]:
    titles = ("Training data", "Validation data")
    return [group_facts(group, title, run.processes) for title, group in zip(titles, run.data.groups)]


def _facts(run: RunFacts) -> list[tuple[str, str]]:
    facts = start_facts(run)
    name = Path(run.options.model.pretrained_model_name_or_path or "").name
    parts = [f"{part.name} {part.parameters:,} parameters in {part.dtype}" for part in facts.parts]
    batch, length = length_lines(facts)
    processes = f", {facts.processes} processes" if facts.processes > 1 else ""
    checkpointing = ", gradient checkpointing" if facts.gradient_checkpointing else ""
    device = f"{facts.device}{processes}, computing in {facts.dtype}, attention {facts.attention}{checkpointing}"
    return [
        ("Device", device),
        ("Base model", f"{name}: {', '.join(parts)}" if parts else name),
        ("Network", network_lines(facts)[0].removeprefix("network ")),
        ("Optimizer", f"{facts.optimizer}, schedule {facts.schedule}"),
        ("Batches", batch),
        ("Length", length),
    ]


def measured(progress: Progress, clock: RunClock) -> list[tuple[str, str]]:
    """Speed and memory so far."""
    seconds = sum(clock.seconds.get(part, 0.0) for part in ("training", "waiting for data"))
    steps, found = progress.step - progress.first_step, []
    if steps and seconds:
        speed = f"{rate_text(steps / seconds)} steps/s, {rate_text(progress.images / seconds)} images/s"
        found.append(("Speed", f"{speed} while training"))
    if progress.left_out:
        found.append(("Updates left out", left_out_text(progress.left_out)))
    device, main = peak_device_memory(), f"{size_text(peak_process_memory())} of system RAM"
    found.append(("Peak memory", main if device is None else f"{size_text(device)} on the device, {main}"))
    return found
