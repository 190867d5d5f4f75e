"""Cache files that are damaged, wrong or malicious are made again; one that is trusted is named when it is read."""

from __future__ import annotations

import io
import os
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from library.data.build import build_dataset_groups
from library.data.cache import LatentCache, LatentFormat, TextCache, TextFormat
from library.data.cache_base import Cache
from library.data.options import CacheOptions, DatasetOptions
from library.errors import UserError
from tests.faults.corpus import (
    archive,
    bomb,
    decayed_archives,
    encoded,
    hostile_archives,
    hostile_arrays,
    members_of,
    npy_file,
)
from tests.running import run_in_process

LATENTS = LatentFormat("_flux.npz", channels=16)
TEXT = TextFormat("_te.npz", {"hidden": (3, 8), "pooled": (8,)}, {"flag": True})
SECONDS = 2.0


class Caches:
    """One image with its cache files, and what reads them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "a.png").write_bytes(encoded("PNG", size=(64, 64)))
        (folder / "a.txt").write_text("a cat", encoding="utf-8")
        self.folder = folder
        (folder / "d.toml").write_text(
            f"[general]\nresolution = 64\ncaption_extension = '.txt'\n[[datasets]]\n[[datasets.subsets]]\n"
            f"image_dir = '{folder.as_posix()}'\n",
            encoding="utf-8",
        )
        options = DatasetOptions(dataset_config=str(folder / "d.toml"))
        group, _ = build_dataset_groups(options, bucket_divisor=16, cache=CacheOptions(cache_latents_to_disk=True))
        assert group is not None
        self.group = group

    def latents(self, **arguments: Any) -> LatentCache:
        return LatentCache(self.group, LATENTS, to_disk=True, identity="ae", **arguments)

    def text(self, **arguments: Any) -> TextCache:
        return TextCache(self.group, TEXT, to_disk=True, identity="te", **arguments)

    def make(self) -> None:
        self.latents().fill(lambda pixels, generators: torch.full((len(pixels), 16, 8, 8), 0.5))
        self.text().fill(lambda captions: {"hidden": torch.ones(len(captions), 3, 8), "pooled": torch.ones(1, 8)})

    @property
    def latent_file(self) -> Path:
        return self.folder / "a_0064x0064_flux.npz"

    @property
    def text_file(self) -> Path:
        return self.folder / "a_te.npz"


@pytest.fixture
def caches(tmp_path) -> Caches:
    made = Caches(tmp_path / "images")
    made.make()
    return made


Kind = tuple[Path, Callable[..., Cache], Callable[[], object], str, tuple[int, ...]]


def kinds(caches: Caches) -> Iterator[Kind]:
    """Each cache: its file, what opens it, what reads the entry, an array of it with its shape."""
    item = caches.group.items[0]
    yield caches.latent_file, caches.latents, lambda: item.latents.read(flipped=False), "latents_8x8", (16, 8, 8)
    yield caches.text_file, caches.text, lambda: item.text.read(), "hidden", (3, 8)


def assert_made_again(caches: Caches, kind: Kind, data: bytes, what: str, trusted: bool = True) -> None:
    path, open_cache, read, *_ = kind
    sound = members_of(path.read_bytes())
    path.write_bytes(data)
    started = time.monotonic()
    assert open_cache().missing == 1, f"{path.name}: {what} counts as valid"
    if trusted:
        open_cache(skip_check=True)
        with pytest.raises(UserError) as error:
            read()
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value), what
    caches.make()
    assert time.monotonic() - started < SECONDS, what
    assert members_of(path.read_bytes()) == sound, f"{what} leaves something behind"


def test_arrays_that_are_none_are_made_again_and_run_no_code(caches, tmp_path):
    touched = tmp_path / "touched"
    for kind in kinds(caches):
        path, *_, name, shape = kind
        sound = members_of(path.read_bytes())
        for what, array in hostile_arrays(shape, touched).items():
            for members in (sound | {f"{name}.npy": array}, members_without_identity(sound) | {f"{name}.npy": array}):
                assert_made_again(caches, kind, archive(members), what, trusted=what not in ("NaN", "infinity"))
    assert not touched.exists()


def members_without_identity(members: dict[str, bytes]) -> dict[str, bytes]:
    """As other programs write cache files."""
    return {name: data for name, data in members.items() if not name.startswith("identity")}


def test_damaged_archives_are_made_again(caches):
    for kind in kinds(caches):
        for what, data in hostile_archives(kind[0].read_bytes()).items():
            assert_made_again(caches, kind, data, what)


def test_bytes_that_changed_on_the_disk_are_found_when_they_are_read(caches):
    for path, open_cache, read, *_ in kinds(caches):
        for data in decayed_archives(path.read_bytes()):
            path.write_bytes(data)
            open_cache()
            with pytest.raises(UserError, match="the cache file is damaged .Bad CRC-32 for file"):
                read()


def test_small_files_that_unpack_to_much_are_made_again_at_once(caches):
    for kind in kinds(caches):
        path, *_, name, _shape = kind
        for start in (b"", members_of(path.read_bytes())[f"{name}.npy"], npy_file("'<f4'", f"({1 << 29},)")):
            data = bomb(f"{name}.npy", start, (1 << 31) + len(start))
            assert len(data) < 1 << 22 and zipfile.ZipFile(io.BytesIO(data)).namelist() == [f"{name}.npy"]
            assert_made_again(caches, kind, data, "a bomb")


def test_compressed_files_and_foreign_members_are_read_and_nothing_is_written_outside(caches, tmp_path):
    other = {"../../climbs.npy": b"no array", "/tmp/absolute.npy": b"no array"}
    for path, open_cache, read, name, _ in kinds(caches):
        sound = members_of(path.read_bytes())
        expected = numpy.load(path)[name]
        path.write_bytes(archive(sound, zipfile.ZIP_DEFLATED))
        assert open_cache().missing == 0
        path.write_bytes(archive(sound | other))
        open_cache(skip_check=True)
        read()
        assert numpy.array_equal(numpy.load(path)[name], expected)
        caches.make()
        assert open_cache().missing == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["images"]
    assert sorted(entry.suffix for entry in caches.folder.iterdir()) == [".npz", ".npz", ".png", ".toml", ".txt"]


def test_a_cache_that_is_no_file_is_named(caches):
    for path, open_cache, *_ in kinds(caches):
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(UserError, match=rf"{path.name} is not a regular file"):
            open_cache()
        path.unlink()
        path.mkdir()
        with pytest.raises(UserError, match=rf"{path.name}"):
            open_cache().fill(lambda *given: pytest.fail("encoded"))
        path.rmdir()
        caches.make()


def test_training_trusts_no_cache_that_it_was_told_to_trust(flux_command, dataset_toml, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(encoded("PNG", size=(64, 64)))
    given = [*flux_command, "--dataset_config", dataset_toml(folder, resolution=64), "--output_dir", tmp_path / "out"]
    given += ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--max_train_steps", 1, "--no_report"]
    given += ["--network_train_unet_only"]
    assert run_in_process("flux_train_network.py", *given).returncode == 0
    (latents,) = folder.glob("*_flux.npz")
    (text,) = folder.glob("*_flux_te.npz")
    for path, name, shape in ((latents, "latents_8x8", (16, 8, 8)), (text, "t5_out", (16, 64))):
        sound = members_of(path.read_bytes())
        for what, array in hostile_arrays(shape, tmp_path / "touched").items():
            if what in ("another shape", "text", "cut", "objects"):
                path.write_bytes(archive(sound | {f"{name}.npy": array}))
                result = run_in_process("flux_train_network.py", *given, "--skip_cache_check")
                assert result.returncode == 2 and f"error: {path}: the cache file is damaged" in result.stderr, what
        again = run_in_process("flux_train_network.py", *given)
        assert again.returncode == 0 and "1 rebuilt (1 stale)" in again.stderr, again.stderr[-3000:]
        assert members_of(path.read_bytes()) == sound
    assert not (tmp_path / "touched").exists()
