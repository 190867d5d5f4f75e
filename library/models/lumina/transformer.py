"""The Lumina Image 2.0 transformer (Next-DiT), under the names of the original checkpoints.

It maps noisy latents, caption features and the time to the velocity (image minus noise). Captions and image are refined
apart by a few blocks each, then pass through the others as one sequence. See github.com/Alpha-VLLM/Lumina-Image-2.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from library.devices import to_device
from library.models.attention import AttentionBackend, attention, require_backend
from library.models.transformer_parts import (
    GridRotations,
    RMSNorm,
    TimeEmbedder,
    apply_rope,
    clip_float16,
    rope_rotations,
    token_lengths,
)

THETA = 10000.0
NORM_EPS = 1e-5
HEAD_NORM_EPS = 1e-6
"""Of the norms of queries and keys, as in the original code; diffusers takes 1e-5, whose results differ by 4e-6."""
CAPTION_STEP = 256
"""The rotations of captions are computed for a multiple of this many tokens."""


@dataclass(frozen=True)
class LuminaConfig:
    """Everything that fixes the network's shape; the defaults are Lumina Image 2.0, with 2.6 billion parameters."""

    dim: int = 2304
    heads: int = 24
    kv_heads: int = 8
    """Heads of keys and values; each is shared by several neighbouring heads of queries."""
    head_dim: int = 96
    layers: int = 26
    refiner_layers: int = 2
    """Blocks in each of the two refiners."""
    ffn_dim: int = 9216
    text_dim: int = 2304
    """Width of the caption features."""
    time_dim: int = 1024
    """Width of the embedded time that all modulations are made from."""
    frequency_dim: int = 256
    latent_channels: int = 16
    axes_dims: tuple[int, ...] = (32, 32, 32)
    """The share of each position axis (caption, row, column) in a head."""

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads of queries cannot share {self.kv_heads} heads of keys and values")
        if len(self.axes_dims) != 3 or sum(self.axes_dims) != self.head_dim or any(dim % 2 for dim in self.axes_dims):
            raise ValueError(
                f"the RoPE axes {tuple(self.axes_dims)} must be three even numbers that add up to the head dimension "
                f"{self.head_dim}"
            )


def patchify(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, (h/2) * (w/2), 4 * C]: tokens row by row, in a token the order (dy, dx, c)."""
    batch, channels, height, width = latents.shape
    if height % 2 or width % 2:
        raise ValueError(f"latents of {width} x {height} cannot be cut into patches of 2 x 2")
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, (height // 2) * (width // 2), 4 * channels)


def unpatchify(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``patchify``; ``height`` and ``width`` are those of the latents."""
    batch, _, channels = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, 2, 2, channels // 4)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels // 4, height, width)


class JointAttention(nn.Module):
    """Self-attention whose keys and values have fewer heads than its queries."""

    def __init__(self, config: LuminaConfig):
        super().__init__()
        self.backend: AttentionBackend = "sdpa"
        self.head_counts = (config.heads, config.kv_heads, config.kv_heads)
        width = config.heads * config.head_dim
        self.qkv = nn.Linear(config.dim, sum(self.head_counts) * config.head_dim, bias=False)
        self.out = nn.Linear(width, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, HEAD_NORM_EPS)
        self.k_norm = RMSNorm(config.head_dim, HEAD_NORM_EPS)

    def forward(self, x: Tensor, rope: Tensor, key_mask: Tensor | None) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (sum(self.head_counts), -1)).transpose(1, 2)
        query, key, value = heads.split(self.head_counts, dim=1)
        query, key = apply_rope(self.q_norm(query), rope), apply_rope(self.k_norm(key), rope)
        return self.out(attention(query, key, value, key_mask, self.backend))


