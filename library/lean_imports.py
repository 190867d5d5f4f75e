"""diffusers, transformers, bitsandbytes and LyCORIS without the eight seconds of imports that nothing here uses.

Importing diffusers' U-Net also runs some eighty other models, PEFT, the quantizers with transformers and bitsandbytes,
the client of the Hugging Face hub and ``scipy.stats``; importing T5 reads the names of all models, twice, composes
docstrings, and runs torch's distributed tensors and SymPy; an optimizer of bitsandbytes or transformers runs half of
all this. While one of them is imported here, stand-ins are in their places: whatever is used of them later, by whoever
it is, is imported then.
Nothing is hidden for good, everything else in the packages works as always, and no installed file is changed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from types import ModuleType
from typing import Any

from library.deferred_compiler import defer_compiler, put_in_place

EXPORTS = tuple(f"diffusers.{name}" for name in ("hooks", "models.autoencoders", "models.transformers", "models.unets"))
"""Packages that do nothing but gather the names of all their modules."""
MODEL_CODE = (
    "diffusers.hooks.group_offloading",
    "diffusers.quantizers",
    "diffusers.quantizers.quantization_config",
    "diffusers.utils.dynamic_modules_utils",
    "diffusers.utils.export_utils",
    "huggingface_hub.file_download",
    "huggingface_hub.hf_api",
    "huggingface_hub.repocard",
    "requests",
    "scipy.stats",
)
"""What modules of models import at their top and use in functions for quantised, offloaded or fetched models only."""
PEFT_CODE = ("peft.tuners.tuners_utils",)
"""What LyCORIS and diffusers look into a model with, for layers of PEFT."""
LOADER_CODE = ("transformers", *PEFT_CODE, "diffusers.schedulers")
"""The same of the loaders of LoRA and single files, which are bases of the model classes."""
LOADERS = ("diffusers.loaders.lora_base", "diffusers.loaders.single_file_utils")
TRANSFORMERS_CODE = (
    "peft",
    "scipy.optimize",
    "torch._dynamo._trace_wrapped_higher_order_op",
    "transformers.core_model_loading",
    "transformers.distributed.checkpoint",
    "transformers.distributed.expert_parallel",
    "transformers.distributed.fsdp",
    "transformers.distributed.parallel_utils",
    "transformers.distributed.pipeline_parallel",
    "transformers.distributed.sharding_utils",
    "transformers.distributed.tensor_parallel",
    "transformers.generation.continuous_batching",
    "transformers.generation.continuous_batching.cache",
    "transformers.integrations.accelerate",
    "transformers.integrations.eager_paged",
    "transformers.integrations.finegrained_fp8",
    "transformers.integrations.flex_attention",
    "transformers.integrations.moe",
    "transformers.quantizers",
    "transformers.quantizers.auto",
    "transformers.quantizers.quantizers_utils",
    "transformers.safetensors_conversion",
)
"""What models of transformers import for the losses of detectors, for masks in compiled models, to serve models, and to
load them by ``from_pretrained``, over several devices, or with quantised weights."""
OF_MODULES = ("transformers", "transformers.models")
"""Packages whose modules are among their names, without their own code; none of these is the name of something else."""
RUN_FOR = ("__all__", "__version__")
"""The only names with double underscores that run a package; debuggers and tests look for the others everywhere."""
_lock = threading.RLock()


def diffusers_class(name: str) -> Any:
    """The class that ``from diffusers import name`` gives."""
    with _lock:
        defer_compiler()
        with _stand_ins(MODEL_CODE):
            diffusers = importlib.import_module("diffusers")
        if name not in vars(diffusers):
            _import_lean(name)
        return getattr(diffusers, name)


def prepare_transformers() -> None:
    """Call before another module of transformers is imported: its packages then don't read all models."""
    with _lock:
        if "transformers" not in sys.modules:
            _defer("transformers")
            sys.modules["transformers"].__dict__["__version__"] = importlib.metadata.version("transformers")
        _defer("transformers.models")


def transformers_class(module: str, name: str) -> Any:
    """The class ``name`` of ``transformers.models.<module>``: of a model, its configuration or its tokenizer."""
    path = f"transformers.models.{module}"
    with _lock:
        if path not in sys.modules:
            prepare_transformers()
            with _lean_transformers():
                importlib.import_module(path)
    return getattr(sys.modules[path], name)


def lean_module(name: str) -> ModuleType:
    """A module of bitsandbytes or LyCORIS, or one of transformers without models; what they import raises as always."""
    with _lock:
        if name not in sys.modules:
            if name.startswith("transformers."):
                prepare_transformers()
                with _lean_transformers():
                    importlib.import_module(name)
            else:
                defer_compiler()
                with _stand_ins(PEFT_CODE), _compiling_later():
                    importlib.import_module(name)
    return sys.modules[name]


def _import_lean(name: str) -> None:
    for package in EXPORTS:
        _defer(package)
    with _stand_ins(MODEL_CODE):
        importlib.import_module("diffusers.models.modeling_utils")
        with _stand_ins(LOADER_CODE):
            for loader in LOADERS:
                importlib.import_module(loader)
        getattr(sys.modules["diffusers"], name)


