"""Checkpoint files are read and written exactly, and what is wrong with a bad one is said in one sentence."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.checkpoints import load_tensors, open_checkpoint
from library.errors import UserError
from library.safetensors_io import content_hashes, file_hash, legacy_hash, model_hash, read_header, save_file

METADATA = {"ss_network_dim": "4", "modelspec.title": 'quotes " and ünïcode', "format": "pt"}


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    values = torch.randn(3, 5)
    return {
        "b.float32": values,
        "a.float32": values.T,
        "half": values.half(),
        "bf16": values.bfloat16(),
        "double": values.double(),
        "e4m3": values.to(torch.float8_e4m3fn),
        "e5m2": values.to(torch.float8_e5m2),
        "flags": values > 0,
        "bytes": torch.arange(7, dtype=torch.uint8),
        "int8": torch.arange(-3, 3, dtype=torch.int8),
        "int16": torch.arange(3, dtype=torch.int16),
        "int32": torch.arange(3, dtype=torch.int32),
        "int64": torch.tensor(4),
        "nothing": torch.zeros(0, 4),
    }


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (actual, expected)]
    return actual.dtype == expected.dtype and actual.shape == expected.shape and torch.equal(*as_bytes)


@pytest.mark.parametrize("disable_mmap", [False, True])
def test_files_of_the_safetensors_library_are_read_bit_by_bit(tmp_path, disable_mmap):
    written = {name: value.contiguous() for name, value in tensors().items()}
    safetensors.torch.save_file(written, tmp_path / "a.safetensors", METADATA)
    checkpoint = open_checkpoint(tmp_path / "a.safetensors", disable_mmap=disable_mmap)
    assert set(checkpoint) == written.keys() and checkpoint.metadata == METADATA
    for name, value in written.items():
        assert checkpoint.shape(name) == tuple(value.shape) and checkpoint.dtype(name) == value.dtype
        assert same(checkpoint.load(name), value)


def test_files_are_written_as_the_safetensors_library_reads_and_orders_them(tmp_path):
    save_file(tensors(), tmp_path / "ours.safetensors", METADATA)
    loaded = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    assert all(same(loaded[name], value) for name, value in tensors().items()) and loaded.keys() == tensors().keys()
    with safetensors.safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == METADATA
    contiguous = {name: value.contiguous() for name, value in tensors().items()}
    theirs = safetensors.torch.save(contiguous)
    start = 8 + struct.unpack("<Q", theirs[:8])[0]
    ours = (tmp_path / "ours.safetensors").read_bytes()
    assert ours[read_header(tmp_path / "ours.safetensors").data_start :] == theirs[start:]


def test_the_same_content_gives_the_same_bytes(tmp_path):
    save_file(tensors(), tmp_path / "first.safetensors", METADATA)
    save_file(dict(reversed(tensors().items())), tmp_path / "second.safetensors", METADATA)
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()


def test_loading_casts_floating_point_only(tmp_path):
    save_file(tensors(), tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert torch.equal(checkpoint.load("b.float32", torch.bfloat16), tensors()["bf16"])
    assert checkpoint.load("e4m3", torch.float32).dtype == torch.float32
    assert checkpoint.load("int64", torch.bfloat16).dtype == torch.int64


@pytest.mark.parametrize("disable_mmap", [False, True])
def test_loaded_tensors_do_not_lie_on_the_file(tmp_path, disable_mmap):
    save_file({"a": torch.ones(1000)}, tmp_path / "a.safetensors")
    loaded = open_checkpoint(tmp_path / "a.safetensors", disable_mmap=disable_mmap).load("a")
    (tmp_path / "a.safetensors").write_bytes(b"\0" * os.path.getsize(tmp_path / "a.safetensors"))
    assert torch.equal(loaded, torch.ones(1000))


def test_tensors_at_odd_positions_are_read(tmp_path):
    """The format asks for no alignment of the header's end."""
    values = torch.randn(5)
    header = json.dumps({"x": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}).encode()
    header += b" " * ((3 - len(header)) % 8)
    (tmp_path / "odd.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + values.numpy().tobytes())
    assert read_header(tmp_path / "odd.safetensors").data_start % 8 == 3
    assert torch.equal(open_checkpoint(tmp_path / "odd.safetensors").load("x"), values)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises((RuntimeError, NotImplementedError)):
        save_file({"a": torch.ones(3), "b": torch.empty(3, device="meta")}, tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_new_files_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


# Damaged and foreign files


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, 10_000))
def test_a_truncated_file_is_named_with_its_sizes(tmp_path_factory, length):
    folder = tmp_path_factory.mktemp("truncated")
    save_file({"a": torch.ones(20, 30), "b": torch.ones(7)}, folder / "whole.safetensors")
    data = (folder / "whole.safetensors").read_bytes()
    cut = data[: length % len(data)]
    (folder / "cut.safetensors").write_bytes(cut)
    with pytest.raises(UserError) as error:
        read_header(folder / "cut.safetensors")
    assert "cut.safetensors" in str(error.value) and f"{len(cut):,}" in str(error.value)


