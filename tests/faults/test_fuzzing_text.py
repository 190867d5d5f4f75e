"""No text that a user can write ends in a traceback or keeps a program waiting: files, options, prompts, arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.console import silence
from library.data.build import build_dataset_groups
from library.data.captions import CaptionRules, make_caption, read_caption
from library.data.config_file import DatasetTable, GeneralTable, SubsetTable
from library.data.options import CacheOptions, DatasetOptions
from library.families import FAMILIES
from library.generation.image_prompts import ImagePrompt
from library.generation.prompt_sources import ImagePromptOptions, ImagePrompts
from library.options import declared_options, parse_options
from library.prompt_options import FIELD_TYPES, check_prompt_values, parse_prompt_line, read_prompt_file
from library.randomness import python_random
from library.training.network.contract import NetworkOptions, parse_network_args
from library.training.optim.lr_schedulers import LRSchedulerOptions, check_lr_scheduler_options, create_lr_scheduler
from library.training.optim.optimizers import OptimizerOptions, check_optimizer_options
from library.training.output.state import SavedState
from networks import dylora, lora, lora_fa, lora_flux, lora_hunyuan_image, lora_lumina, oft, oft_flux
from tests.faults.corpus import encoded
from tests.faults.fuzzing import endured, inputs, integers, json_of, mistaken, nested, scalars, tables, texts, toml_of

MODULES = (lora, lora_fa, dylora, oft, lora_flux, oft_flux, lora_lumina, lora_hunyuan_image)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two images with captions."""
    folder = tmp_path_factory.mktemp("images")
    for name, size in (("a", (64, 64)), ("b", (96, 48))):
        (folder / f"{name}.png").write_bytes(encoded("PNG", size=size))
        (folder / f"{name}.txt").write_text("a cat, red\na dog, {blue|green}", encoding="utf-8")
    return folder


def written(folder: Path, name: str, text: str | bytes) -> Path:
    """The text in a file beside the images."""
    path = folder / name
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    return path


# ---- datasets --------------------------------------------------------------------------------------------------------


def read_dataset(path: Path) -> None:
    """From the file to the batches of an epoch, and the prompt of each image."""
    cache = CacheOptions(cache_latents_to_disk=True) if len(path.name) % 2 else CacheOptions()
    with silence():
        group, _ = build_dataset_groups(
            DatasetOptions(dataset_config=str(path)), bucket_divisor=16, cache=cache, validation_split=0.3
        )
    if group is not None and len(group.items) < 1000:
        for item in group.items:
            make_caption(
                item.caption, item.subset.captions, rng=python_random(1, "x"), epoch=1, step=1, max_train_steps=4
            )


def datasets(folder: Path) -> st.SearchStrategy[dict[str, Any]]:
    sound = {"image_dir": st.just(folder.as_posix()), "metadata_file": st.just((folder / "m.json").as_posix())}
    sound |= {"resolution": st.sampled_from((64, [64, 64])), "batch_size": st.integers(1, 4)}
    general = tables({name: sound.get(name, scalars) for name in GeneralTable.model_fields})
    subset = tables({name: sound.get(name, scalars) for name in SubsetTable.model_fields})
    good_subset = st.builds(lambda table: {"image_dir": folder.as_posix()} | table, subset)
    dataset = tables({name: sound.get(name, scalars) for name in DatasetTable.model_fields if name != "subsets"})
    subsets = st.one_of(st.lists(st.one_of(subset, good_subset), max_size=3), nested)
    good_dataset = st.builds(lambda table, parts: {"resolution": 64, **table, "subsets": parts}, dataset, subsets)
    listed = st.one_of(
        st.lists(st.one_of(good_dataset, dataset), max_size=3), st.lists(good_dataset, max_size=2), nested
    )
    whole = st.builds(lambda top, parts: {**top, "datasets": parts}, st.one_of(st.just({}), general), listed)
    return st.one_of(whole, whole.flatmap(lambda table: general.map(lambda part: {**table, "general": part})), general)


SOUND_DATASET = """[general]
resolution = 64
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 1
[[datasets]]
batch_size = 2
enable_bucket = true
min_bucket_reso = 32
max_bucket_reso = 128
bucket_reso_steps = 16
[[datasets.subsets]]
image_dir = "FOLDER"
num_repeats = 2
caption_dropout_rate = 0.1
"""


