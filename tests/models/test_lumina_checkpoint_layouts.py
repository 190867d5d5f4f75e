"""Every layout of a Lumina transformer loads to the same weights; sizes are those of the shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from library.checkpoints import open_checkpoint
from library.errors import UserError
from library.memory.storage import FP8_BY_TENSOR, BlocksStoredAs
from library.memory.stored_linear import StoredLinear
from library.models.autoencoder_kl import open_autoencoder
from library.models.flux.checkpoint import open_transformer as open_flux
from library.models.gemma2 import open_gemma2
from library.models.loading import LoadSpec
from library.models.lumina.checkpoint import open_transformer
from library.models.lumina.transformer import LuminaConfig
from library.safetensors_io import save_file
from tests.full_size import write_hollow
from tools.make_tiny_models import LUMINA, make_tiny_lumina

PREFIX = "model.diffusion_model."
KINDS = {
    "2B": LuminaConfig(),
    "3B": LuminaConfig(dim=2592, head_dim=108, layers=30, ffn_dim=10496, axes_dims=(36, 36, 36)),
    "4B": LuminaConfig(dim=2880, head_dim=120, layers=32, ffn_dim=11520, axes_dims=(40, 40, 40)),
    "7B": LuminaConfig(dim=3840, heads=32, head_dim=120, layers=32, ffn_dim=15360, axes_dims=(40, 40, 40)),
}


@pytest.fixture(scope="module")
def original(tiny_lumina) -> dict[str, torch.Tensor]:
    """The tensors of the file in the original layout."""
    checkpoint = open_checkpoint(tiny_lumina.transformer)
    return {key: checkpoint.load(key) for key in checkpoint}


def load(path, dtype: torch.dtype | None = torch.float32, **arguments) -> dict[str, torch.Tensor]:
    return open_transformer(path, **arguments).load(LoadSpec.of(dtype)).state_dict()


def assert_loads_to(path, original: dict[str, torch.Tensor], **arguments) -> None:
    state = load(path, **arguments)
    assert {*state, "norm_final.weight"} == original.keys()
    for key, value in state.items():
        assert torch.equal(value, original[key]), key


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_every_layout_holds_the_same_weights(tmp_path, layout, tiny_lumina, original):
    files = make_tiny_lumina(tmp_path, layout)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 3e6
    assert_loads_to(files.transformer, original)
    for opener, part in ((open_gemma2, "gemma2"), (open_autoencoder, "autoencoder")):
        states = [opener(getattr(each, part)).load(LoadSpec()).state_dict() for each in (files, tiny_lumina)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_loaded_transformer_is_frozen(tiny_lumina, original):
    assert_loads_to(tiny_lumina.transformer, original)
    opened = open_transformer(tiny_lumina.transformer)
    transformer = opened.load(LoadSpec.of(torch.float32))
    assert opened.config == LUMINA and not transformer.training
    assert not any(parameter.requires_grad for parameter in transformer.parameters())


def test_a_diffusers_transformer_is_found_from_its_folder_a_shard_and_a_single_file(tmp_path, original):
    folder = make_tiny_lumina(tmp_path, "diffusers").transformer / "transformer"
    for path in (folder, next(folder.glob("*-00002-of-*.safetensors")), next(folder.glob("*.index.json"))):
        assert_loads_to(path, original)
    checkpoint = open_checkpoint(folder)
    save_file({key: checkpoint.load(key) for key in checkpoint}, tmp_path / "single.safetensors")
    assert_loads_to(tmp_path / "single.safetensors", original, disable_mmap=True)


def test_the_prefix_is_taken_off_each_key_that_has_it(tmp_path, original):
    mixed = {(PREFIX if index % 3 else "") + key: value for index, (key, value) in enumerate(original.items())}
    save_file(mixed, tmp_path / "mixed.safetensors")
    assert_loads_to(tmp_path / "mixed.safetensors", original)


# Sizes


def published(config: LuminaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of a published file of that kind."""
    dim, time, head = config.dim, 1024, config.head_dim
    yield from [("x_embedder.weight", (dim, 64)), ("x_embedder.bias", (dim,))]
    yield from [("t_embedder.mlp.0.weight", (time, 256)), ("t_embedder.mlp.0.bias", (time,))]
    yield from [("t_embedder.mlp.2.weight", (time, time)), ("t_embedder.mlp.2.bias", (time,))]
    yield from [("cap_embedder.0.weight", (2304,)), ("norm_final.weight", (dim,))]
    yield from [("cap_embedder.1.weight", (dim, 2304)), ("cap_embedder.1.bias", (dim,))]
    yield from [("final_layer.linear.weight", (64, dim)), ("final_layer.linear.bias", (64,))]
    yield "final_layer.adaLN_modulation.1.weight", (dim, time)
    yield "final_layer.adaLN_modulation.1.bias", (dim,)
    refiners = [f"{name}_refiner.{index}." for name in ("noise", "context") for index in range(2)]
    for block in [*refiners, *(f"layers.{index}." for index in range(config.layers))]:
        yield block + "attention.qkv.weight", (head * (config.heads + 16), dim)
        yield block + "attention.out.weight", (dim, dim)
        yield from ((f"{block}attention.{norm}_norm.weight", (head,)) for norm in "qk")
        yield from ((f"{block}feed_forward.{name}.weight", (config.ffn_dim, dim)) for name in ("w1", "w3"))
        yield block + "feed_forward.w2.weight", (dim, config.ffn_dim)
        for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            yield f"{block}{norm}.weight", (dim,)
        if not block.startswith("context"):
            yield block + "adaLN_modulation.1.weight", (4 * dim, time)
            yield block + "adaLN_modulation.1.bias", (4 * dim,)


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sizes_of_published_models_are_inferred(tmp_path, kind, prefix):
    shapes = dict(published(KINDS[kind]))
    hollow = {prefix + name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    opened = open_transformer(write_hollow(tmp_path / "lumina.safetensors", hollow, torch.bfloat16))
    assert opened.config == KINDS[kind]
    state = opened.meta_module().state_dict()
    unused = shapes.pop("norm_final.weight")
    assert {name: tuple(value.shape) for name, value in state.items()} == shapes
    if kind == "2B":
        total = sum(value.numel() for value in state.values()) + unused[0]
        assert (len(state) + 1, total) == (400, 2_609_771_456)


def test_metadata_overrides_the_convention_of_position_axes(tmp_path, original):
    for name in ("axes_dims", "axes_dim_rope"):
        save_file(original, tmp_path / "axes.safetensors", {"config": json.dumps({name: [6, 4, 2]})})
        assert open_transformer(tmp_path / "axes.safetensors").config.axes_dims == (6, 4, 2)
    save_file(original, tmp_path / "wrong.safetensors", {"config": json.dumps({"axes_dims": [4, 4, 2]})})
    with pytest.raises(UserError, match="axes"):
        open_transformer(tmp_path / "wrong.safetensors")


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_arrive_in_the_dtype_that_was_asked_for(tiny_lumina, original, dtype):
    for key, value in load(tiny_lumina.transformer, dtype).items():
        assert torch.equal(value, original[key].to(dtype)), key


def test_eight_bits_are_for_the_linear_weights_of_blocks_alone(tiny_lumina, original):
    opened = open_transformer(tiny_lumina.transformer)
    transformer = opened.load(LoadSpec.of(BlocksStoredAs(torch.bfloat16, FP8_BY_TENSOR)))
    stored = {name for name, module in transformer.named_modules() if isinstance(module, StoredLinear)}
    blocks = ("layers.", "noise_refiner.", "context_refiner.")
    matrices = {name for name, value in original.items() if value.dim() == 2}
    assert stored == {name.removesuffix(".weight") for name in matrices if name.startswith(blocks)}
    assert {value.dtype for value in transformer.parameters()} == {torch.bfloat16}
    given = torch.randn(1, 16, 4, 4), torch.tensor([0.5]), torch.randn(1, 3, LUMINA.text_dim), torch.ones(1, 3)
    expected = opened.load(LoadSpec.of(torch.bfloat16))(*given)
    assert 0 < (transformer(*given) - expected).abs().max() < 0.2 * expected.abs().max()


def test_plain_fp8_weights_are_read_as_numbers(tmp_path, original):
    eighth = {key: value.to(torch.float8_e4m3fn) for key, value in original.items()}
    save_file(eighth, tmp_path / "fp8.safetensors")
    for key, value in load(tmp_path / "fp8.safetensors", torch.bfloat16).items():
        assert torch.equal(value, eighth[key].to(torch.bfloat16)), key


# What doesn't fit


def test_missing_and_unexpected_tensors_are_listed(tmp_path, original):
    state = dict(original) | {"final_layer.surprise": torch.ones(1)}
    for key in ("context_refiner.0.ffn_norm1.weight", "final_layer.linear.bias"):
        del state[key]
    save_file(state, tmp_path / "lumina.safetensors")
    with pytest.raises(UserError) as error:
        load(tmp_path / "lumina.safetensors")
    message = str(error.value)
    assert "2 tensors are missing (context_refiner.0.ffn_norm1.weight, final_layer.linear.bias)" in message
    assert "1 tensor is unexpected (final_layer.surprise)" in message


@pytest.mark.parametrize(
    "name", ["x_embedder.weight", "layers.0.attention.q_norm.weight", "layers.0.attention.qkv.weight"]
)
def test_a_tensor_without_which_there_are_no_sizes_is_named(tmp_path, original, name):
    save_file({key: value for key, value in original.items() if key != name}, tmp_path / "lumina.safetensors")
    with pytest.raises(UserError, match=f'"{name}" is missing'):
        open_transformer(tmp_path / "lumina.safetensors")


@pytest.mark.parametrize("missing", ["norm1.linear.weight", "attn.to_k.weight"])
def test_what_a_diffusers_file_lacks_is_named_too(tmp_path, missing):
    folder = make_tiny_lumina(tmp_path, "diffusers").transformer / "transformer"
    checkpoint = open_checkpoint(folder)
    state = {key: checkpoint.load(key) for key in checkpoint if key != f"layers.1.{missing}"}
    save_file(state, tmp_path / "single.safetensors")
    with pytest.raises(UserError, match=r"1 tensor is missing \(layers\.1\."):
        load(tmp_path / "single.safetensors")


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("layers.1.feed_forward.w2.weight", (7, 7), r"\(7, 7\), but the other tensors imply \(48, 192\)"),
        ("final_layer.linear.weight", (32, 48), r"\(32, 48\), but the other tensors imply \(64, 48\)"),
        ("layers.0.attention.q_norm.weight", (11,), "axes"),
        ("layers.0.attention.q_norm.weight", (), "shape"),
        ("layers.0.attention.qkv.weight", (48, 48), "share 0 heads"),
    ],
)
def test_a_tensor_of_another_shape_is_named(tmp_path, original, name, shape, words):
    save_file(original | {name: torch.zeros(shape)}, tmp_path / "lumina.safetensors")
    with pytest.raises(UserError, match=words):
        load(tmp_path / "lumina.safetensors")


def test_a_lumina_file_is_named_where_another_part_or_family_is_needed(tmp_path, tiny_lumina):
    folder = make_tiny_lumina(tmp_path, "diffusers").transformer
    for opener, path, words in (
        (open_transformer, tiny_lumina.autoencoder, r"is a FLUX autoencoder \(AE\); a Lumina Image 2.0 transformer"),
        (open_autoencoder, tiny_lumina.transformer, "is a Lumina Image 2.0 file; .* autoencoder"),
        (open_flux, tiny_lumina.transformer, "is a Lumina Image 2.0 file; a FLUX.1 transformer is needed here"),
        (open_flux, folder, "is a Lumina Image 2.0 file in the Diffusers layout; a FLUX.1 transformer"),
    ):
        with pytest.raises(UserError, match=f"--option: .*{words}") as error:
            opener(path, option="--option")
        assert str(error.value).count("\n") == 0
