"""Prompt lines and prompt files mean the same in every script."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.errors import UserError
from library.prompt_options import PromptOptions, parse_prompt_line, read_prompt_file


def test_all_options_of_a_line():
    sizes = "--w 640 --h 480 --d 7 --s 30 --l 4.5 --g 0"
    line = f"a cat --n blurry, dark {sizes} --ss euler --cn a b.png --ctr 0.5 --rcfg 1 --fs 3"
    assert parse_prompt_line(line) == PromptOptions(
        prompt="a cat",
        negative_prompt="blurry, dark",
        width=640,
        height=480,
        seed=7,
        sample_steps=30,
        scale=4.5,
        guidance_scale=0.0,
        sample_sampler="euler",
        controlnet_image="a b.png",
        cfg_trunc_ratio=0.5,
        renorm_cfg=1.0,
        flow_shift=3.0,
    )


def test_the_documented_chroma_line():
    line = "Japanese shrine in the summer forest. --n low quality, ugly --w 512 --h 512 --d 1 --l 4.0 --g 0.0 --s 20"
    options = parse_prompt_line(line)
    assert options.prompt == "Japanese shrine in the summer forest."
    assert (options.scale, options.guidance_scale, options.sample_steps) == (4.0, 0.0, 20)


def test_words_of_the_prompt_are_never_options():
    assert parse_prompt_line("s 5 dogs, w 10") == PromptOptions(prompt="s 5 dogs, w 10")
    assert parse_prompt_line("a well--known cat") == PromptOptions(prompt="a well--known cat")


def test_case_does_not_matter_and_the_first_of_two_counts():
    assert parse_prompt_line("x --W 64 --w 128").width == 64


def test_steps_are_kept_between_1_and_1000():
    assert parse_prompt_line("x --s 0").sample_steps == 1
    assert parse_prompt_line("x --s 5000").sample_steps == 1000


def test_signs_are_read():
    assert parse_prompt_line("x --g -1 --d -3") == PromptOptions(prompt="x", guidance_scale=-1.0, seed=-3)


def test_a_value_that_is_no_number_is_named():
    with pytest.raises(UserError, match='line 2: --w must be a whole number, not "big"'):
        parse_prompt_line("x --w big", "line 2")


@given(st.text(alphabet=st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp", "Zs")), max_size=40))
def test_any_prompt_without_double_dash_survives(text):
    if " --" not in f" {text.strip()}":
        assert parse_prompt_line(text).prompt == text.strip()


def test_text_file_skips_empty_lines_and_comments(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("\ufeff# comment\n\na cat --w 64\n  a dog\n", encoding="utf-8")
    assert [p.prompt for p in read_prompt_file(path)] == ["a cat", "a dog"]


def test_subset_keys_win_over_common_keys(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text(
        "[prompt]\nwidth = 64\nscale = 2\n"
        '[[prompt.subset]]\nprompt = "a"\n[[prompt.subset]]\nprompt = "b"\nwidth = 96\n',
        encoding="utf-8",
    )
    assert read_prompt_file(path) == [
        PromptOptions(prompt="a", width=64, scale=2.0),
        PromptOptions(prompt="b", width=96, scale=2.0),
    ]


def test_json_file_holds_lines_and_tables(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(["a cat --d 3", {"prompt": "a dog", "seed": 4}]), encoding="utf-8")
    assert read_prompt_file(path) == [PromptOptions(prompt="a cat", seed=3), PromptOptions(prompt="a dog", seed=4)]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("p.toml", "prompt = 3", r"needs a \[prompt\] table"),
        ("p.toml", "[prompt]\nwidht = 3", 'unknown key "widht". Did you mean "width"'),
        ("p.json", "{", "not valid JSON"),
        ("p.json", "{}", "needs a list"),
    ],
)
def test_mistakes_in_prompt_files_name_the_file(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=sentence):
        read_prompt_file(tmp_path / name)


def test_a_missing_prompt_file_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        read_prompt_file(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.toml", "[prompt]\nprompt='x'\n[prompt.subset]\nseed=1\n", "write [[prompt.subset]]"),
        ("a.toml", "[prompt]\nprompt='x'\nwidth=[64]\n", '"width" must be a whole number, not [64]'),
        ("a.toml", "[prompt]\nprompt='x'\nwidth=64.5\n", '"width" must be a whole number, not 64.5'),
        ("a.toml", "[prompt]\nprompt='x'\nscale=inf\n", '"scale" must be a number'),
        ("a.toml", "[prompt]\nprompt={a=1}\n", '"prompt" must be text'),
        ("a.toml", "prompt = [" + "[" * 10_000 + "]" * 10_000 + "]", "nested too deeply"),
        ("a.toml", "[prompt]\nprompt='x'\nseed=" + "9" * 5_000, "too many digits"),
        ("a.json", "[null]", "prompt 1: must be a prompt line or a table of keys, not null"),
        ("a.json", "[7]", "must be a prompt line or a table"),
        ("a.json", '[{"prompt": "x", "seed": true}]', '"seed" must be a whole number, not true'),
        ("a.json", "[" * 10_000 + "]" * 10_000, "nested too deeply"),
        ("a.json", '[{"seed": ' + "9" * 5_000 + "}]", "too many digits"),
        ("a.txt", "x --d " + "9" * 5_000, "--d must be a whole number"),
        ("a.txt", "x --l nan", "--l must be a number"),
    ],
)
def test_prompt_files_that_hold_something_else_get_one_sentence(tmp_path, name, text, sentence):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_prompt_file(path)
    assert sentence in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.toml", "[prompt]\nprompt='x'\n"), ("a.json", '[{"prompt": "x", "seed": null}]'), ("a.txt", "x\r\n\r\n")],
)
def test_a_byte_order_mark_and_null_are_passed_over(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_prompt_file(path) == [PromptOptions(prompt="x")]


def test_only_line_feeds_end_a_prompt(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\u2028 line\x0b here\nanother\x85 one\n", encoding="utf-8", newline="")
    assert [prompt.prompt for prompt in read_prompt_file(path)] == ["one\u2028 line\x0b here", "another\x85 one"]
