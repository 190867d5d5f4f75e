"""The process that ``tests/processes.py`` forks scripts from: it has imported once what every script imports.

Each line on its input is a script to start, as JSON; each line on its output says that one has started or ended.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import runpy
import selectors
import signal
import sys
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODULES = (
    *("accelerate", "torch.optim", "PIL.Image", "PIL.PngImagePlugin", "safetensors.torch", "cv2", "scipy.stats"),
    *("library.training.plan.dry_run", "library.training.objective.ddpm"),
)
TRANSFORMERS_CLASSES = {"t5.modeling_t5": "T5EncoderModel"}
DIFFUSERS_CLASSES = ("UNet2DConditionModel", "AutoencoderKL", "DDIMScheduler", "EulerDiscreteScheduler")


def import_what_scripts_use() -> None:
    """All that costs seconds and is the same for every run."""
    import torch

    torch.set_num_threads(1)
    from library.families import FAMILIES
    from library.models.lean_imports import diffusers_class, transformers_class

    rooms = {f"library.models.{family.room}.pipeline" for family in FAMILIES}
    for family in FAMILIES:
        rooms |= {family.script, family.networks[0], *([family.inference_script] if family.inference_script else [])}
    for name in (*MODULES, *sorted(rooms)):
        importlib.import_module(name)
    for module, name in TRANSFORMERS_CLASSES.items():
        transformers_class(module, name)
    for name in DIFFUSERS_CLASSES:
        diffusers_class(name)


def fork_script(request: dict) -> int:
    """Start a script in a child, with a session of its own; returns its process number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGCHLD else signal.default_int_handler)
        nothing = os.open(os.devnull, os.O_RDONLY)
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for number, stream in enumerate((nothing, output, output)):
            os.dup2(stream, number)
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8")
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(number, "w", closefd=False), "utf-8", "replace", line_buffering=True)
            for number in (1, 2)
        )
        os.chdir(request["cwd"])
        os.environ.update(request["environment"])
        for limit, value in request["limits"].items():
            import resource

            resource.setrlimit(getattr(resource, limit), (value, value))
        sys.argv = [request["script"], *request["arguments"]]
        runpy.run_path(os.path.join(ROOT, request["script"]), run_name="__main__")
        code = 0
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            code = 130
    finally:
        _end(code)
    raise AssertionError("unreachable")


def _end(code: int) -> None:
    """End as an interpreter does: threads are waited for, exit handlers run; whatever happens, the process ends."""
    import atexit
    import threading

    try:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code & 0xFF)


def tell(**event: int | str) -> None:
    sys.__stdout__.write(json.dumps(event) + "\n")
    sys.__stdout__.flush()


def main() -> None:
    """Serve until the input ends, then end what still runs."""
    import_what_scripts_use()
    readable, written = os.pipe()
    for end in (readable, written):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(readable, selectors.EVENT_READ)
    running: set[int] = set()
    unread = b""
    tell(ready=os.getpid())
    while True:
        for key, _ in selector.select():
            if key.fd == readable:
                os.read(readable, 4096)
                continue
            read = os.read(0, 65536)
            if not read:
                for child in running:
                    os.killpg(child, signal.SIGKILL)
                os._exit(0)
            *lines, unread = (unread + read).split(b"\n")
            for line in lines:
                request = json.loads(line)
                child = fork_script(request)
                running.add(child)
                tell(started=child, number=request["number"])
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                running.remove(child)
                tell(ended=child, code=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    sys.path.insert(0, ROOT)
    main()
