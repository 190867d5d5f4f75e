"""Image files: names, and the text that other programs read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from library.files import write_new
from library.generation.image_files import ImageRecord, UsedLora, file_names, image_bytes, lora_hash, save_image
from library.prompt_options import PromptOptions
from tests.running import ROOT
from tools import show_metadata

PROMPT = PromptOptions('a "cat" 猫, night', "blurry: dark", 640, 480, 42, 20, 4.0, 3.5)
RECORD = ImageRecord(
    "draw.py", PROMPT, "Euler", "flux1-dev.safetensors", "0123abcd", [UsedLora("my, cat.safetensors", 0.8, "f" * 64)]
)


def web_ui_reading(text: str) -> dict[str, str]:
    """What AUTOMATIC1111's web UI makes of a parameters text: settings by name, the texts before them."""
    *lines, last = text.split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(pairs) >= 3, "less is taken for a part of the prompt"
    values = {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}
    negative = [line for line in lines if line.startswith("Negative prompt:")]
    values["prompt"] = "\n".join(line for line in lines if line not in negative)
    return values | {"negative": negative[0].removeprefix("Negative prompt:").strip()}


def test_the_web_uis_reading_of_the_text():
    values = web_ui_reading(RECORD.entries()["parameters"])
    assert values["prompt"] == PROMPT.prompt + " <lora:my, cat:0.8>"
    assert values["negative"] == PROMPT.negative_prompt
    assert (values["Steps"], values["Seed"], values["Size"], values["Model"]) == ("20", "42", "640x480", "flux1-dev")
    assert (values["CFG scale"], values["Distilled CFG Scale"], values["Model hash"]) == ("4.0", "3.5", "0123abcd")
    assert values["Lora hashes"] == "my, cat: " + "f" * 12


def test_single_keys_and_their_order_in_the_file(tmp_path):
    path = save_image(Image.new("RGB", (4, 4)), tmp_path, "image", RECORD.entries())
    with Image.open(path) as image:
        text = dict(image.text)
    assert text == RECORD.entries()
    assert (text["prompt"], text["negative-prompt"], text["scale"]) == (PROMPT.prompt, PROMPT.negative_prompt, "4.0")
    assert json.loads(text["lora-weights"]) == ["my, cat.safetensors;0.8"]
    assert "draw.py" in text["Software"]
    raw = path.read_bytes()
    assert b"iTXtprompt\0" in raw and b"tEXtseed\0" in raw, "UTF-8 only where Latin-1 does not do"


def test_what_did_not_act_is_left_out():
    record = ImageRecord("draw.py", PromptOptions("cat", None, 8, 8, 1, 2, 1.0), "Euler", "m", "0")
    assert not {"negative-prompt", "guidance-scale", "lora-weights"} & record.entries().keys()
    assert record.web_ui_text().startswith("cat\nSteps: 2, ")


def test_names_are_never_taken_twice(tmp_path):
    paths = [save_image(Image.new("RGB", (4, 4), (number, 0, 0)), tmp_path, "cat", {}) for number in range(3)]
    assert [path.name for path in paths] == ["cat.png", "cat_001.png", "cat_002.png"]
    assert [Image.open(path).getpixel((0, 0))[0] for path in paths] == [0, 1, 2]
    assert next(file_names(tmp_path, "dog", ".png")).name == "dog.png"


def test_two_processes_write_every_file(tmp_path):
    program = (
        "import sys; from pathlib import Path; from library.files import write_new\n"
        "folder, name = Path(sys.argv[1]), sys.argv[2]\n"
        "for i in range(40): write_new((folder / f'{n}.txt' for n in range(99)), f'{name}{i}'.encode())"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), name], cwd=ROOT) for name in "ab"]
    assert [process.wait() for process in processes] == [0, 0]
    written = sorted(path.read_text(encoding="utf-8") for path in tmp_path.iterdir())
    assert written == sorted(f"{name}{i}" for name in "ab" for i in range(40))
    assert {path.name for path in tmp_path.iterdir()} == {f"{n}.txt" for n in range(80)}


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError("not supported")

    monkeypatch.setattr("os.link", refuse)
    names = [tmp_path / "a", tmp_path / "b"]
    assert [write_new(names, b"1"), write_new(names, b"2")] == names
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == [b"1", b"2"]


def test_the_hash_of_a_lora_is_that_of_its_tensors(tmp_path):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, title in zip(paths, "ab"):
        save_file({"x": torch.ones(3)}, path, {"title": title})
    assert lora_hash(paths[0]) == lora_hash(paths[1]) and len(lora_hash(paths[0])) == 64
    save_file({"x": torch.ones(3)}, paths[0], {"sshs_model_hash": "abc"})
    assert lora_hash(paths[0]) == "abc"


def test_the_metadata_viewer_shows_an_images_text(tmp_path, capsys):
    path = save_image(Image.new("RGB", (4, 4)), tmp_path, "image", RECORD.entries())
    show_metadata.main([str(path)])
    assert json.loads(capsys.readouterr().out) == RECORD.entries()


@pytest.mark.parametrize("suffix", [".webp", ".jpg"])
def test_the_metadata_viewer_shows_the_comment_of_other_images(tmp_path, capsys, suffix):
    path = tmp_path / f"image{suffix}"
    path.write_bytes(image_bytes(Image.new("RGB", (4, 4)), suffix, RECORD.entries()))
    show_metadata.main([str(path)])
    assert json.loads(capsys.readouterr().out) == {"parameters": RECORD.entries()["parameters"]}


@pytest.mark.parametrize("name", ["x.png", "x.PNG", "x.webp"])
def test_the_metadata_viewer_names_what_is_no_image(tmp_path, name):
    from library.errors import UserError

    path: Path = tmp_path / name
    path.write_bytes(b"no image")
    with pytest.raises(UserError, match="not an image in a known format"):
        show_metadata.main([str(path)])
