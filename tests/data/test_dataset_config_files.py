"""Dataset configurations: documented files work unchanged, mistakes end in one sentence that says where."""

import json
import os

import pytest

from library.data.config import resolve_config
from library.data.options import DatasetOptions
from library.errors import UserError


@pytest.fixture
def resolve(tmp_path):
    def read(text, *, name="set.toml", validation_split=0.0, validation_seed=None, **options):
        file = tmp_path / name
        file.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
        given = DatasetOptions(dataset_config=str(file), **options)
        return resolve_config(given, validation_split=validation_split, validation_seed=validation_seed)

    return read


def refused(resolve, text, **options):
    with pytest.raises(UserError) as error:
        resolve(text, **options)
    return str(error.value)


def minimal(dataset="", subset="", general=""):
    return f"{general}\n[[datasets]]\nresolution = 512\n{dataset}\n[[datasets.subsets]]\nimage_dir = 'x'\n{subset}"


def test_documented_multi_resolution_file(resolve, documented):
    first, second = resolve(documented["multi_resolution"])
    assert (first.resolution, first.batch_size, first.enable_bucket) == ((1024, 1024), 2, True)
    assert (second.resolution, second.batch_size) == ((768, 768), 3)
    subset = second.subsets[0]
    assert subset.flip_aug and not subset.color_aug and subset.caption_extension == ".txt"
    assert subset.captions.keep_tokens_separator == "|||" and subset.captions.caption_tag_dropout_rate == 0


def test_documented_validation_file(resolve, documented):
    plain, tenth, whole = resolve(documented["validation"])
    assert [entry.subsets[0].validation_split for entry in (plain, tenth, whole)] == [0.0, 0.1, 1.0]
    assert all(entry.subsets[0].validation_seed == 42 for entry in (plain, tenth, whole))
    assert all(entry.enable_bucket and entry.resolution == (1024, 1024) for entry in (plain, tenth, whole))


def test_documented_interpolation_name(resolve, documented):
    text = documented["interpolation"]
    assert resolve(text)[0].resize_interpolation == "lanczos"
    assert resolve(text.replace("interpolation_type", "resize_interpolation"))[0].resize_interpolation == "lanczos"


def test_a_value_is_looked_up_from_subset_to_command_line(resolve):
    text = minimal(general="[general]\nnum_repeats = 4", dataset="num_repeats = 3", subset="num_repeats = 2")
    assert resolve(text, dataset_repeats=5)[0].subsets[0].num_repeats == 2
    assert resolve(text.replace("num_repeats = 2", ""), dataset_repeats=5)[0].subsets[0].num_repeats == 3
    assert resolve(minimal(general="[general]\nnum_repeats = 4"), dataset_repeats=5)[0].subsets[0].num_repeats == 4
    assert resolve(minimal(), dataset_repeats=5)[0].subsets[0].num_repeats == 5
    assert resolve(minimal())[0].subsets[0].num_repeats == 1


def test_false_in_a_nearer_table_wins_over_true(resolve):
    text = minimal(general="[general]\nflip_aug = true", subset="flip_aug = false")
    assert resolve(text, flip_aug=True)[0].subsets[0].flip_aug is False


def test_command_line_values_reach_the_datasets(resolve):
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'x'"
    options = {
        "resolution": "512,768",
        "train_batch_size": 4,
        "caption_extention": "txt",
        "face_crop_aug_range": "2.0,4.0",
        "prior_loss_weight": 0.5,
    }
    entry = resolve(text, validation_split=0.2, validation_seed=7, **options)[0]
    subset = entry.subsets[0]
    assert (entry.resolution, entry.batch_size, entry.prior_loss_weight) == ((512, 768), 4, 0.5)
    assert (subset.caption_extension, subset.face_crop_aug_range) == (".txt", (2.0, 4.0))
    assert (subset.validation_split, subset.validation_seed) == (0.2, 7)


def test_integers_count_as_numbers_everywhere(resolve):
    text = minimal(
        dataset="network_multiplier = 1\nvalidation_split = 1",
        subset="caption_dropout_rate = 1\nface_crop_aug_range = [2, 4]\ntoken_warmup_step = 10",
    )
    entry = resolve(text)[0]
    assert entry.network_multiplier == 1.0 and entry.subsets[0].face_crop_aug_range == (2.0, 4.0)


def test_json_files_and_null_mean_the_same(resolve):
    data = {"datasets": [{"resolution": [256, 512], "subsets": [{"image_dir": "x", "caption_prefix": None}]}]}
    assert resolve(data, name="SET.JSON")[0].resolution == (256, 512)


def test_subset_split_is_accepted_as_documented_elsewhere(resolve):
    subset = resolve(minimal(subset="validation_split = 0.5\nvalidation_seed = 3"))[0].subsets[0]
    assert (subset.validation_split, subset.validation_seed) == (0.5, 3)


