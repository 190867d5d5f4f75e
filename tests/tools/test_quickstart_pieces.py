"""The parts of the quick start that don't need a training run."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli
from PIL import Image

from tools.quickstart import (
    FAMILIES,
    PROMPTS,
    ROOT,
    SEEDS,
    Folders,
    averaged_curve,
    before_after_image,
    loss_image,
    may_overwrite,
    next_lines,
    parse_arguments,
    prepare,
    quickstart,
    read_scalars,
    readable,
    sample_images,
    sample_options,
    sparkline,
    training_command,
)


def test_preparing_twice_leaves_only_the_second_runs_files(tmp_path: Path) -> None:
    folders = Folders(tmp_path / "output")
    prepare(folders)
    (folders.dataset / "stale.png").write_bytes(b"old")
    folders.samples.mkdir(parents=True)
    prepare(folders)
    assert not folders.samples.exists() and not (folders.dataset / "stale.png").exists()
    for name, count in (("concept", 15), ("ordinary", 48)):
        assert len(list((folders.dataset / name).glob("*.png"))) == count
        assert len(list((folders.dataset / name).glob("*.txt"))) == count
    config = tomli.loads(folders.dataset_config.read_text(encoding="utf-8"))
    concept, ordinary = config["datasets"][0]["subsets"]
    assert Path(concept["image_dir"]) == folders.dataset / "concept" and ordinary["is_reg"]
    assert len(folders.prompts.read_text(encoding="utf-8").splitlines()) == len(PROMPTS) * len(SEEDS)


def test_each_family_guides_its_samples_in_its_own_way() -> None:
    from library.prompt_options import parse_prompt_line

    guidances = {
        "flux": [None, 1.0, 1.0],
        "chroma": ["small", 2.0, 0.0],
        "lumina": [None, 3.5, None],
        "hunyuan_image": [None, 1.0, None],
        "sd15": [None, 3.0, None],
    }
    for name, guidance in guidances.items():
        prompt = parse_prompt_line(f"a zog {sample_options(FAMILIES[name])} --d 1")
        assert [prompt.negative_prompt, prompt.scale, prompt.guidance_scale] == guidance
        assert (prompt.prompt, prompt.width, prompt.height, prompt.seed) == ("a zog", 128, 128, 1)


def test_the_family_may_be_given_as_the_trainers_model_type(monkeypatch: pytest.MonkeyPatch) -> None:
    for option in ("--family", "--model_type"):
        monkeypatch.setattr("sys.argv", ["quickstart.py", option, "chroma"])
        assert parse_arguments().family == "chroma"


def test_a_folder_with_someone_elses_files_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "holiday.png").write_bytes(b"precious")
    folders = Folders(tmp_path)
    assert not may_overwrite(folders)
    assert quickstart(folders, steps=3, seed=1, threads=1) == 2
    assert "--output" in capsys.readouterr().err
    assert (tmp_path / "dataset" / "holiday.png").read_bytes() == b"precious"
    assert may_overwrite(Folders(tmp_path / "new"))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_option_of_the_command_is_known_to_the_trainer(tmp_path: Path, name: str) -> None:
    from library.families import FAMILIES as FAMILY_ROWS
    from library.options import parse_options

    command = training_command(Folders(tmp_path, name), steps=300, seed=1, threads=2)
    script = next(index for index, part in enumerate(command) if part.endswith("train_network.py"))
    row = next(row for row in FAMILY_ROWS if row.script == Path(command[script]).stem)
    options = parse_options(row.options_class(), "", command[script + 1 :])
    assert options.network.network_dim == 16
    for path in FAMILIES[name].files.values():
        assert path.is_file()
    shown = shlex.split(readable(command).replace("\\\n", " "))
    assert shown[-len(command[script + 1 :]) :] == [part.replace(f"{ROOT}/", "") for part in command[script + 1 :]]


@pytest.mark.parametrize("name", FAMILIES)
def test_it_ends_with_the_command_that_trains_the_real_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the tiny model is in it, and the file that it names has the options of a real training."""
    from library.families import FAMILIES as FAMILY_ROWS
    from library.options import parse_options

    monkeypatch.chdir(ROOT)
    text = "\n".join(next_lines(FAMILIES[name]))
    (words,) = (line.split() for line in text.splitlines() if "accelerate launch" in line)
    assert words[2] == FAMILIES[name].script and words[3] == "--config_file"
    row = next(row for row in FAMILY_ROWS if row.file == words[2])
    options = parse_options(row.options_class(), "", words[3:])
    assert options.optimizer.learning_rate == 1e-4 and options.precision.mixed_precision == "bf16"
    assert options.network.network_module == FAMILIES[name].network_module
    files = re.findall(r"[\w.-]+\.safetensors", text)
    model = options.model.pretrained_model_name_or_path
    assert model == f"models/{files[0]}" and len(files) == len(FAMILIES[name].files)


