"""The pages: what a browser asks for, and what it may change. Everything else is in the modules beside this one."""

from __future__ import annotations

import mimetypes
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flask
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from library.console import printable, size_text
from library.errors import UserError
from library.html_pages import TEMPLATES as PAGE_TEMPLATES
from library.studio.access import DOCUMENT_POLICY, FORM_TOKEN, Access, protect
from library.studio.commands import in_every_shell
from library.studio.folders import OutsideError
from library.studio.forms import PREFIX, REST, Form, form_of_fields
from library.studio.runs import SETTINGS, Run, progress_of, tail_of
from library.studio.settings_files import read_settings
from library.studio.workspace import Job, Workspace, script_of, scripts

HERE = Path(__file__).parent
LARGEST_BODY = 2 * 2**20
"""Bytes of a request's body."""
LARGEST_FILE = 128 * 2**20
"""Bytes of an image or a report that are sent."""
MOST_SAMPLES = 400
SAMPLE = re.compile(r"(e?\d{6})_\d\d_\d{14}")
"""The step or epoch, and the prompt's number, in the name of a training's sample."""
KINDS = {"training": "training", "images": "images", "check": "check", "data": "data set", "queue": "queue"}
"""Of runs, in a reader's words."""


def create_app(workspace: Workspace, access: Access) -> flask.Flask:
    """The studio as a WSGI application."""
    app = flask.Flask("studio", static_folder=None, template_folder=str(HERE / "templates"))
    app.config.update(MAX_CONTENT_LENGTH=LARGEST_BODY, MAX_FORM_MEMORY_SIZE=LARGEST_BODY)
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    app.jinja_env.filters.update(size=size_text, ago=_ago, took=_took, moment=_moment, shown=printable)
    app.jinja_env.globals.update(
        form_token=access.form_token,
        FORM_TOKEN=FORM_TOKEN,
        PREFIX=PREFIX,
        REST=REST,
        KINDS=KINDS,
        shells=in_every_shell,
    )

    @app.before_request
    def look_at_request() -> Any:
        if reason := access.refusal(flask.request):
            return _message("Refused", reason, 403)
        token = flask.request.args.get("token")
        if token is not None and flask.request.path == "/" and access.opens(token):
            response = flask.redirect("/", 303)
            access.give_cookie(response)
            return response
        if not access.knows(flask.request):
            return _message("Who is there?", "Open the address that tools/studio.py printed when it started.", 403)
        return None

    @app.after_request
    def protect_answer(response: flask.Response) -> flask.Response:
        return protect(response)

    @app.errorhandler(OutsideError)
    def outside(error: OutsideError) -> Any:
        return _message("Not here", str(error), 403)

    @app.errorhandler(UserError)
    def mistake(error: UserError) -> Any:
        return _message("This did not work", str(error), 400)

    @app.errorhandler(RequestEntityTooLarge)
    def too_large(error: RequestEntityTooLarge) -> Any:
        return _message("Too large", f"At most {size_text(LARGEST_BODY)} are read of a request.", 413)

    @app.errorhandler(HTTPException)
    def failed(error: HTTPException) -> Any:
        return _message(
            error.name, "There is no such page." if error.code == 404 else str(error.name), error.code or 500
        )

    _add_assets(app)
    _add_home(app, workspace)
    _add_jobs(app, workspace)
    _add_data(app, workspace)
    _add_runs(app, workspace)
    _add_queue(app, workspace)
    return app


def _message(title: str, text: str, code: int) -> tuple[str, int]:
    """A page that only says something."""
    return flask.render_template("message.html", title=title, text=text), code


def _add_assets(app: flask.Flask) -> None:
    style = "\n".join(
        path.read_text(encoding="utf-8") for path in (PAGE_TEMPLATES / "style.css", HERE / "static" / "studio.css")
    )
    script = (HERE / "static" / "studio.js").read_text(encoding="utf-8")

    @app.get("/studio.css")
    def css() -> flask.Response:
        return flask.Response(style, mimetype="text/css")

    @app.get("/studio.js")
    def javascript() -> flask.Response:
        return flask.Response(script, mimetype="text/javascript")


# ---- home, new jobs --------------------------------------------------------------------------------------------------


