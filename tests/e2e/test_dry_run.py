"""``--dry_run`` tells the truth: what its plan says is what the training does afterwards, and it leaves no trace."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from flux_train_network import FluxNetworkTrainer, FluxTrainingOptions
from library.errors import UserError
from library.memory.simulation import Effort, PeakMemory
from library.models.flux.pipeline import FluxPipeline
from library.training.plan.dry_run import plan_of
from library.training.plan.plan_report import MemoryPhase, Plan, plan_lines
from library.training.plan.planned_files import kept
from library.training.plan.step_time import (
    COPYING,
    LEFT_OUT,
    USUAL,
    Speed,
    mean_share,
    measure_speed,
    step_seconds,
    time_line,
)
from library.training.plan.verdict import verdict_of
from library.training.report.description import size_on_disk
from library.training.training_loop import TrainingLoop
from tests.e2e.test_flux_training_options import SMALL
from tests.running import make_trainer as begin
from tests.running import no_weights_are_read, run_in_process

FLUX = (FluxNetworkTrainer, FluxTrainingOptions)


@pytest.fixture
def make_trainer(tmp_path, dataset_toml):
    """A trainer over the images of ``tmp_path / "images"`` that has not begun."""

    def make(family: tuple[type, type], *arguments: object, dataset: dict[str, object] | None = None) -> Any:
        given = [*arguments, "--output_dir", tmp_path / "out", "--max_data_loader_n_workers", "0"]
        given += ["--dataset_config", dataset_toml(tmp_path / "images", **(SMALL | (dataset or {})))]
        return begin(family[0], *given)

    return make


@pytest.fixture(autouse=True)
def images(tmp_path, image_folder) -> Path:
    """A folder of images of the test's own, where caches may be written."""
    return Path(shutil.copytree(image_folder, tmp_path / "images"))


@pytest.fixture
def plan_only(make_trainer, tmp_path):
    """The plan of a dry run, which must read no weights and change no file."""

    def run(family: tuple[type, type], *arguments: object, **dataset: object) -> Plan:
        trainer = make_trainer(family, *arguments, "--dry_run", dataset=dataset)
        plans: list[Plan] = []
        trainer.show_plan = lambda: plans.append(plan_of(trainer))
        before = snapshot(tmp_path)
        with no_weights_are_read():
            trainer.train()
        assert snapshot(tmp_path) == before
        return plans[0]

    return run


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def groups_of(trainer: Any) -> list[tuple[str, int, int]]:
    """Name, tensors and parameters of each parameter group."""
    groups = zip(trainer.optimization.group_names, trainer.optimization.optimizer.param_groups)
    return [(name, len(group["params"]), sum(p.numel() for p in group["params"])) for name, group in groups]


def planned_groups(plan: Plan) -> list[tuple[str, int, int]]:
    assert plan.start is not None
    return [(group.name, group.tensors, group.parameters) for group in plan.start.groups]


