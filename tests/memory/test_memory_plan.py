"""A memory plan put on a model's blocks changes what is kept and how it is computed, never what comes out."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from library.memory.apply import apply_memory_plan
from library.memory.formats import quantise, store_as
from library.memory.plan import MemoryPlan, Streaming
from library.memory.simulation import PeakMemory
from library.memory.storage import Storage, block_linears
from library.models.flux.chroma import ChromaTransformer
from library.models.flux.transformer import FluxTransformer, image_ids
from library.models.hunyuan_image.transformer import HunyuanImageTransformer
from library.models.lumina.transformer import LuminaTransformer
from library.models.stable_diffusion.unet import block_lists as unet_blocks
from networks import lora, lora_flux, lora_hunyuan_image, lora_lumina
from tests.networks.stable_diffusion import tiny_model
from tools.make_tiny_models import HUNYUAN_IMAGE, LUMINA, fill_randomly, transformer_config

CHECKPOINTED, OFFLOADED = MemoryPlan(checkpointing=True), MemoryPlan(checkpointing=True, offload_inputs=True)
WITH_ATTENTION = MemoryPlan(checkpointing=True, keep_attention=True)


@dataclass
class Case:
    """A frozen tiny model with inputs, its blocks, and a LoRA inside."""

    model: nn.Module
    inputs: dict[str, Any]
    blocks: dict[str, list[nn.Module]]
    network: Any

    def step(self) -> list[Tensor]:
        """The output and all gradients."""
        self.network.zero_grad()
        output = self.model(**self.inputs)
        output = getattr(output, "sample", output)
        output.float().square().mean().backward()
        return [output.detach(), *(parameter.grad for parameter in self.network.parameters())]


def flux_inputs(height: int = 4, width: int = 6, text: int = 5) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    return {
        "img": torch.randn(2, height * width // 4, 64, generator=random),
        "img_ids": image_ids(height, width),
        "txt": torch.randn(2, text, 64, generator=random),
        "txt_ids": torch.zeros(text, 3),
        "timesteps": torch.tensor([0.2, 0.7]),
        "y": torch.randn(2, 64, generator=random),
        "guidance": torch.tensor([3.5, 1.0]),
        "txt_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    }


def lumina_inputs(height: int = 4, width: int = 6, lengths: tuple[int, ...] = (3, 5)) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    return {
        "latents": torch.randn(2, 16, height, width, generator=random),
        "timesteps": torch.tensor([0.2, 0.7]),
        "text": torch.randn(2, max(lengths), 64, generator=random),
        "text_mask": torch.arange(max(lengths)) < torch.tensor(lengths)[:, None],
    }


def hunyuan_image_inputs() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    return {
        "latents": torch.randn(2, 64, 3, 4, generator=random),
        "timesteps": torch.tensor([200.0, 700.0]),
        "text": torch.randn(2, 5, 64, generator=random),
        "text_mask": torch.arange(5) < torch.tensor([[3], [5]]),
        "glyphs": torch.randn(2, 4, 64, generator=random),
        "glyph_mask": torch.arange(4) < torch.tensor([[4], [0]]),
    }


def make(family: str, network_args: Mapping[str, str] | None = None, **sizes: int) -> Case:
    if family.startswith("sd"):
        tiny = tiny_model(family)
        model, inputs, blocks = tiny.unet, tiny.inputs, unet_blocks(tiny.unet)
        network = lora.create_network(1.0, 2, 2.0, None, None, model)
    elif family == "lumina":
        model = LuminaTransformer(replace(LUMINA, **sizes))
        fill_randomly(model, 1, "memory")
        inputs = lumina_inputs()
        blocks = {name: [*getattr(model, name)] for name in ("context_refiner", "noise_refiner", "layers")}
        network = lora_lumina.create_network(1.0, 2, 2.0, None, [None], model, **network_args or {})
    elif family == "hunyuan_image":
        model = HunyuanImageTransformer(replace(HUNYUAN_IMAGE, **sizes))
        fill_randomly(model, 1, "memory")
        inputs = hunyuan_image_inputs()
        blocks = {name: [*getattr(model, name)] for name in ("double_blocks", "single_blocks")}
        network = lora_hunyuan_image.create_network(1.0, 2, 2.0, None, [None], model, **network_args or {})
    else:
        kind = {"flux": FluxTransformer, "chroma": ChromaTransformer}[family]
        model = kind(replace(transformer_config(family), **sizes))
        fill_randomly(model, 1, "memory")
        inputs = flux_inputs()
        blocks = {name: [*getattr(model, name)] for name in ("double_blocks", "single_blocks")}
        network = lora_flux.create_network(1.0, 2, 2.0, None, [None, None], model, **network_args or {})
    model.requires_grad_(False)
    random = torch.Generator().manual_seed(4)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random) * 0.05
    return Case(model, inputs, blocks, network)


ALIKE = [pytest.param(name, marks=pytest.mark.thorough) for name in ("chroma", "sd1")]
"""Their blocks are those of FLUX.1 and of Stable Diffusion XL."""


@pytest.fixture(params=["flux", "lumina", "hunyuan_image", "sdxl", *ALIKE], scope="module")
def case(request) -> Case:
    """The tests leave it as they found it."""
    case = make(request.param)
    case.network.apply_to(None, case.model, False, True)
    return case


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_checkpointing_changes_no_bit_of_output_and_gradients(case):
    names, keys = [name for name, _ in case.model.named_modules()], list(case.model.state_dict())
    expected = case.step()
    assert sum(bool(grad.any()) for grad in expected[1:]) > len(expected) / 2
    inside = {module for blocks in case.blocks.values() for block in blocks for module in block.modules()}
    layer = next(lora.org_module for lora in case.network.loras if lora.org_module in inside)
    calls: list[int] = []
    counter = layer.register_forward_pre_hook(lambda *_: calls.append(1))
    for plan in (CHECKPOINTED, OFFLOADED, WITH_ATTENTION):
        calls.clear()
        with apply_memory_plan(case.blocks, plan):
            assert same(case.step(), expected) and len(calls) == 2, "each block is computed again in the backward pass"
            if plan == CHECKPOINTED:
                with torch.no_grad():
                    case.model(**case.inputs)
                assert len(calls) == 3
            assert [name for name, _ in case.model.named_modules()] == names
            assert list(case.model.state_dict()) == keys
        assert not any("forward" in vars(block) for blocks in case.blocks.values() for block in blocks)
    calls.clear()
    assert same(case.step(), expected) and len(calls) == 1
    counter.remove()


def every_block(case: Case, **fields: Any) -> MemoryPlan:
    """A plan that streams all blocks."""
    places = [(name, index) for name, blocks in case.blocks.items() for index in range(len(blocks))]
    return MemoryPlan(streaming=Streaming(tuple(places)), **fields)


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_streaming_changes_no_bit_of_output_and_gradients(case, checkpointing):
    """A weight that isn't on the device is NaN here; samples in between and an error in the middle do no harm."""
    expected = case.step()
    with apply_memory_plan(case.blocks, every_block(case, checkpointing=checkpointing)) as applied:
        assert same(case.step(), expected)
        with torch.no_grad():
            output = case.model(**case.inputs)
            assert torch.equal(getattr(output, "sample", output), expected[0])
        last = [*case.blocks.values()][-1][-1]
        fails = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(OSError))
        with pytest.raises(OSError):
            case.step()
        fails.remove()
        assert same(case.step(), expected)
        sizes = [host.memory.nbytes for host in applied.stream.hosts]
        applied.stream.bytes_moved = applied.stream.misses = 0
        assert same(case.step(), expected)
        reached = sizes[applied.stream.first_trained : -2]  # a backward pass ends where nothing before is trained
        reached += sizes[: min(2, applied.stream.first_trained)]
        assert applied.stream.bytes_moved == sum(sizes[2:]) + sum(reached) and not applied.stream.misses
    assert same(case.step(), expected), "the blocks are whole again"


