"""The studio for tests: its pages through real HTTP, as a browser asks for them, without a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlencode

from waitress import wasyncore
from waitress.server import create_server

from library.child_processes import LAUNCHER
from library.studio.access import FORM_TOKEN, Access
from library.studio.app import LARGEST_BODY, create_app
from library.studio.folders import Roots
from library.studio.forms import PREFIX
from library.studio.runs import Record, Run, Runs, keep
from library.studio.workspace import Workspace
from tests.processes import ForkServer
from tests.running import ROOT


@dataclass
class Answer:
    """What came back."""

    code: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def text(self) -> str:
        """The body, read as UTF-8."""
        return self.body.decode("utf-8")


class Client:
    """A browser's requests, with its cookie; each part of them can be another's."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self.cookie: str | None = None

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str | None) -> Answer:
        """A request; ``headers`` (``sec_fetch_site``) replace the browser's own, None leaves one out."""
        own = f"127.0.0.1:{self.access.port}"
        sent: dict[str, str | None] = {"Host": own, "Cookie": self.cookie}
        if body is not None:
            sent |= {"Origin": f"http://{own}", "Sec-Fetch-Site": "same-origin"}
            sent |= {"Content-Type": "application/x-www-form-urlencoded"}
        sent |= {name.replace("_", "-").title(): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.access.port, timeout=30)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in sent.items():
                if value is not None:
                    connection.putheader(name, value)
            if body is not None and "Content-Length" not in sent:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str | None) -> Answer:
        """A page."""
        return self.ask("GET", path, **headers)

    def post(self, path: str, fields: Mapping[str, str] | None = None, **headers: str | None) -> Answer:
        """A form, with its token unless ``fields`` hold another."""
        given = {FORM_TOKEN: self.access.form_token, **(fields or {})}
        return self.ask("POST", path, urlencode(given).encode(), **headers)

    def open(self) -> None:
        """Open the address that is printed."""
        answer = self.get(f"/?token={self.access.token}")
        assert answer.code == 303, answer.text
        self.cookie = str(answer.headers["Set-Cookie"]).partition(";")[0]


class ForkedRuns(Runs):
    """Runs whose keepers are threads, and whose scripts come from a fork server: true processes that start at once."""

    def __init__(self, folder: Path, server: ForkServer | None) -> None:
        super().__init__(folder)
        self.server, self.threads = server, list[threading.Thread]()

    def start_keeper(self, run: Run) -> None:
        self.threads.append(threading.Thread(target=keep, args=(run.folder, self.start_script)))
        self.threads[-1].start()

    def start_script(self, words: list[str], log: IO[bytes], record: Record) -> Any:
        """What ``accelerate launch`` would start for one process."""
        rest = words[words.index(LAUNCHER) + 1 :] if LAUNCHER in words else words[1:]
        assert self.server is not None
        script = Path(rest[0]).relative_to(ROOT).as_posix()
        return self.server.start(script, *rest[1:], cwd=Path(record.folder), output=Path(log.name))


@contextlib.contextmanager
def studio(folder: Path, roots: list[Path], server: ForkServer | None = None) -> Iterator[tuple[Client, Workspace]]:
    """A studio that listens on a port of this machine, and a browser that was let in."""
    folder.mkdir(parents=True, exist_ok=True)
    access = Access()
    workspace = Workspace(folder, Roots([*roots, folder]))
    workspace.runs = ForkedRuns(workspace.runs.folder, server)
    app, limit = create_app(workspace, access), LARGEST_BODY + 4096
    listening = create_server(app, map={}, host="127.0.0.1", port=0, threads=4, max_request_body_size=limit)
    access.port = int(listening.effective_port)
    thread = threading.Thread(target=listening.run, daemon=True)
    thread.start()
    client = Client(access)
    client.open()
    try:
        yield client, workspace
    finally:
        with contextlib.suppress(OSError):  # another thread's answer may have woken the loop before this one does
            listening.trigger.pull_trigger(lambda: wasyncore.close_all(listening._map))
        thread.join(20)
        listening.task_dispatcher.shutdown()


def fields_of(page: str) -> dict[str, str]:
    """What a browser would send of the options on a page: names and texts of the fields, with their defaults."""
    from html.parser import HTMLParser

    found: dict[str, str] = {}

    class Reader(HTMLParser):
        area: str | None = None
        select: str | None = None

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            given = dict(attrs)
            name = given.get("name") or ""
            if tag == "input" and name and (given.get("type") != "checkbox" or "checked" in given):
                found[name] = given.get("value") or ""
            elif tag == "textarea" and name:
                found[name], self.area = "", name
            elif tag == "select":
                self.select = name
            elif tag == "option" and self.select is not None and "value" in given:
                found.setdefault(self.select, given["value"] or "")
            elif tag == "option" and self.select is not None and "selected" in given:
                self.area, found[self.select] = self.select, ""

        def handle_endtag(self, tag: str) -> None:
            if tag in ("textarea", "option"):
                self.area = None
            elif tag == "select":
                self.select = None

        def handle_data(self, data: str) -> None:
            if self.area is not None:
                found[self.area] += data

    Reader().feed(page)
    return {name: text.removeprefix("\n") for name, text in found.items() if name.startswith(PREFIX)}


def names_of(page: str) -> list[str]:
    """The options that a form shows, each as often as it does."""
    return re.findall(rf'<(?:input|select|textarea)[^>]* id="{PREFIX}(\w+)"', page)
