"""Runs are started, stopped and resumed through the page, and go on without it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from library.families import by_key
from library.html_pages import read_page_data
from library.studio.access import Access
from library.studio.runs import END, LOG, Record, Run, Runs, progress_of, tail_of
from library.studio.settings_files import settings_text
from tests.running import ROOT
from tests.studio.client import Client, studio

FLUX = by_key("flux")


def live(client: Client, run: str) -> dict:
    return json.loads(client.get(f"/runs/{run}/live").text)


def wait_until(client: Client, run: str, holds, seconds: float = 120) -> dict:
    """What a run's page says as soon as it is as wanted."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        now = live(client, run)
        if holds(now):
            return now
        assert now["state"] == "running", now["log"][-3000:]
        time.sleep(0.1)
    raise TimeoutError(f"{now['state']}: {now['log'][-2000:]}")


def trains(now: dict) -> bool:
    return bool(now["progress"] and now["progress"]["name"] == "steps" and now["progress"]["done"] >= 2)


def ended(now: dict) -> bool:
    return now["state"] != "running"


def test_a_run_is_started_goes_on_without_the_page_is_stopped_and_resumed(
    tmp_path, tiny_job, image_folder, fork_server
):
    folder = tmp_path / "studio"
    with studio(folder, [tmp_path, image_folder], fork_server) as (client, workspace):
        assert client.post("/new", {"name": "tiny", "file": str(tiny_job())}).code == 303
        data = {"path": str(image_folder), "dataset": "circles", "resolution": "64", "batch_size": "1", "repeats": "1"}
        assert client.post("/jobs/tiny/data", {**data, "caption_extension": ".txt"}).code == 303
        run = client.post("/jobs/tiny", {**option_fields(client, "tiny"), "action": "start"}).headers["Location"]
        run = run.rpartition("/")[2]
        wait_until(client, run, trains)
        keepers = workspace.runs.threads
    with studio(folder, [tmp_path], fork_server) as (client, workspace):  # another start of the studio
        now = live(client, run)
        assert now["state"] == "running" and trains(now)
        assert 'pill running">running' in client.get("/").text
        assert client.post(f"/runs/{run}/resume").code == 400  # not while it runs
        assert client.post(f"/runs/{run}/stop").code == 303
        stopped = wait_until(client, run, ended)
        keepers[0].join(20)
        assert (stopped["state"], stopped["wishes"], stopped["code"]) == ("stopped", 1, 0)
        assert stopped["resumable"] and "Traceback" not in stopped["log"]
        done = stopped["progress"]["done"]
        assert done < 400
        assert {entry["kind"] for entry in stopped["files"]} == {"LoRA", "state"}
        [image] = stopped["images"]
        assert client.get(image["at"]).body.startswith(b"\x89PNG")
        assert "lora" in client.get(f"/runs/{run}/page").text

        (workspace.runs.get(run).folder / "settings.toml").write_text(  # fewer steps, for a test that ends
            settings_text(FLUX.file, {**values_of(workspace, "tiny"), "max_train_steps": done + 2}), encoding="utf-8"
        )
        assert client.post(f"/runs/{run}/resume").code == 303
        finished = wait_until(client, run, ended)
        assert (finished["state"], finished["code"]) == ("finished", 0), finished["log"][-2000:]
        assert f"(step {done})" in finished["log"] and "--resume latest" in finished["log"]
        assert finished["progress"]["done"] == done + 2 and not finished["resumable"]
        report = read_page_data(tmp_path / "out" / "lora.report.html")
        assert report["status"]["state"] == "finished" and len(report["runs"]) == 2
        workspace.runs.threads[0].join(20)


def option_fields(client: Client, job: str) -> dict[str, str]:
    from tests.studio.client import fields_of

    return fields_of(client.get(f"/jobs/{job}").text)


def values_of(workspace, job: str) -> dict:
    return workspace.form(workspace.job(job)).values()


