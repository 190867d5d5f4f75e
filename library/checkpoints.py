"""Checkpoint files opened by their headers and read tensor by tensor: safetensors, in shards or not, and pickles."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import IO, TYPE_CHECKING, Any

from library.errors import UserError, did_you_mean
from library.files import open_regular
from library.safetensors_io import DTYPES, TensorEntry, read_header, strict_json

if TYPE_CHECKING:
    import torch

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
SMALL = 1 << 16
"""Bytes of a tensor up to which reading takes less time than mapping."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SHARD = re.compile(r"^(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.safetensors$")


class Checkpoint(ABC):
    """A set of named tensors that are read one at a time.

    ``path`` is what the user named, a file or a folder; ``files`` are what it stands for; ``label`` is how messages
    name it, with its option.
    """

    path: Path
    files: list[Path]
    label: str
    metadata: dict[str, str]

    @abstractmethod
    def keys(self) -> Collection[str]:
        """The names of its tensors."""

    @abstractmethod
    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor, from the header alone."""

    @abstractmethod
    def dtype(self, key: str) -> torch.dtype:
        """Raises UserError for a dtype that torch doesn't have."""

    @abstractmethod
    def load(
        self, key: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", mapped: bool = False
    ) -> torch.Tensor:
        """The tensor, in memory of its own; floating-point tensors become ``dtype`` where one is given.

        If ``mapped``, it may lie on the mapped file instead, in memory that processes share until one writes to it.
        """

    @abstractmethod
    def copy_to(self, key: str, place: torch.Tensor) -> None:
        """Copy the tensor, cast as needed, into ``place`` of the same shape, without another copy on the way."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, key: str) -> bool:
        return key in self.keys()


class SafetensorsCheckpoint(Checkpoint):
    """One safetensors file or several shards. Nothing is read but headers until ``load`` is called.

    ``disable_mmap`` reads with plain file reads, which is faster on some network drives.
    """

    def __init__(self, path: Path, files: list[Path], disable_mmap: bool = False):
        self.path = path
        self.label = str(path)
        self.files = files
        self.disable_mmap = disable_mmap
        self.metadata: dict[str, str] = {}
        self.entries: dict[str, TensorEntry] = {}
        for file in files:
            header = read_header(file)
            self.metadata.update(header.metadata)
            self.entries.update(header.tensors)

    def keys(self) -> Collection[str]:
        return self.entries.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self.entries[key].shape

    def dtype(self, key: str) -> torch.dtype:
        import torch

        entry = self.entries[key]
        dtype = getattr(torch, DTYPES.get(entry.dtype, ("", 0))[0], None)
        if dtype is None:
            raise UserError(f'{entry.file}: tensor "{key}" has the dtype {entry.dtype}, which is not supported.')
        return dtype

    def load(
        self, key: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", mapped: bool = False
    ) -> torch.Tensor:
        stored = self._stored(key)
        wanted = dtype if dtype is not None and stored.is_floating_point() else stored.dtype
        loaded = stored.to(device).to(wanted)
        # A tensor that still lies on the mapped file is copied, so that the mapping ends here.
        return loaded.clone() if loaded is stored and self._is_mapped(key) and not mapped else loaded

    def copy_to(self, key: str, place: torch.Tensor) -> None:
        place.copy_(self._stored(key))

    def _is_mapped(self, key: str) -> bool:
        """Whether the stored bytes are mapped, not read."""
        entry = self.entries[key]
        return not self.disable_mmap and entry.stop - entry.start > SMALL

    def _stored(self, key: str) -> torch.Tensor:
        """The tensor, on the mapped file or in memory of its own."""
        return self._bytes(key).view(self.dtype(key)).reshape(self.shape(key))

    def _bytes(self, key: str) -> torch.Tensor:
        """The stored bytes as a uint8 tensor: mapped, or read."""
        import numpy
        import torch

        entry = self.entries[key]
        count = entry.stop - entry.start
        if count == 0:
            return torch.empty(0, dtype=torch.uint8)
        try:
            if not self._is_mapped(key):
                data = numpy.empty(count, dtype=numpy.uint8)
                with open(entry.file, "rb", buffering=0) as file:
                    file.seek(entry.start)
                    _read_into(file, data.data, entry.file)
                return torch.from_numpy(data)
            # Copy-on-write, because torch warns about memory that it may not write to; nothing is written.
            mapped = numpy.memmap(str(entry.file), dtype=numpy.uint8, mode="c", offset=entry.start, shape=(count,))
        except OSError as error:
            raise UserError(f"{entry.file} cannot be read: {error.strerror}.") from None
        aligned = entry.start % 8 == 0
        return torch.from_numpy(mapped) if aligned else torch.from_numpy(numpy.array(mapped))


def _read_into(file: IO[bytes], buffer: memoryview, path: Path) -> None:
    filled = 0
    while filled < len(buffer):
        count = file.readinto(buffer[filled:])  # type: ignore[attr-defined]
        if not count:
            raise UserError(f"{path} became shorter while it was read.")
        filled += count


def load_pickled(path: Path, disable_mmap: bool = False, classes: Sequence[type] = ()) -> dict[Any, Any]:
    """The dictionary in a file that PyTorch pickled. Raises UserError as ``unpickled``, and for anything else."""
    content = unpickled(path, disable_mmap, classes)
    if not isinstance(content, dict):
        raise UserError(f"{path} contains no set of named tensors.")
    return content


def unpickled(path: Path, disable_mmap: bool = False, classes: Sequence[type] = ()) -> Any:
    """What PyTorch pickled into a file, read so that no code in it runs.

    Beside tensors and plain data it may hold objects of these ``classes``. Raises UserError for anything else, and for
    a file that is compressed, as PyTorch writes none: it may unpack to any size.
    """
    import pickle

    import torch

    try:
        can_map = not disable_mmap and _is_archive(path)  # the format before PyTorch 1.6 can't be mapped
        with torch.serialization.safe_globals([*classes]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than tensors, and loading it could run code that someone put there; "
            "use the safetensors version of this model."
        ) from None
    except Exception as error:  # a damaged file may end the unpickler on any kind of error
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} cannot be read as a PyTorch file: {reason}") from None


def _is_archive(path: Path) -> bool:
    """Whether a file is a zip archive; raises UserError for one that is compressed."""
    import zipfile

    with open_regular(path) as file:
        if not zipfile.is_zipfile(file):
            return False
        with zipfile.ZipFile(file) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise UserError(f"{path} is compressed, which PyTorch files are not; unpack it first.")
    return True


def require_dense(place: Path | str, key: str, tensor: torch.Tensor) -> None:
    """Raises UserError for a tensor out of a pickle whose values are not all in the file."""
    import torch

    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise UserError(f'{place}: the tensor "{key}" is sparse, quantized or without values; use a dense one.')
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(f'{place}: the tensor "{key}" has more elements than the file; use a dense one.')


class PickledCheckpoint(Checkpoint):
    """A ``.ckpt``, ``.pt``, ``.pth`` or ``.bin`` file, read with ``weights_only=True``, so that no code in it runs."""

    def __init__(self, path: Path, disable_mmap: bool = False):
        import torch

        content = load_pickled(path, disable_mmap)
        self.path = path
        self.files = [path]
        self.label = str(path)
        self.metadata: dict[str, str] = {}
        if isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        self.tensors = {
            key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, torch.Tensor)
        }
        for key, value in self.tensors.items():
            require_dense(path, key, value)

    def keys(self) -> Collection[str]:
        return self.tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].dtype

    def load(
        self, key: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", mapped: bool = False
    ) -> torch.Tensor:
        stored = self.tensors[key].detach()
        loaded = stored.to(device).to(dtype if dtype is not None and stored.is_floating_point() else stored.dtype)
        return loaded.clone() if loaded is stored else loaded

    def copy_to(self, key: str, place: torch.Tensor) -> None:
        place.copy_(self.tensors[key])


def open_checkpoint(
    path: Path | str, subfolder: str | None = None, disable_mmap: bool = False, option: str = ""
) -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    ``path``: a safetensors file, one of several shards, an ``.index.json``, a pickled file, or a folder (with its files
    in ``subfolder``, as in a Diffusers model folder, or in itself). Raises UserError naming ``option`` and the path.
    """
    path = Path(path)
    try:
        files = checkpoint_files(path, subfolder)
        checkpoint: Checkpoint
        if files[0].suffix.lower() in PICKLE_SUFFIXES:
            checkpoint = PickledCheckpoint(files[0], disable_mmap)
        else:
            checkpoint = SafetensorsCheckpoint(path, files, disable_mmap)
    except OSError as error:
        raise UserError(f"{option}: " * bool(option) + f"{path} cannot be read: {error.strerror}.") from None
    except UserError as error:
        raise UserError(f"{option}: {error}" if option else str(error)) from None
    checkpoint.label = f"{option}: {path}" if option else str(path)
    return checkpoint


def is_hub_id(name: Path | str) -> bool:
    """Whether ``name`` can be an id on the hub and not a path that exists or that names a file."""
    path = Path(name)
    is_file_name = path.suffix.lower() in (".safetensors", *PICKLE_SUFFIXES)
    return not path.exists() and not is_file_name and HUB_ID.fullmatch(path.as_posix()) is not None


def _from_the_hub(path: Path, siblings: Collection[str]) -> str:
    """What to say of a path that does not exist, if it can be an id on the hub."""
    if siblings or not is_hub_id(path):
        return ""
    name = path.as_posix()
    return (
        ", and models are not downloaded from the Hugging Face hub; if it is an id there, fetch it with "
        f'"hf download {name} --local-dir FOLDER" and name that folder'
    )


def checkpoint_files(path: Path, subfolder: str | None = None) -> list[Path]:
    """The file, or all shards, that ``path`` stands for. Raises UserError when there are none or some are missing."""
    if path.is_dir():
        if subfolder is not None and (path / subfolder).is_dir():
            path = path / subfolder
        return _files_of_folder(path)
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path} does not exist{_from_the_hub(path, siblings)}.{did_you_mean(path.name, siblings)}")
    if path.name.endswith(".index.json"):
        return _files_of_index(path)
    shard = SHARD.match(path.name)
    if shard is not None:
        count = int(shard["count"])
        return _existing(
            [path.with_name(f"{shard['stem']}-{i + 1:05d}-of-{count:05d}.safetensors") for i in range(count)]
        )
    if path.suffix.lower() != ".safetensors" and path.suffix.lower() not in PICKLE_SUFFIXES:
        read_header(path)  # names GGUF and the like; a safetensors file under another name is accepted
    return [path]


