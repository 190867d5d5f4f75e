"""The documentation's pages, the blocks in them, and the training script that each page is about."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from library.families import FAMILIES
from tests.docs.windows_shells import cmd_commands, powershell_commands
from tests.running import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
TRAINERS = {family.file: family.trainer_class() for family in FAMILIES}
"""Training script -> the trainer in it."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    language: str
    line: int
    text: str

    @property
    def name(self) -> str | None:
        """The file that the block's first line names in a comment."""
        match = re.match(r"# (\S+\.\w+)$", self.text.split("\n")[0])
        return match[1] if match else None

    @property
    def script(self) -> str:
        """The training script that a page is about: that of its name, or of the name's first word."""
        named = [name for name in TRAINERS if name.removesuffix(".py") in self.page.stem]
        related = [name for name in TRAINERS if name.partition("_")[0] == self.page.stem.partition("_")[0]]
        return max(named or related, key=len, default=next(family.file for family in FAMILIES if family.is_default))

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """Every block in one of these languages, in order."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
            if match[1] in languages:
                found.append(Block(page, match[1], text.count("\n", 0, match.start()) + 1, match[2]))
    return found


SHELLS = ("bash", "bat", "powershell")
"""Languages of blocks with commands. What stands in a bash block without joined lines is for all three."""


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a block, as its shell reads them."""
    if block.language == "bat":
        return cmd_commands(block.text)
    if block.language == "powershell":
        return powershell_commands(block.text)
    lines = block.text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=False) for line in lines if line.strip() and not line.startswith("#")]


def launched(words: list[str]) -> int | None:
    """Where in a command the program stands that ``accelerate launch`` starts; None for other commands."""
    if words[:2] != ["accelerate", "launch"]:
        return None
    return next(index for index, word in enumerate(words) if word.endswith(".py"))