def test_a_check_and_a_look_at_the_images_are_shown_before_the_start(tmp_path, tiny_job, image_folder, fork_server):
    file = tiny_job(train_data_dir=str(tmp_path / "train"), resolution="64", caption_extension=".txt")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "2_circle").symlink_to(image_folder)
    with studio(tmp_path / "studio", [tmp_path], fork_server) as (client, workspace):
        client.post("/new", {"name": "tiny", "file": str(file)})
        look = client.post("/jobs/tiny/look").headers["Location"].rpartition("/")[2]
        seen = wait_until(client, look, ended)
        assert seen["state"] == "finished", seen["log"][-2000:]
        assert "a circle, number 0" in client.get(f"/runs/{look}/page").text
        assert not (tmp_path / "out").exists()
        check = client.post("/jobs/tiny", {**option_fields(client, "tiny"), "action": "check"}).headers["Location"]
        check = check.rpartition("/")[2]
        planned = wait_until(client, check, ended)
        assert planned["state"] == "finished" and "All checks passed" in planned["log"]
        assert [line.partition(":")[0] for line in planned["verdict"]] == ["Expected time", "Verdict"]
        assert "Start the training" in client.get(f"/runs/{check}").text and not (tmp_path / "out").exists()
        client.post("/jobs/tiny", {**option_fields(client, "tiny"), "option-output_dir": "", "action": "check"})
        failed = wait_until(client, workspace.runs.all()[0].id, ended)
        assert failed["state"] == "failed" and failed["code"] == 2 and "--output_dir is missing" in failed["error"]
        for thread in workspace.runs.threads:
            thread.join(20)


def test_a_queue_is_put_in_order_started_and_shown(tmp_path, tiny_job, fork_server):
    with studio(tmp_path / "studio", [tmp_path], fork_server) as (client, workspace):
        for name in ("one", "two", "three"):
            client.post("/new", {"name": name, "file": str(tiny_job(output_name=name))})
            assert client.post("/queue", {"action": "add", "name": name}).code == 303
        client.post("/queue", {"action": "up", "name": "three"})
        client.post("/queue", {"action": "down", "name": "one"})
        client.post("/queue", {"action": "remove", "name": "two"})
        assert workspace.queued() == ["three", "one"]
        assert client.post("/queue", {"action": "add", "name": "four"}).code == 400
        path = workspace.job_path("one")
        path.write_text(path.read_text() + "not_an_option = 1\n", encoding="utf-8")
        assert client.post("/queue", {"action": "start"}).code == 303
        run = workspace.runs.all()[0]
        ran = wait_until(client, run.id, ended)
        assert (
            ran["state"] == "failed" and "not_an_option" in ran["error"]
        )  # every mistake is said before anything runs
        words = run.record.words
        assert [Path(word).stem for word in words if word.endswith(".toml")] == ["three", "one"]
        assert "run_queue.py" in client.get("/queue").text
        record = {
            "name": "three",
            "state": "failed",
            "last_line": "<b>no</b>",
            "seconds": 61,
            "outputs": {"report": "/etc/passwd", "log": "/etc/x.log"},
        }
        (workspace.queue_folder / "queue.json").write_text(json.dumps({"jobs": [record]}), encoding="utf-8")
        shown = client.get("/queue").text
        assert "failed" in shown and "&lt;b&gt;no&lt;/b&gt;" in shown and "1 min 01 s" in shown
        assert client.get("/queue/three/page").code == 404
        alone = client.get("/queue/three").text
        assert "&lt;b&gt;no&lt;/b&gt;" in alone and "root:" not in alone
        record |= {"outputs": {"report": str(tmp_path / "three.report.html"), "log": str(tmp_path / "three.log")}}
        (workspace.queue_folder / "queue.json").write_text(json.dumps({"jobs": [record]}), encoding="utf-8")
        (tmp_path / "three.report.html").write_text("<p>its report</p>", encoding="utf-8")
        (tmp_path / "three.log").write_text("what it <said>\n", encoding="utf-8")
        assert client.get("/queue/three/page").text == "<p>its report</p>"
        assert "what it &lt;said&gt;" in client.get("/queue/three").text
        for thread in workspace.runs.threads:
            thread.join(20)


@pytest.fixture
def start_program(tmp_path):
    """Start a small program as a run with a true keeper; both are gone when the test ends."""
    runs = Runs(tmp_path)

    def start(*words: str) -> tuple[Run, subprocess.Popen[bytes]]:
        run = runs.start(Record("images", "small", "x.py", list(words), str(tmp_path), time.time()))
        return run, runs._keepers[-1]

    yield start
    for run in runs.all():
        for _ in range(3):
            run.stop()
    for keeper in runs._keepers:
        keeper.wait(30)


