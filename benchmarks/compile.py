"""``--torch_compile`` over images of six shapes: graphs, breaks, recompilations, and a warm step against an eager one.

    python benchmarks/compile.py                                  # a tiny model on the CPU, aot_eager
    python benchmarks/compile.py --device cuda --size full        # FLUX.1 dev around 1024 x 1024, inductor

One LoRA step for each shape, checkpointed, each block compiled by itself as training does it. A kind of block has one
graph for each combination of what needs a gradient: the first double block's text, for one, has none yet.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Attempts, Measure, machine, parser, report
from benchmarks.random_models import Training, add_size_options, config_of, open_random, wait

SHAPES = {
    "full": ((1024, 1024), (832, 1216), (1216, 832), (896, 1152), (768, 1344), (1344, 768)),
    "tiny": ((128, 128), (96, 160), (160, 96), (112, 144), (64, 192), (192, 64)),
}
"""Height and width of buckets, in pixels."""
FEW_BLOCKS = {"full": {}, "tiny": {"depth": 2, "depth_single": 2}}
"""Blocks of a kind share their graphs, so that few show what many do."""


def measure(options: argparse.Namespace, attempts: Attempts) -> list[Measure]:
    """Graphs over all shapes, and times of the first."""
    import torch
    from torch._dynamo.utils import counters

    from library.memory.plan import MemoryPlan

    device, shapes = torch.device(options.device), SHAPES[options.size]
    config = config_of(options.variant, options.size, **FEW_BLOCKS[options.size])
    training = Training(open_random(config, device), options.device, shapes[0][0])
    measures: list[Measure] = []
    with training.with_plan(MemoryPlan(checkpointing=True)):
        training.set_resolution(*shapes[0])
        eager = training.seconds(options.steps)
    torch._dynamo.reset()
    counters.clear()
    graphs: list[int] = []
    backend = options.backend or ("inductor" if device.type == "cuda" else "aot_eager")
    with training.with_plan(MemoryPlan(checkpointing=True, compiler=backend)), attempts.part("compiling"):
        start = time.perf_counter()
        for shape in shapes:
            training.set_resolution(*shape)
            training.step()
            wait(device)
            graphs.append(counters["stats"]["unique_graphs"])
        spent = time.perf_counter() - start
        training.set_resolution(*shapes[0])
        warm = training.seconds(options.steps)
        measures += [
            Measure("graphs of the first shape", graphs[0]),
            Measure(f"graphs of {len(shapes)} shapes / graphs of the first", graphs[-1] / graphs[0], "x", 2.0),
            Measure("graph breaks", sum(counters["graph_break"].values()), "", 0.0),
            Measure("recompilations after the first shape", graphs[-1] - graphs[0]),
            Measure("recompilations after the second shape", graphs[-1] - graphs[1], "", 0.0),
            Measure("a step of each shape, compilation included", spent, "s"),
            Measure("warm step", 1000 * warm, "ms"),
            Measure("warm step / eager step", warm / eager, "x"),
        ]
    measures.append(Measure("eager step", 1000 * eager, "ms"))
    return measures


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__)
    add_size_options(arguments)
    arguments.add_argument("--variant", choices=["flux", "chroma"], default="flux", help="the model")
    arguments.add_argument("--backend", help="by default inductor on a GPU, aot_eager on the CPU")
    arguments.add_argument("--steps", type=int, default=3, help="measured each time, of which the fastest counts")
    options = arguments.parse_args()
    import torch

    attempts = Attempts()
    measures = measure(options, attempts)
    report("compile", measures, options, machine(options.device, torch.get_num_threads()), failures=attempts.failures)
    attempts.finish()


if __name__ == "__main__":
    main()
