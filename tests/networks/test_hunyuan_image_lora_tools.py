"""The tools for LoRA files on those of HunyuanImage-2.1: merged, extracted, resized, in one rank, checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from library import families
from library.errors import UserError
from library.models.hunyuan_image.checkpoint import open_transformer
from library.models.loading import LoadSpec
from networks import check_lora_weights, lora_hunyuan_image, resize_lora, svd_merge_lora
from networks.convert_flux_lora import main as convert_flux
from networks.convert_hunyuan_image_lora_to_comfy import main as convert
from networks.hunyuan_image_extract_lora import main as extract
from networks.hunyuan_image_merge_lora import main as merge
from tests.networks.lora_tool_files import assert_same, deltas, metadata, ranks, run, write_lora
from tests.parity.test_hunyuan_image_transformer_matches_diffusers import inputs
from tools.make_tiny_models import HUNYUAN_IMAGE, make_tiny_hunyuan_image

RATIOS = (0.7, -0.4)
VERSION = {"ss_base_model_version": "hunyuan-image-2.1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_hunyuan_image(tmp_path_factory.mktemp("hunyuan")).transformer


def opened(path: Path) -> nn.Module:
    return open_transformer(path).load(LoadSpec.of(torch.float32))


def make_lora(model: Path, path: Path, seed: int, rank: int = 3, alpha: float = 2.0, **arguments: str) -> Path:
    """A LoRA with random numbers."""
    network = lora_hunyuan_image.create_network(
        1.0, rank, alpha, None, None, open_transformer(model).meta_module(), **arguments
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.08, generator=generator)
    network.save_weights(path, None, {**VERSION, "modelspec.title": f"LoRA {seed}"})
    return path


@pytest.fixture(scope="module")
def loras(model, tmp_path_factory) -> list[Path]:
    """Two files of different ranks, alphas and modules."""
    place = tmp_path_factory.mktemp("loras")
    return [
        make_lora(model, place / "a.safetensors", 1),
        make_lora(model, place / "b.safetensors", 2, 2, 4.0, split_qkv="True", train_blocks="single"),
    ]


@pytest.fixture
def in_comfyui(loras, tmp_path) -> Path:
    """The first file under ComfyUI's names."""
    run(convert, loras[0], tmp_path / "comfyui.safetensors")
    return tmp_path / "comfyui.safetensors"


def velocity(transformer: nn.Module) -> Tensor:
    with torch.no_grad():
        return transformer(**inputs(HUNYUAN_IMAGE, (5, 8), (3, 0)))


def applied(model: Path, files: list[Path], ratios: tuple[float, ...]) -> Tensor:
    """The velocity with networks at work beside the model."""
    transformer = opened(model)
    for path, ratio in zip(files, ratios):
        network, _ = lora_hunyuan_image.create_network_from_weights(ratio, path, None, None, transformer)
        network.eval().apply_to(None, transformer)
    return velocity(transformer)


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [pytest.param("original", marks=pytest.mark.thorough), "comfyui"])
def test_a_merged_model_does_what_the_files_do_and_keeps_its_layout(model, loras, tmp_path, layout):
    source = make_tiny_hunyuan_image(tmp_path / layout, layout=layout).transformer
    out = tmp_path / "merged.safetensors"
    run(merge, "--models", *loras, "--ratios", *RATIOS, "--dit", source, "--save_to", out)
    wanted = applied(model, loras, RATIOS)
    close(velocity(opened(out)), wanted)
    assert (wanted - velocity(opened(model))).abs().max() > 0.02
    before, after = load_file(source), load_file(out)
    assert {k: (t.shape, t.dtype) for k, t in after.items()} == {k: (t.shape, t.dtype) for k, t in before.items()}
    said = metadata(out)
    assert said["modelspec.architecture"] == "hunyuan-image-2.1" and "LoRA 1" in said["modelspec.merged_from"]


def test_a_diffusers_folder_becomes_one_file_with_the_original_names(model, loras, tmp_path):
    folder = make_tiny_hunyuan_image(tmp_path / "diffusers", layout="diffusers").transformer
    given = ["--models", loras[0], "--ratios", 1, "--dit", folder, "--save_to"]
    run(merge, *given, tmp_path / "one.safetensors")
    assert set(load_file(tmp_path / "one.safetensors")) == set(load_file(model))
    close(velocity(opened(tmp_path / "one.safetensors")), applied(model, loras[:1], (1.0,)))


@pytest.mark.parametrize("form", [[], ["--concat", "--shuffle"]], ids=" ".join)
def test_one_file_of_two_does_what_both_do(model, loras, in_comfyui, tmp_path, form):
    both = tmp_path / "both.safetensors"
    run(merge, "--models", in_comfyui, loras[1], "--ratios", *RATIOS, "--save_to", both, *form)
    close(applied(model, [both], (1.0,)), applied(model, loras, RATIOS))
    said = metadata(both)
    assert said["ss_network_module"] == "networks.lora_hunyuan_image"
    assert said["modelspec.architecture"] == "hunyuan-image-2.1/lora"
    if form:
        assert ranks(both)["lora_unet_single_blocks_0_linear1"] == 3 + 4 * 2