GGPO, SPLIT = {"ggpo_sigma": "0.1", "ggpo_beta": "0.1"}, {"split_qkv": "True"}


@pytest.mark.parametrize(
    ("arguments", "storage"),
    [(GGPO, Storage("fp8")), (SPLIT, Storage("fp8", "block")), (SPLIT, Storage("int8")), (GGPO, Storage("nf4"))],
)
def test_weights_in_a_storage_format_are_streamed_as_they_are(arguments, storage):
    case = make("flux", arguments)
    for layer in block_linears(case.model).values():
        store_as(layer, quantise(layer.weight.detach(), storage), storage, torch.float32)
    case.network.apply_to(None, case.model, False, True)
    torch.manual_seed(0)
    expected = case.step()
    with apply_memory_plan(case.blocks, every_block(case)) as applied:
        streamed = sum(host.memory.nbytes for host in applied.stream.hosts)
        codes = sum(layer.codes.nbytes for layer in block_linears(case.model).values())
        assert codes <= streamed <= 1.01 * codes + 256 * 40
        torch.manual_seed(0)
        assert same(case.step(), expected)


def test_trained_inputs_of_blocks_leave_the_device_and_return_ahead_of_their_blocks():
    """All but the last one of a pass, which is needed at once. Host memory is used again, also by larger images."""
    case = make("flux", depth=3, depth_single=4)
    case.network.apply_to(None, case.model, False, True)
    inputs: list[weakref.ref[Tensor]] = []

    def note(block: nn.Module, given: tuple[Any, ...]) -> None:
        inputs.extend(weakref.ref(x) for x in given if isinstance(x, Tensor) and x.requires_grad)

    hooks = [block.register_forward_pre_hook(note) for blocks in case.blocks.values() for block in blocks]
    with apply_memory_plan(case.blocks, CHECKPOINTED):
        output = case.model(**case.inputs)
        assert all(ref() is not None for ref in inputs)
    del output
    inputs.clear()
    with apply_memory_plan(case.blocks, OFFLOADED) as applied:
        output = case.model(**case.inputs)
        assert len(inputs) == 2 * 2 + 4 and sum(ref() is not None for ref in inputs) == 0
        size = applied.offloaded.bytes_out
        tokens = case.inputs["img"].shape[1] + case.inputs["txt"].shape[1]
        assert size == (2 + 4) * 2 * tokens * case.model.config.hidden_size * 4
        output.square().mean().backward()
        assert applied.offloaded.bytes_in == size and applied.offloaded.late == 1
        del output
        memory = {tensor.data_ptr() for tensor in applied.offloaded.free}
        case.step()
        assert {tensor.data_ptr() for tensor in applied.offloaded.free} == memory
        case.inputs = flux_inputs(8, 8)
        larger = case.step()
        assert len(applied.offloaded.free) == len(memory)
    assert same(case.step(), larger)
    for hook in hooks:
        hook.remove()


