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
from tools.make_tiny_stable_diffusion import Encoder, Shape, build_modules, original_tensors

ROOT = Path(__file__).parents[2]
CONFIG = FluxConfig(hidden_size=768, num_heads=6, depth=3, depth_single=6, context_dim=512, mlp_hidden=3072)
SCRIPT = """
import json, sys
import torch
from library.models.flux.checkpoint import open_transformer
from library.models.loading import LoadSpec

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

path, dtype, disable_mmap = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3] == "read"
torch.set_num_threads(1)
opened = open_transformer(path, disable_mmap)
torch.ones(8).to(dtype)
before = peak()
transformer = opened.load(LoadSpec.of(dtype))
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
    extra, size = measure(SCRIPT, str(checkpoints / f"{layout}.safetensors"), dtype, reading)
    assert size > 1e8
    assert extra <= 1.15 * size


def measure(script: str, *arguments: str) -> list[int]:
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)


STABLE_DIFFUSION = """
import json, sys
import torch
from library.models.loading import LoadSpec
from library.models.stable_diffusion.checkpoint import open_stable_diffusion

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

torch.set_num_threads(1)
opened = open_stable_diffusion(sys.argv[1])
parts = (opened.unet, *opened.text_encoders)
for part in parts:
    part.meta_module()
before = peak()
modules = [part.load(LoadSpec.of(torch.float32)) for part in parts]
size = sum(parameter.nbytes for module in modules for parameter in module.parameters())
print(json.dumps([peak() - before, size]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux's /proc")
def test_peak_memory_of_a_stable_diffusion_file_is_about_the_size_of_its_parts(tmp_path):
    """In its text encoder, each fused matrix becomes three."""
    encoder = Encoder(512, 8, "gelu", "!", layers=12, mlp_ratio=4)
    shape = Shape((64, 128, 256, 256), (1, 1, 1, 0), (1, 2, 4, 4), True, (encoder,), (True,))
    with torch.device("meta"):
        modules = build_modules(shape, 514)
    states = {
        part: {name: torch.zeros(value.shape) for name, value in module.state_dict().items()}
        for part, module in modules.items()
    }
    config = json.dumps({part: {"norm_num_groups": 8} for part in ("unet", "vae")})
    save_file(original_tensors(shape, states), tmp_path / "sd2.safetensors", {"config": config})
    extra, size = measure(STABLE_DIFFUSION, str(tmp_path / "sd2.safetensors"))
    assert size > 2e8
    assert extra <= 1.15 * size
