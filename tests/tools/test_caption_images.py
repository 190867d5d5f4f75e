"""Captions by a model: what it would say by itself stands in the files, and what is wrong with its files is named."""

from __future__ import annotations

import json
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from library.annotation.captioner import QwenCaptioner, SentenceOptions
from library.annotation.tagger import Tagger
from library.data.captions import read_caption
from library.lean_imports import transformers_class
from library.options import declared_options
from tests.running import run_in_process
from tests.tools import tiny_annotators as tiny
from tools.caption_images import CaptionImagesOptions

SIZES = {"a": (40, 50), "b": (70, 30), "c": (90, 90)}


def draw_images(folder: Path, *names: str) -> Path:
    """Noise in different colours and shapes; ``a`` is transparent in its upper half."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        width, height = SIZES.get(name, (48, 48))
        draws = numpy.random.default_rng(ord(name[0]) + number)
        pixels = (draws.random((height, width, 4)) * draws.integers(0, 256, 4)).astype(numpy.uint8)
        pixels[..., 3] = 255
        if name == "a":
            pixels[: height // 2, :, 3] = 0
        Image.fromarray(pixels if name == "a" else pixels[..., :3]).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    return draw_images(tmp_path / "images", *SIZES)


def caption(*arguments: object):
    return run_in_process("tools/caption_images.py", *arguments)


def captions(folder: Path, extension: str = ".txt") -> dict[str, str]:
    """By name, without the line end that each file has."""
    files = sorted(folder.rglob(f"*{extension}"))
    texts = {file.relative_to(folder).with_suffix("").as_posix(): file.read_text(encoding="utf-8") for file in files}
    assert all(text.endswith("\n") and text.count("\n") == 1 for text in texts.values())
    return {name: text[:-1] for name, text in texts.items()}


# ---- taggers -------------------------------------------------------------------------------------------------------


def probabilities(path: Path) -> dict[str, float]:
    """What the tiny tagger must say of an image, computed without onnxruntime."""
    image = Image.open(path).convert("RGBA")
    square = Image.new("RGBA", (max(image.size), max(image.size)), (255, 255, 255, 255))
    offset = ((square.width - image.width) // 2, (square.height - image.height) // 2)
    square.alpha_composite(image, offset)
    small = square.convert("RGB").resize((tiny.SIDE, tiny.SIDE), Image.Resampling.BICUBIC)
    blue_green_red = numpy.asarray(small).astype(numpy.float64)[:, :, [2, 1, 0]]
    weights, bias = tiny.tagger_weights()
    values = 1 / (1 + numpy.exp(-(blue_green_red.reshape(-1) @ weights + bias)))
    return {name: float(value) for (name, _), value in zip(tiny.TAGS, values)}


def expected_tags(path: Path, general: float = 0.35, character: float = 0.35) -> list[str]:
    values = probabilities(path)
    assert all(min(abs(value - limit) for limit in (general, character)) > 1e-3 for value in values.values())
    limits = {0: general, 4: character}
    return [name for name, category in tiny.TAGS if category in limits and values[name] >= limits[category]]


def rating(path: Path) -> str:
    values = probabilities(path)
    return max(("general", "sensitive"), key=values.__getitem__)


def test_a_tagger_finds_what_its_network_says(images, models):
    wanted = {name: ", ".join(expected_tags(images / f"{name}.png")) for name in SIZES}
    assert len(set(wanted.values())) > 1 and all(wanted.values())
    result = caption("--image_dir", images, "--model", models("tagger"), "--batch_size", 2)
    assert result.returncode == 0 and captions(images) == wanted
    assert "captions: 3 written, 0 there already" in result.stderr
    assert read_caption(images / "a.txt", enable_wildcard=False).caption == wanted["a"]


def test_each_option_of_the_tags(images, models):
    model = models("tagger")
    values = probabilities(images / "b.png")
    everything = expected_tags(images / "b.png", 0, 0)
    general = [name for name, category in tiny.TAGS if category == 0]
    spelled = {"long_hair": "long hair", "simple_background": "simple background", "red_eyes": "red eyes"}
    spelled |= {"hatsune_miku": "hatsune miku", "saber_(fate)": "saber (fate)"}
    limit = sorted(values[name] for name in general)[2] - 1e-4
    likely = [name for name in general if values[name] >= limit]
    characters = ["hatsune_miku", "saber_(fate)"]
    assert everything == [*general, *characters] and 0 < len(likely) < len(general)
    wanted_by = {
        (): everything,
        ("--general_threshold", limit): [*likely, *characters],
        ("--character_threshold", "1"): general,
        ("--remove_underscore",): [spelled.get(name, name) for name in everything],
        ("--undesired_tags", "1girl, red_eyes"): [name for name in everything if name not in ("1girl", "red_eyes")],
        ("--always_first_tags", "red_eyes,solo,1girl"): ["red_eyes", "1girl", *general[1:-1], *characters],
        ("--tag_replacement", "1girl,woman;red_eyes,eyes"): ["woman", *general[1:-1], "eyes", *characters],
        ("--use_rating_tags",): [rating(images / "b.png"), *everything],
        ("--use_rating_tags_as_last_tag",): [*everything, rating(images / "b.png")],
        ("--character_tags_first",): [*characters, *general],
        ("--character_tag_expand",): [*general, "hatsune_miku", "saber", "fate"],
    }
    for options, wanted in wanted_by.items():
        caption("--image_dir", images, "--model", model, "--overwrite", "--thresh", 0, *options)
        assert captions(images)["b"] == ", ".join(wanted), options
    result = caption("--image_dir", images, "--model", model, "--overwrite", "--thresh", 0, "--frequency_tags")
    assert "long_hair: 3\n" in result.stdout


def test_text_around_tags_and_between_them(images, models):
    tags = expected_tags(images / "c.png")
    caption("--image_dir", images, "--model", models("tagger"), "--caption_separator", "; ", "--prefix", "photo, ",
            "--suffix", " , grainy", "--caption_extension", "tags")  # fmt: skip
    assert captions(images, ".tags")["c"] == f"photo, {'; '.join(tags)} , grainy"


def test_a_network_for_batches_of_one_size(images, tmp_path):
    model = tiny.write_tagger(tmp_path / "fixed", batch=2)
    caption("--image_dir", images, "--model", model / "model.onnx", "--batch_size", 3)
    assert captions(images) == {name: ", ".join(expected_tags(images / f"{name}.png")) for name in SIZES}


# ---- models of transformers ----------------------------------------------------------------------------------------


@cache
def opened(kind: str, folder: Path) -> tuple[Any, Any, Any]:
    """A model as transformers opens it, what prepares images for it, and its tokenizer."""
    names = {"blip": "Blip", "florence": "Florence2", "qwen": "Qwen2_5_VL"}
    module = {"florence": "florence2", "qwen": "qwen2_5_vl"}.get(kind, kind)
    model_class = transformers_class(f"{module}.modeling_{module}", f"{names[kind]}ForConditionalGeneration")
    model = model_class.from_pretrained(folder).eval()
    if kind == "qwen":
        images = transformers_class("auto.image_processing_auto", "AutoImageProcessor")
        tokenizer = transformers_class("auto.tokenization_auto", "AutoTokenizer").from_pretrained(folder)
        return model, images.from_pretrained(folder, backend="pil"), tokenizer
    processor = transformers_class("auto.processing_auto", "AutoProcessor").from_pretrained(folder, backend="pil")
    return model, processor, processor.tokenizer


def said_by_itself(kind: str, folder: Path, path: Path, prompt: str | None, **search: object) -> str:
    """What transformers' own class says of one image, with its own processor where that works without torchvision."""
    image = Image.open(path).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    model, processor, tokenizer = opened(kind, folder)
    if kind == "qwen":
        inputs = dict(processor(images=[image], return_tensors="pt"))
        count = int(inputs["image_grid_thw"].prod()) // 4
        text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        text += "<|image_pad|>" * count + f"<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n"
        inputs["input_ids"] = tokenizer(text, return_tensors="pt").input_ids
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == 5).int()
        before = inputs["input_ids"].shape[1]
    else:
        texts = {} if prompt is None else {"text": prompt}
        inputs, before = processor(images=image, return_tensors="pt", **texts), 0
    torch.manual_seed(5)
    found = model.generate(**inputs, **search)[0, before:]
    return " ".join(tokenizer.decode(found, skip_special_tokens=True).removeprefix("[DEC]").split())


