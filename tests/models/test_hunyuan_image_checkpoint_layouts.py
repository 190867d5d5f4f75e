"""Every layout of a HunyuanImage-2.1 transformer loads to the same weights; sizes are those of the shapes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import torch

from library.checkpoints import open_checkpoint
from library.errors import UserError
from library.memory.storage import FP8_BY_TENSOR, BlocksStoredAs
from library.memory.stored_linear import StoredLinear
from library.models.flux.checkpoint import open_transformer as open_flux
from library.models.hunyuan_image.checkpoint import open_transformer
from library.models.hunyuan_image.transformer import HunyuanImageConfig
from library.models.loading import LoadSpec
from library.models.lumina.checkpoint import open_transformer as open_lumina
from library.safetensors_io import save_file
from tests.full_size import write_hollow
from tools.make_tiny_models import HUNYUAN_IMAGE, make_tiny_hunyuan_image
from tools.other_layouts import comfyui_name

PREFIX = "model.diffusion_model."
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def original(tiny_hunyuan_image) -> State:
    """The tensors of the file in the original layout."""
    return tensors(tiny_hunyuan_image.transformer)


def tensors(path) -> State:
    checkpoint = open_checkpoint(path)
    return {key: checkpoint.load(key) for key in checkpoint}


def separate(state: State) -> State:
    """Queries, keys and values apart, as in the module tree of the official code."""
    separated: State = {}
    for key, value in state.items():
        name, kind = key.rsplit(".", 1)
        if name.endswith(("img_attn_qkv", "txt_attn_qkv")):
            parts = [name.removesuffix("qkv") + part for part in "qkv"]
        elif name.endswith("linear1"):
            parts = [f"{name}_{part}" for part in ("q", "k", "v", "mlp")]
        else:
            parts = [f"{name}.fc" if name.endswith("linear2") else name]
        rows = [64, 64, 64, 256][: len(parts)] if len(parts) > 1 else [len(value)]
        separated |= {f"{part}.{kind}": rows.contiguous() for part, rows in zip(parts, value.split(rows))}
    return separated


def in_comfyui(state: State) -> State:
    return {comfyui_name(key): value for key, value in state.items()}


def load(path, dtype: torch.dtype | None = torch.float32, **arguments) -> State:
    return open_transformer(path, **arguments).load(LoadSpec.of(dtype)).state_dict()


def assert_loads_to(path, original: State, **arguments) -> None:
    state = load(path, **arguments)
    assert state.keys() == original.keys()
    for key, value in state.items():
        assert torch.equal(value, original[key]), key


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_every_layout_holds_the_same_weights(tmp_path, layout, original):
    files = make_tiny_hunyuan_image(tmp_path, layout)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size < 19e6  # 64 latent channels cost the autoencoder 13.5e6 of it
    assert_loads_to(files.transformer, original)
    assert open_transformer(files.transformer).config == HUNYUAN_IMAGE


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("layout", [separate, in_comfyui, lambda state: in_comfyui(separate(state))])
def test_separate_and_renamed_tensors_hold_them_too(tmp_path, original, layout, prefix):
    state = {prefix + key: value for key, value in layout(original).items()}
    assert not {key.removeprefix(prefix) for key in state} <= original.keys()
    save_file(state, tmp_path / "model.safetensors")
    assert_loads_to(tmp_path / "model.safetensors", original)


def test_norms_that_comfyui_calls_weights_are_read_as_well(tmp_path, original):
    state = {re.sub(r"_norm\.scale$", "_norm.weight", key): value for key, value in in_comfyui(original).items()}
    assert sum(key.endswith("query_norm.weight") for key in state) == 6
    save_file(state, tmp_path / "model.safetensors")
    assert_loads_to(tmp_path / "model.safetensors", original)


def test_a_loaded_transformer_is_frozen(tiny_hunyuan_image, original):
    assert_loads_to(tiny_hunyuan_image.transformer, original, disable_mmap=True)
    opened = open_transformer(tiny_hunyuan_image.transformer)
    transformer = opened.load(LoadSpec.of(torch.float32))
    assert opened.config == HUNYUAN_IMAGE and not transformer.training
    assert not any(parameter.requires_grad for parameter in transformer.parameters())


def test_any_shard_stands_for_all(tmp_path, original):
    folder = make_tiny_hunyuan_image(tmp_path, "diffusers").transformer / "transformer"
    for path in (folder, next(folder.glob("*-00002-of-*.safetensors")), next(folder.glob("*.index.json"))):
        assert_loads_to(path, original)
    keys = sorted(original)
    for number in (1, 2):
        name = f"hunyuanimage2.1-{number:05d}-of-00002.safetensors"
        save_file({key: original[key] for key in keys[number - 1 :: 2]}, tmp_path / name)
    assert_loads_to(tmp_path / "hunyuanimage2.1-00002-of-00002.safetensors", original)


# Sizes


def published() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of the published file."""
    hidden = 3584

    def linear(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from ((f"{name}.weight", (outputs, inputs)), (f"{name}.bias", (outputs,)))

    yield from (("img_in.proj.weight", (hidden, 64, 1, 1)), ("img_in.proj.bias", (hidden,)))
    for name in ("time_in", "txt_in.t_embedder"):
        yield from linear(f"{name}.mlp.0", hidden, 256)
        yield from linear(f"{name}.mlp.2", hidden, hidden)
    for name in ("input_embedder", "c_embedder.linear_1", "c_embedder.linear_2"):
        yield from linear(f"txt_in.{name}", hidden, 3584)
    for block in (f"txt_in.individual_token_refiner.blocks.{index}." for index in range(2)):
        yield from ((f"{block}{norm}.{kind}", (hidden,)) for norm in ("norm1", "norm2") for kind in ("weight", "bias"))
        yield from linear(f"{block}self_attn_qkv", 3 * hidden, hidden)
        yield from linear(f"{block}self_attn_proj", hidden, hidden)
        yield from linear(f"{block}mlp.fc1", 4 * hidden, hidden)
        yield from linear(f"{block}mlp.fc2", hidden, 4 * hidden)
        yield from linear(f"{block}adaLN_modulation.1", 2 * hidden, hidden)
    yield from (("byt5_in.layernorm.weight", (1472,)), ("byt5_in.layernorm.bias", (1472,)))
    for name, outputs, inputs in (("fc1", 2048, 1472), ("fc2", 2048, 2048), ("fc3", hidden, 2048)):
        yield from linear(f"byt5_in.{name}", outputs, inputs)
    for stream in (f"double_blocks.{index}.{stream}_" for index in range(20) for stream in ("img", "txt")):
        yield from linear(f"{stream}mod.linear", 6 * hidden, hidden)
        yield from linear(f"{stream}attn_qkv", 3 * hidden, hidden)
        yield from linear(f"{stream}attn_proj", hidden, hidden)
        yield from ((f"{stream}attn_{part}_norm.weight", (128,)) for part in "qk")
        yield from linear(f"{stream}mlp.fc1", 4 * hidden, hidden)
        yield from linear(f"{stream}mlp.fc2", hidden, 4 * hidden)
    for block in (f"single_blocks.{index}." for index in range(40)):
        yield from linear(f"{block}linear1", 7 * hidden, hidden)
        yield from linear(f"{block}linear2", hidden, 5 * hidden)
        yield from ((f"{block}{part}_norm.weight", (128,)) for part in "qk")
        yield from linear(f"{block}modulation.linear", 3 * hidden, hidden)
    yield from linear("final_layer.linear", 64, hidden)
    yield from linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_the_sizes_of_the_published_model_are_inferred(tmp_path, prefix):
    shapes = dict(published())
    hollow = {prefix + name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    opened = open_transformer(write_hollow(tmp_path / "hunyuan.safetensors", hollow, torch.bfloat16))
    assert opened.config == HunyuanImageConfig()
    state = opened.meta_module().state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == shapes
    assert sum(value.numel() for value in state.values()) == 17_425_795_520


def test_metadata_overrides_the_convention_of_positions(tmp_path, original):
    config = {"rope_axes_dim": [20, 12], "rope_theta": 100.0}
    save_file(original, tmp_path / "axes.safetensors", {"config": json.dumps(config)})
    opened = open_transformer(tmp_path / "axes.safetensors").config
    assert (opened.axes_dims, opened.theta) == ((20, 12), 100.0)
    save_file(original, tmp_path / "wrong.safetensors", {"config": json.dumps({"rope_axes_dim": [16, 8]})})
    with pytest.raises(UserError, match="axes"):
        open_transformer(tmp_path / "wrong.safetensors")


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_arrive_in_the_dtype_that_was_asked_for(tiny_hunyuan_image, original, dtype):
    for key, value in load(tiny_hunyuan_image.transformer, dtype).items():
        assert torch.equal(value, original[key].to(dtype)), key


def test_eight_bits_are_for_the_linear_weights_of_image_blocks_alone(tiny_hunyuan_image, original):
    opened = open_transformer(tiny_hunyuan_image.transformer)
    transformer = opened.load(LoadSpec.of(BlocksStoredAs(torch.bfloat16, FP8_BY_TENSOR)))
    stored = {name for name, module in transformer.named_modules() if isinstance(module, StoredLinear)}
    blocks = ("double_blocks.", "single_blocks.")
    matrices = {name for name, value in original.items() if value.dim() == 2}
    assert stored == {name.removesuffix(".weight") for name in matrices if name.startswith(blocks)}
    assert len(stored) == 2 * 10 + 2 * 3
    assert {value.dtype for value in transformer.parameters()} == {torch.bfloat16}
    given = [torch.randn(shape) for shape in ((1, 64, 4, 4), (1, 3, 64), (1, 5, 64))]
    inputs = given[0], torch.tensor([500.0]), given[1], torch.ones(1, 3), given[2], torch.ones(1, 5)
    expected = opened.load(LoadSpec.of(torch.bfloat16))(*inputs)
    assert 0 < (transformer(*inputs) - expected).abs().max() < 0.2 * expected.abs().max()


@pytest.mark.parametrize("layout", [dict, separate, in_comfyui])
@pytest.mark.parametrize("rows", [False, True])
def test_fp8_weights_are_multiplied_by_their_scales_in_every_layout(tmp_path, original, layout, rows):
    state, expected = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {}
    for key, value in layout(original).items():
        expected[key] = value
        if value.dim() == 2 and "_blocks." in key:
            scale = (value.abs().amax(dim=1, keepdim=True) if rows else value.abs().max()) / 448
            state[key] = (value / scale).to(torch.float8_e4m3fn)
            state[key.removesuffix("weight") + "scale_weight"] = scale
            expected[key] = state[key].float() * scale
        else:
            state[key] = value
    save_file(state, tmp_path / "scaled.safetensors")
    save_file(expected, tmp_path / "expected.safetensors")
    assert_loads_to(tmp_path / "scaled.safetensors", load(tmp_path / "expected.safetensors"))


# What doesn't fit


def test_missing_and_unexpected_tensors_are_listed(tmp_path, original):
    state = dict(original) | {"final_layer.surprise": torch.ones(1)}
    for key in ("double_blocks.1.txt_attn_k_norm.weight", "final_layer.linear.bias"):
        del state[key]
    save_file(state, tmp_path / "hunyuan.safetensors")
    with pytest.raises(UserError) as error:
        load(tmp_path / "hunyuan.safetensors")
    message = str(error.value)
    assert "2 tensors are missing (double_blocks.1.txt_attn_k_norm.weight, final_layer.linear.bias)" in message
    assert "1 tensor is unexpected (final_layer.surprise)" in message


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_half_of_a_joined_tensor_is_not_enough(tmp_path, original, layout):
    if layout == "diffusers":
        state = tensors(make_tiny_hunyuan_image(tmp_path, "diffusers").transformer / "transformer")
        del state["transformer_blocks.1.attn.to_k.weight"]
    else:
        state = separate(original)
        del state["double_blocks.1.img_attn_k.weight"]
    save_file(state, tmp_path / "single.safetensors")
    words = r"1 tensor is missing \(double_blocks\.1\.img_attn_qkv\.weight\) and 2 tensors are unexpected"
    with pytest.raises(UserError, match=words):
        load(tmp_path / "single.safetensors")


def test_tensors_that_are_there_under_two_names_are_refused(tmp_path, original):
    for number, other in enumerate((separate(original), in_comfyui(original))):
        save_file(other | original, tmp_path / f"{number}.safetensors")
        with pytest.raises(UserError, match="tensors are unexpected"):
            load(tmp_path / f"{number}.safetensors")


@pytest.mark.parametrize(
    "name", ["img_in.proj.weight", "double_blocks.0.img_attn_q_norm.weight", "time_in.mlp.0.weight"]
)
def test_a_tensor_without_which_there_are_no_sizes_is_named(tmp_path, original, name):
    save_file({key: value for key, value in original.items() if key != name}, tmp_path / "hunyuan.safetensors")
    with pytest.raises(UserError, match=f'"{name}" is missing'):
        open_transformer(tmp_path / "hunyuan.safetensors")


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("double_blocks.1.img_mlp.fc2.weight", (7, 7), r"\(7, 7\), but the other tensors imply \(64, 256\)"),
        ("final_layer.linear.weight", (32, 64), r"final_layer.linear.bias.*\(64,\), .* imply \(32,\)"),
        ("double_blocks.0.img_attn_q_norm.weight", (24,), "axes"),
        ("double_blocks.0.img_attn_q_norm.weight", (), "shape"),
        ("img_in.proj.weight", (64, 64, 1, 2), "2 x 1 are not square"),
        ("img_in.proj.weight", (64, 64, 1, 1, 1), r"\[64, 64, 1, 1, 1\], where 4 sizes"),
        ("single_blocks.0.linear1.weight", (7, 64), "too few rows"),
        ("img_in.proj.weight", (16, 64, 1, 1), "16 is not a multiple of 0 heads"),
    ],
)
def test_a_tensor_of_another_shape_is_named(tmp_path, original, name, shape, words):
    save_file(original | {name: torch.zeros(shape)}, tmp_path / "hunyuan.safetensors")
    with pytest.raises(UserError, match=words):
        load(tmp_path / "hunyuan.safetensors")


