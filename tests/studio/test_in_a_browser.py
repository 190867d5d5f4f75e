"""The studio as a person uses it: in a real browser, at a desk and on a phone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from library.families import by_key
from library.studio.forms import PREFIX
from library.studio.settings_files import read_settings
from library.studio.workspace import Workspace
from tests.browser import DESKTOP, PHONE, Browser, browser_program
from tests.studio.client import Client, studio

SIZES = {"desktop": DESKTOP, "phone": PHONE}


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    if browser_program() is None:
        pytest.skip("Chromium or chromedriver is not installed")
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


class Person:
    """Who looks at the studio, and uses what the page shows."""

    def __init__(self, browser: Browser, client: Client, size: tuple[int, int], dark: bool = False) -> None:
        self.browser, self.base = browser, f"http://127.0.0.1:{client.access.port}"
        browser.look_like(size, dark)
        self.go(client.access.address)

    def go(self, address: str) -> None:
        """Type an address."""
        self.browser.open(address if address.startswith("http") else self.base + address)
        self.browser.wait_for("return document.readyState === 'complete'")

    def click(self, selector: str) -> None:
        """Click what is seen of an element."""
        place = self.browser.run(
            "const e = document.querySelector(arguments[0]); e.scrollIntoView({block: 'center'});"
            "const r = e.getBoundingClientRect(); const p = [r.x + r.width / 2, r.y + r.height / 2];"
            "return e.contains(document.elementFromPoint(...p)) ? p : null",
            selector,
        )
        assert place is not None, f"{selector} cannot be clicked"
        self.browser.click(*place)

    def type(self, selector: str, text: str) -> None:
        """Put a text into a field, as typing does."""
        self.click(selector)
        self.browser.run("document.querySelector(arguments[0]).select()", selector)
        self.browser.tool("Input.insertText", text=text)

    def sees(self, script: str, seconds: float = 20) -> None:
        """Wait until an expression is true of the page."""
        end = time.monotonic() + seconds
        while not self.browser.run(f"return document.readyState === 'complete' && ({script})"):
            assert time.monotonic() < end, (script, self.browser.run("return document.body.innerText")[-2000:])
            time.sleep(0.05)

    def check(self) -> None:
        """Nothing is wrong with the page as it is: no sideways scrolling, no errors, no foreign requests, labels."""
        found = self.browser.run(
            "const d = document.documentElement; const inside = (e) => !e.closest('[hidden], pre, .gallery');"
            "const all = [...document.querySelectorAll('input, select, textarea, button, a, iframe')];"
            "return [d.scrollWidth - d.clientWidth,"
            " all.filter((e) => e.matches('input:not([type=hidden]), select, textarea') && !e.labels.length).length,"
            " all.filter((e) => e.matches('button, a') && !e.textContent.trim() && !e.querySelector('[alt]')).length,"
            " all.filter((e) => inside(e) && e.getBoundingClientRect().right > d.clientWidth + 1).length,"
            " document.querySelectorAll('h1').length]"
        )
        assert found == [0, 0, 0, 0, 1]
        assert self.browser.console() == []
        assert [address for address in self.browser.requests() if not address.startswith(self.base)] == []


def test_options_are_found_filled_in_and_saved(browser, tmp_path):
    with studio(tmp_path / "studio", [tmp_path]) as (client, workspace):
        person = Person(browser, client, PHONE, dark=True)
        person.check()
        person.go("/new")
        person.type("#name", "first")
        browser.run("document.querySelector('#script').value = arguments[0]", by_key("flux").file)
        person.click("main button.main")
        person.sees("document.querySelector('#find')")
        person.check()
        person.type("#find", "clipping norm")
        person.sees("document.querySelector('#found').textContent === '1 option'")
        person.type(f"#{PREFIX}max_grad_norm", "much")
        person.type("#find", "")
        person.click("button[value=save]")
        person.sees("document.querySelector('.wrong .wrong-words')")
        assert "max_grad_norm must be a number" in browser.run("return document.querySelector('.wrong').innerText")
        assert browser.run("return document.activeElement.id") == f"{PREFIX}max_grad_norm"
        assert [word for word in browser.console() if "422" not in word] == []
        person.type(f"#{PREFIX}max_grad_norm", "0.5")
        browser.look_like(DESKTOP)
        person.click("button[value=save]")
        person.sees("document.querySelector('.saved')")
        person.check()
        assert read_settings(workspace.job_path("first")) == {"script": by_key("flux").file, "max_grad_norm": 0.5}


def begin_a_job_from_a_file(person: Person, folder: Path, tiny_job: Callable[[], object]) -> None:
    """A new job, whose file is chosen in the page; ``tiny_job`` writes it."""
    person.sees("document.body.innerText.includes('Begin here')")
    person.click(".head a.main")
    person.sees("location.pathname === '/new'")
    person.type("#name", "tiny")
    person.type("#file", str(folder))
    tiny_job()
    person.click(".choose[data-for=file]")
    person.sees("document.querySelector('#chooser').open && document.querySelector('#chooser-list button')")
    person.check()
    person.browser.run(
        "[...document.querySelectorAll('#chooser-list button')].find((b) => b.textContent === 'given.toml').click()"
    )
    person.click("main button.main")
    person.sees("location.pathname === '/jobs/tiny'")
    person.check()


def choose_images(person: Person, image_folder: Path) -> None:
    """The images of a folder, and how they are trained."""
    person.click("button[value=data]")
    person.sees("location.pathname === '/jobs/tiny/data'")
    person.type("#path", str(image_folder))
    person.click(".go button")
    person.sees("document.querySelector('#use')")
    assert "12 images here, 12 with captions" in person.browser.run("return document.querySelector('#use').textContent")
    person.check()
    person.type("#resolution", "64")
    person.click("#enable_bucket")
    person.click("button[value=sheet]")
    person.sees("document.querySelector('#state') && document.querySelector('#state').textContent === 'finished'", 60)
    person.sees("document.querySelector('#page').src")
    person.check()


def check_the_job(person: Person) -> None:
    """An option is changed, and the plan is shown."""
    person.go("/jobs/tiny")
    person.type("#find", "network_dim")
    person.type(f"#{PREFIX}network_dim", "4")
    person.click("button[value=check]")
    person.sees("document.querySelector('#state') && document.querySelector('#state').textContent === 'finished'", 60)
    person.sees("document.querySelector('#verdict').innerText.includes('Verdict')")
    person.check()


def train_stop_and_resume(person: Person, workspace: Workspace) -> None:
    """A run is followed, stopped, resumed, and stopped again."""
    person.click("[data-when=finished] button")
    person.sees("/^steps [1-9]/.test((document.querySelector('#going-words') || document.body).textContent)", 90)
    person.sees("document.querySelector('#images img').naturalWidth > 0 && document.querySelector('#page').src")
    time.sleep(1)
    person.check()
    person.click("#stop")
    person.sees("document.querySelector('#state').textContent === 'stopped'", 60)
    person.check()
    person.sees("!document.querySelector('[data-when=resumable]').hidden")
    person.click("[data-when=resumable] button")
    person.sees("document.querySelector('#state').textContent === 'running'")
    person.sees("/^steps [1-9]/.test(document.querySelector('#going-words').textContent)", 90)
    person.go("/")
    person.sees("document.querySelector('.pill.running')")
    person.check()
    person.browser.run("history.back()")
    person.sees("document.querySelector('#stop')")
    person.click("#stop")
    person.sees("document.querySelector('#state').textContent === 'stopped'", 60)
    assert read_settings(workspace.job_path("tiny"))["network_dim"] == 4
    assert len([run for run in workspace.runs.all() if run.record.kind == "training"]) == 1


def queue_the_job(person: Person, workspace: Workspace) -> None:
    """The job in the queue."""
    person.go("/jobs/tiny")
    person.click("button[value=queue]")
    person.sees("location.pathname === '/queue'")
    person.check()
    for thread in workspace.runs.threads:
        thread.join(20)


@pytest.mark.thorough
@pytest.mark.parametrize("size", SIZES)
def test_a_whole_visit(browser, size, tmp_path, tiny_job, image_folder, fork_server):
    dark = size == "phone"
    with studio(tmp_path / "studio", [tmp_path, image_folder], fork_server) as (client, workspace):
        person = Person(browser, client, SIZES[size], dark)
        begin_a_job_from_a_file(person, tmp_path, tiny_job)
        choose_images(person, image_folder)
        check_the_job(person)
        train_stop_and_resume(person, workspace)
        queue_the_job(person, workspace)


@pytest.mark.thorough
def test_a_hostile_report_reaches_nothing(browser, tmp_path):
    """A report that a malicious program has put in place runs scripts, and finds no way to the studio or out."""
    import json

    from library.studio.runs import END, Record

    with studio(tmp_path / "studio", [tmp_path]) as (client, workspace):
        folder = workspace.runs.folder / "20260101-000000-evil"
        folder.mkdir(parents=True)
        record = Record(
            "training", "evil", by_key("flux").file, ["x"], str(tmp_path), time.time() - 9, str(tmp_path), "evil"
        )
        (folder / "run.json").write_text(json.dumps(vars(record)))
        (folder / END).write_text('{"code": 0, "time": 1.0}')
        attack = """<!doctype html><body><script>
          const out = [];
          const tried = (name, act) => Promise.resolve().then(act)
            .then(() => out.push(name + " worked"), () => out.push(name + " failed"));
          Promise.all([
            tried("fetch", () => fetch("/")),
            tried("post", () => fetch("/queue", {method: "POST", mode: "no-cors", body: "action=start"})),
            tried("parent", () => parent.document.title),
            tried("cookie", () => document.cookie),
            tried("storage", () => localStorage.length),
            tried("top", () => { top.location = "about:blank"; }),
            tried("popup", () => { if (!open("about:blank")) throw 0; }),
            tried("form", () => { const f = document.createElement("form"); f.method = "post"; f.action = "/queue";
              document.body.append(f); f.submit(); throw 0; }),
          ]).then(() => { parent.postMessage(out.join(", "), "*"); location = "http://localhost:9/out"; });
        </script>"""
        (tmp_path / "evil.report.html").write_text(attack, encoding="utf-8")
        person = Person(browser, client, DESKTOP)
        person.go("/")
        browser.run("addEventListener('message', (e) => { window.heard = e.data; }); window.heard = null")
        browser.run(
            "const f = document.createElement('iframe'); f.setAttribute('sandbox', 'allow-scripts');"
            "f.src = arguments[0]; document.body.append(f)",
            f"/runs/{folder.name}/page",
        )
        said = browser.wait_for("return window.heard")
        assert "worked" not in said and said.count("failed") == 8, said
        time.sleep(0.5)
        assert not [address for address in browser.requests() if "localhost:9" in address]
        assert browser.run("return location.pathname") == "/" and workspace.queue_run() is None
