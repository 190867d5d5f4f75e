"""Training curves: TensorBoard reads what is written, W&B gets its records, mistakes are named."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from library.console import LOGGER
from library.errors import UserError
from library.options import parse_options
from library.training.optim.lr_schedulers import LRSchedulerOptions, create_lr_scheduler
from library.training.optim.optimizers import OptimizerOptions, create_optimizer
from library.training.tracking import (
    LoggingOptions,
    Tracker,
    check_logging_options,
    learning_rate_scalars,
    loggable_options,
    norm_scalars,
)
from library.training.training_options import TrainingOptions

ROOT = Path(__file__).parents[2]


def read_events(folder: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def only_folder(path: Path) -> Path:
    (folder,) = path.iterdir()
    return folder


def test_tensorboard_reads_every_point(tmp_path):
    tracker = Tracker(LoggingOptions(logging_dir=str(tmp_path), log_prefix="cat-"), {})
    for step in range(1, 6):
        tracker.log({"loss/current": 1 / step, "lr/unet": 1e-4}, step, epoch=1)
    tracker.log({"loss/epoch_average": 0.25}, 1, epoch=1, global_step=5)
    tracker.finish()
    run = only_folder(tmp_path)
    assert run.name[:4] == "cat-"
    assert len(run.name) == 4 + 14
    assert run.name[4:].isdigit()
    events = read_events(run / "network_train")
    points = [(point.step, pytest.approx(point.value)) for point in events.Scalars("loss/current")]
    assert points == [(step, 1 / step) for step in range(1, 6)]
    assert [(p.step, p.value) for p in events.Scalars("loss/epoch_average")] == [(1, 0.25)]


def test_curves_survive_a_run_that_is_killed(tmp_path):
    code = (
        "import os, sys\n"
        "from library.training.tracking import LoggingOptions, Tracker\n"
        "tracker = Tracker(LoggingOptions(logging_dir=sys.argv[1], log_tracker_name='run'), {})\n"
        "tracker.log({'loss/current': 0.5}, 7, epoch=1)\n"
        "os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    assert [p.step for p in read_events(only_folder(tmp_path) / "run").Scalars("loss/current")] == [7]


def test_the_configuration_is_logged_without_secrets_and_paths(tmp_path):
    values = {"learning_rate": 1e-4, "wandb_api_key": "secret", "huggingface_token": "secret", "output_dir": "/home/me"}
    assert loggable_options(values) == {"learning_rate": 1e-4}
    tracker = Tracker(LoggingOptions(logging_dir=str(tmp_path), log_config=True), values)
    tracker.finish()
    folder = only_folder(tmp_path) / "network_train"
    (text,) = read_events(folder).Tensors("config/text_summary")
    assert "|learning_rate|0.0001|" in text.tensor_proto.string_val[0].decode()
    assert b"secret" not in next(folder.iterdir()).read_bytes()


def test_nothing_is_written_without_a_target_or_by_other_processes(tmp_path):
    for tracker in (
        Tracker(LoggingOptions(), {}),
        Tracker(LoggingOptions(logging_dir=str(tmp_path)), {}, is_main=False),
    ):
        assert not tracker.active
        tracker.log({"loss/current": 1.0}, 1, epoch=1)
        tracker.log_image(0, "prompt", None)
        tracker.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_costs_the_curves_and_not_the_training(tmp_path, caplog):
    device = Path("/dev/full")
    if not device.exists():
        pytest.skip("needs /dev/full")
    LOGGER.propagate = True
    from tensorboard.summary.writer.record_writer import RecordWriter

    tracker = Tracker(LoggingOptions(logging_dir=str(tmp_path)), {})
    with open(device, "wb", buffering=0) as file:
        tracker._tensorboard._writer.close()
        tracker._tensorboard._writer = RecordWriter(file)  # from now on the disk is full
        for step in range(3):
            tracker.log({"loss/current": 1.0}, step, epoch=1)
        tracker.finish()
    assert caplog.text.count("writing the training curves failed") == 1


def test_tensorboard_needs_a_folder_that_can_be_written(tmp_path):
    with pytest.raises(UserError, match="--log_with tensorboard needs --logging_dir"):
        check_logging_options(LoggingOptions(log_with="tensorboard"))
    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="logging_dir: cannot write"):
        check_logging_options(LoggingOptions(logging_dir=str(file)))
    with pytest.raises(UserError, match="logging_dir: cannot write"):
        Tracker(LoggingOptions(logging_dir=str(file)), {})


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed here")
def test_a_missing_wandb_is_named_before_training():
    with pytest.raises(UserError, match=r'needs the package wandb.*"pip install wandb"'):
        check_logging_options(LoggingOptions(log_with="wandb"))


def test_wandb_gets_scalars_with_step_and_epoch_and_images(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from PIL import Image

    monkeypatch.setenv("WANDB_MODE", "offline")
    configuration = tmp_path / "tracker.toml"
    configuration.write_text('[wandb]\ntags = ["cat"]\n', encoding="utf-8")
    options = LoggingOptions(
        log_with="wandb", logging_dir=str(tmp_path / "logs"), log_tracker_config=str(configuration), log_config=True
    )
    check_logging_options(options)
    tracker = Tracker(options, {"learning_rate": 1e-4, "wandb_api_key": "secret"})
    run = wandb.run
    tracker.log({"loss/current": 0.5}, 3, epoch=2)
    tracker.log_image(1, SimpleNamespace(prompt="a cat"), Image.new("RGB", (8, 8)))
    tracker.log({"loss/epoch_average": 0.25}, 2, epoch=2, global_step=3)
    summary = dict(run.summary)
    assert (summary["loss/current"], summary["global_step"], summary["epoch"]) == (0.5, 3, 2)
    assert "sample_1" in summary
    assert run.project == "network_train"
    assert run.tags == ("cat",)
    assert dict(run.config) == {"learning_rate": 1e-4}
    tracker.finish()
    assert list((tmp_path / "logs").glob("*/wandb/offline-run-*"))


def test_wandb_takes_names_and_key_from_the_options(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it remembers the mode of an earlier test
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    given = ["--log_with", "wandb", "--logging_dir", str(tmp_path), "--wandb_run_name", "mine"]
    options = parse_options(TrainingOptions, "test", [*given, "--log_tracker_name", "cats", "--wandb_api_key", "short"])
    with pytest.raises(UserError, match="--log_with wandb: API key must have"):
        Tracker(options.logging, {})
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker(options.logging, {})
    assert (wandb.run.name, wandb.run.project) == ("mine", "cats")
    tracker.finish()


def test_secrets_that_wandb_would_store_are_named(monkeypatch, caplog):
    pytest.importorskip("wandb")
    monkeypatch.setattr(sys, "argv", ["train_network.py", "--huggingface_token", "x", "--wandb_api_key=y"])
    check_logging_options(LoggingOptions(log_with="wandb"))
    assert "with the value of --huggingface_token and --wandb_api_key; give it in --config_file" in caplog.text


def test_wandb_without_a_key_is_a_mistake_in_one_sentence(tmp_path):
    pytest.importorskip("wandb")
    code = (
        "import sys\n"
        "from library.errors import UserError\n"
        "from library.training.tracking import LoggingOptions, Tracker\n"
        "try:\n"
        "    Tracker(LoggingOptions(log_with='wandb', logging_dir=sys.argv[1]), {})\n"
        "except UserError as error:\n"
        "    print(error)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {"HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("--log_with wandb: ")


def test_a_folder_named_wandb_is_not_taken_for_the_package(tmp_path, monkeypatch):
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed here")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="needs the package wandb"):
        check_logging_options(LoggingOptions(log_with="wandb"))


def test_a_tracker_configuration_must_have_a_wandb_table(tmp_path):
    configuration = tmp_path / "tracker.toml"
    configuration.write_text("wandb = 3\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"must be a table, \[wandb\]"):
        check_logging_options(LoggingOptions(logging_dir=str(tmp_path), log_tracker_config=str(configuration)))
    with pytest.raises(UserError, match="there is no such file"):
        check_logging_options(LoggingOptions(logging_dir="x", log_tracker_config=str(tmp_path / "none.toml")))


def created_with_groups(name: str, rates: list[float]):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates]
    created = create_optimizer(OptimizerOptions(optimizer_type=name, learning_rate=rates[0]), groups)
    return created.optimizer, create_lr_scheduler(LRSchedulerOptions(), created, 10)


def test_learning_rates_carry_the_names_of_their_groups():
    optimizer, scheduler = created_with_groups("AdamW", [1e-4, 2e-4])
    named = learning_rate_scalars(optimizer, scheduler, ["textencoder", "unet plus"])
    assert named == {"lr/textencoder": 1e-4, "lr/unet plus": 2e-4}
    assert set(learning_rate_scalars(optimizer, scheduler, None)) == {"lr/textencoder", "lr/group1"}
    assert set(learning_rate_scalars(optimizer, scheduler, None, unet_only=True)) == {"lr/group0", "lr/group1"}


def test_adapted_rates_are_logged_too():
    pytest.importorskip("prodigyopt")
    optimizer, scheduler = created_with_groups("Prodigy", [1.0])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()
    scalars = learning_rate_scalars(optimizer, scheduler, ["unet"])
    assert scalars == {"lr/unet": 1.0, "lr/d*lr/unet": optimizer.param_groups[0]["d"]}


def test_norms_come_from_the_limit_or_from_the_network_itself():
    assert norm_scalars(SimpleNamespace(), None) == {}
    assert norm_scalars(SimpleNamespace(), (3, torch.tensor(0.5), torch.tensor(0.9))) == {
        "max_norm/keys_scaled": 3,
        "norm/avg_key_norm": 0.5,
        "max_norm/max_key_norm": pytest.approx(0.9),
    }
    measuring = SimpleNamespace(
        weight_norms=lambda: torch.tensor([1.0, 3.0]),
        grad_norms=lambda: None,
        combined_weight_norms=lambda: torch.tensor([2.0, 4.0]),
    )
    assert norm_scalars(measuring, None) == {
        "norm/avg_key_norm": 2.0,
        "max_norm/max_key_norm": 3.0,
        "norm/avg_combined_norm": 3.0,
    }
