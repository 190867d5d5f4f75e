"""The models that tests of LoRA files from program to program share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.interop.workbench import Workbench, workbenches


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Callable[[str], Workbench]:
    """Gives the models of a family; tests leave them as they were."""
    return workbenches(tmp_path_factory.mktemp("benches"))