KINDS = [
    ("blip", [], None),
    ("blip", ["--prompt", "a big"], "a big"),
    ("florence", [], "<MORE_DETAILED_CAPTION>"),
    ("florence", ["--prompt", "caption"], "<CAPTION>"),
    ("qwen", [], "Describe this image in one paragraph."),
    ("qwen", ["--prompt", "Name it."], "Name it."),
]


@pytest.mark.parametrize(("kind", "options", "prompt"), KINDS)
def test_a_model_says_in_batches_what_it_says_by_itself(kind, options, prompt, images, models):
    folder = models(kind)
    result = caption("--image_dir", images, "--model", folder, "--max_length", 9, "--batch_size", 3, *options)
    assert result.returncode == 0, result.stderr
    wanted = {
        name: said_by_itself(kind, folder, images / f"{name}.png", prompt, max_new_tokens=9, do_sample=False)
        for name in SIZES
    }
    assert captions(images) == wanted and len(set(wanted.values())) > 1


def test_the_search_for_words(images, models):
    folder = models("qwen")
    instruction = "Describe this image in one paragraph."

    def said(*options: object) -> str:
        caption("--image_dir", images, "--model", folder, "--overwrite", "--max_length", 6, *options)
        return captions(images)["b"]

    def by_itself(**search: object) -> str:
        return said_by_itself("qwen", folder, images / "b.png", instruction, **{"max_new_tokens": 6, **search})

    assert said("--num_beams", 3) == by_itself(num_beams=3, do_sample=False)
    drawn = by_itself(do_sample=True, top_p=0.9, top_k=0, temperature=1.0)
    assert said("--top_p", 0.9, "--seed", 5, "--batch_size", 1) == drawn != said("--top_p", 0.9, "--batch_size", 1)
    result = caption("--image_dir", images, "--model", folder, "--overwrite", "--max_length", 6)
    assert "a larger --max_length prevents: 3 (a.png, b.png, c.png)" in result.stderr
    blip = models("blip")
    short, long = (said("--model", blip, "--min_length", length, "--max_length", 20) for length in (0, 20))
    assert len(long.replace(" ", "")) > len(short.replace(" ", ""))


