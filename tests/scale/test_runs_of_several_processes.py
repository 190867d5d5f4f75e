"""Several processes as one run: resumed with another number of them, interrupted, killed, started with other files."""

from __future__ import annotations

import re
import shutil
import signal
import time

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.families.families import TINY
from tests.running import run_in_process
from tests.scale.conftest import FSDP, few_images, make_dataset, run_options

FLUX = TINY["flux"]


@pytest.fixture(scope="module")
def images(image_folder, tmp_path_factory):
    """Four images of four shapes with captions, which are trained four times an epoch."""
    return few_images(image_folder, tmp_path_factory.mktemp("data") / "images")


@pytest.fixture
def options(images, tiny_flux, tmp_path):
    """The command line of a short run of FLUX.1 into a folder, with a batch size."""

    def given(folder: str, batch_size: int, *more: object) -> list[object]:
        dataset = make_dataset(tmp_path, images, batch_size)
        names = ["--dataset_config", dataset, "--output_dir", tmp_path / folder, "--output_name", "lora"]
        return [*run_options(FLUX, tiny_flux), *names, "--cache_latents_to_disk", "--no_report", *more]

    return given


def state_after_two_steps(options, run_together, processes: int, batch_size: int):
    """The state of a run in so many processes, inside its first epoch."""
    given = options("first", batch_size, "--max_train_steps", "2", "--save_state_on_train_end")
    if processes == 1:
        assert run_in_process(FLUX.script, *given).returncode == 0
    else:
        run_together(FLUX.script, *given, count=processes)
    return given[given.index("--output_dir") + 1] / "lora-state"


