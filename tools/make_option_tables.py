"""Write the option tables of the documentation from the declared options, so that both always agree.

``python tools/make_option_tables.py`` rewrites what stands between the markers of each page below ``docs/``;
``--check`` writes nothing and ends with 1 when a page differs from the options as they are declared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from library.console import run_script  # noqa: E402
from library.errors import UserError  # noqa: E402
from library.families import FAMILIES, Family, load  # noqa: E402
from library.files import write_text  # noqa: E402
from library.options import Option, declared_options, describe_type  # noqa: E402

BEGIN = "<!-- option tables: made by tools/make_option_tables.py, do not edit -->"
END = "<!-- end of the option tables -->"


@dataclass(frozen=True)
class Page:
    """One page of tables: the script whose options it shows."""

    path: str
    """Below the project's folder."""
    options: str
    """Class of the options, as ``module:Name``."""
    family: Family | None = None
    """On the page of a training script: whose it is, for the notes on options without effect."""
    part: str = ""
    """On a page about several scripts, the name in the markers of this one; it gets one table for all its groups."""

    @property
    def script(self) -> str:
        """Module that declares the options."""
        return self.options.partition(":")[0]

    @property
    def begin(self) -> str:
        """What its tables stand after."""
        return BEGIN.replace("tables:", f"tables of {self.part}:") if self.part else BEGIN

    def options_class(self) -> Any:
        """The class of the options, imported now."""
        return load(self.options)

    def without_effect(self) -> set[str]:
        """Names of the options in groups that the family does not use."""
        groups = self.family.trainer_class().unused_groups if self.family else ()
        return {name for group in groups for name in vars(group())}


def family_pages(family: Family) -> Iterator[Page]:
    """The pages on which a family's scripts and tools have their tables."""
    yield Page(family.options_page, f"{family.script}:{family.options}", family)
    if family.inference and family.inference_tables:
        yield Page(family.inference_tables, family.inference)
    elif family.inference:
        yield Page(f"docs/{family.inference_script}.md", family.inference, part="the script")
    for tool in family.tools:
        yield tool_page(tool)


def tool_page(options: str) -> Page:
    """The place of a tool for LoRA files or models on their page."""
    script = options.partition(":")[0].rpartition(".")[2]
    return Page("docs/lora_tools.md", options, part=f"{script}.py")


PREPARING = ("tools.caption_images:CaptionImagesOptions", "tools.make_masks:MakeMasksOptions")
"""Options of the tools that make captions and masks."""
PAGES = (
    *dict.fromkeys(page for family in FAMILIES for page in family_pages(family)),
    tool_page("networks.resize_lora:ResizeLoraOptions"),
    *(
        Page("docs/captions_and_masks.md", options, part=f"{options.partition(':')[0].replace('.', '/')}.py")
        for options in PREPARING
    ),
)
HEAD = "| option | value | default | meaning |\n|---|---|---|---|"


def option_tables(page: Page) -> str:
    """The tables of a page, one for each option group, in the order of ``--help``."""
    options = declared_options(page.options_class()).values()
    if page.part:
        return "\n".join([HEAD, *(_row(option, "") for option in options)])
    without_effect, name = page.without_effect(), page.family.name if page.family else ""
    tables = []
    for title, group in groupby(options, key=lambda option: option.title):
        rows = [_row(option, name if option.name in without_effect else "") for option in group]
        tables.append("\n".join([f"## {title}", "", HEAD, *rows]))
    return "\n\n".join(tables)


def _row(option: Option, idle_for: str) -> str:
    meaning = option.help + (f" **No effect for {idle_for}.**" if idle_for else "")
    cells = (f"`--{option.name}`", describe_type(option.type), describe_default(option.default), meaning)
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def describe_default(value: Any) -> str:
    """A default in a reader's words: what an option has that nobody gives."""
    if value is None or value in ("", []):
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    return f"`{value}`"


def updated(text: str, tables: str, path: str, begin: str = BEGIN) -> str:
    """``text`` with ``tables`` between its markers. Raises UserError when the markers are not there."""
    before, found, rest = text.partition(begin)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise UserError(f'{path}: the markers "{begin}" and "{END}" must stand in it, in this order.')
    return f"{before}{begin}\n\n{tables}\n\n{END}{after}"


def stale_pages(root: Path) -> dict[Path, str]:
    """Each page below ``root`` that differs from the declared options, with the text that it should have."""
    texts = {root / page.path: (root / page.path).read_text(encoding="utf-8") for page in PAGES}
    wanted = dict(texts)
    for page in PAGES:
        path = root / page.path
        wanted[path] = updated(wanted[path], option_tables(page), page.path, page.begin)
    return {path: text for path, text in wanted.items() if text != texts[path]}


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Rewrite or check every page below ``root``; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 when a page is not current")
    options = parser.parse_args(arguments)
    stale = stale_pages(root)
    for path, text in stale.items():
        name = path.relative_to(root).as_posix()
        if options.check:
            print(f"{name} is not current; run python tools/make_option_tables.py", file=sys.stderr)
        else:
            write_text(path, text)
            print(f"wrote {name}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))