def test_qwen_sees_a_large_image_with_so_many_tokens_that_a_gpu_has_room(models, tmp_path):
    folder = Path(shutil.copytree(models("qwen"), tmp_path / "qwen"))
    settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    settings["size"] = {"shortest_edge": 3136, "longest_edge": 12845056}  # as published
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    captioner = QwenCaptioner(folder, "qwen2_5_vl", SentenceOptions(), torch.device("cpu"), torch.float32)
    inputs = captioner.inputs([Image.new("RGB", (1500, 1200)), Image.new("RGB", (280, 140))])
    tokens = (inputs["input_ids"] == 5).sum(dim=1).tolist()
    assert 1200 < tokens[0] <= 1280 and tokens[1] == 50


def test_half_precision_is_another_computation(images, models):
    folder = models("qwen")
    texts = []
    for dtype in ("fp32", "bf16"):
        result = caption("--image_dir", images, "--model", folder, "--dtype", dtype, "--device", "cpu",
                         "--max_length", 24, "--overwrite")  # fmt: skip
        assert result.returncode == 0
        texts.append(captions(images))
    assert texts[0] != texts[1] and all(texts[1].values())


# ---- what is there already -----------------------------------------------------------------------------------------


def test_captions_that_are_there_are_kept_made_anew_or_added_to(images, models):
    model = models("tagger")
    tags = expected_tags(images / "a.png")
    (images / "a.txt").write_text(f"my own, {tags[0]}\n", encoding="utf-8")
    (images / "b.txt").write_text("", encoding="utf-8")  # which training would refuse
    result = caption("--image_dir", images, "--model", model, "--dry_run")
    assert "b.png -> " in result.stderr and "captions: 2 would be made, 1 there already" in result.stderr
    assert not (images / "c.txt").exists()
    result = caption("--image_dir", images, "--model", model)
    assert "captions: 2 written, 1 there already" in result.stderr
    assert captions(images)["a"] == f"my own, {tags[0]}"
    result = caption("--image_dir", images, "--model", model, "--append_tags")
    assert "captions: 1 written, 2 there already" in result.stderr
    assert captions(images)["a"] == ", ".join(["my own", *tags])
    florence = models("florence")
    caption("--image_dir", images, "--model", florence, "--append_tags", "--max_length", 8)
    both = captions(images)
    sentence = said_by_itself(
        "florence", florence, images / "a.png", "<MORE_DETAILED_CAPTION>", max_new_tokens=8, num_beams=1
    )
    assert both["a"] == ", ".join(["my own", *tags, sentence])
    result = caption("--image_dir", images, "--model", florence, "--append_tags", "--max_length", 8)
    assert "captions: 0 written, 3 there already" in result.stderr and captions(images) == both
    caption("--image_dir", images, "--model", model, "--overwrite")
    assert captions(images)["a"] == ", ".join(tags)
    # The model is not even opened where nothing is to be done.
    broken = tiny.write_tagger(images.parent / "broken")
    (broken / "model.onnx").write_bytes(b"nothing")
    assert caption("--image_dir", images, "--model", broken).returncode == 0