def _add_home(app: flask.Flask, workspace: Workspace) -> None:
    @app.get("/")
    def home() -> str:
        runs = workspace.runs.all()
        return flask.render_template(
            "home.html",
            runs=[run for run in runs if run.record.kind in ("training", "images", "queue")][:100],
            looks=[run for run in runs if run.record.kind in ("check", "data")][:20],
            jobs=workspace.jobs(),
            scripts=list(scripts().values()),
            queued=workspace.queued(),
            folder=workspace.folder,
        )

    @app.get("/new")
    def new_job() -> str:
        return _new_page(workspace, flask.request.args, "")

    @app.post("/new")
    def make_job() -> Any:
        given = flask.request.form
        try:
            keys: dict[str, Any] = {}
            script = given.get("script", "")
            source = given.get("file", "").strip()
            preset = next((preset for preset in workspace.presets() if preset.path.name == given.get("preset")), None)
            if source:
                path = workspace.roots.inside(source)
                keys = read_settings(path)
                script = script_of(keys, path.stem) or script
            elif preset:
                keys, script = read_settings(preset.path), preset.script
            if script not in scripts():
                raise UserError("Choose a script, a preset or a file.")
            job = workspace.new_job(given.get("name", "").strip(), script, keys)
        except UserError as error:
            return _new_page(workspace, given, str(error)), 422
        return flask.redirect(f"/jobs/{job.name}", 303)


def _new_page(workspace: Workspace, given: Any, error: str) -> str:
    families: dict[str, list[Any]] = {}
    for preset in workspace.presets():
        families.setdefault(scripts()[preset.script].family.name, []).append(preset)
    return flask.render_template(
        "new.html", scripts=list(scripts().values()), presets=families, given=given, error=error
    )


# ---- jobs ------------------------------------------------------------------------------------------------------------


def _add_jobs(app: flask.Flask, workspace: Workspace) -> None:
    def known(name: str) -> Job:
        job = workspace.job(name)
        return job if job else flask.abort(404)

    @app.get("/jobs/<name>")
    def job_page(name: str) -> Any:
        job = known(name)
        return _job_page(workspace, job, workspace.form(job))

    @app.post("/jobs/<name>")
    def change_job(name: str) -> Any:
        job = known(name)
        action = flask.request.form.get("action", "save")
        if job.script not in scripts():
            raise UserError(f"{job.path}: this file names no script.")
        form = form_of_fields(job.script, scripts()[job.script].options_class, flask.request.form)
        if not form.ok:
            return _job_page(
                workspace, job, form, "Nothing was saved: some values are not what their options take."
            ), 422
        workspace.write_job(job.path, job.script, form.values())
        return _after_saving(workspace, job, action)

    @app.post("/jobs/<name>/remove")
    def remove_job(name: str) -> Any:
        job = known(name)
        workspace.set_queue([other for other in workspace.queued() if other != name])
        job.path.unlink(missing_ok=True)
        return flask.redirect("/", 303)

    @app.post("/jobs/<name>/look")
    def look(name: str) -> Any:
        return _after_saving(workspace, known(name), "sheet")


def _after_saving(workspace: Workspace, job: Job, action: str) -> Any:
    """What a button of the form does once the job is saved."""
    if action == "data":
        return flask.redirect(f"/jobs/{job.name}/data", 303)
    if action == "queue":
        workspace.set_queue([*workspace.queued(), job.name])
        return flask.redirect("/queue", 303)
    if action in ("start", "check", "sheet"):
        kinds: dict[str, Any] = {"start": "training", "check": "check", "sheet": "data"}
        try:
            run = workspace.start(job, kinds[action])
        except UserError as error:
            return _job_page(workspace, job, workspace.form(job), str(error)), 422
        return flask.redirect(f"/runs/{run.id}", 303)
    return flask.redirect(f"/jobs/{job.name}?saved=1", 303)


def _job_page(workspace: Workspace, job: Job, form: Form, problem: str = "") -> str:
    script = scripts()[form.script]
    return flask.render_template(
        "job.html",
        job=job,
        form=form,
        script=script,
        problem=problem,
        saved="saved" in flask.request.args and not problem,
        command=workspace.command(job.script, str(job.path), "training" if script.trains else "images"),
    )


