"""A command that the studio shows is read by the shell that it is for as the words that it is made of."""

from __future__ import annotations

import re
import shlex

from hypothesis import given
from hypothesis import strategies as st

from library.studio.commands import for_cmd, for_posix, for_powershell, in_every_shell
from tests.docs.windows_shells import cmd_commands, powershell_commands

WORDS = st.text(st.sampled_from("ab1 \\/'&|<>^()$`;,=#@~-._日é"), max_size=12)
PATHS = st.sampled_from([r"C:\my folder\x.toml", r"C:\my folder" + "\\", "--launch_args", "it's", "", "@x", "a b", "&"])
COMMANDS = st.lists(WORDS | PATHS, max_size=4).map(lambda words: ["accelerate", *words])


@given(COMMANDS)
def test_in_a_posix_shell(words):
    assert shlex.split(for_posix(words)) == words


@given(COMMANDS)
def test_in_cmd(words):
    assert cmd_commands(for_cmd(words)) == [words]


@given(COMMANDS)
def test_in_powershell(words):
    assert powershell_commands(for_powershell(words)) == [words]


def test_plain_words_stay_as_they_are_and_every_shell_is_there():
    words = ["accelerate", "launch", "x.py", "--config_file", "jobs/a-b.toml", "--lr=1e-4"]
    assert set(in_every_shell(words).values()) == {" ".join(words)}
    assert re.match(r"& '", for_powershell([r"C:\my python\python.exe", "x.py"]))