def _files_of_folder(folder: Path) -> list[Path]:
    indexes = sorted(folder.glob("*.safetensors.index.json"), key=lambda file: (len(file.name), file.name))
    if indexes:
        return _files_of_index(indexes[0])
    files = sorted(folder.glob("*.safetensors"), key=lambda file: (len(file.name), file.name))
    shards = [file for file in files if SHARD.match(file.name)]
    if shards:
        return checkpoint_files(shards[0])
    for usual in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
        if folder / usual in files:
            return [folder / usual]
    if len(files) > 1:
        raise UserError(
            f"{folder} holds several safetensors files ({_few([f.name for f in files])}); name the one to use."
        )
    if not files:
        raise UserError(f"{folder} contains no safetensors file.")
    return files


def _files_of_index(index: Path) -> list[Path]:
    try:
        with open_regular(index) as file:
            names = sorted(set(strict_json(file.read().decode("utf-8"))["weight_map"].values()))
    except OSError as error:
        raise UserError(f"{index} cannot be read: {error.strerror}.") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        names = []
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{index} is not a valid index of shards.")
    for name in names:
        if name != PureWindowsPath(name).name or name in (".", ".."):  # knows the separators of every system
            raise UserError(f"{index} is not a valid index of shards: {name} is not beside it.")
    return _existing([index.parent / name for name in names])


def _existing(files: list[Path]) -> list[Path]:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{files[0].parent}: {len(missing)} of {len(files)} shards are missing: {_few(missing)}.")
    return files


def _few(names: list[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def load_tensors(
    path: Path | str, device: torch.device | str = "cpu", finite: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors and the metadata of a (small) file, such as a LoRA.

    With ``finite``, infinity and NaN are refused. Raises UserError.
    """
    checkpoint = open_checkpoint(path)
    tensors = {key: checkpoint.load(key, device=device) for key in checkpoint}
    for key, tensor in tensors.items() if finite else ():
        try:
            require_finite(key, tensor)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return tensors, checkpoint.metadata


def require_finite(key: str, tensor: torch.Tensor) -> None:
    """Raises UserError that names ``key`` when its tensor holds infinity or NaN."""
    import torch

    numbers = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
    if not bool(torch.isfinite(numbers).all()):
        raise UserError(f'"{key}" holds numbers that are not finite; the file is damaged.')
