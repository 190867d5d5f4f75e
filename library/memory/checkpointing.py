"""Activation checkpointing: of a block, with what is kept in system RAM if requested."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def checkpointed(call: Callable[..., Any], offload_inputs: bool = False) -> Callable[..., Any]:
    """``call``, but only the tensors among its arguments are kept for the backward pass, which calls it again.

    With ``offload_inputs`` they are kept in system RAM.
    """

    def run(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return call(*inputs, **named)
        # Among positional arguments only does torch look for the tensors that it keeps.
        count, names = len(inputs), tuple(named)

        def again(*values: Any) -> Any:
            return call(*values[:count], **dict(zip(names, values[count:])))

        values = (*inputs, *named.values())
        on_accelerator = any(isinstance(value, torch.Tensor) and value.is_cuda for value in values)
        # Nothing but these arguments is saved while the hooks are active, so nothing else goes to system RAM.
        hooks = torch.autograd.graph.save_on_cpu(pin_memory=on_accelerator) if offload_inputs else nullcontext()
        with hooks:
            return checkpoint(again, *values, use_reentrant=False)

    return run
