"""The text encoder cache: the captions that training would use, in files that other programs read."""

import numpy
import pytest
import torch

from library.data.cache import TextCache, TextFormat, check_text_cacheable
from library.errors import UserError

LENGTH = 6
FORMAT = TextFormat(
    "_flux_te.npz",
    {"l_pooled": (8,), "t5_out": (LENGTH, None), "txt_ids": (LENGTH, 3), "t5_attn_mask": (LENGTH,)},
    {"apply_t5_attn_mask": False},
)


class Encoder:
    """Outputs that are a function of each caption; remembers what it was asked."""

    def __init__(self, dtype=torch.float32, length=LENGTH):
        self.asked, self.dtype, self.length = [], dtype, length

    def __call__(self, captions):
        self.asked.append(list(captions))
        seeds = [sum(caption.encode()) for caption in captions]
        rows = [torch.randn(self.length, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        hidden = torch.stack(rows).to(self.dtype)
        return {
            "l_pooled": hidden.flatten(1)[:, :8],
            "t5_out": hidden,
            "txt_ids": torch.zeros(len(captions), self.length, 3),
            "t5_attn_mask": torch.ones(len(captions), self.length, dtype=torch.int64),
        }


@pytest.fixture
def folder(tmp_path, folder_of):
    return folder_of(tmp_path / "a", [(64, 64)] * 4, ["a cat", "a dog", "a cat", "a bird, red"])


def cache_of(group, to_disk=True, **arguments):
    return TextCache(group, FORMAT, to_disk=to_disk, **({"identity": "clip+t5"} | arguments))


def text_by_key(group):
    found = {}
    for plan in group.plan(1, 1):
        batch = group.load(plan, epoch=1, step=0, max_train_steps=1, seed=1)
        for row, key in enumerate(batch.image_keys):
            found[key.replace("\\", "/").rsplit("/", 1)[-1]] = {name: value[row] for name, value in batch.text.items()}
    return found


def files(folder):
    return sorted(folder.glob("*.npz"))


def test_files_have_the_names_keys_and_dtypes_that_others_read(folder, build):
    group, _ = build(folder)
    cache_of(group).fill(Encoder(torch.bfloat16), batch_size=3)
    assert [path.name for path in files(folder)] == [f"{index:02d}_flux_te.npz" for index in range(4)]
    with numpy.load(files(folder)[0], allow_pickle=False) as stored:
        assert set(stored.files) == {*FORMAT.arrays, "apply_t5_attn_mask", "identity"}
        assert stored["t5_out"].dtype == stored["l_pooled"].dtype == numpy.float32
        assert stored["t5_attn_mask"].dtype.kind == "i"
        assert stored["apply_t5_attn_mask"].dtype == bool and stored["apply_t5_attn_mask"].shape == ()
    expected = Encoder(torch.bfloat16)(["a dog"])
    assert torch.equal(text_by_key(group)["01.png"]["t5_out"], expected["t5_out"][0].float())


def test_half_precision_is_stored_as_such_and_read_as_float(folder, build):
    group, _ = build(folder)
    cache_of(group).fill(Encoder(torch.float16), batch_size=3)
    with numpy.load(files(folder)[0]) as stored:
        assert stored["t5_out"].dtype == numpy.float16
    assert text_by_key(group)["00.png"]["t5_out"].dtype == torch.float32


def test_each_caption_is_encoded_once_in_memory_and_on_disk(folder, build):
    for to_disk in (False, True):
        group, _ = build(folder)
        encoder = Encoder()
        report = cache_of(group, to_disk).fill(encoder, batch_size=2)
        assert encoder.asked == [["a cat", "a dog"], ["a bird, red"]]
        assert report.made == (4 if to_disk else 3)
        table = text_by_key(group)
        assert torch.equal(table["00.png"]["t5_out"], table["02.png"]["t5_out"])
        assert torch.equal(table["03.png"]["l_pooled"], Encoder()(["a bird, red"])["l_pooled"][0])


def test_the_caption_that_training_would_use_is_encoded(folder, build):
    subset = {"caption_prefix": "photo of", "caption_suffix": "outside", "secondary_separator": ", "}
    group, _ = build(folder, subset=subset)
    encoder = Encoder()
    cache_of(group, to_disk=False).fill(encoder, batch_size=9)
    trained = [
        caption
        for plan in group.plan(1, 1)
        for caption in group.load(plan, epoch=1, step=0, max_train_steps=1, seed=1).captions
    ]
    assert set(encoder.asked[0]) == set(trained)
    assert "photo of a bird,red outside" in encoder.asked[0]


def test_a_second_start_needs_no_encoder(folder, build):
    cache_of(build(folder)[0]).fill(Encoder(), batch_size=2)
    group, _ = build(folder)
    again = cache_of(group)
    assert again.missing == 0 and again.fill(Encoder()).kept == 4
    assert len(text_by_key(group)) == 4


def rewrite(change):
    def damage(path):
        with numpy.load(path) as stored:
            arrays = dict(stored)
        change(arrays)
        numpy.savez(path, **arrays)

    return damage


def shorten(arrays):
    arrays["t5_out"] = arrays["t5_out"][:3]


def spoil_without_identity(arrays):
    arrays["t5_out"][0, 0] = numpy.inf
    del arrays["identity"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "damaged"),
        (rewrite(shorten), "stale"),
        (rewrite(lambda arrays: arrays.update(apply_t5_attn_mask=numpy.array(True))), "stale"),
        (rewrite(lambda arrays: arrays["l_pooled"].fill(numpy.nan)), "stale"),
        (rewrite(spoil_without_identity), "not finite"),
        (rewrite(lambda arrays: arrays.update(identity=numpy.array("{"))), "damaged"),
    ],
)
def test_a_bad_entry_is_made_anew_and_counted(folder, build, damage, reason):
    cache_of(build(folder)[0]).fill(Encoder(), batch_size=2)
    damage(files(folder)[1])
    group, _ = build(folder)
    report = cache_of(group).fill(Encoder(), batch_size=2)
    assert report.rebuilt == {reason: 1} and (report.kept, report.made) == (3, 1)
    assert torch.equal(text_by_key(group)["01.png"]["t5_out"], Encoder()(["a dog"])["t5_out"][0])
    assert cache_of(build(folder)[0]).missing == 0


