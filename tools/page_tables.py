"""Tables of the documentation that a program writes between markers, for the programs in this folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from library.errors import UserError  # noqa: E402
from library.files import write_text  # noqa: E402

END = "<!-- end of the table -->"


@dataclass(frozen=True)
class Table:
    """A table: a row for each of ``rows``, with a cell for each of ``columns``."""

    name: str
    """In the page's marker."""
    program: str
    """Which writes it, in the page's marker."""
    head: str
    """Above the rows' names."""
    columns: Sequence[str]
    rows: Mapping[str, Sequence[str]]

    @property
    def begin(self) -> str:
        """The marker that the table stands after."""
        return f"<!-- table of {self.name}: made by {self.program}, do not edit -->"

    @property
    def text(self) -> str:
        """The table in Markdown."""
        lines = [(self.head, *self.columns), ("---",) * (len(self.columns) + 1)]
        lines += [(row, *cells) for row, cells in self.rows.items()]
        return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def updated(text: str, tables: Sequence[Table]) -> str:
    """A page with every table between its markers. Raises UserError when markers are not there."""
    for table in tables:
        before, found, rest = text.partition(table.begin)
        _, end, after = rest.partition(END)
        if not found or not end:
            raise UserError(f'the markers "{table.begin}" and "{END}" must stand in the page, in this order.')
        text = f"{before}{table.begin}\n\n{table.text}\n\n{END}{after}"
    return text


def run(page: str, tables: Sequence[Table], description: str | None, arguments: list[str] | None, root: Path) -> int:
    """Rewrite, or with ``--check`` only look at, the page below ``root``; returns the exit code."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 when the page is not current")
    options = parser.parse_args(arguments)
    path = root / page
    text = path.read_text(encoding="utf-8")
    wanted = updated(text, tables)
    if wanted == text:
        return 0
    if options.check:
        print(f"{page} is not current; run python {tables[0].program}", file=sys.stderr)
        return 1
    write_text(path, wanted)
    return 0
