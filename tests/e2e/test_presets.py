"""The configurations in configs/ are taken by their scripts, and fit into the GPUs that their names say."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import toml

from library.families import by_model
from library.memory.budget import GIB, usable
from library.options import changed_options, declared_options, parse_options, read_config_file
from library.training.plan.budget import Needs, StoredModel, needs_of, stored_model
from tests.docs.pages import blocks, commands, launched
from tests.full_size import full_flux, full_hunyuan_image, full_lumina, full_stable_diffusion
from tests.running import ROOT, make_trainer, no_weights_are_read, trainer_class

PRESETS = sorted((ROOT / "configs").glob("*.toml"))
FAMILIES = sorted({path.stem.rpartition("_")[0] for path in PRESETS})
FILES = ("pretrained_model_name_or_path", "clip_l", "t5xxl", "ae", "dataset_config", "output_dir")
GUIDE = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")


def presets_of(family: str) -> list[tuple[Path, int]]:
    """Presets of a family, each with its GPU's memory in GiB, the smallest last."""
    found = {path: int(re.fullmatch(r"[a-z0-9_]+_(\d+)gb", path.stem)[1]) for path in PRESETS}
    return sorted(
        ((path, size) for path, size in found.items() if path.stem.startswith(family + "_")), key=lambda x: -x[1]
    )


def expected(path: Path) -> tuple[float, float]:
    """The figures of its comment: GiB on the device and in system RAM."""
    found = re.search(
        r"^# .*: ([\d.]+) GiB on the device, ([\d.]+) GiB of system RAM", path.read_text(encoding="utf-8"), re.M
    )
    assert found, path
    return float(found[1]), float(found[2])


def words_of(family: str, folder: Path, data: Path) -> list[object]:
    """What is filled into a family's presets."""
    if family in ("flux", "chroma"):
        files: Any = full_flux(folder, family)
        paths: list[object] = ["--pretrained_model_name_or_path", files.transformer, "--t5xxl", files.t5xxl]
        paths += ["--ae", files.autoencoder, *(["--clip_l", files.clip_l] if files.clip_l else [])]
    elif family == "hunyuan_image":
        files = full_hunyuan_image(folder)
        paths = ["--pretrained_model_name_or_path", files.transformer, "--text_encoder", files.text_encoder]
        paths += ["--byt5", files.byt5, "--vae", files.autoencoder]
    elif family == "lumina":
        files = full_lumina(folder)
        paths = ["--pretrained_model_name_or_path", files.transformer, "--gemma2", files.gemma2]
        paths += ["--ae", files.autoencoder]
    else:
        paths = ["--pretrained_model_name_or_path", full_stable_diffusion(folder, family)]
    return [*paths, "--dataset_config", data, "--output_dir", folder, "--max_train_epochs", "1"]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_taken_whole(path):
    known = declared_options(trainer_class(path.stem.rpartition("_")[0]).options_class)
    keys = {key for table in toml.loads(path.read_text(encoding="utf-8")).values() for key in table}
    assert set(read_config_file(path, known)) == keys  # none of them without effect
    text = path.read_text(encoding="utf-8")
    script = by_model(path.stem.rpartition("_")[0]).file
    assert f"accelerate launch {script} --config_file configs/{path.name}" in text
    device, host = expected(path)
    assert re.search(rf"`{path.name}`.*\| {device:g} GiB \| {host:g} GiB \|", GUIDE), f"{path.name} in docs/memory.md"


@pytest.mark.parametrize("name", ["flux_12gb", "sd1_8gb"])
def test_a_preset_trains_what_lies_in_its_folders(name, request, tmp_path, image_folder, monkeypatch):
    """Nothing is filled in: the model is in models/, images and captions are in images/, the LoRA goes to output/."""
    family = name.partition("_")[0]
    shutil.copytree(image_folder, tmp_path / "images")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "models").mkdir()
    preset = toml.loads((tmp_path / "configs" / f"{name}.toml").read_text(encoding="utf-8"))
    files = {key: value for key, value in preset["files"].items() if value.startswith("models/")}
    if family == "sd1":
        sources = {"pretrained_model_name_or_path": request.getfixturevalue("few_blocks_sd1")}
    else:
        tiny = request.getfixturevalue(f"tiny_{family}")
        sources = {"pretrained_model_name_or_path": tiny.transformer, "ae": tiny.autoencoder}
        sources |= {key: getattr(tiny, key) for key in files.keys() - sources}
    for key, target in files.items():
        (tmp_path / target).symlink_to(sources[key])
    monkeypatch.chdir(tmp_path)
    few_blocks = ["--blocks_to_swap", "0"] if family == "flux" else []
    words = ["--config_file", f"configs/{name}.toml", "--optimizer_type", "AdamW", *few_blocks]
    trainer = make_trainer(family, *words)
    for step in ("check_options", "prepare_output", "check_network", "start_processes", "read_data", "plan_steps"):
        getattr(trainer, step)()
    with no_weights_are_read():
        trainer.open_pipeline()
    assert trainer.data.train.batches_per_epoch(1) == 10 * len(list((tmp_path / "images").glob("*.png")))
    assert (tmp_path / "output").is_dir()