@settings(max_examples=100, deadline=None)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_damaged_header_never_ends_in_another_error(tmp_path_factory, position, value):
    folder = tmp_path_factory.mktemp("damaged")
    save_file({"a": torch.ones(2, 3)}, folder / "a.safetensors", {"k": "v"})
    data = bytearray((folder / "a.safetensors").read_bytes())
    data[position % read_header(folder / "a.safetensors").data_start] = value
    (folder / "a.safetensors").write_bytes(data)
    try:
        header = read_header(folder / "a.safetensors")
    except UserError as error:
        assert "a.safetensors" in str(error)
    else:
        assert isinstance(header.tensors, dict)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF\x03\x00\x00\x00" + b"\0" * 60, "GGUF"),
        (b"PK\x03\x04" + b"\0" * 60, "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc", "Git LFS pointer"),
        (b"<!doctype html><html>Sign in</html>", "web page"),
        (b"", "0 bytes"),
        (b"\xff" * 100, "not a safetensors file"),
    ],
)
def test_files_of_another_format_are_named(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path / "model.safetensors")


def test_trailing_bytes_are_damage(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with open(tmp_path / "a.safetensors", "ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match="damaged"):
        read_header(tmp_path / "a.safetensors")


def test_a_number_format_that_torch_does_not_have_is_named(tmp_path):
    header = json.dumps({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0")
    with pytest.raises(UserError, match="F4"):
        open_checkpoint(tmp_path / "a.safetensors").load("x")


def test_a_missing_file_is_named_with_its_option_and_the_nearest_name(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "clip_l.safetensors")
    with pytest.raises(UserError, match=r'^--clip_l: .*clip_1\.safetensors does not exist\..*"clip_l\.safetensors"'):
        open_checkpoint(tmp_path / "clip_1.safetensors", option="--clip_l")


# Shards and folders


def write_shards(folder: Path, count: int = 3) -> dict[str, torch.Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    whole = {f"layer.{index}": torch.full((2,), float(index)) for index in range(count)}
    for index, (name, value) in enumerate(whole.items()):
        save_file({name: value}, folder / f"model-{index + 1:05d}-of-{count:05d}.safetensors")
    return whole


@pytest.mark.parametrize("named", ["sub", "", "sub/model-00002-of-00003.safetensors"])
@pytest.mark.parametrize("indexed", [False, True])
def test_shards_are_one_checkpoint_however_they_are_named(tmp_path, named, indexed):
    whole = write_shards(tmp_path / "sub")
    if indexed:
        weight_map = {f"layer.{index}": f"model-{index + 1:05d}-of-00003.safetensors" for index in range(3)}
        index = tmp_path / "sub" / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
        assert open_checkpoint(index).keys() == whole.keys()
    checkpoint = open_checkpoint(tmp_path / named, "sub")
    assert checkpoint.keys() == whole.keys()
    assert all(torch.equal(checkpoint.load(name), value) for name, value in whole.items())


def test_missing_shards_are_listed(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"1 of 3 shards are missing: model-00002-of-00003\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_folder_of_several_models_is_not_guessed_at(tmp_path):
    for name in ("one", "two"):
        save_file({"a": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"one\.safetensors, two\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no safetensors file"):
        open_checkpoint(tmp_path / "empty")


# Pickled files


class Command:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_weights_are_read(tmp_path, legacy):
    content = {"state_dict": {"a": torch.ones(2, 3)}, "epoch": 4}
    torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(tmp_path / "model.ckpt")
    assert list(checkpoint) == ["a"] and checkpoint.shape("a") == (2, 3)
    assert torch.equal(checkpoint.load("a", torch.float16), torch.ones(2, 3).half())


def test_code_in_a_pickled_file_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "b": Command()}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="more than tensors"):
        open_checkpoint(tmp_path / "model.pt")
    assert not (tmp_path / "executed").exists()


def test_a_damaged_pickled_file_is_named(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"model\.ckpt"):
        open_checkpoint(tmp_path / "model.ckpt")


# Hashes


def test_hashes_are_those_of_the_bytes_that_the_safetensors_library_writes(tmp_path):
    big = {"a": torch.randn(300, 1000), "b": torch.randn(10)}
    metadata = {"ss_seed": "1", "ss_network_dim": "4", "modelspec.title": "left out", "sshs_model_hash": "left out"}
    whole, legacy = content_hashes(big, metadata)
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    theirs = safetensors.torch.save(big, kept)
    assert whole == hashlib.sha256(theirs[8 + struct.unpack("<Q", theirs[:8])[0] :]).hexdigest()
    assert legacy == hashlib.sha256(theirs[0x100000:0x110000]).hexdigest()[:8]
    save_file(big, tmp_path / "a.safetensors", metadata)
    data = (tmp_path / "a.safetensors").read_bytes()
    assert model_hash(tmp_path / "a.safetensors") == whole
    assert file_hash(tmp_path / "a.safetensors") == hashlib.sha256(data).hexdigest()
    assert legacy_hash(tmp_path / "a.safetensors") == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]


def test_hashes_of_small_files_and_of_no_file(tmp_path):
    assert content_hashes({"a": torch.ones(2)}, {})[1] == "e3b0c442"
    assert legacy_hash(tmp_path / "missing") == file_hash(tmp_path / "missing") == "NOFILE"
    assert legacy_hash(tmp_path) == file_hash(tmp_path) == "IsADirectory"


def test_small_files_load_whole(tmp_path):
    save_file(tensors(), tmp_path / "lora.safetensors", METADATA)
    loaded, metadata = load_tensors(tmp_path / "lora.safetensors")
    assert metadata == METADATA and all(same(loaded[name], value) for name, value in tensors().items())
