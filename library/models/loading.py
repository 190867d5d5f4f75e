"""From a checkpoint file to a module: names mapped, weights dequantised, straight to their dtype and device.

A module is built on torch's meta device and its tensors are read one at a time, so that memory never holds much more
than the finished module.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints import Checkpoint, require_finite
from library.errors import UserError
from library.memory.formats import empty, quantise, store_as, stored_bytes
from library.memory.scaled import FP8, ScaledWeight, by_scale
from library.memory.storage import BlocksStoredAs, Storage, StorageDtype, block_linears
from library.memory.stored_linear import StoredWeight
from library.models.recognition import names_of_part
from library.safetensors_io import json_object

UNREADABLE_QUANTISATION = {
    ".absmax": "bitsandbytes 4-bit",
    ".quant_map": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes 8-bit",
    ".qweight": "integer-quantised (GPTQ, AWQ or Nunchaku)",
    ".wscales": "Nunchaku",
    ".weight_scale_2": "NVFP4",
}
WEIGHT_SCALES = (".scale_weight", ".weight_scale")
QUANTISATION_KEY = re.compile(r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale|input_scale|comfy_quant)$")


Place = Callable[[str], torch.device | str]
"""The device on which a tensor of a module, by its name, is wanted."""


@dataclass(frozen=True)
class LoadSpec:
    """In which dtype and storage a module is loaded, and onto which device each of its tensors."""

    compute: torch.dtype | None = None
    """The dtype of all tensors that are not stored otherwise; None keeps the file's."""
    storage: Storage | None = None
    """The format of the Linear weights of blocks; None keeps them as tensors."""
    place: Place = lambda name: "cpu"
    mapped: Collection[str] = ()
    """Tensors that may stay on the mapped file, because they are there for a moment only."""

    @classmethod
    def of(
        cls, dtype: StorageDtype | None, place: Place | torch.device | str = "cpu", mapped: Collection[str] = ()
    ) -> LoadSpec:
        """How a part of ``dtype`` is loaded; ``place`` may be one device for every tensor."""
        where: Place = place if callable(place) else lambda name: place
        if isinstance(dtype, BlocksStoredAs):
            return cls(dtype.compute, dtype.storage, where, mapped)
        return cls(dtype, None, where, mapped)


@dataclass(frozen=True)
class Origin:
    """How one tensor of a module comes from a file: the tensors of ``keys`` as one, row after row.

    ``rows`` (start, stop) takes a part of the first dimension, of a single key only. Then ``transform`` reorders the
    values and ``shape``, where given, is what the tensor is reshaped to.
    """

    keys: tuple[str, ...]
    transform: Callable[[Tensor], Tensor] | None = None
    shape: tuple[int, ...] | None = None
    rows: tuple[int, int] | None = None


def swap_halves(modulation: Tensor) -> Tensor:
    """Diffusers keeps a last modulation as (scale, shift), original checkpoints as (shift, scale)."""
    scale, shift = modulation.chunk(2)
    return torch.cat((shift, scale))


