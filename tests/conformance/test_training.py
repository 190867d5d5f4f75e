"""What a run of every family does: its dry run, its steps and its LoRA file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from library.models import tokenizer_files
from library.training.plan import dry_run
from library.training.plan.dry_run import plan_of
from library.training.plan.plan_report import Plan, plan_lines
from library.training.report.description import part_facts
from library.training.training_loop import TrainingLoop
from tests.conformance.conftest import IN_TURN
from tests.running import no_weights_are_read, run_in_process
from tests.running import train as train_in_process

LORA = "lora.safetensors"
CACHED = ("--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only")


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> Path:
    """The folder of a run of one step without caches, with the text encoders that the family trains."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, "--max_train_steps", "1")
    return folder


class Reads(TorchFunctionMode):
    """Counts how often the program asks for values of tensors, for which it would wait for a GPU, in each step."""

    asking = {getattr(torch.Tensor, f"__{kind}__") for kind in ("bool", "float", "int", "index", "array")}
    asking |= {getattr(torch.Tensor, name) for name in ("item", "tolist", "cpu", "numpy", "nonzero", "equal")}
    asking |= {torch.nonzero, torch.equal, torch.allclose}

    def __init__(self) -> None:
        super().__init__()
        self.steps = [0]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        positions = bool(args) and isinstance(args[0], torch.Tensor) and args[0].shape[2:] == (3,)
        self.steps[-1] += function in self.asking and not positions
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", IN_TURN, indirect=True)
def test_a_step_asks_for_values_of_tensors_once(train, tmp_path, monkeypatch):
    """However many micro-batches it has. What lies in system RAM need not be waited for, but is counted here: AdamW's
    step counters, which SGD does without, and the mask of Chroma's text; but not the positions of tokens."""
    reads, train_loop, after_step = Reads(), TrainingLoop.train, TrainingLoop.after_step
    expected = []

    def counted(self: TrainingLoop, *arguments: Any) -> None:
        expected.append(1 + 2 * len(self.run.pipeline.read_on_host - {"txt_ids"}))
        with reads:
            train_loop(self, *arguments)

    def next_step(self: TrainingLoop, *arguments: Any) -> None:
        after_step(self, *arguments)
        reads.steps.append(0)

    monkeypatch.setattr(TrainingLoop, "train", counted)
    monkeypatch.setattr(TrainingLoop, "after_step", next_step)
    command = ["--max_train_steps", "2", "--gradient_accumulation_steps", "2", "--optimizer_type", "SGD"]
    command += ["--max_data_loader_n_workers", "2"]  # so that batches are put together in other threads
    train(tmp_path, *command, *CACHED, "--logging_dir", tmp_path / "logs")
    assert reads.steps == [*expected * 2, 0]


@pytest.mark.parametrize("family", IN_TURN, indirect=True)
def test_a_lora_file_is_continued_where_it_ended(train, whole, tmp_path):
    """Ranks, alphas and weights come from the file; a step with a tiny learning rate writes them again."""
    again = ["--network_weights", whole / LORA, "--dim_from_weights", "--network_dim", "16", "--network_alpha", "3"]
    train(tmp_path, *again, "--max_train_steps", "1", "--learning_rate", "1e-30")
    tensors, continued = load_file(whole / LORA), load_file(tmp_path / LORA)
    assert continued.keys() == tensors.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(continued[key], tensor, rtol=1e-6, atol=1e-20)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.any() for key, tensor in tensors.items() if key.endswith("lora_up.weight"))


@pytest.fixture
def plans(monkeypatch) -> list[Plan]:
    """The plans of the test's dry runs."""
    made: list[Plan] = []

    def kept(run: Any) -> Plan:
        made.append(plan_of(run))
        return made[-1]

    monkeypatch.setattr(dry_run, "plan_of", kept)
    return made


@pytest.mark.parametrize("family", IN_TURN, indirect=True)
def test_a_dry_run_announces_what_is_built_and_written_and_leaves_no_trace(
    family, command, train, plans, images, tmp_path
):
    given = ["--max_train_steps", "3", "--save_every_n_steps", "2", "--ema_decay", "0.9", *family.planned.split()]
    before = snapshot(images)
    with no_weights_are_read():
        said = train(tmp_path / "out", *given, "--dry_run", *family.idle.split()).stderr
    (plan,) = plans
    assert "All checks passed" in said and "unknown" not in said
    assert [phase.reason for phase in plan.phases if phase.activations is None] == []
    assert len([phase for phase in plan.phases if "training" in phase.name]) == 2
    assert all(line.isascii() for line in plan_lines(plan) if str(tmp_path) not in line)
    assert not (tmp_path / "out").exists() and snapshot(images) == before
    idle = [line for line in said.splitlines() if family.idle.split()[0] in line]
    assert len(idle) == 1 and "INFO    no effect " in idle[0]

    trainer = train_in_process(family.name, *command, "--output_dir", tmp_path / "out", *given)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    saved = {LORA, "lora-step00000002.safetensors"}
    assert written == saved | {name.replace(".", "-ema.") for name in saved} and all(name in said for name in written)
    assert plan.start is not None and plan.problem == "" and plan.start.family == trainer.family
    names = [name.partition(".")[0] for name in load_file(tmp_path / "out" / LORA)]
    assert sum(plan.start.modules.values()) == len(set(names))
    groups = zip(trainer.optimization.group_names, trainer.optimization.optimizer.param_groups)
    assert [(group.name, group.tensors, group.parameters) for group in plan.start.groups] == [
        (name, len(group["params"]), sum(p.numel() for p in group["params"])) for name, group in groups
    ]
    trainer.pipeline.load_text_encoders(trainer.pipeline.encoders)
    trainer.pipeline.load_autoencoder()
    assert sorted(plan.start.parts, key=lambda part: part.name) == [
        part_facts(name, module) for name, module in sorted(trainer.pipeline.modules.items())
    ]


def test_an_option_that_does_not_exist_is_one_sentence(family, command, tmp_path):
    with no_weights_are_read():
        done = run_in_process(family.script, *command, "--output_dir", tmp_path / "out", "--network_dimm", "4")
    assert done.returncode == 2
    assert done.stderr == "error: Unknown option --network_dimm. Did you mean --network_dim?\n"
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_missing_is_named_before_anything_is_loaded(family, command, tmp_path):
    """Even where captions are encoded once and images come first."""
    for kind in vars(tokenizer_files).values():
        if isinstance(kind, tokenizer_files.TokenizerKind):
            (tmp_path / "tokenizers" / kind.folder_name).mkdir(parents=True)
    given = [*command, *CACHED, "--output_dir", tmp_path / "out", "--tokenizer_cache_dir", tmp_path / "tokenizers"]
    with no_weights_are_read():
        done = run_in_process(family.script, *given)
    assert done.returncode == 2 and "--tokenizer_cache_dir" in done.stderr.splitlines()[-1]
