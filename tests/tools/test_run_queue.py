"""A queue of trainings: each runs once, a failed one stops nobody, and an interrupted queue goes on where it was."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from library.errors import UserError
from library.families import by_key
from library.html_pages import read_page_data
from tests.processes import ForkServer, Started
from tests.running import ROOT, run_in_process, toml_value
from tools.run_queue import DONE, FAILED, INTERRUPTED, PAGE, STATE_FILE, Queue, read_jobs


@pytest.fixture
def job(tmp_path, flux_command, dataset_toml):
    """Write a job's file: the tiny FLUX, with keys of its own."""
    data = dataset_toml()

    def write(name: str, **keys: object) -> Path:
        words = [str(word) for word in flux_command]
        options: dict[str, object] = {}
        for word in words:
            if word.startswith("--"):
                options[word[2:]] = []
            else:
                options[list(options)[-1]].append(word)  # type: ignore[attr-defined]
        values = {key: (given[0] if len(given) == 1 else given or True) for key, given in options.items()}  # type: ignore[index, call-overload, misc]
        values |= {"script": "flux_train_network.py", "dataset_config": str(data), "max_train_steps": 2}
        values |= {"output_dir": str(tmp_path / "out"), "output_name": name, "save_every_n_steps": 1, **keys}
        path = tmp_path / f"{name}.toml"
        path.write_text("".join(f"{key} = {toml_value(value)}\n" for key, value in values.items()), encoding="utf-8")
        return path

    return write


class Forked(Queue):
    """A queue that leaves out ``accelerate launch``, which sets nothing for one process."""

    server: ForkServer
    ends_in: str | None = None
    """The job during which Ctrl-C is pressed, once it has saved."""
    record_after_ctrl_c: dict
    """What the record says while the run in hand still ends its step."""

    def start(self, words, log):  # type: ignore[override]
        script = words.index(next(word for word in words if word.endswith("_network.py")))
        started = self.server.start(words[script], *words[script + 1 :], output=Path(log.name))
        return Pressed(started, self) if self.ends_in and self.ends_in in words[script + 2] else started


class Pressed:
    """A started script whose waiting user presses Ctrl-C after its first save."""

    def __init__(self, started: Started, queue: Forked):
        self.started, self.queue, self.pid = started, queue, started.pid

    def wait(self) -> int:
        if self.queue.ends_in is None:
            self.queue.record_after_ctrl_c = json.loads((self.queue.folder / STATE_FILE).read_text())
            return self.started.wait()
        while "saved" not in self.started.output:
            assert self.started.poll() is None, self.started.output[-2000:]
            time.sleep(0.02)
        self.queue.ends_in = None
        raise KeyboardInterrupt


def queue_of(files, folder: Path, server: ForkServer, ends_in: str | None = None) -> Forked:
    queue = Forked(read_jobs([str(file) for file in files], None), folder)
    queue.server, queue.ends_in = server, ends_in
    queue.take_up()
    return queue


def test_a_failing_job_stops_nobody_and_the_page_shows_all(job, tmp_path, fork_server, capsys):
    missing = tmp_path / "missing.safetensors"
    files = [job("one"), job("two", network_weights=str(missing)), job("three")]
    queue = queue_of(files, tmp_path / "queue", fork_server)
    assert queue.run() == 1
    assert [entry.state for entry in queue.jobs] == [DONE, FAILED, DONE]
    assert [(tmp_path / "out" / f"{file.stem}.safetensors").exists() for file in files] == [True, False, True]
    assert re.search(r"2/3 two: failed with exit code 2: error: .*missing\.safetensors", capsys.readouterr().out)
    rows = read_page_data(tmp_path / "queue" / PAGE)["jobs"]
    assert [row["kind"] for row in rows] == [DONE, FAILED, DONE] and "missing" in rows[1]["error"]
    assert all((tmp_path / "queue" / row["links"]["log"]).is_file() for row in rows)
    assert (tmp_path / "queue" / rows[0]["links"]["lora"]).resolve() == tmp_path / "out" / "one.safetensors"

    before = (tmp_path / "out" / "one.safetensors").stat().st_mtime_ns
    again = queue_of(files, tmp_path / "queue", fork_server)
    assert again.run() == 1 and again.jobs[1].code == 2
    assert (tmp_path / "out" / "one.safetensors").stat().st_mtime_ns == before
    assert "1/3 one: is done" in (said := capsys.readouterr().out) and "--retry_failed" in said


