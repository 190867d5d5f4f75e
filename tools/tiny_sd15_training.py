"""The tiny pretrained Stable Diffusion 1.5 of ``assets/tiny_sd15``: its autoencoder, text encoder and U-Net.

It learns the drawn images of the tiny FLUX.1. Its autoencoder starts as the FLUX.1's with the four directions that its
latents spread in most, and its text encoder as the FLUX.1's CLIP; the U-Net starts from nothing.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from library.models.autoencoder_kl import LATENT_SCALE, LATENT_SHIFT, AutoencoderConfig, AutoencoderKL
from library.models.flux.pipeline import FluxPipeline
from library.models.schedules import TRAIN_STEPS, alphas_cumprod
from library.models.stable_diffusion.checkpoint import SCALING_FACTORS
from library.models.stable_diffusion.pipeline import StableDiffusionFiles, StableDiffusionPipeline
from library.models.stable_diffusion.text import encode as encode_text
from library.models.stable_diffusion.text import tokenize
from tools.make_tiny_stable_diffusion import END_OF_TEXT, Encoder, Shape, build_modules, exceptions, original_tensors
from tools.tiny_chroma_training import prompts_of
from tools.tiny_flux_autoencoder import (
    PIXELS,
    autoencoder_images,
    cached_scenes,
    encode,
    image_batch,
    image_loss,
    psnr,
)
from tools.tiny_flux_runs import Run, averaged, save
from tools.tiny_flux_tokenizers import CLIP_TOKENIZER

SHAPE = Shape(
    widths=(32, 64, 64, 64),
    depths=(1, 1, 1, 0),
    heads=2,
    linear_projection=False,
    encoders=(Encoder(64, 4, "quick_gelu", END_OF_TEXT, layers=2),),
    open_clip=(False,),
    resnets=1,
    autoencoder_widths=(32, 32, 64, 64),
    autoencoder_resnets=1,
)
AUTOENCODER = AutoencoderConfig(channels=32, multipliers=(1, 1, 2, 2), res_blocks=1, latent_channels=4, groups=8)
"""The FLUX.1's, but for the latent channels."""
SCALE = SCALING_FACTORS["sd1"]
CHANNELS = AUTOENCODER.latent_channels
LOG_VARIANCE = -10.0
LATENT_NOISE = 0.2
"""The strongest noise on the latents in the autoencoder's training, which makes the decoder forgive small errors."""
WHOLE_STEPS = 300
BATCH = 16
AVERAGE_DECAY = 0.998
LARGEST_WEIGHT = 40.0


# ------------------------------------------------------------------------------------------------- the autoencoder


