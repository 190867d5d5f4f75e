"""Every command and every set of options that the documentation shows is one that the programs take."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path

import pytest
import tomli
from accelerate.commands.launch import launch_command_parser

from flux_minimal_inference import SESSION
from library.errors import UserError
from library.families import FAMILIES
from library.generation.image_prompts import LETTERS
from library.models.tokenizer_files import QWEN2_5_VL, T5_XXL
from library.options import declared_options, parse_options
from library.prompt_options import LINE_OPTIONS
from library.training.network.contract import import_network_module
from tests.docs.pages import PAGES, SHELLS, TRAINERS, blocks, commands, launched
from tests.docs.windows_shells import cmd_commands, powershell_commands
from tests.running import ROOT
from tools import cache_run
from tools.latent_upscaler import LatentUpscalerOptions
from tools.make_option_tables import PAGES as OPTION_PAGES

SHOWN = [pytest.param(block, words, id=str(block)) for block in blocks(*SHELLS) for words in commands(block)]
LAUNCHES = [shown for shown in SHOWN if launched(shown.values[1]) is not None]
FRAGMENTS = [shown for shown in SHOWN if shown.values[1][0].startswith("--")]
INSTALLS = [shown for shown in SHOWN if shown.values[1][:2] == ["pip", "install"]]
HUB = [shown for shown in SHOWN if shown.values[1][0] == "hf"]
AROUND = [shown for shown in SHOWN if shown.values[1][0] in ("git", "cd", r".venv\Scripts\activate")]


def program(words: list[str]) -> list[str]:
    """The words of a command from its program on."""
    return words[launched(words) or words.index("python") + 1 :]


RUNS = [shown for shown in SHOWN if shown in LAUNCHES or shown.values[1][0] == "python"]
TRAININGS = [shown for shown in LAUNCHES if program(shown.values[1])[0] in TRAINERS]
TOOLS = [shown for shown in RUNS if shown not in TRAININGS]


@pytest.fixture
def named_files(tmp_path, monkeypatch):
    """The TOML files that the documentation shows under a name, and the project's own, in the present folder."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for block in blocks("toml"):
        if block.name:
            (tmp_path / block.name).parent.mkdir(exist_ok=True)
            (tmp_path / block.name).write_text(block.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def test_every_block_is_understood():
    assert len(TRAININGS) > 12 and len(FRAGMENTS) > 20 and len(TOOLS) > 15
    assert {program(shown.values[1])[0] for shown in TRAININGS} == set(TRAINERS)
    assert len(RUNS) + len(FRAGMENTS) + len(INSTALLS) + len(HUB) + len(AROUND) == len(SHOWN)


@pytest.mark.parametrize(("block", "words"), TRAININGS)
def test_training_commands(block, words, named_files):
    script, *arguments = program(words)
    options = parse_options(TRAINERS[script].options_class, "", arguments)
    trainer = TRAINERS[script](options)
    trainer.check_options()
    trainer.check_network()
    assert trainer.no_effect == []


@pytest.mark.parametrize(("block", "words"), LAUNCHES)
def test_accelerate_knows_its_own_options(block, words):
    from accelerate.commands.launch import launch_command_parser

    script = launched(words)
    known = launch_command_parser().parse_args(words[2 : script + 1])
    assert known.training_script == words[script]


@pytest.mark.parametrize(("block", "words"), FRAGMENTS)
def test_options_on_their_own(block, words):
    """They are the page's script's, and network_args are those of a network for it."""
    options = parse_options(TRAINERS[block.script].options_class, "", words)
    if options.network.network_module is None:
        options.network.network_module = next(row.networks[0] for row in FAMILIES if row.file == block.script)
    import_network_module(options.network)


@pytest.mark.parametrize(("block", "words"), HUB)
def test_the_hub_s_program_takes_what_it_is_given(block, words):
    app = importlib.import_module("huggingface_hub.cli.hf").app
    command = app if hasattr(app, "resolve_command") else importlib.import_module("typer.main").get_command(app)
    context, rest = None, words[1:]
    while hasattr(command, "resolve_command"):
        context = command.make_context(command.name, [rest[0]], parent=context, resilient_parsing=True)
        _, command, _ = command.resolve_command(context, [rest[0]])
        rest = rest[1:]
    assert command.make_context(command.name, rest, parent=context).command is command


def test_files_that_are_downloaded_are_those_that_the_preset_reads():
    """README's lines from the hub bring every file of the FLUX.1 preset, and what its text encoder needs beside it."""
    preset = tomli.loads((ROOT / "configs" / "flux_12gb.toml").read_text(encoding="utf-8"))["files"]
    lines = [shown.values[1] for shown in HUB if shown.values[0].page.name == "README.md"]
    assert all(words[-2:] == ["--local-dir", "models"] for words in lines if words[1] == "download")
    brought = {name: words[2] for words in lines if words[1] == "download" for name in words[3:-2]}
    needed = {Path(value).name for value in preset.values() if value.startswith("models/")}
    assert brought.keys() == needed | set(T5_XXL.files) and {brought[name] for name in T5_XXL.files} == {T5_XXL.hub_id}


@pytest.mark.parametrize(
    ("kind", "page"), [(T5_XXL, "flux_train_network.md"), (QWEN2_5_VL, "hunyuan_image_train_network.md")]
)
def test_a_guide_has_the_line_for_the_tokenizer_that_its_model_needs(kind, page):
    """From the tokenizer's own repository, into a folder where it is looked for beside a model in models/."""
    lines = [shown.values[1] for shown in HUB if shown.values[0].page.name == page]
    (words,) = (words for words in lines if kind.files[0] in words)
    assert words[2] == kind.hub_id and set(kind.files) <= set(words)
    assert Path(words[words.index("--local-dir") + 1]) in {
        Path("models"),
        *(Path("models") / name for name in kind.folders),
    }


@pytest.mark.parametrize("language", ["bat", "powershell"])
def test_windows_blocks_say_the_same_as_the_bash_block_before_them(language):
    shown = blocks(*SHELLS)
    translated = [block for block in shown if block.language == language and "launch" in block.text]
    assert translated
    for block in translated:
        before = [other for other in shown if other.page == block.page and other.line < block.line]
        assert commands(block) == commands([other for other in before if other.language == "bash"][-1]), str(block)


@pytest.mark.parametrize("block", [block for block in blocks("bash") if "\\\n" not in block.text], ids=str)
def test_commands_on_one_line_are_the_same_in_every_shell(block):
    """They have no quoting that only one shell understands."""
    assert cmd_commands(block.text) == powershell_commands(block.text) == commands(block)


class Understood(Exception):
    """A program has read its command line and would begin to work."""


@pytest.fixture
def only_the_command_line(monkeypatch):
    """Programs end when they have read their options."""
    read_known = argparse.ArgumentParser.parse_known_args

    def read_with_argparse(self, *arguments, **keywords):
        _, rest = read_known(self, *arguments, **keywords)
        for_pytest = sys.argv[0].endswith("run_tests.py")
        assert not rest or for_pytest, f"unknown: {rest}"
        raise Understood

    def read_with_our_own(options_class, *arguments, **keywords):
        parse_options(options_class, *arguments, **keywords)
        raise Understood

    def read(path: str, arguments: list[str]) -> None:
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", read_with_argparse)
        for reader in (module, sys.modules[module.main.__module__], cache_run):
            if hasattr(reader, "parse_options"):
                monkeypatch.setattr(reader, "parse_options", read_with_our_own)
        with pytest.raises(Understood):
            module.main()

    return read


@pytest.mark.parametrize(("block", "words"), TOOLS)
def test_other_programs_take_what_they_are_given(block, words, only_the_command_line):
    path, *arguments = program(words)
    assert (ROOT / path).is_file()
    only_the_command_line(path, arguments)


@pytest.mark.parametrize(
    "command",
    [
        *("networks/merge_lora.py --modles a b", "tools/show_metadata.py --modle a", "tools/cache_latents.py --x"),
        *("flux_minimal_inference.py --promt a", "convert_flux_lora.py --scr_path a"),
    ],
)
def test_a_wrong_option_of_a_program_would_be_seen(command, only_the_command_line):
    path, *arguments = command.split()
    with pytest.raises((UserError, AssertionError), match="nknown"):
        only_the_command_line(path, arguments)


def test_every_tool_with_an_option_table_is_shown_in_use():
    tools = {f"{page.script.replace('.', '/')}.py" for page in OPTION_PAGES if page.part}
    assert tools <= {program(shown.values[1])[0] for shown in TOOLS}


def test_every_option_named_in_the_text_exists():
    """``--name`` in running text is an option of a script, of a prompt line, of accelerate or of a tool."""
    classes = [page.options_class() for page in OPTION_PAGES]
    classes += [cache_run.caching_options(family) for family in FAMILIES] + [LatentUpscalerOptions]
    options = [option for options_class in classes for option in declared_options(options_class).values()]
    known = {name for option in options for name in option.names}
    known |= {*LINE_OPTIONS, *SESSION.letters, *LETTERS}
    known |= {"help", "show_all_keys", "reverse"}
    known |= {word.removeprefix("--") for word in launch_command_parser()._option_string_actions}
    known |= {"index"}  # pip's --index-url
    known |= {"name"}  # stands for any option
    known |= {"family", "thorough"}  # of tools/quickstart.py and tools/run_tests.py
    known |= {"script", "queue_dir", "retry_failed", "afresh", "launch_args"}  # of tools/run_queue.py
    known |= {"root", "port", "folder"}  # of tools/studio.py
    known |= {"checkpoint"}  # of benchmarks/format_quality.py
    known |= {"reverse"}  # of networks/convert_hunyuan_image_lora_to_comfy.py
    wrong = set()
    for page in PAGES:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        names = re.findall(r"(?<![\w-])--([a-z]\w*)", prose)
        wrong |= {(page.name, name) for name in names if name.removeprefix("no_") not in known and name not in known}
    assert wrong == set()
