"""Images per second of one process and of several that train together, on the CPUs of this machine.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --processes 4 --steps 40 --fsdp

A tiny FLUX.1 with everything cached; each process has one thread and a batch of its own, and their images per second
are those that the script says at its end. ``--fsdp`` also spreads the base model over the processes. What several
processes reach is divided by as many times what one reaches. On a GPU this says nothing: see docs/several_gpus.md.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import ROOT, Measure, environment, parser, report
from benchmarks.tiny_run import make_images, training_options, write_dataset

LAUNCH = "-m accelerate.commands.accelerate_cli launch --num_cpu_threads_per_process 1"


def images_per_second(options: list[str], processes: int, fsdp: bool = False) -> float:
    """What the script reports when it has trained in so many processes."""
    words = [*LAUNCH.split(), *(["--multi_gpu"] if processes > 1 and not fsdp else [])]
    words += ["--num_processes", str(processes), "--main_process_port", "0"]
    words += ["--use_fsdp", "--fsdp_version", "2"] if fsdp else []
    done = subprocess.run(
        [sys.executable, *words, "flux_train_network.py", *options],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    found = re.search(r"([\d.]+) images/s while training", done.stdout + done.stderr)
    if done.returncode or found is None:
        sys.exit(f"{done.stdout}\n{done.stderr}\nerror: the training ended with code {done.returncode}")
    return float(found[1])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--processes", type=int, default=2, help="processes that train together")
    arguments.add_argument("--steps", type=int, default=30, help="steps of each run")
    arguments.add_argument("--size", type=int, default=256, help="width and height of the images in pixels")
    arguments.add_argument("--fsdp", action="store_true", help="also with the base model spread")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        from tools.make_tiny_models import make_tiny_flux

        folder = Path(temporary)
        images = make_images(folder / "images", count=16, size=given.size)
        dataset = write_dataset(folder / "dataset.toml", images, size=given.size, batch_size=2, repeats=4)
        models = make_tiny_flux(folder / "models")
        options = training_options(models, dataset, folder / "output", steps=given.steps)
        images_per_second([*options, "--max_train_steps", "1"], 1)  # fills the caches
        one = images_per_second(options, 1)
        several = images_per_second(options, given.processes)
        measures = [
            Measure("one process", one, "images/s"),
            Measure(f"{given.processes} processes", several, "images/s"),
            Measure("of as many times one", several / one / given.processes, ""),
        ]
        if given.fsdp:
            spread = images_per_second(options, given.processes, fsdp=True)
            measures.append(Measure("with the base model spread", spread, "images/s"))
    report(f"{given.processes} processes on {os.cpu_count()} cores", measures, given)


if __name__ == "__main__":
    main()