def test_a_file_of_another_family_is_named_and_this_one_where_another_is_needed(
    tmp_path, tiny_hunyuan_image, tiny_flux, tiny_lumina
):
    in_comfyui_layout = make_tiny_hunyuan_image(tmp_path / "comfyui", "comfyui").transformer
    folder = make_tiny_hunyuan_image(tmp_path / "diffusers", "diffusers").transformer
    ours = "the transformer of HunyuanImage-2.1's base version is needed here"
    for opener, path, words in (
        (open_transformer, tiny_flux.transformer, f"is a FLUX.1 file; {ours}"),
        (open_transformer, tiny_lumina.transformer, f"is a Lumina Image 2.0 file; {ours}"),
        (open_flux, tiny_hunyuan_image.transformer, "is a HunyuanImage-2.1 file; a FLUX.1 transformer is needed here"),
        (open_flux, in_comfyui_layout, "is a HunyuanImage-2.1 file; a FLUX.1 transformer is needed here"),
        (open_flux, folder, "is a HunyuanImage-2.1 file in the Diffusers layout; a FLUX.1 transformer"),
        (open_lumina, in_comfyui_layout, "is a HunyuanImage-2.1 file; a Lumina Image 2.0 transformer"),
    ):
        with pytest.raises(UserError, match=f"--option: .*{words}") as error:
            opener(path, option="--option")
        assert str(error.value).count("\n") == 0


@pytest.mark.parametrize("layout", [dict, in_comfyui])
def test_distilled_models_are_refused_with_the_reason(tmp_path, original, layout):
    distilled = dict(original)
    for name in ("time_r_in", "guidance_in"):
        distilled |= {
            key.replace("time_in", name): value for key, value in original.items() if key.startswith("time_in")
        }
    save_file(layout(distilled), tmp_path / "distilled.safetensors")
    with pytest.raises(UserError) as error:
        open_transformer(tmp_path / "distilled.safetensors", option="--ckpt")
    assert str(error.value) == (
        f"--ckpt: {tmp_path / 'distilled.safetensors'} is a distilled HunyuanImage-2.1 file (few steps, guidance built "
        "in), which cannot be trained; the transformer of HunyuanImage-2.1's base version is needed here."
    )
