"""From folders to groups: what is found, what is refused, how it is split, repeated and described."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.data.build import _split, build_dataset_groups
from library.data.items import ImageRecord
from library.data.metadata import bucket_info, dataset_metadata
from library.data.options import CacheOptions, DatasetOptions
from library.data.settings import SubsetSettings
from library.data.summary import summarize
from library.errors import UserError


def keys(group):
    return [item.path.name for item in group.items]


def test_images_are_sorted_with_their_captions(tmp_path, build, folder_of, image):
    folder = folder_of(tmp_path / "a", [(64, 64)] * 3)
    image(folder / ".hidden.png", (64, 64))
    image(folder / "B.PNG", (64, 64))
    image(folder / "sub" / "deeper.png", (64, 64))
    (folder / "notes.md").write_text("x")
    (folder / "B.txt").write_text("capital")
    group, validation = build(folder)
    assert validation is None
    assert [(item.path.name, item.caption) for item in group.items] == [
        *((f"{i:02d}.png", f"subject {i}, tag a, tag b") for i in range(3)),
        ("B.PNG", "capital"),
    ]


def test_groups_are_built_without_importing_torch(tmp_path, folder_of):
    folder = folder_of(tmp_path / "5_a", [(64, 64)])
    code = (
        "import sys; from library.data.build import *; from library.data.options import *;"
        f"g, _ = build_dataset_groups(DatasetOptions(train_data_dir={str(folder.parent)!r}, resolution='64'),"
        "bucket_divisor=32); g.plan(1, 1); assert g.sample_count == 5;"
        "assert not {'torch', 'cv2', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=60)


def test_every_unreadable_image_is_listed_at_once(tmp_path, build, folder_of, image):
    folder = folder_of(tmp_path / "a", [(300, 200)] * 2)
    for extension in ("png", "jpg", "webp", "bmp"):
        whole = image(folder / f"cut.{extension}", (300, 200)).read_bytes()
        (folder / f"cut.{extension}").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("this is no image")
    other = folder_of(tmp_path / "b", [(64, 64)])
    (other / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError) as error:
        build([folder, other])
    message = str(error.value)
    assert message.startswith("7 of 10 images cannot be read")
    for name in ("cut.png", "cut.jpg", "cut.webp", "cut.bmp", "empty.png", "text.jpg", "bad.png"):
        assert name in message
    assert "00.png" not in message


def test_odd_but_readable_files_pass(tmp_path, build, buckets, image):
    folder = tmp_path / "a"
    for extension in ("png", "jpg", "webp", "bmp"):
        file = image(folder / f"tail.{extension}", (80, 64))
        file.write_bytes(file.read_bytes() + b"something an editor appended")
    rotated = Image.open(image(folder / "turned.jpg", (90, 60)))
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated.save(folder / "turned.jpg", exif=exif)
    group, _ = build(folder, general=buckets)
    sizes = {item.path.name: item.size for item in group.items}
    assert sizes["turned.jpg"] == (90, 60)
    assert {sizes[f"tail.{extension}"] for extension in ("png", "jpg", "webp", "bmp")} == {(80, 64)}


def test_avif_files_are_read_and_cut_ones_found(tmp_path, build, buckets, image):
    features = pytest.importorskip("PIL.features")
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    whole = image(tmp_path / "a" / "x.avif", (80, 64))
    group, _ = build(tmp_path / "a", general=buckets)
    assert group.items[0].size == (80, 64)
    whole.write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"x\.avif"):
        build(tmp_path / "a", general=buckets)


def test_missing_folder_and_no_images_are_errors(tmp_path, build):
    with pytest.raises(UserError, match=r"dataset\.toml: \[\[datasets\]\] number 1.*there is no folder"):
        build(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="There are no training images in .*empty"):
        build(tmp_path / "empty")


def test_an_empty_folder_beside_a_full_one_is_only_noted(tmp_path, build, folder_of):
    (tmp_path / "empty").mkdir()
    group, _ = build([tmp_path / "empty", folder_of(tmp_path / "a", [(64, 64)])])
    assert len(group.items) == 1 and "empty holds no images" in group.notes[0]


def test_missing_captions_are_listed_and_class_tokens_used(tmp_path, build, folder_of):
    folder = folder_of(tmp_path / "a", [(64, 64)] * 3)
    (folder / "01.txt").unlink()
    group, _ = build(folder, subset={"class_tokens": "sks cat"})
    assert [item.caption for item in group.items][1] == "sks cat"
    assert "1 of 3 images have no .txt file" in group.notes[0] and "01.png" in group.notes[0]
    group, _ = build(folder, general={"caption_extension": ".caption"})
    assert [item.caption for item in group.items] == ["", "", ""]
    assert 'did you mean caption_extension = ".txt"?' in group.notes[0]


def test_all_bad_captions_are_told(tmp_path, build, folder_of):
    folder = folder_of(tmp_path / "a", [(64, 64)] * 3)
    (folder / "00.txt").write_bytes(b"")
    (folder / "02.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError) as error:
        build(folder)
    assert "00.txt" in str(error.value) and "02.txt" in str(error.value)


@pytest.mark.parametrize(
    ("general", "part"),
    [
        ({"bucket_reso_steps": 12}, "bucket_reso_steps is 12, but must be a multiple of 8"),
        ({"min_bucket_reso": 96}, r"min_bucket_reso \(96\) must not be larger"),
        ({"max_bucket_reso": 48}, r"max_bucket_reso \(48\) must not be smaller"),
        ({"min_bucket_reso": 8}, "must not be larger than the smallest bucket side"),
    ],
)
def test_impossible_bucket_settings_are_refused(tmp_path, build, buckets, folder_of, general, part):
    with pytest.raises(UserError, match=part):
        build(folder_of(tmp_path / "a", [(64, 64)]), general=buckets | general)


def test_resolution_must_suit_the_model_even_without_buckets(tmp_path, build, folder_of):
    with pytest.raises(UserError, match="72x72 must be a multiple of 16"):
        build(folder_of(tmp_path / "a", [(72, 72)]), general={"resolution": 72}, size_divisor=16)


def test_images_too_small_for_a_bucket_are_named(tmp_path, build, buckets, folder_of):
    folder = folder_of(tmp_path / "a", [(64, 64), (10, 64), (64, 9)])
    with pytest.raises(UserError) as error:
        build(folder, general=buckets | {"bucket_no_upscale": True})
    assert "01.png: 10x64 pixels" in str(error.value) and "02.png: 64x9 pixels" in str(error.value)


def test_without_buckets_images_must_fit_unless_cropped_or_cached(tmp_path, build, folder_of, caching):
    folder = folder_of(tmp_path / "a", [(64, 64), (80, 64), (40, 90)])
    with pytest.raises(UserError) as error:
        build(folder)
    assert "01.png: 80x64 pixels is larger" in str(error.value)
    assert "02.png: 40x90 pixels is smaller" in str(error.value)
    assert len(build(folder, cache=caching)[0].items) == 3
    (folder / "02.png").unlink()
    assert len(build(folder, subset={"random_crop": True})[0].items) == 2


@pytest.mark.parametrize("option", ["color_aug", "random_crop", "rotate_aug", "brightness_aug", "contrast_aug"])
def test_random_pixels_cannot_be_cached(tmp_path, build, folder_of, caching, option):
    value = True if option in ("color_aug", "random_crop") else 0.1
    with pytest.raises(UserError, match=f"{option} cannot be used together with cached latents"):
        build(folder_of(tmp_path / "a", [(64, 64)]), subset={option: value}, cache=caching)


@pytest.mark.parametrize("option", ["rotate_aug = 46", "brightness_aug = 1", "contrast_aug = -0.1"])
def test_augmentations_beyond_their_range_are_refused(tmp_path, build, folder_of, option):
    name, _, value = option.partition(" = ")
    with pytest.raises(UserError, match=rf"{name} must be 0 .*not {value}\."):
        build(folder_of(tmp_path / "a", [(64, 64)]), subset={name: float(value)})


def test_face_crop_without_effect_is_said(tmp_path, build, buckets, folder_of, caplog):
    build(folder_of(tmp_path / "a", [(64, 64)]), general=buckets, subset={"face_crop_aug_range": [2, 4]})
    assert "face_crop_aug_range has no effect together with buckets" in caplog.text


def test_regularisation_images_fill_up_in_turns(tmp_path, build, folder_of):
    train = folder_of(tmp_path / "train", [(64, 64)] * 4)
    reg = folder_of(tmp_path / "reg", [(64, 64)] * 3)
    toml = f"""
    resolution = 64
    [[datasets]]
    [[datasets.subsets]]
    image_dir = '{train}'
    num_repeats = 2
    [[datasets.subsets]]
    image_dir = '{reg}'
    is_reg = true
    num_repeats = 2
    """
    group, _ = build(train, toml=toml, options=DatasetOptions(prior_loss_weight=0.25))
    dataset = group.datasets[0]
    used = {item.path.parent.name + item.path.name: count for item, count in zip(dataset.items, dataset.repeats)}
    assert used == {**{f"train{i:02d}.png": 2 for i in range(4)}, "reg00.png": 3, "reg01.png": 3, "reg02.png": 2}
    assert (group.train_image_count, group.reg_image_count) == (8, 6)
    assert {dataset.loss_weight(item) for item in dataset.items} == {1.0, 0.25}


def test_regularisation_images_beyond_need_are_listed(tmp_path, build, folder_of):
    train = folder_of(tmp_path / "train", [(64, 64)] * 2)
    reg = folder_of(tmp_path / "reg", [(64, 64)] * 4)
    toml = f"""
    resolution = 64
    [[datasets]]
    [[datasets.subsets]]
    image_dir = '{train}'
    [[datasets.subsets]]
    image_dir = '{reg}'
    is_reg = true
    """
    group, _ = build(train, toml=toml)
    assert group.sample_count == 4 and len(group.items) == 4 and group.reg_image_count == 4
    note = next(note for note in group.notes if "not used" in note)
    assert "2 regularisation images are not used" in note and "02.png" in note and "03.png" in note


@given(st.integers(0, 60), st.floats(0, 1), st.integers(0, 1000))
def test_split_parts_are_disjoint_complete_and_rounded(count, share, seed):
    records = [ImageRecord(Path(f"{i}.png"), "", "", (1, 1)) for i in range(count)]
    subset = SubsetSettings(place="", image_dir="x", validation_split=share)
    train, validation = _split(subset, records, seed)
    assert len(validation) == round(count * share)
    assert sorted(id(record) for record in train + validation) == sorted(id(record) for record in records)
    assert train == [record for record in records if record in train]


def test_split_takes_the_seed_of_the_subset_then_of_the_run(tmp_path, build, folder_of):
    folder = folder_of(tmp_path / "a", [(64, 64)] * 12)

    def parts(seed, **subset):
        group, validation = build(folder, general={"validation_split": 0.25, **subset}, seed=seed)
        assert sorted(keys(group) + keys(validation)) == [f"{i:02d}.png" for i in range(12)]
        return keys(validation)

    assert parts(1) == parts(1) and len(parts(1)) == 3
    assert len({tuple(parts(seed)) for seed in range(5)}) > 1
    assert parts(1, validation_seed=9) == parts(2, validation_seed=9)


def test_a_whole_dataset_can_be_validation_and_nothing_random_remains(tmp_path, build, folder_of):
    train, held = folder_of(tmp_path / "t", [(64, 64)] * 2), folder_of(tmp_path / "v", [(64, 64)] * 3)
    toml = f"""
    resolution = 64
    flip_aug = true
    shuffle_caption = true
    caption_dropout_rate = 0.5
    num_repeats = 4
    caption_extension = ".txt"
    [[datasets]]
      [[datasets.subsets]]
      image_dir = '{train}'
    [[datasets]]
    validation_split = 1.0
      [[datasets.subsets]]
      image_dir = '{held}'
    """
    group, validation = build(train, toml=toml)
    assert len(group.datasets) == 1 and group.sample_count == 8
    assert validation.sample_count == 3 and validation.train_image_count == 3
    subset = validation.items[0].subset
    assert not subset.flip_aug and not subset.captions.changing_options()
    orders = [[plan.samples for plan in validation.plan(epoch, seed)] for epoch, seed in ((0, 1), (5, 2))]
    assert orders[0] == orders[1] == [(0,), (1,), (2,)]


def test_the_documented_multi_resolution_file_builds(tmp_path, build, folder_of, documented):
    folder = folder_of(tmp_path / "a", [(64, 64), (96, 64), (64, 96)])
    group, validation = build(
        folder, toml=documented["multi_resolution"].replace("path/to/image/directory", str(folder))
    )
    assert validation is None and group.sample_count == 6
    assert [dataset.settings.batch_size for dataset in group.datasets] == [2, 3]
    first, second = (dataset.bucket_samples() for dataset in group.datasets)
    assert set(first) == {(1024, 1024), (1024, 704), (704, 1024)} or all(w * h <= 1024**2 for w, h in first)
    assert all(width * height <= 768**2 for width, height in second)
    assert all(item.subset.flip_aug and item.caption.startswith("subject") for item in group.items)


def test_the_documented_validation_file_builds(tmp_path, build, folder_of, documented):
    toml = documented["validation"]
    for number, name in enumerate(("full_validation", "second-directory", "directory")):
        folder = folder_of(tmp_path / f"f{number}", [(64, 64)] * 10, extension=".caption")
        toml = toml.replace(f"path/to/image/{name}", str(folder))
    group, validation = build(tmp_path, toml=toml, seed=1)
    counts = Counter(item.path.parent.name for item in group.items)
    held = Counter(item.path.parent.name for item in validation.items)
    assert counts == {"f2": 10, "f1": 9} and held == {"f1": 1, "f0": 10}
    other, _ = build(tmp_path, toml=toml, seed=2)
    assert [item.key for item in group.items] == [item.key for item in other.items]


def test_everything_as_validation_is_refused(tmp_path, build, folder_of):
    with pytest.raises(UserError, match="validation_split leaves all of them to validation"):
        build(folder_of(tmp_path / "a", [(64, 64)]), validation_split=1.0)


def test_command_line_folders(tmp_path, folder_of):
    folder_of(tmp_path / "train" / "3_sks cat", [(64, 64)] * 2, extension=".caption")
    folder_of(tmp_path / "reg" / "1_cat", [(64, 64)] * 2, extension=".none")
    options = DatasetOptions(
        train_data_dir=str(tmp_path / "train"), reg_data_dir=str(tmp_path / "reg"), resolution="64", train_batch_size=2
    )
    group, _ = build_dataset_groups(options, bucket_divisor=32)
    assert Counter(item.caption for item in group.items)["cat"] == 2
    assert group.train_image_count == 6 and group.sample_count == 12
    described = dataset_metadata(group, options, world_size=2)
    assert described["ss_total_batch_size"] == 4 and str(described["ss_resolution"]) == "(64, 64)"
    assert json.loads(described["ss_dataset_dirs"]) == {"3_sks cat": {"n_repeats": 3, "img_count": 2}}
    assert json.loads(described["ss_reg_dataset_dirs"]) == {"1_cat": {"n_repeats": 1, "img_count": 2}}
    assert described["ss_bucket_info"] == "null"


def test_command_line_metadata_file(tmp_path, image):
    image(tmp_path / "a.png", (64, 64))
    (tmp_path / "meta.json").write_text(json.dumps({"a.png": {"caption": "x", "tags": "t"}}))
    options = DatasetOptions(
        train_data_dir=str(tmp_path), in_json=str(tmp_path / "meta.json"), resolution="64", dataset_repeats=3
    )
    group, _ = build_dataset_groups(options, bucket_divisor=32)
    assert group.sample_count == 3 and group.items[0].caption == "x,t"
    described = dataset_metadata(group, options)
    assert json.loads(described["ss_dataset_dirs"]) == {"meta.json": {"n_repeats": 3, "img_count": 1}}


def test_metadata_of_configuration_runs(tmp_path, build, buckets, folder_of):
    folder = folder_of(tmp_path / "a", [(64, 64), (128, 32)], ["Cat, red", "cat, blue, cat"])
    toml = "\n".join(
        [*(f"{key} = {str(value).lower()}" for key, value in buckets.items()), "caption_extension = '.txt'"]
        + [f"[[datasets]]\nresolution = {side}\n[[datasets.subsets]]\nimage_dir = '{folder}'" for side in (64, 96)]
    )
    options = DatasetOptions()
    group, _ = build(folder, toml=toml, options=options)
    described = dataset_metadata(group, options)
    assert set(described) == {"ss_datasets", "ss_tag_frequency", "ss_dataset_dirs"}
    assert json.loads(described["ss_tag_frequency"]) == {"a": {"cat": 3, "red": 1, "blue": 1}}
    assert json.loads(described["ss_dataset_dirs"]) == {
        "a": {"n_repeats": 1, "img_count": 2},
        "a (2)": {"n_repeats": 1, "img_count": 2},
    }
    first = json.loads(described["ss_datasets"])[0]
    assert first["resolution"] == [64, 64] and first["is_dreambooth"] is True
    assert set(first) == {
        "is_dreambooth", "batch_size_per_device", "num_train_images", "num_reg_images", "resolution", "enable_bucket",
        "min_bucket_reso", "max_bucket_reso", "tag_frequency", "bucket_info", "resize_interpolation", "subsets",
    }  # fmt: skip
    assert set(first["subsets"][0]) == {
        "img_count", "num_repeats", "color_aug", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens",
        "keep_tokens_separator", "secondary_separator", "enable_wildcard", "caption_prefix", "caption_suffix",
        "resize_interpolation", "image_dir", "class_tokens", "is_reg",
    }  # fmt: skip
    counts = [entry["count"] for entry in first["bucket_info"]["buckets"].values()]
    assert counts == [1, 1] and bucket_info(group.datasets[0])["mean_img_ar_error"] >= 0


def test_the_summary_tells_images_buckets_repeats_and_batches(tmp_path, build, buckets, folder_of):
    folder = folder_of(tmp_path / "a", [(64, 64), (64, 64), (128, 32)])
    (folder / "01.txt").unlink()
    group, _ = build(folder, general=buckets | {"batch_size": 2}, subset={"num_repeats": 3})
    text = summarize(group, world_size=2)
    for part in ("3 images, 9 per epoch", "3 images x 3 repeats", "2 buckets", "64x64: 6", "01.png"):
        assert part in text
    assert f"batches per epoch per process: {group.batches_per_epoch(2)}" in text


def test_one_folder_in_two_datasets_is_looked_at_once(tmp_path, build, folder_of, monkeypatch):
    folder = folder_of(tmp_path / "a", [(64, 64)] * 3)
    probed = []
    import library.data.image_check as image_check

    original = image_check.look_at
    monkeypatch.setattr(image_check, "look_at", lambda path, budget: (probed.append(path), original(path, budget))[1])
    dataset = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{folder}'\n"
    group, _ = build(folder, toml=dataset * 2)
    assert len(group.datasets) == 2 and len(probed) == 3


class TestMetadataFiles:
    """Fine-tuning datasets: images and captions from a JSON file."""

    @pytest.fixture
    def write(self, tmp_path):
        def make(data, name="meta.json", **subset):
            file = tmp_path / name
            file.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
            lines = [f"{key} = {json.dumps(value)}" for key, value in subset.items()]
            head = "[[datasets]]\nresolution = 64\nenable_bucket = true\nbucket_reso_steps = 16\n"
            head += "min_bucket_reso = 32\nmax_bucket_reso = 128\n"
            return head + "\n".join([f"[[datasets.subsets]]\nmetadata_file = '{file}'", *lines])

        return make

    def test_captions_join_with_tags_and_keys_sort_longest_first(self, tmp_path, build, image, write):
        image(tmp_path / "a.png", (64, 64))
        image(tmp_path / "longer.jpg", (64, 64))
        image(tmp_path / "x" / "c.webp", (64, 64))
        data = {
            "a.png": {"caption": "one", "tags": "red, blue"},
            "longer": {"caption": "two"},
            str(tmp_path / "x" / "c.webp"): {"tags": "green"},
        }
        group, _ = build(tmp_path, toml=write(data, image_dir=str(tmp_path)))
        found = [(item.path.name, item.caption) for item in group.items]
        assert found == [("c.webp", "green"), ("longer.jpg", "two"), ("a.png", "one,red, blue")]
        described = json.loads(dataset_metadata(group, DatasetOptions(dataset_config="x"))["ss_tag_frequency"])
        assert described == {"meta.json": {"red": 1, "blue": 1, "green": 1}}

    def test_json_lines_and_wildcard_tags(self, tmp_path, build, image, write):
        image(tmp_path / "a.png", (64, 64))
        line = json.dumps({"image_path": "a.png", "caption": "one\n\ntwo", "tags": "r\nb", "image_size": [64, 64]})
        toml = write(line + "\n\n", "m.jsonl", image_dir=str(tmp_path), enable_wildcard=True)
        group, _ = build(tmp_path, toml=toml)
        assert group.items[0].caption == "one,r,b\ntwo,r,b"

    def test_an_image_of_which_only_the_cache_is_left(self, tmp_path, build, write):
        (tmp_path / "gone_0128x0064_flux.npz").write_bytes(b"")
        toml = write({"gone": {"caption": "x"}}, image_dir=str(tmp_path))
        with pytest.raises(UserError, match="there is no such image, only a cache file"):
            build(tmp_path, toml=toml)
        group, _ = build(tmp_path, toml=toml, cache=CacheOptions(cache_latents_to_disk=True))
        assert group.items[0].size == (128, 64) and not group.items[0].exists

    def test_split_works_for_metadata_too(self, tmp_path, build, image, write):
        data = {image(tmp_path / f"{i}.png", (64, 64)).name: {"caption": "x"} for i in range(5)}
        group, validation = build(tmp_path, toml=write(data, image_dir=str(tmp_path)), validation_split=0.4)
        assert len(keys(validation)) == 2 and sorted(keys(group) + keys(validation)) == sorted(data)

    @pytest.mark.parametrize(
        ("data", "subset", "part"),
        [
            ({"none.png": {"caption": "x"}}, True, "1 of 1 images cannot be found"),
            ({"a.png": {"caption": "x"}}, False, "image_dir is missing"),
            ({"a.png": "x"}, True, "must be an object"),
            ({"a.png": {"caption": 3}}, True, '"caption" of a.png must be a string'),
            ({"a.png": {"image_size": [1]}}, True, "must be .width, height."),
            ("{", True, "not valid JSON"),
            ({}, True, "there is no image in this metadata file"),
        ],
    )
    def test_wrong_metadata_is_refused(self, tmp_path, build, write, data, subset, part):
        toml = write(data, **({"image_dir": str(tmp_path)} if subset else {}))
        with pytest.raises(UserError, match=part):
            build(tmp_path, toml=toml)

    def test_wrong_lines_are_numbered(self, tmp_path, build, write):
        with pytest.raises(UserError, match="line 2"):
            build(tmp_path, toml=write('{"image_path": "a"}\n{}', "m.jsonl", image_dir=str(tmp_path)))


class TestMaskFolders:
    """Masked loss: a mask image for each training image."""

    def test_masks_are_matched_by_name(self, tmp_path, build, folder_of, image):
        folder = folder_of(tmp_path / "a", [(64, 64)] * 2)
        masks = tmp_path / "m"
        image(masks / "00.jpg", (64, 64))
        image(masks / "01.png", (128, 128))
        subset = {"conditioning_data_dir": masks}
        group, _ = build(folder, subset=subset, options=DatasetOptions(masked_loss=True))
        assert [item.conditioning.name for item in group.items] == ["00.jpg", "01.png"]

    def test_missing_extra_and_misshapen_masks_are_listed(self, tmp_path, build, folder_of, image):
        folder = folder_of(tmp_path / "a", [(64, 64)] * 2)
        masks = tmp_path / "m"
        image(masks / "00.png", (64, 64))
        image(masks / "other.png", (64, 64))
        subset = {"conditioning_data_dir": masks}
        with pytest.raises(UserError) as error:
            build(folder, subset=subset, options=DatasetOptions(masked_loss=True))
        assert "01.png" in str(error.value) and "other.png" in str(error.value)
        os.rename(masks / "other.png", masks / "01.png")
        image(masks / "00.png", (64, 32))
        with pytest.raises(UserError, match=r"00\.png is 64x32, its image 64x64"):
            build(folder, subset=subset, options=DatasetOptions(masked_loss=True))


class TestImageInfoCache:
    """``cache_info``: metadata_cache.json."""

    @pytest.fixture
    def folder(self, tmp_path, folder_of):
        folder = folder_of(tmp_path / "a", [(64, 64), (80, 64), (64, 96)])
        for file in folder.iterdir():
            os.utime(file, (1_000_000, 1_000_000))
        return folder

    @pytest.fixture
    def load(self, build, buckets, folder, monkeypatch):
        """Build the group; gives (size, caption) by name and the names of the files that were opened."""
        import library.data.image_check as image_check

        original = image_check.look_at

        def make(**general):
            opened = []
            look = lambda path, budget: (opened.append(path.name), original(path, budget))[1]  # noqa: E731
            monkeypatch.setattr(image_check, "look_at", look)
            group, validation = build(folder, general=buckets | {"cache_info": True} | general)
            items = group.items + (validation.items if validation else [])
            return {item.path.name: (item.size, item.caption) for item in items}, sorted(opened)

        return make

    def test_all_images_are_kept_before_the_split_and_not_opened_again(self, folder, load):
        first, opened = load(validation_split=0.34)
        assert len(opened) == 3 and len(first) == 3
        written = json.loads((folder / "metadata_cache.json").read_text(encoding="utf-8"))
        assert {Path(key).name: value["resolution"] for key, value in written.items()} == {
            "00.png": [64, 64],
            "01.png": [80, 64],
            "02.png": [64, 96],
        }
        assert load(validation_split=0.34) == (first, [])

    def test_changes_are_seen(self, folder, load, image):
        load()
        (folder / "00.txt").write_text("new caption")
        image(folder / "03.png", (64, 64))
        (folder / "01.png").unlink()
        found, opened = load()
        assert found["00.png"][1] == "new caption" and "01.png" not in found
        assert opened == ["00.png", "03.png"]
        assert load()[0] == found

    def test_a_file_of_the_other_program_is_used(self, folder, load):
        entries = {f"elsewhere/{i:02d}.png": {"caption": f"c{i}", "resolution": [64, 64]} for i in range(3)}
        (folder / "metadata_cache.json").write_text(json.dumps(entries))
        found, opened = load()
        assert opened == [] and found["01.png"] == ((64, 64), "c1")

    def test_other_caption_options_or_damage_read_again(self, folder, load, caplog):
        load()
        assert len(load(enable_wildcard=True)[1]) == 3
        (folder / "metadata_cache.json").write_text("{")
        assert load()[1] == ["00.png", "01.png", "02.png"]
        assert "is rebuilt" in caplog.text


def test_captions_of_which_less_is_trained_than_stands_in_the_file_are_counted_and_named(build, folder_of, tmp_path):
    captions = ["plain\n", "\nsecond line only", "  \n", "one\ntwo\nthree", "a\r\n\r\n", "first\nsecond"]
    folder = folder_of(tmp_path / "a", [(64, 64)] * 6, captions=captions)
    group, _ = build(folder)
    assert [item.caption for item in group.items] == ["plain", "", "", "one", "a", "first"]
    notes = "\n".join(group.notes)
    assert "2 caption files have a blank first line (01.txt, 02.txt): trained without a caption." in notes
    assert "3 caption files have more than one line (01.txt, 03.txt, 05.txt): only the first is used" in notes
    group, _ = build(folder, general={"trigger_word": "zog"})
    assert '(01.txt, 02.txt): trained with the trigger word "zog".' in "\n".join(group.notes)
    group, _ = build(folder, general={"trigger_word": "zog", "caption_extension": ".cap"})
    assert 'has a .cap file; they are trained with the trigger word "zog".' in "\n".join(group.notes)
    group, _ = build(folder, general={"enable_wildcard": True})
    assert group.items[1].caption == "second line only" and "more than one line" not in "\n".join(group.notes)
    assert "1 caption file has nothing but blank lines (02.txt)" in "\n".join(group.notes)


def test_images_that_are_not_trained_are_counted_and_named(build, folder_of, tmp_path):
    folder = folder_of(tmp_path / "a", [(64, 64)])
    for name in ("b.Png", "c.jfif", "d.tif", "e.GIF", ".hidden.Png", "notes.md", "00.npz"):
        (folder / name).touch()
    folder_of(folder / "below" / "deeper", [(64, 64)] * 2)
    folder_of(folder / ".hidden", [(64, 64)])
    group, _ = build(folder)
    notes = "\n".join(group.notes)
    assert [item.path.name for item in group.items] == ["00.png"]
    assert "4 images are left out (b.Png, c.jfif, d.tif, ...): the extensions that are read are" in notes
    assert "2 images in folders below it are left out (below/deeper/00.png, below/deeper/01.png)" in notes


@pytest.mark.parametrize("size", [[0, 0], [64, -1], [64], [64.0, 64], [True, 64], [10**12, 64], "64x64", {"w": 64}])
def test_sizes_in_metadata_that_no_image_has_are_refused(build, folder_of, tmp_path, size):
    folder = folder_of(tmp_path / "a", [(64, 64)])
    (tmp_path / "m.json").write_text(json.dumps({"00": {"caption": "a", "image_size": size}}), encoding="utf-8")
    toml = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{folder}'\n"
    with pytest.raises(UserError, match=r'm.json: "image_size" of 00 must be \[width, height\]'):
        build(folder, toml=f"{toml}metadata_file = '{tmp_path / 'm.json'}'\n")


def test_no_repeats_anywhere_is_one_sentence(build, folder_of, tmp_path):
    folder = folder_of(tmp_path / "a", [(64, 64)])
    with pytest.raises(UserError, match="every subset is left out; set num_repeats to at least 1"):
        build(folder, subset={"num_repeats": 0})