def test_repeated_and_empty_subsets_are_left_out_with_a_warning(resolve, caplog):
    text = minimal() + "\n[[datasets.subsets]]\nimage_dir = 'x'\n[[datasets.subsets]]\nimage_dir = 'y'\nnum_repeats = 0"
    assert len(resolve(text)[0].subsets) == 1
    assert "is in this dataset already" in caplog.text and "num_repeats is 0" in caplog.text


def test_kinds_follow_the_subsets(resolve):
    text = "resolution = 512\n[[datasets]]\n[[datasets.subsets]]\nmetadata_file = 'm.json'"
    assert resolve(text)[0].kind == "fine_tuning"
    assert resolve(minimal(subset="conditioning_data_dir = 'm'"), masked_loss=True)[0].kind == "conditioning"
    assert resolve(minimal())[0].kind == "dreambooth"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a = = 2", ["set.toml", "not valid TOML", "line 1"]),
        (minimal(general="enable_bucke = true"), ["at the root", '"enable_bucke"', 'Did you mean "enable_bucket"?']),
        (minimal(general="[general]\nenable_bucke = true"), ["in [general]", 'Did you mean "enable_bucket"?']),
        (minimal(dataset="batchsize = 2"), ["[[datasets]] number 1", 'Did you mean "batch_size"?']),
        (minimal(subset="num_repeat = 2"), ["[[datasets.subsets]] number 1", 'Did you mean "num_repeats"?']),
        (minimal(subset="resolution = 512"), ['"resolution"', "belongs in [[datasets]] or [general]"]),
        (minimal(dataset="is_reg = true"), ['"is_reg"', "belongs in [[datasets.subsets]]"]),
        (minimal(dataset="prior_loss_weight = 0.5"), ["command line option: --prior_loss_weight"]),
        (minimal(dataset="batch_size = 'two'"), ['"batch_size" must be an integer, not "two"']),
        (minimal(dataset="batch_size = 1.5"), ['"batch_size" must be an integer, not 1.5']),
        (minimal(dataset="batch_size = 0"), ['"batch_size" must be at least 1, not 0']),
        (minimal(dataset="batch_size = true"), ['"batch_size" must be an integer, not true']),
        (minimal(dataset="enable_bucket = 1"), ['"enable_bucket" must be true or false, not 1']),
        (minimal(dataset="validation_split = 1.5"), ['"validation_split" must be at most 1']),
        (minimal(dataset="interpolation_type = 'bicubc'"), ["must be one of bicubic", 'not "bicubc"']),
        (
            minimal(dataset="interpolation_type = 'area'\nresize_interpolation = 'box'"),
            ["interpolation_type and resize_interpolation differ"],
        ),
        (minimal(subset="face_crop_aug_range = [4, 2]"), ["face_crop_aug_range", "low <= high"]),
        (minimal(subset="face_crop_aug_range = [1.0, inf]"), ["face_crop_aug_range", "low <= high"]),
        (minimal(subset="token_warmup_step = nan"), ['"token_warmup_step" must be a finite number, not NaN']),
        (minimal(subset="caption_dropout_rate = nan"), ['"caption_dropout_rate" must be a finite number']),
        (minimal(dataset="network_multiplier = 0.0"), ['"network_multiplier" must be', "other than 0", "not 0.0"]),
        (minimal(dataset="network_multiplier = 1e308"), ['"network_multiplier" must be', "from -1000 to 1000"]),
        (minimal(dataset="network_multiplier = inf"), ['"network_multiplier" must be a finite number']),
        (minimal(dataset="max_bucket_reso = 1000000000"), ['"max_bucket_reso" must be at most 65536']),
        (minimal(dataset="min_bucket_reso = 1000000000"), ['"min_bucket_reso" must be at most 65536']),
        (minimal(dataset="resolution = [1000000000, 64]").replace("resolution = 512\n", ""), ["at most 65536 pixels"]),
        (minimal(dataset="batch_size = {a = 1}"), ['"batch_size" must be an integer, not {"a": 1}']),
        (minimal(dataset="batch_size = [[1]]"), ['"batch_size" must be an integer, not [[1]]']),
        (minimal(subset="num_repeats = 10000000000"), ["num_repeats must be at most 1,000,000"]),
        (minimal(subset="keep_tokens = " + "9" * 5000), ["not valid TOML: an integer has too many digits"]),
        (minimal(dataset=f"batch_size = {'9' * 4000}"), ['"batch_size" must be at most 65536, not 999']),
        (minimal(subset=f"custom_attributes.a = {'[' * 10000}{']' * 10000}"), ["nested too deeply"]),
        ('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "D:\\Users\\me"', ["line 3", "single quotes"]),
        ('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "D:\\new"', ['"image_dir" must be a path', "single quotes"]),
        (minimal(subset="caption_separator = ''"), ["caption_separator", "must not be empty"]),
        (minimal(subset="conditioning_data_dir = 'm'"), ["conditioning_data_dir needs --masked_loss"]),
        ("flip_aug = true\n[general]\nflip_aug = false\n" + minimal(), ["flip_aug has one value at the root"]),
        ("[general]\nresolution = 512", ["there is no [[datasets]] table"]),
        ("datasets = []", ["there is no [[datasets]] table"]),
        ("[[datasets]]\nresolution = 512", ["there is no [[datasets.subsets]] table"]),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'x'", ["the resolution is missing"]),
        ("[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nnum_repeats = 1", ["image_dir is missing"]),
        ("[[datasets]]\nresolution = [512]\n[[datasets.subsets]]\nimage_dir = 'x'", ["[width, height], not [512]"]),
        (minimal() + "\n[[datasets.subsets]]\nmetadata_file = 'm.json'", ["with and without metadata_file"]),
        (
            minimal(subset="metadata_file = 'm.json'\nclass_tokens = 'a'"),
            ['"class_tokens" cannot be used', "metadata_file"],
        ),
    ],
)
def test_mistakes_are_named_with_file_place_and_remedy(resolve, text, parts):
    message = refused(resolve, text)
    for part in ["set.toml", *parts]:
        assert part in message