def test_an_edited_caption_prefix_or_encoder_is_seen(folder, build):
    cache_of(build(folder)[0]).fill(Encoder(), batch_size=2)
    (folder / "01.txt").write_text("a dog, brown")
    group, _ = build(folder)
    assert cache_of(group).missing == 1
    cache_of(group).fill(Encoder(), batch_size=2)
    assert torch.equal(text_by_key(group)["01.png"]["t5_out"], Encoder()(["a dog, brown"])["t5_out"][0])
    assert cache_of(build(folder, subset={"caption_prefix": "p"})[0]).missing == 4
    assert cache_of(group, identity="t5 with 256 tokens").missing == 4


def test_entries_of_the_other_program_are_accepted(folder, build):
    outputs = {name: tensor[0].numpy() for name, tensor in Encoder()(["anything"]).items()}
    for index in range(4):
        numpy.savez(folder / f"{index:02d}_flux_te.npz", **outputs, apply_t5_attn_mask=numpy.array(False))
    assert cache_of(build(folder)[0]).missing == 0


def test_skipping_the_check_trusts_what_exists(folder, build):
    (folder / "02_flux_te.npz").write_bytes(b"rubbish")
    group, _ = build(folder)
    assert cache_of(group, skip_check=True).missing == 3


def test_options_that_change_captions_are_refused_with_their_place(folder, build):
    group, _ = build(folder, subset={"shuffle_caption": True, "caption_dropout_every_n_epochs": 2})
    with pytest.raises(UserError, match=r"\[\[datasets.subsets\]\] number 1.*every_n_epochs, shuffle_caption"):
        check_text_cacheable(group)


