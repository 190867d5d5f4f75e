"""What the arguments of networks.lora_lumina train: each row is a LoRA of the real trainer, after one step."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from networks.convert_lumina_lora import main as convert
from tests.families.families import TINY
from tests.networks.lora_tool_files import ranks, run
from tests.running import run_in_process
from tools.make_tiny_models import LUMINA

PARTS = ("attention_qkv", "attention_out", *(f"feed_forward_w{n}" for n in (1, 2, 3)), "adaLN_modulation_1")
COUNTS = {"layers": LUMINA.layers, "noise_refiner": LUMINA.refiner_layers, "context_refiner": LUMINA.refiner_layers}
BLOCKS = [
    f"{name}_{number}_{part}"
    for name, count in COUNTS.items()
    for number in range(count)
    for part in PARTS
    if (name, part) != ("context_refiner", PARTS[-1])
]
FINAL = ["final_layer_linear", "final_layer_adaLN_modulation_1"]
TEXT = [
    f"lora_te_layers_{number}_{part}"
    for number in range(3)
    for part in (*(f"self_attn_{p}_proj" for p in "qkvo"), *(f"mlp_{p}_proj" for p in ("gate", "up", "down")))
]
Change = Callable[[str], int | None]
"""The rank of a module by its name; None: as without arguments."""
TRANSFORMER = "--network_train_unet_only --network_args "


def by_part(**ranks_by_part: int) -> Change:
    """Ranks of modules by a part of their names, the first that fits."""
    return lambda name: next((rank for part, rank in ranks_by_part.items() if part in name), None)


CASES: Mapping[str, tuple[str, Change, bool]] = {
    "Gemma is trained too": ("", by_part(), True),
    "layers": (
        TRANSFORMER + "attn_dim=2 mlp_dim=8 mod_dim=0 refiner_dim=3 embedder_dims=[1,2,3]",
        by_part(attention=2, feed_forward=8, modulation=0, x_embedder=1, t_embedder=2, cap_embedder=3),
        False,
    ),
    "blocks": (
        TRANSFORMER + "train_blocks=transformer train_transformer_block_indices=1-2",
        lambda name: None if name.startswith(("layers_1", "layers_2")) else 0,
        False,
    ),
    "parts of their own, patterns": (
        TRANSFORMER + r"split_qkv=True 'network_reg_dims=noise_refiner=2,_w\d=0'",
        by_part(_w1=0, _w2=0, _w3=0, noise_refiner_0_attention_qkv=6, noise_refiner=2, qkv=12),
        False,
    ),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """A small image; the runs share its caches."""
    folder = tmp_path_factory.mktemp("images")
    Image.new("RGB", (64, 64), (200, 30, 30)).save(folder / "a.png")
    (folder / "a.txt").write_text("a red square", encoding="utf-8")
    path = folder / "dataset.toml"
    path.write_text(
        f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{folder.as_posix()}"\n', encoding="utf-8"
    )
    return path


@pytest.fixture
def train(tiny_lumina, dataset, tmp_path):
    """Train with the words of a command line; returns the file and what the run said."""

    def run_training(arguments: str, *more: object) -> tuple[Path, str]:
        given = [*TINY["lumina"].command(tiny_lumina), "--dataset_config", dataset, "--max_train_steps", 1]
        given += ["--output_dir", tmp_path / "out", "--max_data_loader_n_workers", 0, "--no_report"]
        done = run_in_process(TINY["lumina"].script, *given, "--cache_latents_to_disk", *shlex.split(arguments), *more)
        assert done.returncode == 0, done.stderr
        return tmp_path / "out" / "last.safetensors", " ".join(done.stderr.split())

    return run_training


@pytest.mark.parametrize("case", CASES)
def test_modules_and_ranks(train, case):
    """Every module that is trained has changed; of Gemma, not the last layer, whose output nothing reads."""
    arguments, change, with_text = CASES[case]
    path, _ = train(arguments)
    embedders = ["x_embedder", "t_embedder_mlp_0", "t_embedder_mlp_2", "cap_embedder_1"]
    wanted = {}
    for name in [*BLOCKS, *FINAL, *embedders]:
        rank = change(name)
        if rank or (rank is None and name not in embedders):
            wanted[f"lora_unet_{name}"] = rank or 4
    if with_text:
        wanted |= dict.fromkeys(TEXT, 4)
    assert ranks(path) == {name: rank for name, rank in wanted.items() if rank}
    tensors = load_file(path)
    still = {name for name in wanted if not tensors[f"{name}.lora_up.weight"].any()}
    assert still == {name for name in wanted if name.startswith("lora_te_layers_2")}


def test_training_goes_on_from_a_file_with_other_names(train, tmp_path):
    """Its modules and ranks; the converted numbers are those that training starts with."""
    first, _ = train(TRANSFORMER + "attn_dim=2 train_blocks=context_refiner")
    comfyui = tmp_path / "comfyui.safetensors"
    run(convert, "--src_path", first, "--dst_path", comfyui, "--dst", "comfyui")
    before = load_file(first)
    second, said = train("--network_train_unet_only --dim_from_weights --network_weights", comfyui, "--unet_lr", 1e-30)
    after = load_file(second)
    assert after.keys() == before.keys()
    assert all((after[key] - before[key]).abs().max() < 1e-20 for key in before)
    assert "fit no layer" not in said
