"""What --fused_backward_pass saves: memory of gradients and optimizer states, and the peak of a training step.

    python benchmarks/fused_backward.py
    python benchmarks/fused_backward.py --rank 64 --width 512
    python benchmarks/fused_backward.py --device cuda --width 3072 --double_blocks 19 --single_blocks 38

A LoRA in the blocks of a random frozen FLUX.1 is trained with Adafactor and gradient checkpointing, with ordinary steps
and with fused ones, each in a process of its own. "gradients at once" counts the bytes of all gradients that lie in
memory whenever one is complete; "peak of a step" is the most memory that forward, backward and step took above model
and LoRA: resident memory of the process on a CPU, allocated memory on a GPU. Both ways start from the same weights and
must end at the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Measure, machine, parser, peak_memory, present_memory, report, run_measured

if TYPE_CHECKING:
    import torch

WAYS = ("ordinary", "fused")
IMAGE_TOKENS, TEXT_TOKENS = 64, 16  # few: activations are not what is compared
LARGEST_SHARE = 0.1
SMALLEST_SAVING = 0.8
MEGABYTE = 1e6


class Training:
    """A LoRA in a frozen transformer, with Adafactor; ``way`` is one of ``WAYS``."""

    def __init__(self, options: argparse.Namespace, way: str) -> None:
        import torch

        from library.training.optim.optimizers import FusedBackward, OptimizerOptions, create_optimizer

        torch.manual_seed(0)
        self.device = torch.device(options.device)
        self.model, self.network = self._build(options)
        adafactor = ["relative_step=False", "scale_parameter=False", "warmup_init=False"]
        settings = OptimizerOptions("Adafactor", optimizer_args=adafactor, learning_rate=1e-3, max_grad_norm=0.0)
        self.parameters = list(self.network.parameters())
        self.optimizer = create_optimizer(settings, self.parameters, "constant_with_warmup").optimizer
        self.most_gradients = 0
        for parameter in self.parameters:  # before the fused steps' own hooks, which free the gradient
            parameter.register_post_accumulate_grad_hook(self._count)
        self.fused = FusedBackward(self.optimizer, 0.0) if way == "fused" else None
        self.before = present_memory()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def _build(self, options: argparse.Namespace) -> tuple[Any, Any]:
        import torch

        from library.memory.apply import apply_memory_plan
        from library.memory.plan import MemoryPlan
        from library.models.flux.transformer import FluxConfig, FluxTransformer, rope_axes
        from networks.lora_flux import create_network

        config = FluxConfig(
            hidden_size=options.width,
            num_heads=options.width // 64,
            depth=options.double_blocks,
            depth_single=options.single_blocks,
            mlp_hidden=4 * options.width,
            axes_dims=rope_axes(64),
        )
        with torch.device("meta"):
            model = FluxTransformer(config)
        model = model.to(torch.bfloat16).to_empty(device=self.device).requires_grad_(False)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        network = create_network(1.0, options.rank, options.rank, None, [], model)
        network.apply_to([], model, False, True)
        network.to(self.device)
        network.prepare_grad_etc(None, model)
        # Without checkpointing, activations are what takes most memory.
        apply_memory_plan({"": [*model.double_blocks, *model.single_blocks]}, MemoryPlan(checkpointing=True))
        return model, network

    def _count(self, _: torch.Tensor) -> None:
        present = sum(parameter.grad.nbytes for parameter in self.parameters if parameter.grad is not None)
        self.most_gradients = max(self.most_gradients, present)

    def step(self) -> None:
        """One training step on random tokens."""
        import torch

        config, device = self.model.config, self.device
        random = torch.Generator().manual_seed(1)
        noise = torch.randn(1, IMAGE_TOKENS, config.in_channels, generator=random).to(device)
        text = torch.randn(1, TEXT_TOKENS, config.context_dim, generator=random).to(device)
        places = torch.zeros(IMAGE_TOKENS, 3, device=device), torch.zeros(TEXT_TOKENS, 3, device=device)
        pooled, one = torch.zeros(1, config.vector_dim, device=device), torch.ones(1, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            out = self.model(noise, places[0], text, places[1], 0.5 * one, pooled, one)
        (out.float() - noise).square().mean().backward()
        if self.fused is None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def peak(self) -> int:
        """Bytes above model and LoRA."""
        import torch

        most = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else peak_memory()
        return most - self.before

    def states(self) -> int:
        """Bytes of the optimizer's states."""
        import torch

        values = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def measure_here(options: argparse.Namespace) -> None:
    """Train in this process and print what it took as JSON."""
    import torch

    training = Training(options, options.way)
    # On a CPU the processor time, which other programs on the machine disturb less.
    clock = time.process_time if training.device.type == "cpu" else time.perf_counter
    times = []
    for _ in range(options.steps):
        start = clock()
        training.step()
        if training.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    numbers = {
        "parameters": sum(parameter.nbytes for parameter in training.parameters),
        "gradients": training.most_gradients,
        "states": training.states(),
        "peak": training.peak(),
        "seconds": min(times),
        "sum": float(torch.stack([parameter.detach().double().sum().cpu() for parameter in training.parameters]).sum()),
    }
    print(json.dumps(numbers))


def measure_elsewhere(way: str, options: argparse.Namespace) -> dict[str, float]:
    """What ``measure_here`` prints in a fresh process."""
    given = {name: value for name, value in vars(options).items() if name != "way"}
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    return json.loads(run_measured([sys.executable, __file__, *words, "--way", way]).output.splitlines()[-1])


def measures(taken: dict[str, dict[str, float]]) -> list[Measure]:
    """The figures of both ways as a table."""
    plain, fused = (taken[way] for way in WAYS)
    rows = [Measure("LoRA weights", plain["parameters"] / MEGABYTE, "MB")]
    for way in WAYS:
        rows += [
            Measure(f"{way}: gradients at once", taken[way]["gradients"] / MEGABYTE, "MB"),
            Measure(f"{way}: optimizer states", taken[way]["states"] / MEGABYTE, "MB"),
            Measure(f"{way}: peak of a step above model and LoRA", taken[way]["peak"] / MEGABYTE, "MB"),
            Measure(f"{way}: fastest step", taken[way]["seconds"], "s"),
        ]
    share, saved = fused["gradients"] / plain["gradients"], (plain["peak"] - fused["peak"]) / plain["gradients"]
    rows.append(Measure("gradients at once, fused / ordinary", share, "x", LARGEST_SHARE))
    rows.append(Measure("saved at the peak / gradients", saved, "x", SMALLEST_SAVING, "higher"))
    return rows


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--width", type=int, default=768, help="hidden size, a multiple of 64 (FLUX.1: 3072)")
    arguments.add_argument("--rank", type=int, default=256)
    arguments.add_argument("--double_blocks", type=int, default=2)
    arguments.add_argument("--single_blocks", type=int, default=8)
    arguments.add_argument("--steps", type=int, default=3)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.way:
        measure_here(options)
        return
    # So that the C library gives freed tensors back at once, and resident memory is what is in use.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "100000")
    taken = {way: measure_elsewhere(way, options) for way in WAYS}
    if taken["ordinary"]["sum"] != taken["fused"]["sum"]:
        sys.exit("error: the two ways ended at different weights")
    report("fused_backward", measures(taken), options, machine(options.device))


if __name__ == "__main__":
    main()