def test_every_line_of_a_caption_is_added_to(images, models):
    tags = expected_tags(images / "a.png")
    (images / "a.txt").write_text(f"a {{red|green}} one\n\n{tags[0]}, two\n", encoding="utf-8")
    (images / "b.txt").symlink_to("nowhere.txt")
    caption("--image_dir", images, "--model", models("tagger"), "--append_tags")
    wanted = [", ".join(["a {red|green} one", *tags]), ", ".join([tags[0], "two", *tags[1:]])]
    assert (images / "a.txt").read_text(encoding="utf-8") == "\n".join(wanted) + "\n"
    assert (images / "b.txt").read_text(encoding="utf-8") == ", ".join(expected_tags(images / "b.png")) + "\n"


def test_the_folders_and_extensions_of_a_dataset_configuration(tmp_path, models, monkeypatch):
    one, two = draw_images(tmp_path / "one", "a"), draw_images(tmp_path / "two", "b")
    draw_images(tmp_path / "three", "c")
    config = tmp_path / "data.toml"
    config.write_text(
        f"""
        [general]
        caption_extension = ".cap"
        [[datasets]]
        resolution = 64
        [[datasets.subsets]]
        image_dir = '{one}'
        [[datasets.subsets]]
        image_dir = '{two}'
        caption_extension = "txt"
        [[datasets]]
        resolution = 32
        [[datasets.subsets]]
        image_dir = '{one}'
        [[datasets]]
        resolution = 32
        [[datasets.subsets]]
        image_dir = '{tmp_path / "three"}'
        metadata_file = "meta.json"
        """,
        encoding="utf-8",
    )
    result = caption("--dataset_config", config, "--model", models("tagger"))
    assert result.returncode == 0 and "captions: 2 written" in result.stderr and "metadata_file" in result.stderr
    assert captions(one, ".cap").keys() == {"a"} and captions(two).keys() == {"b"}
    assert not list((tmp_path / "three").glob("*.[tc]*"))


def test_sub_folders_and_images_that_share_a_caption(tmp_path, models):
    folder = tmp_path / "images"
    for name in ("10_cat", "10_cat/deep", ".hidden"):
        draw_images(folder / name, "a", "b")
    shutil.copy(folder / "10_cat" / "b.png", folder / "10_cat" / "b.bmp")
    assert "--recursive takes the 5" in caption("--image_dir", folder, "--model", models("tagger")).stderr
    result = caption("--image_dir", folder, "--model", models("tagger"), "--recursive")
    assert captions(folder).keys() == {"10_cat/a", "10_cat/b", "10_cat/deep/a", "10_cat/deep/b"}
    assert "b.bmp and b.png share" in result.stderr


