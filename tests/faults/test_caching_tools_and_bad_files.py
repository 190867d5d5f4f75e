"""The caching tools of every family name all bad images and captions, and cache whatever can be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from library import families
from tests.families.families import TINY
from tests.faults.corpus import broken_captions, broken_images, encoded, odd_captions, odd_images, odd_shapes, written
from tests.running import no_weights_are_read, run_in_process

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
ORDINARY = ("lumina", "hunyuan_image")
MODELS = [pytest.param(name, id=name, marks=[] if name in ORDINARY else [pytest.mark.thorough]) for name in TINY]


@pytest.fixture
def cache(request, dataset_toml):
    """Run a caching tool of a model over a folder of images."""

    def run(tool: str, model: str, folder: Path, *more: object):
        files = request.getfixturevalue(f"{'few_blocks' if model.startswith('sd') else 'tiny'}_{model}")
        switches = [f"--{name}" for name, family in families.switches().items() if model in family.model_names]
        dataset = dataset_toml(folder, resolution=64, bucket_reso_steps=64, max_bucket_reso=128, batch_size=4)
        given = [*switches, *TINY[model].command(files), "--dataset_config", dataset]
        return run_in_process(f"tools/{tool}.py", *given, *more)

    return run


def with_captions(captions: dict[str, bytes], folder: Path) -> Path:
    """A small image for each caption."""
    written({f"{name}.png": encoded("PNG", size=(64, 64)) for name in captions}, folder)
    for name, data in captions.items():
        (folder / f"{name}.txt").write_bytes(data)
    return folder


@pytest.mark.parametrize("tool", ["cache_latents", "cache_text_encoder_outputs"])
@pytest.mark.parametrize("model", MODELS)
def test_all_that_cannot_be_read_is_named_before_a_model_is(cache, tmp_path, model, tool):
    written(broken_images(), tmp_path / "images")
    with_captions(broken_captions(), tmp_path / "captions")
    with no_weights_are_read():
        done = cache(tool, model, tmp_path / "images")
        assert done.returncode == 2 and " images cannot be read:\n" in done.stderr, done.stderr[-2000:]
        done = cache(tool, model, tmp_path / "captions")
    _, _, said = done.stderr.partition("error: ")
    assert done.returncode == 2 and len(said.splitlines()) == len(broken_captions()), done.stderr[-2000:]
    assert all(f"{tmp_path / 'captions' / name}.txt: " in said for name in broken_captions())
    assert not list(tmp_path.rglob("*.npz"))


@pytest.mark.thorough
@pytest.mark.parametrize("model", TINY)
def test_whatever_can_be_read_is_cached(cache, tmp_path, model):
    latents, texts = TINY[model].caches
    images = written(odd_images() | odd_shapes(), tmp_path / "images")
    captions = with_captions(odd_captions(), tmp_path / "captions")
    done = cache("cache_latents", model, tmp_path / "images", "--cache_latents_to_disk")
    assert done.returncode == 0, done.stderr[-3000:]
    done = cache("cache_text_encoder_outputs", model, captions, "--cache_text_encoder_outputs_to_disk")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "images").glob(f"*{latents}"))) == len(images)
    assert len(list(captions.glob(f"*{texts}"))) == len(odd_captions())
