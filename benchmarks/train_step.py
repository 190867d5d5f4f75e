"""A training step of a LoRA of rank 16 in each way of saving memory: time, share of the device's limit, peak memory.

    python benchmarks/train_step.py                                     # a tiny model on the CPU, in seconds
    python benchmarks/train_step.py --device cuda --size full           # FLUX.1 dev at 1024 x 1024
    python benchmarks/train_step.py --device cuda --size full --variant chroma --resolution 512 --ways checkpointed

A step is forward pass, backward pass and AdamW, with latents and text given; weights are random and of the true
dimensions. FLOPs are those of the matrix products and of attention, as torch counts them in an uncompiled step; the
CPU's attention is not among them. The limit is that of known devices, else that of a large product measured here.
Memory is that of tensors on the device, weights included, without the device's own context.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Attempts, Measure, machine, parser, report
from benchmarks.random_models import (
    Training,
    add_size_options,
    config_of,
    empty_cache,
    open_random,
    peak_bytes,
    product_limit,
    start_peak,
    wait,
)

TARGET = 60.0
"""Percent of the device's limit for a compiled step in bfloat16, at full size on a GPU."""
WAYS: dict[str, dict[str, Any]] = {
    "checkpointed + compiled": {"checkpointing": True, "compiler": True},
    "checkpointed": {"checkpointing": True},
    "plain": {},
    "checkpointed, inputs in system RAM": {"checkpointing": True, "offload_inputs": True},
    "checkpointed, attention kept": {"checkpointing": True, "keep_attention": True},
    "fp8, checkpointed": {"checkpointing": True, "storage": "fp8"},
    "fp8_fast, checkpointed + compiled": {"checkpointing": True, "compiler": True, "storage": "fp8_fast"},
}
"""Most important first."""


def storage_of(name: str | None, device: Any) -> Any:
    """A storage format. Raises UserError where the device cannot work with it."""
    from library.memory.formats import require
    from library.memory.storage import Storage

    if name is None:
        return None
    storage = Storage("fp8", "tensor", fast=name == "fp8_fast")
    require(storage, device)
    return storage


def memory_plan(way: dict[str, Any], device: Any) -> Any:
    """What ``way`` says of the blocks."""
    from library.memory.plan import MemoryPlan

    compiler = "inductor" if device.type == "cuda" else "aot_eager"
    settings = {name: value for name, value in way.items() if name not in ("storage", "compiler")}
    return MemoryPlan(**settings, compiler=compiler if way.get("compiler") else None)


def measure(options: argparse.Namespace, attempts: Attempts) -> list[Measure]:
    """Each way's figures."""
    import torch

    device = torch.device(options.device)
    limit, source = product_limit(device)
    measures = [Measure(f"limit ({source})", limit / 1e12, "TFLOP/s")]
    flops: dict[bool, int] = {}
    training, storage = None, "none yet"
    for name in attempts.in_time(options.ways):
        way, checkpoints = WAYS[name], "checkpointed" in name
        with attempts.part(name):
            if way.get("storage") != storage or training is None:
                training = None
                empty_cache(device)
                config = config_of(options.variant, options.size)
                wanted = storage_of(way.get("storage"), device)
                training = Training(open_random(config, device, wanted), options.device, options.resolution)
                storage = way.get("storage")
            training.optimizer.zero_grad(set_to_none=True)
            if checkpoints not in flops and options.count_flops:
                with training.with_plan(memory_plan({"checkpointing": checkpoints}, device)):
                    flops[checkpoints] = training.flops()
                kind = "with checkpointing" if checkpoints else "without checkpointing"
                measures.append(Measure(f"products {kind}", flops[checkpoints] / 1e12, "TFLOP"))
            with training.with_plan(memory_plan(way, device)):
                training.step()
                wait(device)
                start_peak(device)
                taken, peak = training.seconds(options.steps), peak_bytes(device)
            measures.append(Measure(f"{name}: step", 1000 * taken, "ms"))
            if checkpoints in flops:
                share = 100 * flops[checkpoints] / taken / limit
                is_held = options.size == "full" and device.type == "cuda" and name == "checkpointed + compiled"
                target = {"limit": TARGET, "better": "higher"} if is_held else {}
                measures.append(Measure(f"{name}: share of the limit", share, "%", **target))
            if peak is not None:
                measures.append(Measure(f"{name}: peak memory", peak / 1e9, "GB"))
    return measures


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__)
    add_size_options(arguments)
    arguments.add_argument("--variant", choices=["flux", "chroma"], default="flux", help="the model")
    arguments.add_argument("--resolution", type=int, help="side of the images; by default 1024, and 128 when tiny")
    arguments.add_argument("--steps", type=int, default=3, help="measured in each way, of which the fastest counts")
    arguments.add_argument("--ways", nargs="+", choices=list(WAYS), metavar="WAY", help=f"of {'; '.join(WAYS)}")
    arguments.add_argument("--no_flops", dest="count_flops", action="store_false", help="count no FLOPs")
    options = arguments.parse_args()
    options.resolution = options.resolution or (1024 if options.size == "full" else 128)
    options.ways = options.ways or [
        name for name, way in WAYS.items() if options.device != "cpu" or way.get("storage") != "fp8_fast"
    ]
    import torch

    attempts = Attempts()
    measures = measure(options, attempts)
    where = machine(options.device, torch.get_num_threads())
    report("train_step", measures, options, where, failures=attempts.failures)
    attempts.finish()


if __name__ == "__main__":
    main()