# ---- data ------------------------------------------------------------------------------------------------------------


def _add_data(app: flask.Flask, workspace: Workspace) -> None:
    @app.get("/folders")
    def folders() -> flask.Response:
        """For the chooser of paths: what a folder holds, as JSON."""
        place = flask.request.args.get("path", "") or str(workspace.roots.folders[0])
        path = workspace.roots.inside(place)
        while not path.is_dir() and path != path.parent:
            path = path.parent
        wants = ("",) if flask.request.args.get("files") else ()
        found = workspace.roots.list(path, wants)
        return flask.jsonify(
            path=str(found.here.path),
            parent=None if found.parent is None else str(found.parent),
            roots=[str(root) for root in workspace.roots.folders],
            folders=[{"name": each.name, "path": str(each.path), "images": each.images} for each in found.folders],
            files=[{"name": each.name, "path": str(each)} for each in found.files],
            more=found.more,
        )

    @app.get("/jobs/<name>/data")
    def data_page(name: str) -> Any:
        return _data_page(workspace, name, flask.request.args.get("path", ""))

    @app.post("/jobs/<name>/data")
    def use_data(name: str) -> Any:
        job = workspace.job(name) or flask.abort(404)
        given = flask.request.form
        folder = workspace.roots.inside(given.get("path", ""))
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder.")
        form = workspace.form(job)
        values = form.values()
        for key in ("dataset_config", "train_data_dir", "in_json"):
            values.pop(key, None)
        if given.get("way") == "classes":
            values["train_data_dir"] = folder.as_posix()
        else:
            try:
                keys = {
                    "resolution": _sizes(given.get("resolution", "")),
                    "batch_size": _whole(given.get("batch_size", ""), "Images per batch"),
                    "enable_bucket": given.get("enable_bucket") == "on",
                    "caption_extension": given.get("caption_extension", "").strip() or None,
                }
                repeats = _whole(given.get("repeats", ""), "Repeats")
                written = workspace.write_dataset(given.get("dataset", "").strip(), folder, keys, repeats)
            except UserError as error:
                return _data_page(workspace, name, str(folder), str(error), given), 422
            values["dataset_config"] = written.as_posix()
        workspace.write_job(job.path, job.script, values)
        return _after_saving(workspace, job, given.get("action", "save"))


def _data_page(workspace: Workspace, name: str, place: str, problem: str = "", given: Any = None) -> str:
    job = workspace.job(name) or flask.abort(404)
    values = workspace.form(job).values()
    start = place or values.get("train_data_dir") or str(workspace.present)
    try:
        listing = workspace.roots.list(start)
    except UserError:
        if place:
            raise
        listing = workspace.roots.list(workspace.roots.folders[0])
    return flask.render_template(
        "data.html",
        job=job,
        listing=listing,
        values=values,
        roots=workspace.roots.folders,
        problem=problem,
        given=given,
    )


def _whole(text: str, what: str) -> int:
    if not (text.strip().isdecimal() and 1 <= int(text) <= 1_000_000):
        raise UserError(f"{what}: a whole number from 1 on is due.")
    return int(text)


def _sizes(text: str) -> int | list[int]:
    """``512`` or ``1024, 768``."""
    parts = [_whole(part, "Resolution") for part in text.replace("x", ",").split(",")]
    if len(parts) > 2:
        raise UserError("Resolution: one number, or width and height.")
    return parts[0] if len(parts) == 1 else parts


# ---- runs ------------------------------------------------------------------------------------------------------------


