"""The HunyuanImage-2.1 transformer, under the names of the original checkpoints with joined queries, keys and values.

It maps noisy latents, two texts (the prompt's features and the glyphs of what stands in quotes) and the timestep to the
velocity (noise minus image). See github.com/Tencent-Hunyuan/HunyuanImage-2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from library.devices import to_device
from library.models.attention import AttentionBackend, attention, require_backend
from library.models.transformer_parts import (
    GridRotations,
    LastLayer,
    RMSNorm,
    TimeEmbedder,
    apply_rope,
    clip_float16,
    modulate,
    modulations,
    split_heads,
    token_lengths,
)

NORM_EPS = 1e-6


@dataclass(frozen=True)
class HunyuanImageConfig:
    """Everything that fixes the network's shape; the defaults are HunyuanImage-2.1, with 17.4 billion parameters."""

    hidden_size: int = 3584
    num_heads: int = 28
    depth: int = 20
    depth_single: int = 40
    refiner_depth: int = 2
    """Blocks that refine the prompt's features before they meet the image."""
    mlp_hidden: int = 14336
    single_mlp_hidden: int = 14336
    refiner_mlp_hidden: int = 14336
    in_channels: int = 64
    out_channels: int = 64
    patch_size: int = 1
    text_dim: int = 3584
    """Width of the prompt's features."""
    glyph_dim: int = 1472
    """Width of the glyphs' features."""
    glyph_hidden: int = 2048
    frequency_dim: int = 256
    axes_dims: tuple[int, ...] = (64, 64)
    """The share of each position axis (row, column) in a head."""
    theta: float = 256.0

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.hidden_size % self.num_heads:
            raise ValueError(f"the hidden size {self.hidden_size} is not a multiple of {self.num_heads} heads")
        if len(self.axes_dims) != 2 or sum(self.axes_dims) != self.head_dim or any(dim % 2 for dim in self.axes_dims):
            raise ValueError(
                f"the RoPE axes {tuple(self.axes_dims)} must be two even numbers that add up to the head dimension "
                f"{self.head_dim}"
            )

        if self.single_mlp_hidden < 1:
            raise ValueError("the first layers of the single blocks have too few rows for a feed-forward")

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads


class Modulation(nn.Module):
    """``count`` modulation vectors, each [B, 1, hidden], from the conditioning vector [B, hidden]."""

    def __init__(self, hidden_size: int, count: int):
        super().__init__()
        self.count = count
        self.linear = nn.Linear(hidden_size, count * hidden_size)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return modulations(self.linear, vec, self.count)


class FeedForward(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, hidden_size: int, mlp_hidden: int, activation: nn.Module):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden)
        self.act = activation
        self.fc2 = nn.Linear(mlp_hidden, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class RefinerBlock(nn.Module):
    """Attention and feed-forward of text tokens, both gated by the conditioning vector."""

    def __init__(self, config: HunyuanImageConfig):
        super().__init__()
        hidden = config.hidden_size
        self.attention_backend: AttentionBackend = "sdpa"
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(hidden, eps=NORM_EPS)
        self.self_attn_qkv = nn.Linear(hidden, 3 * hidden)
        self.self_attn_proj = nn.Linear(hidden, hidden)
        self.norm2 = nn.LayerNorm(hidden, eps=NORM_EPS)
        self.mlp = FeedForward(hidden, config.refiner_mlp_hidden, nn.SiLU())
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, vec: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """``x`` [B, L, hidden]; ``vec`` [B, hidden]; ``key_mask`` [B, L] boolean, True where
        tokens may be attended to (None: all)."""
        attention_gate, mlp_gate = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)
        qkv = self.self_attn_qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = attention(query, key, value, key_mask, self.attention_backend)
        x = torch.addcmul(x, attention_gate, self.self_attn_proj(attended))
        return torch.addcmul(x, mlp_gate, self.mlp(self.norm2(x)))


class TextEmbedder(nn.Module):
    """The mean of the prompt's features [B, text_dim] as a vector [B, hidden]."""

    def __init__(self, text_dim: int, hidden_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(text_dim, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, mean: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(mean)))


