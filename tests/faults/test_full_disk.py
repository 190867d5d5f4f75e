"""A disk that is full, or was: the old files stay, what is missing is said, and what can go on goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from library import files
from library.training.output import attempts
from library.training.output.checkpoints import OutputFolder
from library.training.output.state import SavedState
from tests.running import run_in_process

resource = pytest.importorskip("resource", reason="Windows has no limits on the size of files")

LORA = 165_000
"""Bytes of a file of the tiny LoRA, about; its state takes three times as much."""


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """Makes disks of so many bytes. They hold anything, or the test is passed over where nobody may make them."""
    made: list[Path] = []

    def make(size: int) -> Path:
        folder = tmp_path / f"disk{len(made)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip("only root may mount a small disk")
        made.append(folder)
        return folder

    yield make
    for folder in made:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """For this process, as ``ulimit -f`` sets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """Another disk that has room, for the system's temporary files; nobody waits until a writing is tried again."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(attempts, "PAUSE", 0.0)
    return folder


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden leftovers too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def fill(disk: Path, leave: int) -> Path:
    """Fill a disk but for so many bytes."""
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - leave))
    return filler


def equal(one: Path, other: Path) -> bool:
    mine, theirs = load_file(one), load_file(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# ---- LoRA files and states -----------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_costs_the_later_files_and_the_last_one_is_saved_elsewhere(
    train, small_disk, elsewhere, tmp_path, capsys, monkeypatch
):
    """Somebody else fills it while the run goes on."""
    arguments = ["--max_train_steps", 3, "--save_every_n_steps", 1]
    assert train(*arguments, output="reference") == 0
    disk = small_disk(2_000_000)
    real = OutputFolder.step_is_due
    monkeypatch.setattr(OutputFolder, "step_is_due", lambda self, step: fill_once(step) or real(self, step))

    def fill_once(step: int) -> None:
        if step == 2 and not (disk / "filler").exists() and (disk / "lora-step00000001.safetensors").exists():
            fill(disk, leave=100_000)

    assert train(*arguments, output=disk) == 1
    said = capsys.readouterr().err
    assert names(disk) == ["filler", "lora-step00000001.safetensors"]
    lost = re.escape(str(disk / "lora-step00000002.safetensors"))
    missing = r"No space left on device: \d+ KiB needed, \d\d(\.\d)? KiB free, \d\d(\.\d)? KiB missing"
    assert re.search(rf"{lost} cannot be written \({missing}\)\. The training continues until the next save", said)
    last = said.splitlines()[-1]
    assert re.match(rf"error: {re.escape(str(disk / 'lora.safetensors'))} cannot be written \({missing}\)", last)
    (kept,) = elsewhere.glob("lora-*/lora.safetensors")
    assert last.endswith(f"it was saved as {kept} instead.")
    assert equal(kept, tmp_path / "reference" / "lora.safetensors")
    assert equal(disk / "lora-step00000001.safetensors", tmp_path / "reference" / "lora-step00000001.safetensors")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_file_that_has_no_room_leaves_the_older_one_of_its_name(train, elsewhere, tmp_path, capsys, suffix):
    out = tmp_path / "out"
    assert train("--max_train_steps", 1, "--save_model_as", suffix) == 0
    before = (out / f"lora.{suffix}").read_bytes()
    with no_file_larger_than(100_000):
        assert train("--max_train_steps", 2, "--save_model_as", suffix) == 1
    said = capsys.readouterr().err.splitlines()
    assert (out / f"lora.{suffix}").read_bytes() == before
    assert names(out) == [f"lora.{suffix}"] and names(elsewhere) == []
    assert "File too large: " in said[-1] and "a quota or a limit on the size of files is reached" in said[-1]
    assert "nor anywhere else" in said[-1]
    assert not any("Traceback" in line for line in said)


def test_a_lycoris_file_that_has_no_room_is_reported_as_any_other(train, elsewhere, tmp_path, capsys):
    with no_file_larger_than(10_000):
        arguments = ["--network_module", "lycoris.kohya", "--network_args", "algo=lokr", "--max_train_steps", 1]
        assert train(*arguments) == 1
    assert "File too large: " in capsys.readouterr().err.splitlines()[-1] and names(tmp_path / "out") == []


def test_a_state_that_has_no_room_leaves_the_older_one_although_it_was_due_to_go(
    train, elsewhere, tmp_path, capsys, monkeypatch
):
    """And goes when a newer one is there: here the limit holds while the second state is written."""
    out = tmp_path / "out"
    arguments = ["--save_state", "--save_every_n_steps", 1, "--save_last_n_steps", 1, "--max_train_steps", 5]
    real = OutputFolder.step_state

    def step_state(self: OutputFolder, step: int) -> Path:
        seen[step] = names(out)
        limit = 200_000 if step in (2, 3) else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return real(self, step)

    seen: dict[int, list[str]] = {}
    with no_file_larger_than(resource.RLIM_INFINITY), monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "old_after_step", lambda self, step: [real(self, step - 1)] if step > 1 else [])
        patch.setattr(OutputFolder, "step_state", step_state)
        assert train(*arguments) == 0
    states = {step: [name for name in found if name.endswith("-state")] for step, found in seen.items()}
    assert states[4] == ["lora-step00000001-state"]
    assert [name for name in names(out) if name.endswith("-state")] == ["lora-state", "lora-step00000005-state"]
    assert SavedState(out / "lora-state").position.step == 5
    assert capsys.readouterr().err.count("The training continues until the next save") == 2
    assert not any(".part" in name for name in names(out))


def test_a_disk_on_which_there_is_room_again_gets_the_last_file(train, small_disk, elsewhere, monkeypatch, capsys):
    disk = small_disk(1_000_000)
    real = attempts.warn

    def make_room(message: str) -> None:
        real(message)
        (disk / "filler").unlink(missing_ok=True)

    monkeypatch.setattr(attempts, "warn", make_room)
    monkeypatch.setattr("train_network.NetworkTrainer.check_disk_space", lambda self: fill(disk, leave=50_000))
    assert train("--max_train_steps", 1, output=disk) == 0
    assert names(disk) == ["lora.safetensors"] and names(elsewhere) == []
    assert "it is tried again in 0 s" in capsys.readouterr().err


# ---- what a run writes besides -------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"])
def test_a_cache_that_has_no_room_is_named_and_the_next_start_goes_on(train, small_disk, image_folder, capsys, option):
    disk = small_disk(4_000_000)
    folder = disk / "images"
    shutil.copytree(image_folder, folder, ignore=shutil.ignore_patterns("*.npz"))
    filler = fill(disk, leave=30_000)
    images = names(folder)
    arguments = [option, "--network_train_unet_only", "--max_train_steps", 1]
    assert train(*arguments, folder=folder) == 2
    said = capsys.readouterr().err.splitlines()
    assert re.match(
        rf"error: {folder}/\S+\.npz: cannot write the cache file \(No space left on device: .* missing\)", said[-1]
    )
    made = [name for name in names(folder) if name not in images]
    assert all(name.endswith(".npz") for name in made)
    for name in made:
        assert all(array.shape is not None for array in dict(numpy.load(folder / name)).values())
    filler.unlink()
    assert train(*arguments, folder=folder) == 0
    assert f"{len(made)} kept, {12 - len(made)} made" in capsys.readouterr().err


def test_caches_that_will_not_fit_are_named_before_they_are_made(train, small_disk, image_folder, capsys):
    disk = small_disk(1_000_000)
    shutil.copytree(image_folder, disk / "images", ignore=shutil.ignore_patterns("*.npz"))
    fill(disk, leave=40_000)
    arguments = ["--cache_latents_to_disk", "--network_train_unet_only", "--max_train_steps", 1]
    train(*arguments, folder=disk / "images")
    said = capsys.readouterr().err
    assert re.search(
        r"latent cache: about \d+ KiB will be written beside the images, but \d+(\.\d)? KiB are free", said
    )


def test_samples_curves_and_messages_cost_no_training(train, small_disk, prompts, tmp_path, capsys):
    disk = small_disk(400_000)
    out = tmp_path / "out"
    out.mkdir()
    (disk / "sample").mkdir()
    (out / "sample").symlink_to(disk / "sample")
    (disk / "log").mkdir()
    fill(disk, leave=0)
    arguments = ["--sample_prompts", prompts, "--sample_every_n_steps", 1, "--logging_dir", disk / "log"]
    log = disk / "messages.txt"
    assert train(*arguments, "--max_train_steps", 2, "--console_log_file", log) == 0
    said = capsys.readouterr().err
    assert "--console_log_file: " in said and "messages go to the console" in said
    assert said.count("sample image 1 failed: OSError: ") == 2
    assert "--logging_dir: " in said and "Exception ignored" not in said
    assert "lora.safetensors" in names(out) and not [name for name in names(disk) if ".part" in name]


# ---- before the run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dry", [False, True])
def test_files_that_cannot_fit_are_refused_before_anything_is_encoded(train, small_disk, capsys, dry):
    disk = small_disk(1_000_000)
    arguments = ["--max_train_steps", 20, "--save_every_n_steps", 1, "--save_state", "--cache_latents"]
    assert train(*arguments, *(["--dry_run"] if dry else []), output=disk) == 2
    said = capsys.readouterr().err
    assert re.match(
        rf"error: --output_dir: {disk} has no room for the files of this run: 21 network files of \d+ KiB and "
        r"21 states of \d+ KiB take up to [\d.]+ MiB at a time, \d+ KiB are free, [\d.]+ MiB are missing",
        said.splitlines()[-1],
    )
    assert names(disk) == [] and "| 0/20" not in said
    assert dry or "latent cache" not in said, "before anything is encoded"
    assert ("NOT ENOUGH" in said) == dry and "All checks passed" not in said


def test_files_that_replace_others_or_go_again_need_no_room_of_their_own(train, small_disk):
    disk = small_disk(1_500_000)
    arguments = ["--max_train_steps", 12, "--save_every_n_steps", 1, "--save_last_n_steps", 1]
    assert train(*arguments, output=disk) == 0
    fill(disk, leave=250_000)
    assert train("--max_train_steps", 1, output=disk) == 0


# ---- tools and the other scripts -----------------------------------------------------------------------------------


def test_a_tool_says_what_is_missing_and_leaves_the_older_file(tmp_path):
    weights = {"lora_unet_double_blocks_0_img_mlp_0.lora_down.weight": torch.ones(4, 4096)}
    weights |= {"lora_unet_double_blocks_0_img_mlp_0.lora_up.weight": torch.ones(4096, 4)}
    save_file(weights, tmp_path / "one.safetensors")
    (tmp_path / "two.safetensors").write_text("older")
    command = ["networks/resize_lora.py", "--model", tmp_path / "one.safetensors", "--new_rank", 2]
    with no_file_larger_than(20_000):
        done = run_in_process(*command, "--save_to", tmp_path / "two.safetensors", "--save_precision", "float")
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"error: {tmp_path / 'two.safetensors'} cannot be written (File too large: ")
    assert (tmp_path / "two.safetensors").read_text() == "older" and names(tmp_path) == [
        "one.safetensors",
        "two.safetensors",
    ]


def test_what_a_quota_does_not_allow_is_told_from_what_the_disk_lacks(tmp_path, monkeypatch):
    def write(size: int, number: int) -> OSError:
        with pytest.raises(OSError) as raised, files.writing(tmp_path / "file", size):
            raise OSError(number, "")
        return raised.value

    monkeypatch.setattr(files, "free_bytes", lambda folder: 1000)
    assert "3.9 KiB needed, 1000 B free, 2.9 KiB missing" in str(write(4000, errno.ENOSPC))
    assert "500 B needed, and 1000 B free: a quota" in str(write(500, errno.EDQUOT))
    assert "needed" not in str(write(500, errno.EIO)) and names(tmp_path) == []


def test_a_disk_that_stalls_shows_the_older_file_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path, stalled, goes_on, flush = tmp_path / "file", threading.Event(), threading.Event(), os.fsync
    path.write_text("older")

    def wait(handle: int) -> None:
        stalled.set()
        assert goes_on.wait(60)
        flush(handle)

    monkeypatch.setattr(os, "fsync", wait)
    writer = threading.Thread(target=files.write_text, args=(path, "newer"))
    writer.start()
    assert stalled.wait(60) and path.read_text() == "older"
    goes_on.set()
    writer.join(60)
    assert path.read_text() == "newer" and names(tmp_path) == ["file"]