def test_wildcards_are_refused_only_where_a_caption_has_a_choice(folder, build):
    group, _ = build(folder, subset={"enable_wildcard": True})
    check_text_cacheable(group)
    (folder / "03.txt").write_text("{red|blue} bird")
    group, _ = build(folder, subset={"enable_wildcard": True})
    with pytest.raises(UserError, match=r"03\.png.*the choice \{red\|blue\}"):
        check_text_cacheable(group)


def test_one_image_with_two_captions_cannot_have_one_file(folder, build):
    parts = [
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{folder}'\ncaption_prefix = '{prefix}'"
        for prefix in ("x", "y")
    ]
    group, _ = build(folder, toml="caption_extension = '.txt'\n" + "\n".join(parts))
    with pytest.raises(UserError, match=r"00\.png: this image has two different captions"):
        cache_of(group)
    cache_of(group, to_disk=False).fill(Encoder(), batch_size=4)
    assert len(text_by_key(group)) == 4


def test_two_datasets_of_one_folder_share_their_files(folder, build):
    part = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{folder}'\n"
    group, _ = build(folder, toml="caption_extension = '.txt'\n" + part * 2)
    report = cache_of(group).fill(Encoder(), batch_size=4)
    assert report.made == 4 and all(item.text is not None for item in group.items)


def test_outputs_that_are_not_finite_are_never_stored(folder, build):
    def broken(captions):
        return {name: tensor.float() * float("nan") for name, tensor in Encoder()(captions).items()}

    with pytest.raises(UserError, match='not finite for "a cat"'):
        cache_of(build(folder)[0]).fill(broken)
    assert files(folder) == []


def test_ranks_share_the_files(folder, build):
    group, _ = build(folder)
    caches = [cache_of(group, rank=rank, world_size=2) for rank in range(2)]
    assert [cache.missing for cache in caches] == [2, 2]
    for cache in caches:
        cache.fill(Encoder(), batch_size=1)
    assert len(files(folder)) == 4 and len(text_by_key(group)) == 4


class RaggedEncoder:
    """Two numbers for each letter, padded with zeros to the longest caption of the batch."""

    def __call__(self, captions):
        longest = max(map(len, captions))
        mask = torch.tensor([[1] * len(caption) + [0] * (longest - len(caption)) for caption in captions])
        letters = [torch.tensor([ord(letter) for letter in caption.ljust(longest, "\0")]) for caption in captions]
        return {
            "states": torch.stack(letters)[..., None].expand(-1, -1, 2).float(),
            "mask": mask,
            "loud": mask[:, 0] > 0,
        }


@pytest.mark.parametrize("to_disk", [True, False])
def test_entries_of_any_length_do_not_depend_on_those_encoded_together(folder, build, to_disk):
    ragged = TextFormat(
        "_r_te.npz", {"states": (None, 2), "mask": (None,), "loud": ()}, lengths={"states": "mask", "mask": "mask"}
    )
    found = []
    for batch_size in (1, 3):
        group, _ = build(folder)
        TextCache(group, ragged, to_disk=to_disk, identity=str(batch_size)).fill(RaggedEncoder(), batch_size=batch_size)
        found.append({str(item.path): item.text.read() for item in group.items})
        if to_disk:
            with numpy.load(folder / "03_r_te.npz", allow_pickle=False) as stored:
                assert stored["states"].shape == (len("a bird, red"), 2) and stored["mask"].all()
    assert found[0].keys() == found[1].keys()
    for key, one in found[0].items():
        assert all(torch.equal(one[name], found[1][key][name]) for name in ragged.arrays)
    batch = group.load(group.plan(1, 1)[0], epoch=1, step=0, max_train_steps=1, seed=1)
    lengths = batch.text["mask"].sum(1).tolist()
    assert batch.text["states"].shape == (len(lengths), max(lengths), 2)
    assert not batch.text["states"][lengths.index(min(lengths)), min(lengths) :].any()
