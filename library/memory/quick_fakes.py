"""FakeTensorMode with a short way for what a simulation mostly does: operations on shapes that it has met before.

Torch's own cache of operations spends most of its time on keys that serve a compiler (symbolic sizes, sparse layouts).
Whatever is not plain here takes torch's way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._pytree import tree_leaves

PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout})
DEVICE = torch.ops.prim.device.default
VIEWS = frozenset(
    "alias as_strided detach diagonal expand permute select slice split split_with_sizes squeeze t transpose unbind "
    "unfold unsqueeze view view_as_complex view_as_real".split()
)
"""Operations whose results are always views of their first argument."""


class QuickFakeMode(FakeTensorMode):
    """Tensors without values."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._known: dict[Any, Any] = {}
        """What an operation returns, by its arguments: descriptions of new tensors, or None for its first argument."""
        self._ways: dict[OpOverload, str] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in a simulation, and to say so takes as long as an operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE and type(args[0]) is FakeTensor:
            return args[0].fake_device
        if func not in self._ways:
            self._ways[func] = _way(func)
        way = self._ways[func]
        if way == "view":
            first = args[0]
            if type(first) is FakeTensor and first.constant is None and not kwargs:
                with in_kernel_invocation_manager(self):
                    result = func(*args)
                if isinstance(result, Tensor):
                    return FakeTensor(self, result, first.fake_device)
                return type(result)([FakeTensor(self, part, first.fake_device) for part in result])
        elif way != "":
            key: list[Any] = [func, torch.get_default_dtype()]
            if _describe(args, key) and (not kwargs or _describe(kwargs.items(), key)):
                return self._remembered(way, tuple(key), func, types, args, kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs or {})

    def _remembered(self, way: str, key: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if key in self._known:
            found = self._known[key]
            if way == "in place":
                return args[0]
            return self._new(found) if isinstance(found, tuple) else [self._new(part) for part in found]
        result: Any = super().__torch_dispatch__(func, types, args, kwargs or {})
        if way == "in place":
            if result is args[0]:
                self._known[key] = None
            return result
        parts = [result] if isinstance(result, Tensor) else result
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if type(parts) in (tuple, list) and all(type(part) is FakeTensor and _is_plain(part) for part in parts):
            storages = {each.untyped_storage()._cdata for each in given}
            if not storages & {part.untyped_storage()._cdata for part in parts}:
                made = [_new_as(part) for part in parts]
                self._known[key] = made[0] if parts[0] is result else made
        return result

    def _new(self, like: tuple[Any, ...]) -> FakeTensor:
        shape, stride, dtype, device = like
        with in_kernel_invocation_manager(self), torch._C.DisableTorchFunction():
            empty = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return FakeTensor(self, empty, device)


def _way(func: Any) -> str:
    """How the results of an operation come about: new ones, views, its first argument; "" for anything else."""
    if not isinstance(func, OpOverload) or func.namespace != "aten":
        return ""
    name = func.overloadpacket.__name__
    if name in VIEWS:
        return "view"
    if func.is_view or func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
        return ""
    unknown = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)
    if any(tag in func.tags for tag in unknown):
        return ""
    schema = func._schema
    written = [number for number, each in enumerate(schema.arguments) if each.alias_info and each.alias_info.is_write]
    returned = [each.alias_info for each in schema.returns]
    if not returned or not all("Tensor" in str(each.type) for each in schema.returns):
        return ""
    if not written and all(alias is None for alias in returned):
        return "new"
    return "in place" if written == [0] and len(returned) == 1 else ""


def _describe(values: Any, key: list[Any]) -> bool:
    """Add to ``key`` all that the result of an operation depends on; False where that cannot be said."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.constant is not None or value.layout is not torch.strided or value.is_conj() or value.is_neg():
                return False
            key += (value.shape, value.stride(), value.dtype, value.fake_device, value.storage_offset())
        elif kind in PLAIN:
            key += (kind, value)
        elif kind in (list, tuple):
            key += (kind, len(value))
            if not _describe(value, key):
                return False
        else:
            return False
    return True


def _is_plain(tensor: Any) -> bool:
    return tensor.constant is None and tensor.storage_offset() == 0 and tensor.layout is torch.strided


def _new_as(tensor: Any) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.fake_device
