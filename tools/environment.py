"""The project's own virtual environment: made on first use, brought up to date when the requirements change.

Only the standard library is used here, so that it runs on a bare Python.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv"
OLDEST, NEWEST = (3, 10), (3, 13)


def environment_python() -> Path:
    """The environment's interpreter."""
    return FOLDER / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def runs_inside() -> bool:
    """Whether this process runs in the project's environment."""
    return Path(sys.prefix).resolve() == FOLDER.resolve()


def set_up(requirement_files: tuple[str, ...]) -> float:
    """Make the environment and install ``requirement_files`` (relative to the project); returns the seconds it took.

    Nothing is installed when the same files were installed before. Ends the process with a sentence when Python is too
    old or too new, or when the installation fails.
    """
    if not OLDEST <= sys.version_info[:2] <= NEWEST and not FOLDER.exists():
        here = ".".join(map(str, sys.version_info[:2]))
        sys.exit(f"error: Python 3.10 to 3.13 is needed, this is {here}.")
    text = b"".join((ROOT / name).read_bytes() for name in requirement_files)
    stamp = FOLDER / ("installed-" + "-".join(Path(name).stem for name in requirement_files) + ".sha256")
    digest = hashlib.sha256(text).hexdigest()
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == digest and environment_python().exists():
        return 0.0
    start = time.perf_counter()
    if not environment_python().exists():
        print(f"making {FOLDER}", flush=True)
        venv.create(FOLDER, with_pip=True)
    print(f"installing {', '.join(requirement_files)} (some minutes the first time)", flush=True)
    command = [str(environment_python()), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for name in requirement_files:
        command += ["-r", str(ROOT / name)]
    if subprocess.run(command).returncode:
        sys.exit("error: the packages could not be installed; what pip says above tells why.")
    stamp.write_text(digest, encoding="utf-8")
    return time.perf_counter() - start


def continue_inside(script: str, arguments: list[str], environment: dict[str, str] | None = None) -> int:
    """Run ``script`` with the environment's interpreter and return its exit code."""
    return run_to_its_end([str(environment_python()), script, *arguments], {**os.environ, **(environment or {})})


def run_to_its_end(command: list[str], environment: dict[str, str]) -> int:
    """Run a command in the project's folder and return its exit code; Ctrl-C, which it gets too, is its to obey."""
    with subprocess.Popen(command, env=environment, cwd=ROOT) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue
