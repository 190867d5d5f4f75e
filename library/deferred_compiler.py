"""torch's compiler, imported when something is compiled: not for a mark that keeps something out of compiled code.

Checkpointing, simulated tensors and custom operations say that they are not to be compiled, and torch imports its
whole compiler to note that, a second of processor time at the start of every run that compiles nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Sequence
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

NAME = "torch._dynamo"
CONFIG = f"{NAME}.config"
_lock = threading.RLock()


def defer_compiler() -> None:
    """From now on the compiler is imported at its first use, unless it is there already.

    No installed file is changed. Whoever imports the compiler or a part of it, or uses a name of it, gets the real one,
    which then knows what was marked before.
    """
    with _lock:
        if NAME in sys.modules:
            return
        compiler = _DeferredCompiler(NAME)
        put_in_place(compiler)
        importlib.import_module(CONFIG)  # torch reads its settings; it needs nothing else of the compiler
        sys.meta_path.insert(0, compiler.finder)


def put_in_place(package: ModuleType) -> None:
    """Let ``package`` be imported under its name in place of the installed package, whose modules it has.

    That one's own code does not run; it must be installed and not be imported yet.
    """
    name = package.__name__
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations is not None
    package.__spec__, package.__loader__, package.__file__ = spec, spec.loader, spec.origin
    package.__package__, package.__path__ = name, spec.submodule_search_locations
    sys.modules[name] = package
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, package)


class _DeferredCompiler(ModuleType):
    """In the place of ``torch._dynamo`` until something of it is used that is not known here."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.finder = _PartsFinder(self)
        self.marked: list[Any] = []
        self.allowed: list[Any] = []
        self.wrapped: WeakKeyDictionary[Any, tuple[list[Any], dict[str, Any]]] = WeakKeyDictionary()
        """What each function calls that was returned for another one, and how that one was marked."""

    @property
    def trace_rules(self) -> Any:
        """What a group of processes empties at its end."""
        return _Rules(self)

    def graph_break(self) -> None:
        """Where a compiled graph is to end; there is none."""
        if _is_there(self):
            self.graph_break()

    def disable(
        self, fn: Any = None, recursive: bool = True, *, reason: str | None = None, wrapping: bool = True
    ) -> Any:
        """``fn`` as it is to be called, without being compiled.

        Without ``wrapping`` torch itself asks, for a function of its own, and keeps the answer beside that function.
        """
        if _is_there(self) or not isinstance(fn, (FunctionType, MethodType)):
            return _real(self).disable(fn, recursive, reason=reason, wrapping=wrapping)
        if not wrapping:
            self.marked.append(fn)
            return fn
        called = [fn]

        @wraps(fn)
        def call(*arguments: Any, **named: Any) -> Any:
            return called[0](*arguments, **named)

        self.wrapped[call] = called, {"recursive": recursive, "reason": reason}
        return call

    def allow_in_graph(self, fn: Any) -> Any:
        """``fn``, noted down for the compiler."""
        if _is_there(self):
            return self.allow_in_graph(fn)
        self.allowed.append(fn)
        return fn

    def assume_constant_result(self, fn: Any) -> Any:
        """``fn``, marked as the compiler marks it."""
        fn._dynamo_marked_constant = True
        return fn

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python, debuggers and tests look for these everywhere
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(_real(self), name)


def _is_there(compiler: ModuleType) -> bool:
    """Whether it has been imported; a method of ``_DeferredCompiler`` is then called by who has kept it from before."""
    return type(compiler) is not _DeferredCompiler


def _real(compiler: ModuleType) -> ModuleType:
    """The same module with the compiler's own code in it."""
    with _lock:
        if isinstance(compiler, _DeferredCompiler):
            marked, allowed, wrapped = compiler.marked, compiler.allowed, list(compiler.wrapped.values())
            sys.meta_path.remove(compiler.finder)
            for fn in marked:
                vars(fn).pop("__dynamo_disable", None)  # torch asks again, at the next call
            for own in ("finder", "marked", "allowed", "wrapped"):
                delattr(compiler, own)
            compiler.__class__ = ModuleType  # type: ignore[assignment]
            assert compiler.__spec__ is not None and compiler.__spec__.loader is not None
            compiler.__spec__.loader.exec_module(compiler)
            for fn in allowed:
                compiler.allow_in_graph(fn)
            for called, how in wrapped:
                called[0] = compiler.disable(called[0], **how)
    return compiler


class _Rules:
    """What is to be compiled, before anything is."""

    def __init__(self, compiler: _DeferredCompiler) -> None:
        self._compiler = compiler

    def clear_lru_cache(self) -> None:
        """Nothing was looked up."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_real(self._compiler).trace_rules, name)


class _PartsFinder(MetaPathFinder, Loader):
    """Imports the compiler before a part of it, as always, though its package is in ``sys.modules`` already."""

    def __init__(self, compiler: _DeferredCompiler) -> None:
        self._compiler = compiler
        self._own_spec: dict[str, ModuleSpec | None] = {}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """None where Python is to look for the module itself."""
        if not name.startswith(f"{NAME}.") or name == CONFIG:
            return None
        _real(self._compiler)
        part = sys.modules.get(name)
        if part is None:
            return None
        # Python would otherwise take the part's own spec, and run its code once more.
        self._own_spec[name], part.__spec__ = part.__spec__, ModuleSpec(name, self)
        return part.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The part that was imported with the compiler."""
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """It has run."""
        module.__spec__ = self._own_spec.pop(module.__name__)
