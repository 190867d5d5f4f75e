"""The report of a run: what it takes in, when it resumes from an older page, and that it never ends a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from library.errors import UserError
from library.html_pages import read_page_data
from library.options import SECRETS, parse_options
from library.prompt_options import PromptOptions
from library.training.output.sample_images import SampleOptions, Samples
from library.training.report import page as report_page
from library.training.report import samples as report_samples
from library.training.report.page import (
    ReportHead,
    RunReport,
    describe_settings,
)
from library.training.report.report_options import ReportOptions, report_is_wanted
from library.training.training_options import TrainingOptions

DESCRIPTION = ReportHead("zog", "FLUX.1 network", "ab12", 1.0, 100, 10, 10, 0, [], [], [("Seed", "7")])


def rates() -> dict[str, float]:
    return {"lr/unet": 1e-4, "lr/textencoder": 1e-4, "lr/group2": 5e-5}


def train(report: RunReport, first: int, last: int) -> None:
    for step in range(first, last + 1):
        report.add_loss(step, 1.0 / step, True, rates)


@pytest.fixture
def samples(tmp_path) -> Samples:
    """Two prompts whose images lie in tmp_path/sample after ``draw``."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 48 --d 3\n<b>bold</b> --n ugly\n", encoding="utf-8")
    return Samples(SampleOptions(sample_prompts=str(prompts), sample_every_n_steps=1), str(tmp_path), None)


def draw(samples: Samples, report: RunReport, step: int, epoch: int | None = None) -> None:
    def generate(prompts: Sequence[PromptOptions]) -> list[Image.Image]:
        indices = [samples.prompts.index(prompt) for prompt in prompts]
        return [Image.new("RGB", (64, 48), (index * 100, step % 256, 0)) for index in indices]

    samples.draw(generate, step, epoch)
    report.add_samples(step, epoch, samples)


@pytest.mark.parametrize(
    ("report", "no_report", "samples", "validation", "wanted"),
    [
        (False, False, False, False, False),
        (True, False, False, False, True),
        (False, False, True, False, True),
        (False, False, False, True, True),
        (False, True, True, True, False),
        (True, True, True, True, False),
    ],
)
def test_when_a_report_is_written(report, no_report, samples, validation, wanted):
    assert report_is_wanted(ReportOptions(report, no_report), samples, validation) is wanted


def test_both_switches_work_on_the_command_line_and_in_a_file(tmp_path):
    config = tmp_path / "config.toml"
    config.write_text("no_report = true\n", encoding="utf-8")
    given = ["--report", "--config_file", str(config)]
    options = parse_options(TrainingOptions, "test", given).report
    assert options == ReportOptions(report=True, no_report=True)
    assert parse_options(TrainingOptions, "test", ["--no_report"]).report == ReportOptions(no_report=True)


def test_the_page_holds_what_the_run_said(tmp_path, samples):
    path = tmp_path / "zog.report.html"
    lora = tmp_path / "zog.safetensors"
    lora.write_bytes(b"x" * 1234)
    with RunReport(path, DESCRIPTION) as report:
        assert read_page_data(path)["status"] == {"state": "running", "reason": "", "step": 0}
        train(report, 1, 20)
        report.add_epoch_average(10, 0.5)
        report.add_validation("step", 15, 0.25)
        draw(samples, report, 20)
        report.add_file(lora, 20)
        report.end("finished")
    page = read_page_data(path)
    assert page["curves"]["loss"]["y"] == pytest.approx([1 / step for step in range(1, 21)], rel=1e-5)
    assert (page["curves"]["loss epoch"]["x"], page["curves"]["validation step"]["y"]) == ([10], [0.25])
    assert [rate["names"] for rate in page["rates"]] == [["unet", "textencoder"], ["group2"]]
    assert page["rates"][0]["curve"]["y"] == [1e-4] * len(page["rates"][0]["curve"]["x"])
    assert [prompt["text"] for prompt in page["samples"]["prompts"]] == ["a cat", "<b>bold</b>"]
    image = page["samples"]["rounds"][0]["images"]["0"]
    assert image["size"] == [64, 48] and (tmp_path / image["link"]).is_file()
    assert page["samples"]["prompts"][0]["details"] == "64 x 48, seed 3"
    assert [(f["name"], f["kind"], f["size"], f["step"]) for f in page["files"]] == [
        ("zog.safetensors", "network", 1234, 20)
    ]
    assert page["status"]["state"] == page["runs"][-1]["state"] == "finished" and page["status"]["step"] == 20
    assert page["facts"] == [["Seed", "7"]]


def test_the_loss_of_a_step_is_the_mean_of_its_batches(tmp_path):
    report = RunReport(tmp_path / "r.html", DESCRIPTION)
    # As the trainer counts: the step of a batch is that of the last finished one.
    for step, loss, ends in ((0, 1.0, False), (0, 2.0, False), (1, 6.0, True), (2, 5.0, True)):
        report.add_loss(step, loss, ends, rates)
    curve = report.document()["curves"]["loss"]
    assert (curve["x"], curve["y"]) == ([1, 2], [3.0, 5.0])


