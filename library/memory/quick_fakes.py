"""FakeTensorMode with a short way for what a simulation mostly does: operations on shapes that it has met before.

Torch's own cache of operations spends most of its time on keys that serve a compiler (symbolic sizes, sparse layouts).
Whatever is not plain here takes torch's way.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import CONSTANT_NUMEL_LIMIT, FakeTensor, FakeTensorConverter, FakeTensorMode
from torch.utils._pytree import tree_leaves

from library.deferred_compiler import defer_compiler

PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout})
DEVICE = torch.ops.prim.device.default
MISSING = object()
LIFT = torch.ops.aten.lift_fresh.default
"""What ``torch.tensor`` hands over: a tensor with values that nobody else has."""
COPY, TO_DTYPE = torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype
VIEWS = frozenset(
    "_unsafe_view alias as_strided detach diagonal expand permute select slice split split_with_sizes squeeze t "
    "transpose unbind unfold unsqueeze view view_as_complex view_as_real".split()
)
"""Operations whose results are always views of their first argument."""


class QuickConverter(FakeTensorConverter):
    """Gives numbers whose values are known their place, without torch's compiler, which would name their source."""

    def from_real_tensor(
        self, fake_mode: FakeTensorMode, t: Tensor, make_constant: bool = False, *others: Any, **named: Any
    ) -> FakeTensor:
        """``t`` without its values; with ``make_constant`` it is nobody else's and becomes the ``constant``."""
        if others or any(named.values()) or not (make_constant and t.layout is torch.strided):
            return super().from_real_tensor(fake_mode, t, make_constant, *others, **named)
        known = self._get_memo(t)
        if known is not None:
            return known
        assert isinstance(fake_mode, QuickFakeMode)
        made = fake_mode.new(_like(t, t.device))
        made.constant = t
        self.add_constant_storage_mapping(made)
        self.set_tensor_memo(t, made)
        return made


class QuickFakeMode(FakeTensorMode):
    """Tensors without values."""

    _known: ClassVar[dict[Any, Any]] = {}
    """What an operation returns, by its arguments: descriptions of new tensors, or None for its first argument."""
    _ways: ClassVar[dict[OpOverload, str]] = {}

    def __init__(self) -> None:
        defer_compiler()
        super().__init__(allow_non_fake_inputs=True)
        self.fake_tensor_converter = QuickConverter(export=False)
        self._states: dict[torch.device, dict[str, Any]] = {}
        """The attributes of a new tensor, by its device."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in a simulation, and to say so takes as long as an operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, way, key = self.quick(func, args, kwargs)
        if result is not MISSING:
            return result
        result = super().__torch_dispatch__(func, types, args, kwargs or {})
        if key is not None:
            self._remember(way, key, result, args, kwargs)
        return result

    def quick(self, func: Any, args: Any = (), kwargs: Any = None) -> tuple[Any, str, Any]:
        """The result of an operation, or MISSING where torch has to find it; and how and by what it is remembered.

        May be called with the mode active or not.
        """
        if func is DEVICE and type(args[0]) is FakeTensor:
            return args[0].fake_device, "", None
        if func is LIFT and type(args[0]) is Tensor and args[0].numel() > CONSTANT_NUMEL_LIMIT:
            return self.new(_like(args[0], args[0].device)), "", None
        way = self._ways.get(func)
        if way is None:
            way = self._ways[func] = _way(func)
        if way == "view":
            first = args[0]
            if type(first) is FakeTensor and first.constant is None and not kwargs:
                result = self._view(func, args)
                if isinstance(result, Tensor):
                    return self._fake(result, first.fake_device), way, None
                return type(result)([self._fake(part, first.fake_device) for part in result]), way, None
        elif way == "copy":
            result = self._copy(func, args, kwargs)
            if result is not MISSING:
                return result, way, None
        elif way != "":
            parts: list[Any] = [func, torch.get_default_dtype()]
            if _describe(args, parts) and (not kwargs or _describe(kwargs.items(), parts)):
                key = tuple(parts)
                found = self._known.get(key, MISSING)
                if found is MISSING:
                    return MISSING, way, key
                if found is None:
                    return args[0], way, key
                if isinstance(found, tuple):
                    return self.new(found), way, key
                return [part if part is None else self.new(part) for part in found], way, key
        return MISSING, way, None

    def _remember(self, way: str, key: Any, result: Any, args: Any, kwargs: Any) -> None:
        if way == "in place":
            if result is args[0]:
                self._known[key] = None
            return
        parts = [result] if isinstance(result, Tensor) else result
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if not isinstance(parts, (tuple, list)):  # some are named
            return
        tensors = [part for part in parts if part is not None]
        if all(type(part) is FakeTensor and _is_plain(part) for part in tensors):
            storages = {each.untyped_storage()._cdata for each in given}
            if not storages & {part.untyped_storage()._cdata for part in tensors}:
                made = [part if part is None else _like(part, part.device) for part in parts]
                self._known[key] = made[0] if parts[0] is result else made

    def _copy(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """A tensor in another format, or MISSING where anything else is wanted of it."""
        first, given = args[0], kwargs or {}
        if func is TO_DTYPE:
            if len(args) != 2 or given:
                return MISSING
            dtype = args[1]
            if type(first) is FakeTensor and first.dtype == dtype:
                return first
        else:
            dtype = given.get("dtype")
            if len(args) != 1 or given.keys() != {"dtype"}:
                return MISSING
        described: list[Any] = [func, dtype]
        if not (isinstance(dtype, torch.dtype) and type(first) is FakeTensor and _describe((first,), described)):
            return MISSING
        key = tuple(described)
        if key not in self._known:
            with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
                meta = torch.empty_strided(first.shape, first.stride(), dtype=first.dtype, device="meta")
                strides = torch.empty_like(meta, dtype=dtype).stride()
            self._known[key] = (tuple(first.shape), strides, dtype, first.fake_device)
        return self.new(self._known[key])

    def new(self, like: tuple[Any, ...]) -> FakeTensor:
        shape, stride, dtype, device = like
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            empty = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return self._fake(empty, device)

    def _view(self, func: OpOverload, args: Any) -> Any:
        """A view of meta tensors, as torch's ``in_kernel_invocation_manager`` lets a kernel make it."""
        before = self.in_kernel_invocation
        with torch._C._DisableTorchDispatch(), torch._C._PreserveDispatchKeyGuard():
            self.in_kernel_invocation = True
            torch._C._set_meta_in_tls_dispatch_include(True)
            try:
                return func(*args)
            finally:
                self.in_kernel_invocation = before

    def _fake(self, meta: Tensor, device: torch.device) -> FakeTensor:
        """``FakeTensor(self, meta, device)``, whose constructor takes longer than most operations."""
        state = self._states.get(device)
        if state is None:
            made = FakeTensor(self, meta, device)
            self._states[device] = dict(vars(made))
            return made
        made = Tensor._make_subclass(  # type: ignore[attr-defined]
            FakeTensor, meta, meta.requires_grad, dispatch_device=True, device_for_backend_keys=device
        )
        if self._allow_unsafe_data_ptr_access:
            torch._C._set_warn_deprecated_on_mutable_data_ptr(made)
        else:
            torch._C._set_throw_on_mutable_data_ptr(made)
        made.__dict__.update(state)
        return made


def _way(func: Any) -> str:
    """How the results of an operation come about: new ones, copies, views, its first argument; "" for anything else."""
    if func in (COPY, TO_DTYPE):
        return "copy"
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


def _like(tensor: Tensor, device: torch.device) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, device
