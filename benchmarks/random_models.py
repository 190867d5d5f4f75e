"""FLUX.1 and Chroma of true or tiny dimensions with random weights, made where they are wanted, and a LoRA's steps.

The pipeline is the one that training uses; it opens a file that holds a header and a hole, and every tensor is filled
on its device, or in the host memory that it is streamed from. Neither memory holds anything twice.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.memory.plan import MemoryPlan
    from library.memory.storage import Storage
    from library.models.flux.pipeline import FluxPipeline
    from library.models.flux.transformer import FluxConfig

    Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]

RANK = 16
LIMITS = {
    "H200": (790e12, 4.3e12),
    "H100": (790e12, 3.3e12),
    "A100": (312e12, 2.0e12),
    "RTX 5090": (210e12, 1.79e12),
    "RTX 4090": (165e12, 1.0e12),
    "RTX 3090": (71e12, 0.93e12),
}
"""Of devices by a part of their names: products of bfloat16 per second (FLOP), bytes of their memory per second."""


def add_size_options(
    arguments: argparse.ArgumentParser, sizes: Sequence[str] = ("tiny", "full"), default: str = "tiny"
) -> None:
    """``--device`` and ``--size``."""
    arguments.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments.add_argument("--size", choices=sizes, default=default, help="tiny models, or the true dimensions")


def normal_values(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal values with a deviation of 0.02, float32, on the generator's device."""
    import torch

    return torch.empty(shape, device=generator.device).normal_(0, 0.02, generator=generator)


def config_of(variant: str, size: str, **sizes: Any) -> FluxConfig:
    """FLUX.1 dev or Chroma1 in full, or tiny with the same proportion of blocks."""
    from library.models.flux.chroma import ChromaConfig
    from library.models.flux.transformer import FluxConfig, rope_axes

    if size == "tiny":
        tiny = {"hidden_size": 128, "num_heads": 2, "depth": 4, "depth_single": 8, "mlp_hidden": 512}
        sizes = {**tiny, "context_dim": 64, "axes_dims": rope_axes(64), **sizes}
        sizes.update({"approximator_hidden": 64, "approximator_layers": 2} if variant == "chroma" else {})
    return ChromaConfig(**sizes) if variant == "chroma" else FluxConfig(**sizes)


def open_random(config: FluxConfig, device: torch.device | str, storage: Storage | None = None) -> FluxPipeline:
    """A pipeline that will load a transformer of that shape, in bfloat16, with values that ``fill`` gives."""
    import torch

    from library.memory.storage import BlocksStoredAs
    from library.models.flux.chroma import ChromaConfig, ChromaTransformer
    from library.models.flux.pipeline import PIPELINES, FluxFiles
    from library.models.flux.transformer import FluxTransformer
    from library.models.loading import on_meta
    from tests.full_size import write_hollow

    kept = torch.bfloat16
    is_chroma = isinstance(config, ChromaConfig)
    with on_meta():
        transformer = ChromaTransformer(config) if isinstance(config, ChromaConfig) else FluxTransformer(config)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = write_hollow(Path(folder) / "model.safetensors", transformer.state_dict(), kept)
        pipeline = PIPELINES["chroma" if is_chroma else "flux"](
            FluxFiles(path),
            kept,
            device,
            dtypes={"transformer": kept if storage is None else BlocksStoredAs(kept, storage)},
            parts=("transformer",),
        )
    pipeline.files.transformer.source.reads_values = False
    return pipeline


def load_filled(pipeline: FluxPipeline, device: torch.device | str, draw: Draw = normal_values) -> Any:
    """The transformer, filled with values that ``draw`` gives on ``device``; the scales of its norms are 1."""
    import torch

    from library.memory.stored_linear import StoredLinear

    transformer = pipeline.load_transformer()
    generator = torch.Generator(device).manual_seed(0)

    with torch.no_grad():
        for layer in transformer.modules():
            if isinstance(layer, StoredLinear):
                layer.set_weight(draw((layer.out_features, layer.in_features), generator).to(layer.compute_dtype))
            for name, parameter in layer._parameters.items():
                if parameter is not None:
                    parameter.copy_(torch.ones(()) if name == "scale" else draw(tuple(parameter.shape), generator))
    return transformer


