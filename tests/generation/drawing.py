"""What the tests of several inference scripts do with a run, with images, and with LoRA files."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor


def latents(run: Any) -> Tensor:
    """The latents of the run's first prompt."""
    prompt = run.prompts()[0]
    run.encode([prompt])
    return run.latents(prompt)


def pixels(path: Path) -> bytes:
    """An image file's pixels."""
    with Image.open(path) as image:
        return image.tobytes()


def text_of(path: Path) -> dict[str, str]:
    """The text in an image file."""
    with Image.open(path) as image:
        return dict(image.text)


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors' values."""
    return (a - b).abs().max().item()


def moves(run: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is loaded, moved to the device and moved to the CPU (as a string, where parts rest) from now on."""
    seen: list[tuple[str, str]] = []
    load, move = run.parts._load, run.pipeline.move
    monkeypatch.setattr(run.parts, "_load", lambda part: (seen.append((part, "load")), load(part)))
    at = {"cpu": "cpu", run.pipeline.device: "device"}
    monkeypatch.setattr(run.pipeline, "move", lambda part, to: (seen.append((part, at[to])), move(part, to)))
    return seen


def write_random_network(
    path: Path, module: ModuleType, encoders: list[Any], transformer: Any, seed: int, alpha: float, **arguments: str
) -> Path:
    """A file of a network of rank 4 with random weights."""
    network = module.create_network(1.0, 4, alpha, None, encoders, transformer, **arguments)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    network.save_weights(path, None, {})
    return path


def with_lora(state: dict[str, Tensor], prefix: str, lora: Path, strength: float) -> dict[str, Tensor]:
    """Weights of the original names with the LoRA's product added, in float64."""
    tensors, added = load_file(lora), 0
    merged = dict(state)
    for name, weight in state.items():
        key = prefix + name.removesuffix(".weight").replace(".", "_")
        if f"{key}.lora_up.weight" in tensors:
            up, down = (tensors[f"{key}.lora_{way}.weight"].double() for way in ("up", "down"))
            factor = strength * tensors[f"{key}.alpha"].item() / len(down)
            merged[name] = (weight.double() + factor * up @ down).to(weight.dtype)
            added += 1
    assert added == sum(key.endswith(".alpha") and key.startswith(prefix) for key in tensors)
    return merged