def until(holds, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_keeper_outlives_who_started_it_and_passes_on_each_wish_to_stop_once(tmp_path, start_program):
    program = tmp_path / "program.py"
    program.write_text(
        "import signal, time\n"
        "signal.signal(signal.SIGINT, lambda *_: print('heard', flush=True))\n"
        "print('begins', flush=True)\n"
        "while True: time.sleep(0.05)\n"
    )
    run, keeper = start_program(sys.executable, str(program))
    until(lambda: "begins" in run.tail())
    assert os.getsid(keeper.pid) == keeper.pid != os.getsid(0)
    run.stop()
    until(lambda: run.tail().count("heard") == 1)
    run.stop()
    until(lambda: run.tail().count("heard") == 2)
    assert run.state == "running"
    run.stop()
    until(lambda: run.state == "stopped")
    assert run.code == -signal.SIGKILL


def test_a_program_that_cannot_be_started_is_a_run_that_failed(tmp_path, start_program):
    run, _ = start_program(str(tmp_path / "nothing"))
    until(lambda: run.state != "running")
    assert run.state == "failed" and "cannot be started" in run.tail()


def test_the_end_of_a_log_shows_each_progress_bar_once(tmp_path):
    log = tmp_path / LOG
    bars = "".join(f"\rsteps: {n}%|#  | {n}/100 [00:0{n}<01:00, avr_loss=0.{n}]" for n in range(9))
    log.write_bytes(f"first\ncaching latents: 100%|###| 4/4 [00:01<00:00,  9image/s]\n{bars}".encode())
    text = tail_of(log)
    assert text.count("steps:") == 1 and text.startswith("first\n")
    assert progress_of(text) == {"name": "steps", "done": 8, "total": 100, "more": "00:08<01:00, avr_loss=0.8"}
    log.write_bytes(b"x" * 100 + b"\nlast line\n")
    assert tail_of(log, 30) == "last line\n" and progress_of("no bar") is None and tail_of(tmp_path / "none") == ""


def test_samples_are_shown_with_the_last_moment_first_and_its_prompts_in_order(tmp_path):
    (tmp_path / "sample").mkdir()
    names = [f"a_{moment}_{prompt:02}_20260101000000_1.png" for moment in ("000010", "e000001") for prompt in (0, 1)]
    for number, name in enumerate([*names, "a_other.png", "b_000010_00_20260101000000_1.png"]):
        path = tmp_path / "sample" / name
        path.write_bytes(b"")
        os.utime(path, (2e9 + number, 2e9 + number))
    with studio(tmp_path / "studio", [tmp_path]) as (client, workspace):
        folder = workspace.runs.folder / "20260101-000000-a"
        folder.mkdir(parents=True)
        record = Record("training", "a", FLUX.file, ["x"], str(tmp_path), 1e9, str(tmp_path), "a")
        (folder / "run.json").write_text(json.dumps(vars(record)))
        shown = [image["name"] for image in live(client, folder.name)["images"]]
    assert shown == ["a_other.png", names[2], names[3], names[0], names[1]]


@pytest.mark.thorough
def test_a_true_studio_is_ended_and_started_while_its_run_goes_on(tmp_path, tiny_job, image_folder):
    """As above, with every process as it really is: the program, its keeper, accelerate launch."""

    def begin() -> tuple[Client, subprocess.Popen[str]]:
        words = [str(ROOT / "tools" / "studio.py"), "--folder", "studio", "--root", str(image_folder), "--port", "0"]
        process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
        assert process.stdout is not None
        found = next(m for line in process.stdout if (m := re.search(r":(\d+)/\?token=(\S+)", line)))
        access = Access(int(found[1]))
        access.token = found[2]
        client = Client(access)
        client.open()
        access.form_token = re.search(r'name="form-token" value="([^"]+)"', client.get("/new").text)[1]
        return client, process

    client, process = begin()
    client.post("/new", {"name": "tiny", "file": str(tiny_job())})
    data = {"path": str(image_folder), "dataset": "circles", "resolution": "64", "batch_size": "1", "repeats": "1"}
    client.post("/jobs/tiny/data", {**data, "caption_extension": ".txt"})
    run = client.post("/jobs/tiny", {**option_fields(client, "tiny"), "action": "start"}).headers["Location"]
    run = run.rpartition("/")[2]
    wait_until(client, run, trains, 300)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert not (tmp_path / "studio" / "runs" / run / END).exists()
    client, process = begin()
    try:
        assert live(client, run)["state"] == "running"
        client.post(f"/runs/{run}/stop")
        stopped = wait_until(client, run, ended, 120)
        assert (stopped["state"], stopped["code"]) == ("stopped", 0) and "Traceback" not in stopped["log"]
        client.post(f"/runs/{run}/resume")
        again = wait_until(
            client, run, lambda now: trains(now) and now["progress"]["done"] > stopped["progress"]["done"], 300
        )
        assert again["state"] == "running"
        client.post(f"/runs/{run}/stop")
        assert wait_until(client, run, ended, 120)["state"] == "stopped"
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        if process.stdout is not None:
            process.stdout.close()
