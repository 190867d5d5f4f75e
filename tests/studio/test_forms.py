"""The studio's forms are the options: each once, as declared, and what is filled in is what the script reads."""

from __future__ import annotations

import collections
import datetime
import math
import random
from typing import Any, Literal

import pytest
import tomli

from library.options import (
    NOT_IN_OUTPUT_CONFIG,
    SCRIPT,
    StepsOrRatio,
    all_values,
    choices_of,
    declared_options,
    describe_type,
    parse_options,
    plain_types,
)
from library.studio.forms import PREFIX, REST, empty_form, form_of_fields, form_of_keys
from library.studio.settings_files import lines_of, read_settings, settings_text
from library.studio.workspace import Script, scripts
from tests.studio.client import fields_of, names_of, studio

SCRIPTS = list(scripts().values())
LINES = (
    "plain",
    " two  words ",
    'a "b" \\ c',
    "<b>&amp;'",
    "C:\\x\\u0041",
    "日本 \U0001f98a",
    "\x7f\x1b[2J",
    "0",
    "None",
    "#",
    "a=1",
    "{{ x }}",
)
TEXTS = (*LINES, "two\nlines", "\n\nafter")
FLOATS = (0.0, -1.5, 1e-7, 3e300, 1 / 3)
INTEGERS = (0, 7, -3, 2**40)


def value_of(option: Any, draw: random.Random) -> Any:
    """A value that an option takes, as a Python program would write it."""
    kinds = plain_types(option.type)
    if option.type is StepsOrRatio:
        return draw.choice((12, 0.25))
    if bool in kinds:
        return draw.choice((True, False))
    if list in kinds:
        words = describe_type(option.type)
        pool: tuple[Any, ...] = LINES if "text" in words else INTEGERS if "whole" in words else FLOATS
        return draw.choices(pool, k=draw.randint(1, 4))
    pools = {Literal: choices_of(option.type), int: INTEGERS, float: FLOATS, str: TEXTS}
    return draw.choice([value for kind, pool in pools.items() if kind in kinds for value in pool])


