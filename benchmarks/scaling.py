"""What several processes that train together cost, against one process, on the CPUs of this machine.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --processes 4 --fsdp

A tiny FLUX.1 with everything cached; each process has one thread and a batch of its own. Compared are processor seconds
for each image, from two runs of different lengths, so that starting does not count and other programs disturb little;
shown too is what the script itself says, images per second on the clock, which belongs on an idle machine. ``--fsdp``
also spreads the base model over the processes. Of a GPU this says nothing: see docs/several_gpus.md.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Measure, parser, report, run_measured
from benchmarks.tiny_run import make_images, training_options, write_dataset

LAUNCH = "-m accelerate.commands.accelerate_cli launch --num_cpu_threads_per_process 1 --main_process_port 0"
BATCH = 2
WAYS = {"whole": ["--multi_gpu"], "spread": ["--use_fsdp", "--fsdp_version", "2"]}


def cost(options: list[str], processes: int, steps: int, way: str = "whole") -> tuple[float, float]:
    """Processor seconds for each image, and images per second on the clock."""
    words = [sys.executable, *LAUNCH.split(), "--num_processes", str(processes), *(WAYS[way] if processes > 1 else [])]
    words += ["flux_train_network.py", *options, "--max_train_steps"]
    short, long = (run_measured([*words, count]) for count in (steps // 4, steps))
    said = re.search(r"([\d.]+) images/s while training", long.output)
    return (long.cpu - short.cpu) / ((steps - steps // 4) * BATCH * processes), float(said[1]) if said else 0.0


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--processes", type=int, default=2, help="processes that train together")
    arguments.add_argument("--steps", type=int, default=40, help="steps of the longer run")
    arguments.add_argument("--size", type=int, default=256, help="width and height of the images in pixels")
    arguments.add_argument("--fsdp", action="store_true", help="also with the base model spread")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        from tools.make_tiny_models import make_tiny_flux

        folder = Path(temporary)
        images = make_images(folder / "images", count=16, size=given.size)
        dataset = write_dataset(folder / "dataset.toml", images, size=given.size, batch_size=BATCH, repeats=4)
        options = training_options(make_tiny_flux(folder / "models"), dataset, folder / "output", steps=1)
        cost(options, 1, 4)  # fills the caches
        runs = {"one process": (1, "whole"), f"{given.processes} processes": (given.processes, "whole")}
        if given.fsdp:
            runs[f"{given.processes} processes, base model spread"] = (given.processes, "spread")
        measures, alone = [], 0.0
        for name, (processes, way) in runs.items():
            seconds, speed = cost(options, processes, given.steps, way)
            alone = alone or seconds
            measures.append(Measure(name, 1000 * seconds, "ms of processor time per image"))
            measures.append(Measure(f"{name}: efficiency", alone / seconds))
            measures.append(Measure(f"{name}: on the clock", speed, "images/s"))
    report("scaling", measures, given)


if __name__ == "__main__":
    main()