class RefinerBlocks(nn.Module):
    """The blocks of the refiner; they have a module of their own in the checkpoints."""

    def __init__(self, config: HunyuanImageConfig):
        super().__init__()
        self.blocks = nn.ModuleList(RefinerBlock(config) for _ in range(config.refiner_depth))

    def forward(self, x: Tensor, vec: Tensor, key_mask: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(x, vec, key_mask)
        return x


class TokenRefiner(nn.Module):
    """The prompt's features as tokens that know of each other, of their mean and of the time."""

    def __init__(self, config: HunyuanImageConfig):
        super().__init__()
        self.input_embedder = nn.Linear(config.text_dim, config.hidden_size)
        self.t_embedder = TimeEmbedder(config.frequency_dim, config.hidden_size)
        self.c_embedder = TextEmbedder(config.text_dim, config.hidden_size)
        self.individual_token_refiner = RefinerBlocks(config)

    def forward(self, text: Tensor, timesteps: Tensor, key_mask: Tensor | None) -> Tensor:
        """``text`` [B, L, text_dim] -> [B, L, hidden]; ``key_mask`` [B, L] boolean, True for tokens (None: all are)."""
        vec = self.t_embedder(timesteps, text.dtype) + self.c_embedder(mean_of_tokens(text, key_mask))
        return self.individual_token_refiner(self.input_embedder(text), vec, key_mask)


def mean_of_tokens(text: Tensor, mask: Tensor | None) -> Tensor:
    """The mean [B, width] over the tokens of ``text`` [B, L, width] where ``mask`` is True (None: all), in float32."""
    if mask is None:
        return text.float().mean(dim=1).to(text.dtype)
    summed = text.float().masked_fill(~mask[..., None], 0.0).sum(dim=1)
    return (summed / mask.sum(dim=1, keepdim=True)).to(text.dtype)


class GlyphMapper(nn.Module):
    """The glyphs' features as tokens: [B, G, glyph_dim] -> [B, G, hidden]."""

    def __init__(self, config: HunyuanImageConfig):
        super().__init__()
        self.layernorm = nn.LayerNorm(config.glyph_dim)
        self.fc1 = nn.Linear(config.glyph_dim, config.glyph_hidden)
        self.fc2 = nn.Linear(config.glyph_hidden, config.glyph_hidden)
        self.fc3 = nn.Linear(config.glyph_hidden, config.hidden_size)

    def forward(self, glyphs: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(self.layernorm(glyphs))))))


class MMDoubleStreamBlock(nn.Module):
    """Image and text tokens with weights of their own and one joint attention, the image first."""

    def __init__(self, config: HunyuanImageConfig):
        super().__init__()
        self.attention_backend: AttentionBackend = "sdpa"
        self.num_heads = config.num_heads
        hidden, head = config.hidden_size, config.head_dim
        self.img_mod = Modulation(hidden, 6)
        self.img_attn_qkv = nn.Linear(hidden, 3 * hidden)
        self.img_attn_q_norm = RMSNorm(head, NORM_EPS)
        self.img_attn_k_norm = RMSNorm(head, NORM_EPS)
        self.img_attn_proj = nn.Linear(hidden, hidden)
        self.img_mlp = FeedForward(hidden, config.mlp_hidden, nn.GELU(approximate="tanh"))
        self.txt_mod = Modulation(hidden, 6)
        self.txt_attn_qkv = nn.Linear(hidden, 3 * hidden)
        self.txt_attn_q_norm = RMSNorm(head, NORM_EPS)
        self.txt_attn_k_norm = RMSNorm(head, NORM_EPS)
        self.txt_attn_proj = nn.Linear(hidden, hidden)
        self.txt_mlp = FeedForward(hidden, config.mlp_hidden, nn.GELU(approximate="tanh"))

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, rope: Tensor, key_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``img`` [B, S, hidden], ``txt`` [B, L, hidden]; ``vec`` [B, hidden]; ``rope`` [1, 1, S + L, head_dim / 2];
        ``key_mask`` [B, S + L] boolean, where tokens may be attended to (None: all)."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)

        img_qkv = self.img_attn_qkv(modulate(img, img_shift1, img_scale1))
        txt_qkv = self.txt_attn_qkv(modulate(txt, txt_shift1, txt_scale1))
        img_heads = split_heads(img_qkv, self.num_heads, self.img_attn_q_norm, self.img_attn_k_norm)
        txt_heads = split_heads(txt_qkv, self.num_heads, self.txt_attn_q_norm, self.txt_attn_k_norm)
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(img_heads, txt_heads))
        attended = attention(apply_rope(query, rope), apply_rope(key, rope), value, key_mask, self.attention_backend)
        img_attended, txt_attended = attended.split((img.shape[1], txt.shape[1]), dim=1)

        img = torch.addcmul(img, img_gate1, self.img_attn_proj(img_attended))
        img = torch.addcmul(img, img_gate2, self.img_mlp(modulate(img, img_shift2, img_scale2)))
        txt = torch.addcmul(txt, txt_gate1, self.txt_attn_proj(txt_attended))
        txt = torch.addcmul(txt, txt_gate2, self.txt_mlp(modulate(txt, txt_shift2, txt_scale2)))
        return clip_float16(img), clip_float16(txt)


