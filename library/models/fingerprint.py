"""A quick identity of model files, for caches and states that depend on them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

SAMPLES = 16
SAMPLE_BYTES = 4096


def fingerprint(files: Iterable[Path]) -> str:
    """32 hex digits that change when one of the files changes: from their sizes and from samples spread over each.

    Reads at most 64 KiB of a file, so it is quick for any size.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with open(file, "rb") as stream:
            for index in range(SAMPLES):
                stream.seek(max(size - SAMPLE_BYTES, 0) * index // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
