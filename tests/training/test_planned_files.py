"""The planned files are those that a run with the same settings writes and keeps, wherever it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.prompt_options import PromptOptions
from library.training.output.checkpoints import OutputFolder, SavingOptions
from library.training.output.sample_images import SampleOptions, Samples
from library.training.output.state import Position
from library.training.plan.lengths import RunPlan
from library.training.plan.planned_files import kept, plan_files


def written_by_the_loop(plan: RunPlan, start: Position, output: OutputFolder, samples: Samples):
    """The order of ``NetworkTrainer``'s loop, batch by batch, with a set of names in place of a folder."""
    there: dict[Path, None] = {}
    moments = int(start.step == 0 and samples.due_at_start())
    position = Position(start.epoch, start.batch, start.step)

    def write(network: Path, state: Path, old: list[Path]) -> None:
        there.update(dict.fromkeys(output.with_average(network)))
        if output.options.save_state:
            there[state] = None
        for path in old:
            there.pop(path, None)

    while position.step < plan.max_steps:
        epoch = position.epoch
        for index in range(position.batch, plan.batches_per_epoch):
            position.batch = index + 1
            if not plan.ends_step(index):
                continue
            position.step += 1
            moments += samples.due_after_step(position.step)
            if output.step_is_due(position.step):
                step = position.step
                write(output.step_file(step), output.step_state(step), output.old_after_step(step))
            if position.step >= plan.max_steps:
                break
        number = epoch + 1
        if position.batch >= plan.batches_per_epoch:
            position = Position(number, 0, position.step)
        moments += samples.due_after_epoch(number)
        if output.epoch_is_due(number, plan.epochs):
            write(output.epoch_file(number), output.epoch_state(number), output.old_after_epoch(number))
    there.update(dict.fromkeys(output.with_average(output.final_file())))
    if output.options.save_state or output.options.save_state_on_train_end:
        there[output.final_state()] = None
    return set(there), moments


every = st.none() | st.integers(1, 6)


@settings(max_examples=120)
@given(
    batches=st.integers(1, 9),
    accumulation=st.integers(1, 4),
    steps=st.integers(1, 30),
    first=st.integers(0, 29),
    saving=st.fixed_dictionaries(
        {
            **{name: every for name in ("save_every_n_epochs", "save_every_n_steps", "save_n_epoch_ratio")},
            **{name: every for name in ("save_last_n_epochs", "save_last_n_steps", "save_last_n_epochs_state")},
            "save_last_n_steps_state": every,
            "save_state": st.booleans(),
            "save_state_on_train_end": st.booleans(),
        }
    ),
    averages=st.booleans(),
    sampling=st.fixed_dictionaries(
        {"sample_every_n_steps": every, "sample_every_n_epochs": every, "sample_at_first": st.booleans()}
    ),
)
def test_as_the_loop_does(tmp_path_factory, batches, accumulation, steps, first, saving, averages, sampling):
    folder = tmp_path_factory.getbasetemp()
    plan = RunPlan(batches, accumulation, steps)
    start = plan.position_of(min(first, steps - 1))
    output = OutputFolder(SavingOptions(output_dir=str(folder), **saving), read_only=True, averages=averages)
    output.resolve_epoch_ratio(plan.epochs)
    samples = Samples(SampleOptions(), None, None)
    samples.options, samples.prompts = SampleOptions(**sampling), [PromptOptions(prompt="a cat")]
    planned = plan_files(plan, start, output, samples)
    expected, moments = written_by_the_loop(plan, start, output, samples)
    assert {*kept(planned.networks, planned.removed), *kept(planned.states, planned.removed)} == expected
    assert planned.sample_moments == moments


@pytest.mark.parametrize("name", ["a", "a/b/c"])
def test_a_read_only_folder_is_not_made(tmp_path, name):
    OutputFolder(SavingOptions(output_dir=str(tmp_path / name)), read_only=True)
    assert list(tmp_path.iterdir()) == []
