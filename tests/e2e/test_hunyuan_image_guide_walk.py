"""What the guide for HunyuanImage-2.1 says works: a walk along tests/reference_data/hunyuan_guide_walk.toml."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.documented import WALKS, cases
from tests.guide_walk import (
    Guide,
    compared,
    make_place,
    require,
    require_well_formed,
    run,
    run_command,
    walk_on,
)

__all__ = ["compared", "run"]  # fixtures
WALK = WALKS["hunyuan"]
GUIDE = Guide(
    family="hunyuan_image",
    dataset="my_hunyuan_dataset_config.toml",
    run="--network_module networks.lora_hunyuan_image",
    stands_for={
        "<path to HunyuanDiT model>": "pretrained_model_name_or_path",
        "<path to Qwen2.5-VL model>": "text_encoder",
        "<path to byT5 model>": "byt5",
        "<path to VAE model>": "vae",
        "<output directory>": "output_dir",
    },
)


@pytest.fixture(scope="module")
def guide() -> Guide:
    return GUIDE


@pytest.fixture(scope="module")
def models(tiny_hunyuan_image, tmp_path_factory) -> dict[str, dict[str, Path | str]]:
    """The files by the option that names them; ``deep`` has as many blocks as the published transformer."""
    from library.models.hunyuan_image.transformer import HunyuanImageTransformer
    from library.safetensors_io import save_file
    from tools.make_tiny_models import HUNYUAN_IMAGE, fill_randomly

    deep = HunyuanImageTransformer(replace(HUNYUAN_IMAGE, depth=20, depth_single=40))
    fill_randomly(deep, 0, "deep hunyuan image")
    path = tmp_path_factory.mktemp("walk_models") / "deep.safetensors"
    save_file(deep.state_dict(), path)
    tiny = tiny_hunyuan_image
    files: dict[str, Path | str] = {
        "pretrained_model_name_or_path": tiny.transformer,
        "text_encoder": tiny.text_encoder,
        "byt5": tiny.byt5,
        "vae": tiny.autoencoder,
        "network_train_unet_only": "",
    }
    return {"hunyuan": files, "deep": files | {"pretrained_model_name_or_path": path}}


@pytest.fixture(scope="module")
def named() -> dict[str, Path]:
    return {}


@pytest.fixture(scope="module")
def place(tmp_path_factory, image_folder) -> Path:
    """The folder of images and the dataset file."""
    return make_place(tmp_path_factory.mktemp("walk"), GUIDE, image_folder)


@pytest.mark.parametrize("entry", cases(e for e in WALK if e.kind != "command"))
def test_what_the_guide_says_works(entry, run, compared, models, named, place, tmp_path):
    walk_on(GUIDE, entry, tmp_path, run, compared, models, named, place)


@pytest.mark.slow
@pytest.mark.parametrize("entry", cases(e for e in WALK if e.kind == "command"))
def test_the_commands_of_the_guide(entry, models, place, compared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    require(entry, run_command(GUIDE, entry, models, place, tmp_path), compared)


def test_the_list_is_well_formed():
    require_well_formed(WALK)
