"""Activation checkpointing: with what is kept in system RAM, and in models of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def checkpoint_in_main_memory(module: Callable[..., Any], *inputs: Any) -> Any:
    """Call ``module``; its inputs are kept in system RAM and all else is computed again in the backward pass.

    For ``gradient_checkpointing_func`` of diffusers' models, which call it for each block.
    """
    # Only the checkpoint's inputs are saved while these hooks are active, so only they go to system RAM.
    on_accelerator = any(isinstance(value, torch.Tensor) and value.is_cuda for value in inputs)
    with torch.autograd.graph.save_on_cpu(pin_memory=on_accelerator):
        return checkpoint(module, *inputs, use_reentrant=False)


def checkpoint_layers(model: Any) -> None:
    """Switch on checkpointing in a model of transformers, which has renamed the method."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
