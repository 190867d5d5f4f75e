"""The glyph ByT5 is transformers' T5 encoder, and its tokens are those of transformers' tokenizer without files."""

from __future__ import annotations

import pytest
import torch

from library.errors import UserError
from library.models.byt5 import byt5_tokens, open_byt5
from library.models.loading import LoadSpec
from library.models.t5 import open_t5
from library.safetensors_io import save_file
from tools.tiny_hunyuan_text import byt5_state, make_tiny_byt5, tiny_byt5, write_diffusers_byt5

TEXTS = ["", 'Text "Hi". ', "Größe — 日本語 😀\n\t<color-1>", "a" * 126, "a" * 127, "a" * 128, "é" * 100]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_tiny_byt5(tmp_path_factory.mktemp("byt5") / "byt5_small_glyphxl_fp16.safetensors")


def load(path, dtype=torch.float32):
    return open_byt5(path).load(LoadSpec.of(dtype))


def test_states_are_those_of_transformers(path, tmp_path):
    from transformers import T5EncoderModel

    write_diffusers_byt5(tmp_path)
    reference = T5EncoderModel.from_pretrained(tmp_path / "text_encoder_2")
    tokens = byt5_tokens(TEXTS[:3], 128)
    with torch.no_grad():
        expected = reference(**tokens).last_hidden_state
        for file in (path, tmp_path):
            torch.testing.assert_close(load(file)(*tokens.values()), expected, atol=1e-5, rtol=1e-5)


def test_tokens_are_bytes_behind_three_special_ones():
    assert byt5_tokens(['Text "Hi". '], 128)["input_ids"].tolist() == [
        [87, 104, 123, 119, 35, 37, 75, 108, 37, 49, 35, 1]
    ]


def test_tokens_are_those_of_transformers_tokenizer():
    from transformers import ByT5Tokenizer

    given = ByT5Tokenizer()(TEXTS, max_length=128, padding="longest", truncation=True, return_tensors="pt")
    tokens = byt5_tokens(TEXTS, 128)
    assert torch.equal(tokens["input_ids"], given.input_ids)
    assert torch.equal(tokens["attention_mask"], given.attention_mask)
    assert tokens["input_ids"].dtype == tokens["attention_mask"].dtype == torch.int64
    assert tokens["input_ids"][5, 127] == 1, "a text that is cut ends, too"


def test_half_of_a_surrogate_pair_is_a_character_like_any_other():
    assert byt5_tokens(["a\ud800b"], 128)["attention_mask"].sum() == 4


def test_every_layout_loads_to_the_same_weights(path, tmp_path):
    state = byt5_state(tiny_byt5(64, 0), torch.float32)
    stack = {name.replace("shared.", "encoder.embed_tokens."): value for name, value in state.items()}
    others = {"module.visual.conv.weight": torch.zeros(4, 4), "module.logit_scale": torch.ones(())}
    glyph_sdxl = {f"module.text_tower.{name}": value for name, value in stack.items()} | others
    torch.save({"epoch": 3, "state_dict": glyph_sdxl}, tmp_path / "byt5_model.pt")
    save_file(stack, tmp_path / "stack.safetensors")
    save_file(
        state | {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(4, 4)}, tmp_path / "full.safetensors"
    )
    together = {f"text_encoders.byt5_small.transformer.{name}": value for name, value in state.items()}
    together |= {"model.diffusion_model.byt5_in.fc1.weight": torch.ones(4, 4), "vae.any": torch.ones(1)}
    save_file(together, tmp_path / "all.safetensors")
    expected = load(path).state_dict()
    for name in ("byt5_model.pt", "stack.safetensors", "full.safetensors", "all.safetensors"):
        loaded = load(tmp_path / name).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in loaded.items())


def test_code_in_a_pickled_file_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    torch.save({"state_dict": {"module.text_tower.encoder.x": Evil()}}, tmp_path / "byt5_model.pt")
    with pytest.raises(UserError, match=r"^--byt5: .*holds more than tensors"):
        open_byt5(tmp_path / "byt5_model.pt", option="--byt5")


@pytest.mark.parametrize(
    ("shapes", "description"),
    [
        ({"shared.weight": (384, 1472)}, "is plain ByT5, which knows no glyphs"),
        ({"shared.weight": (384, 1472), "decoder.block.0.layer.0.SelfAttention.q.weight": (4, 4)}, "is plain ByT5"),
        (
            {"encoder.block.0.layer.0.SelfAttention.q.weight": (4, 4096), "shared.weight": (32128, 1)},
            "is a T5 text enc",
        ),
    ],
)
def test_other_encoders_are_refused_in_one_sentence(tmp_path, shapes, description):
    shapes = {"encoder.block.0.layer.0.SelfAttention.q.weight": (4, 1472)} | shapes
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "byt5.safetensors")
    with pytest.raises(UserError, match=rf"^--byt5: .*({description}).*the glyph ByT5.* is needed here\.$") as error:
        open_byt5(tmp_path / "byt5.safetensors", option="--byt5")
    assert "\n" not in str(error.value)


def test_the_glyph_encoder_is_no_t5(path):
    with pytest.raises(UserError, match="is a glyph ByT5 text encoder; a T5 v1.1 text encoder is needed here"):
        open_t5(path)


def test_the_published_sizes_are_found(tmp_path):
    from tests.full_size import write_hollow

    shapes = {"shared.weight": (1510, 1472), "encoder.final_layer_norm.weight": (1472,)}
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 6)
    for index in range(12):
        attention, feed = f"encoder.block.{index}.layer.0.", f"encoder.block.{index}.layer.1."
        shapes |= {f"{attention}SelfAttention.{name}.weight": (384, 1472) for name in "qkv"}
        shapes |= {f"{attention}SelfAttention.o.weight": (1472, 384), f"{feed}DenseReluDense.wo.weight": (1472, 3584)}
        shapes |= {f"{feed}DenseReluDense.wi_{which}.weight": (3584, 1472) for which in (0, 1)}
        shapes |= {f"{layer}layer_norm.weight": (1472,) for layer in (attention, feed)}
    hollow = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    opened = open_byt5(write_hollow(tmp_path / "byt5_small_glyphxl_fp16.safetensors", hollow, torch.float16))
    shapes["encoder.embed_tokens.weight"] = shapes.pop("shared.weight")
    state = opened.meta_module().state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == shapes
    assert (opened.vocabulary, opened.hidden_size) == (1510, 1472)
