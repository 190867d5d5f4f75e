"""What block streaming costs and saves: bytes, misses and time of steps, the state machine alone, peaks, loading.

    python benchmarks/block_streaming.py                                # tiny models on the CPU, in seconds
    python benchmarks/block_streaming.py --device cuda --size full      # FLUX.1 dev at 1024 x 1024
    python benchmarks/block_streaming.py --parts load --gigabytes 2     # the checkpoint that the target is about

- ``fp8``: the peak on the device of ``--fp8_base --blocks_to_swap 28``, from the beginning of loading (CUDA only).
- ``steps``: a checkpointed step without streaming and with N streamed blocks, against the larger of the step without
  and of the bytes that are copied over the bandwidth that was measured; copied bytes against their formula.
- ``overhead``: the processor time of a step on the CPU whose ring holds every streamed block, so that nothing is copied
  after the first pass, against a step without streaming: medians over pairs of steps.
- ``load``: host memory at its most while a checkpoint is loaded with every second block streamed, over the
  checkpoint's size. Anonymous memory counts, whose pages hold no file's contents (RssAnon of /proc/self/status): pages
  of the mapped checkpoint can be dropped at any time. On a CPU it holds the blocks that are not streamed, too; the
  ring, which stands for a device's memory, is made afterwards.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.load_memory import write_checkpoint
from benchmarks.measuring import Attempts, Measure, machine, parser, report, run_measured
from benchmarks.random_models import (
    Training,
    add_size_options,
    config_of,
    empty_cache,
    open_random,
    peak_bytes,
    start_peak,
    streaming_plan,
    wait,
)

PARTS = ("fp8", "steps", "overhead", "load")
"""Most important first."""
COUNTS = {"full": (8, 18, 28, 38), "tiny": (2, 4, 6, 8)}
FP8_COUNT = {"full": 28, "tiny": 6}
FP8_LIMIT = 8.0
STEP_LIMIT, OVERHEAD_LIMIT, LOAD_LIMIT = 1.10, 5.0, 1.15


def bandwidth(device: Any, pinned: bool, size: int) -> float:
    """Bytes per second from host memory to the device."""
    import torch

    from library.memory.transfers import pages, pin, unpin

    source, target = pages(size), torch.empty(size, dtype=torch.uint8, device=device)
    source.zero_()
    is_pinned = pinned and pin(source)
    taken = []
    for _ in range(5):
        wait(device)
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        wait(device)
        taken.append(time.perf_counter() - start)
    if is_pinned:
        unpin(source)
    return size / min(taken)


def measure_fp8(options: argparse.Namespace, device: Any) -> Iterator[Measure]:
    """The peak of a step in fp8 with many streamed blocks."""
    import torch

    from library.memory.plan import MemoryPlan
    from library.memory.storage import FP8_BY_TENSOR

    empty_cache(device)
    start_peak(device)
    pipeline = open_random(config_of("flux", options.size), device, FP8_BY_TENSOR)
    pipeline.plans = {"transformer": MemoryPlan(checkpointing=True)}
    count = FP8_COUNT[options.size]
    pipeline.stream("transformer", pipeline.swap_blocks(count, 2), options.pinned)
    training = Training(pipeline, options.device, options.resolution)
    taken = training.seconds(options.steps)
    peak, name = peak_bytes(device), f"fp8, {count} streamed"
    yield Measure(f"{name}: step", 1000 * taken, "ms")
    if peak is not None:
        limit = FP8_LIMIT if options.size == "full" else None
        reserved = torch.cuda.max_memory_reserved() / 1e9
        yield Measure(f"{name}: peak of tensors on the device", peak / 1e9, "GB", limit)
        yield Measure(f"{name}: peak with what the allocator holds back", reserved, "GB", limit)


def measure_steps(options: argparse.Namespace, device: Any) -> Iterator[Measure]:
    """Steps with and without streaming."""
    from library.memory.plan import MemoryPlan

    size = 1 << (29 if options.size == "full" else 24)
    rates = {kind: bandwidth(device, kind == "pinned", size) for kind in ("pinned", "pageable")}
    for kind, rate in rates.items():
        yield Measure(f"host to device, {kind}", rate / 1e9, "GB/s")
    training = Training(open_random(config_of("flux", options.size), device), options.device, options.resolution)
    plan = MemoryPlan(checkpointing=True)
    with training.with_plan(plan):
        training.step()
        start_peak(device)
        alone, peak = training.seconds(options.steps), peak_bytes(device)
    yield Measure("no block streamed: step", 1000 * alone, "ms")
    if peak is not None:
        yield Measure("no block streamed: peak memory", peak / 1e9, "GB")
    for count in options.counts or COUNTS[options.size]:
        streaming, blocks = streaming_plan(plan, training.pipeline, count, options.pinned)
        with training.with_plan(streaming) as applied:
            stream, name = applied.stream, f"{count} streamed"
            training.step()
            start_peak(device)
            moved = stream.bytes_moved
            taken, peak = training.seconds(options.steps), peak_bytes(device)
            moved = (stream.bytes_moved - moved) / (options.steps + 1)
            misses = stream.misses
        copying = moved / rates["pinned" if options.pinned else "pageable"]
        is_held = device.type == "cuda" and options.size == "full" and options.pinned
        yield from (
            Measure(f"{name}: step", 1000 * taken, "ms"),
            Measure(f"{name}: copied bytes per step", moved / 1e9, "GB"),
            Measure(f"{name}: copied bytes, away from the formula", abs(moved - blocks.bytes_per_step), "bytes", 0.0),
            Measure(f"{name}: misses", misses, "", 0.0),
            Measure(
                f"{name}: step / max(step without, copying)",
                taken / max(alone, copying),
                "x",
                STEP_LIMIT if is_held else None,
            ),
        )
        if peak is not None:
            yield Measure(f"{name}: peak memory", peak / 1e9, "GB")


def measure_overhead(options: argparse.Namespace) -> Iterator[Measure]:
    """The state machine alone, on the CPU."""
    import torch

    from library.memory.plan import MemoryPlan, Streaming

    cpu = torch.device("cpu")
    config = config_of("flux", "tiny", hidden_size=512, num_heads=8, depth=2, depth_single=4, mlp_hidden=2048)
    plain, streamed = (Training(open_random(config, cpu), "cpu", 256) for _ in range(2))
    places = tuple(
        (name, index) for name, blocks in streamed.pipeline.block_lists().items() for index in range(len(blocks))
    )
    taken: dict[str, list[float]] = {"plain": [], "streamed": []}
    with streamed.with_plan(MemoryPlan(streaming=Streaming(places, len(places)))) as applied:
        for round_number in range(options.pairs + 2):
            order = [("plain", plain), ("streamed", streamed)]
            for way, training in order if round_number % 2 else reversed(order):
                start = time.process_time()
                training.step()
                if round_number > 1:  # the first rounds warm up
                    taken[way].append(time.process_time() - start)
        assert applied.stream.loads == len(places), "nothing is copied after the first pass"
    shares = [mine / other - 1 for mine, other in zip(taken["streamed"], taken["plain"])]
    yield from (
        Measure("free copies: step without streaming", 1000 * statistics.median(taken["plain"]), "ms"),
        Measure("free copies: streaming adds", 100 * statistics.median(shares), "%", OVERHEAD_LIMIT),
    )


class AnonymousMemory(threading.Thread):
    """The most anonymous memory of this process, looked at again and again, above that at the beginning."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = self._now()
        self.ended = threading.Event()

    @staticmethod
    def _now() -> int:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("RssAnon:"):
                return 1024 * int(line.split()[1])
        raise RuntimeError("this system does not tell anonymous memory from that of files")

    def run(self) -> None:
        while not self.ended.wait(0.002):
            self.most = max(self.most, self._now())

    def stop(self) -> int:
        """End the looking; bytes."""
        self.ended.set()
        self.join()
        return max(self.most, self._now()) - self.before


