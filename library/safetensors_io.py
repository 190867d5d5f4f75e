"""The safetensors format: headers read strictly, files written and hashed.

The safetensors format is 8 bytes with the header's length, a JSON header, and the tensors' bytes. Headers are read
without torch, so that a damaged file or one of the wrong family is named before anything heavy is imported.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.files import open_regular, writing

if TYPE_CHECKING:
    import torch

# Format name: torch name, bytes per element. In the order in which the safetensors library sorts tensors, last first.
DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "C64": ("complex64", 8),
    "F64": ("float64", 8),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
}
LARGEST_HEADER = 100_000_000  # the safetensors library's own limit
MOST_DIMENSIONS = 64  # of torch's
SIGNATURES = {
    b"GGUF": "a GGUF file, which this program cannot read; use a safetensors file in float32, float16, bfloat16 or fp8",
    b"PK\x03\x04": "a PyTorch pickle file under the name of a safetensors file; give it the suffix .ckpt or .pt",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; download the real file",
    b"<!DOCTYPE": "a web page, not a checkpoint; the download went wrong",
    b"<html": "a web page, not a checkpoint; the download went wrong",
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ``start`` and ``stop`` are byte positions in ``file``; ``dtype`` is the format's name."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """The description at the start of a safetensors file; ``data_start`` is where the first tensor's bytes stand."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str] = field(default_factory=dict)
    data_start: int = 0


def read_header(path: Path | str) -> Header:
    """Read and check the header of a safetensors file, without torch and without touching the tensors.

    Raises UserError for a missing, truncated or damaged file, and names what a file of another format is.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(32)
            _refuse_other_formats(path, start)
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else None
            if length is None or length > LARGEST_HEADER:
                raise UserError(f"{path} is not a safetensors file ({size:,} bytes, without a valid header).")
            if 8 + length > size:
                raise UserError(
                    f"{path} is truncated: its header alone takes {8 + length:,} bytes, the file has {size:,}."
                )
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    return _parse_header(path, text, 8 + length, size)


def _refuse_other_formats(path: Path, start: bytes) -> None:
    for signature, meaning in SIGNATURES.items():
        if start.lstrip()[: len(signature)].lower() == signature.lower():
            raise UserError(f"{path} is {meaning}.")


def strict_json(text: str) -> Any:
    """The value of a JSON text as RFC 8259 has it.

    Raises ValueError for anything else: Infinity and NaN, a key that stands twice in one object, half a surrogate pair,
    and nesting too deep for the parser.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_repetition, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate is a UnicodeEncodeError, a ValueError
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def json_object(text: str | None) -> dict[str, Any]:
    """The JSON object in an entry of a file's metadata; {} where it is missing or holds anything else."""
    try:
        value = strict_json(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _parse_header(path: Path, text: bytes, data_start: int, size: int) -> Header:
    try:
        described = strict_json(text.decode("utf-8"))
    except ValueError:
        raise UserError(f"{path} is damaged: its header is not valid safetensors JSON.") from None
    if not isinstance(described, dict):
        raise UserError(f"{path} is damaged: its header is not a JSON object.")
    metadata = described.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path} is damaged: the metadata in its header are not all text.")
    tensors = {name: _entry(path, name, told, data_start) for name, told in described.items()}
    _check_positions(path, tensors, data_start, size)
    return Header(tensors, metadata, data_start)


def _entry(path: Path, name: str, told: Any, data_start: int) -> TensorEntry:
    """One tensor's description. Raises UserError unless its parts are of the right kinds and agree."""
    try:
        dtype, shape, (start, stop) = told["dtype"], told["shape"], told["data_offsets"]
        is_valid = type(dtype) is str and dtype != "" and type(shape) is list and len(shape) <= MOST_DIMENSIONS
    except (KeyError, TypeError, ValueError):
        is_valid = False
    if not is_valid or not all([type(number) is int and 0 <= number < 1 << 63 for number in (*shape, start, stop)]):
        raise UserError(f'{path} is damaged: its header does not describe the tensor "{name}" as safetensors does.')
    _, width = DTYPES.get(dtype, (None, None))
    count = math.prod(shape)
    has_size = width is None or stop - start == count * width
    is_huge = count >= 1 << 60 if count else math.prod(max(length, 1) for length in shape) >= 1 << 60
    if start > stop or not has_size or is_huge:
        raise UserError(f'{path} is damaged: the size of tensor "{name}" does not match its shape.')
    return TensorEntry(path, dtype, tuple(shape), data_start + start, data_start + stop)


