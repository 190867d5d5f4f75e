"""On a CUDA device: streamed blocks and offloaded inputs change no gradient, however slow copies or computation are.

On the CPU the same tests run where copies are done at once, so that the tests themselves are tried everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.random_models import Training, config_of, open_random
from library.memory import activations
from library.memory.apply import apply_memory_plan
from library.memory.plan import MemoryPlan
from library.memory.storage import Storage
from library.memory.streaming import BlockStream
from library.memory.transfers import PAGE, Copies, PinnedCopies, StagedCopies, copies_to, pages, pin, unpin
from tests.memory.test_streaming import Block, Run, spaced

needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
on_cuda = pytest.param("cuda", marks=needs_cuda)
WAYS = [
    pytest.param("cpu", True, id="at once"),
    pytest.param("cuda", True, id="pinned", marks=needs_cuda),
    pytest.param("cuda", False, id="staged", marks=needs_cuda),
]
CYCLES = 2_000_000
"""About a millisecond: much longer than the tiny copies and products of these tests."""


@pytest.fixture(autouse=True)
def same_bits_each_time() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


class Slow(torch.autograd.Function):
    """The device is busy for a while, in both passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        torch.cuda._sleep(CYCLES)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        torch.cuda._sleep(CYCLES)
        return grad


@pytest.fixture(
    params=["in time", pytest.param("slow copies", marks=needs_cuda), pytest.param("slow", marks=needs_cuda)]
)
def speed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Copies that come late, or blocks that are still at work when the next copy is requested."""
    copy, forward = PinnedCopies._copy, Block.forward

    def copy_late(self: PinnedCopies, *arguments: Any) -> None:
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(CYCLES)
        copy(self, *arguments)

    if request.param == "slow copies":
        monkeypatch.setattr(PinnedCopies, "_copy", copy_late)
    if request.param == "slow":
        monkeypatch.setattr(Block, "forward", lambda self, x, y, vector: forward(self, Slow.apply(x), y, vector))
    return request.param


@pytest.mark.parametrize(("device", "pinned"), WAYS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
def test_streamed_steps_are_the_same_to_the_bit(device, pinned, checkpointing, speed):
    if device == "cpu" and speed != "in time":
        pytest.skip("only a CUDA device works beside the program")
    expected = Run("blocks", device=device).steps(2, samples=True)
    for count, slots in ((5, 2), (8, 1)):
        run = Run("blocks", spaced(count), slots, checkpointing, device, pinned)
        kind = Copies if device == "cpu" else PinnedCopies if pinned else StagedCopies
        assert type(run.stream.copies) is kind
        found = run.steps(2, samples=True)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), (count, slots)


@pytest.mark.parametrize("device", ["cpu", on_cuda])
@pytest.mark.parametrize("storage", [None, Storage("fp8", "block")])
def test_a_streamed_flux_has_the_gradients_of_one_on_the_device(device, storage):
    def gradients(streamed: int) -> list[Tensor]:
        pipeline = open_random(config_of("flux", "tiny", depth=2, depth_single=4), device, storage)
        pipeline.plans = {"transformer": MemoryPlan(checkpointing=True)}
        if streamed:
            pipeline.stream("transformer", pipeline.swap_blocks(streamed, 2), True)
        training = Training(pipeline, device, 64)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels add up in any order
            for _ in range(2):
                training.step()
            training.gradients()
        stream = pipeline.applied["transformer"].stream
        assert (stream is None) == (not streamed) and (stream is None or stream.misses == 0)
        return [parameter.grad for parameter in training.parameters if parameter.grad is not None]

    expected = gradients(0)
    assert expected and all(torch.equal(*pair) for pair in zip(gradients(3), expected, strict=True))


@pytest.mark.parametrize(("device", "pinned"), WAYS)
def test_copies_in_pieces_bring_every_byte(device, pinned, monkeypatch):
    monkeypatch.setattr("library.memory.transfers.STAGE", 1000)
    sources = [pages(size).random_() for size in (1, 1000, 25_600, 4097)]
    copies = copies_to(torch.device(device), sources, pinned)
    targets = [torch.zeros(source.nbytes, dtype=torch.uint8, device=device) for source in sources]
    for turn in range(3):
        for key, pair in enumerate(zip(sources, targets)):
            copies.start(key, *pair)
        for key, (source, target) in enumerate(zip(sources, targets)):
            copies.finish(key)
            assert torch.equal(target.cpu(), source), turn
            target.zero_()
    if type(copies) is PinnedCopies:
        for source in sources:
            unpin(source)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_that_cannot_be_pinned_disturbs_nothing():
    memory = pages(3 * PAGE)
    assert pin(memory) and not pin(memory)  # a second time it is refused
    assert torch.ones(3, device="cuda").sum().item() == 3  # and no later operation is blamed
    copies = copies_to(torch.device("cuda"), [pages(PAGE), memory], pinned=True)
    assert type(copies) is StagedCopies
    unpin(memory)
    assert pin(memory)
    unpin(memory)


@pytest.mark.parametrize("device", ["cpu", on_cuda])
def test_inputs_in_system_memory_give_the_same_bits(device, speed, monkeypatch):
    if device == "cpu" and speed != "in time":
        pytest.skip("only a CUDA device works beside the program")
    monkeypatch.setattr(activations.OffloadedInputs, "smallest", 1)
    expected = Run("inlet", device=device).steps(2)
    run = Run("inlet", device=device)
    plan = MemoryPlan(checkpointing=True, offload_inputs=True)
    with apply_memory_plan({"blocks": list(run.model.blocks)}, plan, device) as applied:
        found = run.steps(2)
        assert applied.offloaded is not None and applied.offloaded.bytes_out == applied.offloaded.bytes_in > 0
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("device", ["cpu", on_cuda])
def test_inputs_that_a_pass_has_sent_for_in_vain_disturb_nothing(device, speed, monkeypatch):
    """A backward pass that ends early leaves copies on their way, whose memory others get."""
    if device == "cpu" and speed != "in time":
        pytest.skip("only a CUDA device works beside the program")
    monkeypatch.setattr(activations.OffloadedInputs, "smallest", 1)

    class Stop(torch.autograd.Function):
        stops: ClassVar[bool] = True

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            if Stop.stops:
                raise ArithmeticError("stopped")
            return grad

    expected = Run("inlet", device=device).steps()
    run = Run("inlet", device=device)
    middle = run.model.blocks[4]
    own = middle.forward
    middle.forward = lambda x, y, vector: own(Stop.apply(x), y, vector)
    with apply_memory_plan(
        {"blocks": list(run.model.blocks)}, MemoryPlan(checkpointing=True, offload_inputs=True), device
    ):
        with pytest.raises(ArithmeticError, match="stopped"):
            run.steps()
        for parameter in run.trained:
            parameter.grad = None
        Stop.stops = False
        found = run.steps()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_holds_the_ring_and_no_more():
    width, count = 1024, 8
    model = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(count)).requires_grad_(False)
    size = model[0].weight.nbytes
    x = torch.randn(4, width, device="cuda")
    torch.nn.functional.linear(x, torch.ones(width, width, device="cuda"))  # the library of products takes its memory
    stream = BlockStream(list(model), torch.device("cuda"), 2)
    forwards = [stream.streamed(rank, block.forward) for rank, block in enumerate(model)]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        for forward in forwards:
            x = forward(x)
    assert 2 * size <= torch.cuda.max_memory_allocated() - before <= 2 * size + 64 * 4 * width * count
    stream.remove()
    assert torch.cuda.memory_allocated() - before < size
