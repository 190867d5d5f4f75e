"""The process that ``tests/processes.py`` forks scripts from: it has imported once what every script imports.

It serves whoever connects, all test workers alike, and ends with the last of them. Each line of a connection is a
script to start, as JSON; each line of an answer says that the server is ready, or that a script has started or ended.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import traceback
import weakref
from dataclasses import dataclass, field

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODULES = (
    *("accelerate", "torch.optim", "PIL.Image", "PIL.PngImagePlugin", "safetensors.torch", "cv2", "scipy.stats"),
    *("library.training.plan.dry_run", "library.training.objective.ddpm", "library.data.cache"),
    "torch.distributed.fsdp",
)
TRANSFORMERS_CLASSES = {"t5.modeling_t5": "T5EncoderModel"}
DIFFUSERS_CLASSES = ("UNet2DConditionModel", "AutoencoderKL", "DDIMScheduler", "EulerDiscreteScheduler")


def import_what_scripts_use() -> None:
    """All that costs seconds and is the same for every run; nobody waits for the disk."""
    os.fsync = lambda descriptor: None
    import torch

    torch.set_num_threads(1)
    from library.families import FAMILIES
    from library.lean_imports import diffusers_class, transformers_class

    rooms = {f"library.models.{family.room}.pipeline" for family in FAMILIES}
    for family in FAMILIES:
        rooms |= {family.script, family.networks[0], *([family.inference_script] if family.inference_script else [])}
    for name in (*MODULES, *sorted(rooms)):
        importlib.import_module(name)
    for module, name in TRANSFORMERS_CLASSES.items():
        transformers_class(module, name)
    for name in DIFFUSERS_CLASSES:
        diffusers_class(name)
    from PIL import Image

    Image.init()
    for finalizer in list(weakref.finalize._registry):  # torch's operators need not be taken back by each child
        finalizer.atexit = False


def fork_script(request: dict) -> int:
    """Start a script in a child, with a session of its own; returns its process number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        os.closerange(3, max(map(int, os.listdir("/dev/fd"))) + 1)
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
        os.environ.clear()
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


@dataclass
class Client:
    """A connection, and what was started for it."""

    connection: socket.socket
    running: set[int] = field(default_factory=set)
    unread: bytes = b""

    def tell(self, **event: int) -> None:
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(event).encode() + b"\n")

    def serve(self) -> bool:
        """Start what it asks for; returns whether it is still there."""
        read = self.connection.recv(65536)
        *lines, self.unread = (self.unread + read).split(b"\n")
        for line in lines:
            child = fork_script(json.loads(line))
            self.running.add(child)
            self.tell(started=child)
        return bool(read)

    def look(self) -> None:
        """Say what has ended."""
        for child in list(self.running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                self.running.remove(child)
                self.tell(ended=child, code=os.waitstatus_to_exitcode(status))

    def close(self) -> None:
        """End what still runs."""
        for child in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            self.tell(ended=child, code=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        self.connection.close()


def main(listening: int, address: str) -> None:
    """Serve on a listening socket until the last client has gone."""
    listener = socket.socket(fileno=listening)
    import_what_scripts_use()
    gc.collect()
    gc.freeze()  # a child's collections of garbage leave alone, and so uncopied, what it shares with all others
    readable, written = os.pipe()
    for end in (readable, written):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(readable, selectors.EVENT_READ)
    clients: dict[int, Client] = {}
    reachable = True
    while True:
        for key, _ in selector.select(None if clients or reachable else 0):
            if key.fd == readable:
                os.read(readable, 4096)
            elif key.fd == listener.fileno():
                client = Client(listener.accept()[0])
                clients[client.connection.fileno()] = client
                selector.register(client.connection, selectors.EVENT_READ)
                client.tell(ready=os.getpid())
            elif not clients[key.fd].serve():
                selector.unregister(key.fd)
                clients.pop(key.fd).close()
        for client in clients.values():
            client.look()
        if not clients and reachable:
            os.unlink(address)  # who has connected before is still served, who comes later starts a server anew
            reachable = False
        elif not clients:
            os._exit(0)


if __name__ == "__main__":
    sys.path.insert(0, ROOT)
    main(int(sys.argv[1]), sys.argv[2])
