"""What LoRA adds to a training step: forward and backward of FLUX blocks, plain and with three ways to add LoRA.

The base is frozen and the input needs a gradient, as everywhere but in the first block. Examples:

    python benchmarks/lora_overhead.py --width 512 --tokens 512
    python benchmarks/lora_overhead.py --device cuda --width 3072 --tokens 4608 --repeats 30

The share is LoRA's time above a plain step, as the median over rounds in each of which every way is timed once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Measure, machine, parser, report

if TYPE_CHECKING:
    from torch import Tensor, nn

WAYS = {
    "plain": "no LoRA",
    "separate": "y + up(down(x)) * scale, operation by operation",
    "accumulated": "up's product accumulated into y (addmm)",
    "fused": "one operation for layer and LoRA, both products accumulated (what is used)",
}


def parse_arguments() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--width", type=int, default=512, help="hidden size, a multiple of 64 (FLUX.1: 3072)")
    arguments.add_argument("--tokens", type=int, default=512, help="image and text tokens (FLUX.1 at 1024x1024: 4608)")
    arguments.add_argument("--batch", type=int, default=1)
    arguments.add_argument("--rank", type=int, default=16)
    arguments.add_argument("--double_blocks", type=int, default=1)
    arguments.add_argument("--single_blocks", type=int, default=2)
    arguments.add_argument("--base_dtype", default="bfloat16", help="of the frozen weights, e.g. float8_e4m3fn")
    arguments.add_argument("--autocast", default="bfloat16", help="dtype of the products, or none")
    arguments.add_argument("--checkpointing", action="store_true", help="recompute the blocks in the backward pass")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--repeats", type=int, default=5, help="rounds; in each, every way is timed once")
    return arguments.parse_args()


def forward_of(way: str, layer: nn.Linear, down: Tensor, up: Tensor, scale: float) -> Callable[[Tensor], Tensor]:
    from networks.adapters.low_rank import add_low_rank, linear_plus_low_rank

    plain = type(layer).forward.__get__(layer)
    if way == "separate":
        from torch.nn.functional import linear

        return lambda x: plain(x) + linear(linear(x, down), up) * scale
    if way == "accumulated":
        return lambda x: add_low_rank(plain(x), x, down, up, scale)
    if way == "fused":
        return lambda x: linear_plus_low_rank(layer, x, down, up, scale)
    return plain


class Step:
    """The blocks with their inputs, and LoRA matrices for every Linear in them."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from library.memory.apply import apply_memory_plan
        from library.memory.plan import MemoryPlan
        from library.models.flux.transformer import FluxConfig, FluxTransformer, rope_axes

        self.options, self.torch = options, torch
        self.device = torch.device(options.device)
        heads = max(options.width // 128, 1) if options.width % 128 == 0 else options.width // 64
        config = FluxConfig(
            hidden_size=options.width,
            num_heads=heads,
            depth=options.double_blocks,
            depth_single=options.single_blocks,
            mlp_hidden=4 * options.width,
            axes_dims=rope_axes(options.width // heads),
        )
        torch.manual_seed(0)
        with torch.device(self.device):
            self.model = FluxTransformer(config).requires_grad_(False).to(getattr(torch, options.base_dtype))
            dtype = self.model.dtype
            text_tokens = max(options.tokens // 9, 1)
            image_tokens = options.tokens - text_tokens
            self.image = torch.randn(options.batch, image_tokens, options.width).to(dtype).requires_grad_()
            self.text = torch.randn(options.batch, text_tokens, options.width).to(dtype).requires_grad_()
            self.vec = torch.randn(options.batch, options.width).to(dtype)
            self.rope = self.model.positions(torch.zeros(image_tokens, 3), torch.zeros(text_tokens, 3), options.batch)
            blocks = [*self.model.double_blocks, *self.model.single_blocks]
            apply_memory_plan({"": blocks}, MemoryPlan(checkpointing=options.checkpointing))
            self.layers: list[Any] = [m for part in blocks for m in part.modules() if isinstance(m, torch.nn.Linear)]
            self.matrices = [
                (
                    torch.randn(options.rank, layer.in_features).mul_(0.01).requires_grad_(),
                    torch.zeros(layer.out_features, options.rank).requires_grad_(),
                )
                for layer in self.layers
            ]

    def use(self, way: str) -> None:
        for layer, (down, up) in zip(self.layers, self.matrices):
            layer.forward = forward_of(way, layer, down, up, 0.5)

    def run(self) -> None:
        autocast = self.options.autocast
        dtype = None if autocast == "none" else getattr(self.torch, autocast)
        with self.torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            out = self.model.run_blocks(self.image, self.text, self.vec, self.rope, None)
        out.backward(self.torch.ones_like(out))
        for tensor in (self.image, self.text, *(matrix for pair in self.matrices for matrix in pair)):
            tensor.grad = None

    def seconds(self) -> float:
        """Of one step; on a CPU the processor time, which other programs on the machine disturb less."""
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        self._wait()
        start = clock()
        self.run()
        self._wait()
        return clock() - start

    def peak_mebibytes(self) -> float | None:
        if self.device.type != "cuda":
            return None
        self.torch.cuda.reset_peak_memory_stats()
        self.run()
        return self.torch.cuda.max_memory_allocated() / 2**20

    def _wait(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()


def measure(options: argparse.Namespace) -> dict[str, dict[str, float | None]]:
    """Per way: median seconds of a step, its share above the plain step (0.05 = 5 %), peak memory on CUDA in MiB."""
    step = Step(options)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for round_number in range(options.repeats + 1):
        for way in WAYS:
            step.use(way)
            taken = step.seconds()
            if round_number:  # the first round warms up
                times[way].append(taken)
    # Each way against the plain step of its own round, so that other load on the machine cancels out.
    results: dict[str, dict[str, float | None]] = {}
    for way in WAYS:
        step.use(way)
        shares = [mine / plain - 1 for mine, plain in zip(times[way], times["plain"])]
        results[way] = {
            "seconds": statistics.median(times[way]),
            "share": statistics.median(shares),
            "peak_mib": step.peak_mebibytes(),
        }
    return results


def main() -> None:
    """Measure and report."""
    import torch

    options = parse_arguments()
    measures = []
    for way, numbers in measure(options).items():
        name = f"{way}: {WAYS[way]}"
        measures.append(Measure(name, 1000 * (numbers["seconds"] or 0.0), "ms per step"))
        if way != "plain":
            measures.append(Measure(f"{way}: LoRA's share", 100 * (numbers["share"] or 0.0), "%"))
        if numbers["peak_mib"] is not None:
            measures.append(Measure(f"{way}: peak memory", numbers["peak_mib"], "MiB"))
    report("lora_overhead", measures, options, machine(options.device, torch.get_num_threads()))


if __name__ == "__main__":
    main()
