"""Prompt lines of gen_img.py: each in-prompt option sets its field, and bad values are one sentence."""

from __future__ import annotations

import pytest

from library.errors import UserError
from library.generation.image_prompts import LETTERS, ImagePrompt, check_image_prompt, parse_image_prompt, take_seeds

DEFAULTS = ImagePrompt(width=512, height=512, sample_steps=50, scale=7.5, negative_scale=3.0)

WRITTEN = {
    "n": ("blurry, dark", "blurry, dark"),
    "w": ("640", 640),
    "h": ("480", 480),
    "ow": ("1000", 1000),
    "oh": ("900", 900),
    "nw": ("100", 100),
    "nh": ("90", 90),
    "ct": ("8", 8),
    "cl": ("16", 16),
    "s": ("30", 30),
    "l": ("4.5", 4.5),
    "nl": ("2", 2.0),
    "t": ("0.4", 0.4),
    "c": ("a photo of a cat", "a photo of a cat"),
    "am": ("0.8,-0.5, 1", (0.8, -0.5, 1.0)),
    "f": ("cats/one cat.webp", "cats/one cat.webp"),
    "dsd1": ("2", 2),
    "dst1": ("700", 700),
    "dsd2": ("1", 1),
    "dst2": ("600", 600),
    "dsr": ("0.6", 0.6),
    "glt": ("750", 750),
    "glr": ("0.5", 0.5),
    "gls": ("0.25", 0.25),
    "gle": ("2", 2),
    "glsn": ("1.1", 1.1),
    "glus": ("3,0.5,0.5,1", "3,0.5,0.5,1"),
}


def test_the_table_has_every_option():
    assert WRITTEN.keys() == LETTERS.keys()


@pytest.mark.parametrize("letter", WRITTEN)
def test_each_option_sets_its_field_and_no_other(letter):
    written, meant = WRITTEN[letter]
    image = parse_image_prompt(f"a cat --{letter} {written}", DEFAULTS)
    field = LETTERS[letter][0]
    assert getattr(image, field) == meant
    switches = {"dst1": "deep_shrink_depth_1", "dsd2": "deep_shrink_depth_1", "glr": "gradual_latent_timesteps"}
    changed = {name for name, value in vars(image).items() if value != getattr(DEFAULTS, name)}
    switched = {name for name in changed if name.endswith(("depth_1", "latent_timesteps"))}
    assert changed - switched <= {"prompt", "raw_prompt", field}
    assert switches.get(letter) is None or switches[letter] in switched


def test_all_options_of_one_line_with_capital_letters():
    line = "a cat" + "".join(f" --{letter.upper()} {written}" for letter, (written, _) in WRITTEN.items())
    image = parse_image_prompt(line, DEFAULTS)
    assert image.prompt == "a cat" and image.raw_prompt == line
    for letter, (_, meant) in WRITTEN.items():
        assert getattr(image, LETTERS[letter][0]) == meant


def test_what_a_line_leaves_open_is_as_on_the_command_line():
    image = parse_image_prompt("a cat, 2 dogs, well--known", DEFAULTS)
    assert (image.prompt, image.negative_prompt) == ("a cat, 2 dogs, well--known", None)
    assert (image.width, image.sample_steps, image.scale, image.negative_scale) == (512, 50, 7.5, 3.0)
    assert (image.deep_shrink_depth_1, image.gradual_latent_timesteps) == (None, None)


def test_nl_none_takes_the_command_lines_negative_scale_back():
    assert parse_image_prompt("a cat --nl None", DEFAULTS).negative_scale is None


def test_the_last_of_repeated_options_counts():
    assert parse_image_prompt("a cat --w 64 --w 128", DEFAULTS).width == 128


def test_steps_are_kept_between_1_and_1000():
    assert [parse_image_prompt(f"x --s {s}", DEFAULTS).sample_steps for s in (-3, 5000)] == [1, 1000]


@pytest.mark.parametrize("given, depth", [("--dst1 700", 3), ("--dsd2 1", 3), ("--dsr 0.5 --dsd1 2", 2)])
def test_one_option_enables_deep_shrink(given, depth):
    assert parse_image_prompt(f"x {given}", DEFAULTS).deep_shrink_depth_1 == depth
    on = ImagePrompt(deep_shrink_depth_1=5)
    assert parse_image_prompt("x --dsr 0.5", on).deep_shrink_depth_1 == 5, "the command line's depth"


@pytest.mark.parametrize("given, first", [("--glr 0.5", 650), ("--gle 2", 650), ("--gls 0.1 --glt 700", 700)])
def test_one_option_enables_gradual_latent(given, first):
    assert parse_image_prompt(f"x {given}", DEFAULTS).gradual_latent_timesteps == first


def test_an_unknown_option_logs_a_warning(caplog):
    assert parse_image_prompt("a cat --x 3 --w 64", DEFAULTS, "p.txt, line 4").width == 64
    assert '"--x 3" is not a prompt option' in caplog.text and "p.txt, line 4" in caplog.text


@pytest.mark.parametrize("letter", [letter for letter in LETTERS if letter not in ("n", "c", "f", "glus")])
@pytest.mark.parametrize("value", ["many", "", "nan", "1e999", "1,,2"])
def test_a_value_that_is_no_number_is_named_with_its_place(letter, value):
    with pytest.raises(UserError, match=rf"^p.txt, line 4: --{letter} must be .*number") as error:
        parse_image_prompt(f"a cat --{letter} {value}", DEFAULTS, "p.txt, line 4")
    assert value in str(error.value)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--w 500", "--w must be a positive multiple of 8, not 500."),
        ("--h 0", "--h must be a positive multiple of 8, not 0."),
        ("--t 1.5", r"the strength \(--t\) must be between 0 and 1, but is 1.5."),
        ("--ow -5", r"the original width \(--ow\) must not be negative, but is -5."),
        ("(b:1{})".format("0" * 400), 'the weight of "b" must be between -1000 and 1000, not inf.'),
        ("--n [(b:-1500)]", 'the weight of "b" must be between -1000 and 1000, not -1363.64.'),
        ("--cl -1", r"the crop \(--cl\) must not be negative, but is -1."),
    ],
)
def test_values_that_no_image_can_have(options, sentence):
    with pytest.raises(UserError, match=f"^p.txt, line 4: {sentence}$"):
        parse_image_prompt(f"a cat {options}", DEFAULTS, "p.txt, line 4")
    check_image_prompt(DEFAULTS)


@pytest.mark.parametrize(
    "line, rest, seeds",
    [
        ("a cat --d 1,2, 3 --n bad", "a cat --n bad", (1, 2, 3)),
        ("a cat --n bad --d 18446744073709551615", "a cat --n bad", (2**64 - 1,)),
        ("--d 5", "", (5,)),
        ("a cat --D -7", "a cat", (-7,)),
        ("a cat --d 1 --w 64 --d 2", "a cat --w 64", (2,)),
        ("a cat --dsd1 3 --dst1 5", "a cat --dsd1 3 --dst1 5", ()),
        ("a mother--d 3", "a mother--d 3", ()),
    ],
)
def test_seeds_are_taken_from_anywhere_in_a_line(line, rest, seeds):
    assert take_seeds(line) == (rest, seeds)


@pytest.mark.parametrize("value", ["", "x", "1.5", "1 2", "1,", str(2**64)])
def test_seeds_that_are_none(value):
    with pytest.raises(UserError, match="^p.txt, line 4: .*(whole numbers|64 bits)"):
        take_seeds(f"a cat --d {value} --w 64", "p.txt, line 4")


def test_line_breaks_and_tabs_of_a_shell_or_module_separate_options():
    image = parse_image_prompt("a cat,\n  sun\n--n bad,\n  worse\t--w\t640\n --h 64\n", DEFAULTS)
    assert (image.prompt, image.negative_prompt, image.width, image.height) == (
        "a cat,\n  sun",
        "bad,\n  worse",
        640,
        64,
    )


@pytest.mark.parametrize(
    "line, named",
    [("a cat <lora:my cat:0.8>", "<lora:my cat:0.8>"), ("a __colours/warm__ cat", "__colours/warm__")],
)
def test_what_means_something_in_other_programs_is_named(line, named, caplog):
    assert parse_image_prompt(line, DEFAULTS, "p.txt, line 4").prompt == line
    assert f'p.txt, line 4: "{named}" is plain text here' in caplog.text


def test_words_that_only_look_like_it_are_not_named(caplog):
    parse_image_prompt("a < b, snake__case__name, __init, lora:x", DEFAULTS)
    assert caplog.text == ""


def test_bytes_that_are_no_text_are_named():
    with pytest.raises(UserError, match="^--prompt: the prompt holds bytes that are not UTF-8 text"):
        parse_image_prompt(b"a \xff cat".decode("utf-8", "surrogateescape"), DEFAULTS, "--prompt")
