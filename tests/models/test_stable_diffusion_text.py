"""Prompts become token chunks as kohya-ss/sd-scripts makes them, and chunks become conditioning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.checkpoints import open_checkpoint
from library.errors import UserError
from library.models.clip import ClipConfig, ClipTextEncoder
from library.models.stable_diffusion.text import (
    Tokens,
    chunk_count,
    encode,
    encode_for_xl,
    join_chunks,
    require_clip_skip,
    split_into_chunks,
    text_tokens,
    tokenize,
)
from library.models.tokenizer_files import CLIP_BIG_G, CLIP_H, CLIP_L, load_tokenizer
from library.safetensors_io import save_file

START, END = 49406, 49407


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """The three tokenizers as they come where no files are given: from the shipped vocabulary."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_file({"any": torch.ones(1)}, path)
    kinds = {"sd1": CLIP_L, "sd2": CLIP_H, "sdxl": CLIP_BIG_G}
    return {name: load_tokenizer(kind, open_checkpoint(path), 49408) for name, kind in kinds.items()}


def described_chunks(ids: list[int], chunks: int, pad: int) -> list[list[int]]:
    """The rule as it is described: the whole row first, cut or padded, then each chunk out of it, then repaired."""
    length = 75 * chunks + 2
    row = [START, *ids[: length - 2], END]
    row += [pad] * (length - len(row))
    if chunks == 1:
        return [row]
    rows = []
    for chunk in range(chunks):
        piece = [START, *row[75 * chunk + 1 : 75 * chunk + 76], row[-1]]
        if pad != END:
            if piece[-2] not in (END, pad):
                piece[-1] = END
            if piece[1] == pad:
                piece[1] = END
        rows.append(piece)
    return rows


@given(st.lists(st.integers(1, 49405), max_size=260), st.integers(1, 3), st.sampled_from([0, END]))
def test_chunks_follow_the_described_rule(ids, chunks, pad):
    assert split_into_chunks(ids, chunks, START, END, pad) == described_chunks(ids, chunks, pad)


@pytest.mark.parametrize("count", [0, 1, 74, 75, 76, 149, 150, 151, 224, 225, 226])
@pytest.mark.parametrize("pad", [0, END])
def test_chunks_follow_the_described_rule_at_the_borders(count, pad):
    for chunks in (1, 2, 3):
        ids = list(range(1, count + 1))
        assert split_into_chunks(ids, chunks, START, END, pad) == described_chunks(ids, chunks, pad)


def test_an_exclamation_mark_at_a_border_is_not_taken_for_padding():
    """Token 0 is "!" in a text; the first chunk keeps an end of text, where the pooled text is taken."""
    ids = [*[320] * 74, 0, 0, 320]
    first, second = split_into_chunks(ids, 2, START, END, 0)
    assert first == [START, *ids[:75], END]
    assert second == [START, 0, 320, END, *[0] * 73]


@pytest.mark.parametrize("variant, pad", [("sd1", END), ("sd2", 0), ("sdxl", 0)])
def test_one_chunk_is_what_transformers_pads(tokenizers, variant, pad):
    prompts = ["", "a photo of a cat", "wow! a cat!! (red:1.2) !?", "x " * 100]
    ids = tokenize(tokenizers[variant], prompts).ids
    reference = tokenizers["sd1"]
    expected = reference(prompts, max_length=77, padding=False, truncation=True).input_ids
    assert ids.tolist() == [[row + [pad] * (77 - len(row))] for row in expected]
    assert ids[2, 0, :4].tolist() == [START, 2781, 256, 320], '"!" is a word (256), not padding'


def test_long_prompts_go_into_as_many_chunks_as_asked_for(tokenizers):
    prompt = "a photo of a cat, " * 40
    whole, _ = text_tokens(tokenizers["sdxl"], prompt)
    ids = tokenize(tokenizers["sdxl"], [prompt, "a cat"], chunks=3).ids
    assert ids.shape == (2, 3, 77)
    assert ids[0, :, 1:76].flatten().tolist() == whole[:225]
    assert ids[1].tolist() == [[START, 320, 2368, END, *[0] * 73], *[[START, END, *[0] * 75]] * 2]


def test_weights_stand_beside_their_tokens(tokenizers):
    prompt = "a photo " * 38 + "of (a cat:1.5) [on]"
    weighted = tokenize(tokenizers["sd1"], [prompt, "(red"], chunks=2, weighted=True)
    plain = tokenize(tokenizers["sd1"], ["a photo " * 38 + "of a cat on", "red"], chunks=2)
    assert torch.equal(weighted.ids, plain.ids)
    expected = torch.ones(2, 2, 77)
    expected[0, 1, 3:5] = 1.5  # 76 tokens, and "of": the second chunk is start, "photo", "of", "a", "cat", "on"
    expected[0, 1, 5] = 1 / 1.1
    expected[1, 0, 1] = 1.1
    torch.testing.assert_close(weighted.weights, expected)
    assert plain.weights is None