def test_an_interrupted_queue_goes_on_and_ends_in_the_same_bytes(job, tmp_path, fork_server):
    keys = {"max_train_steps": 6, "save_state": True, "seed": 5}
    straight = job("straight", **keys)
    assert queue_of([straight], tmp_path / "straight", fork_server).run() == 0
    files = [job("first", **keys), job("second")]
    queue = queue_of(files, tmp_path / "queue", fork_server, ends_in="first")
    with pytest.raises(KeyboardInterrupt):
        queue.run()
    assert queue.jobs[0].state == queue.record_after_ctrl_c["jobs"][0]["state"] == INTERRUPTED
    assert json.loads((tmp_path / "queue" / STATE_FILE).read_text())["jobs"][0]["state"] == INTERRUPTED
    on = queue_of(files, tmp_path / "queue", fork_server)
    assert on.run() == 0
    log = (tmp_path / "queue" / "first.log").read_text()
    assert "--resume auto" in log and re.search(r"resum", log.partition("--resume auto")[2])
    from library.checkpoints import load_tensors

    one, other = (load_tensors(tmp_path / "out" / f"{name}.safetensors")[0] for name in ("straight", "first"))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.thorough
def test_a_queue_of_launched_runs_waits_for_the_step_in_hand(job, tmp_path):
    """Ctrl-C in its terminal: the launcher, which would end with a traceback, is not asked; SIGTERM is the same."""
    file = job("first", max_train_steps=2000, save_state=True)
    words = [sys.executable, ROOT / "tools" / "run_queue.py", file, "--queue_dir", tmp_path / "queue"]
    log, state = tmp_path / "queue" / "first.log", tmp_path / "out"
    for number in (signal.SIGINT, signal.SIGTERM):
        with subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, text=True) as queue:
            begun = log.stat().st_size if log.exists() else 0
            while not log.exists() or "saved" not in log.read_text()[begun:]:
                assert queue.poll() is None
                time.sleep(0.1)
            queue.send_signal(number)
            said, _ = queue.communicate(timeout=120)
        text = log.read_text()[begun:]
        assert "1/1 first: interrupted after" in said and queue.returncode not in (0, None)
        assert "ended at step" in text and "Traceback" not in text
        assert list(state.glob("first-step*-state"))


def test_every_mistake_is_said_before_anything_runs(job, tmp_path):
    good, wrong = job("good"), job("wrong", learning_rat=1)
    twin = job("twin", output_name="good")
    averaged, beside = job("averaged", ema_decay=0.9), job("averaged-ema")
    nameless = tmp_path / "nameless.toml"
    nameless.write_text('network_module = "networks.lora"\n', encoding="utf-8")
    result = run_in_process("tools/run_queue.py", tmp_path / "*.toml", "--queue_dir", tmp_path / "queue")
    assert result.returncode == 2
    assert "learning_rat" in result.stderr and "Did you mean" in result.stderr and str(wrong) in result.stderr
    assert f"{good} and {twin} write the same file" in result.stderr
    assert f"{beside} and {averaged} write the same file" in result.stderr
    assert f'{nameless}: the key "script" is missing' in result.stderr
    assert not (tmp_path / "queue").exists()
    with pytest.raises(UserError, match=r"no file is named like"):
        read_jobs([str(tmp_path / "nothing*.toml")], None)


def test_a_file_for_another_script_is_refused(job, tmp_path):
    result = run_in_process(by_key("sd").file, "--config_file", job("flux"))
    assert result.returncode == 2 and 'script = "flux_train_network.py"' in result.stderr