class MMSingleStreamBlock(nn.Module):
    """Image and text tokens as one sequence; attention and feed-forward side by side."""

    def __init__(self, config: HunyuanImageConfig):
        super().__init__()
        self.attention_backend: AttentionBackend = "sdpa"
        self.num_heads = config.num_heads
        self.widths = (3 * config.hidden_size, config.single_mlp_hidden)
        self.linear1 = nn.Linear(config.hidden_size, sum(self.widths))
        self.linear2 = nn.Linear(config.hidden_size + config.single_mlp_hidden, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, NORM_EPS)
        self.k_norm = RMSNorm(config.head_dim, NORM_EPS)
        self.modulation = Modulation(config.hidden_size, 3)

    def forward(self, x: Tensor, vec: Tensor, rope: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """``x`` [B, S + L, hidden]; the others as of ``MMDoubleStreamBlock.forward``."""
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1(modulate(x, shift, scale)).split(self.widths, dim=-1)
        query, key, value = split_heads(qkv, self.num_heads, self.q_norm, self.k_norm)
        attended = attention(apply_rope(query, rope), apply_rope(key, rope), value, key_mask, self.attention_backend)
        out = self.linear2(torch.cat((attended, F.gelu(mlp, approximate="tanh")), dim=-1))
        return clip_float16(torch.addcmul(x, gate, out))


class PatchEmbedder(nn.Module):
    """Latents [B, C, h, w] as tokens [B, h * w / patch^2, hidden], row by row."""

    def __init__(self, config: HunyuanImageConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        return self.proj(latents).flatten(2).transpose(1, 2)


class HunyuanImageTransformer(nn.Module):
    """HunyuanImage-2.1; the state dict has the keys of the original checkpoints."""

    kept_dense = ("txt_in",)

    def __init__(self, config: HunyuanImageConfig):
        super().__init__()
        self.config = config
        self.img_in = PatchEmbedder(config)
        self.time_in = TimeEmbedder(config.frequency_dim, config.hidden_size)
        self.txt_in = TokenRefiner(config)
        self.byt5_in = GlyphMapper(config)
        self.double_blocks = nn.ModuleList(MMDoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(MMSingleStreamBlock(config) for _ in range(config.depth_single))
        self.final_layer = LastLayer(config.hidden_size, config.patch_size**2 * config.out_channels)
        self.grids = GridRotations(config.axes_dims, config.theta)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations; 8-bit weights are stored only, and computed with in bfloat16."""
        dtype = self.img_in.proj.weight.dtype
        return dtype if dtype.itemsize > 1 else torch.bfloat16

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.img_in.proj.weight.device

    def set_attention_backend(self, backend: AttentionBackend) -> None:
        """Raises UserError when the backend's package isn't installed."""
        require_backend(backend)
        for block in (*self.txt_in.individual_token_refiner.blocks, *self.double_blocks, *self.single_blocks):
            block.attention_backend = backend

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        text_mask: Tensor,
        glyphs: Tensor,
        glyph_mask: Tensor,
    ) -> Tensor:
        """The velocity (noise minus image) [B, out_channels, h, w] of noisy ``latents`` [B, in_channels, h, w].

        ``timesteps`` [B], float32: 0 is the image, 1000 is noise. ``text`` [B, L, text_dim] and ``glyphs``
        [B, G, glyph_dim] are the prompt's features and those of its quoted text; their masks [B, L] and [B, G] are
        non-zero for tokens, which stand first. Masks are read, so they should be in system RAM. A prompt has one token
        at least, and no glyphs where nothing is quoted. Raises ValueError for latents that can't be cut into patches.
        """
        patch = self.config.patch_size
        rows, columns = (side // patch for side in latents.shape[-2:])
        if latents.shape[-2:] != (rows * patch, columns * patch):
            raise ValueError(f"latents of {latents.shape[-1]} x {latents.shape[-2]} cannot be cut into patches")
        text_lengths, glyph_lengths = token_lengths(text_mask), token_lengths(glyph_mask)
        img = self.img_in(latents.to(self.dtype))
        vec = self.time_in(timesteps, self.dtype)
        txt = join_texts(
            self.embed_glyphs(glyphs, glyph_lengths),
            glyph_lengths,
            self.embed_text(text, text_lengths, timesteps),
            text_lengths,
        )
        lengths = [ours + theirs for ours, theirs in zip(glyph_lengths, text_lengths)]
        key_mask = attended_keys(lengths, img.device, img.shape[1])
        rope = F.pad(self.grids.of(rows, columns, self.device), (0, 0, 0, txt.shape[1]), value=1.0)[None, None]

        for block in self.double_blocks:
            img, txt = block(img, txt, vec, rope, key_mask)
        joined = torch.cat((img, txt), dim=1)
        for block in self.single_blocks:
            joined = block(joined, vec, rope, key_mask)
        tokens = self.final_layer(joined[:, : img.shape[1]], vec)
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), patch)

    def embed_text(self, text: Tensor, lengths: Sequence[int], timesteps: Tensor) -> Tensor:
        """The prompt's features [B, L, text_dim] as refined tokens [B, longest, hidden] at ``timesteps`` [B]."""
        features = text[:, : max(lengths)].to(self.dtype)
        return self.txt_in(features, timesteps, attended_keys(lengths, features.device))

    def embed_glyphs(self, glyphs: Tensor, lengths: Sequence[int]) -> Tensor | None:
        """The glyphs' features [B, G, glyph_dim] as tokens [B, longest, hidden]; None where no item has any."""
        longest = max(lengths)
        return self.byt5_in(glyphs[:, :longest].to(self.dtype)) if longest else None


def attended_keys(lengths: Sequence[int], device: torch.device, before: int = 0) -> Tensor | None:
    """Which keys are attended to, [B, before + longest] boolean: in each row the first ``before`` and this many as
    ``lengths`` says. None where all are."""
    if min(lengths) == max(lengths):
        return None
    ends = torch.tensor(lengths)[:, None] + before
    return to_device(torch.arange(before + max(lengths)) < ends, device)


def join_texts(
    glyphs: Tensor | None, glyph_lengths: Sequence[int], text: Tensor, text_lengths: Sequence[int]
) -> Tensor:
    """Each item's glyphs, then its text, then zeros up to the longest: [B, G, hidden], [B, L, hidden] -> [B, longest,
    hidden]. Items have as many tokens as the lengths say, which stand first."""
    if glyphs is None:
        return text
    if len({*glyph_lengths}) == len({*text_lengths}) == 1:
        return torch.cat((glyphs, text), dim=1)
    items = zip(glyphs, glyph_lengths, text, text_lengths)
    joined = [torch.cat((ours[:ends], theirs[:stops])) for ours, ends, theirs, stops in items]
    return pad_sequence(joined, batch_first=True)
