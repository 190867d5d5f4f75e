"""Batches hold the right pixels, masks, captions and weights, whatever loads them and from wherever one starts."""

import dataclasses
import threading
import time
from collections import Counter

import numpy
import pytest
import torch
from PIL import Image

from library.data.batch import stack_masks, stack_text
from library.data.buckets import crop_rectangle
from library.data.debug import show_dataset
from library.data.loader import BatchLoader, prefetch
from library.data.options import DatasetOptions
from library.errors import UserError


def equal(left, right):
    """Whether two batches are the same to the bit."""
    for entry in dataclasses.fields(left):
        a, b = getattr(left, entry.name), getattr(right, entry.name)
        if isinstance(a, torch.Tensor):
            if not torch.equal(a, b):
                return False
        elif isinstance(a, dict):
            if any(not torch.equal(a[name], b[name]) for name in a):
                return False
        elif a != b:
            return False
    return True


def load(group, plan, **changed):
    return group.load(plan, **({"epoch": 1, "step": 0, "max_train_steps": 10, "seed": 5} | changed))


@pytest.fixture
def varied(tmp_path, build, buckets, folder_of):
    """A group in which everything random is on."""
    folder = folder_of(tmp_path / "a", [(64, 64), (100, 60), (60, 100), (70, 64), (64, 80), (90, 90), (130, 40)])
    subset = {
        "flip_aug": True,
        "color_aug": True,
        "random_crop": True,
        "shuffle_caption": True,
        "caption_dropout_rate": 0.3,
        "token_warmup_step": 5,
        "num_repeats": 2,
    }
    return build(folder, general=buckets | {"batch_size": 2}, subset=subset)[0]


