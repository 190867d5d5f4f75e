"""A file stands under its name only when it is complete."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest

from library.errors import UserError
from library.files import remove_stale_temporaries, require_writable_folder, temporary_path, write_text, writing


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


def test_temporaries_of_dead_processes_are_removed_and_others_stay(tmp_path):
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    ).stdout.strip()
    mine = temporary_path(tmp_path / "a.safetensors")
    mine.touch()
    gone = [
        mine.with_name(f".{dead}-0123abcd.part"),
        mine.with_name(f".b.safetensors.{dead}-0123abcd.part"),
        mine.with_name(f".c.{dead}-0123abcd.part.safetensors"),
    ]
    for path in gone:
        path.touch()
    folder = mine.with_name(f".state.{dead}-0123abcd.part")
    folder.mkdir()
    (folder / "x").touch()
    (tmp_path / "note.part").touch()
    remove_stale_temporaries(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([mine.name, "note.part"])


def test_a_start_clears_the_folders_it_writes_in(tmp_path):
    from library.training.output.checkpoints import OutputFolder, SavingOptions

    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    ).stdout.strip()
    (tmp_path / "sample").mkdir()
    kept = [tmp_path / "a.safetensors", tmp_path / "sample" / "b.png"]
    for path in [*kept, *(path.with_name(f".{dead}-0123abcd.part") for path in kept)]:
        path.touch()
    OutputFolder(SavingOptions(output_dir=str(tmp_path)), read_only=True)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4
    OutputFolder(SavingOptions(output_dir=str(tmp_path)))
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == kept


def test_an_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output_dir: cannot write in .*choose a folder"):
        require_writable_folder(tmp_path / "file" / "below", "--output_dir")
