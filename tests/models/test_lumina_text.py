"""Lumina's prompts become states of Gemma 2 that depend on nothing but the prompt."""

from __future__ import annotations

import pytest
import torch

from library.models.gemma2 import Gemma2File, open_gemma2
from library.models.loading import LoadSpec
from library.models.lumina.text import TEXT_LENGTH, encode_gemma, gemma_tokens, with_system_prompt
from library.models.tokenizer_files import GEMMA_2, load_tokenizer
from tools.make_tiny_models import make_tiny_gemma2

PROMPTS = ["", "a red cat", with_system_prompt("two dogs on the big circle", "You are an assistant.")]


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Gemma2File:
    return open_gemma2(make_tiny_gemma2(tmp_path_factory.mktemp("gemma") / "gemma_2_2b.safetensors"))


def encoded(opened, prompts, length, dtype=torch.float32):
    tokens = gemma_tokens(load_tokenizer(GEMMA_2, opened.source.checkpoint, opened.vocabulary), prompts, length)
    return tokens, encode_gemma(opened.load(LoadSpec.of(dtype)), tokens)


def test_the_system_prompt_stands_before_the_prompt_unless_it_is_empty():
    assert with_system_prompt("a cat", "You draw.") == "You draw. <Prompt Start> a cat"
    assert with_system_prompt("a cat", "") == "a cat"
    assert with_system_prompt("", "You draw.") == "You draw. <Prompt Start> "


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conditioning_has_the_states_in_the_encoders_dtype_and_the_tokens_untouched(opened, dtype):
    tokens, conditioning = encoded(opened, PROMPTS, TEXT_LENGTH, dtype)
    states = conditioning["hidden_state"]
    assert states.shape == (3, 256, opened.hidden_size) and states.dtype == dtype and states.isfinite().all()
    assert all(conditioning[name] is values for name, values in tokens.items())
    assert conditioning["attention_mask"].sum(dim=1)[0] == 1


def test_states_depend_on_the_prompt_alone(opened):
    together = encoded(opened, PROMPTS, TEXT_LENGTH)[1]
    for row, prompt in enumerate(PROMPTS):
        count = int(together["attention_mask"][row].sum())
        for length in (count, 300):
            alone = encoded(opened, [prompt], length)[1]["hidden_state"][0, :count]
            torch.testing.assert_close(alone, together["hidden_state"][row, :count], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together["hidden_state"][1, 1], together["hidden_state"][2, 1], atol=0.1)