class FeedForward(nn.Module):
    """SwiGLU: ``w2(silu(w1(x)) * w3(x))``."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return clip_float16(self.w2(clip_float16(F.silu(self.w1(x)) * self.w3(x))))


class JointTransformerBlock(nn.Module):
    """Attention and feed-forward, each between two norms; scaled and gated by the time where it is ``modulated``."""

    def __init__(self, config: LuminaConfig, modulated: bool = True):
        super().__init__()
        self.attention = JointAttention(config)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)
        self.attention_norm1 = RMSNorm(config.dim, NORM_EPS)
        self.attention_norm2 = RMSNorm(config.dim, NORM_EPS)
        self.ffn_norm1 = RMSNorm(config.dim, NORM_EPS)
        self.ffn_norm2 = RMSNorm(config.dim, NORM_EPS)
        self.modulated = modulated
        if modulated:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.time_dim, 4 * config.dim))

    def forward(self, x: Tensor, rope: Tensor, key_mask: Tensor | None = None, vec: Tensor | None = None) -> Tensor:
        """``x`` [B, tokens, dim]; ``rope`` [B or 1, 1, tokens, head_dim / 2]; ``key_mask`` [B, tokens] boolean, where
        tokens may be attended to (None: all); ``vec`` [B, time_dim], of modulated blocks only."""
        if not self.modulated:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), rope, key_mask))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        scale1, gate1, scale2, gate2 = self.adaLN_modulation(vec)[:, None, :].chunk(4, dim=-1)
        attended = self.attention(self.attention_norm1(x) * (1 + scale1), rope, key_mask)
        x = torch.addcmul(x, gate1.tanh(), self.attention_norm2(attended))
        fed = self.feed_forward(self.ffn_norm1(x) * (1 + scale2))
        return torch.addcmul(x, gate2.tanh(), self.ffn_norm2(fed))


class FinalLayer(nn.Module):
    """Scaled norm and projection, [B, tokens, dim] -> [B, tokens, 4 * latent channels]."""

    def __init__(self, config: LuminaConfig):
        super().__init__()
        self.linear = nn.Linear(config.dim, 4 * config.latent_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.time_dim, config.dim))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        scale = self.adaLN_modulation(vec)[:, None, :]
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale))


class LuminaTransformer(nn.Module):
    """Lumina Image 2.0; the state dict has the keys of the original checkpoints (without the unused ``norm_final``)."""

    def __init__(self, config: LuminaConfig):
        super().__init__()
        self.config = config
        self.x_embedder = nn.Linear(4 * config.latent_channels, config.dim)
        self.t_embedder = TimeEmbedder(config.frequency_dim, config.time_dim)
        self.cap_embedder = nn.Sequential(RMSNorm(config.text_dim, NORM_EPS), nn.Linear(config.text_dim, config.dim))
        self.noise_refiner = nn.ModuleList(JointTransformerBlock(config) for _ in range(config.refiner_layers))
        self.context_refiner = nn.ModuleList(
            JointTransformerBlock(config, modulated=False) for _ in range(config.refiner_layers)
        )
        self.layers = nn.ModuleList(JointTransformerBlock(config) for _ in range(config.layers))
        self.final_layer = FinalLayer(config)
        self.grids = GridRotations(config.axes_dims[1:], THETA)
        self.kept_captions: Tensor | None = None
        """Rotations of caption tokens, as many as were needed."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations; 8-bit weights are stored only, and computed with in bfloat16."""
        dtype = self.x_embedder.weight.dtype
        return dtype if dtype.itemsize > 1 else torch.bfloat16

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.x_embedder.weight.device

    def set_attention_backend(self, backend: AttentionBackend) -> None:
        """Raises UserError when the backend's package isn't installed."""
        require_backend(backend)
        for block in (*self.noise_refiner, *self.context_refiner, *self.layers):
            block.attention.backend = backend

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """The velocity (image minus noise) [B, C, h, w] of noisy ``latents`` [B, C, h, w], h and w even.

        ``timesteps`` [B], float32: 0 is noise, 1 is the image. ``text`` [B, L, text_dim]; ``text_mask`` [B, L] is
        non-zero for the tokens of a caption, which stand first; it is read, so it should be in system RAM. A caption
        has one token at least. Raises ValueError for latents of odd sizes.
        """
        height, width = latents.shape[-2:]
        lengths = token_lengths(text_mask)
        longest = max(lengths)
        image = self.x_embedder(patchify(latents.to(self.dtype)))
        caption = self.embed_caption(text[:, :longest])
        vec = self.t_embedder(timesteps, self.dtype)

        caption_mask = joint_mask = None
        if min(lengths) < longest:
            caption_mask = to_device(text_mask[:, :longest], image.device).bool()
            joint_mask = F.pad(caption_mask, (0, image.shape[1]), value=True)
        caption_rope, image_rope = self.rotations(lengths, height // 2, width // 2)
        for block in self.context_refiner:
            caption = block(caption, caption_rope, caption_mask)
        for block in self.noise_refiner:
            image = block(image, image_rope, None, vec)

        joined = torch.cat((caption, image), dim=1)
        rope = torch.cat((caption_rope.expand(len(image_rope), -1, -1, -1), image_rope), dim=2)
        for block in self.layers:
            joined = block(joined, rope, joint_mask, vec)
        return unpatchify(self.final_layer(joined[:, longest:], vec), height, width)

    def embed_caption(self, text: Tensor) -> Tensor:
        """Caption features [B, L, text_dim] as tokens [B, L, dim], which a scale of the features does not change."""
        norm, linear = self.cap_embedder
        features = text if self.dtype == torch.float16 else text.to(self.dtype)  # Gemma's may pass float16's range
        return linear(norm(features).to(self.dtype))

    def rotations(self, lengths: Sequence[int], rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Rotary positions of caption tokens [1, 1, longest, head_dim / 2] and of image tokens [B, 1, rows * columns,
        head_dim / 2] (1 in the place of B where all captions have the same length).

        A caption's token i stands at (i, 0, 0), the image's token in row r and column c at (length, r, c). Rotations of
        the last sizes are kept.
        """
        along, grid = self._caption_rotations(max(lengths) + 1), self.grids.of(rows, columns, self.device)
        captions = along[: max(lengths)]
        captions = torch.cat((captions, captions.new_ones(len(captions), grid.shape[1])), dim=1)
        distinct = list(dict.fromkeys(lengths)) if len(set(lengths)) == 1 else lengths
        images = torch.stack([torch.cat((along[length].expand(len(grid), -1), grid), dim=1) for length in distinct])
        return captions[None, None], images[:, None]

    def _caption_rotations(self, count: int) -> Tensor:
        """The share of the first axis in the rotations of positions 0 to ``count`` - 1 or more: [tokens, pairs]."""
        device, kept = self.device, self.kept_captions
        if kept is None or kept.device != device or len(kept) < count:
            tokens = -(-count // CAPTION_STEP) * CAPTION_STEP
            ids = torch.arange(tokens, device=device)[None, :, None]
            kept = rope_rotations(ids, self.config.axes_dims[:1], THETA)[0, 0]
            if not isinstance(kept, FakeTensor):
                self.kept_captions = kept
        return kept
