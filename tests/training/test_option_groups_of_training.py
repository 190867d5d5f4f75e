"""Option groups answer ``--help`` without loading torch, and every option is explained."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from library.errors import UserError
from library.options import field_docstrings
from library.training.objective.flow_matching import FlowMatchingOptions
from library.training.objective.losses import LossOptions
from library.training.objective.noise_options import (
    NoiseOptions,
    StableDiffusionNoiseOptions,
    check_noise_options,
    check_stable_diffusion_noise_options,
)
from library.training.optim.lr_schedulers import LRSchedulerOptions
from library.training.optim.optimizers import OptimizerOptions
from library.training.output.metadata import MetadataOptions
from library.training.tracking import LoggingOptions

ROOT = Path(__file__).parents[2]
GROUPS = [
    FlowMatchingOptions,
    LossOptions,
    LRSchedulerOptions,
    MetadataOptions,
    NoiseOptions,
    StableDiffusionNoiseOptions,
    OptimizerOptions,
    LoggingOptions,
]


def test_option_groups_import_neither_torch_nor_anything_heavy():
    modules = sorted({group.__module__ for group in GROUPS})
    code = (
        f"import sys, {', '.join(modules)}; print({{'torch', 'transformers', 'diffusers', 'numpy'}} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_every_option_has_a_sentence_and_a_default(group):
    documents = field_docstrings(group)
    for field in dataclasses.fields(group):
        assert documents.get(field.name, "").endswith("."), field.name
    group()


@pytest.mark.parametrize(
    ("options", "v_parameterization", "sentence"),
    [
        ({"adaptive_noise_scale": 0.1}, False, "noise_offset"),
        ({"scale_v_pred_loss_like_noise_pred": True}, False, "needs --v_parameterization"),
        ({"v_pred_like_loss": 0.5}, True, "only one of the two"),
    ],
)
def test_contradicting_noise_options_are_refused(options, v_parameterization, sentence):
    with pytest.raises(UserError, match=sentence):
        check_stable_diffusion_noise_options(StableDiffusionNoiseOptions(**options), v_parameterization)
    check_stable_diffusion_noise_options(StableDiffusionNoiseOptions(), v_parameterization)


def test_a_negative_input_perturbation_is_refused():
    with pytest.raises(UserError, match="ip_noise_gamma"):
        check_noise_options(NoiseOptions(ip_noise_gamma=-0.1))
