"""The table of docs/reliability.md: which options leave what a run learns as it is, to the bit or within a bound."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.data import dataset
from library.data.order import BatchPlan, plan_epoch
from tests.conformance.conftest import IN_TURN
from tests.families.families import FAMILIES
from tests.families.family import Family
from tests.running import ROOT, run_in_process, toml_value
from tools import make_equality_table
from tools.make_equality_table import CACHED, NEUTRAL, PAGE, ROUNDED, TABLE, Neutral
from tools.page_tables import updated

LENGTH = ("--max_train_steps", "3", "--lr_scheduler", "cosine", "--validation_split", "0.25")
NO_VALIDATION = ("--validate_every_n_epochs", "9")
"""Holds where the words after it don't say otherwise."""
VALIDATED = {"streamed", "recomputed"}
"""Groups whose runs compute validation losses between their steps, where the run without their options does not."""
LORA = "lora.safetensors"
SHOWN_OF = {
    "command line": {"flux"},
    "recomputed alone": {"flux", "sdxl"},
    "texts": {"flux", "sdxl"},
    "batches": {"sd1", "lumina"},
}
"""Groups of options that go one way in all families, and of whom an ordinary run of the tests shows them."""
ORDINARY = ("backwards", "accumulated", "fp8 streamed")
FEW = [
    pytest.param(
        family,
        row,
        id=f"{family.name}-{row.group}",
        marks=[] if family.name == "flux" and row.group in ORDINARY else [pytest.mark.thorough],
    )
    for family in FAMILIES
    for row in ROUNDED
    if family.name in row.models
]
"""Some with one model in each run of the tests, all with every model with ``--thorough``."""


@dataclass(frozen=True)
class Done:
    """A run that ended well: its LoRA file, and what it said."""

    lora: Path
    said: str


Run = Callable[[str, Sequence[object]], Done]


@pytest.fixture(scope="module", params=IN_TURN)
def family(request) -> Family:
    """Each family in turn, with ``--thorough`` each model."""
    return request.param


