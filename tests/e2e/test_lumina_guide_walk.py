"""What the guide for Lumina says works: a walk along the list of tests/reference_data/lumina_guide_walk.toml."""

from __future__ import annotations

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
WALK = WALKS["lumina"]
GUIDE = Guide(
    family="lumina",
    dataset="my_lumina_dataset_config.toml",
    run="--network_module networks.lora_lumina",
    stands_for={
        "lumina-image-2.safetensors": "pretrained_model_name_or_path",
        "gemma-2-2b.safetensors": "gemma2",
        "ae.safetensors": "ae",
    },
)


@pytest.fixture(scope="module")
def guide() -> Guide:
    return GUIDE


@pytest.fixture(scope="module")
def models(tiny_lumina) -> dict[str, dict[str, Path | str]]:
    """The tiny model's files by the option that names them."""
    names = {"pretrained_model_name_or_path": "transformer", "gemma2": "gemma2", "ae": "autoencoder"}
    return {"lumina": {name: getattr(tiny_lumina, part) for name, part in names.items()}}


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
