"""SIGTERM ends a run behind the launcher after the step in hand, with a state from which it goes on.

Ctrl-C goes the same way; tests/e2e/ holds it in this process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from library.training.output.state import SavedState
from tests.running import ROOT, command


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX systems")
def test_a_signal_saves_a_state_and_ends(flux_command, dataset_toml, tmp_path):
    output = tmp_path / "out"
    arguments = [*flux_command, "--dataset_config", dataset_toml(), "--output_dir", output, "--output_name", "lora"]
    arguments += ["--max_train_steps", "100000", "--save_state", "--no_report", "--save_every_n_steps", "100000"]
    arguments += ["--logging_dir", tmp_path / "log"]
    process = subprocess.Popen(
        command("flux_train_network.py", *arguments),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    seen = []
    for line in process.stderr:
        seen.append(line)
        if "1/100000" in line:
            break
    assert process.poll() is None, "".join(seen)[-2000:]
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    code = process.wait(timeout=120)
    # The launcher dies of the signal itself; the run behind it notices and ends cleanly.
    assert code == -signal.SIGTERM, rest[-2000:]
    deadline = time.monotonic() + 60
    while not (states := list(output.glob("lora-step*-state"))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(states) == 1
    saved = SavedState(states[0])
    assert saved.position.step == int(states[0].name[len("lora-step") : -len("-state")]) >= 1
    assert states[0].with_name(states[0].name.removesuffix("-state") + ".safetensors").is_file()
    assert not (output / "lora.safetensors").exists()
    assert [path for path in output.iterdir() if path.name.startswith(".")] == []
