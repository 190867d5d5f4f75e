"""Processes that train together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from tests.running import ROOT

PROGRAM = """
import torch
from library.options import parse_options
from library.training.distribution import make_accelerator
from library.training.training_options import TrainingOptions
options = parse_options(TrainingOptions, "test", ["--ddp_timeout", "7"])
make_accelerator(options.precision, options.distribution)
print(torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout)
"""


def test_processes_wait_for_each_other_as_long_as_asked():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | {name: str(value) for name, value in launched.items()} | {"ACCELERATE_USE_CPU": "true"}
    result = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "0:07:00", result.stderr[-2000:]
