"""Nobody but a browser with the token, on a page of the studio itself, gets or changes anything."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import quote

import pytest
from PIL import Image

from library.families import FAMILIES
from library.studio.access import FORM_TOKEN
from library.studio.app import LARGEST_BODY, create_app
from library.studio.runs import END, KEEPER, Record
from tests.running import ROOT
from tests.studio.client import Client, studio

SCRIPT = FAMILIES[0].file
SECRET = "what nobody may see"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A studio with a job and an ended run, a root with images, and a secret beside both."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "secret").mkdir()
    (folder / "secret" / "secret.txt").write_text(SECRET)
    (folder / "secret" / "secret.png").write_text(SECRET)
    root = folder / "images"
    root.mkdir()
    Image.new("RGB", (8, 8)).save(root / "one.png")
    (root / "out").symlink_to(folder / "secret")
    (root / "secret.toml").symlink_to(folder / "secret" / "secret.txt")
    with studio(folder / "studio", [root]) as (client, workspace):
        client.post("/new", {"name": "job", "script": SCRIPT})
        output = folder / "output"
        (output / "sample").mkdir(parents=True)
        run = workspace.runs.folder / "20260101-000000-job"
        run.mkdir(parents=True)
        words = ["python", "x.py"]
        record = Record("training", "job", SCRIPT, words, str(folder), time.time() - 5, str(output), "job")
        (run / "run.json").write_text(json.dumps(vars(record)))
        (run / END).write_text('{"code": 0, "time": 1.0}')
        Image.new("RGB", (8, 8)).save(output / "sample" / "job_1.png")
        (output / "sample" / "job_2.png").symlink_to(folder / "secret" / "secret.png")
        (output / "sample" / "job_3.txt").write_text(SECRET)
        (output / "job.report.html").write_text("<script>fetch('/')</script>", encoding="utf-8")
        (folder / "studio" / "jobs" / "linked.toml").symlink_to(folder / "secret" / "secret.txt")
        yield client, workspace, folder


PAGES = ["/", "/new", "/queue", "/jobs/job", "/jobs/job/data", "/folders", "/studio.css", "/queue/live"]
PAGES += [f"/runs/20260101-000000-job{more}" for more in ("", "/live", "/log", "/page", "/images/job_1.png")]
CHANGES = ["/new", "/queue", "/jobs/job", "/jobs/job/remove", "/jobs/job/data", "/jobs/job/look"]
CHANGES += [f"/runs/20260101-000000-job{more}" for more in ("/stop", "/resume", "/start")]


def test_every_address_is_tried_here(place):
    """The lists above are the whole of what the studio answers to."""
    client, workspace, _ = place
    rules = list(create_app(workspace, client.access).url_map.iter_rules())

    def of(method: str) -> set[str]:
        found = {rule.rule for rule in rules if method in (rule.methods or ())}
        return {re.sub(r"<[^>]*>", "*", rule) for rule in found}

    def general(address: str) -> str:
        address = re.sub(r"20260101-000000-job|job_1\.png", "*", address)
        return address.replace("/jobs/job", "/jobs/*")

    assert of("GET") - {"/studio.js", "/queue/*", "/queue/*/page"} == set(map(general, PAGES))
    assert of("POST") == set(map(general, CHANGES))


@pytest.mark.parametrize(
    "headers",
    [
        {"cookie": None},
        {"cookie": "studio-1=guessed"},
        {"host": "evil.example"},
        {"host": "127.0.0.1"},
        {"host": "127.0.0.1:1"},
        {"host": "127.0.0.1.evil.example:80"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
    ],
    ids=str,
)
def test_no_page_is_given_to_others(place, headers):
    client = place[0]
    for page in PAGES:
        answer = client.get(page, **headers)
        assert answer.code == 403, page
        assert "job_1" not in answer.text and "Set-Cookie" not in answer.headers


@pytest.mark.parametrize(
    ("headers", "token"),
    [
        ({"cookie": None}, None),
        ({"host": "evil.example", "origin": "http://evil.example"}, None),
        ({"origin": "http://evil.example"}, None),
        ({"origin": "http://evil.example", "sec_fetch_site": "cross-site"}, None),
        ({"origin": "null", "sec_fetch_site": "cross-site"}, None),
        ({"origin": "null", "sec_fetch_site": None}, None),
        ({"origin": None, "sec_fetch_site": None}, None),
        ({"sec_fetch_site": "none"}, None),
        ({"sec_fetch_site": "same-site"}, None),
        ({}, ""),
        ({}, "guessed"),
        ({}, "\N{SNOWMAN}"),
    ],
    ids=str,
)
def test_nothing_is_changed_by_others(place, headers, token):
    client, workspace, _ = place
    before = {path: path.read_bytes() for path in workspace.folder.rglob("*") if path.is_file()}
    for change in CHANGES:
        fields = {"name": "job", "action": "add"} | ({} if token is None else {FORM_TOKEN: token})
        assert client.post(change, fields, **headers).code == 403, change
    assert {path: path.read_bytes() for path in workspace.folder.rglob("*") if path.is_file()} == before


def test_a_form_of_a_browser_without_sec_fetch_and_a_page_opened_by_hand_are_taken(place):
    client = place[0]
    own = f"http://127.0.0.1:{client.access.port}"
    assert client.post("/queue", {"action": "add", "name": "job"}, sec_fetch_site=None, origin=own).code == 303
    assert client.post("/queue", {"action": "remove", "name": "job"}, origin="null").code == 303
    assert client.get("/", sec_fetch_site="none").code == 200
    assert client.get("/?token=guessed", cookie=None).code == 403
    assert client.get(f"/jobs/job?token={client.access.token}", cookie=None).code == 403


WAYS_OUT = [
    "..",
    "../..",
    "../../secret/secret.txt",
    "%2e%2e",
    "..%2f..%2fsecret",
    "/etc/passwd",
    "%00",
    "a\\..\\b",
    "C:\\x",
]


@pytest.mark.parametrize("name", [*WAYS_OUT, "." * 300, "x" * 5000, "\N{SNOWMAN}", "%ff"])
def test_no_name_in_an_address_leads_out(place, name):
    client = place[0]
    for address in (
        "/jobs/*",
        "/jobs/*/data",
        "/runs/*",
        "/runs/*/page",
        "/runs/*/log",
        "/queue/*/page",
        "/queue/*/log",
    ):
        for text in {name, quote(name, safe="")} if name.isascii() else {quote(name, safe="")}:
            answer = client.get(address.replace("*", text))
            assert answer.code in (303, 308, 400, 403, 404), (address, text)
            assert SECRET not in answer.text
    image = client.get(f"/runs/20260101-000000-job/images/{quote(name, safe='')}")
    assert image.code in (400, 404) and SECRET not in image.text


def test_no_path_leads_out_of_the_roots(place):
    client, workspace, folder = place
    outside = [str(folder), str(folder / "secret"), str(folder / "images" / "out"), str(folder / "images" / ".."), "/"]
    outside += ["/etc", "~root", "../..", "\0", str(folder / "images" / "out" / "secret.txt")]
    for path in outside:
        for address in (f"/folders?files=1&path={quote(path)}", f"/jobs/job/data?path={quote(path)}"):
            answer = client.get(address)
            assert answer.code == 403, address
            assert "secret.txt" not in answer.text
        assert client.post("/jobs/job/data", {"path": path, "way": "classes"}).code == 403
        assert client.post("/new", {"name": "thief", "file": path}).code == 422
    shown = client.get(f"/folders?files=1&path={quote(str(folder / 'images'))}").text
    assert "one.png" in shown and "secret" not in shown and '"out"' not in shown
    stolen = client.post("/new", {"name": "thief", "file": str(folder / "images" / "secret.toml"), "script": SCRIPT})
    assert stolen.code == 422 and SECRET not in stolen.text
    for name in ("../thief", "a/b", "..", ".hidden", "con", "x" * 81, "", "a\nb"):
        assert client.post("/new", {"name": name, "script": SCRIPT}).code == 422
        data = {"path": str(folder / "images"), "dataset": name, "resolution": "64", "batch_size": "1", "repeats": "1"}
        assert client.post("/jobs/job/data", data).code == 422
    assert not list(folder.rglob("thief*")) and not list(folder.rglob("*hidden*"))
    assert client.get("/jobs/linked").code in (400, 404) and SECRET not in client.get("/jobs/linked").text
    assert workspace.job("linked") is None


def test_only_images_of_the_run_are_sent(place):
    client = place[0]
    run = "/runs/20260101-000000-job"
    sent = client.get(f"{run}/images/job_1.png")
    assert sent.code == 200 and sent.headers["Content-Type"] == "image/png"
    for name in ("job_2.png", "job_3.txt", "run.json"):
        assert client.get(f"{run}/images/{name}").code == 404
    assert "job_2" not in client.get(run).text and "job_3" not in client.get(run).text


def test_what_a_report_runs_has_an_origin_of_its_own(place):
    client = place[0]
    policy = client.get("/runs/20260101-000000-job/page").headers["Content-Security-Policy"]
    assert (
        policy.startswith("sandbox allow-scripts;")
        and "default-src 'none'" in policy
        and "'self'" not in policy.partition("frame-ancestors")[0]
    )
    assert 'sandbox="allow-scripts"' in client.get("/runs/20260101-000000-job").text
    assert client.get("/runs/20260101-000000-job/page", sec_fetch_dest="iframe").code == 200
    assert client.get("/runs/20260101-000000-job/page", sec_fetch_dest="document").code == 403


def test_every_answer_has_the_headers_that_keep_a_browser_in(place):
    client = place[0]
    for page in [*PAGES, "/nothing", "/studio.js"]:
        headers = client.get(page).headers
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and ("unsafe" not in policy or page.endswith("/page")), page
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
        assert "Access-Control-Allow-Origin" not in headers
    assert client.ask("OPTIONS", "/", origin="http://evil.example").code == 403
    page = client.get("/jobs/job").text
    assert not re.search(r"(?i)<script(?![^>]* src=)(?![^>]*application/json)|\son\w+=|style=|https?://", page)


def test_a_huge_or_endless_body_is_not_read(place):
    client = place[0]
    assert client.post("/queue", {"name": "x" * LARGEST_BODY}).code == 413
    with socket.create_connection(("127.0.0.1", client.access.port), timeout=20) as line:
        line.sendall(f"POST /queue HTTP/1.1\r\nHost: 127.0.0.1:{client.access.port}\r\n".encode())
        line.sendall(b"Content-Length: 99999999999\r\n\r\n")
        assert b" 413 " in line.recv(100)
    with socket.create_connection(("127.0.0.1", client.access.port), timeout=20) as line:
        line.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * 2**19 + b"\r\n\r\n")
        assert line.recv(100).split()[1] in (b"431", b"400")
    assert client.get("/").code == 200


def test_names_and_texts_of_files_are_never_html(place):
    client, workspace, folder = place
    evil = "<img src=x onerror=alert(1)>"
    (folder / "images" / evil).mkdir()
    (folder / "images" / evil / "1.png").write_bytes(b"")
    job = {"output_name": evil, "training_comment": "</textarea>\n" + evil, "made_up": evil}
    workspace.new_job("evil", SCRIPT, job)
    run = workspace.runs.get("20260101-000000-job")
    run.log.write_text(f"</pre>{evil}\nerror: {evil}\n", encoding="utf-8")
    (run.folder / END).write_text('{"code": 1, "time": 1.0}')
    pages = ["/jobs/evil", f"/jobs/evil/data?path={quote(str(folder / 'images'))}", "/runs/20260101-000000-job"]
    for page in pages:
        text = client.get(page).text
        assert "onerror" in text and "<img src=x" not in text and "</pre><img" not in text, page
    assert client.get("/runs/20260101-000000-job/log").headers["Content-Type"].startswith("text/plain")


def test_a_process_that_took_over_a_number_is_not_taken_for_the_run(place):
    workspace = place[1]
    folder = workspace.runs.folder / "20260102-000000-old"
    folder.mkdir()
    started = time.time() - 3600
    (folder / "run.json").write_text(json.dumps(vars(Record("training", "old", SCRIPT, ["x"], ".", started))))
    from library.processes import this_process

    mark = this_process()
    run = workspace.runs.get(folder.name)
    (folder / KEEPER).write_text(str(mark))
    assert run.state == "running"
    (folder / KEEPER).write_text(f"{mark.where}-{mark.pid}-{int(mark.start, 16) + 1:x}")
    assert run.state == "lost"
    (folder / KEEPER).write_text(f"00000000-{mark.pid}-{mark.start}")
    assert run.state == "lost"
    run.stop()
    assert run.wishes == 0


def test_the_program_listens_on_this_machine_only_and_ends_by_ctrl_c(tmp_path):
    words = [sys.executable, str(ROOT / "tools" / "studio.py"), "--folder", str(tmp_path / "studio"), "--port", "0"]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env={**os.environ, "HOME": str(tmp_path)}
    )
    try:
        assert process.stdout is not None
        address = next(
            found for line in process.stdout if (found := re.search(r"http://127\.0\.0\.1:(\d+)/\?token=(\S+)", line))
        )
        from library.studio.access import Access

        access = Access(int(address[1]))
        access.token = address[2]
        client = Client(access)
        assert client.get("/").code == 403
        client.open()
        assert client.get("/").code == 200
        with socket.socket() as line:
            line.settimeout(2)
            addresses = {entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
            for other in addresses - {"127.0.0.1", "127.0.1.1"}:
                assert line.connect_ex((other, access.port)) != 0
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
