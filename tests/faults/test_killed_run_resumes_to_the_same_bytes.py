"""A run that is killed and resumed writes the same LoRA as one that never stopped."""

from __future__ import annotations

import shutil
import time

import pytest

from tests.faults.lora_files import contents
from tests.running import run_in_process

STATE = "lora-step00000003-state"


def scalars(folder):
    """(tag, step) -> value of every scalar in the event files below ``folder``, files in order of time."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = {}
    for path in sorted(folder.rglob("events.*"), key=lambda path: path.parts[-3]):
        position = 0
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                position += 1
                found.setdefault((value.tag, event.step), []).append(value.tensor.float_val[0])
    return {key: values[-2:] for key, values in found.items()}


NOISE = "--noise_offset 0.1 --noise_offset_random_strength --multires_noise_iterations 4 --ip_noise_gamma 0.1"


@pytest.fixture(params=[pytest.param("flux", marks=pytest.mark.thorough), "sd1"])
def script(request):
    return "flux_train_network.py" if request.param == "flux" else "train_network.py"


@pytest.fixture
def arguments(request, script, dataset_toml, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 64 --h 64 --d 1 --s 2\na cat --w 64 --h 64 --s 1\n", encoding="utf-8")
    is_flux = script == "flux_train_network.py"
    sizes = {"resolution": 64, "bucket_reso_steps": 64}
    captions = {"shuffle_caption": True, "caption_tag_dropout_rate": 0.2}
    return [
        *request.getfixturevalue("flux_command" if is_flux else "sd1_command"),
        *([] if is_flux else NOISE.split()),
        *("--dataset_config", dataset_toml(flip_aug=True, **captions, **sizes)),
        *("--max_train_steps", "7", "--gradient_accumulation_steps", "2", "--network_dropout", "0.1"),
        *("--network_args", "rank_dropout=0.1", "module_dropout=0.1", "--optimizer_type", "AdamW"),
        *("--lr_scheduler", "cosine", "--lr_warmup_steps", "3", "--max_data_loader_n_workers", "2"),
        *("--sample_prompts", prompts, "--sample_every_n_steps", "4", "--save_state", "--save_every_n_steps", "3"),
        *("--output_name", "lora"),
    ]


def run(script: str, *arguments: object) -> None:
    result = run_in_process(script, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(script, arguments, fork_server, tmp_path):
    """FLUX.1 is killed while it trains; Stable Diffusion is resumed with every noise option from a state on the way.

    An ordinary run of the tests kills FLUX.1 in tests/faults/test_kill_anywhere.py.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    state = broken / STATE
    if script == "flux_train_network.py":
        process = fork_server.start(script, *arguments, "--output_dir", broken, "--logging_dir", broken / "log")
        while not state.exists():
            assert process.poll() is None, process.output[-3000:]
            time.sleep(0.01)
        process.kill()
        assert not (broken / "lora.safetensors").exists()
    run(script, *arguments, "--output_dir", whole, "--logging_dir", whole / "log")
    if not state.exists():
        shutil.copytree(whole / STATE, state)
    run(script, *arguments, "--output_dir", broken, "--logging_dir", broken / "log", "--resume", state)
    for name in ("lora.safetensors", "lora-step00000006.safetensors"):
        assert contents(whole / name) == contents(broken / name)
    logged, logged_resumed = scalars(whole / "log"), scalars(broken / "log")
    later = {key: value for key, value in logged.items() if key[1] > 5 and not key[0].startswith("loss/epoch")}
    assert later and later == {key: logged_resumed[key] for key in later}
