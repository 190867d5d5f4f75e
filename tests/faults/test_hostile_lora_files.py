"""LoRA files that are sound to the format and senseless as LoRA: one sentence from trainers, inference and tools."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from library.errors import UserError
from networks import (
    check_lora_weights,
    convert_flux_lora,
    extract_lora_from_dylora,
    flux_merge_lora,
    lora,
    lora_flux,
    merge_lora,
    oft_flux,
    resize_lora,
    sdxl_merge_lora,
    svd_merge_lora,
)
from tests.hostile_files import hostile_headers, hostile_metadata
from tools import show_metadata

NAME = "lora_unet_double_blocks_0_img_attn_proj"
DOWN, UP, ALPHA = f"{NAME}.lora_down.weight", f"{NAME}.lora_up.weight", f"{NAME}.alpha"
SOUND = {DOWN: torch.randn(2, 8), UP: torch.randn(8, 2), ALPHA: torch.tensor(1.0)}
NAN, INFINITY = float("nan"), float("inf")
DIFFUSERS = "transformer.transformer_blocks.0.attn.to_"


def parts(*shapes: tuple[int, int, int]) -> dict[str, Tensor]:
    """q, k, v of these (out, rank, in)."""
    tensors = {}
    for name, (out, rank, width) in zip("qkv", shapes):
        tensors[f"{DIFFUSERS}{name}.lora_A.weight"] = torch.ones(rank, width)
        tensors[f"{DIFFUSERS}{name}.lora_B.weight"] = torch.ones(out, rank)
    return tensors


WRONG: dict[str, dict[str, Tensor]] = {
    "rank 0": {DOWN: torch.zeros(0, 8), UP: torch.zeros(8, 0)},
    "no inputs": {DOWN: torch.zeros(2, 0)},
    "other ranks": {DOWN: torch.ones(3, 8)},
    "vectors": {DOWN: torch.ones(8), UP: torch.ones(8)},
    "single numbers": {DOWN: torch.tensor(1.0), UP: torch.tensor(1.0)},
    "three dimensions": {DOWN: torch.ones(2, 8, 1), UP: torch.ones(8, 2, 1)},
    "whole numbers": {DOWN: torch.ones(2, 8, dtype=torch.int32)},
    "truth values": {UP: torch.ones(8, 2, dtype=torch.bool)},
    "NaN in down": {DOWN: torch.full((2, 8), NAN)},
    "infinity in up": {UP: torch.full((8, 2), INFINITY)},
    "NaN in fp8": {DOWN: torch.full((2, 8), NAN).to(torch.float8_e4m3fn)},
    "alpha is a matrix": {ALPHA: torch.ones(2, 2)},
    "alpha is a list": {ALPHA: torch.ones(3)},
    "alpha is empty": {ALPHA: torch.ones(0)},
    "alpha is NaN": {ALPHA: torch.tensor(NAN)},
    "alpha is infinite": {ALPHA: torch.tensor(-INFINITY)},
    "alpha beyond float32": {ALPHA: torch.tensor(1e300, dtype=torch.float64)},
    "alpha is NaN in fp8": {ALPHA: torch.tensor(NAN).to(torch.float8_e5m2)},
    "two adapters": {
        f"{NAME}.{half}.{adapter}.weight": torch.ones(shape)
        for adapter in ("a", "b")
        for half, shape in (("lora_A", (2, 8)), ("lora_B", (8, 2)))
    },
    "a number of 5,000 digits": {f"{NAME}_{'9' * 5000}_.lora_down.weight": torch.ones(2, 8)},
}
NAMED = {"infinity in up": UP, "NaN in down": DOWN, "NaN in fp8": DOWN, "alpha is NaN": ALPHA, "alpha is empty": ALPHA}


def transformer() -> nn.Module:
    """One layer under the names of FLUX."""
    block = type("DoubleStreamBlock", (nn.Module,), {})()
    block.img_attn = nn.Module()
    block.img_attn.proj, block.img_attn.qkv = nn.Linear(8, 8), nn.Linear(8, 24)
    model = nn.Module()
    model.double_blocks = nn.ModuleList([block])
    return model


def network_of(path: Path) -> object:
    return lora_flux.create_network_from_weights(1.0, path, None, None, transformer())


def weights_into(path: Path) -> object:
    return lora_flux.create_network(1.0, 2, 1.0, None, None, transformer()).load_weights(path)


def oft_of(path: Path) -> object:
    return oft_flux.create_network_from_weights(1.0, path, None, None, transformer())


def program(main: Callable[[list[str]], Any], *arguments: str) -> Callable[[Path], object]:
    """A program with the file in the place of ``FILE``, and a result beside it in that of ``OUT``."""

    def call(path: Path) -> object:
        places = {"FILE": str(path), "OUT": str(path.with_name("out.safetensors"))}
        return main([places.get(argument, argument) for argument in arguments])

    return call


MERGE = ("--models", "FILE", "--ratios", "1", "--save_to", "OUT")
LOADERS = {"dim_from_weights": network_of, "network_weights": weights_into}
TOOLS = {
    "resize": program(resize_lora.main, "--model", "FILE", "--save_to", "OUT", "--new_rank", "1"),
    "convert": program(convert_flux_lora.main, "--src_path", "FILE", "--dst_path", "OUT", "--dst", "ai-toolkit"),
    "flux merge": program(flux_merge_lora.main, *MERGE),
    "dylora": program(extract_lora_from_dylora.main, "--model", "FILE", "--save_to", "OUT"),
}
LOOKERS = {
    "check": program(check_lora_weights.main, "-s", "FILE"),
    "metadata": program(show_metadata.main, "FILE"),
    "sd merge": program(merge_lora.main, *MERGE),
    "sdxl merge": program(sdxl_merge_lora.main, *MERGE),
    "svd merge": program(svd_merge_lora.main, *MERGE),
    "oft": oft_of,
}


def says(reader: Callable[[Path], object], path: Path) -> str:
    """The one sentence with which the reader refuses."""
    with pytest.raises(UserError) as error:
        reader(path)
    sentence = str(error.value)
    assert "\n" not in sentence and not path.with_name("out.safetensors").exists()
    return sentence


@pytest.mark.parametrize("kind", WRONG)
def test_senseless_modules_are_refused_with_the_file_named(tmp_path, kind):
    path = tmp_path / "lora.safetensors"
    others = {} if kind == "two adapters" else SOUND
    save_file({**others, **WRONG[kind]}, path)
    readers = LOADERS | TOOLS
    if kind == "a number of 5,000 digits":
        readers = {name: TOOLS[name] for name in ("convert", "flux merge")}  # to others it is a name like any
    for name, reader in readers.items():
        sentence = says(reader, path)
        assert str(path) in sentence, (name, sentence)
        assert NAMED.get(kind, "") in sentence, (name, sentence)


@pytest.mark.parametrize("kind", WRONG)
def test_those_who_only_look_end_without_a_traceback(tmp_path, kind):
    path = tmp_path / "lora.safetensors"
    save_file({**SOUND, **WRONG[kind]}, path)
    for reader in LOOKERS.values():
        try:
            reader(path)
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("shapes", [((8, 2, 8), (8, 2, 4)), ((8, 2, 8), (7, 2, 8)), ((1, 1, 8), (1, 1, 8), (1, 1, 8))])
def test_parts_of_a_layer_that_do_not_fit_are_refused(tmp_path, shapes):
    path = tmp_path / "lora.safetensors"
    save_file(parts(*shapes), path)
    for reader in (*LOADERS.values(), TOOLS["convert"], TOOLS["flux merge"]):
        says(reader, path)


HEADERS = hostile_headers(save({key: SOUND[key] for key in (DOWN, UP)}))


@pytest.mark.parametrize("kind", HEADERS)
def test_hostile_headers_are_refused_by_every_reader(tmp_path, kind):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(HEADERS[kind])
    for name, reader in (LOADERS | TOOLS | LOOKERS).items():
        sentence = says(reader, path)
        assert str(path) in sentence and sentence.endswith("."), (name, sentence)


@pytest.mark.parametrize("kind", hostile_metadata())
def test_nonsense_in_the_metadata(tmp_path, kind):
    """Readers that need the entries refuse them, others ignore them; none ends in a traceback."""
    path = tmp_path / "lora.safetensors"
    save_file({key: SOUND[key] for key in (DOWN, UP)}, path, hostile_metadata()[kind])
    for reader in (LOADERS | TOOLS | LOOKERS).values():
        path.with_name("out.safetensors").unlink(missing_ok=True)
        try:
            reader(path)
        except UserError as error:
            assert "\n" not in str(error)


OFT = "oft_unet_double_blocks_0_img_attn_proj"
WRONG_OFT = {
    "no blocks": {f"{OFT}.oft_blocks.0": torch.zeros(0, 4, 4)},
    "a single number": {f"{OFT}.oft_blocks.0": torch.tensor(1.0)},
    "not square": {f"{OFT}.oft_blocks.0": torch.zeros(2, 4, 3)},
    "NaN": {f"{OFT}.oft_blocks.0": torch.full((2, 4, 4), NAN)},
    "whole numbers": {f"{OFT}.oft_blocks.0": torch.zeros(2, 4, 4, dtype=torch.int64)},
    "alpha is a matrix": {f"{OFT}.alpha": torch.ones(2, 2)},
    "alpha is NaN": {f"{OFT}.alpha": torch.tensor(NAN)},
}


@pytest.mark.parametrize("kind", WRONG_OFT)
def test_senseless_oft_is_refused(tmp_path, kind):
    path = tmp_path / "oft.safetensors"
    sound = {f"{OFT}.oft_blocks.0": torch.zeros(2, 4, 4), f"{OFT}.alpha": torch.tensor(0.1)}
    save_file(sound, path)
    oft_of(path)
    save_file({**sound, **WRONG_OFT[kind]}, path)
    assert str(path) in says(oft_of, path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_file_in_fp8_is_read_as_the_same_numbers(tmp_path, dtype):
    path = tmp_path / "lora.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in SOUND.items()}, path)
    network, tensors = lora_flux.create_network_from_weights(1.0, path, None, None, transformer())
    for key in (DOWN, UP):
        assert torch.equal(tensors[key].float(), SOUND[key].to(dtype).float())
    assert torch.equal(network.loras[0].down_matrix, SOUND[DOWN].to(dtype).float())
    for name in ("resize", "convert", "flux merge"):
        path.with_name("out.safetensors").unlink(missing_ok=True)
        TOOLS[name](path)
        assert path.with_name("out.safetensors").is_file()


@pytest.mark.parametrize("alpha", [NAN, INFINITY, -1.0])
def test_alpha_of_a_new_network_is_a_finite_number(alpha):
    with pytest.raises(UserError, match="--network_alpha"):
        lora_flux.create_network(1.0, 2, alpha, None, None, transformer())
    with pytest.raises(UserError, match="--network_alpha"):
        oft_flux.create_network(1.0, 2, alpha, None, None, transformer())


@pytest.mark.parametrize("value", ["inf", "nan", "9" * 5000, math.inf, 10**400, "1e999", "-1", "1.5"])
def test_ranks_in_network_args_are_whole_numbers(value):
    for module, argument in ((lora, "conv_dim"), (lora_flux, "img_mlp_dim")):
        with pytest.raises(UserError, match=f"--network_args: {argument} must be a whole number"):
            module.check_network_args({argument: value})
