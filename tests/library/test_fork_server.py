"""What the tests' fork server starts behaves as a process that was started anew."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.processes import ForkServer
from tests.running import launch


def waits(started, text: str) -> bool:
    """Whether the process has printed ``text`` before it ended or a minute has passed."""
    end = time.monotonic() + 60
    while time.monotonic() < end and text not in started.output:
        if started.poll() is not None:
            return text in started.output
        time.sleep(0.02)
    return text in started.output


@pytest.fixture
def program(tmp_path) -> Path:
    """A script of its own: prints what a process knows about itself, then does what its first argument says."""
    path = tmp_path / "program.py"
    path.write_text(
        "import atexit, json, os, sys, threading, time\n"
        "atexit.register(lambda: print('at the end'))\n"
        "known = [sys.argv, os.getcwd(), os.environ.get('OWN'), os.getpid(), os.getppid(), __name__]\n"
        "print(json.dumps(known), flush=True)\n"
        "if sys.argv[1] == 'sleep':\n    time.sleep(100)\n"
        "if sys.argv[1] == 'thread':\n"
        "    threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n"
        "if sys.argv[1] == 'raise':\n    raise ValueError('unforeseen')\n"
        "if sys.argv[1] == 'write':\n    open('large', 'wb', 0).write(bytes(5000))\n"
        "if sys.argv[1].isdigit():\n    sys.exit(int(sys.argv[1]))\n"
    )
    return path


def test_a_child_is_a_process_of_its_own(fork_server: ForkServer, program, tmp_path):
    started = fork_server.start(str(program), "7", "b c", cwd=tmp_path, environment={"OWN": "yes"})
    assert started.wait() == 7
    words, folder, own, pid, _, name = json.loads(started.output.splitlines()[0])
    assert words == [str(program), "7", "b c"] and Path(folder) == tmp_path and own == "yes" and name == "__main__"
    assert pid == started.pid != os.getpid() and "at the end" in started.output
    assert "OWN" not in os.environ


def test_it_ends_by_signals_exceptions_and_limits(fork_server: ForkServer, program, tmp_path):
    killed, interrupted = (fork_server.start(str(program), "sleep") for _ in range(2))
    assert waits(killed, "__main__") and waits(interrupted, "__main__")
    killed.kill()
    interrupted.send_signal(signal.SIGINT)
    assert (killed.returncode, interrupted.wait()) == (-signal.SIGKILL, 130)
    raised = fork_server.run(str(program), "raise")
    assert raised.returncode == 1 and "ValueError: unforeseen" in raised.output
    limited = fork_server.run(str(program), "write", cwd=tmp_path, limits={"RLIMIT_FSIZE": 1000})
    assert limited.returncode == 0 and (tmp_path / "large").stat().st_size == 1000
    assert "thread\nat the end" in fork_server.run(str(program), "thread").output


def test_a_script_prints_what_it_prints_when_started_by_hand(fork_server: ForkServer, tmp_path):
    by_hand = launch("tools/show_metadata.py", tmp_path / "absent.safetensors", accelerate=False)
    forked = fork_server.run("tools/show_metadata.py", tmp_path / "absent.safetensors")
    assert (forked.returncode, forked.output) == (by_hand.returncode, by_hand.stdout + by_hand.stderr)
    assert forked.returncode == 2


def test_clients_share_the_process_and_end_only_what_they_started(fork_server: ForkServer, program):
    with ForkServer(fork_server.folder) as other:
        left, kept = other.start(str(program), "sleep"), fork_server.start(str(program), "sleep")
        assert waits(left, "__main__") and waits(kept, "__main__")
        assert len({json.loads(started.output)[-2] for started in (left, kept)}) == 1
    assert left.returncode == -signal.SIGKILL and kept.poll() is None
    kept.kill()
