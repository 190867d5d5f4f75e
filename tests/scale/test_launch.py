"""What ``accelerate launch`` is told: ready configuration files, engines that are refused, memory of shares."""

from __future__ import annotations

import re

import pytest

from library.errors import UserError
from library.options import parse_options
from library.training.checks import check_training_options
from library.training.launch import requested_sharding
from tests.families.families import TINY
from tests.running import ROOT, run_in_process, trainer_class
from tests.scale.conftest import FSDP, few_images, make_dataset, run_options

CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
NEEDED = ["--pretrained_model_name_or_path", "a", "--network_module", "networks.lora"]


def told_by(config, monkeypatch) -> None:
    """Set the environment as accelerate's launcher does for its processes with a configuration file."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import prepare_multi_gpu_env

    given = launch_command_parser().parse_args(["--config_file", str(config), "flux_train_network.py"])
    arguments, _, _ = _validate_launch_command(given)
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_ready_configurations_are_taken(config, monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(config))
    assert loaded.num_machines == (2 if config.stem == "two_machines" else 1)
    told_by(config, monkeypatch)
    check_training_options(parse_options(trainer_class("sd1").options_class, "test", NEEDED))
    sharding = requested_sharding(8)
    assert (sharding is not None) == (config.stem == "fsdp")
    assert sharding is None or (sharding.processes == 8 and sharding.frees_after_forward)


def test_there_is_a_configuration_for_each_way():
    assert [path.stem for path in CONFIGS] == ["fsdp", "multi_gpu", "two_machines"]


@pytest.mark.parametrize(
    ("told", "options", "sentence"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "", "DeepSpeed .ZeRO. is not supported: .* --use_fsdp --fsdp_version 2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "", "Megatron-LM is not supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, "", "--use_fsdp: version 1 is not supported; add --fsdp_version 2"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "", "--fsdp_offload_params is not supported"),
        (FSDP, "--blocks_to_swap 4", "--blocks_to_swap and FSDP are mutually exclusive"),
        (FSDP, "--blocks_to_swap auto", "--blocks_to_swap and FSDP are mutually exclusive"),
        (FSDP, "--fp8_scaled --mixed_precision bf16", "--fp8_scaled and FSDP are mutually exclusive"),
        (FSDP, "--base_format nf4 --mixed_precision bf16", "--base_format and FSDP are mutually exclusive"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_cannot_be_is_refused_in_one_sentence(monkeypatch, told, options, sentence):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=sentence):
        check_training_options(parse_options(trainer_class("sd1").options_class, "test", [*NEEDED, *options.split()]))


def test_the_plan_and_the_budget_count_shares(tiny_flux, image_folder, tmp_path, monkeypatch):
    """A run that is spread over eight processes needs less of each device, and no options are chosen against FSDP."""
    images = few_images(image_folder, tmp_path / "images")
    given = [*run_options(TINY["flux"], tiny_flux), "--dataset_config", make_dataset(tmp_path, images, 1)]
    given += ["--output_dir", tmp_path, "--output_name", "lora", "--mixed_precision", "bf16", "--dry_run"]

    def planned(*more: object) -> tuple[str, list[float]]:
        done = run_in_process("flux_train_network.py", *given, *more)
        assert done.returncode == 0, done.stderr
        step = next(line for line in done.stderr.splitlines() if "training without gradient checkpointing" in line)
        return done.stderr, [float(number) for number in re.findall(r"([\d.]+) [KM]iB", step)]

    _, whole = planned()
    for name, value in {**FSDP, "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    said, shares = planned()
    line = re.search(r"FSDP: (\d+) blocks of ([\d.]+) KiB are spread over 8 processes, ([\d.]+) KiB each", said)
    assert line is not None and float(line[3]) == pytest.approx(float(line[2]) / 8, rel=0.01)
    freed = float(re.search(r"which frees ([\d.]+) KiB of each device", said)[1])
    assert whole[0] - shares[0] == pytest.approx(freed, rel=0.1)
    chosen, _ = planned("--vram_budget", "0.9")
    assert re.search("--vram_budget 0.9 (needs no other|chooses --gradient_checkpointing:)", chosen), chosen
