"""Wrong names and arguments of optimizers and schedules are one sentence, found on a dummy parameter before anything
is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from library.errors import UserError
from library.training.optim.lr_schedulers import LRSchedulerOptions, check_lr_scheduler_options
from library.training.optim.optimizers import OptimizerOptions, check_optimizer_options


@pytest.mark.parametrize(
    ("name", "argument", "sentence"),
    [
        ("", "betas=0.9,0.99,0.999", "--optimizer_args: betas of AdamW must be 2 numbers such as 0.9,0.999, not (0.9,"),
        ("", "betas=0.9", "betas of AdamW must be 2 numbers such as 0.9,0.999, not 0.9."),
        ("", "weight_decay=0.01,", "weight_decay of AdamW must be a number such as 0.01, not (0.01,)."),
        ("", "eps='a'", "eps of AdamW must be a number such as 1e-08, not 'a'."),
        ("", "eps=1e999", "numbers must be finite."),
        ("", "betas=0.9,1e999", "numbers must be finite."),
        ("", "weight_decay=" + "(" * 5000, "must be a number"),
        ("", "weight_decay=" + "-" * 100_000 + "1", "must be a number"),
        ("", "weight_decay=" + "1" * 5000, "must be a number"),
        ("", "weight_decay=[1, 2]", "AdamW"),
        ("SGD", "momentum='x'", "momentum of SGD must be a number such as 0, not 'x'."),
        ("Adafactor", "clip_threshold='a'", "clip_threshold of Adafactor must be a number such as 1.0, not 'a'."),
        ("../x", "", "--optimizer_type ../x is not a name"),
        (".", "", "--optimizer_type . is not a name"),
        ("torch.optim.", "", "--optimizer_type torch.optim. is not a name"),
        (".AdamW", "", "--optimizer_type .AdamW is not a name"),
        ("x\0.y", "", "is not a name"),
        ("torch.optim.lr_scheduler.StepLR", "", "--optimizer_type torch.optim.lr_scheduler.StepLR"),
        ("torch.nn.Linear", "", "--optimizer_type torch.nn.Linear"),
    ],
)
def test_a_wrong_optimizer_is_one_sentence(name: str, argument: str, sentence: str):
    options = OptimizerOptions(optimizer_type=name, optimizer_args=[argument] if argument else [])
    with pytest.raises(UserError) as error:
        check_optimizer_options(options)
    assert sentence in str(error.value) and len(str(error.value)) < 400


STEP = "torch.optim.lr_scheduler.StepLR"


@pytest.mark.parametrize(
    ("options", "argument", "sentence"),
    [
        ({"lr_scheduler_type": "../x"}, "", "--lr_scheduler_type ../x is not a name"),
        ({"lr_scheduler_type": "."}, "", "--lr_scheduler_type . is not a name"),
        ({"lr_scheduler_type": STEP}, "", "missing a required argument: 'step_size'"),
        ({"lr_scheduler_type": STEP}, "step_size='a'", f"--lr_scheduler_type {STEP} refuses its arguments"),
        ({"lr_scheduler_type": STEP}, "step_size=0", f"--lr_scheduler_type {STEP} refuses its arguments"),
        ({"lr_scheduler_type": "LambdaLR"}, "lr_lambda=3", "--lr_scheduler_type LambdaLR refuses its arguments"),
        ({"lr_scheduler_type": "CosineAnnealingLR"}, "T_max=0", "refuses its arguments"),
        ({"lr_scheduler": "../x"}, "", "--lr_scheduler ../x is unknown"),
        ({"lr_scheduler": STEP}, "", "A scheduler class is given with --lr_scheduler_type."),
        ({"lr_scheduler": "cosine"}, "num_cycles='a'", "num_cycles of cosine must be a number"),
        ({"lr_scheduler": "cosine"}, "num_cycles=1e999", "numbers must be finite"),
        ({"lr_scheduler": "cosine"}, "num_cycles=" + "[" * 5000, "must be a number"),
        ({"lr_scheduler": "cosine"}, "num_cycles=[[1]]", "refuses its arguments"),
        ({"lr_scheduler": "cosine"}, "num_cycles=1e999-1e999", "must be a number"),
        ({"lr_scheduler": "inverse_sqrt", "lr_scheduler_timescale": -5}, "", "refuses its arguments"),
        ({"lr_scheduler": "piecewise_constant"}, "step_rules='nan:3,1'", "would be nan"),
        ({"lr_scheduler": "reduce_lr_on_plateau"}, "factor='a'", "factor of ReduceLROnPlateau must be a number"),
    ],
)
def test_a_wrong_schedule_is_one_sentence(options: dict[str, Any], argument: str, sentence: str):
    with pytest.raises(UserError) as error:
        check_lr_scheduler_options(LRSchedulerOptions(**options, lr_scheduler_args=[argument] if argument else []))
    assert sentence in str(error.value) and len(str(error.value)) < 400


def test_right_arguments_pass():
    check_optimizer_options(OptimizerOptions(optimizer_args=["betas=0.9,0.99", "weight_decay=0.1"]))
    check_optimizer_options(OptimizerOptions(optimizer_type="torch.optim.AdamW"))
    check_lr_scheduler_options(LRSchedulerOptions(lr_scheduler_type=STEP, lr_scheduler_args=["step_size=3"]))
    plateau = LRSchedulerOptions(lr_scheduler="reduce_lr_on_plateau", lr_scheduler_args=["factor=0.5"])
    check_lr_scheduler_options(plateau)
