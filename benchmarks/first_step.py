"""How soon training begins: from the command to the end of the first optimizer step.

    python benchmarks/first_step.py --runs 5
    python benchmarks/first_step.py --profile

A tiny model and a few pictures whose latents and text encoder outputs are cached on disk already, so that what is left
is what every start costs: imports, options, checks, data, models, network, optimizer, one step. A run of exactly one
step is measured as a whole, so writing the LoRA file and ending are counted in. Processor time is that of all
processes. The target is on the training command itself and on the same through ``accelerate launch``, whose own
process, which imports torch as well, is counted in; what it takes alone is shown too.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Measure, Usage, parser, report, run_measured
from benchmarks.tiny_run import make_pictures, training_options, write_dataset

LIMIT = 5.0
SCRIPT = "flux_train_network.py"
SHOWN = 25
LAUNCH = (
    "-m accelerate.commands.accelerate_cli launch --num_processes 1 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --num_cpu_threads_per_process 1"
)


def tiny_training(folder: Path) -> list[str]:
    """Models, pictures and a dataset in ``folder``, and the options of a run of one step."""
    from tools.make_tiny_models import make_tiny_flux

    pictures = make_pictures(folder / "pictures", count=8, size=64)
    dataset = write_dataset(folder / "dataset.toml", pictures, size=64, batch_size=2)
    return training_options(make_tiny_flux(folder / "models"), dataset, folder / "output", steps=1)


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
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        training = [SCRIPT, *tiny_training(Path(name))]
        run_measured([sys.executable, *training])  # fills the caches
        if options.profile:
            print_profile(import_times(run_measured([sys.executable, "-X", "importtime", *training]).output))
            return
        commands = {
            "python": [sys.executable, *training],
            "accelerate launch": [sys.executable, *LAUNCH.split(), *training],
            "launcher alone": [sys.executable, *LAUNCH.split(), "-m", "timeit", "-n1", "-r1", "pass"],
            "import torch": [sys.executable, "-c", "import torch"],
        }
        taken: dict[str, list[Usage]] = {command: [] for command in commands}
        for _ in range(options.runs):
            for command, words in commands.items():
                taken[command].append(run_measured(words))
    cpu = {command: statistics.median(usage.cpu for usage in usages) for command, usages in taken.items()}
    wall = {command: statistics.median(usage.wall for usage in usages) for command, usages in taken.items()}
    measures = [
        Measure(f"python {SCRIPT}, processor time", cpu["python"], "s", LIMIT),
        Measure(f"python {SCRIPT}, wall", wall["python"], "s"),
        Measure(f"accelerate launch {SCRIPT}, processor time", cpu["accelerate launch"], "s", LIMIT),
        Measure(f"accelerate launch {SCRIPT}, wall", wall["accelerate launch"], "s"),
        Measure("accelerate launch with an empty program, processor time", cpu["launcher alone"], "s"),
        Measure("import torch alone, processor time", cpu["import torch"], "s"),
    ]
    report("first_step", measures, options)


if __name__ == "__main__":
    main()