def test_extracting_gives_the_merged_weights_back(model, tmp_path):
    """The LoRA itself in its own rank; layers that are the same in both models are not in the file."""
    lora = make_lora(model, tmp_path / "lora.safetensors", 1, 4, 4.0, train_blocks="double")
    tuned, out = tmp_path / "tuned.safetensors", tmp_path / "extracted.safetensors"
    run(merge, "--models", lora, "--ratios", 1, "--dit", model, "--save_to", tuned)
    given = ("--model_org", model, "--model_tuned", tuned, "--dim", 4, "--clamp_quantile", 1)
    run(extract, *given, "--save_to", out)
    assert_same(deltas(out), deltas(lora), 1e-4)
    said = metadata(out)
    assert (said["ss_base_model_version"], said["ss_network_module"]) == (
        "hunyuan-image-2.1",
        "networks.lora_hunyuan_image",
    )
    assert said["modelspec.architecture"] == "hunyuan-image-2.1/lora"


def test_a_smaller_rank_is_the_best_of_its_size(in_comfyui, tmp_path):
    """Eckart-Young, under the names that the file has."""
    out = tmp_path / "small.safetensors"
    run(resize_lora.main, "--model", in_comfyui, "--save_to", out, "--new_rank", 1)
    found, wanted = deltas(out), deltas(in_comfyui)
    assert set(ranks(out).values()) == {1} and found.keys() == wanted.keys()
    for module, difference in wanted.items():
        error = (found[module] - difference).norm()
        assert abs(error - torch.linalg.svdvals(difference)[1:].norm()) < 1e-4 * difference.norm(), module


def test_svd_merge_of_full_rank_is_the_sum_and_knows_comfyui_s_names(loras, in_comfyui, tmp_path):
    out = tmp_path / "out.safetensors"
    given = ("--models", in_comfyui, loras[1], "--ratios", *RATIOS, "--save_to", out, "--clamp_quantile", 1)
    run(svd_merge_lora.main, *given, "--new_rank", 16)
    wanted = {key: RATIOS[0] * delta for key, delta in deltas(loras[0]).items()}
    for key, delta in deltas(loras[1]).items():
        wanted[key] = wanted[key] + RATIOS[1] * delta
    assert_same(deltas(out), wanted, 1e-5)
    assert metadata(out)["ss_network_module"] == "networks.lora_hunyuan_image"


def test_it_is_checked(loras, capsys):
    run(check_lora_weights.main, loras[0])
    assert f"number of LoRA modules: {2 * len(ranks(loras[0]))}" in capsys.readouterr().out


FLUX_AND_COMFYUI = ["lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_1_modulation_lin"]


@pytest.mark.parametrize(
    ("modules", "version", "name"),
    [
        (FLUX_AND_COMFYUI, "hunyuan-image-2.1", "HunyuanImage-2.1"),
        (FLUX_AND_COMFYUI, "flux1", "FLUX.1"),
        (FLUX_AND_COMFYUI, "", "FLUX.1"),
        (["lora_unet_single_blocks_1_modulation_linear"], "", "HunyuanImage-2.1"),
        (["diffusion_model.single_blocks.1.linear1"], "hunyuan-image-2.1", "HunyuanImage-2.1"),
    ],
)
def test_names_that_flux_has_too_are_whose_the_metadata_say(modules, version, name):
    found = families.lora_family(modules, version)
    assert found is not None and found.lora_name == name


def test_what_cannot_be_merged_is_refused(model, loras, in_comfyui, tmp_path):
    out = tmp_path / "out.safetensors"
    lumina = write_lora(tmp_path / "lumina.safetensors", {"lora_unet_layers_0_attention_out": (8, 8)}, metadata={})
    flux = write_lora(
        tmp_path / "flux.safetensors", {FLUX_AND_COMFYUI[1]: (24, 8)}, metadata={"ss_base_model_version": "flux1"}
    )
    odd = write_lora(
        tmp_path / "odd.safetensors", {"lora_unet_double_blocks_0_img_attn_q_linear": (8, 8)}, metadata=VERSION
    )
    cases = [
        (["--models", loras[0], "--ratios", 1, "--dit", model], "--dit needs --save_to too"),
        (["--models", lumina, "--ratios", 1, "--save_to", out], "no layer of HunyuanImage-2.1: .*It is for Lumina"),
        (["--models", flux, "--ratios", 1, "--save_to", out], "is for FLUX.1, as its ss_base_model_version says"),
        (["--models", odd, "--ratios", 1, "--save_to", out], "no layer of HunyuanImage-2.1: lora_unet_.*q_linear"),
        (
            ["--models", loras[0], "--ratios", 1, "--dit", loras[0], "--save_to", out],
            "HunyuanImage-2.1's base version is needed",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            run(merge, *arguments)
    with pytest.raises(UserError, match="is for HunyuanImage-2.1, as its ss_base_model_version says; a LoRA for FLUX"):
        run(convert_flux, "--src_path", in_comfyui, "--dst_path", out, "--dst", "diffusers")
    assert not out.exists()
