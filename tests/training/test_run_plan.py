"""Steps, epochs and start positions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.errors import UserError
from library.training.output.state import Position, ResumeOptions
from library.training.plan.lengths import RunPlan, check_lengths, plan_run, start_position
from library.training.run_options import LengthOptions


@given(st.integers(1, 50), st.integers(1, 7))
def test_every_batch_of_an_epoch_belongs_to_one_step(batches, accumulation):
    plan = RunPlan(batches, accumulation, max_steps=100)
    ends = [index for index in range(batches) if plan.ends_step(index)]
    assert len(ends) == plan.steps_per_epoch
    assert ends[-1] == batches - 1
    assert sum(1 / plan.batches_in_step(index) for index in range(batches)) == pytest.approx(plan.steps_per_epoch)


def test_the_last_step_of_an_epoch_may_be_short():
    plan = RunPlan(7, 2, 8)
    assert plan.steps_per_epoch == 4 and plan.epochs == 2
    assert [plan.batches_in_step(i) for i in range(7)] == [2, 2, 2, 2, 2, 2, 1]


def test_epochs_win_over_steps():
    assert plan_run(LengthOptions(max_train_steps=5, max_train_epochs=3), 10).max_steps == 30
    assert plan_run(LengthOptions(max_train_steps=5), 10).max_steps == 5


@given(st.integers(1, 20), st.integers(1, 5), st.integers(0, 99))
def test_a_position_is_where_an_uninterrupted_run_would_be(batches, accumulation, step):
    plan = RunPlan(batches, accumulation, 100)
    walked = Position()
    while walked.step < step:
        ends = plan.ends_step(walked.batch)
        walked.batch += 1
        walked.step += ends
        if walked.batch == batches:
            walked = Position(walked.epoch + 1, 0, walked.step)
    assert plan.position_of(step) == walked


def test_initial_step_counts_steps_as_done():
    plan = RunPlan(100, 2, 200)  # 50 steps an epoch
    assert start_position(plan, ResumeOptions(initial_step=60), None, True) == Position(1, 0, 60)
    skipping = ResumeOptions(initial_step=60, skip_until_initial_step=True)
    assert start_position(plan, skipping, None, True) == Position(1, 20, 60)
    assert start_position(plan, ResumeOptions(initial_epoch=3), None, True) == Position(2, 0, 100)


def test_a_resumed_run_goes_on_where_it_was():
    plan = RunPlan(100, 2, 200)
    saved = Position(1, 20, 60)
    assert start_position(plan, ResumeOptions(), saved, True) == saved
    assert start_position(plan, ResumeOptions(), saved, False) == Position(1, 0, 60)


def test_nothing_left_to_train_is_an_error():
    with pytest.raises(UserError, match="nothing is left to train"):
        start_position(RunPlan(10, 1, 20), ResumeOptions(), Position(2, 0, 20), True)
    with pytest.raises(UserError, match="--max_train_steps must be at least 1"):
        check_lengths(LengthOptions(max_train_steps=0))
    with pytest.raises(UserError, match="needs --initial_step"):
        start_position(RunPlan(10, 1, 20), ResumeOptions(skip_until_initial_step=True), None, True)
