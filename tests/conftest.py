"""Settings for every test: one thread per process, no network, no stray environment."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest


@pytest.fixture(autouse=True, scope="session")
def one_thread_for_torch():
    import torch

    torch.set_num_threads(1)