def test_the_page_follows_long_epochs_but_costs_next_to_nothing(tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    report = RunReport(path, DESCRIPTION)
    report.write()
    train(report, 1, 5)
    assert read_page_data(path)["status"]["step"] == 0
    monkeypatch.setattr(report_page, "LONGEST_SILENCE", 0.0)
    monkeypatch.setattr(report_page, "LARGEST_SHARE", 1e9)
    train(report, 6, 8)
    assert read_page_data(path)["status"]["step"] == 8
    monkeypatch.setattr(report_page, "LARGEST_SHARE", 1e-9)
    train(report, 9, 10)
    assert read_page_data(path)["status"]["step"] == 8


def test_a_loss_that_is_no_number_leaves_a_page(tmp_path):
    path = tmp_path / "r.html"
    report = RunReport(path, DESCRIPTION)
    for step, loss in enumerate((1.0, math.nan, math.inf, 2.0), 1):
        report.add_loss(step, loss, True, lambda: {"lr/unet": math.nan})
    report.write()
    curve = read_page_data(path)["curves"]["loss"]
    assert curve["y"] == [1.0, None, None, 2.0] and (curve["not_finite"], curve["first_not_finite"]) == (2, 2)


def resumed(path: Path, step: int, session: str = "ab12") -> RunReport:
    return RunReport(path, replace(DESCRIPTION, first_step=step, session=session), resumed=True)


@pytest.fixture
def broken_off(tmp_path, samples) -> Path:
    """The page of a run that was killed after step 50: samples and files at 20 and 40, validation at 30 and 45."""
    path = tmp_path / "zog.report.html"
    report = RunReport(path, DESCRIPTION)
    for step in (20, 40):
        train(report, step - 19, step)
        draw(samples, report, step)
        (tmp_path / f"zog-{step}.safetensors").write_bytes(b"x")
        report.add_file(tmp_path / f"zog-{step}.safetensors", step)
        report.add_epoch_average(step, 0.5)
    train(report, 41, 50)
    for step in (30, 45):
        report.add_validation("epoch", step, 0.3)
    report.write()
    return path


def test_a_resumed_run_goes_on_and_drops_what_it_repeats(broken_off, samples):
    report = resumed(broken_off, 30)
    train(report, 31, 35)
    report.write()
    page = read_page_data(broken_off)
    assert page["curves"]["loss"]["x"] == list(range(1, 36))
    assert page["curves"]["loss epoch"]["x"] == [20] and page["curves"]["validation epoch"]["x"] == [30]
    assert [entry["step"] for entry in page["samples"]["rounds"]] == [20]
    assert [entry["name"] for entry in page["files"]] == ["zog-20.safetensors"]
    assert all(rate["curve"]["x"][-1] == 35 for rate in page["rates"]) and len(page["rates"]) == 2
    runs = [(run["from_step"], run["to_step"], run["state"]) for run in page["runs"]]
    assert runs == [(0, 50, "interrupted"), (30, 35, "running")]
    draw(samples, report, 40)
    report.write()
    assert [entry["step"] for entry in read_page_data(broken_off)["samples"]["rounds"]] == [20, 40]
    assert len(read_page_data(broken_off)["samples"]["prompts"]) == 2


def test_a_page_of_another_run_is_not_continued(broken_off, caplog):
    resumed(broken_off, 30, session="other").write()
    assert read_page_data(broken_off)["curves"] == {} and not caplog.text


def test_a_run_that_is_not_resumed_begins_anew(broken_off):
    RunReport(broken_off, DESCRIPTION).write()
    assert read_page_data(broken_off)["samples"]["rounds"] == []


def test_a_damaged_page_begins_anew_with_a_word(broken_off, caplog):
    text = broken_off.read_text(encoding="utf-8")
    broken_off.write_text(text.replace('"stride":1,"x":[1,', '"stride":1,"x":['), encoding="utf-8")
    report = resumed(broken_off, 30)
    assert "a new one begins" in caplog.text
    train(report, 31, 32)
    report.write()
    assert read_page_data(broken_off)["curves"]["loss"]["x"] == [31, 32]


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (UserError("a.png: cannot read the image (broken)."), "failed", "a.png: cannot read the image (broken)."),
        (RuntimeError("<out of memory>"), "failed", "RuntimeError: <out of memory>"),
        (KeyboardInterrupt(), "interrupted", "Ctrl-C"),
    ],
)
def test_an_error_is_noted_and_goes_on_its_way(tmp_path, error, state, reason):
    path = tmp_path / "r.html"
    with pytest.raises(type(error)), RunReport(path, DESCRIPTION) as report:
        train(report, 1, 3)
        raise error
    assert read_page_data(path)["status"] == {"state": state, "reason": reason, "step": 3}


