"""Learning rate schedules against recorded curves, transformers and diffusers; their states survive JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.console import LOGGER
from library.errors import UserError
from library.training.optim.lr_schedulers import (
    LRSchedulerOptions,
    check_lr_scheduler_options,
    create_lr_scheduler,
    load_scheduler_state,
    scheduler_state,
    step_scheduler,
)

CURVES = json.loads((Path(__file__).parents[1] / "reference_data" / "lr_curves.json").read_text(encoding="utf-8"))
RULES = 'step_rules="1:10,0.1:20,0.01:30,0.005"'


def make_optimizer(rate: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def curve(scheduler, optimizer, steps: int = 100) -> list[float]:
    """The rate before each step."""
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        step_scheduler(scheduler, 1.0)
    return rates


def options_of(key: str) -> LRSchedulerOptions:
    name, *settings_ = key.split(",")
    values = dict(setting.split("=") for setting in settings_)

    def number(text: str) -> int | float:
        return float(text) if "." in text else int(text)

    return LRSchedulerOptions(
        lr_scheduler=name,
        lr_warmup_steps=number(values["warmup"]),
        lr_decay_steps=number(values["decay"]),
        lr_scheduler_num_cycles=int(values["cycles"]),
        lr_scheduler_power=float(values["power"]),
        lr_scheduler_min_lr_ratio=0.1 if name in ("cosine_with_min_lr", "warmup_stable_decay") else None,
        lr_scheduler_args=[RULES] if name == "piecewise_constant" else [],
    )


@pytest.mark.parametrize("key", [key for key, value in CURVES.items() if isinstance(value, list)])
def test_schedules_give_the_recorded_curves(key):
    optimizer = make_optimizer()
    scheduler = create_lr_scheduler(options_of(key), optimizer, 100)
    assert curve(scheduler, optimizer) == pytest.approx(CURVES[key], rel=1e-12, abs=0)


@pytest.mark.parametrize("key", [key for key, value in CURVES.items() if not isinstance(value, list)])
def test_what_was_an_error_before_is_one_sentence_now(key):
    with pytest.raises(UserError, match="has no warm-up; use constant_with_warmup"):
        check_lr_scheduler_options(options_of(key))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(
        """constant_with_warmup linear cosine cosine_with_restarts polynomial inverse_sqrt cosine_with_min_lr
        warmup_stable_decay""".split()
    ),
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(1, 4),
)
def test_schedules_equal_those_of_transformers(name, warmup, decay, cycles):
    optimization = pytest.importorskip("transformers.optimization")
    total = 40
    function = optimization.TYPE_TO_SCHEDULER_FUNCTION[optimization.SchedulerType(name)]
    arguments = {
        "constant_with_warmup": {},
        "linear": {"num_training_steps": total},
        "cosine": {"num_training_steps": total},
        "cosine_with_restarts": {"num_training_steps": total, "num_cycles": cycles},
        "polynomial": {"num_training_steps": total, "power": 1.5},
        "inverse_sqrt": {"timescale": 7},
        "cosine_with_min_lr": {"num_training_steps": total, "num_cycles": cycles / 2, "min_lr_rate": 0.2},
        "warmup_stable_decay": {
            "num_stable_steps": total - warmup - decay,
            "num_decay_steps": decay,
            "num_cycles": cycles / 2,
            "min_lr_ratio": 0.2,
        },
    }[name]
    theirs = make_optimizer()
    expected = curve(function(theirs, num_warmup_steps=warmup, **arguments), theirs, 45)
    ours = make_optimizer()
    options = LRSchedulerOptions(
        lr_scheduler=name,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_scheduler_num_cycles=cycles,
        lr_scheduler_power=1.5,
        lr_scheduler_timescale=7,
        lr_scheduler_min_lr_ratio=0.2,
    )
    assert curve(create_lr_scheduler(options, ours, total), ours, 45) == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("rise", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("fall", ["linear", "cosine", "1-sqrt"])
def test_scheduler_arguments_reach_warmup_stable_decay(rise, fall):
    optimization = pytest.importorskip("transformers.optimization")
    theirs, ours = make_optimizer(), make_optimizer()
    reference = optimization.get_wsd_schedule(
        theirs, 5, 10, num_stable_steps=15, warmup_type=rise, decay_type=fall, min_lr_ratio=0.1
    )
    options = LRSchedulerOptions(
        lr_scheduler="warmup_stable_decay",
        lr_warmup_steps=5,
        lr_decay_steps=10,
        lr_scheduler_args=[f"warmup_type='{rise}'", f'decay_type="{fall}"'],
        lr_scheduler_min_lr_ratio=0.1,
    )
    expected = curve(reference, theirs, 32)
    assert curve(create_lr_scheduler(options, ours, 30), ours, 32) == pytest.approx(expected, rel=1e-12, abs=0)


def test_piecewise_constant_equals_that_of_diffusers():
    optimization = pytest.importorskip("diffusers.optimization")
    theirs, ours = make_optimizer(), make_optimizer()
    expected = curve(optimization.get_piecewise_constant_schedule(theirs, "0.5:3,2:7,0.1"), theirs, 10)
    options = LRSchedulerOptions(lr_scheduler="piecewise_constant", lr_scheduler_args=["step_rules='0.5:3,2:7,0.1'"])
    assert curve(create_lr_scheduler(options, ours, 10), ours, 10) == expected


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("reduce_lr_on_plateau", ["patience=2", "factor=0.5"]), ("cosine_warmup_with_min_lr", ["min_lr=1e-5"])],
)
def test_other_schedules_of_transformers_work(name, arguments):
    pytest.importorskip("transformers")
    optimizer = make_optimizer()
    options = LRSchedulerOptions(lr_scheduler=name, lr_scheduler_args=arguments)
    rates = curve(create_lr_scheduler(options, optimizer, 20), optimizer, 20)
    assert rates[-1] < rates[1]


def test_a_ratio_is_a_share_of_all_updates():
    optimizer = make_optimizer()
    options = LRSchedulerOptions(lr_scheduler="constant_with_warmup", lr_warmup_steps=0.15)
    rates = curve(create_lr_scheduler(options, optimizer, 50), optimizer, 10)
    assert rates == pytest.approx([1e-3 * min(1, i / 7) for i in range(10)])


def test_every_group_is_scheduled_from_its_own_rate():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1.0, 0.1)]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    scheduler = create_lr_scheduler(LRSchedulerOptions(lr_scheduler="linear"), optimizer, 4)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.75, 0.075])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lr_scheduler": "cosin"}, 'unknown. Did you mean "cosine"'),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 10}, "has no warm-up"),
        ({"lr_scheduler": "cosine_with_min_lr"}, "lr_scheduler_min_lr_ratio"),
        ({"lr_scheduler": "piecewise_constant"}, "step_rules"),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ["step_rules='1:x,2'"]}, "refuses"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ["num_cycle=2"]}, 'Did you mean "num_cycles"'),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ["num_warmup_steps=2"]}, "has its own option"),
        ({"lr_scheduler": "warmup_stable_decay", "lr_scheduler_args": ["decay_type='line'"]}, "one of linear"),
        ({"lr_scheduler_type": "CosineAnealingLR"}, 'Did you mean "CosineAnnealingLR"'),
        ({"lr_scheduler_type": "no_such_package.Scheduler"}, "no_such_package cannot be imported"),
        ({"lr_scheduler_type": "CosineAnnealingLR", "lr_warmup_steps": 5}, "lr_warmup_steps cannot be combined"),
        ({"lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": ["T=5"]}, 'no argument "T"'),
        ({"lr_scheduler_type": "CosineAnnealingLR"}, "missing a required argument: 'T_max'; give it in"),
    ],
)
def test_mistakes_are_named_before_training(options, sentence):
    with pytest.raises(UserError) as error:
        check_lr_scheduler_options(LRSchedulerOptions(**options))
    assert sentence in str(error.value)


def test_mistakes_that_need_the_length_or_the_rate_are_named():
    with pytest.raises(UserError, match="together more than the run's 10 updates"):
        create_lr_scheduler(
            LRSchedulerOptions(lr_scheduler="warmup_stable_decay", lr_warmup_steps=6, lr_decay_steps=6),
            make_optimizer(),
            10,
        )
    with pytest.raises(UserError, match="must be below --learning_rate"):
        create_lr_scheduler(LRSchedulerOptions(lr_scheduler="polynomial"), make_optimizer(1e-8), 10)
    with pytest.raises(UserError, match="needs --optimizer_type Adafactor"):
        create_lr_scheduler(LRSchedulerOptions(lr_scheduler="adafactor:1e-3"), make_optimizer(), 10)
    without_momentum = torch.optim.Adagrad([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    cyclic = LRSchedulerOptions(lr_scheduler_type="CyclicLR", lr_scheduler_args=["base_lr=0.1", "max_lr=0.2"])
    with pytest.raises(UserError, match="CyclicLR refuses its arguments: optimizer must support momentum"):
        create_lr_scheduler(cyclic, without_momentum, 10)


def test_a_warm_up_longer_than_the_run_is_said(caplog):
    LOGGER.propagate = True
    create_lr_scheduler(
        LRSchedulerOptions(lr_scheduler="constant_with_warmup", lr_warmup_steps=50), make_optimizer(), 10
    )
    assert "ends while warming up" in caplog.text


SCHEDULERS = {
    "constant": {},
    "cosine": {"lr_warmup_steps": 3},
    "polynomial": {"lr_scheduler_power": 2.0},
    "piecewise_constant": {"lr_scheduler_args": [RULES]},
    "CosineAnnealingLR": {"lr_scheduler_args": ["T_max=7"]},
    "CosineAnnealingWarmRestarts": {"lr_scheduler_args": ["T_0=3"]},
    "MultiStepLR": {"lr_scheduler_args": ["milestones=[4,9]"]},
    "StepLR": {"lr_scheduler_args": ["step_size=2"]},
    "OneCycleLR": {"lr_scheduler_args": ["max_lr=0.01", "total_steps=30"]},
    "CyclicLR": {"lr_scheduler_args": ["base_lr=1e-4", "max_lr=1e-2", "step_size_up=4", "cycle_momentum=False"]},
    "ReduceLROnPlateau": {"lr_scheduler_args": ["patience=1"]},
    "ExponentialLR": {"lr_scheduler_args": ["gamma=0.9"]},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_goes_on_from_its_state_after_a_trip_through_json(name):
    key = "lr_scheduler" if name.islower() else "lr_scheduler_type"
    options = LRSchedulerOptions(**{key: name, **SCHEDULERS[name]})
    check_lr_scheduler_options(options)
    straight, resumed = make_optimizer(), make_optimizer()
    scheduler = create_lr_scheduler(options, straight, 30)
    curve(scheduler, straight, 6)
    state = json.loads(json.dumps(scheduler_state(scheduler)))
    again = create_lr_scheduler(options, resumed, 30)
    resumed.load_state_dict(straight.state_dict())
    load_scheduler_state(again, state)
    assert scheduler_state(again) == scheduler_state(scheduler)
    assert curve(again, resumed, 15) == curve(scheduler, straight, 15)


def test_a_state_that_cannot_be_saved_is_an_error_and_not_a_loss():
    class Strange:
        def state_dict(self):
            return {"thing": object()}

    with pytest.raises(TypeError, match="object"):
        scheduler_state(Strange())