@pytest.mark.parametrize("before", [2, pytest.param(1, marks=pytest.mark.thorough)])
def test_the_same_batches_on_other_processes_continue_inside_the_epoch(options, run_together, tmp_path, before):
    """Two processes with batch size 2 and one with 4 have the same batches: all buckets divide evenly."""
    now = 3 - before
    state = state_after_two_steps(options, run_together, before, 4 // before)
    whole = options("whole", 4, "--max_train_steps", "4")
    assert run_in_process(FLUX.script, *whole).returncode == 0
    again = options("again", 4 // now, "--max_train_steps", "4", "--resume", state)
    if now == 1:
        done = run_in_process(FLUX.script, *again)
        said = done.stderr
        assert done.returncode == 0, said
    else:
        said = run_together(FLUX.script, *again)[0].output
    assert "each batch has the same images as before: the run continues to the same result, up to rounding" in said
    expected, resumed = (load_file(tmp_path / name / "lora.safetensors") for name in ("whole", "again"))
    for key, tensor in expected.items():
        torch.testing.assert_close(resumed[key], tensor, rtol=0, atol=1e-6)


def test_other_batches_begin_the_epoch_anew_and_epochs_count_as_epochs(options, run_together):
    """One process with batch size 2 has 8 batches an epoch; two of them have 4."""
    state = state_after_two_steps(options, run_together, 1, 2)
    given = options("again", 2, "--max_train_epochs", "2", "--resume", state, "--save_every_n_epochs", "1")
    run = run_together(FLUX.script, *given, "--save_state")
    said = run[0].output
    assert "processes changed since the state was saved" in said and "The current epoch starts over." in said
    # The first epoch is trained anew after its 2 steps, then the second one.
    folder = given[given.index("--output_dir") + 1]
    assert "10 steps from step 2 on: 2 epochs of 4 steps" in said
    assert {path.name for path in folder.glob("*.safetensors")} == {"lora-000001.safetensors", "lora.safetensors"}
    # A state of that run knows of it: it is resumed as any other.
    more = [*given, "--max_train_epochs", "3"]
    more[more.index("--resume") + 1] = folder / "lora-000001-state"
    again = run_together(FLUX.script, *more)[0].output
    assert "changed since the state was saved" not in again
    assert "14 steps from step 6 on: 3 epochs of 4 steps" in again


def test_a_loss_that_is_infinite_in_one_process_is_left_out_by_both(options, run_together, tmp_path):
    """Latents of one image make its loss overflow; one process with all images leaves out the same step."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(8):
        Image.new("RGB", (64, 64), (30 * number, 60, 90)).save(images / f"{number:02d}.png")
        (images / f"{number:02d}.txt").write_text("a plane", encoding="utf-8")

    def given(folder: str, batch_size: int, *more: object) -> list[object]:
        words = options(folder, batch_size, "--learning_rate", "1", "--max_train_steps", "3", "--on_nonfinite", "skip")
        dataset = make_dataset(tmp_path, images, batch_size)
        dataset.write_text(dataset.read_text(encoding="utf-8").replace("repeats = 4", "repeats = 1"), encoding="utf-8")
        return [*words, *more]

    assert run_in_process(FLUX.script, *given("healthy", 4)).returncode == 0
    (broken,) = images.glob("05*.npz")
    arrays = dict(numpy.load(broken))
    large = {name: array * 1e30 for name, array in arrays.items() if name.startswith("latents")}
    numpy.savez(broken, **{**arrays, **large})
    one = run_in_process(FLUX.script, *given("one", 4, "--skip_cache_check"))
    assert one.returncode == 0, one.stderr[-3000:]
    both = [process.output for process in run_together(FLUX.script, *given("both", 2, "--skip_cache_check"))]
    assert not re.search("Traceback|Warning", "".join(both)), "torch's, of a schedule without updates"
    steps = [re.findall(r"step (\d+): the loss is (?:inf|nan)", said) for said in (one.stderr, *both)]
    assert steps[0] == steps[1] == steps[2] and len(steps[0]) in (1, 2)
    assert sorted(("05.png" in said, "another process" in said) for said in both) == [(False, True), (True, False)]
    names = ("healthy", "one", "both")
    healthy, expected, trained = (load_file(tmp_path / name / "lora.safetensors") for name in names)
    for key, tensor in expected.items():
        torch.testing.assert_close(trained[key], tensor, rtol=0, atol=1e-6)
    assert any((tensor - healthy[key]).abs().max() > 1e-4 for key, tensor in expected.items())


@pytest.mark.parametrize("what", ["option", "data", "state"])
def test_every_process_needs_the_same_command_and_files(options, together, run_together, images, tmp_path, what):
    """Else processes would wait for each other, or train apart, without a word."""
    if what == "option":
        changed, sentence = ["--network_dim", "2"], "process 1 has another value of --network_dim (2)"
    elif what == "data":
        fewer = shutil.copytree(images, tmp_path / "fewer" / "images", ignore=shutil.ignore_patterns("00.*"))
        changed = ["--dataset_config", make_dataset(tmp_path / "fewer", fewer, 2)]
        sentence = "process 1 has another value of training data ("
    else:
        state_after_two_steps(options, run_together, 1, 2)
        changed = ["--output_dir", tmp_path / "nothing"]
        sentence = "--resume: the processes found different states: lora-state (step 2), none"
    given = options("first", 2, "--max_train_steps", "3", "--resume", "auto")
    both = together(FLUX.script, *given, only={1: changed})
    assert [process.wait(60) for process in both] == [2, 2]
    for process in both:
        assert f"error: {sentence}" in process.output
        assert "Traceback" not in process.output


def begin_training(options, together, *more, **environment):
    """Two processes in the middle of a long run."""
    both = together(FLUX.script, *options("out", 2, "--max_train_steps", "5000", *more), **environment)
    deadline = time.monotonic() + 120
    while "avr_loss" not in both[0].output:
        assert time.monotonic() < deadline and both[0].poll() is None, both[0].output[-3000:]
        time.sleep(0.05)
    return both


@pytest.mark.parametrize("lost", [1, 0], ids=["second", "first"])
def test_a_process_that_is_killed_ends_the_others_with_a_sentence(options, together, tmp_path, lost):
    both = begin_training(options, together)
    both[lost].kill()
    other = both[1 - lost]
    assert other.wait(30) == 2
    assert f"error: process {1 - lost} ends because another process of this run has ended" in other.output
    assert "Traceback" not in other.output
    assert bool(list((tmp_path / "out").glob("lora-step*.safetensors"))) == (lost == 1), "the first process saves"


def test_ctrl_c_in_a_terminal_ends_all_processes_after_the_same_step(options, together, tmp_path):
    """The launcher passes the terminal's signal on to processes that have had it already."""
    both = begin_training(options, together, "--save_state", **FSDP, TORCHELASTIC_RUN_ID="none")
    for _ in range(2):
        for process in both:
            process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert [process.wait(60) for process in both] == [0, 0], both[0].output[-2000:] + both[1].output[-2000:]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert len([name for name in names if name.endswith(".safetensors")]) == 1
    assert len([name for name in names if name.endswith("-state")]) == 1
