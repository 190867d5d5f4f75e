"""What the guides list is what the programs have: options, samplers, optimizers, schedules, network arguments."""

from __future__ import annotations

import re

import pytest

from gen_img import GenImgOptions
from library.data.image_check import MEANINGS
from library.generation.image_prompts import LETTERS
from library.models.stable_diffusion.sampling import SAMPLERS
from library.options import declared_options, parse_options
from library.training.optim import lr_schedulers, optimizers
from networks import lora, lora_flux, lora_lumina
from networks.adapters.lora_arguments import COMMON_ARGUMENTS
from networks.adapters.lora_blocks import CURVES, SD_BLOCKS, SDXL_BLOCKS
from tests.docs.pages import PAGES, TRAINERS
from tests.running import ROOT


def text_of(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def chapter(name: str, heading: str) -> str:
    """A page's text from a heading to the next one that is not below it."""
    level = heading.split()[0]
    after = text_of(name).split(f"\n{heading}", 1)[1]
    return re.split(rf"\n#{{1,{len(level)}}} ", after)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of the rows of all tables, without heads."""
    found = [line for line in text.splitlines() if line.startswith("|")]
    heads = {index - 1 for index, line in enumerate(found) if re.fullmatch(r"[|-]+", line)}
    wanted = [line for index, line in enumerate(found) if index not in heads and not re.fullmatch(r"[|-]+", line)]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in wanted]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_every_page_is_named_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", readme))
    assert {page.name for page in PAGES} - {"README.md"} == linked


def test_every_chapter_of_the_flux_guide_has_its_japanese_section():
    text = re.sub(r"^```.*?^```$", "", text_of("flux_train_network.md"), flags=re.MULTILINE | re.DOTALL)
    chapters = re.split(r"^(?=#{1,3} )", text, flags=re.MULTILINE)[1:]
    assert len(chapters) > 25
    assert [part.splitlines()[0] for part in chapters if part.count("<summary>日本語</summary>") != 1] == []
    assert all("details>" not in part.partition("</details>")[2] for part in chapters)


def named_options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--([a-z]\w*)", text))


JAPANESE = re.compile(r"<details>\n<summary>日本語</summary>(.*?)</details>", flags=re.DOTALL)
BILINGUAL = [page for page in PAGES if JAPANESE.search(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", BILINGUAL, ids=lambda page: page.name)
def test_a_guide_s_japanese_sections_name_the_options_of_the_english_ones(page):
    """All of them but those of blocks and of tables that are generated, and no others."""
    text = page.read_text(encoding="utf-8")
    japanese, english = " ".join(JAPANESE.findall(text)), JAPANESE.sub("", text)
    prose = re.sub(r"^```.*?^```$", "", english, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"<!-- option tables.*?<!-- end.*?-->", "", prose, flags=re.DOTALL)
    assert named_options(prose) - named_options(japanese) == set()
    assert named_options(japanese) - named_options(english) == set()


def test_pages_with_japanese_sections_are_marked_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    marked = set(re.findall(r"\]\(docs/([\w-]+\.md)\) \|.*日本語の要約付き", readme))
    assert marked == {page.name for page in BILINGUAL}


def test_the_english_and_the_japanese_guide_to_gen_img_say_the_same():
    """The same commands, files and chapters, and in both every option, every option of a prompt and every sampler."""
    shared = {"device", "streaming", "config", "console"}  # options of all inference scripts
    declared = declared_options(GenImgOptions).values()
    wanted = {name for option in declared if option.group not in shared for name in option.names}
    texts = [text_of("gen_img_README.md"), text_of("gen_img_README-ja.md")]
    for text in texts:
        assert wanted - set(re.findall(r"\w+", text)) == set()
        assert {*LETTERS, "d"} - set(re.findall(r"`--(\w+)`", text)) == set()
        named = quoted(re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
        assert set(SAMPLERS) - set(named) <= {f"k_{name}" for name in SAMPLERS}
    shown = [re.findall(r"^```\w+\n.*?^```$|^\|[-|]+$|^#+(?= )", t, flags=re.MULTILINE | re.DOTALL) for t in texts]
    assert shown[0] == shown[1] and len(shown[0]) > 40
    assert len(rows(texts[0])) == len(rows(texts[1]))


def test_every_option_is_explained_in_a_guide():
    """Not only in the option tables: what it is for stands in some guide's text."""
    guides = [page for page in PAGES if not page.name.startswith(("options_", "architecture", "README"))]
    words = set(re.findall(r"\w+", " ".join(page.read_text(encoding="utf-8") for page in guides)))
    options = set().union(*(declared_options(trainer.options_class) for trainer in TRAINERS.values()))
    assert options - words == set()


def test_samplers():
    (row,) = (row for row in rows(text_of("train_network.md")) if row[0] == "`--ss`")
    named = [name for name in quoted(row[3]) if name != "k_"]
    assert sorted(named) == sorted(SAMPLERS)
    assert named[0] == parse_options(TRAINERS["train_network.py"].options_class, "", []).sampler.sample_sampler


def test_optimizers():
    table = rows(chapter("train_network_advanced.md", "## 1. Optimizers"))
    named = [name for row in table for name in quoted(row[0]) if name.isidentifier()]
    assert len(named) > 12
    for name in named:
        optimizers.check_optimizer_options(optimizers.OptimizerOptions(optimizer_type=name, learning_rate=1.0))
    families = [name for name in optimizers._NAMED if not name.startswith("dadapt")]
    assert set(families) <= {name.lower() for name in named}


def test_schedules():
    table = rows(chapter("train_network_advanced.md", "## 2. Learning rate schedules"))
    named = [name.partition(":")[0] for row in table for name in quoted(row[0])]
    assert sorted(named) == sorted(lr_schedulers._KNOWN)
    used = {row[0].split("`")[1].partition(":")[0]: set(quoted(row[1])) for row in table}
    for option, users in lr_schedulers._USED_BY.items():
        if option != "lr_warmup_steps":
            assert {name for name, options in used.items() if f"--{option}" in options} == set(users), option


def test_network_arguments():
    text = chapter("train_network_advanced.md", "## 4. Arguments of")
    named = {name for row in rows(text) for name in quoted(row[0])}
    assert named == {*COMMON_ARGUMENTS, *lora.NETWORK.arguments} - {"split_qkv"}
    assert all(f"`{curve}`" in text for curve in CURVES)
    words = set(re.findall(r"\w+", chapter("flux_train_network.md", "## 6. Advanced")))
    assert {*COMMON_ARGUMENTS, *lora_flux.NETWORK.arguments} <= words
    words = set(re.findall(r"\w+", chapter("lumina_train_network.md", "## 6. Advanced")))
    assert {*COMMON_ARGUMENTS, *lora_lumina.NETWORK.arguments} <= words


@pytest.mark.parametrize("layout", [SD_BLOCKS, SDXL_BLOCKS], ids=lambda layout: layout.model)
def test_numbers_of_blocks(layout):
    table = {row[0]: row[1] for row in rows(chapter("train_network_advanced.md", "### 4.2. Blocks"))}
    assert str(layout.count) in re.findall(r"\d+", table["`block_dims`, `block_alphas`"])
    weights = table["`down_lr_weight`, `mid_lr_weight`, `up_lr_weight`"]
    assert f"{layout.down}, {layout.middle}, {layout.up} (" in weights


def test_bucket_steps_and_sizes_of_each_script():
    table = {quoted(row[0])[0]: row[1:3] for row in rows(chapter("config_README-en.md", "## 5. Buckets"))}
    assert table == {
        name: [str(trainer.bucket_divisor), str(trainer.size_divisor)] for name, trainer in TRAINERS.items()
    }


def test_every_kind_of_converted_image_is_told():
    assert len(rows(chapter("config_README-en.md", "## 6. Images"))) == len(MEANINGS)