@inputs(25)
@given(data=st.data())
def test_dataset_files(folder, data):
    table = data.draw(datasets(folder))
    name, text = data.draw(st.sampled_from((("d.toml", toml_of(table)), ("data.json", json_of(table)))))
    path = written(folder, name, text)
    endured(lambda: read_dataset(path), path, folder, "validation")


@inputs(10)
@given(data=st.data())
def test_dataset_files_with_mistakes(folder, data):
    path = written(folder, "d.toml", data.draw(mistaken(SOUND_DATASET.replace("FOLDER", folder.as_posix()))))
    endured(lambda: read_dataset(path), path, folder, "image_dir", "validation")


@inputs(15)
@given(data=st.data())
def test_metadata_files(folder, data):
    entry = tables({"caption": texts, "tags": texts, "image_size": st.lists(integers, max_size=3)}, most=3)
    names = st.one_of(st.sampled_from(("a", "b.png", f"{folder}/a.png", "c")), texts)
    whole = data.draw(st.one_of(st.dictionaries(names, st.one_of(entry, nested), max_size=4), nested))
    text = json_of(whole)
    path = written(folder, "m.json", data.draw(st.one_of(st.just(text), mistaken(text))))
    lines = data.draw(st.booleans())
    if lines and isinstance(whole, dict):
        rows = [
            {"image_path": key, **(value if isinstance(value, dict) else {"x": value})} for key, value in whole.items()
        ]
        path = written(folder, "m.jsonl", "\n".join(map(json_of, rows)))
    table = {"resolution": 64, "subsets": [{"image_dir": folder.as_posix(), "metadata_file": path.as_posix()}]}
    config = written(folder, "d.toml", toml_of({"datasets": [table]}))
    endured(lambda: read_dataset(config), path, folder)


@inputs(10)
@given(data=st.data())
def test_kept_image_sizes(folder, data):
    """metadata_cache.json may hold anything: it is a shortcut."""
    entry = tables({"caption": texts, "resolution": st.lists(integers, max_size=3)}, most=3)
    names = st.one_of(st.sampled_from((f"{folder}/a.png", f"{folder}/b.png")), texts)
    text = json_of(data.draw(st.one_of(st.dictionaries(names, st.one_of(entry, nested), max_size=3), nested)))
    kept = written(folder, "metadata_cache.json", data.draw(st.one_of(st.just(text), mistaken(text))))
    subset = {"image_dir": folder.as_posix(), "cache_info": True}
    config = written(folder, "d.toml", toml_of({"datasets": [{"resolution": 64, "subsets": [subset]}]}))
    endured(lambda: read_dataset(config), folder)
    kept.unlink(missing_ok=True)


@inputs(10)
@given(data=st.data())
def test_captions(folder, data):
    path = written(folder, "c.caption", data.draw(st.one_of(st.binary(max_size=200), texts.map(_bytes))))
    rules = CaptionRules(**data.draw(rule_sets()))
    found = endured(lambda: read_caption(path, enable_wildcard=rules.enable_wildcard), path)
    caption = getattr(found, "caption", found)
    for epoch in (0, 1, 2):
        rng = python_random(epoch, "caption")
        endured(lambda: make_caption(caption, rules, rng=rng, epoch=epoch, step=epoch, max_train_steps=3))  # noqa: B023


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def rule_sets() -> st.SearchStrategy[dict[str, Any]]:
    rate, count = st.sampled_from((0.0, 0.5, 1.0)), st.integers(0, 5)
    separator = texts.filter(bool)
    return st.fixed_dictionaries(
        {},
        optional={
            "caption_prefix": texts,
            "caption_suffix": texts,
            "caption_dropout_rate": rate,
            "caption_dropout_every_n_epochs": count,
            "enable_wildcard": st.booleans(),
            "shuffle_caption": st.booleans(),
            "caption_separator": separator,
            "keep_tokens": count,
            "keep_tokens_separator": texts,
            "token_warmup_min": count,
            "token_warmup_step": st.sampled_from((0.0, 0.5, 3.0)),
            "caption_tag_dropout_rate": rate,
            "secondary_separator": texts,
        },
    )


# ---- options ---------------------------------------------------------------------------------------------------------


OPTIONS = {row.key: row.trainer_class().options_class for row in FAMILIES}


