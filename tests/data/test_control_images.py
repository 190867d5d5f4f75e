"""Control images of a ControlNet: in the place of masks, for subsets of every kind, in place with their images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.data.build import build_dataset_groups
from library.data.contact_sheet import write_contact_sheet
from library.data.options import DatasetOptions
from library.errors import UserError

HEAD = "resolution = 64\nenable_bucket = true\nmin_bucket_reso = 32\nbucket_reso_steps = 32\n[[datasets]]\n"


@pytest.fixture
def folders(tmp_path):
    """Images and their control images, the latter twice as large."""
    for number, size in enumerate([(64, 64), (96, 48), (96, 48)]):
        image = Image.effect_noise(size, 90).convert("RGB").resize(size)
        for name, factor in (("images", 1), ("control", 2)):
            (tmp_path / name).mkdir(exist_ok=True)
            large = image.resize((size[0] * factor, size[1] * factor), Image.Resampling.NEAREST)
            large.save(tmp_path / name / f"{number}.png")
    return tmp_path


def build(folder: Path, text: str, **options):
    path = folder / "set.toml"
    path.write_text(HEAD + text, encoding="utf-8")
    given = DatasetOptions(dataset_config=str(path), **options)
    return build_dataset_groups(given, bucket_divisor=32, control_images=True)


def subset(folder: Path, name: str = "images", control: str | None = "control", more: str = "") -> str:
    lines = ["[[datasets.subsets]]", f"image_dir = '{(folder / name).as_posix()}'", more]
    if control:
        lines.append(f"conditioning_data_dir = '{(folder / control).as_posix()}'")
    return "\n".join(lines) + "\n"


def first_batches(group):
    return [group.load(plan, epoch=1, step=0, max_train_steps=9, seed=1) for plan in group.plan(1, 1)]


def test_they_are_cut_and_mirrored_with_their_images_without_masked_loss(folders):
    more = "flip_aug = true\nrandom_crop = true\nnum_repeats = 4\nresize_interpolation = 'nearest'"
    group, _ = build(folders, subset(folders, more=more))
    batches = first_batches(group)
    assert {flip for batch in batches for flip in batch.flipped} == {True, False}
    for batch in batches:
        assert batch.images.shape == batch.conditioning_images.shape
        assert torch.equal(batch.images, batch.conditioning_images)


def test_subsets_keep_their_kind(folders):
    """Regularisation images with their weight, class tokens, transparency, metadata files."""
    text = subset(folders, more="class_tokens = 'cat'\nalpha_mask = true")
    for name in ("reg", "reg_control"):
        (folders / name).mkdir()
        Image.new("RGB", (64, 64)).save(folders / name / "r.png")
    group, _ = build(folders, text + subset(folders, "reg", "reg_control", "is_reg = true"), prior_loss_weight=0.5)
    (dataset,) = group.datasets
    assert dataset.settings.kind == "dreambooth" and group.reg_image_count == 1
    batches = first_batches(group)
    assert {weight for batch in batches for weight in batch.loss_weights.tolist()} == {0.5, 1.0}
    assert "cat" in {caption for batch in batches for caption in batch.captions}
    assert all(batch.conditioning_images is not None for batch in batches)
    metadata = folders / "meta.json"
    metadata.write_text(json.dumps({f"{n}.png": {"caption": "x"} for n in range(3)}), encoding="utf-8")
    group, _ = build(folders, subset(folders, more=f"metadata_file = '{metadata.as_posix()}'"))
    assert group.datasets[0].settings.kind == "fine_tuning"
    assert all(item.conditioning.parent.name == "control" for item in group.items)


def test_the_validation_part_has_them_too(folders):
    train, validation = build(folders, subset(folders, more="validation_split = 0.34"))
    assert (len(train.items), len(validation.items)) == (2, 1)
    (batch,) = first_batches(validation)
    assert batch.conditioning_images is not None


def test_the_contact_sheet_calls_them_what_they_are(folders):
    group, _ = build(folders, subset(folders))
    page = folders / "sheet.html"
    write_contact_sheet(group, page, seed=1, max_train_steps=1)
    text = page.read_text(encoding="utf-8")
    assert '"control image"' in text and '"loss mask"' not in text


def test_a_subset_without_them_is_named(folders):
    with pytest.raises(
        UserError, match=r"set\.toml: \[\[datasets\]\] number 1, \[\[datasets.subsets\]\] number 2: cond"
    ):
        build(folders, subset(folders) + subset(folders, control=None))


def test_images_and_control_images_must_match(folders):
    Image.new("RGB", (64, 32)).save(folders / "control" / "0.png")
    with pytest.raises(UserError, match=r"aspect ratio of their images:\n +0\.png is 64x32, its image 64x64"):
        build(folders, subset(folders))
    (folders / "control" / "0.png").rename(folders / "control" / "9.png")
    with pytest.raises(UserError, match=r"1 images have no counterpart in (.|\n)*1 images in .* belong to no"):
        build(folders, subset(folders))
