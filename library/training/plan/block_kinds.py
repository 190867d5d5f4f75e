"""Which blocks of a model are equal in all that decides the course of their memory: their kinds."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

MOST_OBJECTS = 5000
"""Of a block; one that leads to more of them leads out of itself."""
PLACES = frozenset({"layer_idx", "layer_id", "start"})
"""Attributes that say where a block is, and nothing of what it does."""
OF_MODULES = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}
HOOKS = tuple(sorted(name for name in OF_MODULES if name.endswith("_hooks") and "state_dict" not in name))


class Unlike(Exception):
    """A block that may do anything, so that nothing is known to be like it."""


def block_kind(block: nn.Module, forward: Any = None) -> Any:
    """A value that is equal for blocks of the same classes with weights of the same shapes, trained ones among them.

    ``forward``: the block's own on the instance, below what a memory plan has put on it. Names are not looked at.
    Raises Unlike for a block with hooks, or a forward that is no method.
    """
    return _Reader().module(block, forward, is_block=True)


class _Reader:
    """Goes through what a block consists of; each object that is met again is a number."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}

    def value(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, torch.dtype, torch.device, type)):
            return value
        if isinstance(value, str):
            return str  # a name more often than not
        if isinstance(value, Tensor):
            return (tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad)
        if isinstance(value, types.MethodType):
            return value.__func__, self.value(value.__self__)
        if isinstance(value, types.FunctionType):
            return value if value.__closure__ is None else value.__code__
        if isinstance(value, (types.BuiltinFunctionType, types.ModuleType)):
            return value
        if id(value) in self.seen:
            return ("seen", self.seen[id(value)])
        self.seen[id(value)] = len(self.seen)
        if len(self.seen) > MOST_OBJECTS:
            raise Unlike
        if isinstance(value, nn.Module):
            return self.module(value, vars(value).get("forward"))
        if isinstance(value, dict):
            return dict, tuple((self.key(key), self.value(part)) for key, part in value.items())
        if isinstance(value, (list, tuple, set, frozenset)):
            return type(value), tuple(map(self.value, value))
        return type(value), self.attributes(getattr(value, "__dict__", {}))

    def module(self, module: nn.Module, forward: Any, is_block: bool = False) -> Any:
        """``forward``: the one on the instance, if there is one."""
        if is_block:
            self.seen[id(module)] = len(self.seen)
        if any(vars(module).get(name) for name in HOOKS):
            raise Unlike
        if forward is not None and not isinstance(forward, types.MethodType):
            raise Unlike
        own = {name: value for name, value in vars(module).items() if name not in OF_MODULES and name != "forward"}
        return type(module), self.value(forward), self.attributes(own)

    def attributes(self, attributes: dict[str, Any]) -> Any:
        return tuple((name, self.value(value)) for name, value in attributes.items() if name not in PLACES)

    def key(self, key: Any) -> Any:
        return key if isinstance(key, (str, int)) else self.value(key)
