"""Deep Shrink in diffusers' U-Net: its inner blocks work on a smaller image while there is much noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library.models.sampling import ModelCall, RunModel, StepHook


@dataclass(frozen=True)
class Shrinking:
    """Where the image is shrunk at which noise."""

    depth_1: int
    """The entry (see ``entries``) before which it is shrunk at timesteps from ``timesteps_1`` on."""
    timesteps_1: int
    depth_2: int | None
    """The same at those from ``timesteps_2`` on that are below ``timesteps_1``; None: not there."""
    timesteps_2: int
    ratio: float
    """Of height and width, above 0 to 1."""

    def depth(self, timestep: float) -> int | None:
        """The entry before which the image is shrunk at ``timestep``; None: nowhere."""
        if timestep >= self.timesteps_1:
            return self.depth_1
        return self.depth_2 if timestep >= self.timesteps_2 else None


def entries(unet: Any, single_layers: bool) -> list[nn.Module]:
    """The modules that can be given a smaller image, by depth.

    Of XL (``single_layers``) they are the first convolution and then every layer on the way down, residual blocks and
    downsamplers; of the others, the stages.
    """
    if not single_layers:
        return list(unet.down_blocks)
    layers = [layer for stage in unet.down_blocks for layer in (*stage.resnets, *(stage.downsamplers or ()))]
    return [unet.conv_in, *layers]


class DeepShrink(StepHook):
    """Shrinks hidden states on the way down; on the way up, each gets the size of what it is joined with."""

    def __init__(self, shrinking: Shrinking, single_layers: bool):
        self.shrinking = shrinking
        self.single_layers = single_layers
        self.depth: int | None = None
        """The entry that shrinks in the current call of the model."""
        self.size: torch.Size | None = None
        """Height and width of the latents."""

    def around(self, run: RunModel, call: ModelCall) -> Tensor:
        """The call, with the entry of its timestep."""
        self.depth, self.size = self.shrinking.depth(float(call.step.timestep)), call.latents.shape[-2:]
        try:
            return run(call)
        finally:
            self.depth = None

    @contextmanager
    def attached(self, denoiser: Any) -> Iterator[None]:
        """While it is active, the entries can shrink and the blocks on the way up resize."""
        with ExitStack() as hooks:
            for depth, module in enumerate(entries(denoiser, self.single_layers)):
                entry = module.register_forward_pre_hook(partial(self._enter, depth), with_kwargs=True)
                hooks.callback(entry.remove)
            hooks.callback(denoiser.conv_norm_out.register_forward_pre_hook(self._leave).remove)
            for block in denoiser.up_blocks:
                hooks.enter_context(_replaced_forward(block, partial(self._up, block, block.forward)))
            yield

    def _enter(self, depth: int, module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if depth != self.depth:
            return None
        if positional:
            return (shrunk(positional[0], self.shrinking.ratio), *positional[1:]), named
        return positional, {**named, "hidden_states": shrunk(named["hidden_states"], self.shrinking.ratio)}

    def _leave(self, module: nn.Module, positional: tuple[Any, ...]) -> Any:
        return (resized(positional[0], self.size),) if self.depth is not None and self.size is not None else None

    def _up(
        self,
        block: Any,
        forward: Any,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        upsample_size: Any = None,
        **named: Any,
    ) -> Tensor:
        """diffusers' own forward, with hidden states that are resized to what they are joined with."""
        if self.depth is None:
            texts = {} if encoder_hidden_states is None else {"encoder_hidden_states": encoder_hidden_states}
            return forward(
                hidden_states=hidden_states,
                res_hidden_states_tuple=res_hidden_states_tuple,
                temb=temb,
                upsample_size=upsample_size,
                **texts,
                **named,
            )
        for index, (resnet, skip) in enumerate(zip(block.resnets, reversed(res_hidden_states_tuple))):
            hidden_states = torch.cat([resized(hidden_states, skip.shape[-2:]), skip], dim=1)
            hidden_states = resnet(hidden_states, temb)
            if hasattr(block, "attentions"):
                attention = block.attentions[index]
                hidden_states = attention(
                    hidden_states, encoder_hidden_states=encoder_hidden_states, return_dict=False
                )[0]
        for upsampler in block.upsamplers or ():
            hidden_states = upsampler(hidden_states, upsample_size)
        return hidden_states


@contextmanager
def _replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """While it is active, ``module`` runs ``forward``."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def shrunk(hidden_states: Tensor, ratio: float) -> Tensor:
    """[B, C, h, w] to that share of height and width, at least 1 each, bicubic."""
    if ratio >= 1:
        return hidden_states
    smallest = min(hidden_states.shape[-2:])
    if int(smallest * ratio) < 1:
        return resized(hidden_states, tuple(max(1, int(side * ratio)) for side in hidden_states.shape[-2:]))
    return _bicubic(hidden_states, scale_factor=ratio)


def resized(hidden_states: Tensor, size: Any) -> Tensor:
    """[B, C, h, w] with ``size`` as height and width, bicubic."""
    if tuple(hidden_states.shape[-2:]) == tuple(size):
        return hidden_states
    return _bicubic(hidden_states, size=tuple(size))


def _bicubic(values: Tensor, **to: Any) -> Tensor:
    """In float32 at least: bfloat16 is not everywhere available."""
    wide = values.float() if values.dtype == torch.bfloat16 else values
    return torch.nn.functional.interpolate(wide, mode="bicubic", align_corners=False, **to).to(values.dtype)
