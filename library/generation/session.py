"""Asking for prompts, one line after the other."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from library.console import forget_interrupt, show
from library.errors import UserError
from library.generation.prompts import with_defaults
from library.prompt_options import PromptOptions, parse_prompt_values, prompt_options

PLACE = "the prompt line"


@dataclass(frozen=True)
class SessionGrammar:
    """What a line may say beside its prompt: ``--w 512``."""

    letters: Mapping[str, tuple[str, type]]
    """Field and type by letter; ``multipliers`` is the one field that PromptOptions does not have."""
    lasting: Collection[str]
    """Fields that stay for the lines that follow; all others are reset for each line."""
    help: str
    """What is printed at the start."""
    end: str = ""
    """The line that ends a session; empty lines are skipped if it is another one."""


class Session:
    """Lines in, prompts out; what lasts from line to line is kept here."""

    def __init__(self, grammar: SessionGrammar, defaults: PromptOptions):
        self.grammar = grammar
        self.defaults = defaults

    def read(self, line: str) -> tuple[PromptOptions, str | None]:
        """A line as a prompt with every default filled in, and its multipliers as written.

        A lone ``-`` as negative prompt is an empty one. Raises UserError for a value that is no number.
        """
        values = parse_prompt_values(line, PLACE, self.grammar.letters)
        multipliers = values.pop("multipliers", None)
        if values.get("negative_prompt") == "-":
            values["negative_prompt"] = ""
        own = prompt_options(values)
        prompt = with_defaults(own, self.defaults)
        lasting: dict[str, Any] = {name: values[name] for name in self.grammar.lasting if name in values}
        self.defaults = with_defaults(PromptOptions(self.defaults.prompt, **lasting), self.defaults)
        return prompt, multipliers

    def run(self, draw: Callable[[PromptOptions, str | None], None]) -> None:
        """Hand each line to ``draw`` until the last one or the end of the input; a mistake does not end the session."""
        print(self.grammar.help, flush=True)
        take_lines(lambda line: draw(*self.read(line)), "prompt> ", self.grammar.end)


def take_lines(take: Callable[[str], None], ask: str, end: str | None) -> None:
    """Ask for lines and hand each to ``take``, until the line ``end`` (if any) or the end of the input.

    Other empty lines are skipped. A mistake (UserError) is printed, other errors with their traceback, and Ctrl-C stops
    what is being generated; none of them ends the session.
    """
    for line in _lines(ask, end):
        try:
            take(line)
        except UserError as error:
            show(f"error: {error}")
        except KeyboardInterrupt:
            forget_interrupt()
            print("stopped", flush=True)
        except BrokenPipeError:  # nobody reads on
            raise
        except Exception:
            traceback.print_exc()
            print("error: no image for the line above; the session continues", flush=True)


def _lines(ask: str, end: str | None) -> Iterator[str]:
    reconfigure = getattr(sys.stdin, "reconfigure", None)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # Windows has a line editor of its own
            import readline  # noqa: F401 (gives input() its line editor, with the lines before)
    elif reconfigure is not None:
        reconfigure(encoding="utf-8", errors="replace")  # a pipe has the system's code page otherwise
    while True:
        try:
            line = input(ask)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.strip() == end:
            return
        if line.strip():
            yield line
