"""A caption becomes a prompt in exactly the documented order, from files as they are found."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.captions import (
    CaptionRules,
    count_tags,
    find_caption_file,
    fixed_caption,
    make_caption,
    read_caption,
)
from library.errors import UserError


def made(caption, *, seed=0, epoch=1, step=0, steps=100, **rules):
    rng = random.Random(seed)
    return make_caption(caption, CaptionRules(**rules), rng=rng, epoch=epoch, step=step, max_train_steps=steps)


def test_without_options_the_first_line_is_used_verbatim():
    assert made("a ,b|||  c{x|y}\nsecond") == "a ,b|||  c{x|y}"


def test_prefix_and_suffix_come_first_so_they_are_shuffled_with_the_tags():
    outcomes = {made("b", caption_prefix="a,", caption_suffix=", c", shuffle_caption=True, seed=s) for s in range(60)}
    assert outcomes == {"a, b, c", "a, c, b", "b, a, c", "b, c, a", "c, a, b", "c, b, a"}


def test_a_dropped_caption_is_empty_even_with_a_prefix():
    assert made("b", caption_prefix="a", caption_dropout_rate=1.0) == ""
    assert made("b", caption_dropout_rate=0.0) == "b"


def test_every_nth_epoch_drops_counting_from_one():
    kept = [bool(made("b", caption_dropout_every_n_epochs=2, epoch=epoch)) for epoch in (1, 2, 3, 4)]
    assert kept == [True, False, True, False]
    assert made("b", caption_dropout_every_n_epochs=2, epoch=0) == "b"


def test_dropout_rate_is_a_probability():
    dropped = sum(made("b", caption_dropout_rate=0.3, seed=s) == "" for s in range(2000))
    assert 500 < dropped < 700


def test_wildcards_choose_lines_and_parts_and_protect_double_braces():
    outcomes = {made("a {x|y}\nb {{z}} {only}", enable_wildcard=True, seed=s) for s in range(60)}
    assert outcomes == {"a x", "a y", "b {z} only"}


def test_keep_tokens_stay_in_front_and_empty_tags_survive():
    for seed in range(20):
        tags = made("a, b, , d", keep_tokens=2, shuffle_caption=True, seed=seed).split(", ")
        assert tags[:2] == ["a", "b"] and sorted(tags[2:]) == ["", "d"]


def test_keep_tokens_separator_fixes_front_and_end_and_drops_empty_tags():
    caption = "a, b ||| c, d, , e ||| f ||| g"
    for seed in range(20):
        tags = made(caption, keep_tokens_separator="|||", keep_tokens=1, shuffle_caption=True, seed=seed).split(", ")
        assert tags[:2] == ["a", "b"] and tags[-1] == "f ||| g" and sorted(tags[2:-1]) == ["c", "d", "e"]


def test_keep_tokens_separator_stays_in_the_text_when_nothing_varies():
    assert made("a, b ||| c, d", keep_tokens_separator="|||") == "a, b ||| c, d"


def test_tags_are_joined_with_comma_and_space_whatever_the_separator():
    outcomes = {made("a|b", caption_separator="|", shuffle_caption=True, seed=s) for s in range(20)}
    assert outcomes == {"a, b", "b, a"}


def test_secondary_separator_becomes_the_separator_last():
    assert made("a;;;b", secondary_separator=";;;") == "a,b"
    outcomes = {made("a;;;b, c", secondary_separator=";;;", shuffle_caption=True, seed=s) for s in range(20)}
    assert outcomes == {"a,b, c", "c, a,b"}


@pytest.mark.parametrize(
    ("step", "tags"), [(0, "ab"), (12, "ab"), (13, "abc"), (25, "abcd"), (49, "abcde"), (50, "abcdef")]
)
def test_token_warmup_grows_the_number_of_tags(step, tags):
    # One fixed tag, then floor(step * (5 - 1) / 50) + 1 of the five flexible ones.
    made_now = made("a, b, c, d, e, f", keep_tokens=1, token_warmup_min=1, token_warmup_step=50, step=step)
    assert made_now == ", ".join(tags)


def test_token_warmup_below_one_is_a_share_of_all_steps():
    assert made("a, b, c, d", token_warmup_step=0.5, step=49, steps=100) == "a, b, c"
    assert made("a, b, c, d", token_warmup_step=0.5, step=50, steps=100) == "a, b, c, d"


def test_warmup_picks_the_first_tags_before_shuffling():
    for seed in range(20):
        assert set(made("a, b, c, d", token_warmup_step=10, shuffle_caption=True, step=5, seed=seed)) <= set("ab, ")


def test_tag_dropout_leaves_fixed_tags():
    assert made("a, b, c", keep_tokens=1, caption_tag_dropout_rate=1.0) == "a"
    kept = sum(made("a, b", keep_tokens=1, caption_tag_dropout_rate=0.25, seed=s) == "a, b" for s in range(2000))
    assert 1400 < kept < 1600


words = st.text(alphabet="abcXYZ 0_-", min_size=1, max_size=6).map(str.strip).filter(bool)


@given(st.lists(words, min_size=1, max_size=8), st.integers(0, 9), st.integers(0, 2**32), st.integers(0, 30))
def test_shuffling_permutes_and_warmup_takes_a_prefix(tags, keep, seed, step):
    caption = ",".join(tags)
    shuffled = made(caption, shuffle_caption=True, keep_tokens=keep, seed=seed).split(", ")
    assert sorted(shuffled) == sorted(tags) and shuffled[:keep] == tags[:keep]
    warming = made(caption, token_warmup_step=20, keep_tokens=keep, step=step, seed=seed).split(", ")
    assert warming == tags[: len(warming)]
    if step >= 20:
        assert warming == tags


@given(words, st.sampled_from(["", "pre"]), st.sampled_from(["", "suf"]), st.sampled_from([None, ";"]))
def test_the_cached_caption_is_what_training_would_use(caption, prefix, suffix, secondary):
    rules = {"caption_prefix": prefix, "caption_suffix": suffix, "secondary_separator": secondary}
    assert fixed_caption(caption + ";x\nline", CaptionRules(**rules)) == made(caption + ";x\nline", **rules)


@pytest.mark.parametrize(
    "option",
    [
        {"shuffle_caption": True},
        {"caption_dropout_rate": 0.1},
        {"caption_dropout_every_n_epochs": 2},
        {"token_warmup_step": 0.5},
        {"caption_tag_dropout_rate": 0.1},
    ],
)
def test_options_that_change_captions_cannot_be_cached(option):
    with pytest.raises(UserError, match=next(iter(option))):
        fixed_caption("a", CaptionRules(**option))


def test_wildcards_can_be_cached_only_without_a_choice():
    rules = CaptionRules(enable_wildcard=True)
    assert fixed_caption("a {{b}} {c}", rules) == "a {b} c"
    with pytest.raises(UserError, match=r"the choice \{a\|b\}"):
        fixed_caption("{a|b}", rules)
    with pytest.raises(UserError, match="several lines"):
        fixed_caption("a\nb", rules)


def test_caption_files_first_line_or_all_lines(tmp_path):
    file = tmp_path / "x.txt"
    file.write_bytes("\ufeff  erste Zeile ä \r\n\r\n zweite \r\n".encode())
    assert read_caption(file, enable_wildcard=False).caption == "erste Zeile ä"
    assert read_caption(file, enable_wildcard=True).caption == "erste Zeile ä\nzweite"


def test_an_empty_or_undecodable_caption_file_is_named(tmp_path):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_bytes(b"")
    latin.write_bytes("ä".encode("latin-1"))
    with pytest.raises(UserError, match=r"empty\.txt.*empty"):
        read_caption(empty, enable_wildcard=False)
    with pytest.raises(UserError, match=r"latin\.txt.*UTF-8"):
        read_caption(latin, enable_wildcard=False)


def test_face_suffix_is_ignored_when_looking_for_the_caption(tmp_path):
    image = tmp_path / "anna_10_20_30_40.png"
    assert find_caption_file(image, ".txt", {"anna.txt"}) == str(tmp_path / "anna.txt")
    found = find_caption_file(image, ".txt", {"anna.txt", "anna_10_20_30_40.txt"})
    assert found == str(tmp_path / "anna_10_20_30_40.txt")
    assert find_caption_file(tmp_path / "a_b_c.png", ".txt", {"a.txt"}) is None


def test_tags_are_counted_in_lower_case_at_commas():
    assert count_tags(["A Cat, dog,,dog", "a cat"]) == {"a cat": 2, "dog": 2}
