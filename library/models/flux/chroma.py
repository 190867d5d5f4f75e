"""The Chroma transformer, under the names of the original checkpoints (github.com/lodestone-rock/flow).

Chroma is FLUX.1 [schnell] without its modulation layers: a small network, the approximator, gives all modulations
at once, from the timestep. There is no pooled text and no distilled guidance (its input stays and is always 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.devices import to_device
from library.models.flux.transformer import (
    DoubleStreamBlock,
    FluxConfig,
    MLPEmbedder,
    Modulations,
    RMSNorm,
    SingleStreamBlock,
    StreamTransformer,
    sinusoid,
)
from library.models.transformer_parts import modulate


@dataclass(frozen=True)
class ChromaConfig(FluxConfig):
    """What fixes the network's shape; the defaults are Chroma1. Time, pooled text and guidance have no sizes here."""

    guidance_embed: bool = False
    approximator_in: int = 64
    approximator_hidden: int = 5120
    approximator_layers: int = 5

    @property
    def modulation_count(self) -> int:
        """Modulation vectors of a whole pass: 344 for the full size."""
        return 3 * self.depth_single + 12 * self.depth + 2


class Approximator(nn.Module):
    """Every modulation vector of the transformer from timestep and index: [B, count, in] -> [B, count, hidden]."""

    def __init__(self, config: ChromaConfig):
        super().__init__()
        width = config.approximator_hidden
        self.in_proj = nn.Linear(config.approximator_in, width)
        self.layers = nn.ModuleList(MLPEmbedder(width, width) for _ in range(config.approximator_layers))
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(config.approximator_layers))
        self.out_proj = nn.Linear(width, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        for layer, norm in zip(self.layers, self.norms):
            x = x + layer(norm(x))
        return self.out_proj(x)


class ModulationSlice(nn.Module):
    """``count`` of all modulation vectors [B, all, hidden], from number ``start`` on; each [B, 1, hidden]."""

    def __init__(self, start: int, count: int):
        super().__init__()
        self.start, self.count = start, count

    def forward(self, modulations: Tensor) -> Modulations:
        return modulations[:, self.start : self.start + self.count].split(1, dim=1)


class ChromaLastLayer(nn.Module):
    """Norm, modulated by the last two vectors, and projection: [B, tokens, hidden] -> [B, tokens, out channels]."""

    def __init__(self, config: ChromaConfig):
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.out_channels)
        self.modulation = ModulationSlice(config.modulation_count - 2, 2)

    def forward(self, x: Tensor, modulations: Tensor) -> Tensor:
        shift, scale = self.modulation(modulations)
        return self.linear(modulate(x, shift, scale))


def text_key_mask(attention_mask: Tensor) -> Tensor:
    """Which text tokens [B, L] are attended to: prompt, end token and one padding token more, as Chroma was trained.

    ``attention_mask`` [B, L] is the tokenizer's: 1 where prompt and end token stand.
    """
    lengths = attention_mask.bool().sum(dim=1, keepdim=True) + 1
    return torch.arange(attention_mask.shape[1], device=attention_mask.device) < lengths


class ChromaTransformer(StreamTransformer):
    """Chroma; the state dict has the keys of the original checkpoints."""

    kept_dense = ("distilled_guidance_layer",)

    def __init__(self, config: ChromaConfig):
        super().__init__(config)
        self.config: ChromaConfig = config
        hidden, singles, doubles = config.hidden_size, config.depth_single, config.depth
        first_image, first_text = 3 * singles, 3 * singles + 6 * doubles
        self.img_in = nn.Linear(config.in_channels, hidden)
        self.txt_in = nn.Linear(config.context_dim, hidden)
        self.distilled_guidance_layer = Approximator(config)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(
                config, ModulationSlice(first_image + 6 * index, 6), ModulationSlice(first_text + 6 * index, 6)
            )
            for index in range(doubles)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(config, ModulationSlice(3 * index, 3)) for index in range(singles)
        )
        self.final_layer = ChromaLastLayer(config)

    def modulation_inputs(self, timesteps: Tensor) -> Tensor:
        """What the approximator sees: timestep, a guidance of 0 and the vector's number, each as a sinusoid."""
        batch, count, width = len(timesteps), self.config.modulation_count, self.config.approximator_in
        time = sinusoid(timesteps, width // 4)
        guidance = sinusoid(torch.zeros_like(timesteps), width // 4)
        index = sinusoid(torch.arange(count, device=timesteps.device), width // 2)
        per_item = torch.cat((time, guidance), dim=-1)[:, None].expand(-1, count, -1)
        return torch.cat((per_item, index.expand(batch, -1, -1)), dim=-1).to(self.dtype)

    def modulations(self, timesteps: Tensor) -> Tensor:
        """All modulation vectors [B, count, hidden] at ``timesteps`` [B] in 0..1.

        The approximator is never trained: a LoRA for Chroma leaves the meaning of timesteps as it is.
        """
        with torch.no_grad():
            return self.distilled_guidance_layer(self.modulation_inputs(timesteps))

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        guidance: Tensor | None = None,
        txt_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The velocity [batch, S, out_channels] of packed noisy latents; arguments as of ``FluxTransformer.forward``.

        ``y`` and ``guidance`` are ignored. ``txt_attention_mask`` [batch, L], the tokenizer's, is needed.
        """
        if txt_attention_mask is None:
            raise ValueError("Chroma needs the attention mask of its text")
        text_mask = text_key_mask(to_device(txt_attention_mask, img.device))
        key_mask = F.pad(text_mask, (0, img.shape[1]), value=True)
        modulations = self.modulations(timesteps)
        rope = self.positions(img_ids, txt_ids, len(img))
        tokens = self.run_blocks(
            self.img_in(img.to(self.dtype)), self.txt_in(txt.to(self.dtype)), modulations, rope, key_mask
        )
        return self.final_layer(tokens, modulations)
