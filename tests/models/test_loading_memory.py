"""Loading a checkpoint never needs much more memory than the loaded model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.models.flux.transformer import FluxConfig, FluxTransformer
from library.safetensors_io import save_file
from tools.make_tiny_models import diffusers_transformer_state

ROOT = Path(__file__).parents[2]
CONFIG = FluxConfig(hidden_size=768, num_heads=6, depth=3, depth_single=6, context_dim=512, mlp_hidden=3072)
SCRIPT = """
import json, sys
import torch
from library.models.flux.checkpoint import open_transformer

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

path, dtype, disable_mmap = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3] == "read"
torch.set_num_threads(1)
opened = open_transformer(path, disable_mmap)
torch.ones(8).to(dtype)
before = peak()
transformer = opened.load(dtype, "cpu")
print(json.dumps([peak() - before, sum(parameter.nbytes for parameter in transformer.parameters())]))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """About 480 MB of float32 weights in the original layout and in Diffusers', where tensors are joined."""
    folder = tmp_path_factory.mktemp("memory")
    with torch.device("meta"):
        shapes = FluxTransformer(CONFIG).state_dict()
    state = {key: torch.zeros(value.shape) for key, value in shapes.items()}
    save_file(state, folder / "original.safetensors")
    save_file(diffusers_transformer_state(state, CONFIG), folder / "diffusers.safetensors")
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux's /proc")
@pytest.mark.parametrize(
    ("layout", "dtype", "reading"),
    [("original", "bfloat16", "map"), ("original", "float32", "read"), ("diffusers", "float32", "map")],
)
def test_peak_memory_is_about_the_size_of_the_model(checkpoints, layout, dtype, reading):
    arguments = [str(checkpoints / f"{layout}.safetensors"), dtype, reading]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    extra, size = json.loads(result.stdout)
    assert size > 1e8
    assert extra <= 1.15 * size