class DeferredPackage(ModuleType):
    """A package whose modules can be imported; its own code runs when one of its names is first used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in RUN_FOR:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        with _lock:
            if type(self) is DeferredPackage:
                spec = self.__spec__
                assert spec is not None and spec.loader is not None
                if self.__name__ in OF_MODULES and importlib.util.find_spec(f"{self.__name__}.{name}"):
                    return importlib.import_module(f"{self.__name__}.{name}")
                self.__class__ = ModuleType  # type: ignore[assignment]
                spec.loader.exec_module(self)
                if sys.modules[self.__name__] is not self:  # transformers puts another object in its place
                    self.__class__ = ReplacedPackage  # type: ignore[assignment]
        return getattr(sys.modules[self.__name__], name)


class ReplacedPackage(ModuleType):
    """A package that has put another object in its place: whoever still holds this one gets that one's names."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.modules[self.__name__], name)


def _defer(name: str) -> None:
    """Put a ``DeferredPackage`` in the place of a package that is not imported yet."""
    if name not in sys.modules:
        put_in_place(DeferredPackage(name))


class StandIn(ModuleType):
    """In the place of a module while others import it; afterwards it gives the names of the real one."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is not self:
            return getattr(importlib.import_module(self.__name__), name)
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return DeferredName(self.__name__, name)


class DeferredName:
    """A class or function that is imported when it is called, looked into or compared with."""

    def __init__(self, module: str, name: str):
        self.__dict__.update(_module=module, _name=name)

    def _real(self) -> Any:
        if isinstance(sys.modules.get(self._module), StandIn):
            with _taken_out(self._module):
                return getattr(importlib.import_module(self._module), self._name)
        return getattr(importlib.import_module(self._module), self._name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._real()(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real(), name)

    def __contains__(self, item: Any) -> bool:
        return item in self._real()

    def __getitem__(self, key: Any) -> Any:
        return self._real()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._real())

    def __len__(self) -> int:
        return len(self._real())

    def __or__(self, other: Any) -> DeferredName:
        return self  # in an annotation, which nobody reads

    __ror__ = __or__

    def __instancecheck__(self, instance: Any) -> bool:
        return self._may_have_objects() and isinstance(instance, self._real())

    def __subclasscheck__(self, subclass: type) -> bool:
        return self._may_have_objects() and issubclass(subclass, self._real())

    def _may_have_objects(self) -> bool:
        """Whether anything of the package was imported; before, nobody has an object of its classes."""
        return self._module.partition(".")[0] in sys.modules

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._real(),)


@contextmanager
def _stand_ins(names: tuple[str, ...]) -> Iterator[None]:
    """Stand-ins for the modules ``names`` inside the block, whether they are imported already or not."""
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update({name: stand_in for name in names if (stand_in := _stand_in(name)) is not None})
    try:
        yield
    finally:
        for name, module in before.items():
            _put_back(name, module)


def _stand_in(name: str) -> StandIn | None:
    """One for a module; None for a package that is not installed. Packages are looked for by their ``__spec__``."""
    stand_in = StandIn(name)
    if "." not in name:
        stand_in.__spec__ = importlib.util.find_spec(name)
        return None if stand_in.__spec__ is None else stand_in
    return stand_in


@contextmanager
def _lean_transformers() -> Iterator[None]:
    defer_compiler()
    with _stand_ins(TRANSFORMERS_CODE), _compiling_later(), _less_of_transformers():
        yield


@contextmanager
def _less_of_transformers() -> Iterator[None]:
    """Inside the block transformers composes no docstrings, which takes half a second, and is not imported again.

    Its ``direct_transformers_import`` runs the package anew, of which nothing but ``sys.modules`` is used.
    """
    simple = {
        ("auto_docstring", "auto_docstring"): _undocumented,
        ("import_utils", "direct_transformers_import"): lambda *place: sys.modules["transformers"],
    }
    utils = importlib.import_module("transformers.utils")
    before = []
    for (module, name), function in simple.items():
        for place in (utils, importlib.import_module(f"transformers.utils.{module}")):
            before.append((place, name, getattr(place, name)))
            setattr(place, name, function)
    try:
        yield
    finally:
        for place, name, function in before:
            setattr(place, name, function)


def _undocumented(documented: Any = None, **named: Any) -> Any:
    """``documented`` as it is; a decorator, with or without arguments."""
    return _undocumented if documented is None else documented


@contextmanager
def _compiling_later() -> Iterator[None]:
    """What is compiled at an import, by bitsandbytes for devices without its kernels, is compiled when first called."""
    import torch

    compiles = torch.compile
    torch.compile = partial(_compiled_later, compiles)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiles


def _compiled_later(compiles: Callable[..., Any], model: Any = None, **settings: Any) -> Any:
    """What ``torch.compile`` returns for a function, or as a decorator; it compiles at the first call."""
    if model is None:
        return partial(_compiled_later, compiles, **settings)
    compiled = cache(lambda: compiles(model, **settings))

    @wraps(model)
    def call(*arguments: Any, **named: Any) -> Any:
        return compiled()(*arguments, **named)

    return call


@contextmanager
def _taken_out(name: str) -> Iterator[None]:
    """No module of this name inside the block, so that the real one is imported; it is kept if it was."""
    stand_in = sys.modules.pop(name)
    try:
        yield
    finally:
        sys.modules.setdefault(name, stand_in)


def _put_back(name: str, module: ModuleType | None) -> None:
    """Restore what was under a name, unless the real module has been imported in the meantime."""
    if isinstance(sys.modules.get(name), ModuleType) and not isinstance(sys.modules[name], StandIn):
        return
    sys.modules.pop(name, None)
    if module is not None:
        sys.modules[name] = module
