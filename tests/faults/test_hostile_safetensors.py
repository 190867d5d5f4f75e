"""A damaged or malicious safetensors file gets one sentence from whatever opens it: no traceback, no waiting."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import save

from library.checkpoints import open_checkpoint
from library.errors import UserError
from library.safetensors_io import json_object, read_header, strict_json
from tests.hostile_files import DEEP, hostile_headers

SOUND = save({"first": torch.randn(3, 4), "second": torch.randn(2)}, {"k": "v"})
HEADERS = hostile_headers(SOUND)
# What the safetensors library lets pass, though it means nothing or would mislead.
LENIENT = {"key twice", "dtype twice", "entry is a list", "a thousand dimensions", "empty shape beyond 2^63"}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_header_is_refused_in_one_sentence(tmp_path, kind):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(HEADERS[kind])
    for disable_mmap in (False, True):
        with pytest.raises(UserError) as error:
            open_checkpoint(path, disable_mmap=disable_mmap, option="--model")
        sentence = str(error.value)
        assert sentence.startswith(f"--model: {path} is ") and sentence.endswith(".") and "\n" not in sentence
        assert re.search("damaged|truncated|not a safetensors file", sentence)


@pytest.mark.parametrize("kind", sorted(HEADERS.keys() - LENIENT))
def test_the_safetensors_library_refuses_the_same_files(tmp_path, kind):
    """So that a file which other programs read is not called damaged here."""
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(HEADERS[kind])
    with pytest.raises((safetensors.SafetensorError, OSError, ValueError, OverflowError)):
        safetensors.torch.load_file(path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    os.mkfifo(tmp_path / "pipe.ckpt")
    sentences: list[str] = []

    def look() -> None:
        for name in ("pipe.safetensors", "pipe.ckpt"):
            try:
                open_checkpoint(tmp_path / name)
            except UserError as error:
                sentences.append(str(error))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(20)
    assert [sentence.rpartition("/")[2] for sentence in sentences] == [
        "pipe.safetensors is not a regular file.",
        "pipe.ckpt is not a regular file.",
    ]


@pytest.mark.parametrize(
    "content",
    [
        *(
            "",
            "[]",
            "null",
            "{",
            '{"weight_map": {}}',
            '{"weight_map": {"a": 1}}',
            '{"weight_map": {"a": [], "b": "c"}}',
        ),
        *(DEEP, '{"weight_map": ' + DEEP + "}", '{"weight_map": {"a": ""}}', '{"weight_map": "x"}'),
    ],
    ids=range(11),
)
def test_a_hostile_index_of_shards_is_refused(tmp_path, content):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="is not a valid index of shards"):
        open_checkpoint(path)
    with pytest.raises(UserError, match="is not a valid index of shards"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80", b"\x80\x02.", b"\x80\x02}.", b"PK\x03\x04", b"not a pickle", b"N."])
def test_a_hostile_pickle_is_refused(tmp_path, content):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_pickle_without_dense_tensors_is_refused(tmp_path):
    for name, tensor in (("sparse", torch.eye(3).to_sparse()), ("meta", torch.empty(2, device="meta"))):
        torch.save({"a": tensor, 5: torch.ones(1)}, tmp_path / f"{name}.pt")
        with pytest.raises(UserError, match="is sparse, quantized or without values"):
            open_checkpoint(tmp_path / f"{name}.pt")


def test_numbers_as_names_in_a_pickle_are_left_out(tmp_path):
    torch.save({5: torch.ones(1), "a": torch.ones(2)}, tmp_path / "a.pt")
    assert list(open_checkpoint(tmp_path / "a.pt")) == ["a"]


@pytest.mark.parametrize(
    "text", ["Infinity", "[NaN]", '{"a": -Infinity}', DEEP, '{"a": 1, "a": 1}', '"\\ud800"', "x", "1 2"]
)
def test_json_that_is_none_is_a_value_error(text):
    with pytest.raises(ValueError):
        strict_json(text)
    assert json_object(text) == {}


def test_json_is_read_as_the_standard_has_it():
    text = '{"a": [1, 2.5, null, true, "\\ud83d\\ude00", "\\\\u"], "b": {"a": {}}}'
    assert strict_json(text) == {"a": [1, 2.5, None, True, "\U0001f600", "\\u"], "b": {"a": {}}}
    assert json_object('{"a": 1}') == {"a": 1} and json_object(None) == json_object("[1]") == {}


def test_a_header_without_metadata_or_tensors_is_sound(tmp_path):
    path = Path(tmp_path / "empty.safetensors")
    for header in (b"{}", b'{"__metadata__": null}', b'{"__metadata__":{"a":"b"}}'):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        assert read_header(path).tensors == {}
