"""A run that is killed and resumed writes the same LoRA as one that never stopped."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.processes import ForkServer
from tests.running import run_in_process

STATE = "lora-step00000003-state"
TIMES = ("ss_training_finished_at", "modelspec.date")


def contents(path):
    with safe_open(path, "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key not in TIMES}
        return metadata, {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118


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


@pytest.fixture(params=["flux", "sd1"])
def script(request):
    return "flux_train_network.py" if request.param == "flux" else "train_network.py"


@pytest.fixture
def arguments(request, script, dataset_toml, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 64 --h 64 --d 1 --s 3\na cat --w 64 --h 64 --s 2\n", encoding="utf-8")
    is_flux = script == "flux_train_network.py"
    sizes = {"resolution": 64, "bucket_reso_steps": 64}
    captions = {"shuffle_caption": True, "caption_tag_dropout_rate": 0.2}
    return [
        *request.getfixturevalue("flux_command" if is_flux else "sd1_command"),
        *([] if is_flux else NOISE.split()),
        *("--dataset_config", dataset_toml(flip_aug=True, **captions, **sizes)),
        *("--max_train_steps", "8", "--gradient_accumulation_steps", "2", "--network_dropout", "0.1"),
        *("--network_args", "rank_dropout=0.1", "module_dropout=0.1", "--optimizer_type", "AdamW"),
        *("--lr_scheduler", "cosine", "--lr_warmup_steps", "3", "--max_data_loader_n_workers", "2"),
        *("--sample_prompts", prompts, "--sample_every_n_steps", "4", "--save_state", "--save_every_n_steps", "3"),
        *("--output_name", "lora"),
    ]


def kill_when(fork_server: ForkServer, written: Path, script: str, *arguments: object) -> None:
    """Start a script and kill it as soon as a file or folder is there."""
    process = fork_server.start(script, *arguments)
    deadline = time.monotonic() + 300
    while not written.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()


def run(script: str, *arguments: object) -> None:
    result = run_in_process(script, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(fork_server, script, arguments, tmp_path):
    """FLUX.1 is killed while it trains; Stable Diffusion is resumed with every noise option from a state on the way."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    state = broken / STATE
    if script == "flux_train_network.py":
        kill_when(fork_server, state, script, *arguments, "--output_dir", broken, "--logging_dir", broken / "log")
        assert not (broken / "lora.safetensors").exists()
    run(script, *arguments, "--output_dir", whole, "--logging_dir", whole / "log")
    if not state.exists():
        shutil.copytree(whole / STATE, state)
    run(script, *arguments, "--output_dir", broken, "--logging_dir", broken / "log", "--resume", state)
    metadata, tensors = contents(whole / "lora.safetensors")
    metadata_resumed, tensors_resumed = contents(broken / "lora.safetensors")
    assert tensors == tensors_resumed
    differing = {key for key in metadata if metadata[key] != metadata_resumed.get(key)}
    assert differing <= {"ss_session_id", "ss_training_started_at"}
    assert contents(whole / "lora-step00000006.safetensors")[1] == contents(broken / "lora-step00000006.safetensors")[1]
    logged, logged_resumed = scalars(whole / "log"), scalars(broken / "log")
    later = {key: value for key, value in logged.items() if key[1] > 5 and not key[0].startswith("loss/epoch")}
    assert later and later == {key: logged_resumed[key] for key in later}
