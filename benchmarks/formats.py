"""Storage formats of base weights: error and time of a layer's products against bfloat16, and bytes of a weight.

    python benchmarks/formats.py                                  # a small layer on the CPU
    python benchmarks/formats.py --device cuda --size full        # FLUX.1's widest layer, 1024 x 1024 pixels

A weight of normal values (deviation 0.02) and normal inputs; the error is the norm of the difference to the product in
float32, over its norm. Times are of a product with the input and of the one with the gradient, as the fastest of some.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Attempts, Measure, machine, parser, report
from benchmarks.random_models import add_size_options, product_limit, wait

SIDES = {"full": (3072, 12288, 4608), "tiny": (256, 768, 128)}
"""Inputs and outputs of the layer, and tokens."""
FORMATS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "fp8 by tensor": {"kind": "fp8", "granularity": "tensor"},
    "fp8 by channel": {"kind": "fp8", "granularity": "channel"},
    "fp8 by block": {"kind": "fp8", "granularity": "block"},
    "int8": {"kind": "int8"},
    "nf4": {"kind": "nf4"},
    "fp8 by tensor, products in fp8": {"kind": "fp8", "granularity": "tensor", "fast": True},
    "fp8 by channel, products in fp8": {"kind": "fp8", "granularity": "channel", "fast": True},
}


def measure(options: argparse.Namespace, attempts: Attempts) -> tuple[list[Measure], list[str]]:
    """Each format's figures, and which the device cannot do."""
    import torch

    from library.errors import UserError
    from library.memory import formats
    from library.memory.storage import Storage
    from library.memory.stored_linear import StoredLinear, matmul, matmul_t, stored_weight

    device = torch.device(options.device)
    inputs, outputs, tokens = SIDES[options.size]
    torch.manual_seed(0)
    weight = (torch.randn(outputs, inputs, device=device) * 0.02).bfloat16()
    x, grad = (torch.randn(1, tokens, side, device=device).bfloat16() for side in (inputs, outputs))
    exact = {"forward": x.float() @ weight.float().t(), "gradient": grad.float() @ weight.float()}
    limit, source = product_limit(device)
    measures = [Measure(f"limit ({source})", limit / 1e12, "TFLOP/s")]
    skipped: list[str] = []
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    plain: dict[str, float] = {}
    for name in attempts.in_time(FORMATS):
        settings = FORMATS[name]
        with attempts.part(name):
            with torch.device("meta"):
                layer = torch.nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)
            layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
            if settings:
                storage = Storage(**settings)
                try:
                    formats.require(storage, device)
                except UserError as error:
                    skipped.append(f"{name}: {error}")
                    continue
                formats.store_as(layer, formats.quantise(weight, storage), storage, torch.bfloat16)
            size = sum(t.nbytes for t in layer.buffers()) if isinstance(layer, StoredLinear) else weight.nbytes
            rounding = (stored_weight(layer).to(torch.float32) - weight.float()).norm() / weight.float().norm()
            measures.append(Measure(f"{name}: bytes of a weight", size / weight.numel()))
            if settings:
                measures.append(Measure(f"{name}: error of weights", 100 * rounding.item(), "%"))
            for way, call, given in (("forward", matmul, x), ("gradient", matmul_t, grad)):
                taken = []
                for _ in range(options.repeats + 1):
                    wait(device)
                    start = clock()
                    result = call(layer, given)
                    wait(device)
                    taken.append(clock() - start)
                seconds = min(taken[1:])
                plain.setdefault(way, seconds)
                error_size = (result.float() - exact[way]).norm() / exact[way].norm()
                measures += [
                    Measure(f"{name}: error, {way}", 100 * error_size.item(), "%"),
                    Measure(f"{name}: time / bfloat16's, {way}", seconds / plain[way], "x"),
                    Measure(
                        f"{name}: share of the limit, {way}", 100 * 2 * weight.numel() * tokens / seconds / limit, "%"
                    ),
                ]
    return measures, skipped


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__)
    add_size_options(arguments)
    arguments.add_argument("--repeats", type=int, default=10, help="products, of which the fastest counts")
    options = arguments.parse_args()
    import torch

    attempts = Attempts()
    measures, skipped = measure(options, attempts)
    for line in skipped:
        print(f"left out: {line}")
    where = machine(options.device, torch.get_num_threads())
    report("formats", measures, options, where, skipped=skipped, failures=attempts.failures)
    attempts.finish()


if __name__ == "__main__":
    main()