@pytest.mark.parametrize("length, chunks", [(None, 1), (75, 1), (150, 2), (225, 3)])
def test_text_lengths(length, chunks):
    assert chunk_count(length) == chunks


@pytest.mark.parametrize("length", [0, 77, 100, -75])
def test_other_text_lengths_are_refused(length):
    with pytest.raises(UserError, match="--max_token_length must be 75, 150 or 225"):
        chunk_count(length)


@pytest.mark.parametrize("clip_skip", [0, -1, 13])
def test_a_clip_skip_without_a_layer_is_refused(clip_skip):
    with pytest.raises(UserError, match="--clip_skip must be between 1 and 12"):
        require_clip_skip(clip_skip, 12)


def test_chunks_are_joined_to_one_start_all_inner_positions_and_one_end():
    states = torch.arange(2 * 3 * 77 * 5).reshape(2, 3, 77, 5).float()
    joined = join_chunks(states)
    rows = [states[:, 0, 0], *(states[:, chunk, position] for chunk in range(3) for position in range(1, 76))]
    assert torch.equal(joined, torch.stack([*rows, states[:, 2, 76]], dim=1))


# What CLIP makes of them


def clip(layers: int, projection: int | None = None) -> ClipTextEncoder:
    torch.manual_seed(layers)
    config = ClipConfig(
        vocab_size=110,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
    )
    encoder = ClipTextEncoder(config, projection).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder.requires_grad_(False)


def rows(*lengths: int, chunks: int = 1) -> Tokens:
    draw = torch.Generator().manual_seed(1)
    made = [torch.randint(0, 98, (length,), generator=draw).tolist() for length in lengths]
    return Tokens(torch.tensor([split_into_chunks(row, chunks, 98, 99, 99) for row in made]))


def test_each_chunk_is_read_alone():
    encoder, tokens = clip(3), rows(100, 30, chunks=2)
    states = encode(encoder, tokens)
    assert states.shape == (2, 152, 32)
    for chunk in range(2):
        alone = encoder.text_model(tokens.ids[:, chunk]).last_hidden_state
        torch.testing.assert_close(states[:, 75 * chunk + 1 : 75 * chunk + 76], alone[:, 1:76])


def test_sdxl_reads_layer_11_of_the_real_clip():
    """The last layer but one, which in a model of 12 layers is number 11 of 13 states."""
    encoder, tokens = clip(12), rows(20)
    states, pooled = encode_for_xl(encoder, tokens, 99)
    all_states = encoder.text_model(tokens.ids[:, 0]).hidden_states
    assert len(all_states) == 13 and pooled is None
    assert torch.equal(states, all_states[11])


def test_the_pooled_text_is_that_of_the_first_chunk():
    encoder, tokens = clip(3, projection=24), rows(100, chunks=2)
    _, pooled = encode_for_xl(encoder, tokens, 99)
    first = Tokens(tokens.ids[:, :1])
    torch.testing.assert_close(pooled, encode_for_xl(encoder, first, 99)[1])
    last = encoder.text_model(tokens.ids[:, 0]).last_hidden_state[:, 76]
    torch.testing.assert_close(pooled, last @ encoder.text_projection.weight.T)


def test_the_pooled_text_stands_at_the_first_end_though_added_tokens_have_higher_ids():
    encoder, tokens = clip(3, projection=24), rows(10)
    tokens.ids[0, 0, 4] = 105
    _, pooled = encode_for_xl(encoder, tokens, 99)
    last = encoder.text_model(tokens.ids[:, 0]).last_hidden_state[:, 11]
    torch.testing.assert_close(pooled, encoder.text_projection(last))


def test_weights_multiply_states_and_leave_the_pooled_text():
    encoder, tokens = clip(3, projection=24), rows(100, 3, chunks=2)
    weights = torch.ones(2, 2, 77)
    weights[0, 0, 4], weights[0, 1, 1], weights[1, 0, 2] = 1.5, 0.0, -2.0
    weighted = Tokens(tokens.ids, weights)
    factors = torch.ones(2, 152)
    factors[0, 4], factors[0, 76], factors[1, 2] = 1.5, 0.0, -2.0
    torch.testing.assert_close(encode(encoder, weighted), encode(encoder, tokens) * factors[..., None])
    states, pooled = encode_for_xl(encoder, tokens, 99)
    weighted_states, weighted_pooled = encode_for_xl(encoder, weighted, 99)
    torch.testing.assert_close(weighted_states, states * factors[..., None])
    assert torch.equal(weighted_pooled, pooled)
