"""Run the tests: makes ``.venv`` and installs what is needed, then runs every test, one process for each processor.

Arguments after the options go to pytest: ``python tools/run_tests.py -k flux``, ``-m "not slow"`` for a quick run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.console import run_script
from tools.environment import ROOT, environment_python, set_up


def main() -> int:
    """Make the environment and run pytest. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set-up-only", action="store_true", help="make the environment and run nothing")
    options, for_pytest = parser.parse_known_args()
    seconds = set_up(("requirements.txt", "requirements-dev.txt"))
    print(f"environment ready ({seconds:.0f} s)", flush=True)
    if options.set_up_only:
        return 0
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # dozens of processes would each compile the project again
    count = min(os.cpu_count() or 1, 8) + 1  # one more than processors: now and then a test waits for another process
    workers = ["-n", str(count), "--dist", "worksteal"]
    command = [str(environment_python()), "-m", "pytest", "-q", "--durations=10", *workers, *for_pytest]
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    print(f"tests took {time.perf_counter() - start:.0f} s", flush=True)
    return code


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))
