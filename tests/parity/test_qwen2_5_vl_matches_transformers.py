"""Qwen2.5-VL's states are the third from last of transformers' text model, from every layout."""

from __future__ import annotations

import json

import pytest
import torch

from library.errors import UserError
from library.lean_imports import transformers_class
from library.memory.apply import apply_memory_plan
from library.memory.plan import MemoryPlan
from library.memory.scaled import FP8
from library.memory.storage import BlocksStoredAs
from library.memory.stored_linear import StoredLinear
from library.models.loading import LoadSpec
from library.models.qwen2_5_vl import open_qwen2_5_vl
from library.safetensors_io import save_file
from tests.full_size import write_hollow
from tools.tiny_hunyuan_text import write_diffusers_qwen2_5_vl

VOCABULARY = 100
EXCEPTIONS = {"config": json.dumps({"head_dim": 16})}


@pytest.fixture(scope="module")
def reference():
    """A text model of five layers, of which three are needed."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

    config = Qwen2_5_VLTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    torch.manual_seed(1)
    model = transformers_class("qwen2_5_vl.modeling_qwen2_5_vl", "Qwen2_5_VLTextModel")(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.12)
    return model


@pytest.fixture(scope="module")
def path(reference, tmp_path_factory):
    """The published single file: with a vision tower and a head."""
    return write(tmp_path_factory.mktemp("qwen") / "qwen_2.5_vl_7b.safetensors", reference, "model.", "visual.")


def write(path, reference, prefix: str, tower: str, others: dict[str, tuple[int, ...]] | None = None):
    state = {prefix + name: value for name, value in reference.state_dict().items()}
    others = {f"{tower}blocks.0.mlp.gate_proj.weight": (4, 4), "lm_head.weight": (VOCABULARY, 64)} | (others or {})
    save_file(state | {name: torch.zeros(shape) for name, shape in others.items()}, path, EXCEPTIONS)
    return path


def load(path, dtype=torch.float32):
    return open_qwen2_5_vl(path).load(LoadSpec.of(dtype))


def needed(reference) -> dict[str, torch.Tensor]:
    unused = ("layers.3.", "layers.4.", "norm.")
    return {name: value for name, value in reference.state_dict().items() if not name.startswith(unused)}


def tokens(*lengths: int, of: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, VOCABULARY, (len(lengths), of), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(of) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def states_of(reference, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return reference(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-3]


@pytest.mark.parametrize("lengths", [(9, 24, 1), (24, 24)], ids=["unequal", "equal"])
def test_states_are_the_third_from_last(reference, path, lengths):
    ids, mask = tokens(*lengths)
    with torch.no_grad():
        actual, expected = load(path)(ids), states_of(reference, ids, mask)
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)
    assert actual.shape == expected.shape and actual.std() > 0.1


def test_only_what_is_needed_is_loaded(reference, path):
    state = load(path).state_dict()
    assert state.keys() == needed(reference).keys()
    assert {name.split(".")[1] for name in state if name.startswith("layers.")} == {"0", "1", "2"}


LAYOUTS = {
    "": ("visual.", {}),
    "model.": ("model.visual.", {"logit_scale": ()}),
    "model.language_model.": ("model.visual.", {}),
    "language_model.model.": ("visual.", {}),
    "text_encoders.qwen25_7b.transformer.model.": (
        "text_encoders.qwen25_7b.transformer.visual.",
        {
            "text_encoders.qwen25_7b.logit_scale": (),
            "text_encoders.byt5_small.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": (4, 1472),
            "model.diffusion_model.double_blocks.0.img_attn_qkv.weight": (4, 4),
            "model.diffusion_model.byt5_in.fc1.weight": (4, 4),
            "vae.decoder.conv_in.weight": (4, 4, 3, 3),
        },
    ),
}


@pytest.mark.parametrize("prefix", LAYOUTS)
def test_every_layout_loads_to_the_same_weights(reference, tmp_path, prefix):
    file = write(tmp_path / "file.safetensors", reference, prefix, *LAYOUTS[prefix])
    loaded, expected = load(file).state_dict(), needed(reference)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_folders_and_shards_say_the_number_of_heads_in_their_configuration(tmp_path):
    """The Diffusers layout has transformers' own names, which it is read by too."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig

    write_diffusers_qwen2_5_vl(tmp_path)
    whole = transformers_class("qwen2_5_vl.modeling_qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration")
    config = Qwen2_5_VLConfig.from_pretrained(tmp_path / "text_encoder")
    model, found = whole.from_pretrained(
        tmp_path / "text_encoder", config=config, dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    model.save_pretrained(tmp_path / "sharded" / "text_encoder", max_shard_size="300KB")
    assert len(list((tmp_path / "sharded" / "text_encoder").glob("*.safetensors"))) > 1
    ids = tokens(24, 24)[0]
    for folder in (tmp_path, tmp_path / "text_encoder", tmp_path / "sharded"):
        with torch.no_grad():
            actual = load(folder)(ids)
            expected = model.model.language_model(ids, output_hidden_states=True).hidden_states[-3]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_padding_and_neighbours_change_nothing(path):
    ids, _ = tokens(3, 11)
    encoder = load(path)
    with torch.no_grad():
        together = encoder(ids)
        for row, length in enumerate((3, 11)):
            alone = encoder(ids[row : row + 1, :length])
            torch.testing.assert_close(together[row : row + 1, :length], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, BlocksStoredAs(torch.bfloat16)])