def test_broken_images_are_named_and_the_others_have_captions(images, models):
    (images / "bad.png").write_bytes((images / "a.png").read_bytes()[:60])
    result = caption("--image_dir", images, "--model", models("tagger"), "--batch_size", 2)
    assert result.returncode == 1 and captions(images).keys() == set(SIZES)
    assert f"{images / 'bad.png'}: " in result.stderr and "1 images could not be read" in result.stderr


def test_an_image_of_a_shape_that_the_model_refuses_is_named(images, models):
    Image.new("RGB", (1, 250)).save(images / "line.png")
    result = caption("--image_dir", images, "--model", models("qwen"), "--max_length", 2)
    assert result.returncode == 1 and captions(images).keys() == set(SIZES)
    assert f"{images / 'line.png'}: is 1x250; " in result.stderr


def test_an_interrupted_run_goes_on_with_what_is_missing(images, models, monkeypatch):
    batches = []
    tagged = Tagger.__call__

    def pressed(self: Tagger, prepared: list) -> list:
        batches.append(len(prepared))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return tagged(self, prepared)

    monkeypatch.setattr(Tagger, "__call__", pressed)
    where = ("--image_dir", images, "--model", models("tagger"), "--batch_size", 1)
    result = caption(*where)
    assert result.returncode == 130 and captions(images).keys() == {"a"}
    result = caption(*where)
    assert "captions: 2 written, 1 there already" in result.stderr and batches == [1, 1, 1, 1]
    assert captions(images).keys() == set(SIZES) and not list(images.glob(".*"))


