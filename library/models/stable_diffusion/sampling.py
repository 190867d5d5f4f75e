"""Stable Diffusion's samplers: diffusers' schedulers by their usual names, along the noise schedule of training.

Importing this module loads no torch, so that scripts can check a sampler's name at once.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from typing import Any

from library.errors import UserError, did_you_mean
from library.lean_imports import diffusers_class
from library.models.schedules import FIRST_BETA, LAST_BETA, TRAIN_STEPS

NOISE_SCHEDULE = {
    "num_train_timesteps": TRAIN_STEPS,
    "beta_start": FIRST_BETA,
    "beta_end": LAST_BETA,
    "beta_schedule": "scaled_linear",
}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    # This algorithm cannot end at a noise level of zero: it divides by it.
    "dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
}
SYNONYMS = {f"k_{name}": name for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")}
SAMPLERS = (*SCHEDULERS, *SYNONYMS)
"""Names that ``--sample_sampler`` and prompt lines may give."""
NOISES_OF_A_STEP = {"dpm_2_a": 2}
"""For how much noise in a step an image's generator is moved on; 1 for samplers that aren't named."""

SMALLEST_ALPHA = 2**-24
"""What stands for a signal of zero where a sampler divides by it; diffusers' own number."""


def require_sampler(name: str, place: str = "--sample_sampler") -> None:
    """Raise UserError, beginning with ``place``, when there is no sampler of that ``name``."""
    if name not in SAMPLERS:
        raise UserError(
            f'{place}: "{name}" is not a sampler; known are {", ".join(SAMPLERS)}.{did_you_mean(name, SAMPLERS)}'
        )


def make_scheduler(
    sampler: str,
    *,
    v_prediction: bool = False,
    zero_terminal_snr: bool = False,
    clip_sample: bool = False,
    steps_offset: int = 0,
) -> Any:
    """A new diffusers scheduler for one image. Raises UserError for an unknown ``sampler``.

    ``zero_terminal_snr`` samples along the rescaled schedule of "Common Diffusion Noise Schedules and Sample Steps are
    Flawed" (arXiv 2305.08891); with ``v_prediction``, from its last step on, which is pure noise. ``clip_sample`` keeps
    predicted latents within -1..1 and ``steps_offset`` moves timesteps, in the samplers that have that.
    """
    import torch

    require_sampler(sampler)
    settings = (SYNONYMS.get(sampler, sampler), v_prediction, zero_terminal_snr, clip_sample, steps_offset)
    if torch._C._len_torch_dispatch_stack():  # a simulation, whose tensors have no values
        return _new_scheduler.__wrapped__(*settings)
    return copy.deepcopy(_new_scheduler(*settings))


@functools.lru_cache(maxsize=8)
def _new_scheduler(
    sampler: str, v_prediction: bool, zero_terminal_snr: bool, clip_sample: bool, steps_offset: int
) -> Any:
    """A scheduler that is copied for use: dpm_2 and dpm_2_a take half a second to be made."""
    name, arguments = SCHEDULERS[sampler]
    scheduler_class = diffusers_class(name)
    known = inspect.signature(scheduler_class.__init__).parameters
    wanted: dict[str, Any] = {"clip_sample": clip_sample, "steps_offset": steps_offset}
    if zero_terminal_snr:
        if v_prediction and "rescale_betas_zero_snr" in known:
            wanted["rescale_betas_zero_snr"] = True
        else:
            wanted["trained_betas"] = zero_terminal_betas()
        if v_prediction:
            wanted["timestep_spacing"] = "trailing"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers means to drop "dpmsolver" one day
        return scheduler_class(
            **NOISE_SCHEDULE,
            **arguments,
            **{key: value for key, value in wanted.items() if key in known},
            prediction_type="v_prediction" if v_prediction else "epsilon",
        )


def noises_of_steps(sampler: str, steps: int) -> int:
    """How many noises precede that of an image that is drawn over: as many as the steps could need."""
    return steps * NOISES_OF_A_STEP.get(SYNONYMS.get(sampler, sampler), 1)


def zero_terminal_betas() -> list[float]:
    """The 1000 rescaled betas, ending at a signal that is tiny instead of none, so that nothing divides by zero."""
    rescaled: Any = diffusers_class("DDIMScheduler")(**NOISE_SCHEDULE, rescale_betas_zero_snr=True)
    betas = rescaled.betas.double()
    betas[-1] = 1 - SMALLEST_ALPHA / (1 - betas[:-1]).prod()
    return betas.tolist()
