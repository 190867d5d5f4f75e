"""The caching tools leave exactly the files that the training with the same options then uses."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from library.errors import UserError
from library.options import parse_options
from tests.running import trainer_class
from tools.cache_run import run_tool

SUFFIXES = {
    "sd1": ("_sd.npz", "_sd_te.npz"),
    "sdxl": ("_sdxl.npz", "_te_outputs.npz"),
    "flux": ("_flux.npz", "_flux_te.npz"),
}
SWITCHES: dict[str, list[str]] = {"sd1": [], "sdxl": ["--sdxl"], "flux": ["--flux"]}


@pytest.fixture
def fresh_state():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def reset() -> None:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    yield reset
    reset()


@pytest.fixture
def folder(tmp_path, image_folder) -> Path:
    """Four images without caches."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        for suffix in (".png", ".txt"):
            shutil.copy(image_folder / f"{number:02d}{suffix}", folder)
    return folder


@pytest.fixture
def command(request, folder, dataset_toml):
    """The options that training and caching share."""

    def options(family: str, **dataset: object) -> list[str]:
        dataset = {"bucket_reso_steps": 64, "resolution": 64, "max_bucket_reso": 128, "flip_aug": True, **dataset}
        given = [*request.getfixturevalue(f"{family}_command"), "--network_train_unet_only"]
        given += ["--dataset_config", dataset_toml(folder=folder, **dataset), "--validation_split", 0.25]
        given += ["--max_data_loader_n_workers", 0, "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]
        return [str(value) for value in given]

    return options


@pytest.fixture
def train(tmp_path, fresh_state):
    def run(family: str, command: list[str]) -> Any:
        fresh_state()
        kind = trainer_class(family)
        more = ["--max_train_steps", "1", "--output_dir", str(tmp_path / "out")]
        trainer = kind.of(parse_options(kind.options_class, "test", [*command, *more]))
        trainer.train()
        return trainer

    return run


@pytest.fixture
def cache(fresh_state):
    def run(subject: str, family: str, command: list[str], *more: str) -> Any:
        fresh_state()
        return run_tool(subject, "test", [*command, *SWITCHES[family], *more])

    return run


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.glob("*.npz"))}


def arrays(folder: Path) -> dict[tuple[str, str], numpy.ndarray]:
    found = {}
    for path in sorted(folder.glob("*.npz")):
        with numpy.load(path) as archive:
            found |= {(path.name, name): archive[name] for name in archive.files}
    return found


@pytest.mark.parametrize("family", [pytest.param("sd1", marks=pytest.mark.thorough), "sdxl", "flux"])
def test_training_uses_the_files_as_they_are_and_loads_no_encoder(command, cache, train, folder, monkeypatch, family):
    given = command(family)
    for subject in ("latents", "text"):
        report = cache(subject, family, given)
        assert (report.kept, report.made) == (0, 4)
    made = files(folder)
    for suffix in SUFFIXES[family]:
        assert sum(name.endswith(suffix) for name in made) == 4

    room, pipeline = ("flux", "FluxPipeline") if family == "flux" else ("stable_diffusion", "StableDiffusionPipeline")
    for name in ("load_autoencoder", "load_text_encoders"):
        forbid(monkeypatch, getattr(importlib.import_module(f"library.models.{room}.pipeline"), pipeline), name)
    assert train(family, given).progress.step == 1
    assert files(folder) == made


def forbid(monkeypatch, owner: type, name: str) -> None:
    """Whoever calls the method, but for no encoder at all, fails."""
    real = getattr(owner, name)

    def refuse(self, *encoders):
        assert encoders == ((),), f"{name} was called"
        return real(self, *encoders)

    monkeypatch.setattr(owner, name, refuse)


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.thorough), "flux"])
def test_the_files_are_those_that_training_would_make(command, cache, train, folder, family):
    given = command(family)
    train(family, given)
    by_training = arrays(folder)
    for path in folder.glob("*.npz"):
        path.unlink()
    cache("latents", family, given)
    cache("text", family, given)
    made = arrays(folder)
    assert made.keys() == by_training.keys()
    for file, name in made:
        assert numpy.array_equal(made[file, name], by_training[file, name]), (file, name)


def test_only_what_no_longer_fits_is_made_anew(command, cache, folder, capsys):
    given = command("flux")
    cache("latents", "flux", given)
    cache("text", "flux", given)
    before = files(folder)
    damaged = next(folder.glob("00_*_flux.npz"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    with Image.open(folder / "01.png") as image:
        Image.new("RGB", image.size, (1, 2, 3)).save(folder / "01.png")
    next(folder.glob("02_*_flux.npz")).unlink()
    (folder / "03.txt").write_text("another caption", encoding="utf-8")
    report = cache("latents", "flux", given)
    assert (report.kept, report.made, dict(report.rebuilt)) == (1, 3, {"damaged": 1, "stale": 1})
    assert "finished; latent cache: 1 kept, 3 made, 2 rebuilt (1 damaged, 1 stale)" in capsys.readouterr().err
    report = cache("text", "flux", given)
    assert (report.kept, report.made, dict(report.rebuilt)) == (3, 1, {"stale": 1})
    changed = {name for name, content in files(folder).items() if content != before[name]}
    assert {name[:2] for name in changed if name.endswith("_flux.npz")} == {"00", "01", "02"}
    assert {name for name in changed if name.endswith("_te.npz")} == {"03_flux_te.npz"}


def test_a_dry_run_counts_and_writes_nothing(command, cache, folder, capsys):
    cache("latents", "flux", command("flux"), "--dry_run")
    assert not files(folder)
    assert "3 of 3 entries would be made" in capsys.readouterr().err


def test_nothing_is_asked_for_that_only_training_needs(tiny_flux, dataset_toml, folder, cache):
    shared = ["--pretrained_model_name_or_path", tiny_flux.transformer, "--dataset_config", dataset_toml(folder=folder)]
    latents = cache("latents", "flux", [str(value) for value in [*shared, "--ae", tiny_flux.autoencoder]])
    encoders = ["--clip_l", tiny_flux.clip_l, "--t5xxl", tiny_flux.t5xxl, "--t5xxl_dtype", "bf16"]
    text = cache("text", "flux", [str(value) for value in [*shared, *encoders]])
    assert latents.made == text.made == 4


def test_the_family_may_stand_in_the_configuration_file(tiny_sdxl, dataset_toml, folder, fresh_state, tmp_path):
    fresh_state()
    path = tmp_path / "config.toml"
    path.write_text(
        f'sdxl = true\npretrained_model_name_or_path = "{tiny_sdxl.as_posix()}"\n'
        f'dataset_config = "{dataset_toml(folder=folder).as_posix()}"\nepoch = 1\n',
        encoding="utf-8",
    )
    assert run_tool("latents", "test", ["--config_file", str(path)]).made == 4
    assert len(list(folder.glob("*_sdxl.npz"))) == 4


def test_mistakes_are_named(command, cache, tiny_sdxl, tiny_sd1):
    with pytest.raises(UserError, match="is a Stable Diffusion XL model; add --sdxl"):
        cache("latents", "sd1", command("sdxl"))
    with pytest.raises(UserError, match="is a Stable Diffusion 1.x model; leave out --sdxl"):
        cache("latents", "sdxl", command("sd1"))
    with pytest.raises(UserError, match="--sdxl and --flux are mutually exclusive"):
        cache("latents", "sdxl", command("sdxl"), "--flux")
    with pytest.raises(UserError, match="shuffle_caption"):
        cache("text", "flux", command("flux", subset={"shuffle_caption": True}))
