"""Models that are named by their id on the Hugging Face hub: announced, fetched without what is not needed, kept."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from library.checkpoints import open_checkpoint
from library.errors import UserError
from library.models.hub import find_model, wanted_files
from tests.hub_server import HubServer, use_for_programs
from tests.running import ROOT

NEEDED = [
    *("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json"),
    *("vae/diffusion_pytorch_model.bin", "text_encoder/config.json", "text_encoder/model.safetensors"),
    *("scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"),
]
OTHERS = [
    *("README.md", "model_index.json", "v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"),
    *("unet/diffusion_pytorch_model.bin", "text_encoder/flax_model.msgpack", "text_encoder/openvino_model.bin"),
    *("text_encoder/pytorch_model.bin", "unet/diffusion_pytorch_model.non_ema.safetensors"),
]


def test_weights_are_taken_in_one_format():
    assert sorted(wanted_files([*OTHERS, *NEEDED])) == sorted(NEEDED)
    shards = [f"unet/diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    assert sorted(wanted_files([*shards, index])) == sorted([*shards, index])
    assert wanted_files(["README.md", "tokenizer/vocab.json"]) == []


def test_of_a_part_no_other_is_taken():
    vae = [name for name in NEEDED if name.startswith("vae/")]
    assert sorted(wanted_files([*NEEDED, *OTHERS], "vae")) == vae
    alone = ["config.json", "diffusion_pytorch_model.safetensors"]
    assert sorted(wanted_files([*alone, "diffusion_pytorch_model.bin", "README.md", "images/a.json"], "vae")) == alone


PROGRAM = """
import sys
from library.console import ConsoleOptions, set_up_console
from library.errors import UserError
from library.models.hub import find_model
set_up_console(ConsoleOptions(console_log_simple=True))
for name in sys.argv[1:]:
    try:
        folder = find_model(name, "--ckpt")
        print(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))
    except UserError as error:
        print(error)
"""


def found(*names: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return result.stdout + result.stderr


def test_a_model_is_fetched_once_and_found_again_without_a_network(tmp_path, monkeypatch):
    with HubServer() as server:
        use_for_programs(server, monkeypatch, tmp_path)
        monkeypatch.setenv("HF_TOKEN", server.token)
        server.repositories["someone/model"] = {name: name.encode() for name in [*NEEDED, *OTHERS]}
        server.repositories["someone/text"] = {"README.md": b"text"}
        first = found("someone/model", "someone/text", "someone/else")
    assert "--ckpt: there is no file or folder someone/model; asking the Hugging Face hub" in first
    assert str(sorted(NEEDED)) in first
    assert "--ckpt: someone/text on the Hugging Face hub is not in the layout of Diffusers." in first
    assert (
        "--ckpt: there is no file or folder someone/else, and the Hugging Face hub has no model of that name for you"
        in first
    )
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    again = found("someone/model", "someone/else")
    assert str(sorted(NEEDED)) in again
    assert (
        "--ckpt: there is no file or folder someone/else, and the Hugging Face hub has no model of that name for you"
        in again
    )


def test_a_pattern_that_several_files_match_is_refused(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(
        UserError, match=r"^--ckpt: .*\*.safetensors matches 2 files \(.*a.safetensors, .*b.safetensors\)"
    ):
        find_model(str(tmp_path / "*.safetensors"), "--ckpt")
    assert find_model(str(tmp_path / "a*"), "--ckpt") == tmp_path / "a.safetensors"


@pytest.mark.parametrize("name", ["black-forest-labs/FLUX.1-dev", "stabilityai/stable-diffusion-xl-base-1.0"])
def test_where_nothing_is_fetched_an_id_is_told_how_to_do_it(name):
    command = rf'"hf download {re.escape(name)} --local-dir FOLDER"'
    with pytest.raises(UserError, match=rf"^--t5xxl: {re.escape(name)} does not exist, and models are not .*{command}"):
        open_checkpoint(name, "text_encoder", option="--t5xxl")


def test_a_misspelt_path_is_no_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "flux.safetensors").touch()
    for name, rest in {
        "models/flux.safetensor": ' Did you mean "flux.safetensors"?',
        "other/flux.safetensors": "",
    }.items():
        with pytest.raises(UserError, match=rf"^{re.escape(name)} does not exist\.{re.escape(rest)}$"):
            open_checkpoint(name)
