"""The latent cache: files that other programs read, entries that are true, and work that is never lost."""

import json
import shutil
import threading
import time

import numpy
import pytest
import torch
import torch.nn.functional as F

from library.data.cache import LatentCache, LatentFormat
from library.data.options import CacheOptions
from library.errors import UserError

FORMAT = LatentFormat("_flux.npz", stride=8, channels=16)
DISK = CacheOptions(cache_latents_to_disk=True)


class Encoder:
    """Means of 8x8 pixels plus posterior noise; remembers what it saw."""

    def __init__(self):
        self.shapes = []

    def __call__(self, pixels, generators):
        self.shapes.append(tuple(pixels.shape))
        means = F.avg_pool2d(pixels, 8).repeat(1, 6, 1, 1)[:, :16]
        noise = [torch.randn(means.shape[1:], generator=generator) for generator in generators]
        return means + 0.1 * torch.stack(noise)

    @property
    def count(self):
        return sum(shape[0] for shape in self.shapes)


@pytest.fixture
def folder(tmp_path, folder_of):
    return folder_of(tmp_path / "a", [(64, 64), (100, 60), (60, 100), (64, 64), (128, 64)])


@pytest.fixture
def group_of(build, buckets):
    def make(folders, general=None, **arguments):
        return build(folders, general=buckets | (general or {}), **({"cache": DISK} | arguments))[0]

    return make


def fill(group, encoder=None, *, to_disk=True, batch_size=2, seed=5, **arguments):
    """Fill a cache; gives the report and the encoder."""
    encoder = encoder or Encoder()
    cache = LatentCache(group, FORMAT, to_disk=to_disk, **({"identity": "ae"} | arguments))
    return cache.fill(encoder, batch_size=batch_size, seed=seed), encoder


def missing(group, **arguments):
    return LatentCache(group, FORMAT, to_disk=True, **({"identity": "ae"} | arguments)).missing


def latents_by_key(group):
    found = {}
    for plan in group.plan(1, 1):
        batch = group.load(plan, epoch=1, step=0, max_train_steps=1, seed=1)
        assert batch.images is None
        found |= {(key, batch.target_sizes[0]): row for key, row in zip(batch.image_keys, batch.latents)}
    return found


def files(folder):
    return sorted(folder.glob("*.npz"))


def test_files_have_the_names_keys_dtypes_and_shapes_that_others_read(folder, group_of):
    group = group_of(folder, {"flip_aug": True})
    fill(group)
    assert [path.name for path in files(folder)] == [
        "00_0064x0064_flux.npz",
        "01_0100x0060_flux.npz",
        "02_0060x0100_flux.npz",
        "03_0064x0064_flux.npz",
        "04_0128x0064_flux.npz",
    ]
    item = group.items[1]
    width, height = item.placement.bucket
    key = f"_{height // 8}x{width // 8}"
    with numpy.load(files(folder)[1], allow_pickle=False) as stored:
        assert stored[f"latents{key}"].shape == (16, height // 8, width // 8)
        assert stored[f"latents{key}"].dtype == stored[f"latents_flipped{key}"].dtype == numpy.float32
        assert stored[f"original_size{key}"].tolist() == [100, 60]
        assert stored[f"original_size{key}"].dtype.kind == "i" and stored[f"crop_ltrb{key}"].shape == (4,)
        assert set(stored.files) == {
            *(f"{name}{key}" for name in ("latents", "latents_flipped", "original_size", "crop_ltrb", "identity"))
        }


def test_disk_and_memory_hold_the_same_whatever_the_batch_size(folder, group_of):
    groups = [group_of(folder) for _ in range(3)]
    fill(groups[0], batch_size=3)
    fill(groups[1], to_disk=False, batch_size=1)
    fill(groups[2], to_disk=False, batch_size=4)
    tables = [latents_by_key(group) for group in groups]
    for other in tables[1:]:
        assert all(torch.equal(tables[0][key], other[key]) for key in tables[0])


def test_mirrored_latents_are_an_encode_of_their_own(folder, group_of):
    group = group_of(folder, {"flip_aug": True})
    _, encoder = fill(group)
    assert encoder.count == 10
    plain, flipped = (group.items[0].latents.read(flipped=value).latents for value in (False, True))
    assert not torch.equal(plain.flip(2), flipped) and (plain.flip(2) - flipped).abs().mean() < 0.3
    flips = set()
    for epoch in range(1, 12):
        batch = group.load(group.plan(1, 1)[0], epoch=epoch, step=0, max_train_steps=1, seed=1)
        source = group.items[batch.item_ids[0]].latents
        flips.add(batch.flipped[0])
        assert torch.equal(batch.latents[0], source.read(flipped=batch.flipped[0]).latents)
    assert flips == {True, False}


def test_images_of_a_batch_share_their_bucket_and_the_largest_come_first(folder, group_of):
    _, encoder = fill(group_of(folder))
    areas = [shape[2] * shape[3] for shape in encoder.shapes]
    assert areas == sorted(areas, reverse=True) and (2, 3, 64, 64) in encoder.shapes


def test_a_second_start_needs_no_encoder(folder, group_of):
    report, _ = fill(group_of(folder))
    assert (report.made, report.kept) == (5, 0)
    again = group_of(folder)
    report, encoder = fill(again)
    assert (report.made, report.kept, encoder.shapes) == (0, 5, []) and missing(again) == 0
    assert len(latents_by_key(again)) == 5


def test_copied_files_with_new_times_stay_valid(folder, group_of, tmp_path):
    fill(group_of(folder))
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    assert missing(group_of(copy)) == 0


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:300])


