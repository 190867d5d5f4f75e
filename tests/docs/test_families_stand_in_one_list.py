"""``library/families.py`` is the only list of model families: elsewhere no module names the scripts of several."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from library import families
from library.families import FAMILIES, Family
from tests.docs.pages import TRAINERS
from tests.running import ROOT
from tools.make_option_tables import PAGES

ALLOWED = {
    "library/families.py": "the list",
    "tests/docs/test_families_stand_in_one_list.py": "shows what a second list looks like",
    "tools/quickstart_families.py": "shows each family in one table",
    "tests/e2e/test_documented_training.py": "runs the commands of the guides",
    "tests/e2e/test_command_lines_of_other_guides.py": "checks command lines that guides of other programs show",
    "tests/e2e/test_memory_estimate.py": "runs two scripts",
    "tests/faults/test_killed_run_resumes_to_the_same_bytes.py": "runs two scripts",
    "tests/faults/test_kill_anywhere.py": "kills two scripts",
    "tests/faults/test_ctrl_c.py": "interrupts two scripts",
    "tests/faults/test_bad_pickles.py": "gives pickled files to every option of every script that takes one",
    "tests/docs/test_guides_are_true.py": "compares each guide with the tables of its own networks",
}
"""Modules outside the families' own that may name scripts, each with the reason."""
NAMES = {
    "library/models/recognition.py": "says in sentences what a checkpoint of any model is",
    "tools/make_lora_formats.py": "tables of LoRA files, each headed by the models that it holds for",
}
"""Modules that may call the families by the names of their LoRA files, each with the reason."""
LOOP = "train_network"
"""The module of the training loop, imported by every family's script; Stable Diffusion's own is in it too."""


def own_marks(family: Family) -> set[str]:
    """What only this family's list entries hold: its scripts, its classes, its network modules."""
    marks = {family.script, family.file, family.trainer, family.options, *family.networks}
    if family.inference:
        module, _, options = family.inference.partition(":")
        marks |= {module, f"{module}.py", options}
    return marks


def lora_marks(family: Family) -> set[str]:
    """What its LoRA files are recognised and named by; tests may expect it in messages."""
    return {family.lora_name, family.module_marks, family.encoder_marks} - {""}


def script_marks(family: Family) -> set[str]:
    """As ``own_marks`` for tests, which may take a network module of several families as what they test."""
    return own_marks(family) - set(family.networks)


@cache
def named_in(source: str) -> frozenset[str]:
    """What a module names in strings or imports."""
    names: set[str] = set()
    tree = ast.parse(source)
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            names |= {node.value, *node.value.split()}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names |= {node.module or "", alias.name, f"{node.module}.{alias.name}"}
    return frozenset(names - {LOOP})


def named_families(source: str, marks: Callable[[Family], set[str]] = own_marks) -> set[str]:
    """The rooms of the families whose scripts, classes or network modules a module names in strings or imports."""
    likely = [family for family in FAMILIES if any(last_word(mark) in source for mark in marks(family))]
    return {family.room for family in likely if named_in(source) & marks(family)}


def last_word(mark: str) -> str:
    """What a module's text holds that names it, in whatever way."""
    return mark.removesuffix(".py").rpartition(".")[2]


def is_a_familys_own(path: str) -> bool:
    """Whether a module belongs to one family: its scripts, its networks, its tools, its room."""
    modules = {path.removesuffix(".py").replace("/", ".")}
    return any(
        modules
        & {family.script, family.inference_script, *family.networks, *(tool.partition(":")[0] for tool in family.tools)}
        or path.startswith(f"library/models/{family.room}/")
        for family in FAMILIES
    )


def modules() -> list[str]:
    folders = ("library", "networks", "tools", "benchmarks", "tests")
    paths = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def families_in(path: str) -> set[str]:
    """``named_families`` of a module by its path."""
    is_test = path.startswith("tests/") and not path.startswith("tests/docs/")
    return named_families((ROOT / path).read_text(encoding="utf-8"), script_marks if is_test else own_marks)


def test_no_other_module_names_the_scripts_of_several_families():
    found = {path: rooms for path in modules() if path not in ALLOWED and len(rooms := families_in(path)) > 1}
    assert found == {}


def test_no_other_module_tells_the_lora_files_of_several_families_apart():
    found = {
        path: rooms
        for path in modules()
        if path not in (*ALLOWED, *NAMES) and not path.startswith("tests/")
        if len(rooms := named_families((ROOT / path).read_text(encoding="utf-8"), lora_marks)) > 1
    }
    assert found == {}