def test_several_mistakes_are_told_at_once(resolve):
    message = refused(resolve, minimal(dataset="batch_sise = 1", subset="num_repeats = 'x'"))
    assert "batch_sise" in message and "num_repeats" in message and message.count("\n") == 1


def test_broken_json_names_the_line(resolve):
    assert "line 2" in refused(resolve, '{"datasets":\n[,', name="set.json")


def test_a_byte_order_mark_is_no_part_of_the_file(resolve):
    assert resolve("\ufeff" + minimal()) == resolve(minimal())


def test_json_beyond_the_limits_is_one_sentence(resolve):
    assert "nested too deeply" in refused(resolve, "[" * 100_000, name="set.json")
    assert "too many digits" in refused(resolve, '{"datasets": ' + "9" * 5000 + "}", name="set.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes of POSIX systems")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "set.toml")
    with pytest.raises(UserError, match="set.toml: is not a regular file"):
        resolve_config(DatasetOptions(dataset_config=str(tmp_path / "set.toml")))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UserError, match="folder.toml: is a folder, not a file"):
        resolve_config(DatasetOptions(dataset_config=str(tmp_path / "folder.toml")))


def test_other_files_are_refused(resolve, tmp_path):
    assert "neither a .toml nor a .json" in refused(resolve, "", name="set.yaml")
    with pytest.raises(UserError, match="there is no file"):
        resolve_config(DatasetOptions(dataset_config=str(tmp_path / "none.toml")))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"resolution": "512x512"}, '"width,height"'),
        ({"resolution": "0"}, '"width,height"'),
        ({"face_crop_aug_range": "4,2"}, "low,high"),
        ({"train_batch_size": 0}, "--train_batch_size"),
        ({"caption_dropout_rate": 2.0}, "--caption_dropout_rate"),
        ({"caption_separator": ""}, "--caption_separator"),
    ],
)
def test_wrong_command_line_values_are_refused(resolve, options, part):
    assert part in refused(resolve, minimal(), **options)


def test_nothing_to_train_on_is_said():
    with pytest.raises(UserError, match="--dataset_config or --train_data_dir"):
        resolve_config(DatasetOptions())


def test_custom_classes_are_refused_by_name():
    with pytest.raises(UserError, match="--dataset_class"):
        resolve_config(DatasetOptions(dataset_class="a.B"))


def test_folders_named_with_repeats_and_class(tmp_path, caplog):
    for name in ("10_sks_girl", "5_", "3", "x_y", "0_no"):
        (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "reg" / "2_girl").mkdir(parents=True)
    options = DatasetOptions(
        train_data_dir=str(tmp_path / "train"), reg_data_dir=str(tmp_path / "reg"), resolution="64"
    )
    entry = resolve_config(options)[0]
    described = [(subset.num_repeats, subset.class_tokens, subset.is_reg) for subset in entry.subsets]
    assert described == [(10, "sks_girl", False), (3, "", False), (5, "", False), (2, "girl", True)]
    assert "x_y is left out" in caplog.text


def test_a_folder_without_such_folders_is_explained(tmp_path):
    with pytest.raises(UserError, match="named like 10_name"):
        resolve_config(DatasetOptions(train_data_dir=str(tmp_path), resolution="64"))
    with pytest.raises(UserError, match="there is no folder"):
        resolve_config(DatasetOptions(train_data_dir=str(tmp_path / "none"), resolution="64"))


def test_config_file_wins_over_folders_with_a_word(resolve, caplog):
    resolve(minimal(), train_data_dir="somewhere")
    assert "--train_data_dir has no effect" in caplog.text
