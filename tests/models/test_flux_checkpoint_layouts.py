"""Every layout of a FLUX.1 transformer loads to the same weights; what doesn't fit is listed."""

from __future__ import annotations

import json

import pytest
import torch

from library.checkpoints import open_checkpoint
from library.errors import UserError
from library.models.flux.checkpoint import open_transformer
from library.models.loading import LoadSpec
from library.safetensors_io import save_file
from tools.make_tiny_models import make_tiny_flux, transformer_config

PREFIX = "model.diffusion_model."
LINEAR = "double_blocks.1.img_mlp.0.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(make_tiny_flux(tmp_path_factory.mktemp("original"), seed=9).transformer)
    return {key: checkpoint.load(key) for key in checkpoint}


def load(path, dtype: torch.dtype | None = torch.float32, **arguments) -> dict[str, torch.Tensor]:
    return open_transformer(path, **arguments).load(LoadSpec.of(dtype)).state_dict()


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize("variant", ["dev", "schnell"])
@pytest.mark.parametrize("layout", ["original", "comfyui", "diffusers"])
def test_layouts_and_variants(tmp_path, layout, variant):
    files = make_tiny_flux(tmp_path, variant, layout, seed=9)
    opened = open_transformer(files.transformer)
    assert opened.config == transformer_config(variant) and opened.variant == variant
    expected = load(make_tiny_flux(tmp_path / "again", variant, seed=9).transformer)
    transformer = opened.load(LoadSpec.of(torch.float32))
    assert_same(transformer.state_dict(), expected)
    assert not transformer.training and not any(parameter.requires_grad for parameter in transformer.parameters())


def test_a_diffusers_transformer_is_found_from_its_folder_a_shard_and_a_single_file(tmp_path, original):
    files = make_tiny_flux(tmp_path, layout="diffusers", seed=9)
    folder = files.transformer / "transformer"
    for path in (folder, next(folder.glob("*-00002-of-*.safetensors")), next(folder.glob("*.index.json"))):
        assert_same(load(path), original)
    checkpoint = open_checkpoint(folder)
    save_file({key: checkpoint.load(key) for key in checkpoint}, tmp_path / "single.safetensors")
    assert_same(load(tmp_path / "single.safetensors", disable_mmap=True), original)


def test_the_prefix_is_taken_off_each_key_that_has_it(tmp_path, original):
    mixed = {(PREFIX if index % 3 else "") + key: value for index, (key, value) in enumerate(original.items())}
    save_file(mixed, tmp_path / "mixed.safetensors")
    assert_same(load(tmp_path / "mixed.safetensors"), original)


def test_other_parts_of_an_all_in_one_file_are_left_out(tmp_path, original):
    parts = {PREFIX + key: value for key, value in original.items()}
    parts["vae.encoder.conv_in.weight"] = torch.zeros(1)
    parts["text_encoders.clip_l.transformer.text_model.final_layer_norm.weight"] = torch.zeros(1)
    save_file(parts, tmp_path / "all.safetensors")
    assert_same(load(tmp_path / "all.safetensors"), original)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_arrive_in_the_dtype_that_was_asked_for(tmp_path, original, dtype):
    save_file(original, tmp_path / "flux.safetensors")
    assert_same(load(tmp_path / "flux.safetensors", dtype), {key: value.to(dtype) for key, value in original.items()})


def test_plain_fp8_weights_are_read_as_numbers_or_kept(tmp_path, original):
    eighth = {key: value.to(torch.float8_e4m3fn) for key, value in original.items()}
    save_file(eighth, tmp_path / "fp8.safetensors")
    assert_same(
        load(tmp_path / "fp8.safetensors", torch.bfloat16), {k: v.to(torch.bfloat16) for k, v in eighth.items()}
    )
    kept = load(tmp_path / "fp8.safetensors", None)
    assert all(value.dtype == torch.float8_e4m3fn for value in kept.values())


@pytest.mark.parametrize("style", ["scalar", "rows", "new names"])
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_scaled_fp8_weights_are_multiplied_by_their_scales(tmp_path, original, style, prefix):
    state, expected = dict(original), dict(original)
    rows = style == "rows"
    for key in (key for key in original if key.endswith((".0.weight", ".2.weight", "linear1.weight"))):
        scale = (original[key].abs().amax(dim=1, keepdim=True) if rows else original[key].abs().max()) / 448
        state[key] = (original[key] / scale).to(torch.float8_e4m3fn)
        expected[key] = state[key].float() * scale
        state[key.removesuffix("weight") + ("weight_scale" if style == "new names" else "scale_weight")] = scale
        if style == "new names":
            described = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
            state[key.removesuffix("weight") + "comfy_quant"] = described
        else:
            state[key.removesuffix("weight") + "scale_input"] = torch.tensor(1.0)
    if style != "new names":
        state["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file({prefix + key: value for key, value in state.items()}, tmp_path / "scaled.safetensors")
    loaded = load(tmp_path / "scaled.safetensors")
    assert (loaded[LINEAR] - original[LINEAR]).abs().max() < 0.05 * original[LINEAR].abs().max()
    assert_same(loaded, expected)


def test_an_unknown_quantised_layout_is_refused_by_its_name(tmp_path, original):
    described = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    save_file(original | {"single_blocks.0.linear1.comfy_quant": described}, tmp_path / "nvfp4.safetensors")
    with pytest.raises(UserError, match="nvfp4"):
        open_transformer(tmp_path / "nvfp4.safetensors")


def test_missing_and_unexpected_tensors_are_listed(tmp_path, original):
    state = dict(original) | {"final_layer.surprise": torch.ones(1)}
    for key in ("double_blocks.0.txt_mlp.0.bias", "final_layer.linear.bias"):
        del state[key]
    save_file(state, tmp_path / "flux.safetensors")
    with pytest.raises(UserError) as error:
        load(tmp_path / "flux.safetensors")
    message = str(error.value)
    assert "2 tensors are missing (double_blocks.0.txt_mlp.0.bias, final_layer.linear.bias)" in message
    assert "1 tensor is unexpected (final_layer.surprise)" in message


def test_a_tensor_of_another_shape_is_named(tmp_path, original):
    save_file(original | {LINEAR: torch.zeros(7, 64)}, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match=rf"{LINEAR}.*\(7, 64\).*\(256, 64\)"):
        load(tmp_path / "flux.safetensors")


def test_metadata_overrides_the_convention_of_position_axes(tmp_path, original):
    save_file(original, tmp_path / "flux.safetensors", {"config": json.dumps({"axes_dims_rope": [8, 12, 12]})})
    assert open_transformer(tmp_path / "flux.safetensors").config.axes_dims == (8, 12, 12)
    save_file(original, tmp_path / "wrong.safetensors", {"config": json.dumps({"axes_dims_rope": [8, 8, 8]})})
    with pytest.raises(UserError, match="axes"):
        open_transformer(tmp_path / "wrong.safetensors")
    save_file(original, tmp_path / "other.safetensors", {"config": "not JSON at all"})
    assert open_transformer(tmp_path / "other.safetensors").config == transformer_config()


def test_a_truncated_transformer_is_named(tmp_path, original):
    save_file(original, tmp_path / "flux.safetensors")
    data = (tmp_path / "flux.safetensors").read_bytes()
    (tmp_path / "flux.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=rf"--ckpt_path: .*flux\.safetensors is truncated.*{len(data) // 2:,}"):
        open_transformer(tmp_path / "flux.safetensors", option="--ckpt_path")