def damage_text(path):
    path.write_text("not an archive")


def damage_empty(path):
    path.write_bytes(b"")


def rewrite(change):
    def damage(path):
        with numpy.load(path) as stored:
            arrays = dict(stored)
        change(arrays)
        numpy.savez(path, **arrays)

    return damage


def nan_inside(arrays):
    next(array for name, array in arrays.items() if name.startswith("latents_"))[0, 0, 0] = numpy.nan


def nan_without_identity(arrays):
    nan_inside(arrays)
    arrays.pop(next(name for name in arrays if name.startswith("identity")))


def other_shape(arrays):
    name = next(name for name in arrays if name.startswith("latents_"))
    arrays[name] = arrays[name][:, :-1]


def other_channels(arrays):
    name = next(name for name in arrays if name.startswith("latents_"))
    arrays[name] = arrays[name][:4]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_cut, "damaged"),
        (damage_text, "damaged"),
        (damage_empty, "damaged"),
        (rewrite(nan_inside), "stale"),
        (rewrite(nan_without_identity), "not finite"),
        (rewrite(other_shape), "stale"),
        (rewrite(other_channels), "stale"),
    ],
)
def test_a_bad_entry_is_made_anew_and_counted(folder, group_of, damage, reason):
    group = group_of(folder)
    fill(group)
    before = latents_by_key(group)
    damage(files(folder)[2])
    group = group_of(folder)
    assert missing(group) == 1
    report, _ = fill(group)
    assert report.rebuilt == {reason: 1} and (report.kept, report.made) == (4, 1)
    assert f"1 rebuilt (1 {reason})" in report.line()
    after = latents_by_key(group)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_changed_image_or_encoder_makes_its_entry_stale(folder, group_of, image):
    fill(group_of(folder))
    image(folder / "03.png", (64, 64), seed=99)
    group = group_of(folder)
    assert missing(group) == 1
    report, _ = fill(group)
    assert report.rebuilt == {"stale": 1}
    assert missing(group, identity="another autoencoder") == 5


def test_other_resize_options_make_entries_stale(folder, group_of):
    fill(group_of(folder))
    assert missing(group_of(folder, {"resize_interpolation": "lanczos"})) == 5
    assert missing(group_of(folder, {"resize_interpolation": "bicubic"})) == 0


def test_skipping_the_check_looks_at_existence_only(folder, group_of, monkeypatch):
    for stem, size in (("00", "0064x0064"), ("01", "0100x0060")):
        (folder / f"{stem}_{size}_flux.npz").write_bytes(b"rubbish")
    from library.data import npz

    monkeypatch.setattr(npz, "read_heads", lambda path: pytest.fail("opened"))
    assert missing(group_of(folder), skip_check=True) == 3


def test_a_rubbish_file_that_was_trusted_is_named_when_it_is_read(folder, group_of):
    group = group_of(folder)
    fill(group)
    for path in files(folder):
        damage_cut(path)
    missing(group, skip_check=True)
    with pytest.raises(UserError, match=r"_flux\.npz: the cache file is damaged .*delete it"):
        latents_by_key(group)


