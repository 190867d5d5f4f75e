"""One Ctrl-C ends what has nothing to save, and a training after its step; two end everything at once, with a word."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from library import console
from library.training.interruption import Interruption
from library.training.output.state import SavedState
from tests.faults.killing import broken_files
from tests.processes import ForkServer, Started
from tests.running import ROOT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX systems")

LONG_AGO = 1_000_000
"""A number of steps that no test waits for."""


@pytest.fixture
def start(fork_server: ForkServer, flux_command, few_blocks_sd1, dataset_toml, image_folder, tmp_path):
    """Start a script by its name, over the tiny models, with work for hours."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --d 1\n", encoding="utf-8")
    out = tmp_path / "out"
    images = shutil.copytree(image_folder, tmp_path / "images")
    data = ["--dataset_config", dataset_toml(images, subset={"num_repeats": 200})]
    commands: dict[str, list[object]] = {
        "flux_train_network.py": [
            *(*flux_command, *data, "--output_dir", out, "--output_name", "lora", "--save_state"),
            *("--max_train_steps", LONG_AGO, "--sample_prompts", prompts, "--sample_every_n_steps", LONG_AGO),
        ],
        "gen_img.py": [
            *("--ckpt", few_blocks_sd1, "--from_file", prompts, "--outdir", out, "--W", 64, "--H", 64),
            *("--steps", 1, "--n_iter", 2000),
        ],
        "tools/cache_latents.py": ["--flux", *flux_command, *data],
    }
    return lambda script, *more: fork_server.start(script, *commands[script], *more)


def wait_until(process: Started, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert process.poll() is None and time.monotonic() < deadline, process.output[-3000:]
        time.sleep(0.005)


def press(process: Started) -> None:
    process.send_signal(signal.SIGINT)


def end_of(process: Started, seconds: float = 60) -> str:
    """The last line that a process has said when it has ended with 130, without a traceback."""
    assert process.wait(seconds) == 130, process.output[-3000:]
    # Where the press falls into a finalizer, Python prints what it swallows.
    said = re.sub(r"Exception ignored in:.*?KeyboardInterrupt: ?\n", "", process.output, flags=re.DOTALL)
    assert "Traceback" not in said and "Exception" not in said, process.output[-3000:]
    return process.output.strip().splitlines()[-1]


def test_one_ends_a_training_after_its_step(start, tmp_path):
    process = start("flux_train_network.py")
    wait_until(process, lambda: f"1/{LONG_AGO}" in process.output)
    press(process)
    assert process.wait(60) == 0 and "Ctrl-C: the run ends after this step" in process.output
    (state,) = (tmp_path / "out").glob("lora-step*-state")
    assert SavedState(state).position.step >= 1


def test_two_end_a_training_at_once(start, tmp_path):
    process = start("flux_train_network.py", "--gradient_accumulation_steps", LONG_AGO)
    wait_until(process, lambda: "| 0/" in process.output)
    press(process)
    wait_until(process, lambda: "Ctrl-C: the run ends after this step" in process.output)
    press(process)
    assert end_of(process) == "interrupted"
    assert broken_files(tmp_path) == []


@pytest.mark.parametrize("when", [0.0, 0.3])
def test_one_ends_a_start_at_once(start, tmp_path, when):
    """While files are opened, models loaded and images cached."""
    process = start("flux_train_network.py", "--cache_latents_to_disk", "--network_train_unet_only")
    wait_until(process, lambda: "INFO" in process.output)
    time.sleep(when)
    press(process)
    if process.wait(60) == 0:  # it had begun to train
        assert "Ctrl-C: the run ends after this step" in process.output
    else:
        assert end_of(process) == "interrupted"
    assert broken_files(tmp_path) == []


class WithFinalizer:
    def __del__(self) -> None:
        console._ctrl_c(signal.SIGINT, None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_that_a_finalizer_swallows_ends_the_training_before_its_first_step():
    console.forget_interrupt()
    WithFinalizer()
    with pytest.raises(KeyboardInterrupt), Interruption():
        pass
    console.forget_interrupt()
    with Interruption() as interruption:
        assert interruption.reason is None


def test_one_that_the_launcher_passes_on_after_the_end_of_the_training_ends_nothing_else(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    ordinary = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
    assert interruption.reason == "Ctrl-C"
    for number in ordinary:
        signal.raise_signal(number)
    interruption._noted -= 10.0
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert {number: signal.getsignal(number) for number in ordinary} == ordinary


@pytest.mark.parametrize("script", ["gen_img.py", "tools/cache_latents.py"])
def test_one_ends_what_has_nothing_to_save(start, image_folder, tmp_path, script):
    process = start(script)
    if script == "gen_img.py":
        wait_until(process, lambda: len(list((tmp_path / "out").glob("*.png"))) > 1)
    else:
        wait_until(process, lambda: "INFO" in process.output)
    press(process)
    assert end_of(process) == "interrupted"
    assert broken_files(tmp_path) == []


HANGING = """
import sys, time, threading
from library.console import run_script

def main():
    threading.Thread(target=time.sleep, args=(600,)).start()
    try:
        print("ready", flush=True)
        time.sleep(600)
    finally:
        print("clearing away", flush=True)
        {clear}

run_script(main)
"""


@pytest.mark.parametrize("clear", ["time.sleep(600)", "pass"], ids=["a block that clears away", "a thread"])
def test_two_do_not_wait_for_what_hangs(tmp_path, clear):
    """Neither for what the first one sets off nor for threads that a process waits for at its end."""
    words = [sys.executable, "-c", HANGING.format(clear=clear)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "clearing away\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in said and said.splitlines()[-1] == "interrupted at once"


def test_a_job_in_the_background_that_ignores_ctrl_c_still_does(tmp_path):
    program = (
        "import os, signal\nfrom library.console import run_script\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "run_script(lambda: (os.kill(os.getpid(), signal.SIGINT), print('goes on')))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "goes on\n", "")
