"""docs/migration.md: what it says of options that users of other programs bring is what happens."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import tomli

from library.checkpoints import open_checkpoint
from library.console import set_up_console
from library.errors import UserError
from library.families import FAMILIES, by_model
from library.options import parse_options
from networks.adapters.lora_arguments import COMMON_ARGUMENTS
from tests.docs.pages import PAGES, TRAINERS, blocks, commands
from tests.docs.test_guides_are_true import chapter, quoted, rows, text_of
from tests.running import ROOT, forget_accelerator, make_trainer

PAGE = "migration.md"
BOTH = [family.file for family in FAMILIES if family.room == "stable_diffusion"]
BASE = "--pretrained_model_name_or_path m.safetensors --dataset_config d.toml --network_module networks.lora"


def cases(heading: str, columns: int = 3, table: int = 0) -> list[object]:
    """Script, options and last cell of each row of a chapter's table, for each script that it is about."""
    tables = re.split(r"\n\n(?=\| options)", chapter(PAGE, heading))[1:]
    found = []
    for options, script, rest in rows(tables[table]):
        for name in BOTH if script == "both" else quoted(script):
            found.append(pytest.param(name, quoted(options)[0], rest, id=f"{name}: {quoted(options)[0]}"))
    return found


@pytest.fixture
def checked(tmp_path, capsys):
    """The checks of a script's options; returns the trainer and what was said."""

    def check(script: str, options: str):
        words = [word.replace('"', "") for word in f"{BASE} --output_dir {tmp_path} {options}".split()]
        parsed = parse_options(TRAINERS[script].options_class, "", words)
        set_up_console(parsed.console)
        trainer = TRAINERS[script].of(parsed)
        trainer.check_options()
        trainer.check_network()
        return trainer, capsys.readouterr().err

    return check


@pytest.mark.parametrize(("script", "options", "message"), cases("## 2. What is refused"))
def test_what_is_refused(checked, script, options, message):
    with pytest.raises(UserError, match=re.escape(quoted(message)[0])):
        checked(script, options)


@pytest.mark.parametrize(("script", "options", "what"), cases("## 3. What is changed"))
def test_what_is_changed_or_warned_of_is_said(checked, monkeypatch, script, options, what):
    monkeypatch.setitem(sys.modules, "xformers", None)
    trainer, said = checked(script, options)
    assert trainer.no_effect == []
    assert [line for line in said.splitlines() if options.split()[0] in line]
    if "constant_with_warmup" in what:
        assert trainer.options.lr_scheduler.lr_scheduler == "constant_with_warmup"


@pytest.mark.parametrize(("script", "options", "reason"), cases("## 3. What is changed", table=1))
def test_what_has_no_effect_is_said(checked, script, options, reason):
    trainer, said = checked(script, options)
    (name,) = trainer.no_effect
    assert f"--{name}" in options and "no effect" in said


def test_an_option_that_one_script_ignores_acts_in_the_other(checked):
    trainer, _ = checked(BOTH[0], "--clip_skip 2")
    assert trainer.no_effect == []


def test_the_sentence_about_an_id_of_the_hub():
    (shown,) = (block.text.removeprefix("error: ").strip() for block in blocks("text") if block.page.name == PAGE)
    option, name = "--pretrained_model_name_or_path", "stabilityai/stable-diffusion-xl-base-1.0"
    with pytest.raises(UserError) as caught:
        open_checkpoint(name, option=option)
    assert str(caught.value) == shown


@pytest.mark.parametrize("family", ["sd1", "sdxl", "flux", "chroma", "lumina", "hunyuan_image"])
def test_a_training_does_not_download_a_model(family, tmp_path, monkeypatch):
    """An id in the place of the model: the sentence, before anything is loaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "a.png")
    Path("d.toml").write_text(
        "[[datasets]]\nresolution = 64\nmin_bucket_reso = 64\n"
        '[[datasets.subsets]]\nimage_dir = "images"\nclass_tokens = "a"\n'
    )
    network = by_model(family).networks[0]
    words = f"--pretrained_model_name_or_path someone/model --dataset_config d.toml --network_module {network}"
    forget_accelerator()
    trainer = make_trainer(family, *words.split(), "--network_train_unet_only", "--output_dir", tmp_path / "out")
    with pytest.raises(UserError, match=r"someone/model does not exist, and models are not downloaded"):
        for step in ("check_options", "prepare_output", "check_network", "start_processes", "read_data", "plan_steps"):
            getattr(trainer, step)()
        trainer.open_pipeline()
    forget_accelerator()


def test_the_lines_that_fetch_a_model_bring_what_the_presets_read():
    lines = [words for block in blocks("bash") if block.page.name == PAGE for words in commands(block)]
    brought = {words[3] for words in lines if words[:2] == ["hf", "download"]}
    presets = [ROOT / "configs" / name for name in ("sd1_8gb.toml", "sdxl_8gb.toml")]
    read = {tomli.loads(path.read_text())["files"]["pretrained_model_name_or_path"] for path in presets}
    assert {f"models/{name}" for name in brought} == read


def test_the_words_for_other_programs_are_ours():
    """The column "here" names options (another test holds those), dataset keys, modules and arguments of networks."""
    guide = text_of("config_README-en.md")
    keys = {name for row in rows(guide) for name in quoted(row[0]) if name.isidentifier()}
    arguments = importlib.import_module(by_model("flux").networks[0]).NETWORK.arguments
    known = keys | {*COMMON_ARGUMENTS, *arguments, "[[datasets]]", "[[datasets.subsets]]"}
    known |= {name for family in FAMILIES for name in family.networks} | {"lycoris.kohya"}
    for heading in ("## 5. kohya_ss GUI", "## 6. OneTrainer", "## 7. ComfyUI"):
        (part,) = (part for part in re.split(r"^(?=## )", text_of(PAGE), flags=re.M) if part.startswith(heading))
        words = [word for row in rows(part) for word in quoted(row[-1])]
        assert len(words) > 4
        plain = [word for word in words if not re.match(r"--\w+|\d", word)]
        assert [word for word in plain if word not in known] == [], heading


def test_the_page_leads_to_every_other_page_about_sd_scripts():
    others = {page.name for page in PAGES if re.search(r"^#+ .*sd-scripts", page.read_text(encoding="utf-8"), re.M)}
    linked = set(re.findall(r"\]\(([\w-]+\.md)#", text_of(PAGE)))
    assert others - {PAGE, "gen_img_README-ja.md"} <= linked
