"""The FLUX.1 transformer, under the names of the original checkpoints (github.com/black-forest-labs/flux).

It maps noisy packed latents, text and a timestep to the velocity (noise minus image). Blocks are built from modulation
modules that are handed in, so that a relative which computes its modulations elsewhere can use the same blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from library.devices import to_device
from library.models import transformer_parts
from library.models.attention import AttentionBackend, attention, require_backend
from library.models.transformer_parts import (
    LastLayer,
    apply_rope,
    clip_float16,
    modulate,
    modulations,
    rms_norm,
    rope_rotations,
    split_heads,
)

KEPT_POSITIONS = 8
"""Sizes of images whose rotations are kept."""
Modulations = tuple[Tensor, ...]  # shift, scale, gate (, shift, scale, gate): each [batch, 1, hidden]


@dataclass(frozen=True)
class FluxConfig:
    """Everything that fixes the network's shape; the defaults are FLUX.1 [dev]."""

    hidden_size: int = 3072
    num_heads: int = 24
    depth: int = 19
    depth_single: int = 38
    in_channels: int = 64
    out_channels: int = 64
    context_dim: int = 4096
    vector_dim: int = 768
    time_dim: int = 256
    mlp_hidden: int = 12288
    axes_dims: tuple[int, ...] = (16, 56, 56)
    theta: float = 10000.0
    guidance_embed: bool = True
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden size {self.hidden_size} is not a multiple of {self.num_heads} heads")
        if sum(self.axes_dims) != self.head_dim or any(dim % 2 for dim in self.axes_dims):
            raise ValueError(
                f"RoPE axes {self.axes_dims} must be even and add up to the head dimension {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """The share of each position axis (unused, row, column) in a head: 1/8, 7/16, 7/16, as in FLUX.1's 16, 56, 56."""
    return (head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16)


def pack_latents(latents: Tensor) -> Tensor:
    """[batch, channels, h, w] -> [batch, (h/2) * (w/2), channels * 4], tokens row by row, channel order (c, dy, dx)."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``pack_latents``; ``height`` and ``width`` are those of the latents."""
    batch, _, channels = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, channels // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, height, width)


def image_ids(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Positions (0, row, column) of packed latents of size ``height`` x ``width``: [(h/2) * (w/2), 3], float32."""
    ids = torch.zeros(height // 2, width // 2, 3, device=device)
    ids[..., 1] = torch.arange(height // 2, device=device)[:, None]
    ids[..., 2] = torch.arange(width // 2, device=device)[None, :]
    return ids.flatten(0, 1)


def sinusoid(values: Tensor, dim: int) -> Tensor:
    """Embed ``values`` [batch] (timestep in 0..1, or guidance), times 1000, as [batch, dim] float32."""
    return transformer_parts.sinusoid(1000.0 * values.float(), dim)


def joint_key_mask(txt_attention_mask: Tensor | None, img: Tensor) -> Tensor | None:
    """Which keys are attended to, [B, L + S] boolean: text as its mask [B, L] says, every image token of ``img``."""
    if txt_attention_mask is None:
        return None
    return F.pad(to_device(txt_attention_mask, img.device).bool(), (0, img.shape[1]), value=True)


class MLPEmbedder(nn.Module):
    """A vector of another width to the hidden one: Linear, SiLU, Linear."""

    def __init__(self, in_dim: int, hidden_dim: int):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim)
        self.out_layer = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension in float32; its weight is called ``scale`` in the checkpoints."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale, 1e-6)


class QKNorm(nn.Module):
    """The norms of queries and keys, over the width of a head."""

    def __init__(self, dim: int):
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)


class SelfAttention(nn.Module):
    """The projections of one stream; the attention itself joins both streams and lives in the block."""

    def __init__(self, hidden_size: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, hidden_size * 3, bias=qkv_bias)
        self.norm = QKNorm(hidden_size // num_heads)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[batch, tokens, hidden] -> three of [batch, heads, tokens, head_dim], queries and keys normed."""
        return split_heads(self.qkv(x), self.num_heads, self.norm.query_norm, self.norm.key_norm)


class Modulation(nn.Module):
    """``count`` modulation vectors from the conditioning vector [batch, hidden]."""

    def __init__(self, hidden_size: int, count: int):
        super().__init__()
        self.count = count
        self.lin = nn.Linear(hidden_size, count * hidden_size)

    def forward(self, vec: Tensor) -> Modulations:
        return modulations(self.lin, vec, self.count)


def feed_forward(hidden_size: int, mlp_hidden: int) -> nn.Sequential:
    """Linear, GELU (tanh form), Linear; indices 0 and 2 hold the weights, as in the checkpoints."""
    return nn.Sequential(
        nn.Linear(hidden_size, mlp_hidden), nn.GELU(approximate="tanh"), nn.Linear(mlp_hidden, hidden_size)
    )


def add_residual(tokens: Tensor, residuals: Sequence[Tensor | None] | None, block: int) -> Tensor:
    """``tokens`` [B, tokens, hidden] plus a ControlNet's residual for that block, if there is one.

    A residual with fewer tokens is for the last of them, which are the image's.
    """
    residual = residuals[block] if residuals is not None else None
    if residual is None:
        return tokens
    others = tokens.shape[1] - residual.shape[1]
    residual = residual.to(tokens.dtype)
    return tokens + (F.pad(residual, (0, 0, others, 0)) if others else residual)


class DoubleStreamBlock(nn.Module):
    """Text and image tokens with weights of their own and one joint attention, text first."""

    def __init__(self, config: FluxConfig, img_mod: nn.Module, txt_mod: nn.Module):
        super().__init__()
        self.attention_backend: AttentionBackend = "sdpa"
        self.img_mod = img_mod
        self.img_attn = SelfAttention(config.hidden_size, config.num_heads, config.qkv_bias)
        self.img_mlp = feed_forward(config.hidden_size, config.mlp_hidden)
        self.txt_mod = txt_mod
        self.txt_attn = SelfAttention(config.hidden_size, config.num_heads, config.qkv_bias)
        self.txt_mlp = feed_forward(config.hidden_size, config.mlp_hidden)

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, rope: Tensor, key_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)

        img_qkv = self.img_attn.query_key_value(modulate(img, img_shift1, img_scale1))
        txt_qkv = self.txt_attn.query_key_value(modulate(txt, txt_shift1, txt_scale1))
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv))
        attended = attention(apply_rope(query, rope), apply_rope(key, rope), value, key_mask, self.attention_backend)
        txt_attended, img_attended = attended.split((txt.shape[1], img.shape[1]), dim=1)

        img = torch.addcmul(img, img_gate1, self.img_attn.proj(img_attended))
        img = torch.addcmul(img, img_gate2, self.img_mlp(modulate(img, img_shift2, img_scale2)))
        txt = torch.addcmul(txt, txt_gate1, self.txt_attn.proj(txt_attended))
        txt = torch.addcmul(txt, txt_gate2, self.txt_mlp(modulate(txt, txt_shift2, txt_scale2)))
        return img, clip_float16(txt)