class ScaledAutoencoder(AutoencoderKL):
    """The FLUX.1's autoencoder in the world of Stable Diffusion: latents are raw ones times 0.18215."""

    def encode(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Scaled latents [batch, 4, H/8, W/8] of ``images`` [batch, 3, H, W] in -1..1."""
        return SCALE * self.encode_unscaled(images, generators)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [batch, 3, H, W] of scaled ``latents`` [batch, 4, H/8, W/8]."""
        return self.decoder(latents / SCALE)


def reduced_autoencoder(flux: FluxPipeline, images: int = 256) -> ScaledAutoencoder:
    """The FLUX.1's autoencoder with four latent channels: the principal components of its sixteen over ``images``.

    The first convolution of the decoder pads with zeros, so that images are a little off at the border, which training
    heals.
    """
    given = flux.load_autoencoder()
    latents = encode(given, autoencoder_images(images, 7)).permute(0, 2, 3, 1).flatten(0, 2)
    mean = latents.mean(dim=0)
    _, spread, directions = torch.linalg.svd(latents - mean, full_matrices=False)
    directions, spread = directions[:CHANNELS], spread[:CHANNELS] / len(latents) ** 0.5
    state = given.state_dict()
    into = directions / (spread[:, None] * SCALE)  # FLUX.1's latents, less their mean, to raw ones
    weight, bias = (state[f"encoder.conv_out.{kind}"][: len(mean)] for kind in ("weight", "bias"))
    state["encoder.conv_out.weight"] = torch.zeros(2 * CHANNELS, *weight.shape[1:])
    state["encoder.conv_out.weight"][:CHANNELS] = torch.einsum("ij,jklm->iklm", LATENT_SCALE * into, weight)
    state["encoder.conv_out.bias"] = torch.full((2 * CHANNELS,), LOG_VARIANCE)
    state["encoder.conv_out.bias"][:CHANNELS] = into @ (LATENT_SCALE * (bias - LATENT_SHIFT) - mean)
    out = directions.T * spread * SCALE / LATENT_SCALE  # and back, to what FLUX.1's decoder takes
    weight, shift = state["decoder.conv_in.weight"], mean / LATENT_SCALE + LATENT_SHIFT
    state["decoder.conv_in.bias"] = state["decoder.conv_in.bias"] + weight.sum(dim=(2, 3)) @ shift
    state["decoder.conv_in.weight"] = torch.einsum("kjlm,ji->kilm", weight, out)
    return _autoencoder(state)


def _autoencoder(state: dict[str, Tensor]) -> ScaledAutoencoder:
    autoencoder = ScaledAutoencoder(AUTOENCODER)
    autoencoder.load_state_dict(state)
    return autoencoder.to(memory_format=torch.channels_last)


def train_sd15_autoencoder(work: Path, flux: FluxPipeline, steps: int, images: int = 3000) -> None:
    """Encoder and decoder together, on 64-pixel crops, in the last ``WHOLE_STEPS`` of the steps on whole images.

    The latents are pulled to mean 0 and standard deviation 1 per channel and disturbed by noise.
    """
    autoencoder, pictures = reduced_autoencoder(flux, min(images, 256)), autoencoder_images(images, 1)
    noise_source = torch.Generator().manual_seed(2)

    def loss_of_step(step: int) -> tuple[Tensor, str]:
        source = torch.Generator().manual_seed(6_000_000 + step)
        whole = step >= steps - WHOLE_STEPS
        wanted = image_batch(pictures, *((2, PIXELS) if whole else (8, 64)), source)
        with torch.autocast("cpu", torch.bfloat16):
            latents = SCALE * autoencoder.encoder(wanted)[:, :CHANNELS].float()
            made = autoencoder.decode(latents + latent_noise(latents, noise_source))
        mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        spread = mean.square().mean() + (deviation - 1).square().mean()
        note = f"psnr {psnr(made.detach(), wanted):.1f} spread {spread.item():.2f}" if step % 100 == 99 else ""
        return image_loss(made, wanted) + 0.02 * spread, note

    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    modules, checkpoint = {"autoencoder": autoencoder}, work / "sd15_autoencoder.pt"
    Run("sd15_autoencoder", modules, [optimizer], steps, 100, checkpoint, AVERAGE_DECAY).train(loss_of_step)


def latent_noise(latents: Tensor, source: torch.Generator) -> Tensor:
    """Noise like ``latents``, for each image of a random strength up to ``LATENT_NOISE``."""
    return (
        LATENT_NOISE
        * torch.rand(len(latents), 1, 1, 1, generator=source)
        * torch.randn(latents.shape, generator=source)
    )


def trained_autoencoder(work: Path) -> ScaledAutoencoder:
    """With averaged weights, and with the log-variance, which was not trained, made constant again."""
    state = averaged(work / "sd15_autoencoder.pt", "autoencoder")
    state["encoder.conv_out.weight"][CHANNELS:] = 0
    state["encoder.conv_out.bias"][CHANNELS:] = LOG_VARIANCE
    return _autoencoder(state)


# ----------------------------------------------------------------------------------------- text encoder and U-Net


class StableDiffusionPainter(nn.Module):
    """CLIP and U-Net as one: prompts and noisy latents in, noise out."""

    def __init__(self, flux: FluxPipeline) -> None:
        super().__init__()
        self.tokenizer = flux.tokenizer("clip_l")
        torch.manual_seed(9)
        modules = build_modules(SHAPE, len(self.tokenizer), SCALE)
        self.unet, self.clip = modules["unet"], modules["text_encoder"]
        self.clip.load_state_dict(flux.load_text_encoders(["clip_l"])[0].state_dict())
        for name, parameter in self.unet.named_parameters():
            if any(part in name for part in (".conv2.", ".proj_out.")) or name.startswith("conv_out."):
                nn.init.zeros_(parameter)

    def forward(self, latents: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
        """The noise in ``latents`` [batch, 4, h, w] at ``timesteps`` [batch] of 0..999."""
        text = encode_text(self.clip, tokenize(self.tokenizer, prompts))
        return self.unet(latents, timesteps, encoder_hidden_states=text).sample


class KernelMuon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for convolutions, too: a kernel is a matrix with a row for each of its outputs.

    Matrices of one size are made orthogonal together, which takes a third of the time.
    """

    def __init__(self, kernels: Sequence[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(kernels, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of all kernels."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for kernel in group["params"]:
                alike.setdefault(kernel.flatten(1).shape, []).append(kernel)
            for (rows, columns), kernels in alike.items():
                given = torch.stack([kernel.grad.flatten(1) for kernel in kernels])
                for kernel, gradient in zip(kernels, given):
                    running = self.state[kernel].setdefault("momentum", torch.zeros_like(gradient))
                    running.lerp_(gradient, 1 - group["momentum"])
                    gradient.lerp_(running, group["momentum"])
                rate = 0.2 * max(rows, columns) ** 0.5 * group["lr"]  # as large as a step of AdamW
                for kernel, direction in zip(kernels, orthogonal(given)):
                    kernel.mul_(1 - group["lr"] * group["weight_decay"])
                    kernel.sub_(direction.view_as(kernel), alpha=rate)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """``matrices`` [count, rows, columns] with singular values near 1, by a Newton-Schulz iteration in bfloat16."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    made = (matrices.mT if is_tall else matrices).bfloat16()
    made = made / (made.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = made @ made.mT
        inner = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        made = torch.baddbmm(made, inner, made, beta=3.4445)
    return (made.mT if is_tall else made).float()


def sd15_optimizers(painter: StableDiffusionPainter) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and kernels inside the U-Net, AdamW for everything else."""
    inner, outer, text = [], [], list(painter.clip.parameters())
    for name, parameter in painter.unet.named_parameters():
        is_inner = parameter.dim() >= 2 and not name.startswith(("conv_in.", "conv_out.", "time_embedding."))
        (inner if is_inner else outer).append(parameter)
    groups = [{"params": outer, "lr": 1.5e-3}, {"params": text, "lr": 5e-4}]
    return [
        KernelMuon(inner, lr=2e-3, weight_decay=0.01),
        torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train_sd15(work: Path, flux: FluxPipeline, steps: int, images: int) -> None:
    """CLIP and U-Net together: the noise is predicted, as in the real model, at evenly spread timesteps.

    A noise that is a little wrong is an image that is very wrong where there is hardly any image, so the squared error
    has the weight 1 / alphas_cumprod, which makes it the error of v, up to ``LARGEST_WEIGHT``.
    """
    latents_file = work / f"sd15_latents_{images}.pt"
    scenes, latents = cached_scenes(latents_file, lambda: trained_autoencoder(work), images)
    painter, shares = StableDiffusionPainter(flux), alphas_cumprod().float()

    def loss_of_step(step: int) -> tuple[Tensor, str]:
        source = torch.Generator().manual_seed(8_000_000 + step)
        chosen = torch.randint(len(scenes), (BATCH,), generator=source)
        prompts, _ = prompts_of([scenes[index] for index in chosen.tolist()], random.Random(f"sd15 {step}"))
        clean = latents[chosen].float()
        noise = torch.randn(clean.shape, generator=source)
        spread = (torch.arange(BATCH) + torch.rand(BATCH, generator=source)) / BATCH
        timesteps = (TRAIN_STEPS * spread).long().clamp(max=TRAIN_STEPS - 1)
        share = shares[timesteps][:, None, None, None]
        mixed = share.sqrt() * clean + (1 - share).sqrt() * noise
        error = (painter(mixed, timesteps, prompts) - noise).square()
        weighted = (error / share.clamp(min=1 / LARGEST_WEIGHT)).mean()
        return weighted, f"noise {error.mean().item():.4f}" if step % 100 == 99 else ""

    run = Run("sd15", {"painter": painter}, sd15_optimizers(painter), steps, 100, work / "sd15.pt", AVERAGE_DECAY)
    run.train(loss_of_step, save_every=250)


# ------------------------------------------------------------------------------------------------------------ export


def export_sd15(work: Path, flux: FluxPipeline, out: Path) -> None:
    """Write the model as one file in the original layout, in float16, and its tokenizer beside it."""
    out.mkdir(parents=True, exist_ok=True)
    painter = StableDiffusionPainter(flux)
    painter.load_state_dict(averaged(work / "sd15.pt", "painter"))
    parts = {"unet": painter.unet.state_dict(), "text_encoder": painter.clip.state_dict(), "vae": {}}
    tensors = original_tensors(SHAPE, parts)
    autoencoder = {
        **trained_autoencoder(work).state_dict(),
        "quant_conv.weight": torch.eye(2 * CHANNELS)[..., None, None],
        "quant_conv.bias": torch.zeros(2 * CHANNELS),
        "post_quant_conv.weight": torch.eye(CHANNELS)[..., None, None],
        "post_quant_conv.bias": torch.zeros(CHANNELS),
    }
    tensors |= {f"first_stage_model.{name}": value for name, value in autoencoder.items()}
    save(out / "sd15-tiny.safetensors", tensors, exceptions(SHAPE))
    tokenizer = out / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    for file in (Path(str(flux.tokenizer_cache_dir)) / CLIP_TOKENIZER).iterdir():
        shutil.copyfile(file, tokenizer / file.name)


def open_sd15(folder: Path) -> StableDiffusionPipeline:
    """The finished file, opened by the project's own loader."""
    return StableDiffusionPipeline(StableDiffusionFiles(folder / "sd15-tiny.safetensors"), torch.float32, "cpu")
