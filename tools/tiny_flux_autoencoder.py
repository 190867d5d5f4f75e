"""The autoencoder of the tiny models: its training, and the latents of drawn scenes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from library.models.autoencoder_kl import LATENT_SCALE, LATENT_SHIFT, AutoencoderConfig, AutoencoderKL
from tools import tiny_flux_drawings as drawings
from tools.tiny_flux_runs import Run, averaged

PIXELS = 128
LATENT_CHANNELS = 16
AUTOENCODER = AutoencoderConfig(channels=32, multipliers=(1, 1, 2, 2), res_blocks=1, groups=8)


def autoencoder_images(count: int, seed: int) -> Tensor:
    """Half scenes of the base model's world, half free compositions: uint8 [count, 3, 128, 128]."""
    source = random.Random(f"autoencoder {seed}")
    pictures = []
    for index in range(count):
        if index % 2:
            pictures.append(drawings.random_composition(source, PIXELS))
        else:
            pictures.append(drawings.draw_scene(drawings.random_scene(source), PIXELS))
    return stack_images(pictures)


def stack_images(pictures: Sequence[numpy.ndarray]) -> Tensor:
    """[H, W, 3] uint8 arrays as one uint8 tensor [count, 3, H, W]."""
    return torch.from_numpy(numpy.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def to_model(pictures: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1, channels last."""
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def image_batch(pictures: Tensor, batch: int, crop: int, source: torch.Generator) -> Tensor:
    """Random images, randomly cropped to ``crop`` pixels and mirrored, as float -1..1."""
    chosen = []
    for index in torch.randint(len(pictures), (batch,), generator=source).tolist():
        top, left = torch.randint(PIXELS - crop + 1, (2,), generator=source).tolist()
        piece = pictures[index, :, top : top + crop, left : left + crop]
        mirror = torch.randint(4, (1,), generator=source).item()
        axes = [axis for bit, axis in ((1, 1), (2, 2)) if mirror & bit]
        chosen.append(piece.flip(axes) if axes else piece)
    return to_model(torch.stack(chosen))


def image_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """Absolute and squared error, and the absolute error of neighbours' differences, which keeps edges crisp."""
    made, wanted = made.float(), wanted.float()
    error = made - wanted
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + edges


def psnr(made: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels of images in -1..1."""
    return -10 * math.log10(((made.float().clamp(-1, 1) - wanted) / 2).square().mean().item())


def initialised_autoencoder(seed: int) -> AutoencoderKL:
    """Random weights from which training starts at once.

    GroupNorm takes away the mean and the size of what it sees, and with few channels in a group little else is left of
    a flat colour. So two channels of each group start as opposite constants, which the others are then measured
    against. The last layer of each residual branch starts at zero.
    """
    torch.manual_seed(seed)
    autoencoder = AutoencoderKL(AUTOENCODER)
    for name, module in autoencoder.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if name.endswith(("conv2", "proj_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
            continue
        nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        nn.init.zeros_(module.bias)
        if not name.endswith("conv_out"):
            per_group = module.out_channels // AUTOENCODER.groups
            position = torch.arange(module.out_channels) % per_group
            module.bias.data += (position == 0).float() * 2 - (position == 1).float() * 2
    return autoencoder.to(memory_format=torch.channels_last)


def train_autoencoder(work: Path, steps: int, whole_steps: int) -> None:
    """Encoder and decoder together; ``steps`` on 64-pixel crops, of which the last ``whole_steps`` on whole images.

    The latents are pulled to mean 0 and standard deviation 1 per channel, and disturbed by noise of up to 0.35, which
    makes the decoder forgive small errors of whatever draws the latents.
    """
    autoencoder = initialised_autoencoder(1)
    pictures = autoencoder_images(3000, 1)
    noise_source = torch.Generator().manual_seed(2)

    def reconstruct(images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            latents = LATENT_SCALE * (autoencoder.encoder(images)[:, :LATENT_CHANNELS].float() - LATENT_SHIFT)
            return autoencoder.decoder((latents + noise) / LATENT_SCALE + LATENT_SHIFT), latents

    def loss_of_step(step: int) -> tuple[Tensor, str]:
        source = torch.Generator().manual_seed(1000 + step)
        whole = step >= steps - whole_steps
        images = image_batch(pictures, *((2, PIXELS) if whole else (8, 64)), source)
        strength = 0.35 * min(1.0, step / 2500) * torch.rand(len(images), 1, 1, 1, generator=noise_source)
        side = images.shape[-1] // AUTOENCODER.stride
        noise = strength * torch.randn(len(images), LATENT_CHANNELS, side, side, generator=noise_source)
        made, latents = reconstruct(images, noise)
        mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        spread = mean.square().mean() + (deviation - 1).square().mean()
        note = f"psnr {psnr(made, images):.1f} spread {spread.item():.2f}" if step % 100 == 99 else ""
        return image_loss(made, images) + 0.02 * spread, note

    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.0)
    run = Run("autoencoder", {"autoencoder": autoencoder}, [optimizer], steps, 100, work / "autoencoder.pt", 0.998)
    run.train(loss_of_step)


def fold_latent_statistics(autoencoder: AutoencoderKL, pictures: Tensor) -> None:
    """Change the encoder's last and the decoder's first convolution: each latent channel gets mean 0 and deviation 1.

    The predicted log-variance becomes a constant -10. The mean's part of the decoder is exact except at the border,
    where the convolution pads with zeros; the decoder's own training heals that.
    """
    with torch.no_grad():
        latents = encode(autoencoder, pictures)
        mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        into, out = autoencoder.decoder.conv_in, autoencoder.encoder.conv_out
        raw_mean = mean / LATENT_SCALE + LATENT_SHIFT
        # wanted: raw' = (raw - raw_mean) / deviation + LATENT_SHIFT
        out.weight[:LATENT_CHANNELS] /= deviation[:, None, None, None]
        out.bias[:LATENT_CHANNELS] = (out.bias[:LATENT_CHANNELS] - raw_mean) / deviation + LATENT_SHIFT
        out.weight[LATENT_CHANNELS:] = 0
        out.bias[LATENT_CHANNELS:] = -10
        # the inverse for the decoder: raw = (raw' - LATENT_SHIFT) * deviation + raw_mean
        into.bias += (into.weight.sum(dim=(2, 3)) * (raw_mean - LATENT_SHIFT * deviation)).sum(dim=1)
        into.weight *= deviation[None, :, None, None]


def encode(autoencoder: AutoencoderKL, pictures: Tensor, batch: int = 16) -> Tensor:
    """Scaled latents (posterior means) of uint8 images: float32 [count, 16, 16, 16]."""
    with torch.no_grad():
        return torch.cat([autoencoder.encode(to_model(part)) for part in pictures.split(batch)])


def load_autoencoder(weights: dict[str, Tensor]) -> AutoencoderKL:
    autoencoder = AutoencoderKL(AUTOENCODER)
    autoencoder.load_state_dict(weights)
    return autoencoder.to(memory_format=torch.channels_last)


def finish_autoencoder(work: Path) -> None:
    """``autoencoder_folded.pt``: averaged weights with folded latent statistics; the later stages start from it."""
    autoencoder = load_autoencoder(averaged(work / "autoencoder.pt", "autoencoder"))
    scenes = random.Random("statistics")
    pictures = stack_images([drawings.draw_scene(drawings.random_scene(scenes), PIXELS) for _ in range(256)])
    fold_latent_statistics(autoencoder, pictures)
    torch.save(autoencoder.state_dict(), work / "autoencoder_folded.pt")


def load_folded(work: Path) -> AutoencoderKL:
    """The autoencoder that ``finish_autoencoder`` left in the work folder."""
    return load_autoencoder(torch.load(work / "autoencoder_folded.pt", weights_only=True))


def train_decoder(work: Path, steps: int) -> None:
    """The decoder alone on whole images, from latents with noise of up to 0.35; the latents themselves stay."""
    autoencoder = load_folded(work)
    pictures = autoencoder_images(3000, 2)
    latents = encode(autoencoder, pictures)
    noise_source = torch.Generator().manual_seed(3)

    def loss_of_step(step: int) -> tuple[Tensor, str]:
        source = torch.Generator().manual_seed(500_000 + step)
        chosen = torch.randint(len(pictures), (3,), generator=source)
        images, clean = to_model(pictures[chosen]), latents[chosen]
        noise = torch.randn(clean.shape, generator=noise_source)
        noise *= 0.35 * torch.rand(len(clean), 1, 1, 1, generator=noise_source)
        with torch.autocast("cpu", torch.bfloat16):
            made = autoencoder.decoder((clean + noise) / LATENT_SCALE + LATENT_SHIFT)
        return image_loss(made, images), f"psnr {psnr(made.detach(), images):.1f}" if step % 100 == 99 else ""

    optimizer = torch.optim.AdamW(autoencoder.decoder.parameters(), lr=4e-4, betas=(0.9, 0.98), weight_decay=0.0)
    run = Run("decoder", {"decoder": autoencoder.decoder}, [optimizer], steps, 100, work / "decoder.pt", 0.998)
    run.train(loss_of_step, save_every=250)


def cached_scenes(
    path: Path, open_autoencoder: Callable[[], AutoencoderKL], count: int
) -> tuple[list[drawings.Scene], Tensor]:
    """``count`` scenes and their latents in float16 [count, 16, 16, 16], which are kept in ``path``."""
    source = random.Random("transformer")
    scenes = [drawings.random_scene(source) for _ in range(count)]
    if not path.exists():
        autoencoder = open_autoencoder()
        parts = []
        for start in range(0, count, 256):
            pictures = [drawings.draw_scene(scene, PIXELS) for scene in scenes[start : start + 256]]
            with torch.autocast("cpu", torch.bfloat16):
                parts.append(encode(autoencoder, stack_images(pictures)).half())
        torch.save(torch.cat(parts), path)
    return scenes, torch.load(path, weights_only=True)
