"""What the tests of several tools share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a tiny model for captions or masks by its kind, made once."""
    import torch

    from tests.tools import tiny_annotators

    folder = tmp_path_factory.mktemp("models")

    def made(kind: str) -> Path:
        if not (folder / kind).exists():
            with torch.random.fork_rng(devices=[]):  # some biases keep what their layers were made with
                torch.manual_seed(3)
                getattr(tiny_annotators, f"write_{kind}")(folder / kind)
        return folder / kind

    return made
