"""No option is accepted and ignored in silence: each one, and each dataset key, is exercised by a test that is named.

The table is ``tests/reference_data/option_coverage.toml``. An entry says what a test shows of some options: ``effect``
(something comes out otherwise), ``refused`` (with a reason), or ``said`` (to have no effect, with the reason).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import tomli

from library.data.config_file import DatasetTable, SubsetTable
from library.families import script_options
from library.options import declared_options
from tests.running import ROOT

TABLE = tomli.loads((ROOT / "tests" / "reference_data" / "option_coverage.toml").read_text(encoding="utf-8"))
SCRIPTS = list(script_options())
WITHOUT_EFFECT = set(
    """
    deepspeed zero_stage offload_optimizer_device offload_optimizer_nvme_path offload_param_device
    offload_param_nvme_path zero3_init_flag zero3_save_16bit_model fp16_master_weights_and_gradients
    ddp_gradient_as_bucket_view ddp_static_graph persistent_data_loader_workers
    dataset_class conditioning_data_dir
    block_swap_h2d_only split_mode
    """.split()
)
"""Options that are only ever refused, or said to change nothing."""
ELSEWHERE = {"xformers", "diffusers_xformers", "noise_on_device", "use_flash_attn"}
"""Options whose effect needs a package that the tests do not install, without which they are refused, or a GPU."""
STATED = {"v1", "v2", "sdxl"}
"""Options that say what a file says anyway; refused, or named, when they contradict it."""


def shown(kind: str) -> dict[str, dict[str, str]]:
    """What is shown of each option or dataset key, by the test that shows it."""
    found: dict[str, dict[str, str]] = {}
    for entry in TABLE[kind]:
        for name in entry["names"].split():
            found.setdefault(name, {})[entry["test"]] = entry["shows"]
    return found


def declared() -> set[str]:
    return set().union(*(declared_options(script) for script in SCRIPTS))


def test_every_option_of_the_scripts_is_in_the_table():
    assert set(shown("options")) == declared()


def test_every_key_of_dataset_configurations_is_in_the_table():
    keys = {*DatasetTable.model_fields, *SubsetTable.model_fields, "interpolation_type"} - {"subsets"}
    assert set(shown("dataset_keys")) == keys


def test_options_are_without_effect_only_where_that_is_meant():
    without = {name for name, tests in shown("options").items() if "effect" not in tests.values()}
    assert without == WITHOUT_EFFECT | ELSEWHERE | STATED
    assert all("effect" in tests.values() for tests in shown("dataset_keys").values())


@pytest.mark.parametrize("kind", ["options", "dataset_keys"])
def test_the_tests_named_exist_and_name_what_they_show(kind):
    missing = []
    for name, tests in shown(kind).items():
        for test, what in tests.items():
            assert what in ("effect", "refused", "said"), test
            if not re.search(rf"\b{name}\b", source_of(test)):
                missing.append(f"{test} does not name {name}")
    assert missing == []


def test_what_each_needs_is_shown_without_thorough():
    only_there = []
    for name, tests in {**shown("options"), **shown("dataset_keys")}.items():
        wanted = [test for test, what in tests.items() if what == "effect"] or list(tests)
        if all(is_thorough(test) for test in wanted):
            only_there.append(name)
    assert only_there == []


def is_thorough(test: str) -> bool:
    """Whether a test as a whole, not some of its rows, runs with ``--thorough`` only."""
    file, _, name = test.partition("::")
    node = definitions(ROOT / file)[name]
    decorators = node.decorator_list if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
    return any(ast.unparse(decorator) == "pytest.mark.thorough" for decorator in decorators)


# ---- the source of a test: the function, and what it uses of its own and other files of tests -----------------------


@cache
def definitions(path: Path) -> dict[str, ast.AST]:
    """The functions, classes and constants of a file by name, and the methods of its classes as ``Class::method``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
            for inner in getattr(node, "body", []) if isinstance(node, ast.ClassDef) else []:
                if isinstance(inner, ast.FunctionDef):
                    found[f"{node.name}::{inner.name}"] = inner
        elif isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests"):
            other = ROOT / f"{(node.module or '').replace('.', '/')}.py"
            theirs = definitions(other) if other.is_file() else {}
            # What they use is found with them, unless this file has something else of that name.
            found = {**theirs, **found}
            found |= {name.asname or name.name: theirs[name.name] for name in node.names if name.name in theirs}
    return found


def in_reach(path: Path) -> Iterator[Path]:
    """The files whose definitions a test of ``path`` may use: its own, and the conftest files above it."""
    yield path
    for folder in path.parents:
        if (folder / "conftest.py").is_file():
            yield folder / "conftest.py"
        if folder == ROOT / "tests":
            return


@cache
def source_of(test: str) -> str:
    """The source of a test with that of the fixtures, helpers and constants that it uses. Fails when there is none."""
    file, _, name = test.partition("::")
    known: dict[str, ast.AST] = {}
    for path in reversed(list(in_reach(ROOT / file))):
        known |= definitions(path)
    assert name in definitions(ROOT / file), f"there is no test {test}"
    waiting, seen, text = [name], set(), ""
    while waiting:
        current = waiting.pop()
        if current == "TINY" and current not in seen:  # it is filled from the files of all families, by their names
            text += "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "families").glob("*.py"))
        if current in seen or current not in known:
            seen.add(current)
            continue
        seen.add(current)
        node = known[current]
        text += ast.unparse(node)
        waiting += [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
        waiting += [part.arg for part in ast.walk(node) if isinstance(part, ast.arg)]
    return text
