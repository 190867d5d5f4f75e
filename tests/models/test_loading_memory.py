"""Loading a checkpoint never needs much more memory than the loaded model."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore, init_process_group

from library.memory.plan import Sharding
from library.models.flux.checkpoint import open_transformer
from library.models.flux.pipeline import FluxFiles, FluxPipeline
from library.models.flux.transformer import FluxConfig, FluxTransformer
from library.models.loading import LoadSpec, on_meta
from library.models.stable_diffusion.checkpoint import open_stable_diffusion
from library.safetensors_io import save_file
from tests.forked import in_a_child, linux_only, memory
from tools.make_tiny_stable_diffusion import Encoder, Shape, build_modules, original_tensors
from tools.other_layouts import diffusers_transformer_state

CONFIG = FluxConfig(hidden_size=512, num_heads=4, depth=3, depth_single=6, context_dim=512, mlp_hidden=2048)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """About 210 MB of float32 weights in the original layout and in Diffusers', where tensors are joined."""
    folder = tmp_path_factory.mktemp("memory")
    with on_meta():
        shapes = FluxTransformer(CONFIG).state_dict()
    state = {key: torch.zeros(value.shape) for key, value in shapes.items()}
    save_file(state, folder / "original.safetensors")
    save_file(diffusers_transformer_state(state, CONFIG), folder / "diffusers.safetensors")
    return folder


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory) -> Path:
    """A file in whose text encoder each fused matrix becomes three."""
    folder = tmp_path_factory.mktemp("memory")
    encoder = Encoder(512, 8, "gelu", "!", layers=12, mlp_ratio=4)
    shape = Shape((64, 128, 256, 256), (1, 1, 1, 0), (1, 2, 4, 4), True, (encoder,), (True,))
    with on_meta():
        modules = build_modules(shape, 514)
    states = {
        part: {name: torch.zeros(value.shape) for name, value in module.state_dict().items()}
        for part, module in modules.items()
    }
    config = json.dumps({part: {"norm_num_groups": 8} for part in ("unet", "vae")})
    save_file(original_tensors(shape, states), folder / "sd2.safetensors", {"config": config})
    return folder


@pytest.mark.slow
@linux_only
@pytest.mark.parametrize(
    ("file", "dtype", "disable_mmap"),
    [
        ("original", torch.bfloat16, False),
        ("original", torch.float32, True),
        pytest.param("diffusers", torch.float32, False, marks=pytest.mark.thorough),
        ("sd2", torch.float32, False),
    ],
)
def test_peak_memory_is_about_the_size_of_the_model(request, file, dtype, disable_mmap):
    path = request.getfixturevalue("stable_diffusion" if file == "sd2" else "checkpoints") / f"{file}.safetensors"

    def measured() -> list[int]:
        """By how much loading raises the process's peak of memory, and the size of what is loaded."""
        opened = open_stable_diffusion(path) if file == "sd2" else None
        parts = [opened.unet, *opened.text_encoders] if opened else [open_transformer(path, disable_mmap)]
        for part in parts:
            part.meta_module()
        torch.ones(8).to(dtype)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = memory("VmHWM")
        modules = [part.load(LoadSpec.of(dtype)) for part in parts]
        size = sum(parameter.nbytes for module in modules for parameter in module.parameters())
        return [memory("VmHWM") - before, size]

    extra, size = in_a_child(measured)
    assert size > 1e8
    assert extra <= 1.2 * size


@linux_only
def test_blocks_that_will_be_spread_stay_on_the_mapped_file(checkpoints):
    """Processes share its memory; once the blocks are shared out, nothing is mapped any more."""
    path = checkpoints / "original.safetensors"
    files = FluxFiles(transformer=path)

    def measured() -> list[int]:
        pipeline = FluxPipeline(files, torch.float32, "cpu", parts=("transformer",))
        pipeline.spread(Sharding(1))
        before = memory("RssAnon")
        transformer = pipeline.load_transformer()
        own = memory("RssAnon") - before
        size = sum(parameter.nbytes for parameter in transformer.parameters())
        init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        pipeline.shard()
        gc.collect()
        return [own, size, Path("/proc/self/maps").read_text(encoding="utf-8").count(path.name)]

    own, size, mapped = in_a_child(measured)
    assert size > 1e8 and own < size / 5 and mapped == 0