class SingleStreamBlock(nn.Module):
    """Text and image tokens as one sequence; attention and feed-forward side by side."""

    def __init__(self, config: FluxConfig, modulation: nn.Module):
        super().__init__()
        self.attention_backend: AttentionBackend = "sdpa"
        self.num_heads = config.num_heads
        self.widths = (3 * config.hidden_size, config.mlp_hidden)
        self.linear1 = nn.Linear(config.hidden_size, sum(self.widths))
        self.linear2 = nn.Linear(config.hidden_size + config.mlp_hidden, config.hidden_size)
        self.norm = QKNorm(config.head_dim)
        self.modulation = modulation

    def forward(self, x: Tensor, vec: Tensor, rope: Tensor, key_mask: Tensor | None = None) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1(modulate(x, shift, scale)).split(self.widths, dim=-1)
        query, key, value = split_heads(qkv, self.num_heads, self.norm.query_norm, self.norm.key_norm)
        attended = attention(apply_rope(query, rope), apply_rope(key, rope), value, key_mask, self.attention_backend)
        out = self.linear2(torch.cat((attended, F.gelu(mlp, approximate="tanh")), dim=-1))
        return clip_float16(torch.addcmul(x, gate, out))


class StreamTransformer(nn.Module):
    """What the FLUX family shares: the two lists of blocks, and how they are run."""

    double_blocks: nn.ModuleList
    single_blocks: nn.ModuleList
    img_in: nn.Linear

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        self.kept_positions: list[tuple[Tensor, Tensor]] = []
        """Ids and rotations of joint sequences, the newest first."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations; 8-bit weights are stored only, and computed with in bfloat16."""
        dtype = self.img_in.weight.dtype
        return dtype if dtype.itemsize > 1 else torch.bfloat16

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.img_in.weight.device

    def set_attention_backend(self, backend: AttentionBackend) -> None:
        """Raises UserError when the backend's package isn't installed."""
        require_backend(backend)
        for block in (*self.double_blocks, *self.single_blocks):
            block.attention_backend = backend

    def run_blocks(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        rope: Tensor,
        key_mask: Tensor | None,
        double_residuals: Sequence[Tensor | None] | None = None,
        single_residuals: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """All blocks; returns the image tokens [batch, image tokens, hidden]. Residuals are those of ``forward``."""
        for number, block in enumerate(self.double_blocks):
            img, txt = block(img, txt, vec, rope, key_mask)
            img = add_residual(img, double_residuals, number)
        joined = torch.cat((txt, img), dim=1)
        for number, block in enumerate(self.single_blocks):
            joined = block(joined, vec, rope, key_mask)
            joined = add_residual(joined, single_residuals, number)
        return joined[:, txt.shape[1] :]

    def positions(self, img_ids: Tensor, txt_ids: Tensor, batch: int) -> Tensor:
        """Rotations of the joint sequence, text first, on the model's device.

        Ids may be [tokens, 3] or [batch, tokens, 3]. The rotations of ids that are in system RAM are kept, because the
        next images of that size need the same.
        """
        ids = torch.cat(
            [ids if ids.dim() == 3 else ids.expand(batch, *ids.shape) for ids in (txt_ids, img_ids.to(txt_ids.device))],
            dim=1,
        )
        device = self.device
        if ids.device.type != "cpu" or isinstance(ids, FakeTensor):
            return rope_rotations(ids.to(device), self.config.axes_dims, self.config.theta)
        for known, rotations in self.kept_positions:
            if rotations.device == device and numpy.array_equal(known.numpy(), ids.numpy()):
                return rotations
        rotations = rope_rotations(ids.to(device), self.config.axes_dims, self.config.theta)
        self.kept_positions = [(ids, rotations), *self.kept_positions[: KEPT_POSITIONS - 1]]
        return rotations


class FluxStreams(StreamTransformer):
    """FLUX.1 but for its last layer: what goes in, and the blocks. A ControlNet is one too."""

    def __init__(self, config: FluxConfig):
        super().__init__(config)
        hidden = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, hidden)
        self.time_in = MLPEmbedder(config.time_dim, hidden)
        self.vector_in = MLPEmbedder(config.vector_dim, hidden)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(config.time_dim, hidden)
        self.txt_in = nn.Linear(config.context_dim, hidden)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(config, Modulation(hidden, 6), Modulation(hidden, 6)) for _ in range(config.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(config, Modulation(hidden, 3)) for _ in range(config.depth_single)
        )

    def conditioning_vector(self, timesteps: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:
        """Timestep, guidance and pooled text [B, ...] as one vector [B, hidden]."""
        vec = self.time_in(sinusoid(timesteps, self.config.time_dim).to(self.dtype))
        if self.config.guidance_embed:
            if guidance is None:
                raise ValueError("this transformer is guidance-distilled: it needs a guidance value for each item")
            vec = vec + self.guidance_in(sinusoid(guidance, self.config.time_dim).to(self.dtype))
        return vec + self.vector_in(pooled.to(self.dtype))


class FluxTransformer(FluxStreams):
    """FLUX.1 [dev] and [schnell]; the state dict has the keys of the original checkpoints."""

    def __init__(self, config: FluxConfig):
        super().__init__(config)
        self.final_layer = LastLayer(config.hidden_size, config.out_channels)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        txt_attention_mask: Tensor | None = None,
        double_residuals: Sequence[Tensor | None] | None = None,
        single_residuals: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """The velocity [batch, S, out_channels] of packed noisy latents.

        ``img`` [batch, S, in_channels]; ``img_ids`` [S, 3] or [batch, S, 3]; ``txt`` [batch, L, context_dim];
        ``txt_ids`` as ``img_ids``; ``timesteps`` [batch] in 0..1 and ``guidance`` [batch], both float32 (the latter
        ignored by models without a guidance embedding); ``y`` [batch, vector_dim] pooled text; ``txt_attention_mask``
        [batch, L], non-zero where text tokens are attended to (None: all). The residuals are a ControlNet's, one for
        each block (or None): added to the image tokens after a double block, and after a single block to as many of the
        last tokens as they have.
        """
        vec = self.conditioning_vector(timesteps, y, guidance)
        rope = self.positions(img_ids, txt_ids, len(img))
        tokens = self.run_blocks(
            self.img_in(img.to(self.dtype)),
            self.txt_in(txt.to(self.dtype)),
            vec,
            rope,
            joint_key_mask(txt_attention_mask, img),
            double_residuals,
            single_residuals,
        )
        return self.final_layer(tokens, vec)
