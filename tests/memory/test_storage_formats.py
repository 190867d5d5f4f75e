"""Every storage format of frozen weights: its error, its products and gradients, and where its tensors lie."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from library.errors import UserError
from library.memory import formats
from library.memory.scaled import BLOCK, FP8, ScaledWeight
from library.memory.storage import Storage
from library.memory.stored_linear import StoredLinear
from library.randomness import generator
from networks.adapters.low_rank import linear_plus_low_rank

FORMATS = {
    "fp8 by tensor": Storage("fp8", "tensor"),
    "fp8 by channel": Storage("fp8", "channel"),
    "fp8 by block": Storage("fp8", "block"),
    "int8": Storage("int8"),
    "nf4": Storage("nf4"),
}
IN, OUT = 3 * BLOCK, 40


def normal(*shape: int, purpose: str = "values", deviation: float = 1.0) -> Tensor:
    return deviation * torch.randn(*shape, generator=generator(0, purpose))


def stored_layer(storage: Storage, dtype: torch.dtype, bias: bool = True) -> StoredLinear:
    layer = nn.Linear(IN, OUT, bias=bias).to(dtype).requires_grad_(False)
    formats.store_as(layer, formats.quantise(normal(OUT, IN), storage), storage, dtype)
    assert isinstance(layer, StoredLinear)
    return layer


def dense_twin(layer: StoredLinear, dtype: torch.dtype) -> nn.Linear:
    """The same numbers, rounded to ``dtype``, in an ordinary layer."""
    twin = nn.Linear(IN, OUT, bias=layer.bias is not None, dtype=dtype).requires_grad_(False)
    twin.weight.copy_(layer.dense(dtype))
    if layer.bias is not None:
        twin.bias.copy_(layer.bias)
    return twin


def relative_error(weight: Tensor, storage: Storage) -> float:
    """Root mean square of the error over that of the weights, in float64."""
    restored = formats.quantise(weight, storage).to(torch.float32).double()
    return ((restored - weight.double()).square().mean() / weight.double().square().mean()).sqrt().item()


@pytest.fixture(params=FORMATS.values(), ids=FORMATS.keys())
def storage(request) -> Storage:
    return request.param


# ---- what is stored -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deviation", [0.02, 0.002, 1e-6])
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("fp8 by tensor", 0.0265),
        ("fp8 by channel", 0.0265),
        ("fp8 by block", 0.0251),
        ("int8", 0.0085),
        ("nf4", 0.0920),
    ],
)
def test_the_error_on_normal_weights_is_the_published_one_whatever_their_size(name, error, deviation):
    assert relative_error(normal(256, 3072, deviation=deviation), FORMATS[name]) == pytest.approx(error, rel=0.03)


def test_finer_scales_lose_less_where_the_weights_of_a_row_differ_most():
    tails = torch.distributions.StudentT(3.0)
    torch.manual_seed(0)
    weight = 0.02 * tails.sample((256, 3072))
    by = {name: relative_error(weight, storage) for name, storage in FORMATS.items()}
    assert by["fp8 by block"] < 0.0225 < by["fp8 by channel"] < by["fp8 by tensor"] < 0.0270
    assert by["int8"] > 0.03  # its steps are as wide for small weights as for the largest of the row


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_by_block_are_those_of_the_published_format(dtype):
    """HunyuanImage's: amax / 448 of 64 inputs, rounded to bfloat16, which the codes are made with."""
    weight = normal(8, 2 * BLOCK, deviation=0.02).to(dtype)
    stored = formats.quantise(weight, FORMATS["fp8 by block"])
    assert isinstance(stored, ScaledWeight) and stored.scale.shape == (8, 2, 1) and stored.scale.dtype == torch.bfloat16
    for row in range(8):
        for block in range(2):
            numbers = weight[row, block * BLOCK : (block + 1) * BLOCK].double()
            scale = (numbers.abs().max() / 448).bfloat16()
            codes = (numbers.float() / scale.float()).clamp(-448, 448).to(FP8)
            assert stored.scale[row, block, 0] == scale
            assert torch.equal(stored.codes[row, block * BLOCK : (block + 1) * BLOCK].float(), codes.float())


