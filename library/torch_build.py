"""Whether the installed torch can use this machine's NVIDIA GPU, and the command that installs one that can."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

TORCH = "2.13.0"
"""The release in requirements.txt."""
NEWER, OLDER = "cu130", "cu126"
"""Its builds for CUDA 13.0, for GPUs from Turing (RTX 20) on, and for CUDA 12.6, from Maxwell to Hopper."""
TURING, BLACKWELL = 7.5, 10.0
"""Compute capabilities: the oldest of CUDA 13.0, and the oldest that CUDA 12.6 does not know."""
DRIVER = 580
"""The oldest driver for CUDA 13."""


def missing_cuda() -> str | None:
    """A message where torch was built without support for GPUs, and this machine has one by NVIDIA; otherwise None.

    It holds the command that installs the right build. Builds for CUDA, ROCm, Apple and Intel GPUs need no message, nor
    does a user who hides the GPUs (``CUDA_VISIBLE_DEVICES``). Other programs are started only where torch can use none.
    """
    version = _torch_version()
    if sys.platform == "darwin" or version is None or any(_has(version, name) for name in ("cuda", "hip", "xpu")):
        return None
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return None
    found = _nvidia_gpu()
    if found is None:
        return None
    gpu, build = found
    return (
        f"torch {version.__version__} has no CUDA support, so {gpu} is not used. To install a build that has it: "
        f"{_python()} -m pip install torch=={TORCH}+{build} --index-url https://download.pytorch.org/whl/{build}"
    )


def _torch_version() -> Any:
    """The module ``torch.version``, read without the rest of torch; None without torch."""
    if "torch" in sys.modules:
        return sys.modules["torch"].version
    found = importlib.util.find_spec("torch")
    path = Path(found.origin).with_name("version.py") if found and found.origin else None
    if path is None or not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("torch_version", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _has(version: Any, name: str) -> bool:
    return bool(getattr(version, name, None))


def _nvidia_gpu() -> tuple[str, str] | None:
    """What to call the machine's NVIDIA GPU, and the build of torch for it; None where there is none to be seen.

    ``nvidia-smi``, which comes with the driver, has the last word; without it the driver's library says that there
    is one.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return ("the NVIDIA GPU of this machine", NEWER) if _has_driver() else None
    for fields in ("name,compute_cap,driver_version", "name"):  # drivers before 2021 know no compute_cap
        command = [program, f"--query-gpu={fields}", "--format=csv,noheader"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=10, errors="replace")
        except (OSError, subprocess.TimeoutExpired):
            return None
        lines = answer.stdout.strip().splitlines()
        if answer.returncode == 0 and lines:
            name, *numbers = (cell.strip() for cell in lines[0].split(","))
            return f"this machine's {name}", _build(*numbers) if numbers else OLDER
    return None


def _build(capability: str, driver: str) -> str:
    """The build for a GPU of that compute capability (``8.6``) with that driver (``591.44``)."""
    try:
        number, release = float(capability), float(driver.partition(".")[0])
    except ValueError:  # "[N/A]"
        return NEWER
    if number >= BLACKWELL:
        return NEWER
    return OLDER if number < TURING or release < DRIVER else NEWER


def _has_driver() -> bool:
    """Whether NVIDIA's driver is installed: its library on Windows and in WSL, its kernel module on Linux."""
    if sys.platform == "win32":
        return (Path(os.environ.get("SYSTEMROOT", r"C:\Windows")) / "System32" / "nvcuda.dll").is_file()
    return any(Path(path).exists() for path in ("/proc/driver/nvidia/version", "/usr/lib/wsl/lib/libcuda.so.1"))


def _python() -> str:
    """This interpreter as a command for bash, cmd and PowerShell, below the present folder without the way there."""
    path = os.path.relpath(sys.executable) if sys.executable.startswith(os.getcwd() + os.sep) else sys.executable
    return f'"{path}"' if " " in path else path
