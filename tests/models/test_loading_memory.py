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
from tools.make_tiny_stable_diffusion import Encoder, Shape, build_modules, original_tensors
from tools.other_layouts import diffusers_transformer_state

ROOT = Path(__file__).parents[2]
CONFIG = FluxConfig(hidden_size=768, num_heads=6, depth=3, depth_single=6, context_dim=512, mlp_hidden=3072)
SCRIPT = """
import json, os, sys
import torch
from library.models.flux.checkpoint import open_transformer
from library.models.loading import LoadSpec
from library.models.stable_diffusion.checkpoint import open_stable_diffusion

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

def parts_of(path, reading):
    if "sd2" in path:
        opened = open_stable_diffusion(path)
        return [opened.unet, *opened.text_encoders]
    return [open_transformer(path, reading == "read")]

torch.set_num_threads(1)
for path, dtype, reading in json.loads(sys.argv[1]):
    process = os.fork()  # each with a peak of its own
    if process:
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
        continue
    spec, parts = LoadSpec.of(getattr(torch, dtype)), parts_of(path, reading)
    for part in parts:
        part.meta_module()
    torch.ones(8).to(spec.compute)
    before = peak()
    modules = [part.load(spec) for part in parts]
    size = sum(parameter.nbytes for module in modules for parameter in module.parameters())
    print(json.dumps([peak() - before, size]), flush=True)
    os._exit(0)
"""
CASES = [
    ("original", "bfloat16", "map"),
    ("original", "float32", "read"),
    ("diffusers", "float32", "map"),
    ("sd2", "float32", "map"),
]


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


@pytest.fixture(scope="module")
def measured(checkpoints, stable_diffusion) -> dict[tuple[str, ...], list[int]]:
    """For each case, by how much loading raised the process's peak of memory, and the size of what was loaded."""
    folders = {"original": checkpoints, "diffusers": checkpoints, "sd2": stable_diffusion}
    given = [(str(folders[file] / f"{file}.safetensors"), dtype, reading) for file, dtype, reading in CASES]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(given)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return dict(zip(CASES, map(json.loads, result.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory) -> Path:
    """A file in whose text encoder each fused matrix becomes three."""
    folder = tmp_path_factory.mktemp("memory")
    encoder = Encoder(512, 8, "gelu", "!", layers=12, mlp_ratio=4)
    shape = Shape((64, 128, 256, 256), (1, 1, 1, 0), (1, 2, 4, 4), True, (encoder,), (True,))
    with torch.device("meta"):
        modules = build_modules(shape, 514)
    states = {
        part: {name: torch.zeros(value.shape) for name, value in module.state_dict().items()}
        for part, module in modules.items()
    }
    config = json.dumps({part: {"norm_num_groups": 8} for part in ("unet", "vae")})
    save_file(original_tensors(shape, states), folder / "sd2.safetensors", {"config": config})
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux's /proc")
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_peak_memory_is_about_the_size_of_the_model(measured, case):
    extra, size = measured[case]
    assert size > 1e8
    assert extra <= 1.15 * size
