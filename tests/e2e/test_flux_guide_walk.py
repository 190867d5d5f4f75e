"""What the guide for FLUX.1 says works: a walk along the list of tests/reference_data/flux_guide_walk.toml."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.documented import WALKS, cases
from tests.guide_walk import (
    Guide,
    compared,
    console,
    make_place,
    require,
    require_shown,
    require_well_formed,
    run,
    run_command,
    run_program,
    walk_on,
    with_files,
)
from tests.running import run_in_process

__all__ = ["compared", "console", "run"]  # fixtures
WALK = WALKS["flux"]
GUIDE = Guide(
    family="flux",
    dataset="my_flux_dataset_config.toml",
    run="--network_module networks.lora_flux --t5xxl_max_token_length 16",
    stands_for={
        "<path to FLUX.1 model>": "pretrained_model_name_or_path",
        "<path to Chroma model>": "pretrained_model_name_or_path",
        "<path to CLIP-L model>": "clip_l",
        "<path to T5-XXL model>": "t5xxl",
        "<path to AE model>": "ae",
        "<output directory>": "output_dir",
    },
)


@pytest.fixture(scope="module")
def guide() -> Guide:
    return GUIDE


@pytest.fixture(scope="module")
def models(tiny_flux, tiny_chroma, tmp_path_factory) -> dict[str, dict[str, Path | str | tuple[str, ...]]]:
    """The files of each kind of model by the option that names them; of the deep one, the ends are trained."""
    from library.models.flux.transformer import FluxTransformer
    from library.safetensors_io import save_file
    from tools.make_tiny_models import fill_randomly, make_tiny_flux, transformer_config

    folder = tmp_path_factory.mktemp("walk_models")
    deep = FluxTransformer(replace(transformer_config(), depth=19, depth_single=38))
    fill_randomly(deep, 0, "deep flux")
    save_file(deep.state_dict(), folder / "deep.safetensors")
    schnell = make_tiny_flux(folder / "schnell", variant="schnell")
    found = {"flux": tiny_flux, "schnell": schnell, "chroma": tiny_chroma}
    names = {"pretrained_model_name_or_path": "transformer", "clip_l": "clip_l", "t5xxl": "t5xxl", "ae": "autoencoder"}
    files: dict[str, dict[str, Path | str | tuple[str, ...]]] = {
        kind: {name: path for name, part in names.items() if (path := getattr(tiny, part))}
        for kind, tiny in found.items()
    }
    files["deep"] = {**files["flux"], "pretrained_model_name_or_path": folder / "deep.safetensors"}
    files["deep"]["network_args"] = ("train_double_block_indices=0,18", "train_single_block_indices=0,37")
    files["chroma"] |= {"model_type": "chroma", "apply_t5_attn_mask": ""}
    return files


@pytest.fixture(scope="module")
def named(models, tiny_controlnet, place, tmp_path_factory) -> dict[str, Path]:
    """The files that entries name in angle brackets, apart from those that are trained first."""
    from library.safetensors_io import save_file

    folder = tmp_path_factory.mktemp("walk_files")
    flux = models["flux"]
    shutil.copytree(flux["t5xxl"].parent / "tokenizer_2", folder / "tokenizer_2")
    t5 = load_file(flux["t5xxl"])
    for name, dtype in {"t5_fp16": torch.float16, "t5_fp8": torch.float8_e4m3fn}.items():
        save_file({key: tensor.to(dtype) for key, tensor in t5.items()}, folder / f"{name}.safetensors")
    found = {name: folder / f"{name}.safetensors" for name in ("t5_fp16", "t5_fp8")}
    found |= {name: flux[name] for name in ("clip_l", "t5xxl", "ae")}
    found |= {kind: models[kind]["pretrained_model_name_or_path"] for kind in ("flux", "chroma")}
    found["model"] = found["flux"]
    return found | {"controlnet": tiny_controlnet, "controlled": place / "controlled.toml"}


@pytest.fixture(scope="module")
def place(tmp_path_factory, image_folder) -> Path:
    """The folder of images and dataset files; one of them has control images."""
    folder = make_place(tmp_path_factory.mktemp("walk"), GUIDE, image_folder)
    (folder / "control").mkdir()
    for number in range(2):
        Image.linear_gradient("L").resize((80, 80)).convert("RGB").save(folder / "control" / f"{number}.png")
    text = (folder / GUIDE.dataset).read_text(encoding="utf-8")
    text += f'conditioning_data_dir = "{(folder / "control").as_posix()}"\n'
    (folder / "controlled.toml").write_text(text, encoding="utf-8")
    return folder


IN_PROCESS = [entry for entry in WALK if entry.kind not in ("command", "program")]


@pytest.mark.parametrize("entry", cases(IN_PROCESS))
def test_what_the_guide_says_works(entry, run, compared, models, named, place, tmp_path):
    walk_on(GUIDE, entry, tmp_path, run, compared, models, named, place)


@pytest.mark.slow
@pytest.mark.parametrize("entry", cases(e for e in WALK if e.kind == "command"))
def test_the_commands_of_the_guide(entry, models, place, compared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    require(entry, run_command(GUIDE, entry, models, place, tmp_path), compared)


@pytest.fixture(scope="module")
def trained(run, models, named, tmp_path_factory) -> dict[str, Path]:
    """Those files too that are trained first: a LoRA, one with split_qkv, and the model with the first in it."""
    folder = tmp_path_factory.mktemp("walk_trained")
    flux = [f"--{name}={path}" for name, path in models["flux"].items()]
    found = dict(named)
    for name, options in {"lora": [], "split_lora": ["--network_args", "split_qkv=True"]}.items():
        found[name] = run(folder / name, [*flux, "--network_train_unet_only", *options]).file
    found["merged"] = folder / "merged.safetensors"
    merge = "--flux_model <flux> --models <lora> --ratios 1 --save_to <merged>"
    assert run_in_process("networks/flux_merge_lora.py", *with_files(merge, found)).returncode == 0
    return found


@pytest.mark.parametrize("entry", cases(e for e in WALK if e.kind == "program"))
def test_other_programs_of_the_guide(entry, trained, console, tmp_path, monkeypatch, capsys):
    outcome = run_program(entry, trained, tmp_path / "out", monkeypatch)
    outcome.said = capsys.readouterr().out
    require_shown(entry, outcome)


def test_the_list_is_well_formed():
    require_well_formed(WALK)