class Training:
    """A LoRA of rank 16 on a random transformer, and steps on random latents."""

    def __init__(
        self, pipeline: FluxPipeline, device: str, resolution: int, batch: int = 1, draw: Draw = normal_values
    ) -> None:
        import torch

        from library.console import silence
        from networks import lora_flux

        self.pipeline, self.device, self.batch = pipeline, torch.device(device), batch
        self.transformer = load_filled(pipeline, device, draw)
        torch.manual_seed(0)
        with silence():
            network = lora_flux.create_network(1.0, RANK, RANK, None, [None, None], self.transformer)
            network.apply_to([None, None], self.transformer, False, True)
        network.prepare_grad_etc([None, None], self.transformer)
        self.network = network.to(self.device)
        self.parameters = network.get_trainable_params()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=self.device.type == "cuda" or None)
        self.set_resolution(resolution)

    def set_resolution(self, height: int, width: int = 0) -> None:
        """Pixels of the images from now on, square by default."""
        import torch

        from library.models.flux.text import T5_LENGTH

        config, device = self.pipeline.config, self.device
        latent = (self.batch, self.pipeline.latent_channels, height // 8, (width or height) // 8)
        is_full = config.hidden_size > 1000
        length = T5_LENGTH[self.pipeline.variant] if is_full else 16
        self.latents, self.target = torch.randn(latent, device=device), torch.randn(latent, device=device)
        self.timesteps = torch.full((self.batch,), 0.5, device=device)
        self.guidance = torch.ones(self.batch, device=device)
        self.conditioning = {
            "t5_out": torch.randn(self.batch, length, config.context_dim, device=device),
            "txt_ids": torch.zeros(self.batch, length, 3, device=device),
            "t5_attn_mask": torch.ones(self.batch, length, dtype=torch.int64),
            "l_pooled": torch.randn(self.batch, config.vector_dim, device=device),
        }

    def velocity(self) -> Tensor:
        """Forward pass."""
        import torch

        with torch.autocast(self.device.type, torch.bfloat16):
            return self.pipeline.predict(self.latents, self.timesteps, self.conditioning, self.guidance)

    def gradients(self) -> Tensor:
        """Forward and backward pass; the loss."""
        import torch

        loss = torch.nn.functional.mse_loss(self.velocity().float(), self.target)
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        """As a trainer takes it: gradients, optimizer, gradients set free."""
        self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seconds(self, steps: int, warm_up: int = 1) -> float:
        """The fastest of some steps, on the clock; on a CPU its processor time, which other programs disturb less."""
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        taken = []
        for _ in range(warm_up + steps):
            wait(self.device)
            start = clock()
            self.step()
            wait(self.device)
            taken.append(clock() - start)
        return min(taken[warm_up:])

    def flops(self) -> int:
        """Of a step's products, as torch counts them (without attention where torch doesn't know its kernel)."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            self.step()
        return counter.get_total_flops()

    @contextmanager
    def with_plan(self, plan: MemoryPlan) -> Iterator[Any]:
        """For a while, the blocks work by that plan; afterwards every weight is on the device."""
        from library.memory.apply import apply_memory_plan

        applied = apply_memory_plan(self.pipeline.block_lists(), plan, self.device)
        try:
            yield applied
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            applied.remove()
            self.transformer.to(self.device)
            empty_cache(self.device)


def streaming_plan(plan: MemoryPlan, pipeline: FluxPipeline, count: int, pinned: bool) -> tuple[MemoryPlan, Any]:
    """``plan`` with what ``--blocks_to_swap count`` streams, and those blocks."""
    blocks = pipeline.swap_blocks(count, 2)
    return replace(plan, streaming=blocks.streaming(pinned)), blocks


def wait(device: torch.device) -> None:
    """Until the device has done all that it was told."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def empty_cache(device: torch.device) -> None:
    """Give back the memory that nothing uses any more."""
    import gc

    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def start_peak(device: torch.device) -> None:
    """Measure the device's memory from now on."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: torch.device) -> int | None:
    """The most that has lain on the device since ``start_peak``; None where nothing counts it."""
    import torch

    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def product_limit(device: torch.device) -> tuple[float, str]:
    """FLOP per second that the device can reach in bfloat16, and where that figure is from."""
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, (products, _) in LIMITS.items():
            if part in name:
                return products, f"the table's figure for {part}"
    side = 8192 if device.type == "cuda" else 768
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    clock, taken = (time.perf_counter if device.type == "cuda" else time.process_time), []
    for _ in range(6):
        wait(device)
        start = clock()
        a @ b
        wait(device)
        taken.append(clock() - start)
    return 2 * side**3 / min(taken), f"a product of {side} x {side} matrices, measured here"
