"""Writing the trained network under its name only when the file is complete."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from library.checkpoints import load_tensors
from library.errors import NO_ROOM
from library.files import explaining_full_disk, replace_when_complete, temporary_path
from library.safetensors_io import content_hashes, read_header, save_file


def save_network(network: Any, path: Path, dtype: Any, metadata: dict[str, str]) -> None:
    """Let the network write its file aside (with the suffix it expects), flush it, and give it the name ``path``.

    ``dtype`` is a torch dtype or None for "as trained". Raises OSError when the file cannot be written.
    """
    aside = temporary_path(path)
    aside = aside.with_name(aside.name + path.suffix)
    size = sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in network.state_dict().values())
    with explaining_full_disk(path, size):
        try:
            _let_save(network, aside, dtype, metadata)
            if path.suffix == ".safetensors":
                _complete_hashes(aside)
            replace_when_complete(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def _let_save(network: Any, path: Path, dtype: Any, metadata: dict[str, str]) -> None:
    """Call ``save_weights``. What other libraries raise on a full disk becomes OSError."""
    try:
        network.save_weights(os.fspath(path), dtype, dict(metadata))
    except OSError:
        raise
    except Exception as error:
        number = next((number for number in NO_ROOM if os.strerror(number) in str(error)), None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from None


def _complete_hashes(path: Path) -> None:
    """Give a third party's file the two hashes of its content by which front ends know a file."""
    if "sshs_legacy_hash" in read_header(path).metadata:
        return
    tensors, metadata = load_tensors(path)
    metadata["sshs_model_hash"], metadata["sshs_legacy_hash"] = content_hashes(tensors, metadata)
    save_file(tensors, path, metadata)