def test_inputs_that_blocks_do_not_divide_have_a_scale_for_each_output_channel():
    stored = formats.quantise(normal(8, BLOCK + 1), FORMATS["fp8 by block"])
    assert isinstance(stored, ScaledWeight) and stored.scale.shape == (8, 1)


def test_int8_is_never_further_off_than_half_a_step():
    weight = normal(16, 100, deviation=0.3)
    restored = formats.quantise(weight, FORMATS["int8"]).to(torch.float64)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((restored - weight).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("shape", [(8, BLOCK), (7, 33)])
def test_nf4_is_that_of_bitsandbytes_but_for_the_rounding_of_scales(shape):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = normal(*shape, deviation=0.02)
    whole = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64))  # of others, bitsandbytes compiles
    theirs = dequantize_4bit(*quantize_4bit(whole, blocksize=64, quant_type="nf4"))
    theirs = theirs.flatten()[: weight.numel()].view_as(weight)
    ours = formats.quantise(weight, FORMATS["nf4"]).to(torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=2**-8, atol=0)


def test_a_weight_is_left_as_it_is(storage):
    weight = normal(8, 2 * BLOCK)
    before = weight.clone()
    formats.quantise(weight, storage)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(storage, value):
    weight = normal(4, BLOCK)
    weight[2, 5] = value
    with pytest.raises(ValueError, match="not finite"):
        formats.quantise(weight, storage)


def test_zeros_and_the_smallest_numbers_stay_finite(storage):
    weight = torch.zeros(4, BLOCK)
    assert torch.equal(formats.quantise(weight, storage).to(torch.float32), weight)
    weight[1] = 1e-45
    restored = formats.quantise(weight, storage).to(torch.float32)
    assert restored.isfinite().all() and restored.abs().max() < 1e-40


@pytest.mark.parametrize("shape", [(8, 2 * BLOCK), (5, 33)])
def test_memory_is_planned_for_the_very_tensors_that_are_stored(storage, shape):
    made, planned = formats.quantise(normal(*shape), storage), formats.empty(shape, storage, "meta")
    for name, tensor in vars(made).items():
        if isinstance(tensor, Tensor):
            assert (tensor.shape, tensor.dtype) == (vars(planned)[name].shape, vars(planned)[name].dtype)
    assert planned.shape == made.shape == shape


# ---- what is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_and_gradients_are_those_of_the_rounded_weights(storage, dtype, bias):
    layer = stored_layer(storage, dtype, bias)
    results = []
    for one in (layer, dense_twin(layer, dtype)):
        x = normal(2, 5, IN, purpose="x").to(dtype).requires_grad_()
        y = one(x)
        y.backward(normal(2, 5, OUT, purpose="grad").to(dtype))
        assert x.grad is not None
        results.append((y.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_a_lora_over_it_has_the_very_bits_of_one_over_the_rounded_weights(storage):
    layer = stored_layer(storage, torch.bfloat16)
    results = []
    for one in (layer, dense_twin(layer, torch.bfloat16)):
        x = normal(2, 5, IN, purpose="x").requires_grad_()
        down, up = (normal(*shape, purpose="lora").requires_grad_() for shape in ((4, IN), (OUT, 4)))
        with torch.autocast("cpu", torch.bfloat16):
            y = linear_plus_low_rank(one, x, down, up, 0.5)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), (x, down, up))])
    for mine, reference in zip(*results):
        assert torch.equal(mine, reference)


