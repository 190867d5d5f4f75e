"""What is printed at a run's start and end, and where its time is counted."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.training.distribution import in_turn
from library.training.report.timing import RunClock, peak_process_memory, timed
from library.training.report.wording import (
    EndFacts,
    FileFacts,
    GroupFacts,
    PartFacts,
    StartFacts,
    end_lines,
    rate_text,
    size_text,
    start_lines,
    table,
    time_text,
)

START = StartFacts(
    family="FLUX.1",
    device="cuda:0 (NVIDIA H100)",
    processes=2,
    dtype="bfloat16",
    attention="sdpa",
    gradient_checkpointing=True,
    parts=[PartFacts("transformer", 11_901_408_320, "bfloat16", 23_802_816_640), PartFacts("ae", 83, "float32", 332)],
    absent=["clip_l", "t5xxl"],
    network="networks.lora_flux",
    network_dtype="float32",
    modules={"transformer": 304, "text encoder": 0},
    groups=[GroupFacts("unet", 608, 38_000_000, 1e-4), GroupFacts("unet plus", 304, 2_000_000, None)],
    optimizer="torch.optim.adamw.AdamW",
    schedule="cosine",
    batch_sizes=[2, 4],
    accumulation=3,
    images_per_epoch=1000,
    steps=1600,
    epochs=10,
    steps_per_epoch=160,
    start_step=800,
    seed=7,
)
END = EndFacts(
    steps=1600,
    images=3200,
    seconds=4000.0,
    parts={"training": 3000.0, "waiting for data": 200.0, "saving": 800.0},
    peak_process_bytes=3 * 2**30,
    peak_device_bytes=None,
    losses={"average": 0.12345678},
    files=[FileFacts(Path("out/a.safetensors"), 75 * 2**20)],
    samples=[FileFacts(Path("out/sample/1.png"), 2**20), FileFacts(Path("out/sample/2.png"), 2**20)],
)


def test_the_start_report_tells_everything_in_ascii():
    assert start_lines(START) == [
        "device cuda:0 (NVIDIA H100), 2 processes, computing in bfloat16, attention sdpa, gradient checkpointing",
        "base model FLUX.1, unloaded: clip_l, t5xxl",
        "  transformer  11,901,408,320 parameters  bfloat16  22.2 GiB",
        "  ae                       83 parameters  float32      332 B",
        "network networks.lora_flux in float32: 304 transformer and 0 text encoder modules, 40,000,000 parameters",
        "  unet       608 tensors  38,000,000 parameters  learning rate 0.0001",
        "  unet plus  304 tensors   2,000,000 parameters  learning rate of its own",
        "optimizer torch.optim.adamw.AdamW, schedule cosine",
        "batch size 2 or 4 x 3 batches x 2 processes = 12 or 24 images per step, 1,000 images per epoch",
        "1,600 steps from step 800 on: 10 epochs of 160 steps, seed 7",
    ]
    plain = dataclasses.replace(START, processes=1, accumulation=1, batch_sizes=[1], start_step=0, epochs=1)
    assert start_lines(plain)[-2:] == [
        "batch size 1, 1,000 images per epoch",
        "1,600 steps: 1 epoch of 160 steps, seed 7",
    ]


def test_the_end_report_tells_time_speed_memory_losses_and_files():
    assert end_lines(END) == [
        "finished after 1 h 6 min: 1,600 steps, 3,200 images; 0.5 steps/s, 1 images/s while training",
        "time: training 50 min 0 s (75%), saving 13 min 20 s (20%), waiting for data 3 min 20 s (5%)",
        "peak memory: 3.0 GiB of system RAM",
        "loss: average 0.12346",
        "1 file written, 75.0 MiB",
        f"  {Path('out/a.safetensors')}  75.0 MiB",
        f"2 sample images in {Path('out/sample')}, 2.0 MiB",
    ]
    stopped = dataclasses.replace(
        END, interrupted="Ctrl-C", peak_device_bytes=2**34, steps=0, losses={}, files=[END.files[0]] * 30, samples=[]
    )
    lines = end_lines(stopped)
    assert lines[0] == "ended early (Ctrl-C) after 1 h 6 min: 0 steps, 3,200 images"
    assert lines[2] == "peak memory: 16.0 GiB on the device, 3.0 GiB of system RAM"
    assert lines[3] == "30 files written, 2.2 GiB (the newest 12 of them)" and len(lines) == 16


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (size_text(0), "0 B"),
        (size_text(1023), "1023 B"),
        (size_text(1024), "1.0 KiB"),
        (size_text(200 * 1024), "200 KiB"),
        (size_text(3 * 2**40), "3.0 TiB"),
        (time_text(0.04), "0.0 s"),
        (time_text(59.4), "59 s"),
        (time_text(59.6), "1 min 0 s"),
        (time_text(3599.7), "1 h 0 min"),
        (rate_text(0.01234), "0.0123"),
        (rate_text(1234.5), "1234"),
    ],
)
def test_numbers_are_short(text, expected):
    assert text == expected


def test_tables_align():
    assert table([("a", "10"), ("bbb", "9")]) == ["  a    10", "  bbb   9"]
    assert table([]) == []


# ---- the clock -------------------------------------------------------------------------------------------------------


class Time:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_every_second_belongs_to_the_innermost_part():
    time = Time()
    clock = RunClock(time)
    time.now = 1
    with clock.part("training"):
        time.now = 3
        with clock.part("saving"):
            time.now = 7
            with pytest.raises(ValueError), clock.part("validation"):
                time.now = 8
                raise ValueError
        time.now = 16
    time.now = 32
    assert clock.seconds == {"other": 17, "training": 10, "saving": 4, "validation": 1}


def test_waiting_is_counted_but_not_the_work_between():
    time = Time()
    clock = RunClock(time)

    def slow():
        for number in range(3):
            time.now += 2
            yield number
        time.now += 1

    got = []
    with clock.part("training"):
        for number in clock.each("waiting for data", slow()):
            got.append(number)
            time.now += 5
    assert got == [0, 1, 2] and clock.seconds == {"other": 0, "training": 15, "waiting for data": 7}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 10)), max_size=20))
def test_the_parts_add_up_to_all_time(steps):
    time = Time()
    clock = RunClock(time)

    def walk(rest):
        if rest:
            with clock.part(rest[0][0]):
                time.now += rest[0][1]
                walk(rest[1:])
                time.now += 1

    walk(steps)
    assert sum(clock.seconds.values()) == pytest.approx(time.now)


def test_methods_give_their_time_to_their_part():
    time = Time()

    class Run:
        clock = RunClock(time)

        @timed("saving")
        def save(self, name: str, *, size: int) -> str:
            """Doc."""
            time.now += size
            return name

    run = Run()
    assert run.save("x", size=3) == "x" and Run.save.__doc__ == "Doc."
    assert run.clock.seconds["saving"] == 3


def test_peak_memory_rises_with_what_is_held():
    before = peak_process_memory()
    held = bytearray(64 << 20)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    assert peak_process_memory() >= max(before, 64 << 20)


# ---- --lowram --------------------------------------------------------------------------------------------------------


def test_processes_take_turns():
    """Threads in place of processes, with a barrier as accelerate has one."""
    count = 4
    barrier = threading.Barrier(count)
    inside, most, order = [], [], []

    class Process:
        num_processes = count

        def __init__(self, index: int) -> None:
            self.process_index = index

        def wait_for_everyone(self) -> None:
            barrier.wait(timeout=20)

    def work(index: int) -> None:
        with in_turn(Process(index)):
            inside.append(index)
            most.append(len(inside))
            order.append(index)
            threading.Event().wait(0.02)
            inside.remove(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert order == [0, 1, 2, 3] and max(most) == 1
