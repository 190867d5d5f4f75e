"""Activation checkpointing: of what a block computes, little is kept for the backward pass, which computes it again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from library.deferred_compiler import defer_compiler
from library.memory.activations import OffloadedInputs

ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
"""torch's operations behind scaled_dot_product_attention."""


def checkpointed(
    call: Callable[..., Any], offloaded: OffloadedInputs | None = None, keeps_attention: bool = False
) -> Callable[..., Any]:
    """``call``, but only the tensors among its arguments are kept for the backward pass, which calls it again.

    With ``offloaded`` those that are trained wait in system RAM. With ``keeps_attention`` the outputs of attention are
    kept, too, so that attention runs once only.
    """
    defer_compiler()  # torch marks each call as not to be compiled
    contexts: dict[str, Any] = {}
    if keeps_attention:
        known = [getattr(torch.ops.aten, name) for name in ATTENTION if hasattr(torch.ops.aten, name)]
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, [each.default for each in known])

    def run(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return call(*inputs, **named)
        # Among positional arguments only does torch look for the tensors that it keeps.
        count, names = len(inputs), tuple(named)

        def again(*values: Any) -> Any:
            return call(*values[:count], **dict(zip(names, values[count:])))

        values = (*inputs, *named.values())
        # Nothing but these arguments is saved while the hooks are active, so nothing else goes to system RAM.
        with nullcontext() if offloaded is None else offloaded.around(values):
            return checkpoint(again, *values, use_reentrant=False, **contexts)

    return run
