"""The tables of docs/lora_formats.md: what becomes of our LoRA files of every family and kind in other programs."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.interop.measuring import KINDS, measure
from tests.interop.workbench import MAKERS
from tests.running import ROOT
from tools import make_lora_formats
from tools.make_lora_formats import OURS, THEIRS
from tools.page_tables import updated

pytestmark = pytest.mark.skipif(
    find_spec("peft") is None or find_spec("lycoris") is None,
    reason="peft and lycoris-lora are in requirements-dev.txt",
)

LIKE_SD1 = ("LoRA-FA", "LyCORIS", "convolutions")
"""Rows in which other Stable Diffusion families do what 1.x does: they differ in names alone, which other rows try."""


LIKE_FLUX = ("ranks", "alpha")
"""The same of Chroma and FLUX.1."""
LIKE_OTHERS = {
    ("sd1", "LoRA-FA, DyLoRA"),  # LoRA
    ("sd1", "LyCORIS DoRA, `wd_on_output=False`"),
    ("sd1", "LyCORIS LoHa, LoKr"),  # FLUX.1's
    ("sd1", "LyCORIS DoRA"),
    ("sd2", "LoRA with text encoders"),
    ("flux", "alpha left at 1, given, equal to the rank (0)"),
}
"""Rows whose keys and scales are those of other rows that are always tried."""
CELLS = [
    pytest.param(
        *(table, family, row),
        id=f"{family}-{row}",
        marks=[pytest.mark.thorough] if (family, row) in LIKE_OTHERS else [],
    )
    for table in OURS
    for family in table.families
    for row in table.rows
    if not (family in ("sd2", "sdxl") and row.startswith(LIKE_SD1))
    if not (family == "chroma" and row.startswith(LIKE_FLUX))
]


@pytest.mark.parametrize(("table", "family", "row"), CELLS)
def test_a_row_of_the_tables(bench, table, family, row, tmp_path):
    columns, kinds = table.columns, KINDS[family][row]
    assert dict(zip(columns, measure(bench(family), kinds, columns, tmp_path))) == dict(zip(columns, table.rows[row]))


def test_every_family_and_every_kind_has_its_row():
    assert {family for table in OURS for family in table.families} == set(KINDS) == set(MAKERS)
    for table in OURS:
        assert all(set(KINDS[family]) == set(table.rows) for family in table.families)


def test_the_page_is_current(tmp_path, capsys):
    page = (ROOT / make_lora_formats.PAGE).read_text(encoding="utf-8")
    assert updated(page, [*OURS, THEIRS]) == page
    (tmp_path / "docs").mkdir()
    copy = Path(tmp_path / make_lora_formats.PAGE)
    copy.write_text(page.replace("| OFT | dropped |", "| OFT | yes |"), encoding="utf-8")
    assert make_lora_formats.main(["--check"], tmp_path) == 1
    assert "is not current; run python tools/make_lora_formats.py" in capsys.readouterr().err
    assert make_lora_formats.main([], tmp_path) == 0 == make_lora_formats.main(["--check"], tmp_path)
    assert copy.read_text(encoding="utf-8") == page


def test_the_page_names_the_versions_that_are_tested():
    from importlib.metadata import version

    page = (ROOT / make_lora_formats.PAGE).read_text(encoding="utf-8")
    assert re.search(r"Diffusers ([\d.]+\d)", page)[1] == version("diffusers")
    assert re.search(r"PEFT ([\d.]+\d)", page)[1] == version("peft").rpartition(".")[0]
    assert re.search(r"LyCORIS ([\d.]+\d)", page)[1] == version("lycoris_lora")