def state_bytes(trainer: Any) -> int:
    states = trainer.optimization.optimizer.state.values()
    tensors = [value for state in states for value in state.values() if getattr(value, "ndim", 0)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check_files(plan: Plan, out: Path, drawn: int) -> None:
    """The plan's files are those in ``out``, in number and size, and its samples as many as were drawn."""
    networks, states = (kept(paths, plan.files.removed) for paths in (plan.files.networks, plan.files.states))
    assert {path.name for path in out.glob("*.safetensors")} == {path.name for path in networks}
    assert {path.name for path in out.glob("*-state")} == {path.name for path in states}
    assert plan.files.removed and plan.sample_prompts * plan.files.sample_moments == drawn
    assert plan.network_bytes == pytest.approx(size_on_disk(out / "last.safetensors"), rel=0.05)
    assert plan.state_bytes == pytest.approx(size_on_disk(out / "last-state"), rel=0.15)


def test_the_plan_is_what_the_training_does(plan_only, make_trainer, flux_command, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1\na dog --w 64 --h 64 --s 1\n", encoding="utf-8")
    arguments = [*flux_command, "--max_train_epochs", "2", "--gradient_accumulation_steps", "2"]
    arguments += ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--validation_split", "0.2"]
    arguments += ["--save_every_n_steps", "2", "--save_last_n_steps", "2", "--save_every_n_epochs", "1", "--save_state"]
    arguments += ["--sample_prompts", prompts, "--sample_every_n_epochs", "2", "--sample_at_first"]
    arguments += ["--lr_scheduler", "cosine", "--lr_warmup_steps", "3", "--text_encoder_lr", "5e-4"]
    arguments += ["--network_args", "loraplus_lr_ratio=4"]
    plan = plan_only(FLUX, *arguments)

    class RecordingLoop(TrainingLoop):
        rates: list[list[float]] = []

        def update(self) -> None:
            self.rates.append([group["lr"] for group in self.optimization.optimizer.param_groups])
            super().update()

    class Recording(FluxNetworkTrainer):
        loop_class = RecordingLoop

        def fill_caches(self) -> Any:
            self.cached = super().fill_caches()
            return self.cached

    trainer = make_trainer((Recording, FluxTrainingOptions), *arguments)
    trainer.train()

    assert plan.start is not None
    assert (plan.start.steps, plan.start.epochs) == (trainer.progress.step, trainer.plan.epochs)
    assert trainer.progress.images == plan.start.epochs * plan.start.images_per_epoch
    assert planned_groups(plan) == groups_of(trainer)
    assert plan.start.modules == {"transformer": 26, "text encoder": 12}
    for name, index in zip(plan.rates, range(4)):
        assert [rate for _, rate in plan.rates[name]] == pytest.approx(
            [RecordingLoop.rates[step - 1][index] for step, _ in plan.rates[name]]
        )
    check_files(plan, tmp_path / "out", len(trainer.outputs.sample_files))
    training = next(phase for phase in plan.phases if phase.name.startswith("training"))
    assert training.optimizer == state_bytes(trainer)
    assert training.network == sum(p.numel() * 4 for p in trainer.network.parameters())
    made = [report.made for report in trainer.cached]
    assert [sum(cache.states.values()) for cache in plan.caches] == made
    assert all(cache.states.get("valid", 0) == 0 for cache in plan.caches)
    npz = sum(path.stat().st_size for path in (tmp_path / "images").glob("*_flux.npz"))
    assert sum(cache.bytes or 0 for cache in plan.caches[:2]) == pytest.approx(npz, rel=0.4)

    again = plan_only(FLUX, *arguments)
    assert [cache.states for cache in again.caches] == [{"valid": count} for count in made]
    assert not any(phase.name.startswith("caching") for phase in again.phases)


def test_text_encoders_are_not_asked_for_where_all_captions_are_cached(
    plan_only, make_trainer, flux_command, monkeypatch
):
    arguments = [*flux_command, "--max_train_steps", "1", "--network_train_unet_only"]
    arguments.append("--cache_text_encoder_outputs_to_disk")
    make_trainer(FLUX, *arguments).train()
    monkeypatch.setattr(FluxPipeline, "tokenizer", lambda self, encoder: pytest.fail("a tokenizer was looked for"))
    plan = plan_only(FLUX, *arguments)
    assert plan.start is not None and list(plan.start.absent) == ["clip_l", "t5xxl"]
    assert [phase.name for phase in plan.phases if phase.activations is None] == []


def test_a_plan_for_a_resumed_run_counts_what_is_left(plan_only, make_trainer, flux_command, tmp_path):
    arguments = [*flux_command, "--network_train_unet_only", "--lr_scheduler", "linear", "--max_train_steps", "10"]
    make_trainer(FLUX, *arguments, "--save_state", "--save_every_n_steps", "4").train()
    state = tmp_path / "out" / "at-step00000008-state"
    plan = plan_only(FLUX, *arguments, "--resume", state, "--save_every_n_steps", "1")
    assert plan.start is not None and plan.start.start_step == 8
    assert [path.name for path in plan.files.networks] == [
        *("at-step00000009.safetensors", "at-step00000010.safetensors", "last.safetensors")
    ]
    assert plan.rates["unet"] == [(9, pytest.approx(2e-4)), (10, pytest.approx(1e-4))]
    with pytest.raises(UserError, match="belongs to another run"):
        plan_only(FLUX, *arguments, "--resume", state, "--network_dim", "8")
    with pytest.raises(UserError, match="nothing is left to train"):
        plan_only(FLUX, *arguments, "--resume", state, "--max_train_steps", "8")


def test_weights_of_a_file_are_checked_against_the_model(plan_only, make_trainer, flux_command, tmp_path):
    make_trainer(FLUX, *flux_command, "--max_train_steps", "1", "--network_dim", "2").train()
    first = tmp_path / "first.safetensors"
    shutil.move(tmp_path / "out" / "last.safetensors", first)
    shutil.rmtree(tmp_path / "out")

    def planned(*arguments: object) -> Plan:
        return plan_only(FLUX, *flux_command, "--max_train_steps", "1", "--network_weights", first, *arguments)

    with pytest.raises(UserError, match=r"first\.safetensors.*rank 2"):
        planned()
    plan = planned("--dim_from_weights", "--base_weights", first)
    assert plan.problem == "" and plan.start is not None
    assert sum(group.parameters for group in plan.start.groups) * 2 == sum(
        group.parameters for group in plan_only(FLUX, *flux_command, "--max_train_steps", "1").start.groups
    )


def test_a_run_tries_weights_before_it_loads_the_model(make_trainer, flux_command, tmp_path):
    make_trainer(FLUX, *flux_command, "--max_train_steps", "1", "--network_dim", "2").train()
    first = tmp_path / "first.safetensors"
    shutil.move(tmp_path / "out" / "last.safetensors", first)
    arguments = [*flux_command, "--max_train_steps", "1", "--cache_latents", "--network_weights", first]
    with no_weights_are_read(), pytest.raises(UserError, match=r"first\.safetensors.*rank 2"):
        make_trainer(FLUX, *arguments).train()
    trainer = make_trainer(FLUX, *arguments, "--base_weights", first, "--network_dim", "2")
    trainer.train()
    assert trainer.progress.step == 1
    assert all(type(p.data) is torch.Tensor for p in trainer.network.parameters())


def test_a_network_that_looks_at_numbers_is_unknown_but_no_error(plan_only, flux_command, tmp_path, monkeypatch):
    (tmp_path / "curious_network.py").write_text(
        "def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, **arguments):\n"
        "    return float(next(unet.parameters()).sum())\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    plan = plan_only(FLUX, *flux_command, "--network_module", "curious_network", "--max_train_steps", "4")
    text = "\n".join(plan_lines(plan))
    assert plan.start is None and "network: unknown (DataDependentOutputException" in text
    assert "steps 4, epochs 1" in text and "last.safetensors" in text


def test_what_is_wrong_or_odd_is_said_and_nothing_is_made(plan_only, flux_command, tmp_path, images, caplog):
    caplog.set_level("INFO")
    arguments = [*flux_command, "--max_train_steps", "4"]
    with pytest.raises(UserError, match="--dry_run writes nothing and --debug_dataset writes a page"):
        plan_only(FLUX, *arguments, "--debug_dataset")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--logging_dir: cannot write"):
        plan_only(FLUX, *arguments, "--logging_dir", tmp_path / "file" / "logs")
    Image.new("CMYK", (128, 128)).save(images / "cmyk.jpg")
    plan = plan_only(FLUX, *arguments, "--logging_dir", tmp_path / "a" / "logs", cache_info=True)
    assert "1 image with CMYK: converted to RGB without a colour profile (cmyk.jpg)" in caplog.text
    assert len(plan.other_files) == 2  # curves and metadata_cache.json are announced, and neither is there
    (images / "zero.png").touch()
    with pytest.raises(UserError, match="1 of 14 images cannot be read"):
        plan_only(FLUX, *arguments)


def test_a_dry_run_from_a_configuration_file_ends_well(flux_command, dataset_toml, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text("[any]\ndry_run = true\nmax_train_steps = 12\n", encoding="utf-8")
    arguments = [*flux_command, "--dataset_config", dataset_toml(), "--output_dir", tmp_path / "out"]
    result = run_in_process("flux_train_network.py", *arguments, "--config_file", config)
    assert result.returncode == 0, result.stderr[-3000:]
    for words in ("12 steps: 2 epochs of 7 steps", "26 transformer and 12 text encoder modules", "All checks passed"):
        assert words in result.stderr
    time, verdict = result.stderr.splitlines()[-2:]
    assert re.fullmatch(r"Expected time: about .* per step \(.* to .*\) on cpu, .* for 12 steps; .* come on top", time)
    assert re.fullmatch(r"Verdict: fits on GPUs of 8, 12, 16 and 24 GB \([\d.]+ MiB expected\)", verdict)
    assert not (tmp_path / "out").exists()


def test_the_plan_says_what_is_on_the_device_and_what_in_system_ram(plan_only, flux_command):
    arguments = [*flux_command, "--network_train_unet_only", "--cache_latents", "--cache_text_encoder_outputs"]
    plain, streamed = (plan_only(FLUX, *arguments, "--blocks_to_swap", count) for count in ("0", "2"))
    one, other = (
        next(phase for phase in plan.phases if phase.name.startswith("training")) for plan in (plain, streamed)
    )
    assert one.weights.keys() == {"transformer"} and one.host.keys() >= {"latent cache", "text encoder cache"}
    moved, ring = other.host["streamed blocks"], other.weights["streaming ring"]
    assert other.weights["transformer"] + moved == one.weights["transformer"] and moved > ring > 0
    assert one.total - other.total == moved - ring
    assert streamed.phases[0].name == "caching latents" and "streamed blocks" not in streamed.phases[0].host
    lines = plan_lines(streamed)
    assert any("streaming ring" in line and "system RAM" in line for line in lines)
    assert any(
        re.match(r"  in system RAM beside libraries: latent cache .*, streamed blocks \d", line) for line in lines
    )


def test_memory_of_another_device_and_system_ram_are_counted_apart():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), PeakMemory(device=torch.device("meta")) as memory:
        on_device = torch.empty(100, device="meta")
        offloaded = on_device.new_empty(50, device="cpu")
        del on_device
        again = torch.empty(60, device="meta")
    assert (memory.peak.device, memory.peak.host) == (400, 200) and len(offloaded) + len(again) == 110


def test_fp16_is_planned_where_it_cannot_be_trained(plan_only, make_trainer, flux_command, caplog):
    caplog.set_level("INFO")
    arguments = [*flux_command, "--max_train_steps", "2", "--cache_latents"]
    plan = plan_only(FLUX, *arguments, "--mixed_precision", "fp16")
    assert "--mixed_precision fp16 is planned as for a CUDA device" in caplog.text
    assert plan.start is not None and {part.dtype for part in plan.start.parts} == {"float16"}
    assert all(phase.activations for phase in plan.phases) and plan.verdict.startswith("fits on GPUs of 8, 12, 16 and")
    with pytest.raises(UserError, match="--mixed_precision fp16 needs a CUDA device"):
        make_trainer(FLUX, *arguments, "--mixed_precision", "fp16").train()


class OnCuda:
    """What a verdict looks at in a run on a GPU."""

    accelerator = SimpleNamespace(device=torch.device("cuda:0"))

    def __init__(self, vram_budget: float | None = None) -> None:
        self.options = SimpleNamespace(precision=SimpleNamespace(vram_budget=vram_budget))


def test_the_verdict_on_a_gpu_counts_all_its_memory_and_names_what_others_hold(monkeypatch):
    gib = 1 << 30
    phase = MemoryPhase("training", {"transformer": 8 * gib}, 0, gib, gib, {})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (11 * gib, 16 * gib))
    expected = "(10.0 GiB expected, 14.4 GiB of 16.0 GiB usable"
    assert verdict_of(OnCuda(), [phase], "") == f"fits on cuda:0 {expected})"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * gib, 16 * gib))
    assert verdict_of(OnCuda(), [phase], "") == f"fits on cuda:0 {expected}, but only 4.0 GiB are free now)"
    assert verdict_of(OnCuda(12), [phase], "").startswith("fits into --vram_budget 12 (10.0 GiB expected, 10.6 GiB")
    unknown = replace(phase, activations=None, reason="it asks for a value")
    assert verdict_of(OnCuda(), [unknown], "") == (
        "unknown: the memory of this run cannot be planned (it asks for a value)"
    )