class TensorSource:
    """The tensors of a checkpoint under the names of a module; fp8 weights with scales are given dequantised.

    ``prefixes`` are taken off each key that has one; keys of other parts in an all-in-one file are left out.
    ``part`` names the entry of the file's ``config`` that is about this part alone.
    """

    reads_values = True
    """When False, tensors of the right shape and format are given whose values are undefined: nothing is read."""

    def __init__(self, checkpoint: Checkpoint, prefixes: tuple[str, ...] = (), part: str = ""):
        self.checkpoint = checkpoint
        self.part = part
        self.file_keys = set(checkpoint)
        _refuse_unreadable_quantisation(checkpoint)
        names = names_of_part(checkpoint, prefixes) or {key: key for key in checkpoint}
        self.origins = {name: Origin((key,)) for name, key in names.items() if not QUANTISATION_KEY.search(name)}

    @property
    def exceptions(self) -> dict[str, Any]:
        """What shapes cannot give: the folder's ``config.json`` and the ``config`` entry of the file's metadata."""
        texts = [self.checkpoint.metadata.get("config", "")]
        folder_config = self.checkpoint.files[0].with_name("config.json")
        # Only in a model's own folder: elsewhere, a config.json may be any other model's.
        if self.checkpoint.files[0].name.startswith(("model", "diffusion_pytorch_model")) and folder_config.is_file():
            texts.insert(0, folder_config.read_text(encoding="utf-8", errors="replace"))
        merged: dict[str, Any] = {}
        for text in texts:
            merged.update(json_object(text))  # other programs keep other things under this name
        of_part = merged.get(self.part)
        return {**merged, **of_part} if isinstance(of_part, dict) else merged

    @property
    def config_entry(self) -> dict[str, str]:
        """``exceptions`` as the metadata of a file that the same model is written to; {} where there are none."""
        told = {key: value for key, value in self.exceptions.items() if not key.startswith("_")}
        return {"config": json.dumps(told)} if told else {}

    def remap(self, targets: Mapping[str, Origin]) -> None:
        """Give tensors new names: each target is made from current names, which are then no longer there."""
        made = {
            name: Origin(
                tuple(self.origins[key].keys[0] for key in origin.keys), origin.transform, origin.shape, origin.rows
            )
            for name, origin in targets.items()
        }
        for origin in targets.values():
            for key in origin.keys:
                self.origins.pop(key, None)
        self.origins.update(made)

    def drop(self, names: Iterable[str]) -> None:
        """Leave out tensors that the module does not have."""
        for name in names:
            self.origins.pop(name, None)

    def __contains__(self, name: str) -> bool:
        return name in self.origins

    def names(self) -> list[str]:
        """Names of all tensors, without prefixes."""
        return list(self.origins)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises UserError when the file has no such tensor."""
        if name not in self.origins:
            raise UserError(
                f'{self.checkpoint.label}: the tensor "{name}" is missing, so the model\'s dimensions cannot be '
                "determined."
            )
        origin = self.origins[name]
        return origin.shape or self._joined_shape(origin)

    def sizes(self, name: str, dimensions: int) -> tuple[int, ...]:
        """As ``shape``, of a tensor that the model's dimensions are inferred from.

        Raises UserError too when it has another number of ``dimensions`` or no elements.
        """
        shape = self.shape(name)
        if len(shape) != dimensions or 0 in shape:
            raise UserError(
                f'{self.checkpoint.label}: the tensor "{name}" has the shape {list(shape)}, where {dimensions} sizes '
                "above 0 are needed; the file is damaged or of another kind."
            )
        return shape

    def _joined_shape(self, origin: Origin) -> tuple[int, ...]:
        shapes = [self.checkpoint.shape(key) for key in origin.keys]
        if () in shapes and (len(shapes) > 1 or origin.rows is not None):
            raise UserError(
                f'{self.checkpoint.label}: the tensor "{origin.keys[shapes.index(())]}" is a single number, where a'
                " matrix or a vector is needed; the file is damaged or of another kind."
            )
        if origin.rows is not None:
            return (origin.rows[1] - origin.rows[0], *shapes[0][1:])
        return shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def count(self, pattern: str) -> int:
        """One more than the highest number that stands in the group of ``pattern`` in any name; 0 if in none."""
        found = filter(None, map(re.compile(pattern).match, self.origins))
        return max((int(match[1]) + 1 for match in found), default=0)

    def load(self, name: str, dtype: torch.dtype | None, device: torch.device | str, mapped: bool = False) -> Tensor:
        """The tensor, in memory of its own; if ``mapped``, perhaps on the mapped file (see ``Checkpoint.load``)."""
        origin = self.origins[name]
        if not self.reads_values:
            return torch.empty(self.shape(name), dtype=self._format(origin, dtype), device=device)
        tensor = self._load_joined(origin, dtype, device, mapped)
        if origin.transform is not None:
            tensor = origin.transform(tensor)
        return tensor if origin.shape is None else tensor.reshape(origin.shape)

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype in which ``load`` gives a tensor when it is not told one."""
        return self._format(self.origins[name], None)

    def _format(self, origin: Origin, dtype: torch.dtype | None) -> torch.dtype:
        """The dtype in which ``load`` gives a tensor."""
        stored = self.checkpoint.dtype(origin.keys[0])
        if not stored.is_floating_point:
            return stored
        return dtype or (torch.bfloat16 if any(self.is_scaled(key) for key in origin.keys) else stored)

    def _load_joined(
        self, origin: Origin, dtype: torch.dtype | None, device: torch.device | str, mapped: bool
    ) -> Tensor:
        """The parts are read one at a time straight into their place, so that joining takes no memory of its own."""
        if len(origin.keys) == 1:
            stored = self._load_stored(origin.keys[0], dtype, device, mapped)
            return stored if origin.rows is None else stored[slice(*origin.rows)].clone()
        is_scaled = any(self._scale(key) is not None for key in origin.keys)
        joined_dtype = dtype or (torch.bfloat16 if is_scaled else self.checkpoint.dtype(origin.keys[0]))
        joined = torch.empty(self._joined_shape(origin), dtype=joined_dtype, device=device)
        row_counts = [self.checkpoint.shape(key)[0] for key in origin.keys]
        for key, rows in zip(origin.keys, joined.split(row_counts)):
            if is_scaled:
                rows.copy_(self._load_stored(key, dtype, device))
            else:
                self.checkpoint.copy_to(key, rows)
        return joined

    def _load_stored(
        self, key: str, dtype: torch.dtype | None, device: torch.device | str, mapped: bool = False
    ) -> Tensor:
        scale = self._scale(key)
        if scale is None:
            return self.checkpoint.load(key, dtype, device, mapped)
        weight, scale = self.checkpoint.load(key, torch.float32, device), scale.to(device)
        by_scale(weight, scale).mul_(scale)
        return weight.to(dtype or torch.bfloat16)

    def require_finite(self) -> None:
        """Read every tensor. Raises UserError that names the first one that holds NaN or infinity."""
        for key in dict.fromkeys(key for origin in self.origins.values() for key in origin.keys):
            try:
                require_finite(key, self._load_stored(key, None, "cpu"))
            except UserError as error:
                raise UserError(f"{self.checkpoint.label}: {error}") from None

    def stored(self, name: str, values: Tensor) -> list[tuple[str, slice, Tensor]]:
        """The way back of ``load``: ``values``, in the module's shape, as (key, rows of its tensor, their values).

        Scales of fp8 weights are not applied.
        """
        origin = self.origins[name]
        joined = self._joined_shape(origin)
        if origin.transform is None:
            values = values.reshape(joined)
        else:  # it moves values around; where they went tells the way back
            places = origin.transform(torch.arange(values.numel()).reshape(joined)).reshape(-1).to(values.device)
            values = torch.empty_like(values.reshape(-1)).index_copy_(0, places, values.reshape(-1)).reshape(joined)
        if len(origin.keys) == 1:
            return [(origin.keys[0], slice(*(origin.rows or (None,))), values)]
        row_counts = [self.checkpoint.shape(key)[0] for key in origin.keys]
        return [(key, slice(None), rows) for key, rows in zip(origin.keys, values.split(row_counts))]

    def load_stored(self, name: str, storage: Storage, device: torch.device | str) -> StoredWeight:
        """The weight in a storage format: as it is where the file has it so, else rounded from the file's numbers.

        Of fp8, a file's e4m3fn numbers are kept with the scales that it has for them; plain ones have the scale 1.
        Raises UserError where numbers are not finite, or fp8 is wanted and they are in another 8-bit float format.
        """
        origin = self.origins[name]
        if storage.kind == "fp8":
            self._require_e4m3fn(name)
            kept = self._load_fp8(name, device)
            if kept is not None:
                return kept
        if not self.reads_values:
            return empty(self.shape(name), storage, device)
        is_in_8_bits = any(self.checkpoint.dtype(key).itemsize == 1 for key in origin.keys)
        try:
            return quantise(self.load(name, torch.float32 if is_in_8_bits else None, device), storage)
        except ValueError as error:
            label = f'{self.checkpoint.label}: tensor "{name}" cannot be stored {storage.label}'
            raise UserError(f"{label}: {error}.") from None

    def _load_fp8(self, name: str, device: torch.device | str) -> ScaledWeight | None:
        """The weight with its scales if the file holds all of it in 8 bits and it need not be reordered, else None."""
        origin = self.origins[name]
        if any(self.checkpoint.dtype(key) != FP8 for key in origin.keys):
            return None
        scales = [self._scale(key) for key in origin.keys]
        if all(scale is None for scale in scales):
            return ScaledWeight(self.load(name, None, device), torch.ones((), device=device))
        scale = self._joined_scale(origin, scales)
        if scale is None or origin.transform is not None or origin.shape is not None:
            return None
        codes = torch.empty(self._joined_shape(origin), dtype=FP8, device=device)
        if self.reads_values and origin.rows is not None:
            codes.copy_(self.checkpoint.load(origin.keys[0], None, device)[slice(*origin.rows)])
        elif self.reads_values:
            for key, rows in zip(origin.keys, codes.split([self.checkpoint.shape(key)[0] for key in origin.keys])):
                self.checkpoint.copy_to(key, rows)
        return ScaledWeight(codes, scale.to(device))

    def _joined_scale(self, origin: Origin, scales: Sequence[Tensor | None]) -> Tensor | None:
        """The scales of the parts of a weight as those of the weight; None where no shape of scales can hold them."""
        known = [torch.ones(()) if scale is None else scale for scale in scales]
        if len(known) == 1:
            return known[0] if origin.rows is None or known[0].dim() == 0 else known[0][slice(*origin.rows)]
        if any(scale.dim() == 3 for scale in known):
            is_alike = len({(scale.dim(), *scale.shape[1:]) for scale in known}) == 1
            return torch.cat(known) if is_alike else None
        rows = (self.checkpoint.shape(key)[0] for key in origin.keys)
        return torch.cat([scale.float().expand(count, 1) for scale, count in zip(known, rows)])

    def require_e4m3fn(self) -> None:
        """Raises UserError when a tensor is in an 8-bit float format in which weights cannot be kept in memory."""
        for name in self.origins:
            self._require_e4m3fn(name)

    def _require_e4m3fn(self, name: str) -> None:
        for key in self.origins[name].keys:
            dtype = self.checkpoint.dtype(key)
            if dtype.is_floating_point and dtype.itemsize == 1 and dtype != FP8:
                raise UserError(
                    f'{self.checkpoint.label}: tensor "{key}" is {str(dtype).removeprefix("torch.")}, but weights are '
                    "kept in 8 bits as float8_e4m3fn only; use the float8_e4m3fn, bfloat16 or float16 version."
                )

    def is_scaled(self, key: str) -> bool:
        """Whether the tensor is fp8 with a scale of its own in the file."""
        return any(key.removesuffix(".weight") + suffix in self.file_keys for suffix in WEIGHT_SCALES)

    def _scale(self, key: str) -> Tensor | None:
        """The scales of an fp8 weight as ``ScaledWeight`` has them: one, one for each row, or for blocks of a row."""
        if not key.endswith(".weight"):
            return None
        for suffix in WEIGHT_SCALES:
            scale_key = key.removesuffix(".weight") + suffix
            if scale_key in self.file_keys:
                shape, rows = self.checkpoint.shape(scale_key), self.checkpoint.shape(key)[0]
                scale = self.checkpoint.load(scale_key, torch.float32) if self.reads_values else torch.empty(shape)
                if scale.numel() == 1:
                    return scale.reshape(())
                if scale.numel() == rows:
                    return scale.reshape(rows, *(1 for _ in self.checkpoint.shape(key)[1:]))
                if self._is_by_block(key, shape):
                    stored = self.checkpoint.dtype(scale_key)  # many: they stay as small as they are
                    return scale.reshape(rows, -1, 1).to(stored if stored.itemsize == 2 else torch.float32)
                raise UserError(
                    f'{self.checkpoint.label}: the scales of "{key}" are neither one, nor one for each row, nor one '
                    "for each of equal blocks of a row."
                )
        return None

    def _is_by_block(self, key: str, scales: tuple[int, ...]) -> bool:
        """Whether scales of that shape are for equal blocks of the rows of a matrix: [out, n] or [out, n, 1]."""
        rows, *rest = self.checkpoint.shape(key)
        is_matrix = len(rest) == 1 and len(scales) in (2, 3) and scales[0] == rows and scales[2:] in ((), (1,))
        return is_matrix and scales[1] > 0 and rest[0] % scales[1] == 0


