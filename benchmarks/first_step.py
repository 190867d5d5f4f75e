"""How soon training begins: from the command to the end of the first optimizer step.

    python benchmarks/first_step.py --runs 5
    python benchmarks/first_step.py --family sdxl
    python benchmarks/first_step.py --profile

A tiny model and a few images whose latents and text encoder outputs are cached on disk already, so that what is left
is what every start costs: imports, options, checks, data, models, network, optimizer, one step. The run has one step;
looked at is what all its processes have taken when it reports the LoRA file, which it writes right after the step. The
target is on both commands: ``python`` with the training script, and ``accelerate launch`` with it, where the launcher's
own process, which imports torch as well, is counted in. Shown too: what is taken to the end of the run, and what the
launcher takes with an empty program.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Measure, Usage, parser, report, run_measured
from benchmarks.tiny_run import (
    make_images,
    stable_diffusion_training_options,
    training_options,
    write_dataset,
)
from library.families import by_model

if TYPE_CHECKING:
    from library.models.stable_diffusion.checkpoint import Variant

LIMIT = 5.0
MODELS = ("flux", "sd1", "sdxl")
STEP_DONE = "saved "  # what the script says right after the step
SHOWN = 25
LAUNCH = (
    "-m accelerate.commands.accelerate_cli launch --num_processes 1 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --num_cpu_threads_per_process 1"
)


def tiny_training(folder: Path, family: str) -> list[str]:
    """Models, images and a dataset in ``folder``, and the options of a run of one step."""
    images = make_images(folder / "images", count=8, size=64)
    dataset = write_dataset(folder / "dataset.toml", images, size=64, batch_size=2)
    if family == "flux":
        from tools.make_tiny_models import make_tiny_flux

        return training_options(make_tiny_flux(folder / "models"), dataset, folder / "output", steps=1)
    from tools.make_tiny_stable_diffusion import make_tiny_stable_diffusion

    model = make_tiny_stable_diffusion(folder / "models", cast("Variant", family))
    return stable_diffusion_training_options(model, dataset, folder / "output", steps=1)


def import_times(output: str) -> list[tuple[str, float, float]]:
    """(module, seconds of its own, seconds with what it imports) from what ``-X importtime`` wrote."""
    rows = []
    for line in output.splitlines():
        if line.startswith("import time:") and "imported package" not in line:
            own, total, module = line.removeprefix("import time:").split("|")
            rows.append((module.strip(), int(own) / 1e6, int(total) / 1e6))
    return rows


def print_profile(rows: list[tuple[str, float, float]]) -> None:
    """What the imports of a run take: by package, and the slowest modules with what they bring in."""
    packages: defaultdict[str, float] = defaultdict(float)
    for module, own, _ in rows:
        packages[module.partition(".")[0]] += own
    print(f"imports of one run: {sum(packages.values()):.2f} s in {len(rows)} modules\n")
    print(f"{'package':36} {'seconds':>8}")
    for package, seconds in sorted(packages.items(), key=lambda entry: -entry[1])[:SHOWN]:
        print(f"{package:36} {seconds:8.3f}")
    print(f"\n{'module, with what it imports':60} {'seconds':>8}")
    for module, _, seconds in sorted(rows, key=lambda row: -row[2])[:SHOWN]:
        print(f"{module:60} {seconds:8.3f}")


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--runs", type=int, default=5, help="runs of each command; the median counts")
    arguments.add_argument("--profile", action="store_true", help="show what the imports of a run take, nothing else")
    arguments.add_argument("--family", choices=MODELS, default="flux")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        training = [by_model(options.family).file, *tiny_training(Path(name), options.family)]
        run_measured([sys.executable, *training])  # fills the caches
        if options.profile:
            print_profile(import_times(run_measured([sys.executable, "-X", "importtime", *training]).output))
            return
        commands = {
            "python": [sys.executable, *training],
            "accelerate launch": [sys.executable, *LAUNCH.split(), *training],
            "empty program": [sys.executable, *LAUNCH.split(), "-m", "timeit", "-n1", "-r1", "pass"],
        }
        taken: dict[str, list[Usage]] = {command: [] for command in commands}
        for _ in range(options.runs):
            for command, words in commands.items():
                until = None if command == "empty program" else STEP_DONE
                taken[command].append(run_measured(words, until=until))
    measures = []
    for command in ("python", "accelerate launch"):
        for what, field, limit in (
            ("processor time to the first step", "cpu_until", LIMIT),
            ("wall to the first step", "wall_until", None),
            ("processor time to the end", "cpu", None),
        ):
            value = statistics.median(getattr(usage, field) for usage in taken[command])
            measures.append(Measure(f"{command}: {what}", value, "s", limit))
    empty = statistics.median(usage.cpu for usage in taken["empty program"])
    measures.append(Measure("accelerate launch with an empty program: processor time", empty, "s"))
    report("first_step", measures, options)


if __name__ == "__main__":
    main()