@pytest.fixture(scope="module")
def folder(image_folder, tmp_path_factory) -> Path:
    """Four images as both a dataset file and the command line name them, and four of one size in batches of 3 and 1."""
    found = tmp_path_factory.mktemp("neutral")
    images = found / "data" / "1_circle"
    images.mkdir(parents=True)
    for number in range(4):
        for suffix in (".png", ".txt"):
            shutil.copy(image_folder / f"{number:02d}{suffix}", images)
    small = found / "small"
    small.mkdir()
    for number in range(4):
        shutil.copy(image_folder / f"{number:02d}.txt", small)
        with Image.open(image_folder / f"{number:02d}.png") as image:
            image.convert("RGB").resize((64, 64)).save(small / f"{number:02d}.png")
    for name, size in (("whole", 3), ("single", 1)):
        (found / f"{name}.toml").write_text(
            f'[[datasets]]\nresolution = 64\nbatch_size = {size}\ncaption_extension = ".txt"\n'
            f"[[datasets.subsets]]\nimage_dir = {toml_value(small.as_posix())}\n",
            encoding="utf-8",
        )
    (found / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1 --d 3\n", encoding="utf-8")
    (found / "dataset.toml").write_text(
        "[[datasets]]\nresolution = 64\nbatch_size = 2\nenable_bucket = true\nbucket_reso_steps = 64\n"
        'min_bucket_reso = 64\nmax_bucket_reso = 128\ncaption_extension = ".txt"\nflip_aug = true\n'
        f'[[datasets.subsets]]\nimage_dir = {toml_value(images.as_posix())}\nclass_tokens = "circle"\n',
        encoding="utf-8",
    )
    return found


@pytest.fixture(scope="module")
def run(family, tiny_files, folder) -> Run:
    """Run the family's script with these words."""

    def train(name: str, words: Sequence[object]) -> Done:
        given = [*family.command(tiny_files(family)), *LENGTH, *NO_VALIDATION, "--output_name", "lora"]
        done = run_in_process(family.script, *given, "--output_dir", folder / name, *words)
        assert done.returncode == 0, done.stderr[-3000:]
        return Done(folder / name / LORA, done.stderr)

    return train


def in_file(folder: Path) -> list[object]:
    return ["--dataset_config", folder / "dataset.toml", "--max_data_loader_n_workers", "0"]


def on_command_line(folder: Path) -> list[object]:
    words = "--resolution 64 --train_batch_size 2 --enable_bucket --bucket_reso_steps 64 --min_bucket_reso 64"
    words += " --max_bucket_reso 128 --caption_extension .txt --flip_aug --max_data_loader_n_workers 0"
    return ["--train_data_dir", folder / "data", *words.split()]


@pytest.fixture(scope="module")
def plain(run, folder) -> Done:
    """A run without any of the options."""
    return run("plain", [*in_file(folder), "--no_report"])


@pytest.fixture(scope="module")
def beside(run, folder) -> Done:
    """A run with all options that are only beside the training."""
    return run("beside", [*in_file(folder), *words_of([row for row in NEUTRAL if row.group == "beside"], folder)])


@pytest.fixture(scope="module")
def cached(run, folder) -> Done:
    """A run whose latents and texts are cached in memory."""
    words = "--network_train_unet_only --no_report --cache_latents --cache_text_encoder_outputs"
    return run("cached", [*in_file(folder), *words.split()])


def words_of(rows: Sequence[Neutral], folder: Path) -> list[str]:
    return [word.format(folder=folder.as_posix()) for row in rows for word in row.words.split()]


def difference(one: Done, two: Done) -> float:
    """The largest of all weights as a share of the largest weight that was trained; 0 where all bits are equal."""
    first, second = load_file(one.lora), load_file(two.lora)
    assert first.keys() == second.keys()
    if all(torch.equal(first[key], second[key]) for key in first):
        return 0.0
    largest = max(tensor.abs().max().item() for key, tensor in first.items() if key.endswith("lora_up.weight"))
    return max((first[key] - second[key]).abs().max().item() for key in first) / largest


def groups(rows: Sequence[Neutral]) -> list[list[Neutral]]:
    return [list(group) for _, group in groupby(rows, key=lambda row: row.group)]


def name_of(rows: Sequence[Neutral]) -> str:
    return rows[0].group


def held(family: str, rows: Sequence[Neutral], found: float) -> bool:
    return found <= max(row.bounds.get(family, 0.0) for row in rows)


@pytest.mark.parametrize("rows", groups(NEUTRAL), ids=name_of)
def test_a_run_learns_the_same(family, run, folder, plain, beside, rows):
    """Options of a group in one run; if it differs, each alone, so that the failure names the culprit."""
    group = name_of(rows)
    if group == "beside":
        done = beside
    elif group == "command line":
        done = run(group, [*on_command_line(folder), "--no_report"])
    else:
        given = words_of(rows, beside.lora.parent if group == "resumed" else folder)
        given += ["--validate_every_n_epochs", "1"] if group in VALIDATED else []
        done = run(group, [*in_file(folder), "--no_report", *given])
    if group == "streamed":
        assert re.search(r"--blocks_to_swap 2: \d+ of \d+ \w+.* are streamed from", done.said)
    found = difference(plain, done)
    if len(rows) > 1 and not held(family.name, rows, found):
        alone = {row.name: run("alone", [*in_file(folder), *words_of([row], folder)]) for row in rows}
        found_alone = {name: difference(plain, other) for name, other in alone.items()}
        assert {name: value for name, value in found_alone.items() if value} == {}
    assert held(family.name, rows, found), found


@pytest.fixture(scope="module")
def made(run, folder) -> Done:
    """A run that makes its caches in files; another family's may be those that it would take."""
    for path in folder.rglob("*.npz"):
        path.unlink()
    rows = [row for row in CACHED if row.group == "made"]
    return run("made", [*in_file(folder), "--network_train_unet_only", "--no_report", *words_of(rows, folder)])


@pytest.mark.parametrize("rows", groups(CACHED), ids=name_of)
def test_caches_of_every_kind_give_the_same(family, run, folder, cached, made, rows):
    given = [*in_file(folder), "--network_train_unet_only", "--no_report", *words_of(rows, folder)]
    group = name_of(rows)
    done = made if group == "made" else run(group, given)
    found = difference(cached, done)
    counts = re.findall(r"(?:latent|text encoder) cache: (\d+) kept, (\d+) made", done.said)
    kept, made = (sum(int(count[number]) for count in counts) for number in (0, 1))
    if group in ("made", "kept"):
        assert {len(list(folder.rglob(f"*{ending}"))) for ending in family.caches} == {4}
        assert (kept, made) == ((8, 0) if group == "kept" else (0, 8)), "of images and captions together"
    assert held(family.name, rows, found), found


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, str], Done]:
    """Runs that others are compared with, by family and options."""
    return {}


def backwards(*given: Any, **named: Any) -> list[BatchPlan]:
    """The epoch's batches, each with its images in the opposite order."""
    plans = plan_epoch(*given, **named)
    assert {len(plan.samples) for plan in plans} <= {1, 3}  # one batch of training or of validation
    return [replace(plan, samples=plan.samples[::-1]) for plan in plans]


@pytest.mark.parametrize(("family", "row"), FEW, indirect=["family"])
def test_a_run_learns_the_same_up_to_rounding(family, run, folder, references, row, monkeypatch):
    given = ["--no_report", "--max_data_loader_n_workers", "0"]
    beside = [word.format(folder=folder.as_posix()) for word in row.beside.split()]
    if (family.name, row.beside) not in references:
        number = f"reference {len(references)}"
        references[family.name, row.beside] = run(number, [*given, *beside])
    if row.group == "backwards":
        monkeypatch.setattr(dataset, "plan_epoch", backwards)
    done = run(row.group, [*given, *beside, *words_of([row], folder)])
    assert row.group != "fp8 streamed" or "are streamed from" in done.said
    found = difference(references[family.name, row.beside], done)
    assert held(family.name, [row], found), found


def test_the_page_is_current():
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    assert updated(page, [TABLE]) == page


def test_the_program_writes_the_page(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    copy = tmp_path / PAGE
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    copy.write_text(page.replace("| samples | to the bit", "| samples | hardly"), encoding="utf-8")
    assert make_equality_table.main(["--check"], tmp_path) == 1
    assert "is not current; run python tools/make_equality_table.py" in capsys.readouterr().err
    assert make_equality_table.main([], tmp_path) == 0 == make_equality_table.main(["--check"], tmp_path)
    assert copy.read_text(encoding="utf-8") == page