def run(group, workers, *, start=0, epoch=1):
    with BatchLoader(group, workers=workers) as loader:
        plans = group.plan(epoch, 5)
        batches = loader.batches(
            plans, epoch=epoch, seed=5, max_train_steps=20, step_of=lambda index: index // 2, start=start
        )
        return list(batches)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_worker_count_changes_nothing(varied, workers, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    alone, together = run(varied, 0), run(varied, workers)
    assert [index for index, _ in together] == list(range(len(alone)))
    assert all(equal(a, b) for (_, a), (_, b) in zip(alone, together))


def test_starting_in_the_middle_gives_the_same_rest(varied):
    whole, rest = run(varied, 0), run(varied, 2, start=3)
    assert [index for index, _ in rest] == [index for index, _ in whole[3:]]
    assert all(equal(a, b) for (_, a), (_, b) in zip(whole[3:], rest))


def test_an_epoch_trains_each_image_as_often_as_its_repeats_say(varied):
    for epoch in (1, 2):
        counts = Counter(key for _, batch in run(varied, 0, epoch=epoch) for key in batch.image_keys)
        assert counts == {item.key: 2 for item in varied.items}


def test_random_draws_differ_between_epochs_and_repeats(varied):
    draws = {}
    for epoch in range(1, 9):
        for _, batch in run(varied, 0, epoch=epoch):
            for row, item in enumerate(batch.item_ids):
                draws[epoch, item] = (batch.flipped[row], batch.captions[row], batch.images[row].sum().item())
    flips = [flipped for flipped, _, _ in draws.values()]
    assert 0.3 < sum(flips) / len(flips) < 0.7
    assert 0.1 < sum(caption == "" for _, caption, _ in draws.values()) / len(draws) < 0.5
    assert len({draws[epoch, 0] for epoch in range(1, 9)}) > 4
    assert any(draws[epoch, 0] != draws[epoch, 1] for epoch in range(1, 9))


def test_pixels_are_resized_and_cropped_at_the_centre(tmp_path, build, buckets, image):
    image(tmp_path / "a" / "x.png", (100, 64))
    group, _ = build(tmp_path / "a", general=buckets | {"bucket_no_upscale": True, "resolution": 128})
    batch = load(group, group.plan(1, 1)[0])
    array = numpy.asarray(Image.open(tmp_path / "a" / "x.png").convert("RGB"))
    expected = torch.from_numpy(array[:, 2:98].transpose(2, 0, 1) / 127.5 - 1).float()
    assert batch.images.shape == (1, 3, 64, 96) and torch.allclose(batch.images[0], expected, atol=1e-6)
    assert batch.original_sizes == [(64, 100)] and batch.target_sizes == [(64, 96)]
    assert batch.images.dtype == torch.float32 and batch.latents is None and batch.text is None


def test_mirroring_moves_pixels_and_crop_together(tmp_path, build, buckets, image):
    image(tmp_path / "a" / "x.png", (200, 30))
    group, _ = build(tmp_path / "a", general=buckets, subset={"flip_aug": True})
    plan = group.plan(1, 1)[0]
    seen = {}
    for epoch in range(1, 30):
        batch = load(group, plan, epoch=epoch)
        seen[batch.flipped[0]] = batch
    assert torch.equal(seen[True].images, seen[False].images.flip(3))
    rectangle = crop_rectangle(plan.bucket, (200, 30))
    assert seen[False].crop_top_lefts == [(rectangle[1], rectangle[0])]
    assert seen[True].crop_top_lefts == [(rectangle[1], plan.bucket[0] - rectangle[2])]


def test_random_crop_without_buckets_is_a_piece_of_the_image(tmp_path, build, image):
    image(tmp_path / "a" / "x.png", (80, 70))
    group, _ = build(tmp_path / "a", subset={"random_crop": True})
    array = numpy.asarray(Image.open(tmp_path / "a" / "x.png").convert("RGB"))
    windows = numpy.lib.stride_tricks.sliding_window_view(array, (64, 64, 3)).reshape(-1, 64, 64, 3)
    crops = set()
    for epoch in range(1, 8):
        batch = load(group, group.plan(1, 1)[0], epoch=epoch)
        pixels = ((batch.images[0].permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(numpy.uint8)
        match = (windows == pixels).all(axis=(1, 2, 3))
        assert match.sum() == 1
        crops.add(int(match.argmax()))
        assert batch.original_sizes == [(64, 64)] and batch.crop_top_lefts == [(0, 0)]
    assert len(crops) > 3


def test_face_crops_keep_the_face_in_view(tmp_path, build):
    array = numpy.zeros((200, 300, 3), dtype=numpy.uint8)
    array[90:110, 200:220] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(array).save(tmp_path / "a" / "x_210_100_20_20.png")
    group, _ = build(tmp_path / "a", subset={"face_crop_aug_range": [1.5, 3.0]})
    for epoch in range(1, 6):
        image = load(group, group.plan(1, 1)[0], epoch=epoch).images[0]
        assert image.shape == (3, 64, 64) and image[:, 28:36, 28:36].mean() > 0.9


def test_alpha_masks_follow_the_image_and_are_ones_where_absent(tmp_path, build, buckets, image):
    rgba = numpy.full((64, 128, 4), 255, dtype=numpy.uint8)
    rgba[:, :32, 3], rgba[:, :32, 0] = 0, 10
    (tmp_path / "a").mkdir()
    Image.fromarray(rgba, "RGBA").save(tmp_path / "a" / "x.png")
    image(tmp_path / "b" / "y.png", (128, 64))
    options = "\n".join(f"{key} = {str(value).lower()}" for key, value in buckets.items())
    toml = f"""
    resolution = 96
    {options}
    [[datasets]]
    batch_size = 2
    [[datasets.subsets]]
    image_dir = '{tmp_path / "a"}'
    alpha_mask = true
    flip_aug = true
    [[datasets.subsets]]
    image_dir = '{tmp_path / "b"}'
    """
    group, _ = build(tmp_path, toml=toml)
    plan = group.plan(1, 1)[0]
    for epoch in range(1, 8):
        batch = load(group, plan, epoch=epoch)
        row = batch.image_keys.index(str(tmp_path / "a" / "x.png"))
        assert batch.alpha_masks.shape == (2, *batch.target_sizes[0])
        assert (batch.alpha_masks[1 - row] == 1).all()
        dark = (batch.images[row, 0] < 0).float()
        assert torch.equal((batch.alpha_masks[row] < 0.5).float(), dark)
    assert stack_masks([None, None]) is None


def test_masks_of_a_folder_stay_in_place_with_the_crop(tmp_path, build, buckets):
    """A stripe at the same place of image and mask is at the same place after resize, crop and mirroring."""
    array = numpy.zeros((64, 128, 3), dtype=numpy.uint8)
    array[:, 40:60] = 255
    (tmp_path / "a").mkdir()
    (tmp_path / "m").mkdir()
    Image.fromarray(array).save(tmp_path / "a" / "x.png")
    Image.fromarray(array).resize((256, 128), Image.Resampling.NEAREST).save(tmp_path / "m" / "x.png")
    group, _ = build(
        tmp_path / "a",
        general=buckets | {"min_bucket_reso": 64, "max_bucket_reso": 64},
        subset={"conditioning_data_dir": tmp_path / "m", "flip_aug": True},
        options=DatasetOptions(masked_loss=True),
    )
    for epoch in range(1, 6):
        batch = load(group, group.plan(1, 1)[0], epoch=epoch)
        assert batch.images.shape == batch.conditioning_images.shape == (1, 3, 64, 64)
        assert (batch.images - batch.conditioning_images).abs().mean() < 0.02


def test_regularisation_and_padding_weigh_differently(tmp_path, build, folder_of):
    train, reg = folder_of(tmp_path / "t", [(64, 64)] * 3), folder_of(tmp_path / "r", [(64, 64)] * 3)
    toml = f"""
    resolution = 64
    network_multiplier = 0.5
    [[datasets]]
    batch_size = 2
    [[datasets.subsets]]
    image_dir = '{train}'
    custom_attributes = {{ diff_output_preservation = true }}
    [[datasets.subsets]]
    image_dir = '{reg}'
    is_reg = true
    """
    group, _ = build(train, toml=toml, options=DatasetOptions(prior_loss_weight=0.25))
    plans = group.plan(1, 1, rank=1, world_size=2)
    for plan in plans:
        batch = load(group, plan)
        expected = [0.25 if "/r/" in key.replace("\\", "/") else 1.0 for key in batch.image_keys]
        assert batch.loss_weights.tolist() == ([0.0] * len(batch) if plan.padding else expected)
        assert batch.group_size == plan.group_size
        assert batch.network_multipliers == [0.5] * len(batch)
        attributes = [bool(entry) for entry in batch.custom_attributes]
        assert attributes == ["/t/" in key.replace("\\", "/") for key in batch.image_keys]
    assert plans[-1].padding or any(plan.padding for plan in plans)


def test_text_of_different_length_is_padded_with_zeros():
    entries = [{"t": torch.ones(2, 3), "m": torch.ones(2)}, {"t": torch.ones(4, 3), "m": torch.ones(4)}]
    stacked = stack_text(entries)
    assert stacked["t"].shape == (2, 4, 3) and stacked["m"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_a_batch_moves_whole(varied):
    batch = load(varied, varied.plan(1, 1)[0])
    moved = dataclasses.replace(batch, text={"a": torch.ones(2)}).to("meta")
    assert moved.images.is_meta and moved.text["a"].is_meta and moved.loss_weights.is_meta
    assert moved.captions == batch.captions and not batch.images.is_meta


def test_a_file_that_breaks_during_training_is_named_at_its_batch(tmp_path, build, folder_of):
    folder = folder_of(tmp_path / "a", [(64, 64)] * 4)
    group, _ = build(folder)
    plans = group.plan(1, 1)
    broken = folder / group.items[plans[2].samples[0]].path.name
    broken.write_bytes(broken.read_bytes()[:200])
    with BatchLoader(group, workers=2) as loader:
        batches = loader.batches(plans, epoch=1, seed=1, max_train_steps=4, step_of=int)
        assert [next(batches)[0], next(batches)[0]] == [0, 1]
        with pytest.raises(UserError, match=broken.name):
            next(batches)


def test_an_image_that_changed_its_size_is_named(tmp_path, build, folder_of, image):
    folder = folder_of(tmp_path / "a", [(64, 64)])
    group, _ = build(folder)
    image(folder / "00.png", (32, 64))
    with pytest.raises(UserError, match=r"00\.png: has 32x64 pixels, expected 64x64"):
        load(group, group.plan(1, 1)[0])


def test_prefetch_works_ahead_in_order_but_not_further_than_asked():
    from concurrent.futures import ThreadPoolExecutor

    begun, lock = [], threading.Lock()
    ready = threading.Event()

    def work(key):
        with lock:
            begun.append(key)
            if len(begun) >= 3:
                ready.set()
        time.sleep(0.002 * (5 - key % 5))
        return key * 10

    with ThreadPoolExecutor(4) as pool:
        results = prefetch(pool, work, range(20), 3)
        assert next(results) == (0, 0)
        # The next ones are in the making while nobody asks for them; the sixth is not.
        assert ready.wait(5)
        time.sleep(0.05)
        assert set(begun) <= {0, 1, 2, 3}
        assert list(results) == [(key, key * 10) for key in range(1, 20)]


def test_closing_early_leaves_no_thread_behind(varied):
    before = threading.active_count()
    with BatchLoader(varied, workers=4) as loader:
        batches = loader.batches(varied.plan(1, 1), epoch=1, seed=1, max_train_steps=4, step_of=int)
        next(batches)
    assert threading.active_count() == before


def test_fingerprint_tells_other_data(tmp_path, build, folder_of):
    folder = folder_of(tmp_path / "a", [(64, 64)] * 3)
    first = build(folder)[0].fingerprint()
    assert build(folder)[0].fingerprint() == first
    assert build(folder, subset={"num_repeats": 2})[0].fingerprint() != first
    assert build(folder, general={"batch_size": 2})[0].fingerprint() != first


def test_debugging_prints_every_sample_of_one_epoch_without_a_window(tmp_path, build, folder_of, monkeypatch):
    import cv2

    def no_window(*arguments):
        raise cv2.error("no display")

    monkeypatch.setattr(cv2, "imshow", no_window)
    group, _ = build(folder_of(tmp_path / "a", [(64, 64)] * 3), general={"batch_size": 2})
    lines = []
    show_dataset(group, seed=1, max_train_steps=4, print_line=lines.append)
    assert len(lines) == 4 and sum("64x64 -> 64x64" in line and "subject" in line for line in lines) == 3
