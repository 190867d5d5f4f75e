"""docs/architecture.md describes the code that is there: paths, modules, signatures, import rules."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path

import pytest

from tests.running import ROOT

TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FAMILIES = sorted(path.parent.name for path in (ROOT / "library" / "models").glob("*/__init__.py"))
ENTRY_SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))

# folder -> what no module in it may import
FORBIDDEN = {
    "library": [*ENTRY_SCRIPTS, "networks", "tools", "tests", "benchmarks"],
    "library/data": ["library.models", "library.training", "library.memory"],
    "library/models": ["library.data", "library.training"],
    "library/training": [f"library.models.{family}" for family in FAMILIES],
    "library/generation": [
        *("library.data", "library.training"),
        # gen_img.py's features are Stable Diffusion's
        *(f"library.models.{family}" for family in FAMILIES if family != "stable_diffusion"),
    ],
    "library/annotation": [
        *("library.generation", "library.memory", "library.training"),
        *(f"library.models.{family}" for family in FAMILIES),
    ],
    "library/memory": ["library.data", "library.models", "library.training"],
    "networks": [*ENTRY_SCRIPTS, "library.data", "library.training", "tools", "tests"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def listed_paths() -> list[str]:
    return [line.split()[0] for block in blocks("house") for line in block.splitlines() if line.strip()]


def modules(folder: str) -> list[Path]:
    return [path for path in sorted((ROOT / folder).rglob("*.py")) if path.name != "__init__.py"]


@cache
def imported_names(source: str, package: str) -> set[str]:
    """Every module that a source file imports anywhere, with the names taken from it; ``package`` holds the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def violations(source: str, package: str, forbidden: list[str]) -> list[str]:
    names = imported_names(source, package)
    return sorted(name for name in names for room in forbidden if name == room or name.startswith(f"{room}."))


def test_every_listed_path_exists():
    paths = listed_paths()
    assert len(paths) > 80
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_nothing_is_listed_twice():
    paths = listed_paths()
    assert sorted(paths) == sorted(set(paths))


def test_every_module_is_listed():
    found = [path.relative_to(ROOT).as_posix() for folder in ("library", "networks") for path in modules(folder)]
    found += [f"{name}.py" for name in ENTRY_SCRIPTS]
    assert sorted(set(found) - set(listed_paths())) == []


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_import_rules_hold(folder):
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        package = ".".join(path.relative_to(ROOT).parent.parts)
        if wrong := violations(path.read_text(encoding="utf-8"), package, FORBIDDEN[folder]):
            found[path.relative_to(ROOT).as_posix()] = wrong
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "from library.models.flux import pipeline",
        "from library.models import flux",
        "import library.models.flux.pipeline",
        "def f():\n    from library.models.flux.pipeline import FluxPipeline",
        "from ..models.flux import pipeline",
    ],
)
def test_a_forbidden_import_is_seen(source):
    assert violations(source, "library.training", FORBIDDEN["library/training"])


# ---- rings -----------------------------------------------------------------------------------------------------------


