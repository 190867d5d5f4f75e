"""What is said goes where the console options send it, and looks as they ask."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from library.console import LOGGER, ConsoleOptions, messages_above_progress, say, set_up_console, warn
from library.errors import UserError
from library.options import parse_options
from library.training.training_options import TrainingOptions
from tests.running import ROOT


@pytest.fixture
def talk(capsys):
    """Say a few things under these options; returns what stands on the console."""
    before, level = list(LOGGER.handlers), LOGGER.level

    def run(*arguments: object, main_process: bool = True) -> list[str]:
        options = parse_options(TrainingOptions, "test", [str(argument) for argument in arguments])
        set_up_console(options.console, main_process)
        LOGGER.debug("details")
        say("a step")
        with messages_above_progress():
            warn("be careful \u2713")
        LOGGER.error("gone wrong")
        printed = capsys.readouterr()
        return (printed.out + printed.err).splitlines()

    yield run
    LOGGER.handlers[:] = before
    LOGGER.setLevel(level)


ALL = ["details", "a step", "be careful \u2713", "gone wrong"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", ALL[1:]),
        ("--console_log_level DEBUG", ALL),
        ("--console_log_level WARNING", ALL[2:]),
        ("--console_log_level CRITICAL", []),
    ],
)
def test_the_level_decides_what_is_shown(talk, arguments, expected):
    assert talk(*arguments.split(), "--console_log_simple") == expected


def test_messages_carry_time_and_level_unless_they_shall_be_simple(talk):
    step, careful, wrong = talk()
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO    a step", step)
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING be careful \u2713", careful) and wrong.endswith("ERROR   gone wrong")


def test_a_log_file_takes_the_place_of_the_console(talk, tmp_path):
    path = tmp_path / "run.log"
    path.write_text("of an earlier run\n", encoding="utf-8")
    assert talk("--console_log_file", path, "--console_log_simple") == []
    assert path.read_text(encoding="utf-8").splitlines() == ALL[1:]


def test_several_processes_share_a_log_file(talk, tmp_path, monkeypatch):
    path = tmp_path / "run.log"
    arguments = ("--console_log_file", path, "--console_log_simple")
    talk(*arguments)
    monkeypatch.setenv("RANK", "1")
    talk(*arguments)
    monkeypatch.delenv("RANK")
    talk(*arguments, main_process=False)
    assert path.read_text(encoding="utf-8").splitlines() == [*ALL[1:], *ALL[2:], *ALL[2:]]


def test_other_processes_only_say_what_is_wrong(talk):
    assert talk("--console_log_simple", "--console_log_level", "DEBUG", main_process=False) == ALL[2:]


def test_a_log_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match="--console_log_file: cannot write"):
        set_up_console(ConsoleOptions(console_log_file=str(tmp_path / "none" / "run.log")))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_log_on_a_full_disk_is_one_warning_and_messages_go_on(talk, capsys):
    lines = talk("--console_log_file", "/dev/full", "--console_log_simple")
    assert [line for line in lines if "cannot be written" in line] == [
        "--console_log_file: /dev/full cannot be written (No space left on device); messages go to the console."
    ]
    assert lines[1:] == ["a step", "be careful \u2713", "gone wrong"] and "Traceback" not in "".join(lines)


def test_a_reader_that_has_read_enough_ends_the_script_without_a_traceback():
    """As ``--help | head`` does: the pipe is closed before the script has written."""
    program = (
        "import os, signal, sys\nfrom library.console import run_script\n"
        "reading, writing = os.pipe()\nos.close(reading)\nos.dup2(writing, sys.stdout.fileno())\n"
        "run_script(lambda: print('x' * 100_000, flush=True))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")


SCRIPTS = [path for folder in ("", "tools", "networks") for path in sorted((ROOT / folder).glob("*.py"))]


def test_every_script_ends_as_run_script_does():
    begin = 'if __name__ == "__main__":'
    sources = {path: path.read_text(encoding="utf-8") for path in SCRIPTS}
    ends = {path: source.rpartition(begin)[2] for path, source in sources.items() if begin in source}
    assert len(ends) > 30
    assert [path for path, end in ends.items() if not re.match(r"\s+run_script\(.+\)\s+$", end)] == []


@pytest.mark.parametrize("script", ["tools/run_tests.py", "networks/merge_lora.py"])
def test_help_that_nobody_reads_on_ends_quietly(script):
    """``--help | head``, when ``head`` has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    words = [sys.executable, script, "--help"]
    done = subprocess.run(words, cwd=ROOT, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
