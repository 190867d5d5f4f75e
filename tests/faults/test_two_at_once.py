"""Two processes over the same folders: caches, images and LoRA files are those of one."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest

from library.data import npz
from library.errors import UserError
from library.processes import this_process
from library.training.output import name_lock
from library.training.output.name_lock import NameLock
from tests.faults.killing import broken_files, leftovers
from tests.faults.lora_files import contents
from tests.processes import Started
from tests.running import run_in_process

# ---- trainings that share a dataset --------------------------------------------------------------------------------


def test_two_trainings_that_fill_the_same_caches_end_as_alone(fork_server, flux_command, image_folder, tmp_path):
    """Of two resolutions, so that both add to the same files; and the same one, so that both make the same entries."""

    def start(place: Path, name: str, resolution: int) -> Started:
        config = place / f"{name}.toml"
        config.write_text(
            f"[[datasets]]\nresolution = {resolution}\nbatch_size = 2\nenable_bucket = true\nmin_bucket_reso = 64\n"
            f'max_bucket_reso = 256\n[[datasets.subsets]]\nimage_dir = "{(place / "images").as_posix()}"\n'
            'caption_extension = ".txt"\ncache_info = true\n',
            encoding="utf-8",
        )
        return fork_server.start(
            *("flux_train_network.py", *flux_command, "--network_train_unet_only", "--dataset_config", config),
            *("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--max_train_steps", 1),
            *("--output_dir", place / "out", "--output_name", name, "--no_report", "--seed", 3),
        )

    some = shutil.ignore_patterns("0[6-9].*", "1*")
    expected = {}
    for resolution in (64, 128):
        place = tmp_path / str(resolution)
        place.mkdir()
        shutil.copytree(image_folder, place / "images", ignore=some)
        process = start(place, "lora", resolution)
        assert process.wait() == 0, process.output[-3000:]
        expected[resolution] = contents(place / "out" / "lora.safetensors")[1]
    shared = tmp_path / "shared"
    shared.mkdir()
    shutil.copytree(image_folder, shared / "images", ignore=some)
    resolutions = {"small": 64, "again": 64, "large": 128}
    processes = [start(shared, name, resolution) for name, resolution in resolutions.items()]
    for process in processes:
        assert process.wait() == 0, process.output[-3000:]
    for name, resolution in resolutions.items():
        assert contents(shared / "out" / f"{name}.safetensors")[1] == expected[resolution]
    assert broken_files(shared) == leftovers(shared) == []


def _add(path: Path, process: int, count: int, begin: object) -> None:
    begin.wait()
    for number in range(count):
        array = numpy.full(4, number)
        npz.update(path, {f"{process}_{number}": npz.encode_array(array)}, keep=lambda name: True)


def test_processes_that_add_to_one_cache_file_lose_nothing_of_each_other(tmp_path):
    path, count = tmp_path / "a.npz", 15
    processes = multiprocessing.get_context("fork")
    begin = processes.Event()
    started = [processes.Process(target=_add, args=(path, number, count, begin)) for number in range(3)]
    for process in started:
        process.start()
    begin.set()
    for process in started:
        process.join(60)
        assert process.exitcode == 0
    assert set(npz.read_heads(path)) == {f"{process}_{number}" for process in range(3) for number in range(count)}
    assert os.listdir(tmp_path) == ["a.npz"]


def test_a_cache_that_another_training_made_anew_with_another_encoder_is_named(tmp_path):
    path, wanted = tmp_path / "a.npz", {"latents": (2,)}

    def write(encoder: str | None) -> None:
        arrays = {"latents": npz.encode_array(numpy.zeros(2, numpy.float32))}
        if encoder is not None:
            arrays["identity"] = npz.encode_array(numpy.array(json.dumps({"version": 1, "encoder": encoder})))
        npz.update(path, arrays, keep=lambda name: True)

    def read() -> dict[str, numpy.ndarray]:
        return npz.read_arrays_for_training(path, wanted, "identity", lambda text: '"encoder": "mine"' in text)

    write(None)  # of a program that says nothing of it
    assert list(read()) == ["latents"]
    write("mine")
    assert list(read()) == ["latents"]
    write("another")
    with pytest.raises(UserError, match=r"a\.npz: another training has rebuilt this cache file"):
        read()


# ---- the same name twice -------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(monkeypatch) -> Callable[[Path, float], None]:
    """Write the lock of a run on another machine, whose last sign of life is that old; waiting is short."""
    monkeypatch.setattr(name_lock, "PATIENCE", 0.5)

    def write(path: Path, age: float) -> None:
        mark = replace(this_process(), where="0" * 8)
        path.write_text(json.dumps({"process": str(mark), "host": "another"}), encoding="utf-8")
        os.utime(path, (time.time() - age,) * 2)

    return write


def test_the_second_run_of_a_name_is_refused_while_the_first_one_runs(
    fork_server, flux_command, dataset_toml, tmp_path
):
    command = [*flux_command, "--dataset_config", dataset_toml(), "--output_dir", tmp_path / "out", "--no_report"]
    named = [*command, "--output_name", "lora"]
    first = fork_server.start("flux_train_network.py", *named, "--max_train_steps", 1_000_000)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / ".lora.running").exists():
        assert first.poll() is None and time.monotonic() < deadline, first.output[-3000:]
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # it is there, and takes no time
    second = run_in_process("flux_train_network.py", *named, "--max_train_steps", 1)
    assert second.returncode == 2
    assert f"--output_name: process {first.pid} (since " in second.stderr
    assert 'is training under the name "lora" in' in second.stderr and "Traceback" not in second.stderr
    other = run_in_process("flux_train_network.py", *command, "--output_name", "other", "--max_train_steps", 1)
    assert other.returncode == 0, other.stderr
    assert run_in_process("flux_train_network.py", *named, "--dry_run").returncode == 0
    first.kill()
    again = run_in_process("flux_train_network.py", *named, "--max_train_steps", 1)
    assert again.returncode == 0, again.stderr
    assert leftovers(tmp_path / "out") == []


def test_a_name_is_given_back_by_a_run_that_ends_with_an_error(flux_command, dataset_toml, tmp_path):
    command = [*flux_command, "--dataset_config", dataset_toml(), "--output_dir", tmp_path, "--learning_rate", "1e30"]
    assert run_in_process("flux_train_network.py", *command, "--max_train_steps", 5).returncode == 2
    assert leftovers(tmp_path) == []


def test_a_lock_is_released_once_and_only_by_its_holder(tmp_path):
    first = NameLock(tmp_path, "lora")
    second = NameLock(tmp_path, "lora")  # of a later run in this process
    first.release()
    assert (tmp_path / ".lora.running").exists()
    second.release()
    second.release()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", ["", "nonsense", "[]", '{"process": "1-2", "since": "x"}'])
def test_a_lock_that_cannot_be_read_is_taken_over(tmp_path, monkeypatch, text):
    monkeypatch.setattr(name_lock, "PATIENCE", 0.2)
    (tmp_path / ".lora.running").write_text(text, encoding="utf-8")
    NameLock(tmp_path, "lora").release()
    assert os.listdir(tmp_path) == []


def test_a_dead_process_with_a_number_that_is_used_again_holds_no_lock(tmp_path):
    """In containers the trainer often has the same process id after every start."""
    mark = replace(this_process(), start="1")
    (tmp_path / ".lora.running").write_text(json.dumps({"process": str(mark)}), encoding="utf-8")
    NameLock(tmp_path, "lora").release()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("age", [0.0, 1e6])
def test_a_run_on_another_machine_that_gives_no_sign_of_life_is_taken_for_dead(tmp_path, elsewhere, age):
    elsewhere(tmp_path / ".lora.running", age)
    NameLock(tmp_path, "lora").release()
    assert os.listdir(tmp_path) == []


def test_a_run_on_another_machine_that_lives_is_named(tmp_path, elsewhere):
    path = tmp_path / ".lora.running"
    elsewhere(path, 1.0)
    beat = threading.Timer(0.2, os.utime, [path])
    beat.start()
    with pytest.raises(UserError, match=r'process \d+ on another is training under the name "lora"'):
        NameLock(tmp_path, "lora")
    beat.join()


def test_a_run_touches_its_lock_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr(name_lock, "BEAT", 0.01)
    lock = NameLock(tmp_path, "lora")
    os.utime(lock.path, (1, 1))
    deadline = time.monotonic() + 10
    while lock.path.stat().st_mtime == 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lock.path.stat().st_mtime > 1
    lock.release()


def _take(folders: list[Path], together: Any, got: Any) -> None:
    for folder in folders:
        together.wait()
        try:
            lock = NameLock(folder, "lora")
        except UserError:
            lock = None
        together.wait()
        if lock is not None:
            got.put(folder.name)
            lock.release()


def test_of_many_that_find_the_lock_of_a_dead_process_one_gets_it(tmp_path):
    processes, newcomers = multiprocessing.get_context("fork"), 6
    dead = json.dumps({"process": str(replace(this_process(), start="1"))})
    folders = [tmp_path / str(number) for number in range(30)]
    for folder in folders:
        folder.mkdir()
        (folder / ".lora.running").write_text(dead, encoding="utf-8")
    together, got = processes.Barrier(newcomers, timeout=60), processes.Queue()
    started = [processes.Process(target=_take, args=(folders, together, got)) for _ in range(newcomers)]
    for process in started:
        process.start()
    winners = [got.get(timeout=60) for _ in folders]
    for process in started:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(winners) == sorted(folder.name for folder in folders) and got.empty()
    assert [path for folder in folders for path in folder.iterdir()] == []
