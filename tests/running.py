"""Running the scripts as a user does."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_in_process(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script of the project in this process, as ``python script ...`` does; what it leaves behind is undone.

    An error that the script does not foresee comes out of this function, where a process would end with a traceback.
    """
    from library.console import run_script

    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    return _run(lambda: run_script(module.main), script, *arguments)


def run_as_main(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The same of the file itself, with what it does only when it is the program."""
    from library import options

    options._class_bodies.cache_clear()  # another file was the main module of this process before
    return _run(lambda: runpy.run_path(str(ROOT / script), run_name="__main__"), script, *arguments)


def _run(program: Callable[[], object], script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [script, *(str(argument) for argument in arguments)]
    printed, said, code = io.StringIO(), io.StringIO(), 0
    with like_a_new_process(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            try:
                program()
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return subprocess.CompletedProcess(words, code, printed.getvalue(), said.getvalue())


def lycoris_package() -> Any:
    """The package lycoris-lora behind this suite's checks; without it the test is skipped."""
    from library.lycoris import open_lycoris

    try:
        return open_lycoris()
    except ImportError as error:
        pytest.skip(f"lycoris-lora is in requirements-dev.txt: {error}")


@contextlib.contextmanager
def like_a_new_process() -> Iterator[None]:
    """accelerate starts anew; afterwards the environment and the console are as they were."""
    from library.console import LOGGER

    environment, ctrl_c = dict(os.environ), signal.getsignal(signal.SIGINT)
    handlers, level, propagates = LOGGER.handlers[:], LOGGER.level, LOGGER.propagate
    forget_accelerator()
    try:
        yield
    finally:
        forget_accelerator()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, ctrl_c)
        LOGGER.handlers[:], LOGGER.propagate = handlers, propagates
        LOGGER.setLevel(level)
        os.environ.clear()
        os.environ.update(environment)


def forget_accelerator() -> None:
    """Let the next run in this process set up accelerate by its own options."""
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def make_trainer(family: str | type, *arguments: object) -> Any:
    """The trainer of a family (or a class of one) with these words of a command line, as it is before it trains."""
    from library.options import parse_options

    forget_accelerator()
    made: Any = trainer_class(family) if isinstance(family, str) else family
    return made.of(parse_options(made.options_class, "test", [str(argument) for argument in arguments]))


def train(family: str | type, *arguments: object) -> Any:
    """Train in this process, without the console of a script; returns the trainer when it is done."""
    trainer = make_trainer(family, *arguments)
    trainer.train()
    return trainer


def logged_rates(trainer: Any) -> dict[str, float]:
    """The learning rates that a trainer logs, by their names in logs."""
    from library.training.tracking import learning_rate_scalars

    learning, unet_only = trainer.optimization, trainer.options.network.network_train_unet_only
    return learning_rate_scalars(learning.optimizer, learning.scheduler, learning.group_names, unet_only)


@contextlib.contextmanager
def no_weights_are_read() -> Iterator[None]:
    """Fails when a tensor of a model is read from its file; those of networks may be."""
    from library.checkpoints import SafetensorsCheckpoint

    stored = SafetensorsCheckpoint._stored

    def only_networks(self: SafetensorsCheckpoint, key: str) -> Any:
        assert key.startswith("lora_") or key.endswith("spiece_model"), f"the weights {key} of {self.label} were read"
        return stored(self, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsCheckpoint, "_stored", only_networks)
        yield


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


def launched_script(words: list[str]) -> tuple[str, list[str]]:
    """The script and its arguments that ``accelerate launch`` would start with these words; it must know its own."""
    from accelerate.commands.launch import launch_command_parser

    assert words[:2] == ["accelerate", "launch"]
    parsed = launch_command_parser().parse_args(words[2:])
    return parsed.training_script, parsed.training_script_args


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
    """The trainer of a family by its short name or that of a model of it (``sd1``, ``chroma``); imported only now."""
    from library.families import FAMILIES

    rows = {key: row for row in FAMILIES for key in (row.key, *row.models)}
    return rows[family].trainer_class()