@pytest.mark.parametrize(
    ("gib", "size"), [(None, 12), (5.8, 8), (7.6, 8), (10.9, 10), (11.76, 12), (23.6, 24), (79.3, 24)]
)
def test_the_file_is_that_for_the_gpu(gib: float | None, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gib is not None)
    properties = SimpleNamespace(total_memory=int((gib or 0) * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert f"configs/flux_{size}gb.toml" in "\n".join(next_lines(FAMILIES["flux"]))


def test_it_ends_with_a_word_about_a_torch_that_cannot_use_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.quickstart.missing_cuda", lambda: "torch has no CUDA support")
    assert next_lines(FAMILIES["flux"])[-1] == "torch has no CUDA support"


def test_on_windows_the_command_is_one_line_that_both_shells_take(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["python", "-m", "accelerate.commands.launch", f"{ROOT}{os.sep}x.py", "--system_prompt=You are."]
    monkeypatch.setattr(sys, "platform", "win32")
    assert readable(command) == 'python -m accelerate.commands.launch x.py "--system_prompt=You are."'


def test_samples_are_found_by_moment_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    count = len(PROMPTS) * len(SEEDS)
    for moment in ("e000000", "000300"):
        for index in reversed(range(count)):
            Image.new("RGB", (8, 8)).save(tmp_path / f"zog_{moment}_{index:02d}_20260101120000_{SEEDS[0]}.png")
    found = sample_images(tmp_path, "000300")
    assert [path.name[:13] for path in found] == [f"zog_000300_{index:02d}" for index in range(count)]
    found[3].unlink()
    with pytest.raises(FileNotFoundError, match="3"):
        sample_images(tmp_path, "000300")


def test_scalars_come_back_from_tensorboard_files(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "run" / "network_train")) as writer:
        for step in range(1, 6):
            writer.add_scalar("loss/current", 1 / step, step)
    curve = read_scalars(tmp_path)["loss/current"]
    assert [step for step, _ in curve] == [1, 2, 3, 4, 5]
    assert curve[3][1] == pytest.approx(0.25)


def test_the_curve_is_averaged_and_drawn(tmp_path: Path) -> None:
    curve = averaged_curve([(step, float(step)) for step in range(1, 41)], window=20)
    assert curve == [(20, 10.5), (40, 30.5)]
    assert len(sparkline([3.0, 1.0, 2.0])) == 3 and len(set(sparkline([1.0, 1.0]))) == 1
    loss_image({"training loss": curve, "validation loss": []}, tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").convert("RGB").getcolors(1 << 20) != [(640 * 320, (255, 255, 255))]


def test_before_and_after_stand_side_by_side(tmp_path: Path) -> None:
    count = len(PROMPTS) * len(SEEDS)
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (128, 128), colour).save(tmp_path / f"{name}.png")
    path = tmp_path / "sheet.png"
    before_after_image([tmp_path / "red.png"] * count, [tmp_path / "blue.png"] * count, path)
    shares = {colour: number for number, colour in Image.open(path).getcolors(1 << 20)}
    assert shares[255, 0, 0] == shares[0, 0, 255] == count * 128 * 128
