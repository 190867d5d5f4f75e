"""A walk along what a users' guide promises: each entry of its list is run with tiny weights, and must have its effect.

A family's test gives a ``Guide`` and the fixtures ``models`` (the files of each kind of model by the option that names
them), ``named`` (the files that entries name in angle brackets) and ``place`` (see ``make_place``). Everything is as
in the guide, but that resolutions are smaller, that a command trains one or two epochs, and that without a CUDA device
bf16 takes the place of fp16.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from library.console import LOGGER
from library.errors import UserError
from library.options import parse_options
from tests.documented import Entry
from tests.running import ROOT, forget_accelerator, launched_script, logged_rates, run_in_process, trainer_class

RUN = (
    "--network_dim 4 --learning_rate 1e-3 --train_batch_size 2 --seed 7 --max_data_loader_n_workers 0 --no_report"
).split()
SMALL = {
    "1024, 1024": "64, 64",
    "768, 768": "96, 96",
    "1280, 768": "192, 64",
    "--max_train_epochs=10": "--max_train_epochs=2",
    "--w 512 --h 512": "--w 64 --h 96",
    "--s 20": "--s 2",
}
Models = Mapping[str, Mapping[str, Path | str | tuple[str, ...]]]
"""Kind of model -> option -> its value."""


@dataclass(frozen=True)
class Guide:
    """A family's guide."""

    family: str
    dataset: str
    """The file name of its dataset configuration."""
    run: str
    """Options of every run beside ``RUN``."""
    stands_for: Mapping[str, str]
    """What its commands say in place of files -> the option that names the file."""


@dataclass
class Outcome:
    """What a run left behind."""

    folder: Path
    said: str = ""
    refused: str = ""
    loss: float = float("nan")
    """Of the first batch."""
    rates: Mapping[str, float] = field(default_factory=dict)
    no_effect: tuple[str, ...] = ()
    named: Mapping[str, Path] = field(default_factory=dict)
    """The files that entries name in angle brackets."""

    @property
    def file(self) -> Path:
        """The LoRA file of the run's end."""
        (path,) = (path for path in self.folder.glob("*.safetensors") if not re.search(r"-\d{6}$", path.stem))
        return path

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.file)

    @property
    def metadata(self) -> dict[str, str]:
        with safe_open(self.file, "pt") as file:
            return file.metadata()

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by module."""
        downs = {key: tensor for key, tensor in self.tensors.items() if key.endswith(".lora_down.weight")}
        return {key.partition(".")[0]: len(tensor) for key, tensor in downs.items()}


# ---- models, images, files ----


def with_files(text: str, named: Mapping[str, Path]) -> list[str]:
    """The words of a line of options, with paths for what stands for files."""
    return [re.sub(r"<(\w+)>", lambda match: str(named[match[1]]), word) for word in shlex.split(text)]


def make_place(folder: Path, guide: Guide, image_folder: Path) -> Path:
    """A folder with two images and their captions, a dataset file over them, and a folder with more images."""
    copies(image_folder, folder / "many")
    for number in range(2):
        picture = Image.effect_mandelbrot((80, 80), (-2, -1, 1, 1), 20 + number)
        picture.convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a circle, number {number}", encoding="utf-8")
    text = "[[datasets]]\nresolution = 64\nenable_bucket = true\nmin_bucket_reso = 64\n[[datasets.subsets]]\n"
    text += f'image_dir = "{folder.as_posix()}"\ncaption_extension = ".txt"\n'
    (folder / guide.dataset).write_text(text, encoding="utf-8")
    return folder


def model_options(entry: Entry, models: Models) -> list[str]:
    """The options that name the model of an entry and what is trained of it; those without a value are switches."""
    given = {name: value for name, value in models[entry.model].items() if name not in entry.without}
    several = {name: value for name, value in given.items() if isinstance(value, tuple)}
    options = [f"--{name}={value}".rstrip("=") for name, value in given.items() if name not in several]
    return [*options, *(word for name, values in several.items() for word in (f"--{name}", *values))]


# ---- running ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(guide, place):
    """Train in this process with these options; returns what came of it."""
    trainer = trainer_class(guide.family)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("library")

    def in_this_process(folder: Path, options: list[str]) -> Outcome:
        forget_accelerator()
        messages.clear()
        given = [*RUN, *guide.run.split(), f"--dataset_config={place / guide.dataset}", *options]
        given.append(f"--output_dir={folder}")
        if not {"--max_train_steps", "--max_train_epochs"} & set(options):
            given.append("--max_train_steps=1")
        outcome = Outcome(folder)
        try:
            running = trainer.of(parse_options(trainer.options_class, "", given))
            running.train()
            outcome.loss = running.progress.record.losses[0]
            outcome.rates = {name.removeprefix("lr/"): rate for name, rate in logged_rates(running).items()}
            outcome.no_effect = tuple(sorted(running.no_effect))
        except UserError as error:
            outcome.refused = str(error)
        outcome.said = "\n".join(messages)
        return outcome

    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield in_this_process
    logger.removeHandler(handler)
    logger.setLevel(level)
    forget_accelerator()


@pytest.fixture(scope="module")
def compared(run, models, named, tmp_path_factory) -> Callable[[Entry], Outcome]:
    """The run that an entry's is compared with; entries with the same one share it."""
    done: dict[tuple[str, str], Outcome] = {}

    def of(entry: Entry) -> Outcome:
        options = entry.beside if entry.against is None else entry.against
        key = (entry.model, options)
        if key not in done:
            whole = replace(entry, without=())
            folder = tmp_path_factory.mktemp("compared")
            done[key] = run(folder, [*model_options(whole, models), *with_files(options, named)])
            assert not done[key].refused
        return done[key]

    return of