def filled(script: Script, draw: random.Random) -> dict[str, Any]:
    """A value for every option of a script that a file may hold."""
    options = declared_options(script.options_class)
    return {name: value_of(option, draw) for name, option in options.items() if name not in NOT_IN_OUTPUT_CONFIG}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A studio, and the folder it works in."""
    folder = tmp_path_factory.mktemp("studio")
    with studio(folder, [folder]) as (client, workspace):
        yield client, workspace


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.file)
def test_every_option_stands_in_its_form_once_with_its_sentence(script, client):
    browser, workspace = client
    workspace.new_job("all", script.file, {})
    try:
        page = browser.get("/jobs/all").text
    finally:
        workspace.job_path("all").unlink()
    declared = declared_options(script.options_class)
    assert collections.Counter(names_of(page)) == collections.Counter(list(declared))
    form = empty_form(script.file, script.options_class)
    assert [entry.option for group in form.groups for entry in group.fields] and form.values() == {}
    from markupsafe import escape

    assert all(str(escape(option.help)) in page for option in declared.values())
    assert set(fields_of(page).values()) == {""}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.file)
def test_a_filled_form_writes_a_file_that_the_script_reads_to_the_same_options(script, client, thorough):
    browser, workspace = client
    options = declared_options(script.options_class)
    path = workspace.job_path("filled")
    path.parent.mkdir(exist_ok=True)
    for seed in range(20 if thorough else 1):
        values = filled(script, random.Random(seed))
        path.write_text(settings_text(script.file, values), encoding="utf-8")  # what any editor may have written
        fields = fields_of(browser.get("/jobs/filled").text)
        path.write_text(settings_text(script.file, {}), encoding="utf-8")
        saved = browser.post("/jobs/filled", {**fields, "action": "save"})
        assert saved.code == 303, saved.text
        read = all_values(parse_options(script.options_class, "", ["--config_file", str(path)]))
        assert {name: read[name] for name in values} == values
        written = {name for name, value in values.items() if value != options[name].default}
        assert set(tomli.loads(path.read_text(encoding="utf-8"))) == {SCRIPT, *written}


def test_what_is_written_as_toml_is_read_back():
    moments = [datetime.date(2026, 1, 2), datetime.datetime(2026, 1, 2, 3, 4, 5, 6), datetime.time(7, 8)]
    keys = {
        **{text: text for text in TEXTS},
        **{
            "": "",
            "numbers": [*INTEGERS, -(2**63)],
            "floats": [*FLOATS, math.inf, -math.inf],
            "no": False,
            "yes": [True],
        },
        **{"moments": moments, "deep": {"a b": [{"c": {}}, []], "d": moments[0]}},
        "every": "".join(map(chr, (*range(0x250), 0x2028, 0xFFFD, 0x1F98A))),
    }
    assert tomli.loads(lines_of(keys)) == keys


def test_keys_that_are_no_options_stay_in_the_file_and_wrong_values_are_named_at_their_field(tmp_path, client):
    browser, workspace = client
    script = SCRIPTS[0]
    other = {"LoRA_type": "Standard", "started": datetime.date(2026, 1, 2), "made_up": [1, {"a": 2.5}]}
    workspace.new_job("kept", script.file, {**other, "learning_rate": "much", "wandb_api_key": "secret", "sdpa": True})
    page = browser.get("/jobs/kept").text
    assert "--learning_rate must be a number, not &#39;much&#39;" in page and 'value="much"' in page
    assert "secrets are not written" in page and "secret&" not in page and 'value="secret"' not in page
    assert "&#34;made_up&#34; is unknown." in page and "LoRA_type&#34; is unknown" not in page
    fields = fields_of(page)
    fields[REST] = lines_of(other)
    refused = browser.post("/jobs/kept", fields)
    assert refused.code == 422 and "Nothing was saved" in refused.text
    assert browser.post("/jobs/kept", {**fields, f"{PREFIX}learning_rate": "1e-3"}).code == 303
    assert read_settings(workspace.job_path("kept")) == {
        SCRIPT: script.file,
        "sdpa": True,
        "learning_rate": 0.001,
        **other,
    }
    twice = browser.post("/jobs/kept", {**fields, f"{PREFIX}learning_rate": "", REST: "learning_rate = 1\n"})
    assert twice.code == 422 and "learning_rate: set in the fields above" in twice.text


def test_a_preset_and_any_file_of_options_begin_a_job(tmp_path, client):
    browser, workspace = client
    sizes = [preset.path.stem for preset in workspace.presets() if preset.path.stem.startswith("flux_")]
    assert sizes == ["flux_8gb", "flux_10gb", "flux_12gb", "flux_16gb", "flux_24gb"]
    for preset in workspace.presets():
        name = preset.path.stem
        assert browser.post("/new", {"name": name, "preset": preset.path.name}).code == 303
        job = workspace.job(name)
        keys = read_settings(preset.path)
        known = declared_options(scripts()[job.script].options_class)
        assert workspace.form(job).values() == {
            key: value for key, value in keys.items() if value != known[key].default
        }
    given = workspace.folder / "given.toml"
    given.write_text('[a]\nnetwork_module = "networks.lora_lumina"\n[b]\nlearning_rate = 3e-4\n', encoding="utf-8")
    assert browser.post("/new", {"name": "given", "file": str(given)}).code == 303
    assert workspace.form(workspace.job("given")).values()["learning_rate"] == 3e-4
    assert "lumina" in workspace.job("given").script
    again = browser.post("/new", {"name": "given", "file": str(given)})
    assert again.code == 422 and "There is a job given already" in again.text
    outside = browser.post("/new", {"name": "outside", "file": "/etc/hostname"})
    assert outside.code == 422 and "outside the folders" in outside.text


def test_a_browser_sends_switches_only_when_they_are_on():
    script = SCRIPTS[0]
    form = form_of_fields(script.file, script.options_class, {f"{PREFIX}sdpa": "on", f"{PREFIX}seed": " 5 "})
    assert form.values() == {"sdpa": True, "seed": 5}
    assert form_of_keys(script.file, script.options_class, {"sdpa": False, "seed": "5"}).values() == {"seed": 5}
