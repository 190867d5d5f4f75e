"""How fast the command line answers: the training script's --help against the import of torch alone.

    python benchmarks/help_time.py --runs 15

The two are run in turns, so that other work on the machine meets both. The target is on processor time.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Measure, Usage, parser, report, run_measured

LIMIT = 1.5


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--runs", type=int, default=7, help="runs of each command; the median counts")
    arguments.add_argument("--script", default="flux_train_network.py", help="the script whose --help is measured")
    options = arguments.parse_args()
    commands = {
        "torch": [sys.executable, "-c", "import torch"],
        "help": [sys.executable, options.script, "--help"],
    }
    for command in commands.values():  # once for nothing, so that the files are in the system's cache
        run_measured(command)
    taken: dict[str, list[Usage]] = {name: [] for name in commands}
    for _ in range(options.runs):
        for name, command in commands.items():
            taken[name].append(run_measured(command))
    cpu = {name: statistics.median(usage.cpu for usage in usages) for name, usages in taken.items()}
    wall = {name: statistics.median(usage.wall for usage in usages) for name, usages in taken.items()}
    report(
        "help_time",
        [
            Measure("--help / import torch, processor time", cpu["help"] / cpu["torch"], "x", LIMIT),
            Measure("--help / import torch, wall", wall["help"] / wall["torch"], "x"),
            Measure("--help, processor time", cpu["help"], "s"),
            Measure("--help, wall", wall["help"], "s"),
            Measure("import torch, processor time", cpu["torch"], "s"),
            Measure("import torch, wall", wall["torch"], "s"),
        ],
        options,
    )


if __name__ == "__main__":
    main()