def test_attention_that_is_kept_runs_once(monkeypatch):
    case = make("flux")
    case.network.apply_to(None, case.model, False, True)
    kept = {plan: saved_bytes(case, plan) for plan in (CHECKPOINTED, WITH_ATTENTION, MemoryPlan())}
    assert kept[CHECKPOINTED][0] == 2 * kept[WITH_ATTENTION][0] == 2 * kept[MemoryPlan()][0] == 2 * 4
    assert kept[CHECKPOINTED][1] < kept[WITH_ATTENTION][1] < kept[MemoryPlan()][1]


class Operations(TorchDispatchMode):
    """Counts attention, and the bytes of all tensors that are alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.attention += "scaled_dot_product" in func.name() and "backward" not in func.name()
        return func(*args, **(kwargs or {}))


def saved_bytes(case: Case, plan: MemoryPlan) -> tuple[int, int]:
    """How often attention runs in a step, and the memory that a forward pass leaves occupied."""
    with apply_memory_plan(case.blocks, plan), Operations() as operations, PeakMemory() as memory:
        output = case.model(**case.inputs)
        left = memory.live
        output.square().mean().backward()
    return operations.attention, left


def saved_tensors(case: Case) -> dict[int, Tensor]:
    """By address, what is kept for the backward pass besides the weights."""
    saved: dict[int, Tensor] = {}
    weights = {tensor.data_ptr() for tensor in (*case.model.parameters(), *case.network.parameters())}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        case.model(**case.inputs)
    return saved


@pytest.mark.parametrize("family", ["flux", "chroma"])
def test_nothing_but_the_blocks_inputs_is_kept(family):
    case = make(family)
    case.network.apply_to(None, case.model, False, True)
    inputs: dict[int, Tensor] = {}

    def note(block: nn.Module, given: tuple[Any, ...]) -> None:
        inputs.update({value.data_ptr(): value for value in given if isinstance(value, Tensor)})

    hooks = [block.register_forward_pre_hook(note) for blocks in case.blocks.values() for block in blocks]
    everything = saved_tensors(case)
    inputs.clear()
    with apply_memory_plan(case.blocks, CHECKPOINTED):
        kept = saved_tensors(case)
    for hook in hooks:
        hook.remove()
    around = [tensor for address, tensor in kept.items() if address not in inputs]
    assert sum(tensor.nbytes for tensor in around) < sum(tensor.nbytes for tensor in everything.values()) / 50
    assert len(around) < 6, "only what the last layer keeps"
    assert inputs.keys() - kept.keys() == set()


@pytest.mark.parametrize("variant", ["sd1", "sdxl"])
def test_a_unet_keeps_no_more_than_with_the_checkpointing_of_diffusers(variant):
    case = make(variant)
    case.network.apply_to(None, case.model, False, True)
    with apply_memory_plan(case.blocks, CHECKPOINTED):
        ours, result = saved_tensors(case), case.step()
    case.model.enable_gradient_checkpointing()
    theirs = saved_tensors(case)
    assert same(case.step(), result)
    case.model.disable_gradient_checkpointing()
    case.network.remove()
    ours, theirs = (sum(tensor.nbytes for tensor in saved.values()) for saved in (ours, theirs))
    assert 0.9 * theirs < ours <= theirs


@pytest.mark.parametrize("variant", ["sd1", "sdxl"])
def test_the_blocks_of_a_unet_are_named_in_the_order_in_which_they_run(variant):
    case = make(variant)
    ran: list[nn.Module] = []
    named = [block for blocks in case.blocks.values() for block in blocks]
    hooks = [block.register_forward_pre_hook(lambda block, _: ran.append(block)) for block in named]
    case.model(**case.inputs)
    for hook in hooks:
        hook.remove()
    assert ran == named


def test_a_plan_is_taken_off_only_from_the_top(case):
    plain = case.step()
    first = apply_memory_plan(case.blocks, CHECKPOINTED)
    second = apply_memory_plan(case.blocks, OFFLOADED)
    with pytest.raises(RuntimeError, match="replaced after this plan"):
        first.remove()
    assert same(case.step(), plain)
    second.remove()
    first.remove()
    assert same(case.step(), plain)


def test_a_plan_without_features_touches_nothing(case):
    apply_memory_plan(case.blocks, MemoryPlan())
    assert not any("forward" in vars(block) for blocks in case.blocks.values() for block in blocks)


# Compilation


@pytest.fixture
def graphs() -> Iterator[Any]:
    """How many graphs were compiled; it is an error that torch gives up compiling."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.thorough
