"""Running the scripts as a user does."""

from __future__ import annotations

import importlib
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def launch(
    script: str, *arguments: object, accelerate: bool = True, processes: int = 1, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a script as a user does, through ``accelerate launch`` unless told otherwise, and wait for it."""
    return subprocess.run(
        command(script, *arguments, accelerate=accelerate, processes=processes),
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        cwd=cwd,
        timeout=600,
    )


def command(script: str, *arguments: object, accelerate: bool = True, processes: int = 1) -> list[str]:
    """The command line that ``launch`` runs."""
    given = [str(argument) for argument in arguments]
    if not accelerate:
        return [sys.executable, script, *given]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1"]
    if processes > 1:
        launcher += ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", str(free_port())]
    return [*launcher, script, *given]


def toml_value(value: object) -> str:
    """A Python value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_value(part)}" for key, part in value.items()) + "}"
    return f'"{value}"' if isinstance(value, str) else str(value)


def free_port() -> int:
    """A port that nobody listens on, so that tests can run side by side."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def trainer_class(family: str) -> Any:
    """The trainer of ``flux``, ``sdxl``, or else of Stable Diffusion 1.x and 2.x; imported only now."""
    if family == "flux":
        return importlib.import_module("flux_train_network").FluxNetworkTrainer
    if family == "sdxl":
        return importlib.import_module("sdxl_train_network").SdxlNetworkTrainer
    return importlib.import_module("train_network").StableDiffusionNetworkTrainer
