"""Command line, configuration file and defaults are one mechanism with one precedence."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

from library.console import ConsoleOptions, set_up_console
from library.errors import UserError
from library.families import STABLE_DIFFUSION
from library.options import (
    Aliases,
    ConfigOptions,
    StepsOrRatio,
    declared_options,
    parse_options,
    parse_steps_or_ratio,
)


@dataclass
class ExampleOptions:
    """Example"""

    rank: int | None = None
    """Rank."""
    rate: float = 0.5
    """Rate."""
    flag: bool = False
    """Flag."""
    kind: Literal["l2", "huber"] = "l2"
    """Kind."""
    side: Literal[75, 225] | None = None
    """Side."""
    settings: list[str] | None = None
    """Settings."""
    rates: list[float] | None = None
    """Rates."""
    resolution: str | None = None
    """Resolution."""
    warmup: StepsOrRatio = 0
    """Warm-up."""
    swapped: int | Literal["auto"] | None = None
    """A number or a word."""
    weights: Annotated[list[float] | None, Aliases("multipliers", "strengths")] = None
    """An option of three names."""


@dataclass
class SavingExample:
    """Saving"""

    output_dir: str | None = None
    """Folder."""


@dataclass
class Combined:
    config: ConfigOptions = field(default_factory=ConfigOptions)
    example: ExampleOptions = field(default_factory=ExampleOptions)
    saving: SavingExample = field(default_factory=SavingExample)


def parse(*arguments: str) -> Combined:
    return parse_options(Combined, "test", list(arguments))


def with_file(tmp_path, text: str, *arguments: str) -> Combined:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return parse("--config_file", str(path), *arguments)


def test_values_are_read_with_and_without_equals_sign():
    options = parse("--rank=4", "--rate", "1e-4", "--flag", "--settings", "a=1", "b=[2,3]", "--output_dir=x y")
    assert (options.example.rank, options.example.rate, options.example.flag) == (4, 1e-4, True)
    assert options.example.settings == ["a=1", "b=[2,3]"]
    assert options.saving.output_dir == "x y"


def test_whole_numbers_none_choices_and_repeated_options_are_read_as_meant():
    assert parse("--rank", "8.0").example.rank == 8
    assert parse("--rank", "8", "--rank", "None").example.rank is None
    assert parse("--settings", "None").example.settings is None
    assert parse("--settings").example.settings == []
    assert parse("--settings", "a", "--rank", "2", "--settings", "b", "c").example.settings == ["b", "c"]
    assert parse("--side", "225").example.side == 225
    assert parse("--flag", "--no-flag").example.flag is False


def test_a_byte_order_mark_in_a_configuration_file_is_no_key(tmp_path):
    assert with_file(tmp_path, "\ufeffrank = 3").example.rank == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_as_configuration_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(UserError, match="is not a regular file"):
        parse("--config_file", str(tmp_path / "pipe.toml"))


def test_reading_a_second_command_line_of_the_same_options_takes_no_time():
    from flux_train_network import FluxTrainingOptions

    arguments = ["--network_dim", "4", "--learning_rate", "1e-4", "--sdpa"]
    parse_options(FluxTrainingOptions, "test", arguments)
    begin = time.process_time()
    for _ in range(10):
        parse_options(FluxTrainingOptions, "test", arguments)
    assert time.process_time() - begin < 0.2  # building a parser for these options takes 0.1 s


def test_command_line_wins_over_file_wins_over_default(tmp_path):
    text = "rank = 8\nrate = 2\nflag = true\n"
    options = with_file(tmp_path, text, "--rank", "4")
    assert (options.example.rank, options.example.rate, options.example.flag) == (4, 2.0, True)
    assert options.example.kind == "l2"
    assert with_file(tmp_path, text, "--no_flag").example.flag is False
    assert with_file(tmp_path, text, "--flag").example.flag is True


def test_sections_are_flattened_and_later_keys_win(tmp_path):
    options = with_file(tmp_path, "[one]\nrank = 1\n[two]\nrank = 2\nrate = 0.25\n")
    assert (options.example.rank, options.example.rate) == (2, 0.25)


def test_toml_values_are_taken_as_the_type_of_the_option(tmp_path):
    options = with_file(tmp_path, 'resolution = 512\nrates = 1e-4\nwarmup = "10%"\nrate = 3\nrank = "16"\n')
    example = options.example
    assert (example.resolution, example.rates, example.warmup, example.rate) == ("512", [1e-4], 0.1, 3.0)
    assert example.rank == 16
    assert with_file(tmp_path, "resolution = [512, 768]").example.resolution == "512,768"


def test_empty_strings_and_lists_mean_unset(tmp_path):
    assert with_file(tmp_path, 'rank = ""\nsettings = []\nresolution = ""\n').example == ExampleOptions()


def test_keys_of_front_ends_are_named_and_have_no_effect(tmp_path, capsys):
    assert with_file(tmp_path, 'epoch = 3\nnoise_offset_type = "Original"\nrank = 2\n').example.rank == 2
    assert capsys.readouterr().err == ""  # what options say about the console is only known now
    set_up_console(ConsoleOptions())
    assert "epoch, noise_offset_type" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rnk = 3", 'unknown key "rnk". Did you mean "rank"?'),
        ('rank = "x"', "\"rank\" must be a whole number, not 'x'."),
        ("rank = 1.5", '"rank" must be a whole number, not 1.5.'),
        ("flag = 3", '"flag" must be true or false, not 3.'),
        ("rank = true", '"rank" must be a whole number, not true.'),
        ('kind = "l3"', '"kind" must be one of l2, huber'),
        ("rank = \n", "not valid TOML"),
        ("rate = nan", '"rate" must be a finite number, not nan.'),
        ("rate = -inf", '"rate" must be a finite number, not -inf.'),
        ("rates = [1.0, inf]", '"rates" must be a finite number, not inf.'),
        ("warmup = nan", '"warmup" must be a number of steps, or a ratio below 1, not nan.'),
        ("[part]\nrate = {a = 1}", '"rate" must be a number, not {'),
        ("rank = " + "1" * 5000, "an integer has too many digits"),
        ("rank = " + "[" * 10_000, "nested too deeply"),
        ("warmup = 1.5", "a number of steps, or a ratio below 1"),
    ],
)
def test_mistakes_in_a_file_are_one_sentence_with_place(tmp_path, text, sentence):
    with pytest.raises(UserError) as error:
        with_file(tmp_path, text)
    assert sentence in str(error.value)
    assert str(tmp_path / "config.toml") in str(error.value)


def test_toml_syntax_error_names_the_line(tmp_path):
    with pytest.raises(UserError, match="line 3"):
        with_file(tmp_path, "rank = 1\n\nrate = = 2\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rnk", "4"], "Unknown option --rnk. Did you mean --rank?"),
        (["--dir", "a"], "Unknown option --dir. Did you mean --output_dir?"),
        (["--rank", "x"], "--rank must be a whole number, not 'x'."),
        (["--swapped", "most"], "--swapped must be a whole number or auto, not 'most'."),
        (["--rank"], "--rank takes one value, a whole number; 0 given."),
        (["--kind", "l3"], "--kind must be one of l2, huber, not 'l3'."),
        (["--flag", "true"], '--flag is a switch and takes no value, but "true" follows it.'),
        (["stray"], '"stray" belongs to no option; options begin with "--".'),
        (["--warmup", "1.5"], "--warmup must be a number of steps, or a ratio below 1, not '1.5'."),
        (["--rate", "inf"], "--rate must be a finite number, not inf."),
        (["--rate=1e999"], "--rate must be a finite number, not 1e999."),
        (["--rates", "0.1", "nan"], "--rates must be a finite number, not nan."),
        (["--warmup", "nan%"], "--warmup must be a number of steps, or a ratio below 1, not 'nan%'."),
        (["--warmup", "1e999"], "--warmup must be a number of steps, or a ratio below 1, not '1e999'."),
        (["--rank", "7" * 5000], f"--rank must be a whole number, not '{'7' * 79}...."),
        (["--kind", "None"], "--kind must be one of l2, huber, not 'None'."),
        (["--config_file"], "--config_file needs the path of a TOML file."),
        (["--config_file", "missing.toml"], "missing.toml: there is no such file."),
    ],
)
def test_mistakes_on_the_command_line_are_one_sentence(arguments, sentence):
    with pytest.raises(UserError) as error:
        parse(*arguments)
    assert str(error.value) == sentence


def test_output_config_writes_what_differs_and_reads_back(tmp_path):
    path = tmp_path / "new.toml"
    given = ["--rank", "4", "--flag", "--settings", "a=1", "--warmup", "0.1"]
    with pytest.raises(SystemExit) as exit_:
        parse("--config_file", str(path), "--output_config", *given)
    assert exit_.value.code == 0
    assert parse("--config_file", str(path)).example == parse(*given).example
    assert "rate" not in path.read_text(encoding="utf-8")
    with pytest.raises(UserError, match="exists already"):
        parse("--config_file", str(path), "--output_config")
    with pytest.raises(UserError, match="needs --config_file"):
        parse("--output_config")


def test_toml_suffix_may_be_left_out(tmp_path):
    (tmp_path / "c.toml").write_text("rank = 5", encoding="utf-8")
    assert parse("--config_file", str(tmp_path / "c")).example.rank == 5


def test_words_may_be_joined_by_hyphens_and_the_last_file_counts(tmp_path):
    for number in (5, 6):
        (tmp_path / f"{number}.toml").write_text(f"rank = {number}", encoding="utf-8")
    first, second = str(tmp_path / "5.toml"), str(tmp_path / "6.toml")
    assert parse("--config-file", first).example.rank == 5
    assert parse(f"--config-file={first}", "--config_file", second).example.rank == 6
    with pytest.raises(SystemExit):
        parse("--config-file", str(tmp_path / "new.toml"), "--output-config", "--rank", "7")
    assert (tmp_path / "new.toml").read_text(encoding="utf-8").strip() == "rank = 7"


@pytest.mark.parametrize(("text", "value"), [("100", 100), ("0.1", 0.1), ("10%", 0.1), ("0", 0), ("5e-2", 0.05)])
def test_steps_or_ratio(text, value):
    assert parse_steps_or_ratio(text) == value


def test_every_option_of_the_flux_script_is_declared_once_and_documented():
    from flux_train_network import FluxTrainingOptions

    options = declared_options(FluxTrainingOptions)
    assert len(options) > 190
    assert [name for name, option in options.items() if not option.help] == []


@pytest.mark.parametrize(
    ("script", "headings"),
    [
        ("flux_train_network.py", ("Optimizer", "Dataset", "Sample images", "FLUX.1")),
        (f"{STABLE_DIFFUSION.inference_script}.py", ("Prompts", "Networks", "ControlNet")),
    ],
)
def test_help_is_grouped_and_imports_no_torch(script, headings):
    program = (
        f"import sys, runpy; sys.argv = [{script!r}, '--help']\n"
        f"try: runpy.run_path({script!r}, run_name='__main__')\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'accelerate', 'cv2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    for heading in headings:
        assert f"\n{heading}:\n" in result.stdout
    assert "None" not in result.stdout and "--no_no_" not in result.stdout


def test_the_help_says_of_each_option_what_it_takes_and_what_it_is_without_the_command_line(tmp_path, capsys):
    (tmp_path / "a.toml").write_text("rank = 5\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        parse_options(Combined, "What it is for.\n\nMore.", ["--config_file", str(tmp_path / "a.toml"), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "What it is for." in shown and "More." not in shown
    assert "--rank INTEGER" in shown and "(--config_file: 5)" in shown
    assert "--weights NUMBER [NUMBER ...], --multipliers NUMBER" in shown and "--swapped INTEGER|{auto}" in shown
    for option in declared_options(Combined).values():
        assert f"--{option.name}" in shown and option.help in shown


@pytest.mark.parametrize(("word", "value"), [("18", 18), ("auto", "auto"), ("None", None)])
def test_a_number_or_a_word(word, value, tmp_path):
    assert parse_options(Combined, "", ["--swapped", word]).example.swapped == value
    (tmp_path / "a.toml").write_text(f"swapped = {value!r}\n" if value else "", encoding="utf-8")
    assert parse_options(Combined, "", ["--config_file", str(tmp_path / "a.toml")]).example.swapped == value


def test_an_option_is_understood_under_each_of_its_names(tmp_path):
    for name in ("weights", "multipliers", "strengths"):
        assert parse(f"--{name}", "1", "0.5").example.weights == [1, 0.5]
        assert with_file(tmp_path, f"{name} = [2]").example.weights == [2]
    with pytest.raises(UserError, match="--weights must be"):
        parse("--strengths", "x")
    assert list(declared_options(Combined)).count("weights") == 1 and "strengths" not in declared_options(Combined)


@pytest.mark.parametrize("word", ["--", "--=", "--=x", "---", "--no_", "-- "])
def test_two_dashes_without_a_name_are_an_unknown_option(word):
    with pytest.raises(UserError, match="Unknown option --"):
        parse(word)
