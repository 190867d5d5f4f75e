"""Small files that lie beside others: damaged ones are named or made again, pipes are not waited for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from library.errors import UserError
from library.models.stable_diffusion.checkpoint import _read_scheduler
from library.models.tokenizer_files import _json, _sentinels
from library.training.output.metadata import _data_url
from tests.faults.corpus import encoded
from tests.hostile_files import DEEP
from tests.running import run_in_process

NO_OBJECTS = ("", "{", "[]", "3", DEEP, '{"a": ' + DEEP + "}", '{"a": ' + "9" * 5000 + "}", "\ufeff{}")


@pytest.mark.parametrize("text", NO_OBJECTS, ids=range(len(NO_OBJECTS)))
def test_configurations_that_are_no_json_objects_are_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    for read in (_read_scheduler, _json):
        with pytest.raises(UserError, match=r"config\.json is not a valid"):
            read(path)


@pytest.mark.parametrize("count", ['"many"', "1.5", "[1]", "true"])
def test_a_number_of_sentinels_that_is_none_is_named(tmp_path, count):
    (tmp_path / "tokenizer_config.json").write_text(f'{{"extra_ids": {count}}}', encoding="utf-8")
    with pytest.raises(UserError, match="extra_ids must be a whole number"):
        _sentinels(tmp_path, 10)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_pipe_as_a_thumbnail_is_not_waited_for(tmp_path, caplog):
    os.mkfifo(tmp_path / "a.png")
    assert _data_url(str(tmp_path / "a.png")) is None
    assert "cannot be read (not a regular file); the file gets no thumbnail" in caplog.text


@pytest.mark.parametrize("kind", ["a pipe", "nested", "no JSON", "a list", "UTF-16"])
def test_kept_image_sizes_that_cannot_be_read_are_made_again(flux_command, dataset_toml, tmp_path, kind):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(encoded("PNG", size=(64, 64)))
    kept = folder / "metadata_cache.json"
    if kind == "a pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("this system has no pipes in folders")
        os.mkfifo(kept)
    else:
        text = {"nested": DEEP, "no JSON": "{", "a list": "[1]", "UTF-16": "{}"}[kind]
        kept.write_bytes(text.encode("utf-16" if kind == "UTF-16" else "utf-8"))
    dataset = dataset_toml(folder, resolution=64, subset={"cache_info": True})
    given = [*flux_command, "--dataset_config", dataset, "--output_dir", tmp_path / "out", "--ae", tmp_path / "missing"]
    result = run_in_process("flux_train_network.py", *given)
    assert "metadata_cache.json cannot be used and is rebuilt" in result.stderr, result.stderr
    assert (
        result.returncode == 2 and "missing" in result.stderr and Path(kept).read_text(encoding="utf-8").startswith("{")
    )
    shutil.rmtree(folder)