def test_the_tables_for_newcomers_say_the_same():
    """README and the FLUX.1 guide name each of its files with its GPU and what is predicted."""
    pages = [ROOT / "README.md", ROOT / "docs" / "flux_train_network.md"]
    for path, size in presets_of("flux"):
        device, host = expected(path)
        for page in pages:
            (row,) = re.findall(rf"^\| {size} GB \| .*{path.name}.*$", page.read_text(encoding="utf-8"), re.M)
            assert [float(number) for number in re.findall(r"([\d.]+) GiB", row)[:2]] == [
                pytest.approx(device, abs=0.051),
                pytest.approx(host, abs=0.051),
            ], (page, row)


def test_the_guide_spells_a_preset_out():
    """The long command of the FLUX.1 guide has the options of configs/flux_12gb.toml."""
    shown = [block for block in blocks("bash") if block.page.stem == "flux_train_network" and "--clip_l=" in block.text]
    (words,) = commands(shown[0])
    options_class = trainer_class("flux").options_class
    preset = parse_options(options_class, "", ["--config_file", str(ROOT / "configs" / "flux_12gb.toml")])
    spelled, read = (
        {name: value for name, value in changed_options(options).items() if name not in own}
        for options, own in (
            (parse_options(options_class, "", words[launched(words) + 1 :]), {*FILES, "sdpa"}),
            (preset, {*FILES, "config_file"}),
        )
    )
    assert spelled == read and len(read) > 15


def test_every_family_has_presets():
    assert FAMILIES == ["chroma", "flux", "hunyuan_image", "lumina", "sd1", "sdxl"]
    for family in ("chroma", "flux", "lumina", "sdxl"):
        assert [size for _, size in presets_of(family)] == [24, 16, 12, 10, 8]


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    # The plans of the others are made in the same way; tests/e2e/test_memory_estimate.py measures those of U-Nets.
    [family if family == "lumina" else pytest.param(family, marks=pytest.mark.thorough) for family in FAMILIES],
)
def test_presets_fit_into_their_gpus_by_the_plan(family, tmp_path):
    """The published model in its true size: a step is simulated once, its weights are added for each preset."""
    from PIL import Image

    side = 512 if family == "sd1" else 1024
    (tmp_path / "images").mkdir()
    Image.new("RGB", (side, side)).save(tmp_path / "images" / "a.png")
    data = tmp_path / "data.toml"
    data.write_text(
        f"[general]\nresolution = {side}\n[[datasets]]\nbatch_size = 1\n"
        f'[[datasets.subsets]]\nimage_dir = "{tmp_path / "images"}"\nclass_tokens = "a cat"\n',
        encoding="utf-8",
    )
    words = words_of(family, tmp_path, data)
    needs: Needs | None = None
    models: dict[bool, StoredModel | None] = {}
    for path, size in presets_of(family):
        trainer = make_trainer(family, "--config_file", path, *words)
        for step in ("check_options", "prepare_output", "check_network", "start_processes", "read_data", "plan_steps"):
            getattr(trainer, step)()
        with no_weights_are_read():
            needs = needs or needs_of(trainer)
            needs.on_host = frozenset(trainer.make_pipeline().on_host)  # what is simulated does not depend on it
            precision, streaming = trainer.options.precision, trainer.options.streaming
            if precision.fp8_scaled not in models:
                parts = frozenset(part for phase in needs.phases for part in phase.parts)
                models[precision.fp8_scaled] = stored_model(trainer, {}, parts)
        assert not (precision.fp8_base or precision.fp8_base_unet or precision.base_format)
        model = models[precision.fp8_scaled]
        assert model is not None
        device, host = needs.of(
            model, precision.gradient_checkpointing, streaming.blocks_to_swap or 0, streaming.stream_text_encoders
        )
        assert device <= usable(size * GIB), path
        assert (device / GIB, host / GIB) == pytest.approx(expected(path), abs=0.06), path