def _check_positions(path: Path, tensors: Mapping[str, TensorEntry], data_start: int, size: int) -> None:
    """Raises UserError unless the tensors lie end to end and fill the file."""
    expected = max((entry.stop for entry in tensors.values()), default=data_start)
    if size != expected:
        fault = "truncated" if size < expected else "damaged"
        raise UserError(f"{path} is {fault}: its header describes {expected:,} bytes, the file has {size:,}.")
    position = data_start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            fault = "overlaps another one" if entry.start < position else "stands after bytes of no tensor"
            raise UserError(f'{path} is damaged: the tensor "{name}" {fault}.')
        position = entry.stop


def save_file(tensors: Mapping[str, torch.Tensor], path: Path | str, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that appears complete or not at all.

    The same tensors and metadata give the same bytes. Tensors are written one at a time, from any device. Raises
    TypeError when a metadata value isn't a string, OSError as writing does.
    """
    save_one_by_one(tensors, tensors.__getitem__, path, metadata)


def save_one_by_one(
    described: Mapping[str, torch.Tensor],
    load: Callable[[str], torch.Tensor],
    path: Path | str,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """As ``save_file``, for tensors that are made only when their turn comes, so that memory holds one of them.

    ``described`` are stand-ins with each tensor's shape and dtype, such as tensors on the meta device. Raises
    ValueError when ``load`` gives another shape or dtype.
    """
    layout = _layout(described)
    header = _header_bytes(described, layout, metadata or {})
    size = len(header) + sum(tensor.numel() * tensor.element_size() for tensor in described.values())
    with writing(path, size) as file:
        file.write(header)
        for name in layout:
            tensor = load(name)
            if (tensor.shape, tensor.dtype) != (described[name].shape, described[name].dtype):
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not as described")
            file.write(_tensor_bytes(tensor))


def content_hashes(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    load: Callable[[str], torch.Tensor] | None = None,
) -> tuple[str, str]:
    """``sshs_model_hash`` and ``sshs_legacy_hash`` of a file with these tensors and this metadata.

    The first is the SHA-256 of the tensors' bytes in file order; the second, 8 digits, that of the 64 KiB at offset
    1 MiB of the file as it would be with only the ``ss_`` entries of the metadata. With ``load``, ``tensors`` are
    stand-ins as of ``save_one_by_one``.
    """
    layout = _layout(tensors)
    header = _header_bytes(tensors, layout, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    whole, window = hashlib.sha256(), hashlib.sha256()
    window.update(_overlap(header, 0))
    position = len(header)
    for name in layout:
        data = _tensor_bytes(load(name) if load else tensors[name])
        whole.update(data)
        window.update(_overlap(data, position))
        position += len(data)
    return whole.hexdigest(), window.hexdigest()[:8]


def _overlap(data: Any, position: int) -> Any:
    """The part of ``data``, which stands at ``position``, that lies in the legacy hash's window."""
    return data[max(0, 0x100000 - position) : max(0, 0x110000 - position)]


def _layout(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names in file order, which is the safetensors library's own: widest numbers first, then by name."""
    order = {name: index for index, (name, _) in enumerate(DTYPES.values())}
    return sorted(tensors, key=lambda name: (-order[_dtype_name(tensors[name])], name))


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _header_bytes(tensors: Mapping[str, torch.Tensor], layout: list[str], metadata: Mapping[str, str]) -> bytes:
    if not all(isinstance(value, str) for value in metadata.values()):
        raise TypeError("safetensors metadata values must be strings")
    formats = {name: file_name for file_name, (name, _) in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in layout:
        tensor = tensors[name]
        stop = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": formats[_dtype_name(tensor)],
            "shape": list(tensor.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _tensor_bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def model_hash(path: Path | str) -> str:
    """SHA-256 (hex) of the tensors' bytes of a safetensors file: the same whatever its metadata."""
    return _sha256(Path(path), read_header(path).data_start)


def legacy_hash(path: Path | str) -> str:
    """First 8 hex digits of the SHA-256 of 64 KiB at offset 1 MiB; "NOFILE" or "IsADirectory" without a file."""
    path = Path(path)
    if path.is_dir() or not path.exists():
        return "IsADirectory" if path.is_dir() else "NOFILE"
    with open(path, "rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def file_hash(path: Path | str) -> str:
    """SHA-256 (hex) of a whole file; "NOFILE" or "IsADirectory" where there is no file."""
    path = Path(path)
    if path.is_dir() or not path.exists():
        return "IsADirectory" if path.is_dir() else "NOFILE"
    return _sha256(path, 0)


def _sha256(path: Path, start: int) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(path, start):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(path: Path, start: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(start)
        while chunk := file.read(1 << 22):
            yield chunk
