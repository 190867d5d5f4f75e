"""HunyuanImage-2.1's prompts become states that depend on the prompt alone; quoted texts become glyph states."""

from __future__ import annotations

import pytest
import torch

from library.models.byt5 import byt5_tokens, open_byt5
from library.models.hunyuan_image.text import (
    TEXT_LENGTH,
    encode_glyphs,
    encode_qwen,
    glyph_text,
    quoted_texts,
    qwen_tokens,
)
from library.models.loading import LoadSpec
from library.models.qwen2_5_vl import open_qwen2_5_vl
from library.models.tokenizer_files import QWEN2_5_VL, load_tokenizer
from tools.tiny_hunyuan_text import make_tiny_byt5, make_tiny_qwen2_5_vl

PROMPTS = ["", "a red cat", 'a sign that says "open" and “closed 日本”']

QUOTED = {
    "": [],
    "a cat": [],
    'a sign "Hello"': ["Hello"],
    "a sign “Hello”": ["Hello"],
    "a sign ‘Hello’": ["Hello"],
    "a sign 'Hello'": [],
    "it's the cat's": [],
    "it’s the cat’s": [],
    "‘it’s’": ["it"],
    "“it’s”": ["it’s"],
    '"it\'s"': ["it's"],
    '"one" and "two"': ["one", "two"],
    '“three” ‘two’ "one"': ["one", "two", "three"],
    '“c1” "a1" ‘b1’ "a2" “c2” ‘b2’': ["a1", "a2", "b1", "b2", "c1", "c2"],
    '"outer ‘inner’ “other”"': ["outer ‘inner’ “other”", "inner", "other"],
    "“outer “inner” end”": ["outer “inner"],
    'a 5" disk': [],
    'a 5" and a 6" disk': [" and a 6"],
    'odd "one" two"': ["one"],
    "“open": [],
    "closed”": [],
    "”backwards“": [],
    'a "line\nbreak"': [],
    'a "line\nbreak" and "whole"': [" and "],
    "“one\ntwo” ‘three\nfour’ ‘five’": ["five"],
    '""': [""],
    '" "': [" "],
    "„low” “high”": ["high"],
    "「日本」 “東京”": ["東京"],
}


@pytest.mark.parametrize("prompt", QUOTED)
def test_texts_are_quoted_by_three_kinds_of_marks_in_their_order(prompt):
    assert quoted_texts(prompt) == QUOTED[prompt]


def test_the_glyph_encoder_reads_each_quoted_text_in_a_sentence():
    assert glyph_text("a cat") is None and glyph_text("") is None
    assert glyph_text('"Hi"') == 'Text "Hi". '
    assert glyph_text('“東京” and "Hi" and ‘x’') == 'Text "Hi". Text "x". Text "東京". '


# Qwen2.5-VL

GOLDEN = (
    *(151644, 8948, 198, 74785, 279, 2168, 553, 44193, 279, 1894, 11, 6083, 11, 1379, 11, 10434, 11, 12194, 11, 1467),
    *(11, 27979, 11871, 315, 279, 6171, 323, 4004, 25, 151645, 198, 151644, 872, 198),
)
"""The tokens before the prompt in Qwen2.5's vocabulary."""


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    opened = open_qwen2_5_vl(make_tiny_qwen2_5_vl(tmp_path_factory.mktemp("qwen") / "qwen_2.5_vl_7b.safetensors"))
    return opened.load(LoadSpec.of(torch.float32)), load_tokenizer(
        QWEN2_5_VL, opened.source.checkpoint, opened.vocabulary
    )


@pytest.fixture(scope="module")
def byt5(tmp_path_factory):
    path = make_tiny_byt5(tmp_path_factory.mktemp("byt5") / "byt5.safetensors")
    return open_byt5(path).load(LoadSpec.of(torch.float32))


def test_the_template_is_cut_into_the_same_words_as_with_the_published_vocabulary(qwen):
    """The tiny vocabulary has its words under other numbers: which tokens are equal is what both have in common."""
    tokenizer = qwen[1]
    tokens = qwen_tokens(tokenizer, ["", "a", "a cat"])
    assert tokens.crop == len(GOLDEN) == 34
    for row, words in enumerate(([], ["a"], ["a", "Ġcat"])):
        before, count = tokens.ids[row, :34].tolist(), len(words) + 1
        assert [before.index(token) for token in before] == [GOLDEN.index(token) for token in GOLDEN]
        assert tokenizer.convert_ids_to_tokens(tokens.ids[row, 34 : 34 + count].tolist()) == [*words, "<|im_end|>"]
        assert tokens.mask[row].tolist() == [1] * (34 + count) + [0] * (3 - count)
        assert (tokens.ids[row, 34 + count :] == tokenizer.pad_token_id).all()
    assert tokenizer.pad_token == "<|endoftext|>"


