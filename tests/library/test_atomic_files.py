"""A file stands under its name only when it is complete."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from library.errors import UserError
from library.files import (
    SILENCE,
    remove_stale_temporaries,
    require_writable_folder,
    write_new,
    write_text,
    writing,
)
from library.processes import ProcessMark, _start, this_process
from tests.running import ROOT


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(ValueError), writing(path) as file:
        file.write(b"half")
        raise ValueError
    assert path.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_every_name_that_a_file_may_have_can_be_written(tmp_path):
    name = "n" * 251 + ".txt"
    write_text(tmp_path / name, "x")
    assert os.listdir(tmp_path) == [name]


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX systems")
def test_permissions_follow_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def mark_of_a_dead_process() -> ProcessMark:
    """Of one that ran here a moment ago."""
    code = "from library.processes import this_process; print(this_process())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    mark = ProcessMark.parse(printed)
    assert mark is not None and mark.pid != os.getpid()
    return mark


def leave(folder: Path, mark: ProcessMark, age: float = 0) -> None:
    """What a process with this mark leaves of a file, of one with a suffix, and of a state."""
    half = [folder / f".{mark}-0123abcd.part", folder / f".{mark}-01234567.part.safetensors"]
    (folder / f".{mark}-89abcdef.part").mkdir()
    half.append(folder / f".{mark}-89abcdef.part" / "model.safetensors")
    for path in half:
        path.touch()
    for path in [*half, half[-1].parent]:
        os.utime(path, (time.time() - age,) * 2)


def test_leftovers_of_dead_processes_are_removed_and_others_stay(tmp_path):
    dead, mine = mark_of_a_dead_process(), this_process()
    leave(tmp_path, dead)
    leave(tmp_path, replace(mine, start="1"))  # of one that had this process's number before
    (tmp_path / "note.part").touch()
    (tmp_path / f".{dead}.part").touch()
    leave(tmp_path, mine)
    remove_stale_temporaries(tmp_path)
    there = set(os.listdir(tmp_path))
    assert {name for name in there if str(mine) not in name} == {"note.part", f".{dead}.part"}
    assert len(there) == 5


def test_leftovers_of_another_machine_are_removed_when_they_have_been_silent_for_long(tmp_path):
    """Its processes cannot be seen: one with the number of a dead process here may be writing."""
    elsewhere = replace(mark_of_a_dead_process(), where="0" * 8)
    for name, age in (("fresh", 0.0), ("old", 2 * SILENCE)):
        (tmp_path / name).mkdir()
        leave(tmp_path / name, elsewhere, age)
        remove_stale_temporaries(tmp_path / name)
    assert len(os.listdir(tmp_path / "fresh")) == 3 and not os.listdir(tmp_path / "old")
    leave(tmp_path / "old", elsewhere, 2 * SILENCE)
    (tmp_path / "old" / f".{elsewhere}-89abcdef.part" / "optimizer.safetensors").touch()  # a folder that still grows
    remove_stale_temporaries(tmp_path / "old")
    assert os.listdir(tmp_path / "old") == [f".{elsewhere}-89abcdef.part"]


@pytest.mark.skipif(os.name == "nt", reason="zombies of POSIX systems")
def test_a_process_that_nobody_has_waited_for_runs_no_more():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = _start(process.pid)
    mark = replace(this_process(), pid=process.pid, start=start)
    assert start is not None and mark.runs
    process.kill()
    deadline = time.monotonic() + 10
    while mark.runs and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not mark.runs
    process.wait()
    assert not mark.runs


def test_a_mark_is_read_as_it_is_written():
    assert ProcessMark.parse(str(this_process())) == this_process()
    assert this_process().is_here and this_process().runs
    assert ProcessMark.parse("1234-01") is None


@pytest.mark.parametrize("write", [lambda path: write_text(path, "x"), lambda path: write_new(iter([path]), b"x")])
def test_whoever_writes_in_a_folder_tidies_it_first(tmp_path, write):
    leave(tmp_path, mark_of_a_dead_process())
    write(tmp_path / "a.txt")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_start_clears_the_folders_it_writes_in(tmp_path):
    from library.training.output.checkpoints import OutputFolder, SavingOptions

    dead = mark_of_a_dead_process()
    (tmp_path / "sample").mkdir()
    kept = [tmp_path / "a.safetensors", tmp_path / "sample" / "b.png"]
    for path in kept:
        path.touch()
        leave(path.parent, dead)
    OutputFolder(SavingOptions(output_dir=str(tmp_path)), read_only=True)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 8
    OutputFolder(SavingOptions(output_dir=str(tmp_path)))
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == kept
    assert not [path for path in tmp_path.rglob("*.part") if path.is_dir()]


def test_an_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output_dir: cannot write in .*choose a folder"):
        require_writable_folder(tmp_path / "file" / "below", "--output_dir")
