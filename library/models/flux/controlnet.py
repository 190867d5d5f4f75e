"""ControlNets for FLUX.1: a copy of the first blocks that sees a control image and adds to the transformer's tokens.

Two kinds: one takes the image's pixels through convolutions of its own (XLabs), the other takes the image as latents
(InstantX). Two layouts are read: the original one (github.com/XLabs-AI/x-flux) and Diffusers' ``FluxControlNetModel``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.checkpoints import open_checkpoint
from library.errors import UserError
from library.models.flux.checkpoint import TransformerFile, diffusers_origins, infer_config
from library.models.flux.transformer import FluxConfig, FluxStreams, joint_key_mask, pack_latents
from library.models.loading import Origin, TensorSource, on_meta
from library.models.pipeline import OpenedPart
from library.models.recognition import refuse_unless

OPTION = "--controlnet_model_name_or_path"
MODE_OPTION = "--controlnet_mode"
HINT_STRIDES = (1, 1, 2, 1, 2, 1, 2, 1)
HINT_STRIDE = math.prod(HINT_STRIDES)
KNOWN_MODES = "0 canny, 1 tile, 2 depth, 3 blur, 4 pose, 5 grey, 6 low quality"


@dataclass(frozen=True)
class ControlNetConfig:
    """What fixes a ControlNet's shape, and how its outputs reach the transformer."""

    streams: FluxConfig
    hint_channels: tuple[int, ...] = ()
    """Channels of the image and of each convolution's output; empty where the control image comes as latents."""
    modes: int = 0
    """Kinds of control between which a union ControlNet is switched; 0 for one that knows a single kind."""
    original: bool = True
    """Whether single blocks work by the rules of the original program: in turn, and on text tokens too."""

    @property
    def takes_latents(self) -> bool:
        """Whether the control image goes through the autoencoder."""
        return not self.hint_channels


class FluxControlNet(FluxStreams):
    """The state dict has the keys of the original checkpoints; the mode embedder's is Diffusers'."""

    def __init__(self, config: ControlNetConfig):
        super().__init__(config.streams)
        self.control = config
        hidden = config.streams.hidden_size
        self.pos_embed_input = nn.Linear(config.streams.in_channels, hidden)
        self.controlnet_blocks = _zero_linears(hidden, config.streams.depth)
        self.controlnet_blocks_for_single = _zero_linears(hidden, config.streams.depth_single)
        if config.hint_channels:
            self.input_hint_block = hint_block(config.hint_channels)
        if config.modes:
            self.controlnet_mode_embedder = nn.Embedding(config.modes, hidden)

    def control_tokens(self, control: Tensor) -> Tensor:
        """The control image as packed tokens [B, S, in_channels]: latents as they are, pixels through convolutions."""
        control = control.to(self.dtype)
        return pack_latents(control if self.control.takes_latents else self.input_hint_block(control))

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
        *,
        control: Tensor,
        mode: int | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What each own double block and each own single block adds, [B, S, hidden].

        ``control`` is [B, 3, H, W] in -1..1, or latents [B, in_channels / 4, h, w]; ``mode`` is a union ControlNet's
        kind of control; the rest as in ``FluxTransformer.forward``. By the original rules, single blocks give
        [B, L + S, hidden], text first.
        """
        vec = self.conditioning_vector(timesteps, y, guidance)
        img = self.img_in(img.to(self.dtype)) + self.pos_embed_input(self.control_tokens(control))
        txt = self.txt_in(txt.to(self.dtype))
        if self.control.modes:
            txt, txt_ids, txt_attention_mask = self.with_mode(txt, txt_ids, txt_attention_mask, mode)
        rope, key_mask = self.positions(img_ids, txt_ids, len(img)), joint_key_mask(txt_attention_mask, img)
        double, single = [], []
        for block, last in zip(self.double_blocks, self.controlnet_blocks):
            img, txt = block(img, txt, vec, rope, key_mask)
            double.append(last(img))
        joined = torch.cat((txt, img), dim=1)
        for block, last in zip(self.single_blocks, self.controlnet_blocks_for_single):
            joined = block(joined, vec, rope, key_mask)
            single.append(last(joined if self.control.original else joined[:, txt.shape[1] :]))
        return double, single

    def with_mode(
        self, txt: Tensor, txt_ids: Tensor, mask: Tensor | None, mode: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embedded text [B, L, hidden], its positions and its mask with the mode's token before it."""
        if mode is None:
            raise ValueError("a union ControlNet needs to know the kind of control")
        token = self.controlnet_mode_embedder(torch.full((len(txt), 1), mode, device=txt.device))
        txt_ids = torch.cat((txt_ids[..., :1, :], txt_ids), dim=-2)
        return torch.cat((token, txt), dim=1), txt_ids, None if mask is None else F.pad(mask, (1, 0), value=1)

    def residuals(
        self, transformer: FluxConfig, strength: float = 1.0, **inputs: Any
    ) -> dict[str, Sequence[Tensor] | None]:
        """``double_residuals`` and ``single_residuals`` of ``FluxTransformer.forward``, one for each of its blocks.

        ``inputs`` are those of ``forward``. Samples of a ControlNet that takes pixels go to the double blocks in turn;
        otherwise each sample goes to a run of neighbouring blocks (as in Diffusers' pipelines).
        """
        double, single = self(**inputs)
        if strength != 1:
            double, single = ([sample * strength for sample in samples] for samples in (double, single))
        return {
            "double_residuals": spread(double, transformer.depth, in_turn=not self.control.takes_latents),
            "single_residuals": spread(single, transformer.depth_single, in_turn=self.control.original),
        }