def entry_options(guide: Guide, entry: Entry, folder: Path, place: Path, named: Mapping[str, Path]) -> list[str]:
    """What an entry adds to the options that name its model."""
    options = with_files(entry.beside, named)
    if entry.kind == "options":
        return [*options, *with_files(entry.text, named)]
    if entry.kind == "prompt":
        (folder / "prompts.txt").write_text(smaller(entry.text), encoding="utf-8")
        return [*options, f"--sample_prompts={folder / 'prompts.txt'}", "--sample_every_n_steps=1"]
    path = folder / "dataset.toml"
    text = entry.text
    if entry.kind == "dataset key":
        plain = (place / guide.dataset).read_text(encoding="utf-8")
        text = f"{text}{plain}" if "[general]" in text else plain.replace("[[datasets]]\n", f"[[datasets]]\n{text}\n")
    else:
        options.append("--min_bucket_reso=64")
        for name in set(re.findall(r'"path/to/([\w/-]+)"', text)):
            images = folder / name.replace("/", "-")
            copies(place / "many", images)
            text = text.replace(f'"path/to/{name}"', f'"{images.as_posix()}"')
    path.write_text(smaller(text), encoding="utf-8")
    return [*options, f"--dataset_config={path}"]


def smaller(text: str) -> str:
    """A dataset file, prompt or command line with smaller numbers."""
    for large, small in SMALL.items():
        text = text.replace(large, small)
    return text


def copies(source: Path, target: Path) -> None:
    """Twelve images with captions under both extensions."""
    target.mkdir()
    for picture in source.glob("*.png"):
        shutil.copy(picture, target)
        for extension in (".txt", ".caption"):
            shutil.copy(picture.with_suffix(".txt"), (target / picture.name).with_suffix(extension))


# ---- what must come out ----------------------------------------------------------------------------------------------


def close(one: Outcome, two: Outcome) -> dict[str, bool]:
    """Whether the losses of two runs are equal, and their weights, but for rounding."""
    a, b = one.tensors, two.tensors
    equal = a.keys() == b.keys() and all(torch.allclose(a[key], b[key], rtol=1e-4, atol=1e-6) for key in a)
    return {"loss": one.loss == pytest.approx(two.loss, rel=1e-5), "weights": equal}


