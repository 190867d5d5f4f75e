"""The report of a real run and the contact sheet of real data, as files and in a real browser."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import signal
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from PIL import Image

from flux_train_network import FluxNetworkTrainer, FluxTrainingOptions
from library.data.build import build_dataset_groups
from library.data.contact_sheet import PER_BUCKET, write_contact_sheet
from library.data.options import DatasetOptions
from library.generation.image_pages import ImagePages
from library.generation.image_prompts import ImagePrompt
from library.html_pages import read_page_data
from library.options import parse_options
from library.training.output.sample_images import SampleOptions, Samples
from library.training.report.page import ReportHead, RunReport, describe_settings
from library.training.training_loop import TrainingLoop
from tests.browser import DESKTOP, PHONE, Browser, browser_program
from tests.running import forget_accelerator, toml_value

NASTY = '<script>document.title="run"</script><img src=x onerror=\'document.title="run"\'> {{data}} "quoted" & 猫'


class WatchingTrainer(FluxNetworkTrainer):
    """Notes what the page says after every step; ``signal_at`` sends a Ctrl-C to this process at that step."""

    def __init__(self, options, signal_at):
        super().__init__(options)
        self.seen = seen = []

        class WatchedLoop(TrainingLoop):
            def after_step(self, interruption):
                if self.progress.step == signal_at:
                    signal.raise_signal(signal.SIGINT)
                super().after_step(interruption)
                page = read_page_data(self.run.outputs.files.folder / "zog.report.html")
                seen.append(None if page is None else page["status"]["step"])

        self.loop_class = WatchedLoop


@pytest.fixture(scope="module")
def train(flux_command, image_folder, tmp_path_factory):
    """Train a few steps with more options into a folder; returns the trainer."""
    root = tmp_path_factory.mktemp("report")
    prompts, dataset = root / "prompts.txt", root / "dataset.toml"
    prompts.write_text(f"a cat --w 64 --h 64 --s 1 --d 3\n{NASTY} --w 96 --h 64 --s 1 --d 4\n", encoding="utf-8")
    dataset.write_text(
        "resolution = 64\nenable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\nbucket_reso_steps = 32\n"
        'caption_extension = ".txt"\n[[datasets]]\nbatch_size = 2\n[[datasets.subsets]]\n'
        f"image_dir = {toml_value(image_folder.as_posix())}\n",
        encoding="utf-8",
    )

    def run(folder: Path, *arguments: object, steps: int = 8, signal_at: int = 0) -> WatchingTrainer:
        forget_accelerator()
        given = [*flux_command, "--max_train_steps", steps, "--output_dir", folder, "--output_name", "zog"]
        given += ["--dataset_config", dataset, "--max_data_loader_n_workers", "0", "--network_train_unet_only"]
        given += ["--cache_latents", "--cache_text_encoder_outputs", *arguments]
        trainer = WatchingTrainer(
            parse_options(FluxTrainingOptions, "test", [str(value) for value in given]), signal_at
        )
        trainer.train()
        return trainer

    run.samples = ["--sample_prompts", prompts, "--sample_every_n_steps", "4", "--sample_at_first"]
    return run


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory) -> tuple[Path, WatchingTrainer]:
    """The folder and the trainer of a run with samples, validation, files and states."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = [*train.samples, "--validation_split", "0.2", "--validate_every_n_steps", "4", "--save_state"]
    arguments += ["--save_every_n_steps", "3", "--wandb_api_key", "TOPSECRET"]
    return folder, train(folder, *arguments)


def test_a_run_with_samples_and_validation_writes_its_report(trained):
    folder, trainer = trained
    page = read_page_data(folder / "zog.report.html")
    assert page["status"] == {"state": "finished", "reason": "", "step": 8}
    assert page["curves"]["loss"]["x"] == list(range(1, 9))
    assert all(0 < loss < 100 for loss in page["curves"]["loss"]["y"])
    assert page["curves"]["loss epoch"]["y"][-1] == pytest.approx(trainer.progress.record.average, rel=1e-4)
    assert page["curves"]["validation step"]["x"] == [0, 4, 8]
    assert page["curves"]["validation epoch"]["x"] == page["curves"]["loss epoch"]["x"]
    assert page["rates"][0]["names"] == ["unet"]
    assert [entry["step"] for entry in page["samples"]["rounds"]] == [0, 4, 8]
    assert page["samples"]["prompts"][1]["text"] == NASTY
    for entry in page["samples"]["rounds"]:
        assert all((folder / picture["link"]).is_file() for picture in entry["images"].values())
        assert len(entry["images"]) == 2
    names = [entry["name"] for entry in page["files"]]
    assert {"zog.safetensors", "zog-state", "zog-step00000003.safetensors", "zog-step00000006-state"} <= set(names)
    assert all(entry["size"] > 1000 for entry in page["files"])
    assert [group["title"] for group in page["data"]] == ["Training data", "Validation data"]
    assert sum(group["images"] for group in page["data"]) == 12
    assert "TOPSECRET" not in (folder / "zog.report.html").read_text(encoding="utf-8")