@inputs(20)
@given(data=st.data())
def test_configuration_files(tmp_path_factory, data):
    options = OPTIONS[data.draw(st.sampled_from(sorted(OPTIONS)))]
    table = data.draw(tables([name for name in declared_options(options) if name != "output_config"], most=6))
    if data.draw(st.booleans()):
        table = {"section": table}
    text = toml_of(table)
    path = written(tmp_path_factory.getbasetemp(), "config.toml", data.draw(st.one_of(st.just(text), mistaken(text))))
    endured(lambda: parse_options(options, "", ["--config_file", str(path)]), path)


@inputs(20)
@given(data=st.data())
def test_command_lines(data):
    options = OPTIONS[data.draw(st.sampled_from(sorted(OPTIONS)))]
    names = [name for name in declared_options(options) if name not in ("config_file", "output_config")]
    words = st.one_of(st.sampled_from(names).map("--{}".format), texts, scalars.map(str))
    given_words = data.draw(st.lists(words, max_size=6).filter(lambda words: not {"-h", "--help"} & set(words)))
    endured(lambda: parse_options(options, "", given_words))


@inputs(20)
@given(data=st.data())
def test_network_arguments(data):
    module = data.draw(st.sampled_from(MODULES))
    known = sorted(module.NETWORK.argument_names) if hasattr(module.NETWORK, "argument_names") else ARGUMENTS
    words = st.one_of(
        st.builds("{}={}".format, st.sampled_from(known), st.one_of(texts, scalars.map(str), st.just("1,2,3"))), texts
    )
    options = NetworkOptions(network_module="x", network_args=data.draw(st.lists(words, max_size=4)))
    endured(lambda: module.check_network_args(parse_network_args(options)), "--network_args")


ARGUMENTS = (
    "conv_dim conv_alpha rank_dropout module_dropout loraplus_lr_ratio loraplus_unet_lr_ratio block_dims block_alphas "
    "down_lr_weight mid_lr_weight up_lr_weight block_lr_zero_threshold conv_block_dims unit train_t5xxl split_qkv "
    "train_double_block_indices train_single_block_indices img_attn_dim in_dims ggpo_beta ggpo_sigma reg_dims reg_lrs "
    "exclude_patterns include_patterns train_blocks enable_conv verbose only_if_contains dropout"
).split()

literals = st.one_of(texts, scalars.map(str), nested.map(repr), st.sampled_from(("0.9,0.999", "[1]", "(1,)", "1e-8")))


@inputs(20)
@given(data=st.data())
def test_optimizer_arguments(data):
    known = (
        "lr betas eps weight_decay amsgrad momentum nesterov relative_step scale_parameter warmup_init fused foreach"
    )
    words = st.one_of(st.builds("{}={}".format, st.sampled_from(known.split()), literals), texts)
    name = data.draw(st.one_of(st.sampled_from(("AdamW", "SGD", "Adafactor", "SGDNesterov", "NAdam", "Lion")), texts))
    options = OptimizerOptions(optimizer_type=name, optimizer_args=data.draw(st.lists(words, max_size=3)))
    endured(lambda: check_optimizer_options(options), "--optimizer_")


@inputs(20)
@given(data=st.data())
def test_schedule_arguments(data):
    import torch

    known = (
        "num_cycles power min_lr min_lr_rate step_rules timescale num_decay_steps T_max gamma factor patience lr_end"
    )
    words = st.one_of(st.builds("{}={}".format, st.sampled_from(known.split()), literals), texts)
    names = (
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "warmup_stable_decay",
    )
    names += ("piecewise_constant", "reduce_lr_on_plateau", "constant", "linear")
    classes = st.sampled_from(
        (None, None, "CosineAnnealingLR", "StepLR", "CyclicLR", "torch.optim.lr_scheduler.ExponentialLR")
    )
    options = LRSchedulerOptions(
        lr_scheduler=data.draw(st.one_of(st.sampled_from(names), texts)),
        lr_scheduler_type=data.draw(st.one_of(classes, texts)),
        lr_scheduler_args=data.draw(st.lists(words, max_size=3)),
        lr_scheduler_num_cycles=data.draw(st.sampled_from((1, 0, 3))),
        lr_warmup_steps=data.draw(st.sampled_from((0, 2, 0.5))),
    )

    def schedule() -> None:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1e-3)
        check_lr_scheduler_options(options)
        create_lr_scheduler(options, optimizer, 10)

    endured(schedule, "--lr_")