def _add_runs(app: flask.Flask, workspace: Workspace) -> None:
    def known(run_id: str) -> Run:
        run = workspace.runs.get(run_id)
        return run if run else flask.abort(404)

    @app.get("/runs/<run_id>")
    def run_page(run_id: str) -> str:
        run = known(run_id)
        has_job = workspace.job(run.record.name) is not None
        options = tail_of(run.folder / SETTINGS)
        return flask.render_template("run.html", run=run, live=_live(workspace, run), has_job=has_job, options=options)

    @app.get("/runs/<run_id>/live")
    def live(run_id: str) -> flask.Response:
        return flask.jsonify(_live(workspace, known(run_id)))

    @app.post("/runs/<run_id>/stop")
    def stop(run_id: str) -> Any:
        run = known(run_id)
        run.stop()
        return flask.redirect(f"/runs/{run.id}", 303)

    @app.post("/runs/<run_id>/resume")
    def resume(run_id: str) -> Any:
        run = known(run_id)
        workspace.resume(run)
        return flask.redirect(f"/runs/{run.id}", 303)

    @app.post("/runs/<run_id>/start")
    def start(run_id: str) -> Any:
        """The job of a check or a data set that was looked at."""
        job = workspace.job(known(run_id).record.name) or flask.abort(404)
        return flask.redirect(f"/runs/{workspace.start(job, 'training').id}", 303)

    @app.get("/runs/<run_id>/page")
    def document(run_id: str) -> flask.Response:
        return _document(workspace.report(known(run_id)))

    @app.get("/runs/<run_id>/images/<name>")
    def image(run_id: str, name: str) -> flask.Response:
        path = next((path for path in workspace.samples(known(run_id)) if path.name == name), None)
        return _image(path)

    @app.get("/runs/<run_id>/log")
    def whole_log(run_id: str) -> flask.Response:
        return flask.Response(printable(tail_of(known(run_id).log, 16 * 2**20)), mimetype="text/plain")


def _document(path: Path | None) -> flask.Response:
    """A page that a run has written, as a document of its own origin."""
    if path is None or path.stat().st_size > LARGEST_FILE:
        return flask.abort(404)
    if flask.request.headers.get("Sec-Fetch-Dest", "iframe") != "iframe":
        return flask.abort(403)  # outside of a frame of the studio it could lead its reader elsewhere
    response = flask.Response(path.read_bytes(), mimetype="text/html")
    response.headers["Content-Security-Policy"] = DOCUMENT_POLICY
    return response


def _image(path: Path | None) -> flask.Response:
    if path is None or path.stat().st_size > LARGEST_FILE:
        return flask.abort(404)
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    response = flask.Response(path.read_bytes(), mimetype=kind)
    response.headers["Cache-Control"] = "private, max-age=3600"
    return response


def _live(workspace: Workspace, run: Run) -> dict[str, Any]:
    """What changes on a run's page."""
    record, state, tail = run.record, run.state, run.tail()
    until = run.ended or time.time()
    images, page = workspace.samples(run), workspace.report(run)
    verdict = [line for line in tail.split("\n") if line.startswith(("Verdict: ", "Expected time: "))]
    return {
        "state": state,
        "code": run.code,
        "wishes": run.wishes,
        "took": _took(max(0.0, until - record.started)),
        "progress": progress_of(tail) if record.kind != "check" else None,
        "log": printable(tail),
        "verdict": [printable(line) for line in verdict],
        "error": printable(_error(tail)) if state == "failed" else "",
        "images": [
            {"name": path.name, "at": f"/runs/{run.id}/images/{path.name}?{int(path.stat().st_mtime)}"}
            for path in _newest_first(images[-MOST_SAMPLES:])
        ],
        "files": [_file(path) for path in workspace.files(run)],
        "page": None if page is None else int(page.stat().st_mtime * 1000),
        "resumable": record.kind == "training" and record.saves_states and state not in ("running", "finished"),
    }


def _newest_first(images: list[Path]) -> list[Path]:
    """Images in the order of their making, with the last moment of a training first and its prompts in their order."""
    moments: dict[str, list[Path]] = {}
    for path in images:
        found = SAMPLE.search(path.name)
        moments.setdefault(found[1] if found else path.name, []).append(path)
    return [path for moment in reversed(moments.values()) for path in moment]


def _file(path: Path) -> dict[str, str]:
    try:
        folder = path.is_dir()
        size = sum(part.stat().st_size for part in path.iterdir()) if folder else path.stat().st_size
    except OSError:
        return {"name": path.name, "size": "", "kind": ""}
    return {"name": path.name, "size": size_text(size), "kind": "state" if folder else "LoRA"}


def _error(tail: str) -> str:
    """The last error that a log ends with."""
    lines = [line for line in tail.split("\n") if line.startswith("error: ")]
    return lines[-1].removeprefix("error: ") if lines else ""


# ---- the queue -------------------------------------------------------------------------------------------------------