def test_the_page_is_refreshed_at_samples_files_and_validation(trained):
    _, trainer = trained
    # Files at 3 and 6, samples and validation at 4 and 8, epochs of 5 or 6 steps.
    steps = [seen for step, seen in enumerate(trainer.seen, 1) if step in (3, 4, 6, 8)]
    assert steps == [3, 4, 6, 8] and trainer.seen[0] == 0


def test_a_page_is_written_or_not_as_asked(train, tmp_path):
    train(tmp_path / "unwanted", "--no_report", steps=1)
    assert (tmp_path / "unwanted" / "zog.safetensors").is_file() and not list(tmp_path.rglob("*.html"))
    train(tmp_path / "wanted", "--report", steps=1)
    assert read_page_data(tmp_path / "wanted" / "zog.report.html")["curves"]["loss"]["x"] == [1]


def test_an_interrupted_run_says_so_and_a_resumed_one_completes_the_curves(train, trained, tmp_path):
    arguments = [*train.samples, "--validation_split", "0.2", "--validate_every_n_steps", "4", "--save_state"]
    train(tmp_path, *arguments, signal_at=5)
    page = read_page_data(tmp_path / "zog.report.html")
    assert page["status"] == {"state": "interrupted", "reason": "Ctrl-C", "step": 5}
    train(tmp_path, *arguments, "--resume", tmp_path / "zog-step00000005-state")
    page, whole = (read_page_data(folder / "zog.report.html") for folder in (tmp_path, trained[0]))
    assert page["status"]["state"] == "finished"
    assert page["curves"] == whole["curves"]
    assert [entry["step"] for entry in page["samples"]["rounds"]] == [0, 4, 8]
    assert [(run["from_step"], run["to_step"]) for run in page["runs"]] == [(0, 5), (5, 8)]