def project_modules() -> dict[str, Path]:
    """Every module of the project outside the tests, by the name under which it is imported."""
    paths = [
        path for folder in ("library", "networks", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    found = {}
    for path in sorted([*paths, *ROOT.glob("*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def import_graph(sources: dict[str, str], packages: Collection[str] = ()) -> dict[str, set[str]]:
    """Which of these modules each of them imports, anywhere in it; ``packages`` are the ``__init__`` files."""
    graph = {}
    for name, source in sources.items():
        names = imported_names(source, name if name in packages else name.rpartition(".")[0])
        graph[name] = {other for other in names if other in sources} - {name}
    return graph


def rings(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node: each node in one reaches all the others."""
    reached = {}
    for start in graph:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for other in graph[waiting.pop()] - seen:
                seen.add(other)
                waiting.append(other)
        reached[start] = seen
    found = {frozenset(b for b in graph if b in reached[a] and a in reached[b]) for a in graph if a in reached[a]}
    return sorted(sorted(ring) for ring in found)


def test_no_modules_import_each_other_in_a_ring():
    paths = project_modules()
    assert len(paths) > 150
    packages = [name for name, path in paths.items() if path.name == "__init__.py"]
    graph = import_graph({name: path.read_text(encoding="utf-8") for name, path in paths.items()}, packages)
    assert sum(map(len, graph.values())) > 500
    assert rings(graph) == []


def test_rings_of_any_length_and_of_any_kind_of_import_are_seen():
    sources = {
        "a": "def f():\n    from room import b",
        "room": "",
        "room.b": "if TYPE_CHECKING:\n    from .c import C",
        "room.c": "import a",
        "d": "import a\nimport e",
        "e": "from d import D",
        "f": "import a\nimport d",
    }
    assert rings(import_graph(sources, ["room"])) == [["a", "room.b", "room.c"], ["d", "e"]]
    assert rings(import_graph({**sources, "room.c": "", "e": ""}, ["room"])) == []


# ---- signatures ----------------------------------------------------------------------------------------------------


def definitions(body: list[ast.stmt]) -> dict[str, ast.AST]:
    """Functions, classes and annotated fields of a body by name."""
    found: dict[str, ast.AST] = {}
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
    return found


def own_statements(function: ast.FunctionDef) -> list[str]:
    """The function's statements without its docstring and without a bare ``...``."""
    body = function.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    return [ast.unparse(statement) for statement in body]


def differences(shown: list[ast.stmt], actual: list[ast.stmt], place: str) -> list[str]:
    """What the documentation shows otherwise than the code has it. The documentation may leave things out."""
    problems = []
    known = definitions(actual)
    for name, stub in definitions(shown).items():
        where, code = f"{place}: {name}", known.get(name)
        if type(stub) is not type(code):
            problems.append(f"{where} is not there")
        elif isinstance(stub, ast.ClassDef) and isinstance(code, ast.ClassDef):
            bases = [[ast.unparse(base) for base in node.bases] for node in (code, stub)]
            if bases[1] and bases[0] != bases[1]:
                problems.append(f"{where} has the bases {bases[0]}")
            problems += differences(stub.body, code.body, where)
        elif isinstance(stub, ast.FunctionDef) and isinstance(code, ast.FunctionDef):
            heads = [f"({ast.unparse(f.args)}) -> {f.returns and ast.unparse(f.returns)}" for f in (stub, code)]
            if heads[0] != heads[1]:
                problems.append(f"{where} is {heads[1]}, shown as {heads[0]}")
            if own_statements(stub) and own_statements(stub) != own_statements(code):
                problems.append(f"{where}: the code has other lines than are shown")
        elif isinstance(stub, ast.AnnAssign) and isinstance(code, ast.AnnAssign):
            kinds = [ast.unparse(field.annotation) for field in (stub, code)]
            problems += [f"{where} is {kinds[1]}"] if kinds[0] != kinds[1] else []
    return problems


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.splitlines()[0].removeprefix("# "))
def test_signatures_are_the_codes_own(block):
    path = block.splitlines()[0].removeprefix("# ")
    assert path in listed_paths()
    actual = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    shown = ast.parse(block).body
    assert definitions(shown)
    assert differences(shown, actual, path) == []


def test_a_wrong_signature_is_seen():
    code = ast.parse("class A:\n    x: int = 1\n    def f(self, a: int = 2) -> None:\n        print(a)").body
    assert differences(ast.parse("class A:\n    x: int\n    def f(self, a: int = 2) -> None: ...").body, code, "") == []
    for wrong in (
        "class A:\n    x: str",
        "class A:\n    def f(self, a: int = 3) -> None: ...",
        "class A:\n    def f(self, a: int = 2) -> int: ...",
        "class A:\n    def f(self, a: int = 2) -> None:\n        pass",
        "class A:\n    def g(self) -> None: ...",
        "class A(B):\n    x: int",
        "def f(): ...",
    ):
        assert differences(ast.parse(wrong).body, code, ""), wrong
