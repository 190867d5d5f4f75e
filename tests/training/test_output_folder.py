"""File names and retention are those that front ends expect."""

from __future__ import annotations

import pytest

from library.errors import UserError
from library.training.output.checkpoints import OutputFolder, SavingOptions


def make(tmp_path, **options) -> OutputFolder:
    return OutputFolder(SavingOptions(output_dir=str(tmp_path), **options))


def test_names(tmp_path):
    named = make(tmp_path, output_name="cat")
    assert named.epoch_file(2).name == "cat-000002.safetensors"
    assert named.step_file(30).name == "cat-step00000030.safetensors"
    assert named.final_file().name == "cat.safetensors"
    assert named.epoch_state(2).name == "cat-000002-state"
    assert named.step_state(30).name == "cat-step00000030-state"
    assert named.final_state().name == "cat-state"
    unnamed = make(tmp_path, save_model_as="ckpt")
    names = [unnamed.epoch_file(1), unnamed.step_file(1), unnamed.final_file()]
    assert [path.name for path in names] == ["epoch-000001.ckpt", "at-step00000001.ckpt", "last.ckpt"]


def test_the_last_epoch_is_the_final_file(tmp_path):
    folder = make(tmp_path, save_every_n_epochs=2)
    assert [epoch for epoch in range(1, 7) if folder.epoch_is_due(epoch, 6)] == [2, 4]


def test_epoch_ratio(tmp_path):
    folder = make(tmp_path, save_n_epoch_ratio=3)
    folder.resolve_epoch_ratio(10)
    assert [epoch for epoch in range(1, 11) if folder.epoch_is_due(epoch, 10)] == [3, 6, 9]
    folder.resolve_epoch_ratio(2)
    assert folder.every_n_epochs == 1


def run_epochs(folder: OutputFolder, epochs: int) -> set[str]:
    for epoch in range(1, epochs + 1):
        if folder.epoch_is_due(epoch, epochs + 1):
            folder.epoch_file(epoch).touch()
            folder.epoch_state(epoch).mkdir()
            folder.remove_old(folder.old_after_epoch(epoch), saved=True)
    return {path.name for path in folder.folder.iterdir()}


def test_only_the_last_epochs_stay(tmp_path):
    left = run_epochs(make(tmp_path, save_every_n_epochs=1, save_last_n_epochs=2, save_last_n_epochs_state=1), 5)
    assert left == {"epoch-000004.safetensors", "epoch-000005.safetensors", "epoch-000005-state"}


def test_only_the_last_steps_stay(tmp_path):
    folder = make(tmp_path, save_every_n_steps=10, save_last_n_steps=20)
    for step in range(1, 61):
        if folder.step_is_due(step):
            folder.step_file(step).touch()
            folder.remove_old(folder.old_after_step(step), saved=True)
    assert sorted(path.name[-14:-12] for path in folder.folder.glob("*.safetensors")) == ["40", "50", "60"]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="--output_dir is missing"):
        OutputFolder(SavingOptions())
    with pytest.raises(UserError, match="--save_every_n_steps must be at least 1"):
        make(tmp_path, save_every_n_steps=0)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("sub/x", "without folders"),
        ("../x", "without folders"),
        ("sub\\x", "without folders"),
        ("..", "without folders"),
        ("x" * 240, "has 240 bytes"),
        ("\u3042" * 80, "has 240 bytes"),
        ("a\x00b", "printable"),
        (" ", "printable"),
    ],
)
def test_a_name_that_no_file_can_have_is_named_at_once(tmp_path, name, sentence):
    with pytest.raises(UserError, match=sentence):
        make(tmp_path, output_name=name)
    assert not list(tmp_path.iterdir())


def test_the_longest_name_that_is_taken_can_be_written(tmp_path):
    folder = make(tmp_path, output_name="x" * 204)
    endings = "_e000001_00_20260101000000_18446744073709551615.png", ".report.html"
    for path in (folder.step_file(1), folder.step_state(1), *(tmp_path / ("x" * 204 + end) for end in endings)):
        path.touch()


def test_a_folder_in_the_place_of_the_final_file_is_named_at_once(tmp_path):
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(UserError, match="is to be written, but is a folder"):
        make(tmp_path, output_name="x")
    (tmp_path / "y-state").touch()
    with pytest.raises(UserError, match="is to be a folder, but is a file"):
        make(tmp_path, output_name="y")
