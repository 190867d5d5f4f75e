"""Every command and every set of options that the documentation shows is one that the programs take."""

from __future__ import annotations

import re
import shlex

import pytest

from flux_train_network import FluxNetworkTrainer, FluxTrainingOptions
from library.options import declared_options, parse_options
from library.prompt_options import LINE_OPTIONS
from library.training.network_contract import parse_network_args
from tests.docs.pages import PAGES, blocks
from tests.running import ROOT

SCRIPT = "flux_train_network.py"


def commands(block) -> list[list[str]]:
    """The words of each command of a block; lines that end in a backslash are one."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, posix=True) for line in lines if line.strip() and not line.startswith("#")]


SHOWN = [pytest.param(block, words, id=str(block)) for block in blocks("bash") for words in commands(block)]
LAUNCHES = [shown for shown in SHOWN if SCRIPT in shown.values[1]]
FRAGMENTS = [shown for shown in SHOWN if shown.values[1][0].startswith("--")]
PROGRAMS = [shown for shown in SHOWN if shown.values[1][0] == "python"]


@pytest.fixture
def named_files(tmp_path, monkeypatch):
    """The TOML files that the documentation shows under a name, in the present folder."""
    for block in blocks("toml"):
        if block.name:
            (tmp_path / block.name).write_text(block.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def test_every_block_is_understood():
    assert len(LAUNCHES) > 5 and len(FRAGMENTS) > 5 and len(PROGRAMS) >= 2
    assert len(LAUNCHES) + len(FRAGMENTS) + len(PROGRAMS) == len(SHOWN)


@pytest.mark.parametrize(("block", "words"), LAUNCHES)
def test_training_commands(block, words, named_files):
    options = parse_options(FluxTrainingOptions, "", words[words.index(SCRIPT) + 1 :])
    if options.network.network_module and options.model.pretrained_model_name_or_path:
        FluxNetworkTrainer(options).check_options()


@pytest.mark.parametrize(("block", "words"), LAUNCHES)
def test_accelerate_knows_its_own_options(block, words):
    from accelerate.commands.launch import launch_command_parser

    assert words[:2] == ["accelerate", "launch"]
    known = launch_command_parser().parse_args(words[2 : words.index(SCRIPT) + 1])
    assert known.training_script == SCRIPT


@pytest.mark.parametrize(("block", "words"), FRAGMENTS)
def test_options_on_their_own(block, words):
    options = parse_options(FluxTrainingOptions, "", words)
    if options.network.network_args:
        from networks.lora_arguments import parse_arguments
        from networks.lora_flux import FLUX

        given = parse_network_args(options.network)
        parsed = parse_arguments(given, FLUX.arguments, FLUX.module)
        assert all(parsed[name] is not None for name in given)


@pytest.mark.parametrize(("block", "words"), PROGRAMS)
def test_programs_exist(block, words):
    assert (ROOT / words[1]).is_file()


def test_every_option_named_in_the_text_exists():
    """``--name`` in running text is an option of the script, of a prompt line, of accelerate or of a tool."""
    known = {*declared_options(FluxTrainingOptions), *LINE_OPTIONS, "help", "num_processes"}
    known |= {"name"}  # stands for any option
    wrong = set()
    for page in PAGES:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        names = re.findall(r"(?<![\w-])--([a-z]\w*)", prose)
        wrong |= {(page.name, name) for name in names if name.removeprefix("no_") not in known and name not in known}
    assert wrong == set()