def test_a_page_that_cannot_be_written_is_said_once(tmp_path, caplog):
    path = tmp_path / "taken.html"
    path.mkdir()
    with RunReport(path, DESCRIPTION) as report:
        train(report, 1, 3)
        report.write()
        report.add_file(tmp_path / "not there", 3)
        report.end("finished")
    assert caplog.text.count("cannot be written") == 1
    path.rmdir()
    report.write()
    assert read_page_data(path)["status"]["state"] == "finished"
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken.html"]


def test_a_mistake_in_the_report_ends_the_report_only(tmp_path, caplog):
    def broken() -> dict[str, float]:
        raise ZeroDivisionError("of the optimizer")

    path = tmp_path / "r.html"
    report = RunReport(path, DESCRIPTION)
    report.add_loss(1, 1.0, True, broken)
    report.write()
    assert "ZeroDivisionError" in caplog.text and not path.exists()


def test_without_a_path_nothing_is_written(tmp_path, samples, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunReport(None, DESCRIPTION) as report:
        train(report, 1, 3)
        draw(samples, report, 3)
        report.end("finished")
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.txt", "sample"}


def test_files_that_were_removed_are_counted(tmp_path):
    path = tmp_path / "r.html"
    report = RunReport(path, DESCRIPTION)
    for number in range(3):
        file = tmp_path / f"{number}.safetensors"
        file.write_bytes(b"x")
        report.add_file(file, number)
    state = tmp_path / "state"
    state.mkdir()
    (state / "a").write_bytes(b"12")
    (state / "b").write_bytes(b"345")
    report.add_file(state, 3)
    (tmp_path / "0.safetensors").unlink()
    report.write()
    page = read_page_data(path)
    assert [(f["name"], f["size"]) for f in page["files"]] == [("1.safetensors", 1), ("2.safetensors", 1), ("state", 5)]
    assert page["removed_files"] == 1


def test_many_images_become_links(tmp_path, samples, monkeypatch):
    path = tmp_path / "r.html"
    report = RunReport(path, DESCRIPTION)
    draw(samples, report, 0)
    one = sum(len(image["thumb"]) for image in report.samples.rounds[0]["images"].values())
    monkeypatch.setattr(report_samples, "MOST_EMBEDDED", int(one * 3.5))
    monkeypatch.setattr(report_samples, "MOST_ROUNDS", 6)
    for step in range(1, 9):
        draw(samples, report, step)
    rounds = report.document()["samples"]["rounds"]
    assert [entry["step"] for entry in rounds] == [0, 4, 5, 6, 7, 8] and report.samples.dropped == 3
    embedded = [entry["step"] for entry in rounds if all("thumb" in p for p in entry["images"].values())]
    linked = [entry["step"] for entry in rounds if not any("thumb" in p for p in entry["images"].values())]
    assert (embedded, linked) == ([0, 7, 8], [4, 5, 6])


def test_images_of_every_process_are_found_and_the_newest_counts(samples):
    samples.folder.mkdir()
    for name in (
        "000004_00_20250101000000_3.png",
        "000004_00_20250102000000_3.png",
        "000004_01_20250101000000.png",
        "000004_07_20250101000000.png",
        "e000004_00_20260101000000_3.png",
        "000004_00_20260101000000_3.jpg",
        "000014_01_20250101000000.png",
        "other_000004_01_20270101000000.png",
    ):
        (samples.folder / name).touch()
    found = {index: path.name for index, path in samples.images(4, None).items()}
    assert found == {0: "000004_00_20250102000000_3.png", 1: "000004_01_20250101000000.png"}
    assert [path.name for path in samples.images(9, 4).values()] == ["e000004_00_20260101000000_3.png"]


def test_a_long_run_makes_no_long_page(tmp_path):
    report = RunReport(tmp_path / "r.html", replace(DESCRIPTION, steps=30000))
    train(report, 1, 30000)
    document = report.document()
    assert len(document["curves"]["loss"]["x"]) <= 2000
    assert all(len(rate["curve"]["x"]) <= 510 for rate in document["rates"])
    report.write()
    assert (tmp_path / "r.html").stat().st_size < 250_000


def test_no_secret_is_among_the_settings():
    options = TrainingOptions()
    options.logging.wandb_api_key = options.hub.huggingface_token = "TOPSECRET"
    options.length.max_train_steps = 5
    settings = {entry["name"]: entry for entry in describe_settings(options)}
    assert not SECRETS & settings.keys() and "TOPSECRET" not in str(settings)
    assert {name for name, entry in settings.items() if entry["changed"]} == {"max_train_steps"}
    assert settings["max_train_steps"]["value"] == 5 and settings["max_train_steps"]["default"] == 1600
