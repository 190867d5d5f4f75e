"""``--resume latest`` and ``--resume auto`` go on from the newest whole state, and say what they find."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from library.errors import UserError
from library.processes import this_process
from library.training.output.checkpoints import OutputFolder, SavingOptions
from library.training.output.newest_state import choose_state, newest_state
from library.training.output.state import Position, RunIdentity, SavedState, save_state
from tests.faults.lora_files import contents
from tests.running import run_in_process

LENGTH = 4
SCRIPT = "flux_train_network.py"


@pytest.fixture(scope="module")
def arguments(flux_command, image_folder, tmp_path_factory) -> list[object]:
    """A run of a few steps that saves a state at every second."""
    config = tmp_path_factory.mktemp("dataset") / "dataset.toml"
    config.write_text(
        "[[datasets]]\nresolution = 64\nbatch_size = 2\n"
        "enable_bucket = true\nmin_bucket_reso = 64\nmax_bucket_reso = 128\n"
        f'[[datasets.subsets]]\nimage_dir = "{image_folder.as_posix()}"\ncaption_extension = ".txt"\n',
        encoding="utf-8",
    )
    command = [*flux_command, "--dataset_config", config, "--output_name", "lora", "--max_train_steps", LENGTH]
    return [*command, "--save_every_n_steps", 2, "--save_state", "--no_report", "--seed", 5]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory) -> Path:
    """The output of a run that began with ``--resume auto``."""
    output = tmp_path_factory.mktemp("finished")
    result = run_in_process(SCRIPT, *arguments, "--output_dir", output, "--resume", "auto")
    assert result.returncode == 0, result.stderr
    assert f"--resume auto: there is no state of lora in {output} yet; a new run begins" in result.stderr
    assert {path.name for path in output.iterdir()} == {
        *("lora.safetensors", "lora-state"),
        *("lora-step00000002.safetensors", "lora-step00000002-state"),
        *("lora-step00000004.safetensors", "lora-step00000004-state"),
    }
    return output


@pytest.fixture
def output(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("resume", "gone"),
    [("latest", ["lora-state", "lora-step00000004-state"]), ("auto", ["lora-state"]), ("latest", [])],
)
def test_the_run_goes_on_from_the_newest_state_and_writes_the_same_file(arguments, finished, output, resume, gone):
    """Also from a state of the last step, which a run leaves that is killed before its last file is written."""
    (output / "lora.safetensors").unlink()
    for name in gone:
        shutil.rmtree(output / name)
    result = run_in_process(SCRIPT, *arguments, "--output_dir", output, "--resume", resume)
    assert result.returncode == 0, result.stderr
    newest = ("lora-state", "lora-step00000004-state", "lora-step00000002-state")[len(gone)]
    assert f"--resume {resume}: continuing from {output / newest} (step " in result.stderr
    assert contents(output / "lora.safetensors") == contents(finished / "lora.safetensors")


@pytest.mark.parametrize("resume", ["latest", "auto"])
def test_a_run_that_is_complete_is_left_as_it_is(arguments, output, resume):
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    result = run_in_process(SCRIPT, *arguments, "--output_dir", output, "--resume", resume)
    assert result.returncode == 0
    assert f"{output / 'lora.safetensors'} is complete: its run has ended at step {LENGTH}" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_a_complete_run_can_be_made_longer(arguments, output):
    longer = ["--max_train_steps", LENGTH + 1, "--output_dir", output, "--resume", "auto"]
    assert run_in_process(SCRIPT, *arguments, *longer).returncode == 0
    assert SavedState(output / "lora-state").position.step == LENGTH + 1


def test_a_state_beyond_the_end_is_named(arguments, output):
    result = run_in_process(
        SCRIPT, *arguments, "--max_train_steps", 2, "--output_dir", output, "--resume", "auto", "--dry_run"
    )
    assert result.returncode == 2
    assert "starts at step 4 and ends at step 2: nothing is left to train" in result.stderr


def test_a_newer_state_of_another_run_is_named_and_not_passed_over(arguments, output):
    other = ["--network_dim", 3, "--output_dir", output, "--resume"]
    result = run_in_process(SCRIPT, *arguments, "--max_train_steps", 9, *other, "auto")
    assert result.returncode == 2
    assert f"{output / 'lora-state'} belongs to another run: its network structure is" in result.stderr


def test_without_a_state_latest_is_refused_before_anything_is_loaded(arguments, tmp_path):
    result = run_in_process(SCRIPT, *arguments, "--output_dir", tmp_path / "out", "--resume", "latest")
    assert result.returncode == 2
    assert f"--resume latest: there is no whole state of lora in {tmp_path / 'out'}" in result.stderr
    assert "base model" not in result.stderr


@pytest.mark.parametrize("resume", ["latest", "auto"])
def test_a_state_on_the_hub_has_a_name(arguments, tmp_path, resume):
    hub = ["--output_dir", tmp_path, "--resume_from_huggingface", "--resume", resume]
    result = run_in_process(SCRIPT, *arguments, *hub)
    assert result.returncode == 2
    assert f"--resume {resume} chooses a state in --output_dir; with --resume_from_huggingface, name one" in (
        result.stderr
    )


# ---- which state is the newest -------------------------------------------------------------------------------------


def make(folder: Path, step: int = 1) -> None:
    import torch

    save_state(folder, {"w": torch.ones(1)}, {}, Position(step=step), RunIdentity(), None)


def folder_of(tmp_path: Path, name: str | None = "lora") -> OutputFolder:
    return OutputFolder(SavingOptions(output_dir=str(tmp_path), output_name=name))


@pytest.mark.parametrize(("name", "stems"), [("lora", ["lora"] * 3), (None, ["at", "epoch", "last"])])
def test_the_newest_is_the_one_that_was_written_last(tmp_path, name, stems):
    """Not that of the highest step: an earlier run may have gone further; nor that of the latest time of a file."""
    step, epoch, last = stems
    for folder, at in [(f"{step}-step00000009-state", 9), (f"{last}-state", 5), (f"{epoch}-000002-state", 3)]:
        make(tmp_path / folder, at)
        newest = newest_state(folder_of(tmp_path, name))
        assert newest is not None and newest.position.step == at
    os.utime(tmp_path / f"{step}-step00000009-state" / "train_state.json", (4e9, 4e9))
    newest = newest_state(folder_of(tmp_path, name))
    assert newest is not None and newest.position.step == 3


def test_states_of_other_names_are_others(tmp_path):
    for name in ("lora2-state", "lora-2-state", "lora-step1-state", "a-lora-state", "lora-000001-state-old"):
        make(tmp_path / name)
    assert choose_state("auto", folder_of(tmp_path)) is None
    with pytest.raises(UserError, match="no whole state of lora in"):
        choose_state("latest", folder_of(tmp_path))


def damage_truncated(folder: Path) -> str:
    path = folder / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return "is incomplete"


def damage_missing(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "is incomplete: model.safetensors is missing"


def damage_half(folder: Path) -> str:
    path = folder / "train_state.json"
    path.write_text(path.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    return "no readable train_state.json"


def damage_other(folder: Path) -> str:
    (folder / "train_state.json").write_text('{"current_epoch": 1}', encoding="utf-8")
    return "was written by another program"


def damage_emptied(folder: Path) -> str:
    path = folder / "train_state.json"
    path.write_text('{"format": "lora-training-state", "version": 1, "position": [1]}', encoding="utf-8")
    return "is damaged"


@pytest.mark.parametrize("damage", [damage_truncated, damage_missing, damage_half, damage_other, damage_emptied])
def test_a_newer_state_that_is_not_whole_is_passed_over_and_named(tmp_path, caplog, damage):
    make(tmp_path / "lora-step00000001-state", 1)
    make(tmp_path / "lora-step00000002-state", 2)
    said = damage(tmp_path / "lora-step00000002-state")
    saved = choose_state("latest", folder_of(tmp_path))
    assert saved is not None and saved.position.step == 1
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "lora-step00000002-state" in warning and said in warning and warning.endswith("It is passed over.")


# ---- states whose writing was cut off ------------------------------------------------------------------------------


def leave_aside(folder: Path, step: int, name: str) -> None:
    """What a process that was killed between the two renamings of a replacement has left of a state."""
    make(folder / name, step)
    mark = replace(this_process(), start="1")
    os.replace(folder / name, folder / f".{mark}-{step:08x}.part")


def test_a_state_that_was_about_to_replace_another_takes_its_name_at_the_next_start(tmp_path):
    leave_aside(tmp_path, 2, "lora-state")
    leave_aside(tmp_path, 1, "lora-state")
    leave_aside(tmp_path, 3, "lora-step00000003-state")
    make(tmp_path / "lora-step00000003-state", 4)
    newest = choose_state("latest", folder_of(tmp_path))
    assert newest is not None and newest.position.step == 4
    assert SavedState(tmp_path / "lora-state").position.step == 1  # the one that was written last
    assert sorted(os.listdir(tmp_path)) == ["lora-state", "lora-step00000003-state"]


def test_a_state_that_is_removed_is_never_half_there(tmp_path, monkeypatch):
    files = OutputFolder(SavingOptions(output_dir=str(tmp_path), save_every_n_steps=1, save_last_n_steps=1))
    make(files.step_state(1))
    seen = []
    real = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path: (seen.append(files.step_state(1).exists()), real(path)))
    files.remove_old(files.old_after_step(3), True)
    assert seen == [False] and not os.listdir(tmp_path)
