"""A torch that cannot use the NVIDIA GPU which is there is named, with the command that installs one that can."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from library import torch_build
from library.console import ConsoleOptions, set_up_console
from library.errors import UserError
from library.torch_build import TORCH, missing_cuda
from library.training.distribution import make_accelerator
from library.training.run_options import DistributionOptions, PrecisionOptions
from tests.running import ROOT, forget_accelerator, run_in_process

RTX_3060 = "NVIDIA GeForce RTX 3060, 8.6, 591.44"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with a program nvidia-smi (unless its answer is None), and a torch that was built for the CPU."""

    def with_answer(answer: str | None, code: int = 0, refuses: str = "no such field") -> Path:
        calls = tmp_path / "calls"
        if answer is not None:
            program = tmp_path / "nvidia-smi"
            case = f'case "$*" in *"{refuses}"*) echo Field; exit 2;; esac\n'
            program.write_text(
                f"#!/bin/sh\necho \"$@\" >> '{calls}'\n{case}echo '{answer}'\nexit {code}\n", encoding="utf-8"
            )
            program.chmod(0o755)
        return calls

    for name in ("cuda", "hip", "xpu"):
        monkeypatch.setattr(torch.version, name, None)
    monkeypatch.setattr(torch.version, "__version__", f"{TORCH}+cpu")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch_build, "_has_driver", lambda: False)
    return with_answer


def builds(message: str | None) -> set[str]:
    return set(re.findall(r"cu\d+", message or ""))


def test_a_gpu_that_torch_cannot_use_is_named_with_the_command(machine):
    machine(RTX_3060)
    message = missing_cuda()
    assert f"torch {TORCH}+cpu has no CUDA support, so this machine's NVIDIA GeForce RTX 3060 is not used" in message
    words = shlex.split(message.partition(": ")[2])
    assert Path(words[0]).absolute() == Path(sys.executable).absolute()
    url = "https://download.pytorch.org/whl/cu130"
    assert words[1:] == ["-m", "pip", "install", f"torch=={TORCH}+cu130", "--index-url", url]


@pytest.mark.parametrize(
    ("answer", "build"),
    [
        (RTX_3060, "cu130"),
        ("NVIDIA GeForce RTX 5090, 12.0, 572.16", "cu130"),  # no older build knows it
        ("NVIDIA GeForce RTX 3060, 8.6, 551.23", "cu126"),  # a driver for CUDA 12
        ("NVIDIA GeForce GTX 1080 Ti, 6.1, 580.88", "cu126"),  # too old for CUDA 13
        ("NVIDIA GeForce RTX 2060, 7.5, 580.88", "cu130"),
        ("NVIDIA GeForce RTX 3060, [N/A], 591.44", "cu130"),
    ],
)
def test_the_build_is_one_for_gpu_and_driver(machine, answer, build):
    machine(answer)
    assert builds(missing_cuda()) == {build}


def test_an_old_driver_that_knows_no_compute_capability_is_asked_again(machine):
    calls = machine("NVIDIA GeForce GTX 1060", refuses="compute_cap")
    assert "NVIDIA GeForce GTX 1060 is not used" in missing_cuda() and builds(missing_cuda()) == {"cu126"}
    assert len(calls.read_text().splitlines()) == 4


def test_nothing_is_guessed(machine, monkeypatch):
    assert missing_cuda() is None  # no nvidia-smi
    machine("NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.", code=9)
    monkeypatch.setattr(torch_build, "_has_driver", lambda: True)
    assert missing_cuda() is None  # the driver is installed, and has no GPU


def test_without_nvidia_smi_the_driver_says_that_there_is_a_gpu(machine, monkeypatch):
    monkeypatch.setattr(torch_build, "_has_driver", lambda: True)
    assert "so the NVIDIA GPU of this machine is not used" in missing_cuda()


def test_windows_drivers_are_known_by_their_library(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("SYSTEMROOT", str(tmp_path))
    assert not torch_build._has_driver()
    (tmp_path / "System32").mkdir()
    (tmp_path / "System32" / "nvcuda.dll").touch()
    assert torch_build._has_driver()


@pytest.mark.parametrize("name", ["cuda", "hip", "xpu"])
def test_no_program_is_started_for_a_torch_that_can_use_a_gpu(machine, monkeypatch, name):
    calls = machine(RTX_3060)
    monkeypatch.setattr(torch.version, name, "13.0")
    assert missing_cuda() is None and not calls.exists()


def test_apple_computers_and_hidden_gpus_need_no_message(machine, monkeypatch):
    calls = machine(RTX_3060)
    for value in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert missing_cuda() is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert missing_cuda() is None and not calls.exists()


def test_torch_need_not_be_imported(machine, monkeypatch):
    machine(RTX_3060)
    real = Path(torch.__file__).with_name("version.py").read_text(encoding="utf-8")
    monkeypatch.delitem(sys.modules, "torch")
    message = missing_cuda()
    assert "torch" not in sys.modules
    assert (message is None) == bool(re.search(r"^(cuda|hip|xpu): .*= '", real, re.MULTILINE))


def test_the_command_is_short_below_the_present_folder_and_quoted_where_it_must_be(machine, monkeypatch):
    machine(RTX_3060)
    monkeypatch.setattr(sys, "executable", os.path.join(os.getcwd(), ".venv", "bin", "python"))
    assert f": {os.path.join('.venv', 'bin', 'python')} -m pip" in missing_cuda()
    monkeypatch.setattr(sys, "executable", "/some where/python")
    assert ': "/some where/python" -m pip' in missing_cuda()


def test_a_training_says_it_and_goes_on(machine, capsys):
    machine(RTX_3060)
    forget_accelerator()
    set_up_console(ConsoleOptions())
    assert make_accelerator(PrecisionOptions(), DistributionOptions()).device.type == "cpu"
    assert capsys.readouterr().err.count("NVIDIA GeForce RTX 3060 is not used") == 1
    forget_accelerator()
    with pytest.raises(UserError, match="fp16 needs a CUDA device"):
        make_accelerator(PrecisionOptions(mixed_precision="fp16"), DistributionOptions())
    assert "has no CUDA support" in capsys.readouterr().err


def test_image_generation_says_it_unless_a_device_is_named(machine):
    machine(RTX_3060)
    for device, times in (((), 1), (("--device", "cpu"), 0)):
        result = run_in_process("flux_minimal_inference.py", "--ckpt_path", "none.safetensors", *device)
        assert result.returncode == 2 and result.stderr.count("has no CUDA support") == times


def test_it_installs_the_release_of_the_requirements():
    """So does what README says about the builds."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for build in (torch_build.NEWER, torch_build.OLDER):
        assert f"torch=={TORCH}+{build} --index-url https://download.pytorch.org/whl/{build}" in readme
    assert f"a driver older than {torch_build.DRIVER}" in readme
    assert f"\ntorch=={TORCH} " in (ROOT / "requirements.txt").read_text(encoding="utf-8")
