"""Writing the trained network under its name only when the file is complete."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from library.files import replace_when_complete, temporary_path


def save_network(network: Any, path: Path, dtype: Any, metadata: dict[str, str]) -> None:
    """Let the network write its file aside (with the suffix it expects), flush it, and give it the name ``path``.

    ``dtype`` is a torch dtype or None for "as trained".
    """
    aside = temporary_path(path)
    aside = aside.with_name(aside.name + path.suffix)
    try:
        network.save_weights(os.fspath(aside), dtype, metadata)
        replace_when_complete(aside, path)
    finally:
        aside.unlink(missing_ok=True)
