"""Hostile files in every place of a command line: exit code 2 and one sentence, before weights are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from library.families import FLUX
from tests.families.families import TINY
from tests.hostile_files import hostile_headers
from tests.running import no_weights_are_read, run_in_process

HEADERS = ("seven bytes", "data cut", "nesting of arrays", "shape is infinite", "negative shape", "metadata nested")
LORA = {"lora_unet_x.lora_down.weight": torch.ones(2, 8), "lora_unet_x.lora_up.weight": torch.ones(8, 2)}


def senseless(tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The names of a sound model with shapes that none has."""
    yield "single numbers", {name: torch.ones(()) for name in tensors}
    yield "vectors", {name: tensor.flatten() for name, tensor in tensors.items()}
    yield "one dimension more", {name: tensor[None] for name, tensor in tensors.items()}
    yield "no elements", {name: tensor[:0] if tensor.dim() else tensor for name, tensor in tensors.items()}
    yield "no inputs", {name: tensor[..., :0].clone() if tensor.dim() else tensor for name, tensor in tensors.items()}


def hostile(sound: Path | dict[str, Tensor], folder: Path) -> Iterator[tuple[str, Path]]:
    """Files made from a sound one (or its tensors), by what is wrong with them; each takes the last one's place."""
    path = folder / "hostile.safetensors"
    is_model = isinstance(sound, Path)
    headers = hostile_headers(sound.read_bytes() if is_model else save(sound))
    for kind in HEADERS:
        path.write_bytes(headers[kind])
        yield kind, path
    for kind, tensors in senseless(load_file(sound)) if is_model else ():
        save_file(tensors, path)
        yield kind, path


def refuses(script: str, arguments: list[object], path: Path, where: str) -> None:
    """The script must say in one sentence what is wrong with the file, and read nothing of any model."""
    with no_weights_are_read():
        result = run_in_process(script, *arguments)
    _, found, sentence = result.stderr.partition("error: ")
    assert result.returncode == 2 and found, f"{where}: exit {result.returncode}: {result.stderr[-2000:]}"
    assert str(path) in sentence and "\n" not in sentence.strip(), f"{where}: {sentence}"


def places(model: str, files: Any) -> dict[str, Path]:
    """The options of a training script that name files of a model, each with its sound file."""
    if model in FLUX.model_names:
        parts = {"--pretrained_model_name_or_path": files.transformer, "--ae": files.autoencoder}
        parts |= {"--t5xxl": files.t5xxl, "--clip_l": files.clip_l}
        return {option: Path(path) for option, path in parts.items() if path}
    return {"--pretrained_model_name_or_path": files, "--vae": files}


@pytest.mark.parametrize(
    "model", ["sd1", "flux", *(pytest.param(model, marks=pytest.mark.thorough) for model in ("sdxl", "chroma"))]
)
def test_training_scripts_refuse_hostile_files(request, dataset_toml, tmp_path, model):
    files = request.getfixturevalue(f"{'few_blocks' if model.startswith('sd') else 'tiny'}_{model}")
    family = TINY[model]
    given = [*family.command(files), "--dataset_config", dataset_toml(bucket_reso_steps=64)]
    given += ["--output_dir", tmp_path / "out", "--max_train_steps", "1", "--no_report"]
    for option, sound in places(model, files).items():
        for kind, path in hostile(sound, tmp_path):
            refuses(family.script, [*given, option, path], path, f"{option} with {kind}")
    for option in ("--network_weights", "--base_weights"):
        for kind, path in hostile(LORA, tmp_path):
            refuses(family.script, [*given, option, path], path, f"{option} with {kind}")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("script", "model", "arguments"),
    [
        ("networks/flux_extract_lora.py", "flux", "--model_org SOUND --model_tuned FILE"),
        pytest.param(
            *("networks/flux_extract_lora.py", "chroma", "--model_org FILE --model_tuned SOUND"),
            marks=pytest.mark.thorough,
        ),
        ("networks/lumina_extract_lora.py", "lumina", "--model_org SOUND --model_tuned FILE"),
        ("networks/hunyuan_image_extract_lora.py", "hunyuan_image", "--model_org SOUND --model_tuned FILE"),
        ("networks/extract_lora_from_models.py", "sd1", "--model_org SOUND --model_tuned FILE"),
        pytest.param(
            *("networks/extract_lora_from_models.py", "sdxl", "--model_org FILE --model_tuned SOUND --sdxl"),
            marks=pytest.mark.thorough,
        ),
        ("tools/convert_diffusers_to_flux.py", "flux", "--diffusers_path FILE"),
    ],
)
def test_programs_that_read_models_refuse_hostile_files(request, tmp_path, script, model, arguments):
    files = request.getfixturevalue(f"{'few_blocks' if model.startswith('sd') else 'tiny'}_{model}")
    sound = Path(getattr(files, "transformer", files))
    for kind, path in hostile(sound, tmp_path):
        words = [{"SOUND": sound, "FILE": path}.get(word, word) for word in arguments.split()]
        refuses(script, [*words, "--save_to", tmp_path / "out.safetensors"], path, kind)
        assert not (tmp_path / "out.safetensors").exists()


def test_weights_that_are_whole_numbers_are_refused(tiny_flux, flux_command, dataset_toml, tmp_path):
    path = tmp_path / "whole.safetensors"
    sound = load_file(tiny_flux.transformer)
    save_file({name: tensor.to(torch.int32) for name, tensor in sound.items()}, path)
    given = [*flux_command, "--dataset_config", dataset_toml(), "--output_dir", tmp_path / "out"]
    given += ["--max_train_steps", "1", "--no_report", "--pretrained_model_name_or_path", path]
    result = run_in_process(FLUX.file, *given)
    assert result.returncode == 2
    assert f"{path}: tensor " in result.stderr and "is int32, but weights must be floating-point" in result.stderr