def load_here(checkpoint: Path, device_name: str, pinned: bool) -> None:
    """Load in this process with every second block streamed, and print what it took as JSON."""
    import torch

    from library.memory.stream_choice import StreamedBlocks
    from library.models.flux.pipeline import FluxFiles, FluxPipeline

    device = torch.device(device_name)
    torch.ones(8, device=device).to(torch.bfloat16)
    pipeline = FluxPipeline(FluxFiles(checkpoint), torch.bfloat16, device, parts=("transformer",))
    sizes = pipeline.block_sizes()
    places = [(name, index) for name, blocks in sizes.items() for index in range(len(blocks))][::2]
    blocks = StreamedBlocks(sizes, tuple(places), 2)
    pipeline.stream("transformer", blocks, pinned)
    start_peak(device)
    watch = AnonymousMemory()
    watch.start()
    transformer = pipeline.load_transformer()
    stream = pipeline.applied["transformer"].stream
    assert stream is not None
    host = watch.stop()
    stream.begin()
    wait(device)
    size = sum(tensor.nbytes for tensor in transformer.state_dict().values())
    found = {"host": host, "device": peak_bytes(device), "size": size}
    print(json.dumps({**found, "resident": size - blocks.bytes + blocks.ring_bytes}))


def measure_load(options: argparse.Namespace) -> Iterator[Measure]:
    """Loading a checkpoint of which half is streamed."""
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        checkpoint = write_checkpoint(folder, "original", options.gigabytes)
        command = [sys.executable, __file__, "--device", options.device, "--load_here", checkpoint]
        command += [] if options.pinned else ["--pageable"]
        found = json.loads(run_measured(command).output.splitlines()[-1])
    finally:
        shutil.rmtree(folder)
    size = found["size"]
    yield from (
        Measure("loading, half of the blocks streamed: size", size / 1e9, "GB"),
        Measure(
            "loading: host memory at its most / size",
            found["host"] / size,
            "x",
            LOAD_LIMIT if options.gigabytes >= 2 else None,
        ),
    )
    if found["device"] is not None:
        share = found["device"] / found["resident"]
        yield Measure("loading: device memory / (resident part + ring)", share, "x", 1.01)


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__)
    add_size_options(arguments)
    arguments.add_argument("--parts", nargs="+", choices=PARTS, help="by default all")
    arguments.add_argument("--counts", nargs="+", type=int, help="how many blocks are streamed, one after another")
    arguments.add_argument("--resolution", type=int, help="side of the images; by default 1024, and 128 when tiny")
    arguments.add_argument("--steps", type=int, default=3, help="measured each time, of which the fastest counts")
    arguments.add_argument("--pairs", type=int, default=15, help="steps with and without streaming for the overhead")
    arguments.add_argument("--pageable", dest="pinned", action="store_false", help="don't pin host memory")
    arguments.add_argument("--gigabytes", type=float, help="size of the checkpoint; by default 2, and 0.2 when tiny")
    arguments.add_argument("--folder", type=Path, help="where the checkpoint is put for a while")
    arguments.add_argument("--load_here", type=Path, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    import torch

    if options.load_here:
        load_here(options.load_here, options.device, options.pinned)
        return
    options.parts = options.parts or list(PARTS)
    options.resolution = options.resolution or (1024 if options.size == "full" else 128)
    options.gigabytes = options.gigabytes or (2.0 if options.size == "full" else 0.2)
    device, attempts = torch.device(options.device), Attempts()
    measures: list[Measure] = []
    found = {
        "fp8": lambda: measure_fp8(options, device),
        "steps": lambda: measure_steps(options, device),
        "overhead": lambda: measure_overhead(options),
        "load": lambda: measure_load(options),
    }
    for part in attempts.in_time(options.parts):
        with attempts.part(part):
            for measure in found[part]():  # one by one, so that an error loses none of those before
                measures.append(measure)
        empty_cache(device)
    where = machine(options.device, torch.get_num_threads())
    report("block_streaming", measures, options, where, failures=attempts.failures)
    attempts.finish()


if __name__ == "__main__":
    main()
