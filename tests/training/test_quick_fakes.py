"""The short way of the simulation's tensors gives what torch's own FakeTensorMode gives, once and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from library.memory.quick_fakes import QuickFakeMode

OPERATIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a product": lambda x, y: x @ y,
    "one in another format": lambda x, y: (x @ y).to(torch.bfloat16),
    "nothing to convert": lambda x, y: x.to(torch.float32),
    "others in another format": lambda x, y: (
        *(x.transpose(0, 2).to(torch.bfloat16), x[:, :1].expand(4, 3, 8).half(), x[:, 1:, ::2].to(torch.float64)),
        *(x.to("cpu", torch.half), x.to(torch.half, copy=True), x.to(torch.float32, copy=True)),
        x.to(torch.half, memory_format=torch.contiguous_format),
    ),
    "views of views": lambda x, y: x.transpose(1, 2)[:, 2:].unflatten(1, (2, -1)).unsqueeze(0),
    "parts": lambda x, y: x.split((1, 2), dim=1),
    "equal parts": lambda x, y: x.chunk(3, dim=1),
    "one in a row": lambda x, y: x.transpose(1, 2).reshape(-1),
    "complex numbers": lambda x, y: torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()),
    "in place": lambda x, y: (x * 2).add_(1).mul_(x),
    "a slice in place": lambda x, y: x.clone()[:, 0].zero_(),
    "several results": lambda x, y: torch.max(x, dim=1),
    "norms": lambda x, y: F.layer_norm(x, x.shape[-1:]),
    "attention": lambda x, y: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "a convolution": lambda x, y: F.conv2d(x[None], x[:, :, None, :1].transpose(0, 1)[:1].expand(2, 4, 1, 1)),
    "new ones": lambda x, y: (torch.zeros(3, 2), torch.empty_like(x), x.new_ones(2)),
    "random ones": lambda x, y: (torch.rand(3), torch.randn_like(x), F.dropout(x, 0.5)),
    "values as tensors": lambda x, y: (x * torch.tensor(2.0), torch.tensor([[1, 2], [3, 4]]), torch.tensor(True)),
    "steps": lambda x, y: torch.arange(5).to(torch.float64) + 1,
    "expanded": lambda x, y: x[:, :1].expand(4, 3, 8) + y.sum(),
    "a table": lambda x, y: F.embedding(torch.zeros(2, 3, dtype=torch.long), y),
    "gradients": lambda x, y: torch.autograd.grad(
        F.gelu((x.requires_grad_() @ y).float()).square().mean(), x, retain_graph=True
    ),
    "gradients of a norm": lambda x, y: torch.autograd.grad(F.layer_norm(x.requires_grad_(), (8,)).sum(), x),
}


def facts(mode: FakeTensorMode, operation: Callable[[Tensor, Tensor], Any]) -> list[Any]:
    """What is known of the results, and with which of the arguments and results they share memory."""
    with mode:
        x, y = torch.empty(4, 3, 8), torch.empty(8, 6)
        result = operation(x, y)
        return facts_of([x, y, *([result] if isinstance(result, Tensor) else result)])


def facts_of(tensors: list[Tensor]) -> list[Any]:
    storages = [tensor.untyped_storage()._cdata for tensor in tensors]
    return [
        (
            *(tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device),
            *(tensor.requires_grad, tensor.untyped_storage().nbytes(), tensor.is_contiguous()),
            storages.index(tensor.untyped_storage()._cdata),
        )
        for tensor in tensors
    ]


@pytest.mark.parametrize("name", OPERATIONS)
def test_it_is_what_torch_gives(name):
    quick = QuickFakeMode()
    expected = facts(FakeTensorMode(allow_non_fake_inputs=True), OPERATIONS[name])
    assert facts(quick, OPERATIONS[name]) == expected == facts(quick, OPERATIONS[name])


def test_other_sizes_formats_and_numbers_are_other_results():
    with QuickFakeMode():
        for _ in range(2):
            assert [torch.zeros(size).repeat(2).shape for size in (2, 3)] == [(4,), (6,)]
            assert [torch.zeros(2).to(kind).dtype for kind in (torch.half, torch.int8)] == [torch.half, torch.int8]
            assert [torch.cat([torch.zeros(2)] * count).shape for count in (1, 3)] == [(2,), (6,)]
            assert [(torch.zeros(2, dtype=torch.int8) * by).dtype for by in (2, 2.0)] == [torch.int8, torch.float32]


def test_values_are_still_asked_for_in_vain():
    with QuickFakeMode():
        for _ in range(2):
            with pytest.raises(DataDependentOutputException):
                torch.rand(()).item()


NUMBERS: dict[str, Callable[[], Tensor]] = {
    "a number": lambda: torch.tensor(2.0),
    "a sum": lambda: torch.tensor(2.0) + 1,
    "changed": lambda: torch.tensor(2).add_(3),
    "changed through a view": lambda: (number := torch.tensor([2]), number.view(1, 1).fill_(3))[0],
    "set to what is not known": lambda: torch.tensor(2.0).copy_(torch.rand(())),
    "in another format": lambda: torch.tensor(2.5).half(),
    "one of several": lambda: torch.tensor([2.0, 3.0])[0],
    "a wrapped value": lambda: torch.as_tensor([True]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_known_where_torch_knows_it(name):
    def value(mode: FakeTensorMode) -> Any:
        with mode:
            try:
                return NUMBERS[name]().item()
            except DataDependentOutputException as error:
                return str(error)

    assert value(QuickFakeMode()) == value(FakeTensorMode(allow_non_fake_inputs=True))


def test_tensors_with_values_share_memory_as_torch_has_it():
    whole = torch.ones(4, 3, 8)
    others = [whole, whole[1:], whole[:, :1], whole.detach(), whole.transpose(0, 1), torch.ones(8, requires_grad=True)]

    def shared(mode: FakeTensorMode) -> list[Any]:
        with mode:
            return facts_of([mode.fake_tensor_converter.from_real_tensor(mode, each) for each in (*others, *others)])

    assert shared(QuickFakeMode()) == shared(FakeTensorMode(allow_non_fake_inputs=True))


@pytest.mark.parametrize("name", ["a product", "gradients", "gradients of a norm", "several results"])
def test_what_has_been_met_is_not_computed_again(name, monkeypatch):
    with QuickFakeMode():
        x, y = torch.empty(4, 3, 8), torch.empty(8, 6)
        OPERATIONS[name](x, y)
        monkeypatch.setattr(FakeTensorMode, "__torch_dispatch__", lambda self, func, *_: pytest.fail(f"{func}"))
        OPERATIONS[name](x, y)