# ---- the contact sheet -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory) -> Path:
    """Sixty small images of two shapes with masks; one caption is not to be read as HTML, one is missing."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "masks").mkdir()
    rng = numpy.random.default_rng(0)
    for number in range(60):
        shape = (64, 64) if number < 52 else (40, 96)
        pixels = rng.integers(0, 255, (shape[0] // 8, shape[1] // 8, 3), dtype=numpy.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        Image.new("L", shape[::-1], 128).save(folder / "masks" / f"{number:02d}.png")
        caption = NASTY if number == 53 else f"image {number}, red, blue, green"
        if number != 54:
            (folder / f"{number:02d}.txt").write_text(caption, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def sheet(data_folder) -> Path:
    """The contact sheet of the data, mirrored and shuffled."""
    config = data_folder / "dataset.toml"
    config.write_text(
        "resolution = 64\nenable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\nbucket_reso_steps = 32\n"
        'caption_extension = ".txt"\n[[datasets]]\nbatch_size = 4\n[[datasets.subsets]]\n'
        f"image_dir = {toml_value(data_folder.as_posix())}\nnum_repeats = 2\nflip_aug = true\nshuffle_caption = true\n"
        f"conditioning_data_dir = {toml_value((data_folder / 'masks').as_posix())}\n",
        encoding="utf-8",
    )
    group = build_dataset_groups(DatasetOptions(dataset_config=str(config), masked_loss=True), bucket_divisor=32)[0]
    path = data_folder / "zog.dataset.html"
    assert write_contact_sheet(group, path, seed=5, max_train_steps=10) == PER_BUCKET + 16
    return path


def pixels_of(address: str) -> numpy.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as image:
        return numpy.asarray(image.convert("RGB"), dtype=numpy.float32)


def test_the_contact_sheet_shows_what_is_trained(sheet, data_folder):
    wide, square = sorted(read_page_data(sheet)["buckets"], key=lambda bucket: -bucket["size"][0])
    assert (wide["size"], wide["images"], wide["samples"], wide["more"]) == ([96, 32], 8, 16, 0)
    assert (square["size"], square["images"], square["more"]) == ([64, 64], 52, 52 - PER_BUCKET)
    assert len({card["name"] for card in square["cards"]}) == PER_BUCKET
    assert {card["mirrored"] for card in square["cards"]} == {True, False}
    config = DatasetOptions(dataset_config=str(data_folder / "dataset.toml"), masked_loss=True)
    group = build_dataset_groups(config, bucket_divisor=32)[0]
    seen = {}
    for number, plan in enumerate(group.plan(1, 5)):
        batch = group.load(plan, epoch=1, step=number, max_train_steps=10, seed=5)
        for row, key in enumerate(batch.image_keys):
            look = Path(key).name, number, batch.captions[row], batch.flipped[row]
            seen[look] = batch.images[row].numpy()
    for card in [*wide["cards"], *square["cards"][:5]]:
        image = seen[card["name"], card["batch"], card["caption"], card["mirrored"]]
        assert card["extras"][0][0] == "loss mask" and card["repeats"] == 2 and card["weight"] == 1
        # Lossy, but close on the average, and far from its mirror image.
        shown, trained = pixels_of(card["image"]), (image.transpose(1, 2, 0) + 1) * 127.5
        assert abs(shown - trained).mean() < 0.3 * abs(shown - trained[:, ::-1]).mean()
    assert wide["cards"][0]["original"] == [96, 40] and wide["cards"][0]["lost"] == pytest.approx(0.2)


def test_debugging_writes_a_contact_sheet_and_trains_nothing(train, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    train(tmp_path, "--debug_dataset")
    assert [path.name for path in tmp_path.iterdir()] == ["zog.dataset.html"]
    buckets = read_page_data(tmp_path / "zog.dataset.html")["buckets"]
    assert sum(len(bucket["cards"]) for bucket in buckets) == capsys.readouterr().out.count("a circle, number") == 12


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if browser_program() is None:
        pytest.skip("Chromium and chromedriver are not installed")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def long_report(tmp_path_factory) -> Path:
    """The report of a long, resumed, failed run with many samples and hostile words everywhere."""
    folder = tmp_path_factory.mktemp("long")
    prompts, path = folder / "prompts.txt", folder / "zog.report.html"
    prompts.write_text(f"{NASTY} --d 1\n{'a very long prompt, ' * 40} --n {NASTY}\n", encoding="utf-8")
    samples = Samples(SampleOptions(sample_prompts=str(prompts), sample_every_n_steps=1), str(folder), None)
    settings = describe_settings(FluxTrainingOptions())
    settings[0] |= {"value": NASTY, "changed": True}
    data = [{"title": NASTY, "images": 1, "samples": 1, "batches": 1, "notes": [NASTY], "datasets": []}]
    run = ReportHead(NASTY, NASTY, "ab12", 1.0, 9000, 100, 90, 0, settings, data, [(NASTY, NASTY)])
    draw, picture = random.Random(0), Image.linear_gradient("L").resize((320, 240))
    report = RunReport(path, run)
    for begin, end in ((1, 4000), (4001, 9000)):
        for step in range(begin, end + 1):
            loss = math.nan if step == 77 else 0.1 + math.exp(-step / 2000) * draw.uniform(0.5, 1.5)
            report.add_loss(step, loss, True, lambda: {"lr/unet": 1e-4, "lr/b": 2e-4, "lr/d*lr/b": 1e-5})
            if step % 100 == 0:
                report.add_epoch_average(step, loss)
            if step % 250 == 0:
                samples.draw(lambda prompts: [picture] * len(prompts), step, None)
                report.add_samples(step, None, samples)
        report.end("interrupted", "SIGTERM")
        report = RunReport(path, replace(run, first_step=end, steps=12000), resumed=True)
    for entry in report.samples.rounds[:20]:
        for shown in entry["images"].values():
            del shown["thumb"]
    report.step = 9000
    report.end("failed", NASTY)
    return path


def check_page(browser: Browser, page: Path) -> None:
    """What holds for every page at every width: no error, no load from elsewhere, nothing hostile ran, no overflow."""
    for size, dark in ((DESKTOP, False), (PHONE, True)):
        browser.look_like(size, dark)
        browser.open(page)
        browser.wait_for("return document.getElementById('end').textContent")
        assert browser.console() == []
        assert browser.requests() == [page.resolve().as_uri()]
        assert browser.run("return document.title") != "run"
        widths = browser.run("const d = document.documentElement; return [d.scrollWidth, d.clientWidth, innerWidth]")
        assert widths == [size[0]] * 3
        paper, ink = browser.run("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
        assert (lightness(paper) > lightness(ink)) is not dark
    assert browser.run("return document.querySelectorAll('body img[src=\"x\"], body script:not([id])').length") == 2


def lightness(colour: str) -> int:
    return sum(int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])


def touch_targets(browser: Browser) -> list[list[object]]:
    """Buttons and links of their own line that are lower than a finger."""
    return browser.run(
        "return [...document.querySelectorAll('button, summary, nav a, .file a')].filter(e => e.checkVisibility())"
        ".map(e => [e.id || e.textContent, e.getBoundingClientRect().height]).filter(pair => pair[1] < 36)"
    )


def test_the_report_of_a_real_run_in_a_browser(browser, trained):
    page = trained[0] / "zog.report.html"
    check_page(browser, page)
    assert touch_targets(browser) == []
    browser.look_like(DESKTOP)
    browser.open(page)
    counts = browser.wait_for(
        "const lines = [...document.querySelectorAll('path.line')]; return lines.length"
        " && Object.fromEntries(lines.map(l => [l.dataset.name, l.getAttribute('d').split(/[ML]/).length - 1]))"
    )
    assert counts == {"each step": 8, "epoch average": 2, "after steps": 3, "after epochs": 2, "unet": 8}
    text = browser.run("return document.body.innerText")
    assert "a cat" in text and NASTY in text and "finished" in text and "zog-step00000003.safetensors" in text
    shown = browser.run("return [...document.querySelectorAll('#samples img')].map(i => [i.complete, i.naturalWidth])")
    assert shown == [[True, 64]] * 3 + [[True, 96]] * 3


def test_curves_tell_their_values(browser, trained):
    browser.look_like(DESKTOP)
    browser.open(trained[0] / "zog.report.html")
    left, top, width = browser.wait_for(
        "const r = document.querySelector('#loss svg')?.getBoundingClientRect(); return r && [r.left, r.top, r.width]"
    )
    browser.point(left + width - 22, top + 60)
    values = browser.wait_for("const v = document.querySelector('#loss .values'); return v.hidden ? '' : v.innerText")
    loss = read_page_data(trained[0] / "zog.report.html")["curves"]["loss"]["y"][-1]
    assert "step 8, epoch 2" in values and f"{loss:.4g}" in values
    browser.point(left, 2)
    browser.wait_for("return document.querySelector('#loss .values').hidden")
    browser.run("document.querySelector('#loss .plot').focus()")
    browser.press("ArrowRight"), browser.press("ArrowLeft")
    assert "step 7" in browser.run("return document.querySelector('#loss .values').innerText")


def test_images_are_enlarged_from_their_files(browser, trained):
    browser.look_like(PHONE)
    browser.open(trained[0] / "zog.report.html")
    browser.run("document.querySelectorAll('#samples .image')[1].scrollIntoView({block: 'center', inline: 'center'})")
    x, y = browser.run(
        "const r = document.querySelectorAll('#samples .image')[1].getBoundingClientRect();"
        "return [r.x + r.width / 2, r.y + 20]"
    )
    browser.click(x, y)
    state = (
        "const i = document.querySelector('#viewer-stage img');"
        "return document.querySelector('dialog[open]') && i.naturalWidth && "
    )
    assert "000004_00" in browser.wait_for(state + "i.src")
    browser.press("ArrowRight")
    assert "000008_00" in browser.wait_for(state + "i.src.includes('000008') && i.src")
    browser.press("ArrowDown")
    assert "000008_01" in browser.wait_for(state + "i.src.includes('_01_') && i.src")
    assert NASTY in browser.run("return document.getElementById('viewer-words').innerText")
    box = browser.run(
        "const r = document.querySelector('#viewer-stage img').getBoundingClientRect(); return [r.left, r.right]"
    )
    assert box[0] >= 0 and box[1] <= PHONE[0] and touch_targets(browser) == []
    browser.press("Escape")
    browser.wait_for("return !document.getElementById('viewer').open")
    assert browser.console() == []


def test_a_image_whose_file_is_gone_is_shown_small(browser, trained, tmp_path):
    alone = tmp_path / "alone.html"
    alone.write_bytes((trained[0] / "zog.report.html").read_bytes())
    browser.open(alone)
    browser.run("document.querySelector('#samples .image').click()")
    browser.wait_for(
        "const i = document.querySelector('#viewer-stage img'); return i.src.startsWith('data:') && i.naturalWidth"
    )


def test_a_long_hostile_report_in_a_browser(browser, long_report):
    check_page(browser, long_report)
    text = browser.run("return document.body.textContent")
    for words in ("Each point of the faint line is the mean of", "not a number in 1 step, first in step 77"):
        assert words in text
    assert "Older images are links" in text and "ended by an error" in text
    points = browser.run("return Number(document.querySelector('#loss path.faint').dataset.points)")
    assert 1000 <= points <= 2000
    assert browser.run("return document.querySelectorAll('#factors path.line').length") == 1
    assert browser.run("return document.querySelectorAll('#samples .shot.linked').length") == 40
    assert browser.run("return document.querySelectorAll('#loss text.mark').length") == 1
    assert len(json.dumps(read_page_data(long_report)["curves"])) < 200_000


def test_a_page_that_is_followed_loads_itself_again(browser, tmp_path):
    path = tmp_path / "r.html"
    RunReport(path, ReportHead("zog", "", "ab12", 1.0, 10, 5, 2, 0, [], [], [])).write()
    browser.open(path)
    assert browser.run("return document.getElementById('follow').textContent") == "follow"
    browser.run("document.getElementById('follow').click()")
    browser.wait_for("return document.getElementById('follow')?.textContent === 'stop following'")
    assert browser.console() == []


def test_the_contact_sheet_in_a_browser(browser, sheet):
    check_page(browser, sheet)
    assert touch_targets(browser) == []
    text = browser.run("return document.body.innerText")
    assert f"{52 - PER_BUCKET} more not shown here" in text and NASTY in text and "empty caption" in text
    assert browser.run("return document.querySelectorAll('.sample').length") == PER_BUCKET + 16
    browser.run("document.querySelector('.sample .image').click()")
    browser.wait_for("return document.querySelector('#viewer-stage img').naturalWidth")
    assert browser.run("return document.getElementById('viewer-open').href").startswith(sheet.parent.as_uri())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The page of images of three prompt lines, the last of which is dynamic."""
    folder = tmp_path_factory.mktemp("drawn")
    pages = ImagePages(folder, grid=False, report=True)
    prompts = [NASTY, NASTY, "", "a cat", "a dog"]
    for number, prompt in enumerate(prompts):
        path, image = folder / f"im {number} #.png", Image.new("RGB", (96 - 32 * (number > 2), 64), "red")
        image.save(path)
        text = {"steps": "4", "seed": str(number), "negative-prompt": "" if number < 2 else f"no {NASTY}"}
        pages.add(path, image, ImagePrompt(prompt=prompt, number=number, index=[0, 1, 0, 0, 1][number]), text)
    pages.finish()
    return folder / "report.html"


def test_the_page_of_drawn_images_in_a_browser(browser, drawn):
    check_page(browser, drawn)
    assert touch_targets(browser) == []
    lines = browser.run("return [...document.querySelectorAll('section')].map(e => e.innerText.split('\\n'))")
    assert [line[0] for line in lines] == [NASTY, "empty prompt", f"negative prompt: no {NASTY}"]
    assert lines[2].count("a cat") == lines[2].count("a dog") == 1 and "seed 4" in lines[2]
    assert browser.run("return document.getElementById('what').textContent") == "5 images, steps 4"
    browser.run("document.querySelectorAll('.sample .image')[1].click()")
    browser.wait_for("return document.querySelector('#viewer-stage img').naturalWidth === 96")
    assert browser.run("return document.querySelector('#viewer-stage img').src").endswith("im%201%20%23.png")
    browser.press("ArrowDown")
    browser.wait_for("return document.getElementById('viewer-words').textContent.startsWith('im 2')")
