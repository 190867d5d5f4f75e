"""Two machines, tried over loopback: what they share, and what each of them does for itself."""

from __future__ import annotations

import re
import shutil
import sys
from subprocess import PIPE, Popen

import pytest
import torch
from safetensors.torch import load_file

from tests.families.families import TINY
from tests.running import ROOT, free_port, run_in_process
from tests.scale.conftest import FSDP, few_images, make_dataset, run_options

FLUX = TINY["flux"]
CACHES = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")


def two_folders(image_folder, tmp_path):
    """What each of two machines has at the same place: the images and the dataset file."""
    folders = []
    for name in ("first", "second"):
        few_images(image_folder, tmp_path / name / "images")
        dataset = make_dataset(tmp_path / name, tmp_path / name / "images", 2, relative=True)
        folders.append(dataset.parent)
    return folders, dataset.name


def made(process) -> tuple[list[int], list[int]]:
    """Of latents and text: the cache entries that the first process says it made."""
    return [int(count) for count in re.findall(r"cache: \d+ kept, (\d+) made", process.output)]


def test_a_shared_folder_is_filled_by_all_machines_and_their_own_ones_by_each(
    tiny_flux, run_together, image_folder, tmp_path
):
    """In both cases two machines train what one process trains."""
    folders, dataset = two_folders(image_folder, tmp_path)
    given = [*run_options(FLUX, tiny_flux), *CACHES, "--max_train_steps", "1", "--output_name", "lora", "--no_report"]
    given += ["--output_dir", "out"]
    apart = run_together(FLUX.script, *given, "--dataset_config", dataset, count=1, machines=2, folders=folders)
    assert made(apart[0]) == [4, 4]
    for folder in folders:
        assert len(list((folder / "images").glob("*.npz"))) == 8
    shared = few_images(image_folder, tmp_path / "shared" / "images")
    dataset = make_dataset(tmp_path / "shared", shared, 2)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    together = run_together(
        FLUX.script,
        *(*given, "--dataset_config", dataset),
        count=1,
        machines=2,
        folders=[tmp_path / "a", tmp_path / "b"],
    )
    assert made(together[0]) == [2, 2]
    assert not [path for path in shared.iterdir() if path.suffix not in (".png", ".txt", ".npz")]
    one = run_in_process(
        FLUX.script, *given, "--dataset_config", make_dataset(tmp_path, shared, 4), "--output_dir", tmp_path / "one"
    )
    assert one.returncode == 0, one.stderr
    expected = load_file(tmp_path / "one" / "lora.safetensors")
    for folder, other in (folders, (tmp_path / "a", tmp_path / "b")):
        trained = load_file(folder / "out" / "lora.safetensors")
        for key, tensor in expected.items():
            torch.testing.assert_close(trained[key], tensor, rtol=0, atol=1e-6)
        assert not list((other / "out").iterdir()), "only the first machine writes"


@pytest.mark.thorough
def test_two_launchers_train_one_lora(tiny_flux, image_folder, tmp_path):
    """As documented: the same command on each machine, with another rank."""
    folders, dataset = two_folders(image_folder, tmp_path)
    given = [*run_options(FLUX, tiny_flux), *CACHES, "--max_train_steps", "1", "--output_name", "lora", "--no_report"]
    given += ["--dataset_config", dataset, "--output_dir", "out"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1", "--multi_gpu"]
    launch += ["--num_processes", "2", "--num_machines", "2", "--main_process_ip", "127.0.0.1"]
    launch += ["--main_process_port", str(free_port()), "--rdzv_backend", "static"]
    machines = [
        Popen(
            [*launch, "--machine_rank", str(rank), ROOT / FLUX.script, *map(str, given)],
            cwd=folder,
            stdout=PIPE,
            stderr=PIPE,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]
    said = [machine.communicate(timeout=240)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said[0][-2000:] + said[1][-2000:]
    assert "batch size 2 x 2 processes = 4 images per step" in said[0]
    assert (folders[0] / "out" / "lora.safetensors").is_file() and not list((folders[1] / "out").iterdir())


def test_the_caching_tools_split_their_work_over_machines(tiny_flux, run_together, image_folder, tmp_path):
    folders, dataset = two_folders(image_folder, tmp_path)
    given = [*FLUX.command(tiny_flux), "--flux", "--seed", "7"]
    run_together("tools/cache_latents.py", *given, "--dataset_config", dataset, count=1, machines=2, folders=folders)
    first, second = ({path.name: path.read_bytes() for path in (folder / "images").glob("*.npz")} for folder in folders)
    assert len(first) == 4 and first.keys() == second.keys()
    shared = make_dataset(tmp_path, shutil.copytree(folders[0] / "images", tmp_path / "images"), 2)
    for path in (tmp_path / "images").glob("*.npz"):
        path.unlink()
    said = run_together("tools/cache_latents.py", *given, "--dataset_config", shared, count=2, machines=2)[0].output
    assert "finished; latent cache: 0 kept, 4 made" in said
    assert {path.name for path in (tmp_path / "images").glob("*.npz")} == first.keys()


def test_a_model_is_spread_over_the_processes_of_each_machine(tiny_flux, run_together, image_folder, tmp_path):
    """Four processes on two machines: two shares each, and one LoRA."""
    images = few_images(image_folder, tmp_path / "images")
    given = [*run_options(FLUX, tiny_flux), "--max_train_steps", "1", "--output_name", "lora", "--no_report"]
    spread = [*given, "--dataset_config", make_dataset(tmp_path, images, 1), "--output_dir", tmp_path / "spread"]
    said = run_together(FLUX.script, *spread, count=2, machines=2, **FSDP)[0].output
    assert "spread over 2 processes" in said and "x 4 processes = 4 images per step" in said
    one = run_in_process(
        FLUX.script, *given, "--dataset_config", make_dataset(tmp_path, images, 4), "--output_dir", tmp_path / "one"
    )
    assert one.returncode == 0, one.stderr
    trained, expected = (load_file(tmp_path / name / "lora.safetensors") for name in ("spread", "one"))
    for key, tensor in expected.items():
        torch.testing.assert_close(trained[key], tensor, rtol=0, atol=1e-6)