def _refuse_unreadable_quantisation(checkpoint: Checkpoint) -> None:
    advice = "use the float32, float16, bfloat16 or fp8 version"
    suffixes = tuple(UNREADABLE_QUANTISATION)
    for key in checkpoint:
        if key.endswith(suffixes) or ".quant_state." in key:
            meanings = (meaning for suffix, meaning in UNREADABLE_QUANTISATION.items() if key.endswith(suffix))
            raise UserError(
                f"{checkpoint.label} is quantised ({next(meanings, 'bitsandbytes 4-bit')}), which is not supported; "
                f"{advice}."
            )
        if key.endswith(".comfy_quant"):
            described = bytes(checkpoint.load(key).tolist()).decode("utf-8", errors="replace")
            if '"float8_e4m3fn"' not in described and '"float8_e5m2"' not in described:
                raise UserError(f"{checkpoint.label} is quantised as {described}, which is not supported; {advice}.")


def origins_of_modules(
    source: TensorSource, modules: Iterable[tuple[str, tuple[str, ...]]], swapped: Collection[str] = ()
) -> dict[str, Origin]:
    """Weights and biases of modules that a file has under other names, as ``TensorSource.remap`` takes them.

    ``modules`` are a module's name and the names of those whose rows it is made of, in that order; what the file does
    not have, or has under the module's name already, is left out. Of modules in ``swapped`` the halves change places.
    """
    origins: dict[str, Origin] = {}
    for name, parts in modules:
        for kind in ("weight", "bias"):
            keys = tuple(f"{part}.{kind}" for part in parts)
            if f"{name}.{kind}" not in source and all(key in source for key in keys):
                origins[f"{name}.{kind}"] = Origin(keys, swap_halves if name in swapped else None)
    return origins