def test_a_long_prompt_loses_its_end_and_the_templates(qwen):
    tokenizer = qwen[1]
    cat = tokenizer.convert_tokens_to_ids("Ġcat")
    for length, words in ((TEXT_LENGTH, 1100), (5, 5), (5, 4)):
        tokens = qwen_tokens(tokenizer, [" cat" * words], length)
        end = [tokenizer.convert_tokens_to_ids("<|im_end|>")] if words < length else []
        assert tokens.ids[0, tokens.crop :].tolist() == [cat] * min(length, words) + end


def test_states_of_prompts_depend_on_nothing_but_the_prompt(qwen):
    encoder, tokenizer = qwen
    together = encode_qwen(encoder, qwen_tokens(tokenizer, PROMPTS))
    assert together["vlm_embed"].shape == (*together["vlm_mask"].shape, 64)
    for row, prompt in enumerate(PROMPTS):
        count = int(together["vlm_mask"][row].sum())
        alone = encode_qwen(encoder, qwen_tokens(tokenizer, [prompt]))
        assert alone["vlm_embed"].shape == (1, count, 64) and alone["vlm_mask"].tolist() == [[1] * count]
        torch.testing.assert_close(together["vlm_embed"][row, :count], alone["vlm_embed"][0], atol=1e-5, rtol=1e-5)
        assert (together["vlm_embed"][row, count:] == 0).all() and (alone["vlm_embed"].abs().sum(dim=-1) > 0).all()
    assert together["vlm_mask"][0].sum() == 1 and not together["vlm_embed"].requires_grad


def test_what_stands_before_the_prompt_is_read_though_it_is_not_given(qwen):
    """The states are those of the whole text, of which the template's beginning is cut off."""
    encoder, tokenizer = qwen
    tokens = qwen_tokens(tokenizer, ["a red cat"])
    states = encode_qwen(encoder, tokens)["vlm_embed"]
    with torch.no_grad():
        torch.testing.assert_close(states, encoder(tokens.ids)[:, 34:])
        assert not torch.allclose(states, encoder(tokens.ids[:, 34:]), atol=0.1)


# Glyphs


def test_glyph_states_are_those_of_the_quoted_texts_alone(byt5):
    together = encode_glyphs(byt5, [*PROMPTS, '"x"'])
    assert together["ocr_mask"].tolist() == [False, False, True, True]
    assert together["byt5_embed"].shape == (4, 128, 64) and together["byt5_mask"].shape == (4, 128)
    for row, prompt in ((2, PROMPTS[2]), (3, '"x"')):
        tokens = byt5_tokens([glyph_text(prompt)], 128)
        count = tokens["input_ids"].shape[1]
        with torch.no_grad():
            expected = byt5(tokens["input_ids"])[0]
        torch.testing.assert_close(together["byt5_embed"][row, :count], expected, atol=1e-5, rtol=1e-5)
        assert together["byt5_mask"][row].tolist() == [1] * count + [0] * (128 - count)
        assert (together["byt5_embed"][row, count:] == 0).all()


def test_nothing_quoted_is_zeros_and_the_encoder_does_not_run(byt5):
    handle = byt5.register_forward_pre_hook(lambda *_: pytest.fail("it runs"))
    encoded = encode_glyphs(byt5, PROMPTS[:2])
    handle.remove()
    assert all(not value.any() for value in encoded.values())
    assert encoded["byt5_embed"].shape == (2, 128, 64) and encoded["byt5_embed"].dtype == torch.float32
    assert encoded["byt5_mask"].dtype == torch.int64 and encoded["ocr_mask"].dtype == torch.bool


def test_a_long_quoted_text_is_cut_and_still_ends(byt5):
    encoded = encode_glyphs(byt5, [f'"{"long " * 100}"', f'"{"日" * 100}"'])
    assert encoded["byt5_mask"].sum(dim=1).tolist() == [128, 128]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_states_are_in_the_encoders_dtype(tmp_path, dtype):
    byt5 = open_byt5(make_tiny_byt5(tmp_path / "byt5.safetensors")).load(LoadSpec.of(dtype))
    for prompts in (PROMPTS, PROMPTS[:1]):
        assert encode_glyphs(byt5, prompts)["byt5_embed"].dtype == dtype
    opened = open_qwen2_5_vl(make_tiny_qwen2_5_vl(tmp_path / "qwen.safetensors"))
    tokenizer = load_tokenizer(QWEN2_5_VL, opened.source.checkpoint, opened.vocabulary)
    states = encode_qwen(opened.load(LoadSpec.of(dtype)), qwen_tokens(tokenizer, PROMPTS))["vlm_embed"]
    assert states.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
