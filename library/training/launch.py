"""What ``accelerate launch`` was told beside the number of processes: how the base model is spread over them.

accelerate passes its options on in environment variables. FSDP is put on the model by ``library/memory/sharding.py``
and not by ``Accelerator.prepare``, which would spread what is trained as well; accelerate itself sees processes only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from library.errors import UserError
from library.memory.plan import Sharding

if TYPE_CHECKING:
    from library.memory.streaming_options import StreamingOptions
    from library.training.run_options import PrecisionOptions

FSDP = "ACCELERATE_USE_FSDP"
WHOLE_MODEL = (
    "it spreads what is trained, which is small here, and takes the optimizer over; to spread the frozen base model "
    "over GPUs, use --use_fsdp --fsdp_version 2"
)
ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": f"DeepSpeed (ZeRO) is not supported: {WHOLE_MODEL}",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not supported: it trains models of its own",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config is not supported: processes share out images",
}
"""Engines that these scripts cannot work with, and why."""
UNUSED = {
    "FSDP_ACTIVATION_CHECKPOINTING": "--fsdp_activation_checkpointing (use --gradient_checkpointing)",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "--dynamo_use_regional_compilation (use --torch_compile)",
}
"""Answers that change nothing here, and the option that would."""


def is_set(name: str) -> bool:
    """Whether an environment variable of accelerate says yes."""
    return os.environ.get(name, "").lower() in ("true", "1", "yes")


def check_launch(precision: PrecisionOptions, streaming: StreamingOptions) -> None:
    """Raises UserError when ``accelerate launch`` was told what cannot be, alone or with these options."""
    for name, problem in ENGINES.items():
        if is_set(name):
            raise UserError(f"accelerate launch: {problem}.")
    if not is_set(FSDP):
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(f"accelerate launch --use_fsdp: version {version} is not supported; add --fsdp_version 2.")
    if is_set("FSDP_OFFLOAD_PARAMS"):
        raise UserError("accelerate launch: --fsdp_offload_params is not supported; the shares stay on the devices.")
    for option in ("fp8_base", "fp8_base_unet", "fp8_scaled", "base_format"):
        if getattr(precision, option):
            raise UserError(f"--{option} and FSDP are mutually exclusive: only weights that are tensors are spread.")
    if streaming.blocks_to_swap:
        raise UserError(
            "--blocks_to_swap and FSDP are mutually exclusive: a block is in system RAM or spread over GPUs."
        )


def unused_answers() -> list[str]:
    """What ``accelerate launch`` was told that changes nothing."""
    return [words for name, words in UNUSED.items() if is_set(name)]


def requested_sharding(processes: int) -> Sharding | None:
    """How the base model is spread over the ``processes`` of a machine; None where it stays whole in each."""
    if processes == 1 or not is_set(FSDP):
        return None
    return Sharding(processes, os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false")


@contextlib.contextmanager
def without_engine() -> Iterator[None]:
    """While it is active, accelerate is not told of FSDP."""
    given = os.environ.pop(FSDP, None)
    try:
        yield
    finally:
        if given is not None:
            os.environ[FSDP] = given