def test_float64_is_computed_in_float64(storage):
    layer = stored_layer(storage, torch.float32)
    x = normal(3, IN, purpose="x").double()
    assert layer.bias is not None
    reference = x @ layer.dense(torch.float64).t() + layer.bias.double()
    torch.testing.assert_close(layer(x), reference, rtol=1e-12, atol=1e-12)


def test_nothing_of_the_weight_is_kept_for_the_backward_pass(storage):
    layer, kept = stored_layer(storage, torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        layer(normal(2, IN, purpose="x").requires_grad_())
    assert kept == []


# ---- where it lies --------------------------------------------------------------------------------------------------


def test_the_bulk_may_lie_elsewhere_between_two_products(storage):
    """As block streaming has it: the buffer that a product read is overwritten before the next one."""
    layer = stored_layer(storage, torch.float32)
    x = normal(3, IN, purpose="x").requires_grad_()
    (reference,) = torch.autograd.grad(layer(x).sum(), x)
    y = layer(x)
    for name in layer.bulk:
        buffer = getattr(layer, name)
        setattr(layer, name, buffer.clone())
        buffer.view(torch.uint8).fill_(255)
    (moved,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(moved, reference)


def test_the_bulk_is_nearly_all_of_the_weight(storage):
    layer = stored_layer(storage, torch.bfloat16)
    sizes = {name: buffer.numel() * buffer.element_size() for name, buffer in layer.named_buffers()}
    assert layer.bulk and sum(sizes[name] for name in layer.bulk) > 0.9 * sum(sizes.values())
    assert set(dict(layer.named_parameters())) == {"bias"} and set(layer.state_dict()) == {"bias"}


def test_a_weight_that_replaces_another_takes_its_place_in_memory(storage):
    layer = stored_layer(storage, torch.float32)
    before, places = copy.deepcopy(layer.stored_weight), [buffer.data_ptr() for buffer in layer.buffers()]
    other = normal(OUT, IN, purpose="other")
    layer.set_weight(other)
    assert torch.equal(layer.weight, formats.quantise(other, storage).to(torch.float32))
    layer.set_weight(before)
    assert torch.equal(layer.weight, before.to(torch.float32))
    assert [buffer.data_ptr() for buffer in layer.buffers()] == places


@pytest.mark.parametrize("bias", [True, False])
def test_a_cast_leaves_the_stored_tensors_and_a_move_takes_each_of_them(storage, bias):
    layer = stored_layer(storage, torch.float32, bias)
    before = dict(layer.named_buffers())
    layer.to(torch.bfloat16)
    assert dict(layer.named_buffers()) == before  # the very tensors
    assert layer.weight.dtype == torch.bfloat16
    (name,) = layer.bulk
    setattr(layer, name, getattr(layer, name).to("meta"))
    layer.to(torch.float16)  # where a part lies elsewhere, it stays there
    assert getattr(layer, name).is_meta and sum(buffer.is_meta for buffer in layer.buffers()) == 1
    layer.to("meta")
    assert all(buffer.is_meta for buffer in layer.buffers())
    assert {buffer.dtype for buffer in layer.buffers()} == {buffer.dtype for buffer in before.values()}


def test_other_layers_and_other_shapes_are_refused(storage):
    class Special(nn.Linear):
        pass

    with pytest.raises(ValueError, match="Special"):
        formats.store_as(Special(64, 4), formats.quantise(normal(4, 64), storage), storage, torch.float32)
    with pytest.raises(ValueError, match="shape"):
        formats.store_as(nn.Linear(64, 4), formats.quantise(normal(2, 64), storage), storage, torch.float32)


def test_a_device_without_4_bit_kernels_is_one_sentence():
    for storage in FORMATS.values():
        formats.require(storage, torch.device("cpu"))
    formats.require(FORMATS["int8"], torch.device("meta"))
    with pytest.raises(UserError, match=r"^--base_format nf4: bitsandbytes has no 4-bit kernels for the device meta"):
        formats.require(FORMATS["nf4"], torch.device("meta"))
