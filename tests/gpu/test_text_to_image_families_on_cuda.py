"""On a CUDA device: Lumina Image 2.0 and HunyuanImage-2.1 train in 8 bits, streamed, and with each attention."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from library.models.attention import PACKAGES
from library.models.hunyuan_image.transformer import HunyuanImageTransformer
from library.models.lumina.transformer import LuminaTransformer
from tests.families.families import TINY
from tests.running import train
from tools.make_tiny_models import HUNYUAN_IMAGE, LUMINA
from tools.tiny_parts import fill_randomly

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NAMES = ("lumina", "hunyuan_image")
Lora = dict[str, Tensor]


@pytest.fixture
def trained(request: pytest.FixtureRequest, dataset_toml, tmp_path: Path) -> Callable[..., Lora]:
    """Trains the tiny model of a family for two steps; returns the LoRA."""

    def run(name: str, *options: str) -> Lora:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        command = TINY[name].command(request.getfixturevalue(f"tiny_{name}"))
        given = (*command, "--dataset_config", dataset_toml(), "--output_dir", folder, "--max_train_steps", "2")
        train(name, *given, "--optimizer_type", "SGD", "--mixed_precision", *options)
        return load_file(folder / "last.safetensors")

    return run


def size(lora: Lora, other: Lora | None = None) -> float:
    """The norm of all ``lora_up``, which begin as zeros, or of their difference from another's."""
    parts = [value - (other[key] if other else 0) for key, value in lora.items() if key.endswith("lora_up.weight")]
    return torch.cat([part.flatten() for part in parts]).norm().item()


@pytest.mark.parametrize("name", NAMES)
def test_eight_bits_and_streamed_blocks_change_a_step_little(name, trained):
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels add up in any order
        plain = trained(name, "bf16", "--gradient_checkpointing")
        scaled = trained(name, "bf16", "--gradient_checkpointing", "--fp8_scaled")
        streamed = trained(name, "bf16", "--gradient_checkpointing", "--fp8_scaled", "--blocks_to_swap", "1")
    assert 0 < size(scaled, plain) < 0.3 * size(plain)
    assert size(streamed, scaled) < 1e-3 * size(scaled)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", ["fp16", "bf16 --cpu_offload_checkpointing", "bf16 --fused_backward_pass"])
def test_half_precision_trains(name, trained, options):
    """In float16 the first steps may be left out until the scale of its gradients fits."""
    given = ["--optimizer_type", "Adafactor"] if "fused" in options else []
    lora = trained(name, *options.split(), "--gradient_checkpointing", "--max_train_steps", "20", *given)
    assert all(tensor.isfinite().all() for tensor in lora.values()) and size(lora) > 0


def transformer(name: str) -> nn.Module:
    """A random one whose heads are as wide as the real one's."""
    if name == "lumina":
        sizes = {"dim": 192, "heads": 2, "kv_heads": 1, "head_dim": 96, "ffn_dim": 256, "axes_dims": (32, 32, 32)}
        module: nn.Module = LuminaTransformer(replace(LUMINA, **sizes))
    else:
        module = HunyuanImageTransformer(replace(HUNYUAN_IMAGE, hidden_size=256, num_heads=2, axes_dims=(64, 64)))
    fill_randomly(module, 3, name)
    return module


@pytest.mark.parametrize("backend", PACKAGES)
@pytest.mark.parametrize("name", NAMES)
def test_each_attention_gives_nearly_the_same(name, backend):
    """With captions of two lengths, and of HunyuanImage's one that quotes a text."""
    try:
        importlib.import_module(PACKAGES[backend])
    except ImportError:
        pytest.skip(f"needs {PACKAGES[backend]}")
    module, random = transformer(name).to("cuda", torch.bfloat16), torch.Generator().manual_seed(1)
    channels, width = (16, LUMINA.text_dim) if name == "lumina" else (64, HUNYUAN_IMAGE.text_dim)
    latents, text, glyphs = (
        torch.randn(shape, generator=random).to("cuda", torch.bfloat16)
        for shape in ((2, channels, 8, 8), (2, 24, width), (2, 16, HUNYUAN_IMAGE.glyph_dim))
    )
    mask, glyph_mask = torch.ones(2, 24), torch.zeros(2, 16)
    mask[0, 15:], glyph_mask[1, :9] = 0, 1
    inputs = [torch.full((2,), 0.5, device="cuda"), text, mask]
    inputs += [] if name == "lumina" else [glyphs, glyph_mask]

    def drawn(used: str) -> tuple[Tensor, Tensor | None]:
        module.set_attention_backend(used)
        given = latents.clone().requires_grad_(used != "sage")
        out = module(given, *inputs)
        if used != "sage":
            out.float().square().mean().backward()
        return out.float(), given.grad

    (expected, gradient), (found, found_gradient) = drawn("sdpa"), drawn(backend)
    assert (found - expected).norm() < 0.05 * expected.norm()
    if found_gradient is not None and gradient is not None:
        assert (found_gradient - gradient).float().norm() < 0.05 * gradient.float().norm()