def test_layers_are_blocks_that_are_computed_again_to_the_same_gradients(path, dtype):
    def gradient(is_checkpointed: bool) -> torch.Tensor:
        encoder = load(path, dtype)
        assert encoder.block_lists()["layers"] == list(encoder.layers)
        apply_memory_plan(encoder.block_lists(), MemoryPlan(checkpointing=is_checkpointed))
        offset = torch.zeros(64, requires_grad=True)
        encoder.layers[0].mlp.down_proj.register_forward_hook(lambda module, inputs, y: y + offset.to(y.dtype))
        encoder(tokens(24)[0]).float().square().sum().backward()
        return offset.grad

    plain = gradient(False)
    assert plain.abs().sum() > 0 and torch.equal(gradient(True), plain)


def test_linear_weights_of_layers_are_stored_in_8_bits_and_the_embedding_is_not(reference, path):
    encoder, rounded, (ids, mask) = load(path, BlocksStoredAs(torch.float32)), load(path), tokens(24, 24)
    stored = {name for name, layer in encoder.named_modules() if isinstance(layer, StoredLinear)}
    projections = [
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    ]
    assert stored == {f"layers.{index}.{name}" for index in range(3) for name in projections}
    assert {value.dtype for value in encoder.parameters()} == {torch.float32}
    with torch.no_grad():
        for name in stored:
            weight = rounded.get_submodule(name).weight
            scale = weight.abs().max() / 448
            weight.copy_((weight / scale).to(FP8).float() * scale)
        torch.testing.assert_close(encoder(ids), rounded(ids), atol=1e-4, rtol=1e-4)
        exact = states_of(reference, ids, mask)
        assert 0 < (encoder(ids) - exact).abs().mean() < 0.2 * exact.abs().mean()


def test_scaled_fp8_weights_are_multiplied_by_their_scales_or_kept_with_them(reference, tmp_path):
    state, expected = {f"model.{name}": value for name, value in reference.state_dict().items()}, {}
    for key in [key for key in state if "proj.weight" in key]:
        scale = state[key].abs().max() / 448
        state[key] = (state[key] / scale).to(FP8)
        state[key.replace(".weight", ".scale_weight")] = scale
        state[key.replace(".weight", ".scale_input")] = torch.tensor(1.0)
        expected[key.removeprefix("model.")] = state[key].float() * scale
    state["scaled_fp8"] = torch.zeros(0, dtype=FP8)
    file = tmp_path / "qwen_2.5_vl_7b_fp8_scaled.safetensors"
    save_file(state, file, EXCEPTIONS)
    encoder, kept, ids = load(file), load(file, BlocksStoredAs(torch.float32)), tokens(24)[0]
    loaded = encoder.state_dict()
    used = {name: value for name, value in expected.items() if name in needed(reference)}
    assert len(used) == 21 and all(torch.equal(loaded[name], value) for name, value in used.items())
    for name, value in used.items():
        assert torch.equal(kept.get_submodule(name.removesuffix(".weight")).dense(torch.float32), value), name
    with torch.no_grad():
        torch.testing.assert_close(kept(ids), encoder(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        *((torch.float16, autocast) for autocast in (None, torch.float16, torch.bfloat16)),
        (BlocksStoredAs(torch.float16), None),
        *((dtype, torch.float16) for dtype in (torch.float32, torch.bfloat16)),
    ],
)
def test_states_and_products_beyond_the_range_of_float16_are_finite(reference, tmp_path, dtype, autocast):
    """Qwen2.5-VL was trained in bfloat16, whose range is that of float32."""
    state = {name: value.clone() for name, value in reference.state_dict().items()}
    for name in state:
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            state[name] *= 200
    save_file(state, tmp_path / "qwen.safetensors", EXCEPTIONS)
    huge = type(reference)(reference.config).eval()
    huge.load_state_dict(state)
    ids, mask = tokens(24, 24)
    expected = states_of(huge, ids, mask)
    assert expected.abs().max() > torch.finfo(torch.float16).max
    encoder = load(tmp_path / "qwen.safetensors", dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype=autocast or torch.float16, enabled=autocast is not None):
        actual = encoder(ids)
    assert actual.dtype == torch.float32 and actual.isfinite().all()
    assert (actual - expected).abs().mean() < (
        0.15 if isinstance(dtype, BlocksStoredAs) else 0.03
    ) * expected.abs().mean()