_INITIALISED: tuple[Any, ...] = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.LayerNorm, nn.GroupNorm)
_RESETS = {kind: kind.reset_parameters for kind in _INITIALISED}


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules that are built inside are on torch's meta device: their structure without their values.

    torch's own layers leave out drawing initial values there, which takes half of the time and changes nothing.
    """
    try:
        for kind in _INITIALISED:
            kind.reset_parameters = _reset_unless_meta
        with torch.device("meta"):
            yield
    finally:
        for kind, reset in _RESETS.items():
            kind.reset_parameters = reset


def _reset_unless_meta(module: Any) -> None:
    """What a layer does to its new parameters while another thread, too, may be building modules."""
    if module.weight is None or not module.weight.is_meta:
        next(reset for kind, reset in _RESETS.items() if isinstance(module, kind))(module)


def require_fit(module: nn.Module, source: TensorSource) -> dict[str, Any]:
    """The tensors of ``module`` by name, for which ``source`` has values.

    Raises UserError that lists missing and unexpected tensors or names one whose shape is wrong.
    """
    places = module.state_dict(keep_vars=True)
    names = set(source.names())
    missing = sorted(places.keys() - names)
    unexpected = sorted(names - places.keys())
    problems = []
    if missing:
        problems.append(f"{_counted(missing)} missing ({_few(missing)})")
    if unexpected:
        problems.append(f"{_counted(unexpected)} unexpected ({_few(unexpected)})")
    if problems:
        raise UserError(
            f"{source.checkpoint.label} does not fit the model it was recognised as: {' and '.join(problems)}."
        )
    for name, place in places.items():
        if source.shape(name) != tuple(place.shape):
            raise UserError(
                f'{source.checkpoint.label}: tensor "{name}" has the shape {source.shape(name)}, '
                f"but the other tensors imply {tuple(place.shape)}."
            )
        stored = source.stored_dtype(name)
        if place.is_floating_point() and not stored.is_floating_point:
            raise UserError(
                f'{source.checkpoint.label}: tensor "{name}" is {str(stored).removeprefix("torch.")}, but weights must '
                "be floating-point numbers; use the float32, float16, bfloat16 or fp8 version."
            )
    return places


def load_module(
    module: nn.Module,
    source: TensorSource,
    spec: LoadSpec,
    kept_in_float32: Collection[str] = (),
) -> None:
    """Fill ``module``, built on the meta device, with the tensors of ``source``; it ends frozen and in eval mode.

    Weights below the module's ``kept_dense`` (a tuple of names), where it has that, are never stored in a storage
    format. Names that end in one of ``kept_in_float32`` become float32; where they are stored in a format, they are
    computed with in it. Raises UserError that lists missing and unexpected tensors or names one whose shape is wrong.
    """
    places = require_fit(module, source)
    stored_layers = _stored_layers(module, spec)
    state = {}
    with torch.no_grad():
        for name in places:
            dtype = torch.float32 if name.endswith(tuple(kept_in_float32)) else spec.compute
            if name in stored_layers and spec.storage is not None:
                weight = source.load_stored(name, spec.storage, spec.place(name))
                store_as(stored_layers[name], weight, spec.storage, dtype or torch.float32)
            else:
                state[name] = source.load(name, dtype, spec.place(name), name in spec.mapped)
    _assign(module, state)
    module.requires_grad_(False).eval()


def _assign(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """As ``load_state_dict`` with ``assign=True``, which looks through all tensors for each of the layers."""
    layers = dict(module.named_modules(remove_duplicate=False))
    for name, tensor in state.items():
        path, _, own = name.rpartition(".")
        if own in layers[path]._parameters:
            layers[path]._parameters[own] = nn.Parameter(tensor, requires_grad=False)
        else:
            layers[path]._buffers[own] = tensor


def loaded_bytes(
    module: nn.Module,
    source: TensorSource,
    spec: LoadSpec,
    kept_in_float32: Collection[str] = (),
    with_scales: bool = False,
) -> dict[str, int]:
    """The bytes that each tensor takes after ``load_module`` with the same arguments, by name.

    Of a weight in a storage format, the scales count only ``with_scales``.
    """
    sizes = {}
    stored = _stored_layers(module, spec)
    for name, place in module.state_dict(keep_vars=True).items():
        dtype = torch.float32 if name.endswith(tuple(kept_in_float32)) else spec.compute
        if name in stored and spec.storage is not None:
            sizes[name] = stored_bytes(tuple(place.shape), spec.storage, with_scales)
        else:
            sizes[name] = place.numel() * (dtype or source.stored_dtype(name)).itemsize
    return sizes


def _stored_layers(module: nn.Module, spec: LoadSpec) -> dict[str, nn.Linear]:
    """The layers whose weights are kept in the spec's storage format, by the weight's name."""
    if spec.storage is None:
        return {}
    layers = block_linears(module, getattr(module, "kept_dense", ()))
    return {f"{name}.weight": layer for name, layer in layers.items()}


def _counted(names: list[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _few(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