def test_the_time_of_a_step_is_that_of_its_operations_or_of_its_copies():
    speed = Speed(flops=1e12, bytes=1e11, operation=1e-5, waits=False)
    work = Effort(flops=10**12, bytes=10**11, operations=10**5)
    gpu, cpu = step_seconds(work, speed), step_seconds(work, replace(speed, waits=True))
    assert (gpu, cpu) == (pytest.approx(2 * USUAL), pytest.approx(3 * USUAL))
    assert step_seconds(work, speed, share=0.25) == pytest.approx(USUAL)  # it starts as many operations
    assert step_seconds(work, speed, copied=round(5 * COPYING)) == pytest.approx(5 * USUAL)
    assert time_line(90, 100, "cuda") == (
        f"about 1 min 30 s per step (45 s to 3 min 0 s) on cuda, 2 h 30 min for 100 steps; {LEFT_OUT}"
    )
    state = torch.get_rng_state()
    measured = measure_speed(torch.device("cpu"), torch.bfloat16, (64, 32, 16))
    assert min(measured.flops, measured.bytes, measured.operation) > 0 and measured.waits
    assert torch.equal(state, torch.get_rng_state())


def test_the_mean_batch_is_smaller_than_the_largest(make_trainer, flux_command):
    trainer = make_trainer(FLUX, *flux_command, "--max_train_steps", "1", dataset={"batch_size": 3})
    for step in ("check_options", "prepare_output", "check_network", "start_processes", "read_data"):
        getattr(trainer, step)()
    data = trainer.data.train
    sizes = [
        [bucket] * len(samples) for dataset in data.datasets for bucket, samples in dataset.bucket_samples().items()
    ]
    batches = [bucket[first : first + 3] for bucket in sizes for first in range(0, len(bucket), 3)]
    pixels = [sum(width * height for width, height in batch) for batch in batches]
    assert len(set(pixels)) > 1
    assert mean_share(data, max(pixels)) == pytest.approx(sum(pixels) / len(pixels) / max(pixels))
