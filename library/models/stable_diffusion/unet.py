"""diffusers' U-Net as it is used here: its blocks, our attention backends, and no work without effect."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from library.lean_imports import diffusers_class
from library.models.attention import AttentionBackend, attention
from library.models.loading import on_meta

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def meta_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    """diffusers' U-Net of these arguments on torch's meta device.

    Its ``forward`` is the one inside diffusers' decorator, which imports PEFT at each call to look for layers of it.
    Attention and residual blocks have forwards that compute the same without divisions by 1, which cost a pass over the
    activations each, and without a look at the attention processor's signature at each call.
    """
    with on_meta():
        unet = diffusers_class("UNet2DConditionModel")(**config)
    inner = getattr(type(unet).forward, "__wrapped__", None)
    if inner is not None:
        unet.forward = MethodType(inner, unet)
    for module in unet.modules():
        if type(module).__name__ == "Attention":
            module.forward = MethodType(_attend, module)
        elif _is_plain_residual(module):
            module.forward = MethodType(_residual, module)
    return unet


def _attend(
    attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: None = None
) -> Tensor:
    """What the attention's processor makes of ``hidden_states``; nothing is masked in these U-Nets."""
    return attn.processor(attn, hidden_states, encoder_hidden_states=encoder_hidden_states)


def _is_plain_residual(module: Any) -> bool:
    """Whether a module is a residual block as these U-Nets have them, neither resized nor rescaled."""
    return (
        type(module).__name__ == "ResnetBlock2D"
        and module.time_embedding_norm == "default"
        and module.time_emb_proj is not None
        and not module.skip_time_act
        and module.upsample is module.downsample is None
        and module.output_scale_factor == 1
        and module.dropout.p == 0
    )


def _residual(block: Any, input_tensor: Tensor, temb: Tensor) -> Tensor:
    """[batch, channels, height, width] and time embeddings [batch, channels of the embedding] to the same size."""
    hidden_states = block.conv1(block.nonlinearity(block.norm1(input_tensor)))
    hidden_states = hidden_states + block.time_emb_proj(block.nonlinearity(temb))[:, :, None, None]
    hidden_states = block.conv2(block.nonlinearity(block.norm2(hidden_states)))
    if block.conv_shortcut is not None:
        input_tensor = block.conv_shortcut(input_tensor)
    return input_tensor + hidden_states


def block_lists(unet: Any) -> dict[str, list[nn.Module]]:
    """The residual blocks and transformer blocks of each part of diffusers' ``unet``, in the order in which they run.

    They are what diffusers' own checkpointing computes again.
    """
    parts = {"down_blocks": unet.down_blocks, "mid_block": [unet.mid_block], "up_blocks": unet.up_blocks}
    return {name: [block for stage in stages for block in _stage_blocks(stage)] for name, stages in parts.items()}


def _stage_blocks(stage: Any) -> Iterator[nn.Module]:
    for resnet, attention_blocks in zip_longest(stage.resnets, getattr(stage, "attentions", ())):
        yield resnet
        yield from () if attention_blocks is None else attention_blocks.transformer_blocks


class BackendProcessor:
    """Attention of a U-Net's transformer blocks through ``library.models.attention``.

    (diffusers' own sliced attention keeps every attention matrix for the backward pass, so training would need more
    memory with it than without.)
    """

    def __init__(self, backend: AttentionBackend):
        self.backend: AttentionBackend = backend

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        """[batch, positions, channels] to the same, attending to itself or to ``encoder_hidden_states``."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        query, key, value = (tensor.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for tensor in projected)
        return attn.to_out[0](attention(query, key, value, backend=self.backend))


def set_attention_backend(unet: Any, backend: AttentionBackend) -> None:
    """Let all attention of diffusers' ``unet`` run on ``backend``."""
    unet.set_attn_processor(BackendProcessor(backend))