def test_a_device_that_is_full_is_one_sentence(images, models, monkeypatch):
    monkeypatch.setattr(Tagger, "__call__", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    said = refused("--image_dir", images, "--model", models("tagger"))
    assert "There is not enough memory for a batch of 3 images; give a smaller --batch_size" in said


# ---- mistakes ------------------------------------------------------------------------------------------------------


def refused(*arguments: object) -> str:
    result = caption(*arguments)
    assert result.returncode == 2 and "error: " in result.stderr and "Traceback" not in result.stderr
    return result.stderr


def test_files_of_a_model_that_do_not_do(images, models, tmp_path):
    def copy(kind: str, name: str) -> Path:
        return Path(shutil.copytree(models(kind), tmp_path / name))

    where = ("--image_dir", images, "--model")
    said = refused(*where, "SmilingWolf/wd-swinv2-tagger-v3")
    assert 'hf download SmilingWolf/wd-swinv2-tagger-v3 --local-dir models/wd-swinv2-tagger-v3"' in said
    assert "there is no folder" in refused(*where, tmp_path / "nothing")
    assert "--model is missing" in refused("--image_dir", images)
    (without := copy("tagger", "no_table") / "selected_tags.csv").unlink()
    assert "selected_tags.csv, the table of the tags, is missing" in refused(*where, without.parent)
    short = tiny.write_tagger(tmp_path / "short", tags=tiny.TAGS[:-2])
    assert "tells 10 tags apart, but selected_tags.csv beside it names 8" in refused(*where, short)
    (table := copy("tagger", "other_table") / "selected_tags.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    assert 'needs the columns "name" and "category"' in refused(*where, table.parent)
    (table := copy("tagger", "bad_row") / "selected_tags.csv").write_text("name,category\nx,y\n", encoding="utf-8")
    assert "line 2" in refused(*where, table.parent)
    table.write_text(f"name,category\n{'x' * 200_000},0\n", encoding="utf-8")
    assert "is not a table of tags (field larger than" in refused(*where, table.parent)
    (network := copy("tagger", "damaged") / "model.onnx").write_bytes(b"damaged")
    assert "cannot be read as an ONNX model" in refused(*where, network)
    network.unlink()
    assert "No such file" in refused(*where, network.parent)
    os.mkfifo(network)
    assert f"{network} is not a regular file" in refused(*where, network.parent)
    tiny.change_config(odd := copy("blip", "odd"), model_type="llava")
    assert "is a model of the type llava; captions" in refused(*where, odd) and "florence2" in refused(*where, odd)
    (nameless := tmp_path / "nameless").mkdir()
    assert "has no config.json" in refused(*where, nameless)
    tiny.change_config(remote := copy("florence", "remote"), auto_map={"AutoModel": "modeling.Own"})
    assert "brings program code of its own, which is not run; " in refused(*where, remote)
    (weights := copy("florence", "cut") / "model.safetensors").write_bytes(weights.read_bytes()[:5000])
    assert f"{weights.parent} cannot be read" in refused(*where, weights.parent)
    tiny.change_config(larger := copy("blip", "larger"), text_config={"num_hidden_layers": 3, "hidden_size": 16})
    assert "--model: " in refused(*where, larger)
    (tokenizer := copy("qwen", "mute") / "tokenizer.json").unlink()
    assert "the tokenizer or image settings of" in refused(*where, tokenizer.parent)


def test_weights_that_are_missing_are_not_made_up(images, models, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(models("qwen"), tmp_path / "qwen"))
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if "mlp.gate_proj" in name)
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights" in refused("--image_dir", images, "--model", folder)


def test_a_caption_may_be_as_long_as_the_model_has_positions(images, models):
    """By default too, where a model has fewer than a caption usually takes."""
    for model, *options in (("blip",), ("blip", "--prompt", "ab", "--max_length", 62), ("florence",)):
        result = caption("--image_dir", images, "--model", models(model), "--overwrite", *options)
        assert result.returncode == 0 and len(captions(images)) == len(SIZES), result.stderr


def test_options_that_cannot_be_or_do_nothing(images, models, tmp_path):
    tagger, blip = models("tagger"), models("blip")
    where = ("--image_dir", images, "--model")
    assert "either --image_dir or --dataset_config" in refused("--model", tagger)
    assert "there is no folder" in refused("--image_dir", tmp_path / "no", "--model", tagger)
    (empty := tmp_path / "empty").mkdir()
    assert f"there are no images in {empty}." in refused("--image_dir", empty, "--model", tagger)
    assert "mutually exclusive" in refused(*where, tagger, "--overwrite", "--append_tags")
    assert "--batch_size" in refused(*where, tagger, "--batch_size", 0)
    assert "--thresh must be a probability" in refused(*where, tagger, "--thresh", 35)
    assert "--tag_replacement must be like" in refused(*where, tagger, "--tag_replacement", "a;b")
    assert "--max_length" in refused(*where, blip, "--max_length", 0)
    beyond = refused(*where, blip, "--prompt", "ab", "--max_length", 63)
    assert "--max_length: prompt and caption have 65 tokens then; the model takes 64." in beyond
    assert "have 129 tokens then; the model takes 128." in refused(*where, models("florence"), "--max_length", 129)
    assert "--num_beams" in refused(*where, blip, "--num_beams", 0)
    assert "--top_p" in refused(*where, blip, "--top_p", 1.5)
    assert "--device" in refused(*where, blip, "--device", "cuda:9")
    assert "not a captioning task of Florence-2" in refused(*where, models("florence"), "--prompt", "draw it")
    said = caption(*where, tagger, "--prompt", "a", "--dtype", "fp16", "--dry_run").stderr
    assert "--prompt has no effect" in said and "--dtype has no effect" in said
    assert "--thresh has no effect" in caption(*where, blip, "--thresh", 0.5, "--dry_run").stderr


def test_every_option_is_exercised_here():
    text = Path(__file__).read_text(encoding="utf-8")
    elsewhere = {"config_file", "output_config", "console_log_level", "console_log_file", "console_log_simple"}
    names = set(declared_options(CaptionImagesOptions)) - elsewhere
    assert {name for name in names if f'"--{name}"' not in text} == set()