def test_library_names_no_script_but_in_the_list():
    found = [
        path
        for path in modules()
        if path.startswith("library/") and path not in ALLOWED and not is_a_familys_own(path)
        if any(
            names & {family.script, family.trainer, family.options}
            for family in FAMILIES
            if (names := strings(ROOT / path))
        )
    ]
    assert found == []


@cache
def strings(path: Path) -> set[str]:
    """The strings of a module that are exactly one word."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.mark.parametrize(
    "source",
    [
        'SCRIPTS = ("train_network.py", "flux_train_network.py")',
        "from flux_train_network import FluxNetworkTrainer\nfrom sdxl_train_network import SdxlTrainingOptions",
        'module = "networks.lora_flux" if is_flux else "networks.lora"',
        "from networks import lora, lora_flux",
    ],
)
def test_a_second_list_would_be_seen(source):
    assert len(named_families(source)) == 2
    assert len(named_families('NAMES = {"flux": "FLUX.1", "sdxl": "Stable Diffusion XL"}', lora_marks)) == 2


def test_every_exception_is_still_needed():
    named = {path: families_in(path) for path in ALLOWED}
    named |= {path: named_families((ROOT / path).read_text(encoding="utf-8"), lora_marks) for path in NAMES}
    assert [path for path, rooms in named.items() if len(rooms) < 2] == []


# ---- the rows are true -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
def test_a_row_names_what_is_there(family):
    trainer = family.trainer_class()
    assert trainer.options_class is family.options_class()
    assert trainer.family == family.name
    assert (ROOT / family.options_page).is_file()
    assert (ROOT / "library" / "models" / family.room / "pipeline.py").is_file()
    assert all(callable(families.load(f"{name}:create_network")) for name in family.networks)
    assert TRAINERS[family.file] is trainer


def test_every_script_and_network_of_the_suite_is_in_a_row():
    scripts = {path.stem for path in ROOT.glob("*_train_network.py")} | {"train_network"}
    assert {family.script for family in FAMILIES} == scripts
    offered = re.compile(r"^(def )?create_network\b", re.MULTILINE)
    found = [path for path in (ROOT / "networks").glob("*.py") if offered.search(path.read_text(encoding="utf-8"))]
    assert families.network_modules() == sorted(f"networks.{path.stem}" for path in found)
    assert len({page.begin + page.path for page in PAGES}) == len(PAGES)


def test_a_base_model_version_tells_whose_it_is():
    told = {
        version: families.version_of(version)[1].architecture
        for version in ("sd_v1", "sd_v2", "sd_v2_v", "sdxl_base_v1-0", "flux1", "chroma")
    }
    assert told == {
        "sd_v1": "stable-diffusion-v1",
        "sd_v2": "stable-diffusion-v2-512",
        "sd_v2_v": "stable-diffusion-v2-768-v",
        "sdxl_base_v1-0": "stable-diffusion-xl-v1-base",
        "flux1": "flux-1-dev",
        "chroma": "chroma",
    }
    assert families.version_of("sd3") is None


@pytest.mark.parametrize(
    ("modules", "version", "name"),
    [
        (["lora_te1_text_model_x", "lora_unet_double_blocks_0_img_attn_qkv"], "", "FLUX.1"),
        (["lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_0_img_mlp_fc1"], "", "HunyuanImage-2.1"),
        (["lora_unet_noise_refiner_0_attention_out"], "", "Lumina Image 2.0"),
        (["lora_unet_down_blocks_1_attentions_0_proj_in"], "", "Stable Diffusion 1.x or 2.x"),
        (["lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_x"], "", "Stable Diffusion XL"),
        (["lora_unet_down_blocks_1_attentions_0_proj_in"], "sdxl_base_v1-0", "Stable Diffusion 1.x or 2.x"),
        (["lora_te1_text_model_x"], "flux1", "FLUX.1"),
        (["lora_te1_text_model_x"], "chroma", "FLUX.1"),
        (["lora_te1_text_model_x"], "hunyuan_image_2_1", "HunyuanImage-2.1"),
        (["lora_te1_text_model_x"], "of my own", "Stable Diffusion XL"),
        (["lora_te_text_model_x"], "", "Stable Diffusion 1.x or 2.x"),
        (["lora_te_layers_0_mlp_up_proj"], "", "Lumina Image 2.0"),
        (["lora_te1_layers_0_self_attn_q_proj"], "", "Lumina Image 2.0"),
        (["lora_te1_text_model_x"], "lumina2", "Lumina Image 2.0"),
        (["lora_unet_x"], "", None),
        ([], "", None),
    ],
)
def test_a_lora_file_tells_whose_it_is(modules, version, name):
    found = families.lora_family(modules, version)
    assert (found.lora_name if found else None) == name