def test_blocks_of_a_kind_share_what_was_compiled_also_with_a_network_applied_later(graphs):
    others = ("txt_attn", "img_mlp", "txt_mlp", "img_mod", "txt_mod", "single_mod")
    case = make("flux", {f"{name}_dim": "0" for name in others}, depth=9, depth_single=1)
    del case.blocks["single_blocks"]
    with apply_memory_plan(case.blocks, every_block(case, checkpointing=True, compiler="eager")):
        case.network.apply_to(None, case.model, False, True)
        compiled = case.step()
        assert graphs() <= 2, "the first double block's text has no gradient yet: a graph of its own"
        case.step()
        assert graphs() <= 2
    assert all(grad.any() for grad in compiled[1:]), "the network has an effect"
    for one, other in zip(compiled, case.step(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_an_epoch_of_many_sizes_takes_one_graph_of_a_kind_and_the_next_one_none(graphs):
    """A second double block, whose inputs need a gradient, would have a graph of its own: as in the test above."""
    from torch._dynamo.utils import counters

    others = ("txt_attn", "img_mlp", "txt_mlp", "img_mod", "txt_mod", "single_mod")
    case = make("flux", {f"{name}_dim": "0" for name in others}, depth=1, depth_single=2)
    case.network.apply_to(None, case.model, False, True)
    sizes = [(4, 6), (6, 6), (8, 4)]
    plan = every_block(case, checkpointing=True, compiler="eager", dynamic=True)
    with apply_memory_plan(case.blocks, plan) as applied:
        for size in (*sizes, sizes[0]):
            case.inputs = flux_inputs(*size)
            compiled = case.step()
        assert graphs() == 2 and not counters["graph_break"]
        assert not applied.stream.misses
    for one, other in zip(compiled, case.step(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.thorough
def test_captions_of_every_length_take_one_graph_with_a_mask_and_one_without(graphs):
    """Of Lumina: a batch whose captions are equally long has no mask."""
    from torch._dynamo.utils import counters

    case = make("lumina", {"mlp_dim": "0", "mod_dim": "0", "train_blocks": "transformer"}, layers=1)
    case.network.apply_to(None, case.model, False, True)
    case.blocks = {"layers": case.blocks["layers"]}
    with apply_memory_plan(case.blocks, every_block(case, checkpointing=True, compiler="eager", dynamic=True)):
        for height, width, lengths in [(4, 6, (3, 5)), (6, 4, (7, 7)), (8, 4, (2, 9)), (4, 10, (4, 4))]:
            case.inputs = lumina_inputs(height, width, lengths)
            compiled = case.step()
        assert graphs() == 2 and not counters["graph_break"]
    for one, other in zip(compiled, case.step(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class Widening(nn.Module):
    """A block of a class whose blocks have many shapes."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


def test_blocks_of_many_shapes_are_all_compiled(graphs):
    blocks = [Widening(width) for width in range(2, 14)]  # more than torch's limit of recompilations
    x = torch.ones(3, 2)
    expected = nn.Sequential(*blocks)(x)
    with apply_memory_plan({"blocks": blocks}, MemoryPlan(compiler="eager")):
        for block in blocks:
            x = block(x)
    assert torch.equal(x, expected)
    assert graphs() == len(blocks)
