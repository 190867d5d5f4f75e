"""Two processes with batch size 2 train what one with batch size 4 trains, with the base model whole or spread."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file

from library.html_pages import read_page_data
from tests.families.families import FAMILIES, TINY
from tests.running import run_in_process
from tests.scale.conftest import FSDP, few_images, make_dataset, run_options

# Noise options whose draws or norms could mix the items of a batch.
NOISE = "--noise_offset 0.1 --noise_offset_random_strength --multires_noise_iterations 4 --ip_noise_gamma 0.1"
ORDINARY = ("flux", "sdxl", "lumina")
"""Each run of the suite tries these; the thorough one tries all."""
BOTH_WAYS = ("flux",)
"""Of these, each run draws samples and tries both ways of keeping the base model; the thorough one does so of all."""
LIMIT = 1e-6
"""The most that a weight may differ; they are moved by more than a hundred times as much."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(family, id=family.name, marks=[] if family.name in ORDINARY else [pytest.mark.thorough])
        for family in FAMILIES
    ],
)
def family(request):
    """Each family in turn."""
    return request.param


def test_two_processes_train_what_one_trains(family, tiny_files, run_together, image_folder, tmp_path, thorough):
    kinds = {"whole": {}, "spread": FSDP}
    if family.name not in BOTH_WAYS and not thorough:
        del kinds["whole"]
    images = few_images(image_folder, tmp_path / "images")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 3\na dog --w 96 --h 64 --s 1 --d 4\n", encoding="utf-8")
    draws = family.name in BOTH_WAYS or thorough
    given = [*run_options(family, tiny_files(family)), "--output_name", "lora", "--max_train_steps", "1"]
    given += ["--gradient_accumulation_steps", "2", "--cache_latents_to_disk", "--ema_decay", "0.9"]
    given += ["--sample_every_n_steps", "1", "--sample_prompts", prompts] if draws else []
    given += ["--save_state_on_train_end", "--report"]
    given += NOISE.split() if family.name.startswith("sd") else ["--cache_text_encoder_outputs_to_disk"]

    def arguments(name: str, batch_size: int) -> list[object]:
        dataset = make_dataset(tmp_path, images, batch_size)
        return [*given, "--dataset_config", dataset, "--output_dir", tmp_path / name]

    said = {}
    for name, environment in kinds.items():
        more = ["--gradient_checkpointing"] if name == "spread" else []
        said[name] = run_together(family.script, *arguments(name, 2), *more, **environment)[0].output
    one = run_in_process(family.script, *arguments("one", 4))
    assert one.returncode == 0, one.stderr[-3000:]

    for file in ("lora-ema.safetensors", "lora.safetensors"):
        expected = load_file(tmp_path / "one" / file)
        for name in kinds:
            trained = load_file(tmp_path / name / file)
            assert trained.keys() == expected.keys()
            for key, tensor in expected.items():
                torch.testing.assert_close(trained[key], tensor, rtol=0, atol=LIMIT)
    assert max(tensor.abs().max() for key, tensor in expected.items() if "lora_up" in key) > 100 * LIMIT

    # What the processes share, and what only the first one writes.
    files = {name: sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", *kinds)}
    assert len(files["one"]) == 4 + draws and all(written == files["one"] for written in files.values())
    cached = [re.findall(r"latent cache: (\d+) kept, (\d+) made", output) for output in said.values()]
    assert cached == [[("0", "2")], [("2", "0")]][: len(kinds)], "each makes its half, and the first tells of its own"
    assert not re.search("Traceback|Warning", "".join(said.values()))
    for name in kinds:
        page = read_page_data(tmp_path / name / "lora.report.html")
        assert [sorted(entry["images"]) for entry in page["samples"]["rounds"]] == [["0", "1"]] * draws
        assert page["status"]["state"] == "finished" and "2 processes" in dict(page["facts"])["Device"]
    blocks = re.search(r"FSDP: \d+ blocks of (.*) are spread over 2 processes, (.*) each", said["spread"])
    assert blocks is not None and blocks[1] != blocks[2]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "network",
    [
        "networks.oft_flux --network_args enable_all_linear=True",
        "lycoris.kohya --network_args algo=lokr factor=4",
        "lycoris.kohya --network_args algo=lora dora_wd=True",
    ],
    ids=["OFT", "LoKr", "DoRA"],
)
@pytest.mark.parametrize("spread", [{}, FSDP], ids=["whole", "spread"])
def test_networks_of_other_kinds_train_the_same_in_two_processes(
    request, run_together, image_folder, tmp_path, network, spread
):
    """They read the weights of the layers that they change, of which a process may have only a share."""
    family = TINY["flux"]
    images = few_images(image_folder, tmp_path / "images")
    given = [*run_options(family, request.getfixturevalue("tiny_flux")), "--network_module", *network.split()]
    given += ["--output_name", "lora", "--max_train_steps", "2", "--no_report", "--network_train_unet_only"]

    def arguments(name: str, batch_size: int) -> list[object]:
        dataset = make_dataset(tmp_path, images, batch_size)
        return [*given, "--dataset_config", dataset, "--output_dir", tmp_path / name]

    run_together(family.script, *arguments("both", 2), **spread)
    one = run_in_process(family.script, *arguments("one", 4))
    assert one.returncode == 0, one.stderr[-3000:]
    expected, trained = (load_file(tmp_path / name / "lora.safetensors") for name in ("one", "both"))
    assert trained.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(trained[key], tensor, rtol=0, atol=LIMIT)
    zero_at_first = ("oft_blocks.0", "lokr_w2_b", "lora_up.weight")
    assert max(tensor.abs().max() for key, tensor in expected.items() if key.endswith(zero_at_first)) > 100 * LIMIT
