"""How long a training step will take: its counted operations at the speed of a short measurement on the device.

A step's products run at the rate of the model's largest one, everything else at the rate at which a device can write
tensors; small models wait for the program that starts the operations instead. Streamed blocks take at least the time
of their copies. What a kernel does better or worse than that is the uncertainty.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from library.memory.simulation import Effort, PeakMemory
from library.training.report.wording import counted, time_text

if TYPE_CHECKING:
    import torch

    from library.data.dataset import DatasetGroup

COPYING = 25e9
"""Bytes per second from pinned memory to a GPU (PCIe 4), assumed."""
USUAL = 1.5
"""Most steps took 0.9 to 2.8 times what their operations take at full speed (models of reduced width, a busy CPU)."""
LEFT_OUT = "loading, caching, sample images, validation and saving come on top"
MOST_FLOPS = {"cpu": 2e9, "cuda": 4e12}
"""Of a measured product; a larger one is measured with fewer rows."""
WRITTEN = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Values that the measured tensor has."""
SECONDS = 0.05
"""For each of the three measurements, once it has been done three times."""
LITTLE = 16
"""Sides of the tensors of operations that only take the time to start them."""
LAYERS = 8


@dataclass(frozen=True)
class Speed:
    """What a device does."""

    flops: float
    """Per second, in products."""
    bytes: float
    """Per second, written by operations that read as many."""
    operation: float
    """Seconds to start one."""
    waits: bool
    """Whether the program waits for each operation, as on a CPU, instead of running ahead."""


def measure_speed(device: torch.device, dtype: torch.dtype, product: tuple[int, int, int] | None) -> Speed:
    """Measure for a fraction of a second (longer where a CPU multiplies slowly), each of the numbers once in a process.

    ``product``: rows, inner dimension and columns of the product of matrices in ``dtype`` that stands for all. Draws
    no random number of the run.
    """
    flops = _flops_per_second(device, dtype, product or (1024, 1024, 1024))
    return Speed(flops, _bytes_per_second(device, dtype), _seconds_to_start(device, dtype), device.type == "cpu")


@cache
def _flops_per_second(device: torch.device, dtype: torch.dtype, product: tuple[int, int, int]) -> float:
    import torch

    rows, inner, columns = product
    rows = min(rows, max(1, int(MOST_FLOPS.get(device.type, 4e12) / (2 * inner * columns))))
    generator = torch.Generator(device).manual_seed(0)

    def values(*shape: int) -> torch.Tensor:  # zeros would be faster on a GPU
        return torch.rand(*shape, generator=generator, device=device).to(dtype)

    with torch.no_grad():
        left, right = values(rows, inner), values(inner, columns)
        return 2 * rows * inner * columns / _seconds(lambda: left @ right, device)


@cache
def _bytes_per_second(device: torch.device, dtype: torch.dtype) -> float:
    import torch

    with torch.no_grad():
        large = torch.ones(WRITTEN.get(device.type, 1 << 26), device=device, dtype=dtype)
        return large.nbytes / _seconds(lambda: large * large, device)


@cache
def _seconds_to_start(device: torch.device, dtype: torch.dtype) -> float:
    """The time that an operation takes however small it is: of a LoRA's steps on layers that are next to nothing."""
    import torch
    from torch.nn import functional

    value = torch.full((LITTLE, LITTLE), 0.01, device=device)
    weight, down, up = value.to(dtype), value.clone().requires_grad_(), value.clone().requires_grad_()

    def step() -> None:
        hidden = value
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            for _ in range(LAYERS):
                normed = functional.layer_norm(hidden, (LITTLE,))
                change = functional.linear(functional.linear(normed, down), up) * 0.5
                hidden = hidden + functional.gelu(functional.linear(normed, weight) + change)
        hidden.float().mean().backward()
        down.grad = up.grad = None

    with PeakMemory([value, weight, down, up]) as counted:
        step()
    return _seconds(step, device) / counted.effort.operations


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """What ``work`` takes: the median of several times, after one that does not count."""
    import torch

    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < 4 or time.perf_counter() - begun < SECONDS:
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def step_seconds(effort: Effort, speed: Speed, share: float = 1.0, copied: int = 0) -> float:
    """The time of work that is the ``share`` of ``effort``, beside ``copied`` bytes of streamed blocks."""
    working = share * (effort.flops / speed.flops + effort.bytes / speed.bytes)
    starting = effort.operations * speed.operation
    return USUAL * max(working + starting if speed.waits else max(working, starting), copied / COPYING)


def mean_share(group: DatasetGroup, largest: int) -> float:
    """The pixels of the mean batch of a group, as a share of those of its largest batch."""
    pixels = batches = 0
    for dataset in group.datasets:
        for (width, height), samples in dataset.bucket_samples().items():
            pixels += width * height * len(samples)
            batches += math.ceil(len(samples) / dataset.settings.batch_size)
    return pixels / (batches * largest)


def time_line(step: float, steps: int, device: str) -> str:
    """The line about a run of ``steps`` that take ``step`` seconds each."""
    spread = f"{time_text(step / 2)} to {time_text(2 * step)}"
    return (
        f"about {time_text(step)} per step ({spread}) on {device}, {time_text(steps * step)} for "
        f"{counted(steps, 'step')}; {LEFT_OUT}"
    )
