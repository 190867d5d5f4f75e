"""A configuration file as the kohya_ss GUI writes it trains unchanged.

The files in ``reference_data/gui_config_*.toml`` have the keys and forms of values that the GUI's LoRA page writes (but
for paths and the number of steps): flat and sorted, lists that are empty, a number where a list is meant, a prompt file
that exists and is empty, keys that are the GUI's own.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tomli
from safetensors import safe_open

from library.console import set_up_console
from library.options import FRONT_END_KEYS, configured_value, declared_options, keys_of_other_scripts, parse_options
from tests.running import ROOT, forget_accelerator, launch, toml_value, trainer_class

GUI_FILES = sorted(path.stem.removeprefix("gui_config_") for path in (ROOT / "tests").glob("*/gui_config_*.toml"))
EMPTY = (
    "additional_parameters dataset_config huggingface_path_in_repo huggingface_repo_id huggingface_repo_type "
    "huggingface_repo_visibility huggingface_token log_config log_tracker_config log_tracker_name log_with "
    "lr_scheduler_type metadata_description metadata_license metadata_tags network_weights reg_data_dir resume "
    "training_comment vae wandb_api_key"
).split()
"""Text fields of the GUI that are written as empty strings where nobody filled them in."""


@pytest.fixture
def gui_file(request, tmp_path, image_folder):
    """The configuration file of a family with this test's paths; ``changes`` replaces or adds values."""

    def write(family: str, **changes: object) -> Path:
        images = tmp_path / "images" / "1_circle shape"
        if not images.exists():
            images.mkdir(parents=True)
            for number in range(4):
                for suffix in (".png", ".txt"):
                    shutil.copy(image_folder / f"{number:02d}{suffix}", images)
        output = tmp_path / "output"
        (output / "sample").mkdir(parents=True, exist_ok=True)
        (output / "sample" / "prompt.txt").write_text("", encoding="utf-8")
        paths = {"IMAGES": images.parent, "OUTPUT": output, "LOGS": tmp_path / "logs"}
        if family == "flux":
            files = request.getfixturevalue("tiny_flux")
            paths |= {"MODEL": files.transformer, "AUTOENCODER": files.autoencoder}
            paths |= {"CLIP_L": files.clip_l, "T5XXL": files.t5xxl}
        else:
            paths["MODEL"] = request.getfixturevalue(f"few_blocks_{family}")
        text = (ROOT / "tests" / "reference_data" / f"gui_config_{family}.toml").read_text(encoding="utf-8")
        for mark, path in paths.items():
            text = text.replace(f'"{mark}', f'"{Path(path).as_posix()}')
        values = {**tomli.loads(text), **changes}
        path = tmp_path / f"config_lora-{family}.toml"
        path.write_text("".join(f"{key} = {toml_value(values[key])}\n" for key in sorted(values)), encoding="utf-8")
        return path

    return write


@pytest.fixture
def train():
    def run(family: str, path: Path):
        forget_accelerator()
        options = parse_options(options_class(family), "test", ["--config_file", str(path)])
        set_up_console(options.console)
        trainer = trainer_class(family).of(options)
        trainer.train()
        return trainer

    return run


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize(
    "family", ["flux", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("sd1", "sdxl"))]
)
def test_it_trains_unchanged(train, gui_file, tmp_path, capsys, family):
    path = gui_file(family)
    assert 50 <= len(tomli.loads(path.read_text(encoding="utf-8"))) <= 75
    trainer = train(family, path)
    printed = capsys.readouterr().err
    found = metadata(tmp_path / "output" / "my_lora.safetensors")
    assert found["ss_network_dim"] == str(configured_value(["--config_file", str(path)], "network_dim"))
    assert found["ss_network_alpha"] == "16.0"
    assert found["ss_num_train_images"] == "4"
    assert trainer.progress.step == (2 if family == "sdxl" else 3)
    idle = next(line for line in printed.splitlines() if "no effect in this script" in line)
    assert {"epoch", "noise_offset_type"} <= set(idle.partition("script: ")[2].split(", "))
    if family != "sdxl":
        assert "contains no prompts" in printed


@pytest.mark.parametrize("family", GUI_FILES)
def test_empty_strings_and_lists_are_as_if_the_keys_were_not_there(gui_file, family):
    def read(path: Path):
        return parse_options(options_class(family), "test", ["--config_file", str(path)])

    assert read(gui_file(family)) == read(gui_file(family, **dict.fromkeys(EMPTY, "")))


@pytest.mark.thorough
def test_the_variant_with_empty_strings_trains(train, gui_file, tmp_path):
    train("sdxl", gui_file("sdxl", **dict.fromkeys(EMPTY, ""), sample_prompts="", text_encoder_lr=[]))
    assert (tmp_path / "output" / "my_lora.safetensors").is_file()


def test_it_trains_through_accelerate_launch(gui_file, tmp_path):
    """The one run of the ordinary set that the real launcher starts; several processes are in tests/scale."""
    result = launch("sdxl_train_network.py", "--config_file", gui_file("sdxl"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "output" / "my_lora.safetensors").is_file()
    assert "Traceback" not in result.stderr


def test_a_key_of_another_script_is_named_and_not_an_error():
    known = {family: set(declared_options(options_class(family))) for family in GUI_FILES}
    for family, names in known.items():
        for other, others in known.items():
            assert others - names <= FRONT_END_KEYS | keys_of_other_scripts(), f"{other}'s keys in a file for {family}"


def options_class(family: str) -> type:
    return trainer_class(family).options_class