def test_entries_of_the_other_program_are_accepted(folder, group_of):
    group = group_of(folder)
    for item in group.items:
        width, height = item.placement.bucket
        key = f"_{height // 8}x{width // 8}"
        arrays = {
            f"latents{key}": numpy.full((16, height // 8, width // 8), 2, dtype=numpy.float32),
            f"original_size{key}": numpy.array(item.size),
            f"crop_ltrb{key}": numpy.array([0, 0, width, height]),
        }
        numpy.savez(item.path.with_name(f"{item.path.stem}_{item.size[0]:04d}x{item.size[1]:04d}_flux.npz"), **arrays)
    assert missing(group) == 0
    assert all((latents == 2).all() for latents in latents_by_key(group).values())


def test_several_resolutions_live_in_one_file(folder, build, buckets):
    def toml(*sides):
        head = "\n".join(f"{key} = {str(value).lower()}" for key, value in buckets.items())
        return head + "".join(
            f"\n[[datasets]]\nresolution = {side}\n[[datasets.subsets]]\nimage_dir = '{folder}'" for side in sides
        )

    small, _ = build(folder, toml=toml(64), cache=DISK)
    fill(small)
    both, _ = build(folder, toml=toml(64, 96), cache=DISK)
    report, _ = fill(both)
    assert (report.kept, report.made, sum(report.rebuilt.values())) == (5, 5, 0)
    assert len(files(folder)) == 5 and len(latents_by_key(both)) == 10
    with numpy.load(files(folder)[0]) as stored:
        assert {"latents_8x8", "latents_12x12"} <= set(stored.files)
    assert missing(small) == missing(both) == 0


def test_a_new_flip_or_mask_adds_to_the_entry_and_an_unwanted_mask_is_not_used(folder, group_of):
    fill(group_of(folder))
    masked = group_of(folder, {"alpha_mask": True, "flip_aug": True})
    report, _ = fill(masked)
    assert report.made == 5 and not report.rebuilt
    batch = masked.load(masked.plan(1, 1)[0], epoch=1, step=0, max_train_steps=1, seed=1)
    assert batch.alpha_masks.shape == (len(batch), *batch.target_sizes[0])
    plain = group_of(folder)
    assert missing(plain) == 0
    assert plain.load(plain.plan(1, 1)[0], epoch=1, step=0, max_train_steps=1, seed=1).alpha_masks is None
    for item in plain.items:
        item.path.touch()
        item.path.write_bytes(item.path.read_bytes() + b" ")
    plain = group_of(folder)
    fill(plain)
    with numpy.load(files(folder)[0]) as stored:
        assert not any(name.startswith(("alpha_mask", "latents_flipped")) for name in stored.files)


def test_stable_diffusion_formats_use_plain_keys_and_old_file_names(folder, group_of):
    form = LatentFormat("_sd.npz", channels=None, sized_keys=False, plain_name=True)
    group = group_of(folder)
    (folder / "00.npz").write_bytes(b"old and broken")
    LatentCache(group, form, to_disk=True).fill(Encoder(), batch_size=2)
    assert (folder / "01_0100x0060_sd.npz").exists() and not (folder / "00_0064x0064_sd.npz").exists()
    with numpy.load(folder / "00.npz") as stored:
        assert {"latents", "original_size", "crop_ltrb"} <= set(stored.files)
    assert LatentCache(group, form, to_disk=True).missing == 0
    # A resolution change is seen in the shapes, which plain keys do not tell.
    other = group_of(folder, {"resolution": 96})
    assert LatentCache(other, form, to_disk=True).missing == 5


def test_ranks_share_the_files_and_every_rank_can_read_all(folder, group_of):
    groups = [group_of(folder) for _ in range(3)]
    caches = [
        LatentCache(group, FORMAT, to_disk=True, identity="ae", rank=rank, world_size=3)
        for rank, group in enumerate(groups)
    ]
    assert sorted(cache.missing for cache in caches) == [1, 2, 2]
    for cache in caches:
        cache.fill(Encoder(), batch_size=1, seed=5)
    tables = [latents_by_key(group) for group in groups]
    assert all(torch.equal(tables[0][key], table[key]) for table in tables for key in tables[0])


def test_images_that_would_share_a_file_are_refused(folder, group_of, image):
    image(folder / "00.jpg", (64, 64))
    group = group_of(folder)
    with pytest.raises(UserError, match=r"00\.jpg and 00\.png would share one latent cache file"):
        LatentCache(group, FORMAT, to_disk=True)
    fill(group, to_disk=False)
    assert len(latents_by_key(group)) == 6


def test_conflicting_resize_options_are_refused_on_disk(folder, build, buckets):
    head = "\n".join(f"{key} = {str(value).lower()}" for key, value in buckets.items())
    subset = f"[[datasets.subsets]]\nimage_dir = '{folder}'"
    parts = [f"\n[[datasets]]\nresolution = 64\nresize_interpolation = '{name}'\n{subset}" for name in ("area", "box")]
    group, _ = build(folder, toml=head + "".join(parts), cache=DISK)
    with pytest.raises(UserError, match="two datasets resize this image differently"):
        LatentCache(group, FORMAT, to_disk=True)


def test_latents_that_are_not_finite_are_never_stored(folder, group_of):
    def broken(pixels, generators):
        return torch.full((len(pixels), 16, pixels.shape[2] // 8, pixels.shape[3] // 8), float("nan"))

    with pytest.raises(UserError, match="not finite"):
        fill(group_of(folder), broken)
    assert files(folder) == []


def test_an_unreadable_image_is_named_while_caching(folder, group_of):
    group = group_of(folder)
    (folder / "02.png").write_bytes((folder / "02.png").read_bytes()[:500])
    with pytest.raises(UserError, match=r"02\.png"):
        fill(group)


def test_a_file_that_cannot_be_written_is_named(folder, group_of):
    (folder / "00_0064x0064_flux.npz").mkdir()
    with pytest.raises(UserError, match=r"00_0064x0064_flux\.npz is not a regular file"):
        fill(group_of(folder))
    assert not list(folder.glob(".*.part"))


def test_a_lost_image_lives_on_in_its_cache_file(tmp_path, build, buckets, image):
    image(tmp_path / "x.png", (64, 64))
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"x": {"caption": "a"}}))
    head = "\n".join(f"{key} = {str(value).lower()}" for key, value in buckets.items())
    subset = f"[[datasets.subsets]]\nmetadata_file = '{meta}'\nimage_dir = '{tmp_path}'"
    toml = f"{head}\nresolution = 64\n[[datasets]]\n{subset}"
    fill(build(tmp_path, toml=toml, cache=DISK)[0])
    (tmp_path / "x.png").unlink()
    group, _ = build(tmp_path, toml=toml, cache=DISK)
    assert missing(group) == 0 and len(latents_by_key(group)) == 1
    with pytest.raises(UserError, match="neither a usable latent cache nor an image"):
        missing(group, identity="another")


def test_decoding_goes_on_while_the_encoder_works(folder, group_of, monkeypatch):
    """While the encoder is busy with the first batch, the next one is decoded."""
    from library.data.dataset import Dataset

    decoded, original = [], Dataset.read_pixels
    second = threading.Event()

    def watch(self, item, *arguments, **named):
        pixels = original(self, item, *arguments, **named)
        decoded.append(item.path.name)
        if len(decoded) >= 2:
            second.set()
        return pixels

    monkeypatch.setattr(Dataset, "read_pixels", watch)
    waited = []

    def slow(pixels, generators):
        if not waited:
            waited.append(second.wait(10))
        return Encoder()(pixels, generators)

    fill(group_of(folder), slow, batch_size=1)
    assert waited == [True]


KILLED_RUN = """
import sys, time, torch
from library.data.build import build_dataset_groups
from library.data.cache import LatentCache, LatentFormat
from library.data.options import CacheOptions, DatasetOptions

def encode(pixels, generators):
    time.sleep(0.03)
    return torch.ones(len(pixels), 16, pixels.shape[2] // 8, pixels.shape[3] // 8)

cache = CacheOptions(cache_latents_to_disk=True)
group, _ = build_dataset_groups(DatasetOptions(dataset_config=sys.argv[1]), bucket_divisor=8, cache=cache)
LatentCache(group, LatentFormat("_flux.npz", channels=16), to_disk=True, identity="ae").fill(encode, seed=1)
"""


def test_a_killed_run_leaves_whole_files_and_the_next_one_goes_on(tmp_path, folder_of, build, fork_server):
    folder = folder_of(tmp_path / "a", [(64, 64)] * 40)
    group, _ = build(folder, cache=DISK)
    program = tmp_path / "program.py"
    program.write_text(KILLED_RUN, encoding="utf-8")
    process = fork_server.start(str(program), tmp_path / "dataset.toml")
    deadline = time.monotonic() + 60
    while len(files(folder)) < 8 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    whole = files(folder)
    assert 8 <= len(whole) < 40
    for path in whole:
        with numpy.load(path) as stored:
            assert (stored["latents_8x8"] == 1).all()
    report, _ = fill(group)
    assert (report.kept, report.made) == (len(whole), 40 - len(whole)) and not report.rebuilt
    assert len(files(folder)) == 40 and not list(folder.glob(".*.part"))