def _add_queue(app: flask.Flask, workspace: Workspace) -> None:
    @app.get("/queue")
    def queue_page() -> str:
        return _queue_page(workspace)

    @app.get("/queue/live")
    def queue_live() -> flask.Response:
        return flask.jsonify(_queue_live(workspace))

    @app.post("/queue")
    def change_queue() -> Any:
        given, names = flask.request.form, workspace.queued()
        action, name = given.get("action", ""), given.get("name", "")
        changes: dict[str, Callable[[], Any]] = {
            "add": lambda: workspace.set_queue([*names, name]),
            "remove": lambda: workspace.set_queue([other for other in names if other != name]),
            "up": lambda: workspace.set_queue(_moved(names, name, -1)),
            "down": lambda: workspace.set_queue(_moved(names, name, 1)),
            "start": lambda: workspace.start_queue(given.get("retry_failed") == "on"),
            "stop": workspace.stop_queue,
        }
        if action not in changes or (name and workspace.job(name) is None):
            flask.abort(400)
        try:
            changes[action]()
        except UserError as error:
            return _queue_page(workspace, str(error)), 422
        return flask.redirect("/queue", 303)

    @app.get("/queue/<name>/page")
    def queued_report(name: str) -> flask.Response:
        return _document(_queue_file(workspace, name, "report"))

    @app.get("/queue/<name>")
    def queued_job(name: str) -> str:
        job = next((job for job in _queue_live(workspace)["jobs"] if job["name"] == name), None)
        path = _queue_file(workspace, name, "log")
        log = printable(tail_of(path)) if path else ""
        return flask.render_template("queued.html", job=job or flask.abort(404), log=log)


def _queue_page(workspace: Workspace, problem: str = "") -> str:
    names = workspace.queued()
    return flask.render_template(
        "queue.html",
        live=_queue_live(workspace),
        others=[job.name for job in workspace.jobs() if job.name not in names and _trains(job)],
        command=workspace.queue_words(names or ["NAME"]),
        problem=problem,
    )


def _trains(job: Job) -> bool:
    return job.script in scripts() and scripts()[job.script].trains


def _queue_live(workspace: Workspace) -> dict[str, Any]:
    """What changes on the queue's page."""
    states, run = workspace.queue_states(), workspace.queue_run()
    jobs = []
    for name in workspace.queued():
        entry = states.get(name, {})
        kind = str(entry.get("state", "waiting"))
        if kind == "running" and run is None:
            kind = "interrupted"
        log = _queue_file(workspace, name, "log")
        progress = progress_of(tail_of(log, 4096)) if log and kind == "running" else None
        jobs.append(
            {
                "name": name,
                "state": kind,
                "took": _took(float(entry.get("seconds") or 0.0)) if entry.get("seconds") else "",
                "error": printable(str(entry.get("last_line") or "")),
                "progress": progress,
                "report": _queue_file(workspace, name, "report") is not None,
            }
        )
    return {"running": run.id if run else None, "wishes": run.wishes if run else 0, "jobs": jobs}


def _queue_file(workspace: Workspace, name: str, what: str) -> Path | None:
    """A file that the queue's record names for a job: its report or its log."""
    if name not in workspace.queued():
        return None
    named = workspace.queue_states().get(name, {}).get("outputs", {})
    path = Path(str(named.get(what, ""))) if isinstance(named, dict) and named.get(what) else None
    if path is None or path.is_symlink():
        return None
    path = workspace.present / path
    ending = ".report.html" if what == "report" else ".log"
    return path if path.name.endswith(ending) and path.is_file() else None


def _moved(names: list[str], name: str, by: int) -> list[str]:
    """The names with one of them moved up or down."""
    if name not in names:
        return names
    place = names.index(name)
    other = min(max(place + by, 0), len(names) - 1)
    names = list(names)
    names[place], names[other] = names[other], names[place]
    return names


# ---- words -----------------------------------------------------------------------------------------------------------


def _took(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _ago(seconds: float) -> str:
    """How long ago a moment was."""
    passed = max(0.0, time.time() - seconds)
    for unit, worth in (("d", 86400), ("h", 3600), ("min", 60)):
        if passed >= worth:
            return f"{passed / worth:.0f} {unit} ago"
    return "just now"
