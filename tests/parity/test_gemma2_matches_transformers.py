"""Gemma 2's states are those of transformers' Gemma2Model without soft-capping, from every layout."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Gemma2Config, Gemma2Model

from library.errors import UserError
from library.memory.apply import apply_memory_plan
from library.memory.plan import MemoryPlan
from library.memory.storage import BlocksStoredAs
from library.models.gemma2 import open_gemma2
from library.models.loading import LoadSpec, on_meta
from library.models.lumina.text import encode_gemma
from library.safetensors_io import save_file
from tests.full_size import write_hollow

SIZES = {
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
EXCEPTIONS = {"config": json.dumps({"head_dim": 16, "query_pre_attn_scalar": 9})}


@pytest.fixture(scope="module")
def reference() -> Gemma2Model:
    torch.manual_seed(1)
    settings = {"query_pre_attn_scalar": 9, "attn_logit_softcapping": None, "attn_implementation": "eager"}
    config = Gemma2Config(**SIZES, **settings, use_cache=False)
    model = Gemma2Model(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5 if "norm" in name else 0.3)
    return model


@pytest.fixture(scope="module")
def path(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("gemma") / "gemma_2_2b.safetensors"
    save_file({f"model.{name}": value for name, value in reference.state_dict().items()}, path, EXCEPTIONS)
    return path


def load(path, dtype=torch.float32):
    return open_gemma2(path).load(LoadSpec.of(dtype))


def tokens(*lengths: int, of: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, 100, (len(lengths), of), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(of) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def states_of(reference: Gemma2Model, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    assert reference.config._attn_implementation == "eager"
    with torch.no_grad():
        return reference(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]


@pytest.mark.parametrize("lengths", [(9, 24, 1), (24, 24), None], ids=["unequal", "equal", "no mask"])
def test_states_are_those_before_the_last_layer(reference, path, lengths):
    ids, mask = tokens(*(lengths or (24, 24)))
    mask = mask if lengths else None
    with torch.no_grad():
        torch.testing.assert_close(load(path)(ids, mask), states_of(reference, ids, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_masked", [False, True])
def test_every_other_layer_sees_a_window_only(reference, path, is_masked, monkeypatch):
    ids, mask = tokens(5, 12, of=12)
    given, valid = (mask if is_masked else None), (mask if is_masked else torch.ones_like(mask)).bool()
    with torch.no_grad():
        without = load(path)(ids, given)
        monkeypatch.setattr(reference.config, "sliding_window", 7)
        monkeypatch.setattr("library.models.gemma2.SLIDING_WINDOW", 7)
        actual = load(path)(ids, given)
    expected = states_of(reference, ids, given)
    torch.testing.assert_close(actual[valid], expected[valid], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual[1, :7], without[1, :7], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(actual[1, 7:], without[1, 7:], atol=1e-2)


def test_the_amount_of_padding_and_the_neighbours_change_nothing(path):
    ids, mask = tokens(3, 11)
    encoder = load(path)
    with torch.no_grad():
        together = encoder(ids, mask)
        for row, length in enumerate((3, 11)):
            alone = encoder(ids[row : row + 1, :length], None)
            torch.testing.assert_close(together[row : row + 1, :length], alone, atol=1e-5, rtol=1e-5)


def test_neither_the_last_layer_nor_the_final_norm_runs(path):
    encoder, (ids, mask) = load(path), tokens(9, 24)
    with torch.no_grad():
        expected = encoder(ids, mask)
        for parameter in (*encoder.layers[-1].parameters(), encoder.norm.weight):
            parameter.fill_(float("nan"))
        assert torch.equal(encoder(ids, mask), expected)
    assert [block is layer for block, layer in zip(encoder.block_lists()["layers"], encoder.layers)] == [True] * 3


LAYOUTS = {
    "": {},
    "model.": {"lm_head.weight": (4, 4), "logit_scale": (), "spiece_model": (9,)},
    "transformer.model.": {"logit_scale": ()},
    "gemma2_2b.transformer.model.": {"gemma2_2b.logit_scale": (), "spiece_model": (9,)},
    "text_encoders.gemma2_2b.transformer.model.": {
        "text_encoders.gemma2_2b.logit_scale": (),
        "text_encoders.spiece_model": (9,),
        "model.diffusion_model.cap_embedder.1.weight": (4, 4),
        "model.diffusion_model.context_refiner.0.attention.qkv.weight": (4, 4),
        "model.diffusion_model.layers.0.attention.qkv.weight": (4, 4),
        "vae.decoder.conv_in.weight": (4, 4, 3, 3),
    },
}


@pytest.mark.parametrize("prefix", LAYOUTS)
def test_every_prefix_loads_to_the_same_weights(reference, tmp_path, prefix):
    state = {prefix + name: value for name, value in reference.state_dict().items()}
    others = {key: torch.zeros(shape) for key, shape in LAYOUTS[prefix].items()}
    save_file(state | others, tmp_path / "file.safetensors", EXCEPTIONS)
    loaded = load(tmp_path / "file.safetensors").state_dict()
    assert loaded.keys() == reference.state_dict().keys()
    assert all(torch.equal(loaded[key], value) for key, value in reference.state_dict().items())


def test_folders_and_shards_say_their_exceptions_themselves(reference, path, tmp_path):
    reference.save_pretrained(tmp_path / "model" / "text_encoder", max_shard_size="50KB")
    assert len(list((tmp_path / "model" / "text_encoder").glob("*.safetensors"))) > 1
    expected = load(path).state_dict()
    for folder in (tmp_path / "model", tmp_path / "model" / "text_encoder"):
        encoder = load(folder)
        assert encoder.config.query_pre_attn_scalar == 9
        assert all(torch.equal(value, expected[key]) for key, value in encoder.state_dict().items())


def test_modules_keep_the_names_that_lora_files_use(path):
    owners = {name: type(module).__name__ for name, module in load(path).named_modules()}
    assert owners["layers.3.self_attn"] == "Gemma2Attention" and owners["layers.3.mlp"] == "Gemma2MLP"
    linears = sorted(name.removeprefix("layers.3.") for name in owners if owners[name] == "Linear" and ".3." in name)
    projections = [*(f"mlp.{name}_proj" for name in ("down", "gate", "up"))]
    assert linears == [*projections, *(f"self_attn.{name}_proj" for name in "koqv")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, BlocksStoredAs(torch.float16)])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_gradients_reach_every_linear_that_runs(reference, path, dtype, is_checkpointed):
    encoder = load(path, dtype)
    apply_memory_plan(encoder.block_lists(), MemoryPlan(checkpointing=is_checkpointed))
    ids, mask = tokens(9, 24)
    offsets: dict[str, torch.Tensor] = {}
    for name, layer in encoder.named_modules():
        if isinstance(layer, torch.nn.Linear):
            offsets[name] = torch.zeros(layer.out_features, requires_grad=True)
            layer.register_forward_hook(lambda module, inputs, y, offset=offsets[name]: y + offset.to(y.dtype))
    given = {"input_ids": ids, "attention_mask": mask}
    assert not encode_gemma(encoder, given)["hidden_state"].requires_grad
    encode_gemma(encoder, given, with_gradients=True)["hidden_state"].float().square().sum().backward()
    reached = {name for name, offset in offsets.items() if offset.grad is not None and offset.grad.abs().sum() > 0}
    assert reached == {name for name in offsets if not name.startswith("layers.3.")}


def test_linear_weights_of_layers_are_stored_in_8_bits_and_the_embedding_is_not(reference, path):
    encoder, (ids, mask) = load(path, BlocksStoredAs(torch.float32)), tokens(9, 24)
    formats = {name: layer.format_name for name, layer in encoder.named_modules() if hasattr(layer, "format_name")}
    assert len(formats) == 4 * 7 and set(formats.values()) == {"float8_e4m3fn"}
    assert encoder.embed_tokens.weight.dtype == torch.float32
    expected = states_of(reference, ids, mask)
    with torch.no_grad():
        assert (encoder(ids, mask) - expected).abs().mean() < 0.15 * expected.abs().mean()


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        *((torch.float16, autocast) for autocast in (None, torch.float16, torch.bfloat16)),
        *((BlocksStoredAs(torch.float16), autocast) for autocast in (None, torch.float16)),
        *((dtype, torch.float16) for dtype in (torch.float32, torch.bfloat16)),
    ],
)
def test_states_and_products_beyond_the_range_of_float16_are_finite(reference, tmp_path, dtype, autocast):
    """Gemma 2 was trained in bfloat16, whose range is that of float32."""
    state = {name: value.clone() for name, value in reference.state_dict().items()}
    for name in state:
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            state[name] *= 200
        if name.endswith("post_feedforward_layernorm.weight"):
            state[name] += 30000.0
    save_file(state, tmp_path / "gemma.safetensors", EXCEPTIONS)
    huge = Gemma2Model(reference.config).eval()
    huge.load_state_dict(state)
    ids, mask = tokens(9, 24)
    expected = states_of(huge, ids, mask)
    assert expected.abs().max() > torch.finfo(torch.float16).max
    encoder = load(tmp_path / "gemma.safetensors", dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype=autocast or torch.float16, enabled=autocast is not None):
        actual = encoder(ids, mask)
    assert actual.dtype == torch.float32 and actual.isfinite().all()
    tolerance = 0.15 if isinstance(dtype, BlocksStoredAs) else 0.02
    assert (actual - expected).abs().mean() < tolerance * expected.abs().mean()


def test_scaled_fp8_weights_are_multiplied_by_their_scales(reference, tmp_path):
    state = {f"model.{name}": value for name, value in reference.state_dict().items()}
    expected = {}
    for key in [key for key in state if "proj" in key]:
        scale = state[key].abs().max() / 448
        state[key] = (state[key] / scale).to(torch.float8_e4m3fn)
        state[key.replace(".weight", ".scale_weight")] = scale
        expected[key.removeprefix("model.")] = state[key].float() * scale
    state["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    save_file(state, tmp_path / "gemma_2_2b_fp8_scaled.safetensors", EXCEPTIONS)
    loaded = load(tmp_path / "gemma_2_2b_fp8_scaled.safetensors").state_dict()
    assert len(expected) == 28 and all(torch.equal(loaded[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("sizes", "config", "message"),
    [
        ({}, {}, r"the 96 rows of q_proj cannot be split into heads of 256; .*\"head_dim\" in the \"config\" entry"),
        ({}, {"head_dim": 20}, "the 96 rows of q_proj cannot be split into heads of 20"),
        ({}, {"head_dim": 0}, '"head_dim" in its configuration is 0, not a whole number'),
        ({}, {"head_dim": "sixteen"}, "\"head_dim\" in its configuration is 'sixteen'"),
        ({}, {"head_dim": 16, "query_pre_attn_scalar": None}, '"query_pre_attn_scalar" in its configuration is None'),
        ({}, {"head_dim": 1}, "with 96 heads of queries and 32 of keys"),
        ({}, {"head_dim": 32}, None),
        ({"layers.0.self_attn.k_proj.weight": (40, 48)}, {"head_dim": 16}, "the 40 rows of k_proj"),
        ({"embed_tokens.weight": (100,)}, {"head_dim": 16}, "2 sizes above 0 are needed"),
    ],
)
def test_sizes_that_do_not_fit_are_one_sentence_before_anything_is_loaded(reference, tmp_path, sizes, config, message):
    state = dict(reference.state_dict()) | {name: torch.zeros(shape) for name, shape in sizes.items()}
    save_file(state, tmp_path / "gemma.safetensors", {"config": json.dumps(config)})
    if message is None:
        assert open_gemma2(tmp_path / "gemma.safetensors").sizes["num_key_value_heads"] == 1
        return
    with pytest.raises(UserError, match=message) as error:
        open_gemma2(tmp_path / "gemma.safetensors", option="--gemma2")
    assert str(error.value).startswith("--gemma2: ") and "\n" not in str(error.value)


def test_the_published_sizes_are_found_without_metadata(tmp_path):
    published = Gemma2Config()
    with on_meta():
        expected = Gemma2Model(published).state_dict()
    path = tmp_path / "gemma_2_2b_fp16.safetensors"
    opened = open_gemma2(
        write_hollow(path, {f"model.{name}": value for name, value in expected.items()}, torch.float16)
    )
    module = opened.meta_module()
    assert {name: value.shape for name, value in module.state_dict().items()} == {
        name: value.shape for name, value in expected.items()
    }
    for name in ("query_pre_attn_scalar", "sliding_window", "rms_norm_eps", "layer_types", "hidden_activation"):
        assert getattr(module.config, name) == getattr(published, name)
    assert (opened.vocabulary, opened.hidden_size) == (256000, 2304)