def ranks_by_pattern(names: Any, wanted: Mapping[str, int]) -> dict[str, int]:
    """The rank that the last matching pattern gives each module of the transformer; the patterns match something."""
    assert all(any(re.search(pattern, name) for name in names) for pattern in wanted)
    matching = {name: [rank for pattern, rank in wanted.items() if re.search(pattern, name)] for name in names}
    return {name: ranks[-1] for name, ranks in matching.items()}


def datasets(outcome: Outcome, key: str) -> list[Any]:
    return [dataset[key] for dataset in json.loads(outcome.metadata["ss_datasets"])]


def validations(outcome: Outcome) -> list[str]:
    """The steps or epochs of all validations, whose losses must be one number."""
    found = re.findall(r"^(step|epoch) (\d+): validation loss ([\d.]+)", outcome.said, re.MULTILINE)
    assert len({loss for _, _, loss in found}) == 1, found
    return [f"{kind} {number}" for kind, number, _ in found]


def image_size(outcome: Outcome) -> list[int]:
    """The size of the one image that was drawn."""
    (path,) = outcome.folder.rglob("*.png")
    with Image.open(path) as image:
        assert image.convert("L").getextrema()[0] != image.convert("L").getextrema()[1]
        return list(image.size)


def changes(model: Path, original: Path) -> list[str]:
    """The tensors of a model that differ from the original's."""
    one, two = load_file(model), load_file(original)
    assert one.keys() == two.keys()
    return [key for key in one if not torch.equal(one[key], two[key])]


