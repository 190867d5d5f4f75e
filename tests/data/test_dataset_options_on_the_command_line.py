"""Dataset options of the command line are the keys of a dataset configuration; what has no effect is said."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from PIL import Image

from library.data.build import build_dataset_groups
from library.data.config import resolve_config
from library.data.config_file import DatasetTable
from library.data.options import DatasetOptions
from library.data.unused_keys import KEY_OF_OPTION
from library.errors import UserError
from library.options import ConfigOptions, parse_options
from library.training.validation_options import ValidationOptions


@dataclass
class DataOptions:
    """The groups of the scripts that are about data."""

    config: ConfigOptions = field(default_factory=ConfigOptions)
    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)


SAME = {
    # option, as written on the command line: as written in [[datasets]]
    "--train_batch_size 3": "batch_size = 3",
    "--resolution 96,128": "resolution = [96, 128]",
    "--enable_bucket": "enable_bucket = true",
    "--min_bucket_reso 64": "min_bucket_reso = 64",
    "--max_bucket_reso 512": "max_bucket_reso = 512",
    "--bucket_reso_steps 32": "bucket_reso_steps = 32",
    "--bucket_no_upscale": "bucket_no_upscale = true",
    "--resize_interpolation area": "resize_interpolation = 'area'",
    "--dataset_repeats 4": "num_repeats = 4",
    "--caption_extension .cap": "caption_extension = '.cap'",
    "--caption_extention cap": "caption_extension = 'cap'",
    "--caption_separator ;": "caption_separator = ';'",
    "--shuffle_caption": "shuffle_caption = true",
    "--keep_tokens 2": "keep_tokens = 2",
    "--keep_tokens_separator |||": "keep_tokens_separator = '|||'",
    "--secondary_separator ;;;": "secondary_separator = ';;;'",
    "--enable_wildcard": "enable_wildcard = true",
    "--trigger_word sks": "trigger_word = 'sks'",
    "--caption_prefix photo": "caption_prefix = 'photo'",
    "--caption_suffix blurred": "caption_suffix = 'blurred'",
    "--caption_dropout_rate 0.1": "caption_dropout_rate = 0.1",
    "--caption_dropout_every_n_epochs 2": "caption_dropout_every_n_epochs = 2",
    "--caption_tag_dropout_rate 0.2": "caption_tag_dropout_rate = 0.2",
    "--token_warmup_min 2": "token_warmup_min = 2",
    "--token_warmup_step 0.5": "token_warmup_step = 0.5",
    "--color_aug": "color_aug = true",
    "--rotate_aug 10": "rotate_aug = 10",
    "--brightness_aug 0.2": "brightness_aug = 0.2",
    "--contrast_aug 0.2": "contrast_aug = 0.2",
    "--flip_aug": "flip_aug = true",
    "--random_crop": "random_crop = true",
    "--face_crop_aug_range 2.0,4.0": "face_crop_aug_range = [2.0, 4.0]",
    "--alpha_mask": "alpha_mask = true",
    "--cache_info": "cache_info = true",
    "--validation_split 0.25": "validation_split = 0.25",
    "--validation_seed 5": "validation_seed = 5",
}
"""Every dataset option that has a key. (``--prior_loss_weight``, ``--masked_loss`` and the like have none.)"""


@pytest.fixture
def resolve(tmp_path):
    """The datasets of a command line beside a configuration with these lines in [[datasets]]."""

    def run(arguments: str = "", lines: str = "", subset: str = "", script=DataOptions):
        file = tmp_path / "set.toml"
        size = "" if "resolution" in arguments + lines else "resolution = 64\n"
        text = f"[[datasets]]\n{size}{lines}\n[[datasets.subsets]]\nimage_dir = 'x'\n{subset}"
        file.write_text(text, encoding="utf-8")
        options = parse_options(script, "test", ["--dataset_config", str(file), *arguments.split()])
        validation = options.validation
        split, seed = validation.validation_split, validation.validation_seed
        return resolve_config(options.dataset, validation_split=split, validation_seed=seed)

    return run


@pytest.mark.parametrize("option", SAME)
def test_an_option_gives_the_settings_of_its_key(resolve, option):
    given = resolve(option)
    assert given == resolve(lines=SAME[option])
    assert given != resolve()


def test_every_option_with_a_key_is_among_them():
    options = {line.split()[0].removeprefix("--") for line in SAME}
    keys = {KEY_OF_OPTION.get(name, name) for name in options}
    names = {*vars(DatasetOptions()), "validation_split", "validation_seed"}
    assert options == {name for name in names if KEY_OF_OPTION.get(name, name) in DatasetTable.model_fields}
    # What can be said in a configuration only.
    assert set(DatasetTable.model_fields) - keys == {
        "network_multiplier",
        "class_tokens",
        "custom_attributes",
        "subsets",
    }


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--train_batch_size 0", "--train_batch_size must be at least 1, not 0."),
        ("--bucket_reso_steps 0", "--bucket_reso_steps must be at least 1, not 0."),
        ("--min_bucket_reso -1", "--min_bucket_reso must be at least 1, not -1."),
        ("--keep_tokens -1", "--keep_tokens must be at least 0, not -1."),
        ("--token_warmup_step -1", "--token_warmup_step must be at least 0, not -1.0."),
        ("--caption_dropout_rate 2", "--caption_dropout_rate must be at most 1, not 2.0."),
        ("--caption_dropout_every_n_epochs -1", "--caption_dropout_every_n_epochs must be at least 0, not -1."),
        ("--validation_split 1.5", "--validation_split must be at most 1, not 1.5."),
    ],
)
def test_options_have_the_limits_of_their_keys(resolve, option, sentence):
    with pytest.raises(UserError) as error:
        resolve(option)
    assert str(error.value) == sentence


def said(caplog) -> dict[str, str]:
    """What was said to have no effect: names by reason."""
    lines = [text.removeprefix("no effect ") for text in caplog.messages if text.startswith("no effect ")]
    return dict(line.rsplit(": ", 1) for line in lines)


VARIES = "shuffle_caption, token_warmup_step or caption_tag_dropout_rate"


@pytest.mark.parametrize(
    ("arguments", "lines", "subset", "expected"),
    [
        (
            "--min_bucket_reso 64 --bucket_no_upscale",
            "max_bucket_reso = 512\nbucket_reso_steps = 32",
            "",
            {"without enable_bucket": "--min_bucket_reso, max_bucket_reso, bucket_reso_steps, --bucket_no_upscale"},
        ),
        (
            "--min_bucket_reso 64 --bucket_reso_steps 32",
            "enable_bucket = true\nbucket_no_upscale = true\nmax_bucket_reso = 512",
            "",
            {"with bucket_no_upscale": "--min_bucket_reso, max_bucket_reso"},
        ),
        (
            "--keep_tokens 1 --caption_separator ;",
            "",
            "keep_tokens_separator = '|||'",
            {f"without {VARIES}": "--keep_tokens, keep_tokens_separator, --caption_separator"},
        ),
        ("--keep_tokens 1 --caption_separator ;", "shuffle_caption = true", "", {}),
        ("--caption_separator ;", "secondary_separator = ';;;'", "", {}),
        ("--token_warmup_min 2", "shuffle_caption = true", "", {"without token_warmup_step": "--token_warmup_min"}),
        ("--token_warmup_min 2", "", "token_warmup_step = 10", {}),
        ("--prior_loss_weight 0.5", "", "", {"without regularisation images": "--prior_loss_weight"}),
        ("--prior_loss_weight 0.5", "", "is_reg = true", {}),
        ("", "validation_seed = 3", "", {"without validation_split": "validation_seed"}),
        ("", "validation_seed = 3", "validation_split = 0.5", {}),
        (
            "--resolution 128 --train_batch_size 2 --dataset_repeats 3 --flip_aug",
            "resolution = 64\nbatch_size = 1",
            "num_repeats = 1",
            {"beside the values of set.toml": "--dataset_repeats, --train_batch_size, --resolution"},
        ),
        (
            "--caption_extension .a --caption_extention .b",
            "",
            "",
            {"beside --caption_extention": "--caption_extension"},
        ),
    ],
)
def test_what_changes_nothing_is_said(resolve, tmp_path, caplog, arguments, lines, subset, expected):
    with caplog.at_level("INFO"):
        resolve(arguments, lines, subset)
    assert {reason.replace(f"{tmp_path}/", ""): names for reason, names in said(caplog).items()} == expected


def test_keys_of_other_kinds_of_datasets_are_said(tmp_path, caplog):
    file = tmp_path / "set.toml"
    general = "resolution = 64\ncaption_extension = '.txt'\ncache_info = true\nclass_tokens = 'a'\nalpha_mask = true\n"
    for key, expected in {
        "metadata_file": {
            "with metadata_file": "caption_extension, cache_info",
            "with metadata_file or conditioning_data_dir": "class_tokens",
        },
        "conditioning_data_dir": {
            "with conditioning_data_dir": "alpha_mask",
            "with metadata_file or conditioning_data_dir": "class_tokens",
        },
        "class_tokens": {},
    }.items():
        caplog.clear()
        text = f"{general}[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'x'\n{key} = 'y'\n"
        file.write_text(text, encoding="utf-8")
        with caplog.at_level("INFO"):
            resolve_config(DatasetOptions(dataset_config=str(file), masked_loss=True))
        assert said(caplog) == expected


def test_folders_named_on_the_command_line_say_their_repeats_themselves(tmp_path, caplog):
    for name in ("train/2_cat", "reg/1_animal"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / name / "0.png")
    arguments = ["--train_data_dir", str(tmp_path / "train"), "--reg_data_dir", str(tmp_path / "reg")]
    arguments += ["--resolution", "64", "--dataset_repeats", "7", "--prior_loss_weight", "0.5", "--alpha_mask"]
    options = parse_options(DataOptions, "test", arguments)
    with caplog.at_level("INFO"):
        group, _ = build_dataset_groups(options.dataset, bucket_divisor=32)
    assert said(caplog) == {"beside the names of the folders": "--dataset_repeats"}
    assert [item.subset.alpha_mask for item in group.items] == [True, True]
    (dataset,) = group.datasets
    assert (group.train_image_count, group.reg_image_count, dataset.settings.prior_loss_weight) == (2, 1, 0.5)


def test_images_beside_the_folders_with_repeats_are_counted_and_named(tmp_path, caplog):
    (tmp_path / "train" / "2_cat").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "train" / "2_cat" / "0.png")
    options = DatasetOptions(train_data_dir=str(tmp_path / "train"), resolution="64")
    (tmp_path / "train" / "notes.txt").write_text("not an image", encoding="utf-8")
    (tmp_path / "train" / ".hidden.png").touch()
    resolve_config(options)
    assert "left out" not in caplog.text
    Image.new("RGB", (64, 64)).save(tmp_path / "train" / "a.png")
    resolve_config(options)
    assert f"--train_data_dir: 1 image directly in {tmp_path / 'train'} is left out (a.png)" in caplog.text
    (tmp_path / "train" / "b.TIF").touch()
    resolve_config(options)
    assert f"--train_data_dir: 2 images directly in {tmp_path / 'train'} are left out (a.png, b.TIF)" in caplog.text


def test_a_metadata_file_takes_repeats_and_no_regularisation_folder(tmp_path, caplog):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "meta.json").write_text('{"a.png": {"caption": "x"}}', encoding="utf-8")
    arguments = ["--train_data_dir", str(tmp_path), "--in_json", str(tmp_path / "meta.json"), "--resolution", "64"]
    options = parse_options(DataOptions, "test", [*arguments, "--dataset_repeats", "3", "--reg_data_dir", "r"])
    with caplog.at_level("INFO"):
        group, _ = build_dataset_groups(options.dataset, bucket_divisor=32)
    assert group.sample_count == 3 and said(caplog) == {"beside --in_json": "--reg_data_dir"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "--conditioning_data_dir masks",
            "--conditioning_data_dir has no effect; give conditioning_data_dir in a subset",
        ),
        ("--masked_loss", "--masked_loss has no effect: no subset has conditioning_data_dir or alpha_mask"),
        ("--train_data_dir x", "--train_data_dir has no effect: the datasets come from --dataset_config"),
        ("--reg_data_dir x", "--reg_data_dir has no effect"),
        ("--in_json x", "--in_json has no effect"),
    ],
)
def test_folder_options_beside_a_configuration_are_named(resolve, caplog, arguments, words):
    resolve(arguments)
    assert words in caplog.text


def test_a_dataset_class_is_refused_with_the_way_round(resolve):
    with pytest.raises(
        UserError, match="--dataset_class: dataset classes of your own are not supported.*dataset_config"
    ):
        resolve("--dataset_class package.Class")


def test_every_family_reads_them_alike(resolve):
    from flux_train_network import FluxTrainingOptions

    arguments = " ".join(option for option in SAME if "caption_extension" not in option)
    assert resolve(arguments, script=FluxTrainingOptions) == resolve(arguments)
