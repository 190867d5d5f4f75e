"""The option tables in docs/ say what the options are, and making them is quick."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from library.errors import UserError
from library.options import declared_options
from tests.running import ROOT
from tools import make_option_tables
from tools.make_option_tables import BEGIN, END, PAGES, Page, option_tables, updated

SCRIPTS = [page for page in PAGES if not page.part]
HEAVY = ("torch", "transformers", "diffusers", "cv2", "bitsandbytes", "accelerate")


def test_the_pages_are_current():
    assert list(make_option_tables.stale_pages(ROOT)) == []


def options_of(page: Page) -> dict:
    return declared_options(page.options_class())


@pytest.mark.parametrize("page", SCRIPTS, ids=lambda page: page.script)
def test_every_option_stands_in_its_page_once_and_says_what_it_means(page):
    text = (ROOT / page.path).read_text(encoding="utf-8")
    assert re.findall(r"^\| `--(\w+)` ", text, flags=re.MULTILINE) == list(options_of(page))
    assert [name for name, option in options_of(page).items() if not option.help] == []


@pytest.mark.parametrize("page", [page for page in SCRIPTS if page.family], ids=lambda page: page.script)
def test_options_are_marked_that_a_run_names_as_without_effect(page):
    lines = option_tables(page).splitlines()
    marked = {line.split("`")[1].removeprefix("--") for line in lines if f"No effect for {page.family.name}." in line}
    options = page.options_class()()
    for option in options_of(page).values():  # every option is given
        setattr(getattr(options, option.group), option.name, object())
    trainer = page.family.trainer_class()(options)
    trainer.report_unused_groups()
    assert marked == set(trainer.no_effect)
    assert {"ddp_static_graph"} <= marked < set(options_of(page))


def test_check_fails_on_a_changed_page_and_writing_mends_it(tmp_path, capsys):
    path = tmp_path / PAGES[0].path
    path.parent.mkdir()
    for page in PAGES:
        with open(tmp_path / page.path, "a", encoding="utf-8") as file:
            file.write(f"# Title\n\n{page.begin}\n{END}\nrest\n")
    assert make_option_tables.main(["--check"], tmp_path) == 1
    assert "is not current; run python tools/make_option_tables.py" in capsys.readouterr().err
    assert make_option_tables.main([], tmp_path) == 0
    assert make_option_tables.main(["--check"], tmp_path) == 0
    path.write_text(path.read_text(encoding="utf-8").replace("| `1600` |", "| `16` |"), encoding="utf-8")
    assert make_option_tables.main(["--check"], tmp_path) == 1
    assert path.read_text(encoding="utf-8").endswith(f"{END}\nrest\n")


def test_what_stands_around_the_tables_stays():
    assert updated(f"a\n{BEGIN}\nold\n{END}\nb\n", "new", "x.md") == f"a\n{BEGIN}\n\nnew\n\n{END}\nb\n"
    for text in ("a", f"a {BEGIN}", f"{END} {BEGIN}"):
        with pytest.raises(UserError, match=r"x\.md: the markers"):
            updated(text, "new", "x.md")


def test_a_vertical_bar_does_not_end_a_cell():
    page = Page("", "flux_train_network:FluxTrainingOptions")
    rows = [line for line in option_tables(page).splitlines() if line.startswith("| `--")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}
    assert any(r"{a\|b\|c}" in row for row in rows)


def test_neither_the_tables_nor_the_options_load_heavy_packages():
    program = (
        "import sys; from tools import make_option_tables; code = make_option_tables.main(['--check']);"
        f"loaded = sorted(set(sys.modules) & set({HEAVY!r})); sys.exit(f'loaded: {{loaded}}' if loaded else code)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