def acts_like(outcome: Outcome, name: str) -> bool:
    """Whether a LoRA file adds to each layer of the transformer what another one does."""
    one, two = outcome.tensors, load_file(outcome.named[name])

    def added(tensors: Mapping[str, Tensor], module: str) -> Tensor:
        down, up, alpha = (tensors[f"{module}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        return alpha / len(down) * up @ down

    return all(torch.allclose(added(one, module), added(two, module), rtol=0, atol=1e-5) for module in outcome.ranks)


CHECKS: dict[str, Callable[[Outcome, Any], bool]] = {
    "said": lambda outcome, texts: all(text in outcome.said for text in texts),
    "metadata": lambda outcome, values: values.items() <= outcome.metadata.items(),
    "modules": lambda outcome, counts: (
        Counter(name.split("_")[1] for name in outcome.ranks) == {part: int(n) for part, n in counts.items()}
    ),
    "ranks": lambda outcome, wanted: outcome.ranks == ranks_by_pattern(outcome.ranks, wanted),
    "rates": lambda outcome, rates: outcome.rates == pytest.approx(rates),
    "files": lambda outcome, count: len(list(outcome.folder.glob("*.safetensors"))) == count,
    "drawn": lambda outcome, count: len(list(outcome.folder.rglob("*.png"))) == count,
    "image_size": lambda outcome, size: image_size(outcome) == list(size),
    "batch_sizes": lambda outcome, sizes: datasets(outcome, "batch_size_per_device") == list(sizes),
    "resolutions": lambda outcome, sizes: datasets(outcome, "resolution") == [list(size) for size in sizes],
    "images": lambda outcome, counts: (
        [outcome.metadata[f"ss_num_{part}_images"] for part in ("train", "validation")] == [str(n) for n in counts]
    ),
    "caches": lambda outcome, counts: all(
        len(list(outcome.folder.parent.rglob(pattern))) == n for pattern, n in counts.items()
    ),
    "smaller_than": lambda outcome, name: outcome.file.stat().st_size < outcome.named[name].stat().st_size,
    "changed": lambda outcome, count: count == len(changes(outcome.file, outcome.named["model"])),
    "acts_like": lambda outcome, name: acts_like(outcome, name),
    "validations": lambda outcome, steps: validations(outcome) == list(steps),
}
"""Check -> whether an outcome is as it says. ``loss``, ``weights`` and ``refused`` are looked at beside these."""


def require(entry: Entry, outcome: Outcome, compared: Callable[[Entry], Outcome]) -> None:
    shows = dict(entry.shows)
    wanted = shows.pop("refused", "")
    assert wanted in outcome.refused and bool(wanted) == bool(outcome.refused), outcome.refused
    if wanted:
        return
    relations = {name: shows.pop(name) for name in ("loss", "weights") if name in shows}
    if relations:
        equal = close(outcome, compared(entry))
        assert {name: "same" if equal[name] else "differs" for name in relations} == relations
    for name, value in shows.items():
        assert CHECKS[name](outcome, value), (name, value)
    assert all(tensor.isfinite().all() for tensor in outcome.tensors.values())
    assert any(tensor.any() for key, tensor in outcome.tensors.items() if "lora_up" in key)


@pytest.fixture
def console():
    """The console as it was, after a program has set it up."""
    handlers, level, propagates = LOGGER.handlers[:], LOGGER.level, LOGGER.propagate
    yield
    LOGGER.handlers[:], LOGGER.propagate = handlers, propagates
    LOGGER.setLevel(level)


# ---- what the tests of every guide do --------------------------------------------------------------------------------


def walk_on(
    guide: Guide,
    entry: Entry,
    folder: Path,
    run: Callable[[Path, list[str]], Outcome],
    compared: Callable[[Entry], Outcome],
    models: Models,
    named: Mapping[str, Path],
    place: Path,
) -> None:
    """An entry of a kind that is run in this process: it has its effect, and nothing else goes without one."""
    options = [*model_options(entry, models), *entry_options(guide, entry, folder, place, named)]
    outcome = run(folder / "out", options)
    if not outcome.refused:
        assert outcome.no_effect == entry.no_effect
    require(entry, outcome, compared)


def run_command(guide: Guide, entry: Entry, models: Models, place: Path, folder: Path) -> Outcome:
    """A command word for word, in a folder that is not the project's; the launcher's own parser takes its words."""
    dataset = (place / guide.dataset).read_text(encoding="utf-8")
    dataset = dataset.replace("[[datasets]]", "[[datasets]]\nbatch_size = 2")
    (folder / guide.dataset).write_text(dataset, encoding="utf-8")
    text = smaller(entry.text).replace("\\\n", " ")
    for name in [name for name in guide.stands_for if name in text]:
        text = text.replace(name, str(models[entry.model].get(guide.stands_for[name], "out")))
    if not torch.cuda.is_available():
        text = text.replace('"fp16"', '"bf16"')
    words = [word for word in shlex.split(text) if word != "..."] + shlex.split(entry.beside)
    script, given = launched_script(words)
    result = run_in_process(script, *given)
    assert result.returncode == 0, result.stderr[-3000:]
    (output,) = {Path(word.partition("=")[2]) for word in given if word.startswith("--output_dir=")}
    return Outcome(folder / output, said=result.stderr)


def run_program(entry: Entry, named: Mapping[str, Path], folder: Path, patch: pytest.MonkeyPatch) -> Outcome:
    """Another program of the project, in this process; what it prints is the caller's to take."""
    outcome = Outcome(folder, named={**named, "out": folder})
    folder.mkdir()
    words = [*with_files(entry.text, outcome.named), *with_files(entry.beside, outcome.named)]
    assert (ROOT / words[0]).is_file()
    patch.setattr(sys, "argv", words)
    try:
        importlib.import_module(words[0].removesuffix(".py").replace("/", ".")).main()
    except SystemExit as ended:
        assert not ended.code
    return outcome


def require_shown(entry: Entry, outcome: Outcome) -> None:
    """A program's outcome is as its entry says."""
    shown = {name: CHECKS[name](outcome, value) for name, value in entry.shows.items()}
    assert shown == dict.fromkeys(entry.shows, True)


def require_well_formed(walk: Sequence[Entry]) -> None:
    """Ids are unique, and every entry shows something that is looked at."""
    assert len({entry.id for entry in walk}) == len(walk)
    for entry in walk:
        assert entry.shows and set(entry.shows) <= {*CHECKS, "loss", "weights", "refused"}, entry.id
        assert "<pattern>" not in str(entry.shows) and "<each>" not in entry.text