@pytest.mark.parametrize(
    ("changed", "config", "message"),
    [
        ({}, {}, r"the 64 rows of q_proj cannot be split into heads of 128; .*\"head_dim\" in the \"config\" entry"),
        ({}, {"head_dim": "sixteen"}, "\"head_dim\" in its configuration is 'sixteen'"),
        ({"layers.0.self_attn.k_proj.weight": (48, 64)}, {"head_dim": 16}, "with 4 heads of queries and 3 of keys"),
        ({"embed_tokens.weight": (100,)}, {"head_dim": 16}, "2 sizes above 0 are needed"),
    ],
)
def test_sizes_that_do_not_fit_are_one_sentence_before_anything_is_loaded(
    reference, tmp_path, changed, config, message
):
    state = dict(reference.state_dict()) | {name: torch.zeros(shape) for name, shape in changed.items()}
    save_file(state, tmp_path / "qwen.safetensors", {"config": json.dumps(config)})
    with pytest.raises(UserError, match=message) as error:
        open_qwen2_5_vl(tmp_path / "qwen.safetensors", option="--text_encoder")
    assert str(error.value).startswith("--text_encoder: ") and "\n" not in str(error.value)


def test_a_file_with_two_layers_has_none_that_is_needed(reference, tmp_path):
    state = {
        name: value
        for name, value in reference.state_dict().items()
        if name[:9] not in ("layers.2.", "layers.3.", "layers.4.")
    }
    save_file(state, tmp_path / "qwen.safetensors", EXCEPTIONS)
    with pytest.raises(UserError, match=r"^--text_encoder: .* has too few layers \(2\)"):
        open_qwen2_5_vl(tmp_path / "qwen.safetensors", option="--text_encoder")


def test_a_missing_tensor_of_a_needed_layer_is_named(reference, tmp_path):
    state = {name: value for name, value in reference.state_dict().items() if name != "layers.1.mlp.up_proj.weight"}
    save_file(state, tmp_path / "qwen.safetensors", EXCEPTIONS)
    with pytest.raises(UserError, match=r"1 tensor is missing \(layers\.1\.mlp\.up_proj\.weight\)"):
        load(tmp_path / "qwen.safetensors")


def test_the_published_sizes_are_found_without_metadata(tmp_path):
    layer = {
        **{
            f"self_attn.{name}_proj.weight": (rows, 3584)
            for name, rows in (("q", 3584), ("k", 512), ("v", 512), ("o", 3584))
        },
        **{f"self_attn.{name}_proj.bias": (rows,) for name, rows in (("q", 3584), ("k", 512), ("v", 512))},
        **{f"mlp.{name}_proj.weight": (18944, 3584) for name in ("gate", "up")},
        **{"mlp.down_proj.weight": (3584, 18944)},
        **{f"{name}_layernorm.weight": (3584,) for name in ("input", "post_attention")},
    }
    shapes = {f"model.layers.{index}.{name}": shape for index in range(28) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (152064, 3584), "lm_head.weight": (152064, 3584)}
    shapes |= {"model.norm.weight": (3584,), "visual.blocks.0.mlp.gate_proj.weight": (3420, 1280)}
    hollow = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    opened = open_qwen2_5_vl(write_hollow(tmp_path / "qwen_2.5_vl_7b.safetensors", hollow, torch.bfloat16))
    state = opened.meta_module().state_dict()
    unused = ("model.layers.26.", "model.layers.27.", "model.norm.", "lm_head.", "visual.")
    assert {f"model.{name}": tuple(value.shape) for name, value in state.items()} == {
        name: shape for name, shape in shapes.items() if not name.startswith(unused)
    }
    assert (opened.hidden_size, opened.vocabulary, opened.sizes["num_hidden_layers"]) == (3584, 152064, 26)
