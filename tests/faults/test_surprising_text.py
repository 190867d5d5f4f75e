"""Control characters, markup and names that are no UTF-8, in captions, file names and metadata, command nothing."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from library.console import COMMANDS, printable
from library.generation.image_files import image_bytes, text_in_image
from library.html_pages import read_page_data
from tests.faults.corpus import MARKUP, SURPRISING, encoded
from tests.running import run_in_process

NO_UTF_8 = os.fsdecode(b"\xe9")
NAME = f"{SURPRISING[:40]}<b>".replace("/", "_")


def harmless(text: str) -> bool:
    """Whether a terminal would show all of it; progress bars go back to the line's begin."""
    return not COMMANDS.search(text.replace("\r", ""))


@given(st.text())
def test_what_is_printable_stays_and_all_else_is_shown_as_an_escape(text):
    shown = printable(text)
    assert harmless(shown) and printable(shown) == shown
    assert (shown == text) == (not COMMANDS.search(text))
    assert printable("a\tb\n猫 \u200f") == "a\tb\n猫 \u200f"
    assert printable("\x1b]0;x\x07\u202e\x9b") == "\\x1b]0;x\\x07\\u202e\\x9b"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_training_on_surprising_names_and_captions(flux_command, tmp_path):
    folder = tmp_path / "data" / f"3_{NO_UTF_8}{NAME}"
    folder.mkdir(parents=True)
    for name in (NAME, NO_UTF_8):
        (folder / f"{name}.png").write_bytes(encoded("PNG", size=(64, 64)))
    (folder / f"{NAME}.txt").write_text(SURPRISING + MARKUP, encoding="utf-8")
    given = [*flux_command, "--train_data_dir", folder.parent, "--resolution", 64, "--output_dir", tmp_path / "out"]
    given += ["--caption_extension", ".txt", "--cache_info", "--network_train_unet_only", "--max_train_steps", 1]
    given += ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--save_state", "--log_config"]
    given += ["--training_comment", NO_UTF_8 + SURPRISING + MARKUP, "--metadata_title", NO_UTF_8 + MARKUP]
    given += ["--logging_dir", tmp_path / "logs", "--report"]
    for more in ([], ["--console_log_file", tmp_path / "run.log"]):
        result = run_in_process("flux_train_network.py", *given, *more)
        assert result.returncode == 0, result.stderr[-3000:]
        assert harmless(result.stderr) and harmless(result.stdout)
    log = (tmp_path / "run.log").read_text(encoding="utf-8")
    assert harmless(log) and "2 kept, 0 made" in log and "finished after" in log
    (page,) = (tmp_path / "out").glob("*.report.html")
    assert MARKUP not in page.read_text(encoding="utf-8") and read_page_data(page)
    for events in (tmp_path / "logs").rglob("events.*"):
        assert b"<script>" not in events.read_bytes().replace(b"\\<", b"")
    shown = run_in_process("tools/show_metadata.py", tmp_path / "out" / "last.safetensors")
    assert shown.returncode == 0 and harmless(shown.stdout) and "modelspec.title" in shown.stdout


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_mistakes_are_named_without_commands(flux_command, tmp_path):
    for option in ("--dataset_config", "--sample_prompts", "--network_weights", "--ae", "--config_file"):
        path = tmp_path / f"{NAME}.toml"
        path.write_text(f'"{MARKUP[:3]}" = \x1b', encoding="utf-8")
        given = [*flux_command, "--output_dir", tmp_path / "out", option, path]
        given += ["--sample_at_first"] if option == "--sample_prompts" else []
        result = run_in_process("flux_train_network.py", *given)
        assert result.returncode == 2 and "error: " in result.stderr and harmless(result.stderr), option


def test_tools_show_keys_of_files_without_commands(tmp_path):
    name = f"lora_unet_{SURPRISING}"
    tensors = {
        f"{name}.lora_down.weight": torch.ones(2, 8),
        f"{name}.lora_up.weight": torch.ones(8, 2),
        "\x1b[2J": torch.ones(1),
    }
    path, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, path, {"ss_network_module": "networks.lora", "ss_training_comment": SURPRISING, "\x1b": "\x7f"})
    for script, words in (
        ("networks/check_lora_weights.py", [path, "--show_all_keys"]),
        ("networks/resize_lora.py", ["--model", path, "--save_to", out, "--new_rank", 1, "--verbose"]),
        ("networks/merge_lora.py", ["--models", path, "--ratios", 1, "--save_to", out]),
        ("networks/svd_merge_lora.py", ["--models", path, "--ratios", 1, "--save_to", out, "--new_rank", 1]),
        ("tools/show_metadata.py", [path]),
    ):
        result = run_in_process(script, *words)
        assert result.returncode in (0, 2) and harmless(result.stdout + result.stderr), script
        assert result.stdout or result.stderr


def test_text_in_images_may_be_anything():
    text = {"prompt": NO_UTF_8 + SURPRISING + MARKUP, "parameters": NO_UTF_8 + MARKUP}
    for suffix in (".png", ".webp", ".jpg"):
        with Image.open(io.BytesIO(image_bytes(Image.new("RGB", (8, 8)), suffix, text))) as image:
            image.load()


def test_text_of_an_image_comes_back(tmp_path):
    path = Path(tmp_path / "a.png")
    path.write_bytes(image_bytes(Image.new("RGB", (8, 8)), ".png", {"prompt": SURPRISING + MARKUP + NO_UTF_8}))
    assert text_in_image(path)["prompt"] == SURPRISING + MARKUP + "?"