def spread(samples: Sequence[Tensor], blocks: int, in_turn: bool) -> list[Tensor] | None:
    """A sample for each of ``blocks`` blocks, in turn or in runs of equal length; None when there are no samples."""
    if not samples:
        return None
    run = math.ceil(blocks / len(samples))
    return [samples[block % len(samples) if in_turn else block // run] for block in range(blocks)]


def hint_block(channels: Sequence[int]) -> nn.Sequential:
    """3x3 convolutions with SiLU between them, [B, 3, H, W] -> [B, channels[-1], H / 8, W / 8]."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in zip(channels, channels[1:], HINT_STRIDES):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def _zero_linears(hidden: int, count: int) -> nn.ModuleList:
    """Outputs that add nothing until they are trained."""
    layers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(count))
    for parameter in layers.parameters():
        nn.init.zeros_(parameter)
    return layers


# The file


@dataclass(frozen=True)
class ControlNetFile(OpenedPart[FluxControlNet]):
    """An opened ControlNet checkpoint, ready to be loaded."""

    source: TensorSource
    config: ControlNetConfig
    mode: int | None = None
    """The kind of control that a union ControlNet is given."""

    def meta_module(self) -> FluxControlNet:
        """The module on torch's meta device: its structure without its values."""
        with on_meta():
            return FluxControlNet(self.config)


def open_controlnet(
    path: Path | str,
    transformer: TransformerFile,
    latent_stride: int | None = None,
    mode: int | None = None,
    disable_mmap: bool = False,
) -> ControlNetFile:
    """Open ``path`` (a file, one of its shards, a Diffusers folder) by its headers only.

    ``latent_stride`` is the autoencoder's, in pixels, where there is one. Raises UserError, naming the option, when it
    isn't a FLUX.1 ControlNet, doesn't fit the others, or when ``mode`` isn't one of its kinds of control.
    """
    if transformer.variant == "chroma":
        raise UserError(
            f"{OPTION}: there are no ControlNets for Chroma, and those of FLUX.1 don't fit it; leave it out."
        )
    checkpoint = open_checkpoint(path, "controlnet", disable_mmap, OPTION)
    wanted = {"flux-controlnet", "flux-controlnet-diffusers"}
    kind = refuse_unless(checkpoint, wanted, "a FLUX.1 ControlNet", ())
    source = TensorSource(checkpoint)
    original = kind.name == "flux-controlnet"
    if not original:
        source.remap({**diffusers_origins(source), **control_origins(source)})
    modes = source.sizes(MODES, 2)[0] if MODES in source else 0
    config = ControlNetConfig(infer_config(source), hint_channels(source, original), modes, original)
    _require_fit(source, config, transformer, latent_stride)
    _require_mode(source, modes, mode)
    return ControlNetFile(source, config, mode)


MODES = "controlnet_mode_embedder.weight"
HINT_NAMES = ("conv_in", *(f"blocks.{index}" for index in range(len(HINT_STRIDES) - 2)), "conv_out")


def control_origins(source: TensorSource) -> dict[str, Origin]:
    """For each tensor that a transformer does not have, the Diffusers tensor that it is."""
    names = {"pos_embed_input": "controlnet_x_embedder"}
    for index in range(source.count(r"controlnet_single_blocks\.(\d+)\.")):
        names[f"controlnet_blocks_for_single.{index}"] = f"controlnet_single_blocks.{index}"
    for index, name in enumerate(HINT_NAMES):
        names[f"input_hint_block.{2 * index}"] = f"input_hint_block.{name}"
    return {
        f"{ours}.{kind}": Origin((f"{theirs}.{kind}",))
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
        if f"{theirs}.{kind}" in source
    }


def hint_channels(source: TensorSource, original: bool) -> tuple[int, ...]:
    """The channels of the convolutions over the control image; empty where there are none. Raises UserError."""
    names = [name for name in source.names() if name.startswith("input_hint_block.") and name.endswith(".weight")]
    if not names and not original:
        return ()
    if len(names) != len(HINT_STRIDES):
        raise UserError(
            f"{source.checkpoint.label} has {len(names)} convolutions for its control image; only ControlNets with "
            f"{len(HINT_STRIDES)} (XLabs), or in the Diffusers layout with none (InstantX), are supported."
        )
    shapes = [source.sizes(f"input_hint_block.{2 * index}.weight", 4) for index in range(len(HINT_STRIDES))]
    return (shapes[0][1], *(shape[0] for shape in shapes))


def _require_fit(
    source: TensorSource, config: ControlNetConfig, transformer: TransformerFile, latent_stride: int | None
) -> None:
    label, streams, base = source.checkpoint.label, config.streams, transformer.config
    for field, meaning in (
        ("hidden_size", "a width of"),
        ("in_channels", "input channels:"),
        ("context_dim", "T5 states of"),
        ("vector_dim", "a pooled text of"),
    ):
        ours, theirs = getattr(streams, field), getattr(base, field)
        if ours != theirs:
            raise UserError(
                f"{label} is made for a transformer with {meaning} {ours}, but {transformer.source.checkpoint.path} "
                f"has {theirs}: they don't belong together."
            )
    if config.hint_channels and latent_stride not in (None, HINT_STRIDE):
        raise UserError(
            f"{label} is made for latents of {HINT_STRIDE} pixels, but the autoencoder's have {latent_stride}: "
            "they don't belong together."
        )
    given = source.sizes("pos_embed_input.weight", 2)[1]
    hint = (config.hint_channels[0], 4 * config.hint_channels[-1]) if config.hint_channels else (3, given)
    if hint != (3, given) or given != streams.in_channels:
        raise UserError(
            f"{label} takes more than one control image ({given} channels for each token, {streams.in_channels} in the "
            "transformer), as inpainting ControlNets do; only ControlNets that take one image are supported."
        )


def _require_mode(source: TensorSource, modes: int, mode: int | None) -> None:
    label = source.checkpoint.label
    if not modes:
        if mode is not None:
            raise UserError(
                f"{MODE_OPTION} is for union ControlNets, but {label} knows one kind of control; leave it out."
            )
        return
    advice = f"give 0 to {modes - 1} (usually {KNOWN_MODES})"
    if mode is None:
        raise UserError(
            f"{MODE_OPTION} is missing: {label} is a union ControlNet with {modes} kinds of control; {advice}."
        )
    if not 0 <= mode < modes:
        raise UserError(f"{MODE_OPTION} {mode}: {label} has {modes} kinds of control; {advice}.")