# ---- prompts ---------------------------------------------------------------------------------------------------------


prompt_lines = st.lists(
    st.one_of(
        texts,
        st.builds(
            " --{} {}".format,
            st.sampled_from("w h d s l g n t nl am ow oh ct cl c f glt glr sd le ss cn ctr rcfg fs of ods".split()),
            st.one_of(texts, scalars.map(str), st.just("64")),
        ),
        st.sampled_from(("{a|b}", "{2$$, $$a|b|c}", "{e$$a|b}", "{1-9$$a|b}", " AND ", "(a:1.2)", "[b]", "BREAK")),
    ),
    max_size=5,
).map("".join)


@inputs(20)
@given(line=prompt_lines)
def test_prompt_lines(line):
    with silence():
        prompt = endured(lambda: parse_prompt_line(line, "prompt 1"), "prompt 1")
        if not isinstance(prompt, str):
            endured(lambda: check_prompt_values(prompt, "prompt 1: "), "prompt 1: ")


DEFAULTS = ImagePrompt(width=64, height=64, sample_steps=2, scale=7.5)


@inputs(20)
@given(lines=st.lists(prompt_lines, max_size=3))
def test_prompt_lines_of_gen_img(tmp_path_factory, lines):
    path = written(tmp_path_factory.getbasetemp(), "lines.txt", "\n".join(lines))

    def images() -> None:
        for number, line in enumerate(ImagePrompts(ImagePromptOptions(from_file=str(path), seed=1), DEFAULTS)):
            if number == 100 or len(line) > 1000:
                break

    with silence():
        endured(images, path, "line", "--from_file")


@inputs(20)
@given(data=st.data())
def test_prompt_files(tmp_path_factory, data):
    table = data.draw(tables(list(FIELD_TYPES), most=4))
    text = data.draw(
        st.one_of(
            st.just(
                toml_of(
                    {"prompt": {**table, "subset": data.draw(st.one_of(st.lists(tables(list(FIELD_TYPES))), nested))}}
                )
            ),
            st.just(toml_of(table)),
            st.just(json_of([table, *data.draw(st.lists(st.one_of(prompt_lines, nested), max_size=2))])),
            st.just(json_of(data.draw(nested))),
            prompt_lines,
            st.binary(max_size=60),
        )
    )
    name = data.draw(st.sampled_from(("p.toml", "p.json", "p.txt")))
    path = written(tmp_path_factory.getbasetemp(), name, text)

    def read() -> None:
        for number, prompt in enumerate(read_prompt_file(path), 1):
            check_prompt_values(prompt, f"{path}, prompt {number}: ")

    with silence():
        endured(read, path)


# ---- states ----------------------------------------------------------------------------------------------------------


@inputs(10)
@given(data=st.data())
def test_states(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed-state"
    folder.mkdir(exist_ok=True)
    for name in ("model.safetensors", "optimizer.safetensors"):
        written(folder, name, b"\x02\0\0\0\0\0\0\0{}")
    sound = {"format": "lora-training-state", "version": 1, "current_epoch": 1, "current_step": 0}
    sound |= {"position": {"epoch": 0, "batch": 0, "step": 0}, "identity": {"fixed": {}, "exact": {}}}
    sound |= {"optimizer": {"dict": []}, "rest": {"dict": [["a", {"list": [1]}]]}}
    packed = st.recursive(
        st.one_of(scalars, st.builds(lambda name: {"tensor": name}, texts)),
        lambda inner: st.builds(
            lambda kind, content: {kind: content},
            st.sampled_from(("dict", "list", "tuple", "tensor", "x")),
            st.one_of(inner, st.lists(inner, max_size=3), st.lists(st.lists(inner, max_size=3), max_size=2)),
        ),
        max_leaves=6,
    )
    known = {name: st.one_of(st.just(value), nested) for name, value in sound.items()}
    known |= {"optimizer": packed, "rest": packed}
    known |= {"position": st.fixed_dictionaries(dict.fromkeys(("epoch", "batch", "step"), scalars))}
    text = json_of({**sound, **data.draw(tables(known, most=2))})
    written(
        folder,
        "train_state.json",
        data.draw(st.one_of(st.just(text), mistaken(text), st.just(json_of(data.draw(nested))))),
    )
    endured(lambda: SavedState(folder).optimizer_state(), folder)
