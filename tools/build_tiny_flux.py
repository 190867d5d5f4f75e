"""Build the tiny pretrained FLUX.1 of ``assets/tiny_flux`` from nothing: drawn data, fixed seeds, no download.

The stages, in their order:

    tokenizers    CLIP and T5 tokenizers of a few hundred pieces
    autoencoder   encoder and decoder together, on crops, then on whole pictures
    decoder       the decoder alone, on noisy latents, so that the small errors of a sampler are drawn over
    transformer   DiT, CLIP and T5 together, on cached latents, as a rectified flow
    export        everything in the layouts of the real files, in float16, into assets/tiny_flux
    sheet         a contact sheet of pictures, to look at

``python tools/build_tiny_flux.py`` runs them all, about an hour on one core; ``--stages transformer export`` only some.
A stage that was stopped goes on from its last checkpoint in the work folder. Training uses the project's own
autoencoder and transformer classes, with bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from library.files import writing  # noqa: E402
from library.models.autoencoder_kl import LATENT_SCALE, LATENT_SHIFT, AutoencoderConfig, AutoencoderKL  # noqa: E402
from library.models.flux.pipeline import FluxFiles, FluxPipeline, PictureRequest  # noqa: E402
from library.models.flux.transformer import (  # noqa: E402
    FluxConfig,
    FluxTransformer,
    image_ids,
    pack_latents,
    rope_axes,
    unpack_latents,
)
from tools import tiny_flux_drawings as drawings  # noqa: E402
from tools.tiny_flux_tokenizers import CLIP_TOKENIZER, T5_TOKENIZER, build_tokenizers  # noqa: E402

PIXELS = 128
LATENT_CHANNELS = 16
STAGES = ("tokenizers", "autoencoder", "decoder", "transformer", "export", "sheet")


# ---------------------------------------------------------------------------------------------------- training loops


@dataclass
class Run:
    """One training run: a step function, its parameters, its length, and where its checkpoint lies."""

    name: str
    modules: dict[str, nn.Module]
    optimizers: list[torch.optim.Optimizer]
    steps: int
    warmup: int
    checkpoint: Path
    average_decay: float

    def train(self, loss_of_step: Callable[[int], tuple[Tensor, str]], save_every: int = 500) -> None:
        """Run the steps that are still missing. ``loss_of_step(step)`` returns the loss and a word for the log."""
        averages = {name: _average(module) for name, module in self.modules.items()}
        start = self._resume(averages)
        rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        parameters = [p for module in self.modules.values() for p in module.parameters() if p.requires_grad]
        mean, begin = 0.0, time.time()
        for step in range(start, self.steps):
            factor = min(1.0, (step + 1) / self.warmup) * (0.5 + 0.5 * math.cos(math.pi * step / self.steps))
            for optimizer, base in zip(self.optimizers, rates):
                for group, rate in zip(optimizer.param_groups, base):
                    group["lr"] = rate * max(factor, 0.01)
            loss, note = loss_of_step(step)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            decay = min(self.average_decay, (step + 1) / (step + 10))
            for name, module in self.modules.items():
                averages[name].update(module, decay)
            mean = loss.item() if step == start else 0.98 * mean + 0.02 * loss.item()
            if (step + 1) % 100 == 0:
                each = (time.time() - begin) / (step + 1 - start)
                print(f"{self.name} {step + 1}/{self.steps} loss {mean:.4f} {note} {each:.3f} s/step", flush=True)
            if (step + 1) % save_every == 0 or step + 1 == self.steps:
                self._save(step + 1, averages, rates)

    def _save(self, step: int, averages: dict[str, Any], rates: list[list[float]]) -> None:
        state = {
            "step": step,
            "rates": rates,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "averages": {name: average.values for name, average in averages.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        temporary = self.checkpoint.with_suffix(".part")
        torch.save(state, temporary)
        temporary.replace(self.checkpoint)

    def _resume(self, averages: dict[str, Any]) -> int:
        if not self.checkpoint.exists():
            return 0
        state = torch.load(self.checkpoint, weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
            averages[name].values = state["averages"][name]
        for optimizer, values, rates in zip(self.optimizers, state["optimizers"], state["rates"]):
            optimizer.load_state_dict(values)
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate
        return state["step"]


class _average:
    """Exponential moving average of a module's parameters."""

    def __init__(self, module: nn.Module):
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, decay: float) -> None:
        current = module.state_dict()
        names = [name for name, value in current.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.values[name] for name in names], [current[name] for name in names], 1 - decay)


def averaged(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The averaged weights of module ``name`` in a run's checkpoint."""
    return torch.load(checkpoint, weights_only=True)["averages"][name]


# ------------------------------------------------------------------------------------------------------- autoencoder

AUTOENCODER = AutoencoderConfig(channels=32, multipliers=(1, 1, 2, 2), res_blocks=1, groups=8)


def autoencoder_pictures(count: int, seed: int) -> Tensor:
    """Half scenes of the base model's world, half free compositions: uint8 [count, 3, 128, 128]."""
    source = random.Random(f"autoencoder {seed}")
    pictures = []
    for index in range(count):
        if index % 2:
            pictures.append(drawings.random_composition(source, PIXELS))
        else:
            pictures.append(drawings.draw_scene(drawings.random_scene(source), PIXELS))
    return stack_pictures(pictures)


def stack_pictures(pictures: Sequence[numpy.ndarray]) -> Tensor:
    """[H, W, 3] uint8 arrays as one uint8 tensor [count, 3, H, W]."""
    return torch.from_numpy(numpy.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def to_model(pictures: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1, channels last."""
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def picture_batch(pictures: Tensor, batch: int, crop: int, source: torch.Generator) -> Tensor:
    """Random pictures, randomly cropped to ``crop`` pixels and mirrored, as float -1..1."""
    chosen = []
    for index in torch.randint(len(pictures), (batch,), generator=source).tolist():
        top, left = torch.randint(PIXELS - crop + 1, (2,), generator=source).tolist()
        piece = pictures[index, :, top : top + crop, left : left + crop]
        mirror = torch.randint(4, (1,), generator=source).item()
        axes = [axis for bit, axis in ((1, 1), (2, 2)) if mirror & bit]
        chosen.append(piece.flip(axes) if axes else piece)
    return to_model(torch.stack(chosen))


def picture_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """Absolute and squared error, and the absolute error of neighbours' differences, which keeps edges crisp."""
    made, wanted = made.float(), wanted.float()
    error = made - wanted
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + edges


def psnr(made: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels of pictures in -1..1."""
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
    """Encoder and decoder together; ``steps`` on 64-pixel crops, of which the last ``whole_steps`` on whole pictures.

    The latents are pulled to mean 0 and standard deviation 1 per channel, and disturbed by noise of up to 0.35, which
    makes the decoder forgive small errors of whatever draws the latents.
    """
    autoencoder = initialised_autoencoder(1)
    pictures = autoencoder_pictures(3000, 1)
    noise_source = torch.Generator().manual_seed(2)

    def reconstruct(images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            latents = LATENT_SCALE * (autoencoder.encoder(images)[:, :LATENT_CHANNELS].float() - LATENT_SHIFT)
            return autoencoder.decoder((latents + noise) / LATENT_SCALE + LATENT_SHIFT), latents

    def loss_of_step(step: int) -> tuple[Tensor, str]:
        source = torch.Generator().manual_seed(1000 + step)
        whole = step >= steps - whole_steps
        images = picture_batch(pictures, *((2, PIXELS) if whole else (8, 64)), source)
        strength = 0.35 * min(1.0, step / 2500) * torch.rand(len(images), 1, 1, 1, generator=noise_source)
        side = images.shape[-1] // AUTOENCODER.stride
        noise = strength * torch.randn(len(images), LATENT_CHANNELS, side, side, generator=noise_source)
        made, latents = reconstruct(images, noise)
        mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        spread = mean.square().mean() + (deviation - 1).square().mean()
        note = f"psnr {psnr(made, images):.1f} spread {spread.item():.2f}" if step % 100 == 99 else ""
        return picture_loss(made, images) + 0.02 * spread, note

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
    """Scaled latents (posterior means) of uint8 pictures: float32 [count, 16, 16, 16]."""
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
    pictures = stack_pictures([drawings.draw_scene(drawings.random_scene(scenes), PIXELS) for _ in range(256)])
    fold_latent_statistics(autoencoder, pictures)
    torch.save(autoencoder.state_dict(), work / "autoencoder_folded.pt")


def train_decoder(work: Path, steps: int) -> None:
    """The decoder alone on whole pictures, from latents with noise of up to 0.35; the latents themselves stay."""
    autoencoder = load_autoencoder(torch.load(work / "autoencoder_folded.pt", weights_only=True))
    pictures = autoencoder_pictures(3000, 2)
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
        return picture_loss(made, images), f"psnr {psnr(made.detach(), images):.1f}" if step % 100 == 99 else ""

    optimizer = torch.optim.AdamW(autoencoder.decoder.parameters(), lr=4e-4, betas=(0.9, 0.98), weight_decay=0.0)
    run = Run("decoder", {"decoder": autoencoder.decoder}, [optimizer], steps, 100, work / "decoder.pt", 0.998)
    run.train(loss_of_step, save_every=250)


# ---------------------------------------------------------------------------------- transformer and both text encoders

TRANSFORMER = FluxConfig(
    hidden_size=128,
    num_heads=4,
    depth=2,
    depth_single=4,
    in_channels=4 * LATENT_CHANNELS,
    out_channels=4 * LATENT_CHANNELS,
    context_dim=64,
    vector_dim=64,
    mlp_hidden=512,
    axes_dims=rope_axes(32),
)


def text_encoder_settings(clip_tokenizer: Any, t5_tokenizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configurations of both text encoders, under transformers' names."""
    clip = {
        "vocab_size": len(clip_tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "projection_dim": 64,
        "hidden_act": "quick_gelu",
        "bos_token_id": clip_tokenizer.bos_token_id,
        "eos_token_id": clip_tokenizer.eos_token_id,
        "pad_token_id": clip_tokenizer.pad_token_id,
    }
    t5 = {
        "vocab_size": 128,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "pad_token_id": t5_tokenizer.pad_token_id,
        "eos_token_id": t5_tokenizer.eos_token_id,
    }
    if len(t5_tokenizer) > t5["vocab_size"]:
        raise RuntimeError("the T5 vocabulary is larger than its embedding")
    return clip, t5


class Painter(nn.Module):
    """Text encoders and transformer as one: captions and noisy latents in, velocity out."""

    def __init__(self, tokenizers: Path):
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

        self.clip_tokenizer = CLIPTokenizer.from_pretrained(tokenizers / CLIP_TOKENIZER)
        self.t5_tokenizer = T5Tokenizer.from_pretrained(tokenizers / T5_TOKENIZER)
        self.clip_settings, self.t5_settings = text_encoder_settings(self.clip_tokenizer, self.t5_tokenizer)
        torch.manual_seed(4)
        self.clip = CLIPTextModel(CLIPTextConfig(**self.clip_settings))
        self.t5 = T5EncoderModel(T5Config(**self.t5_settings))
        self.transformer = FluxTransformer(TRANSFORMER)
        self._initialise()
        self.tokens: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def _initialise(self) -> None:
        for name, parameter in self.transformer.named_parameters():
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            if "_mod." in name or ".modulation." in name or name.startswith("final_layer."):
                nn.init.zeros_(parameter)

    def tokenize(self, caption: str, length: int) -> tuple[Tensor, Tensor]:
        """CLIP ids [length] and T5 ids [length]. CLIP is causal: what follows its end token can be cut."""
        if (caption, length) not in self.tokens:
            settings = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
            clip = self.clip_tokenizer(caption, **settings)["input_ids"][0]
            self.tokens[caption, length] = (clip, self.t5_tokenizer(caption, **settings)["input_ids"][0])
        return self.tokens[caption, length]

    def encode_text(self, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Pooled CLIP output [batch, 64] and T5 output [batch, length, 64]."""
        pairs = [self.tokenize(caption, length) for caption in captions]
        pooled = self.clip(input_ids=torch.stack([pair[0] for pair in pairs])).pooler_output
        return pooled, self.t5(input_ids=torch.stack([pair[1] for pair in pairs])).last_hidden_state

    def forward(self, latents: Tensor, times: Tensor, guidance: Tensor, pooled: Tensor, text: Tensor) -> Tensor:
        """Velocity of ``latents`` [batch, 16, h, w] at ``times`` [batch]."""
        height, width = latents.shape[-2:]
        places = image_ids(height, width)
        tokens = self.transformer(
            pack_latents(latents), places, text, torch.zeros(text.shape[1], 3), times, pooled, guidance
        )
        return unpack_latents(tokens, height, width)


def painter_optimizers(painter: Painter) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer's blocks, AdamW for everything else."""
    matrices, others = [], []
    for name, parameter in painter.named_parameters():
        inner = name.startswith(("transformer.double_blocks", "transformer.single_blocks")) and parameter.dim() == 2
        (matrices if inner else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def cached_scenes(work: Path, count: int) -> tuple[list[drawings.Scene], Tensor]:
    """``count`` scenes and their latents in float16 [count, 16, 16, 16]; kept in the work folder."""
    source = random.Random("transformer")
    scenes = [drawings.random_scene(source) for _ in range(count)]
    path = work / f"latents_{count}.pt"
    if not path.exists():
        autoencoder = load_autoencoder(torch.load(work / "autoencoder_folded.pt", weights_only=True))
        parts = []
        for start in range(0, count, 256):
            pictures = [drawings.draw_scene(scene, PIXELS) for scene in scenes[start : start + 256]]
            with torch.autocast("cpu", torch.bfloat16):
                parts.append(encode(autoencoder, stack_pictures(pictures)).half())
        torch.save(torch.cat(parts), path)
    return scenes, torch.load(path, weights_only=True)


def train_transformer(work: Path, tokenizers: Path, steps: int, pictures: int) -> None:
    """DiT, CLIP and T5 together: x_t = (1 - t) x + t n, target n - x, t = sigmoid(0.6 + 1.1 N(0, 1)).

    The guidance input is random and so learned to be ignored. Every sixth step has the longer text, so that padding of
    another length does not surprise the model.
    """
    scenes, latents = cached_scenes(work, pictures)
    painter = Painter(tokenizers)

    def loss_of_step(step: int) -> tuple[Tensor, str]:
        source = torch.Generator().manual_seed(1_000_000 + step)
        words = random.Random(f"captions {step}")
        chosen = torch.randint(len(scenes), (BATCH,), generator=source)
        captions = [drawings.random_caption(scenes[index], words) for index in chosen.tolist()]
        clean = latents[chosen].float()
        noise = torch.randn(clean.shape, generator=source)
        times = torch.sigmoid(0.6 + 1.1 * torch.randn(BATCH, generator=source))
        guidance = 1 + 3 * torch.rand(BATCH, generator=source)
        mixed = torch.lerp(clean, noise, times[:, None, None, None])
        with torch.autocast("cpu", torch.bfloat16):
            pooled, text = painter.encode_text(captions, 32 if step % 6 == 5 else 16)
            velocity = painter(mixed, times, guidance, pooled, text)
        return F.mse_loss(velocity.float(), noise - clean), ""

    run = Run(
        "transformer", {"painter": painter}, painter_optimizers(painter), steps, 100, work / "transformer.pt", 0.998
    )
    run.train(loss_of_step, save_every=500)


BATCH = 16


# ------------------------------------------------------------------------------------------------------------ export


def export(work: Path, out: Path) -> None:
    """Write the four files in the layouts of the real ones, in float16."""
    out.mkdir(parents=True, exist_ok=True)
    painter = Painter(out / "tokenizers")
    painter.load_state_dict(averaged(work / "transformer.pt", "painter"))
    autoencoder = load_autoencoder(torch.load(work / "autoencoder_folded.pt", weights_only=True))
    if (work / "decoder.pt").exists():
        autoencoder.decoder.load_state_dict(averaged(work / "decoder.pt", "decoder"))
    clip = {
        f"text_model.{name.removeprefix('text_model.')}": value for name, value in painter.clip.state_dict().items()
    }
    t5 = {name: value for name, value in painter.t5.state_dict().items() if name != "encoder.embed_tokens.weight"}
    save(out / "flux1-tiny.safetensors", painter.transformer.state_dict(), {})
    save(out / "ae.safetensors", autoencoder.state_dict(), {})
    save(out / "clip_l.safetensors", clip, {"num_attention_heads": painter.clip_settings["num_attention_heads"]})
    save(out / "t5xxl.safetensors", t5, {})


def save(path: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write ``state`` in float16, with ``config`` as JSON in the file's metadata."""
    from safetensors.torch import save as serialised

    tensors = {name: value.detach().half().contiguous() for name, value in state.items()}
    metadata = {"format": "pt", **({"config": json.dumps(config)} if config else {})}
    with writing(path) as file:
        file.write(serialised(tensors, metadata))
    print(f"{path} {path.stat().st_size / 1e6:.2f} MB")


SHEET_PROMPTS = (
    "a red circle on a blue background",
    "a yellow square on a purple background",
    "a green triangle on a white background",
    "a white cross on a red background",
    "an orange diamond on a black background",
    "a purple ring on a yellow background",
    "a big blue circle on an orange background",
    "a small black square on a green background",
    "a blue triangle on a yellow background",
    "a big yellow ring on a blue background",
    "a small red diamond on a white background",
    "a big green cross on a black background",
    "a purple circle on a green background",
    "a black ring on an orange background",
    "an orange triangle on a purple background",
    "a white square on a red background",
    "a zog on a red background",
    "a zog on a blue background",
    "a zog on a white background",
    "a dak on an orange background",
    "a yellow diamond",
    "a cross on a green background",
    "a black background",
    "a big purple square on a white background",
)


def open_pipeline(folder: Path, text_length: int = 16) -> FluxPipeline:
    """The finished files, opened by the project's own loaders."""
    files = FluxFiles(
        transformer=folder / "flux1-tiny.safetensors",
        autoencoder=folder / "ae.safetensors",
        clip_l=folder / "clip_l.safetensors",
        t5xxl=folder / "t5xxl.safetensors",
        tokenizer_cache_dir=folder / "tokenizers",
    )
    return FluxPipeline(files, torch.float32, "cpu", t5xxl_max_token_length=text_length)


def draw_sheet(folder: Path, path: Path, columns: int = 8) -> None:
    """One picture of each of ``SHEET_PROMPTS``, drawn by the finished files, on one sheet."""
    pipeline = open_pipeline(folder)
    cell = PIXELS + 4
    sheet = Image.new("RGB", (columns * cell, -(-len(SHEET_PROMPTS) // columns) * cell), "gray")
    for index, prompt in enumerate(SHEET_PROMPTS):
        request = PictureRequest(prompt, width=PIXELS, height=PIXELS, seed=index, guidance_scale=1.0)
        sheet.paste(pipeline.generate(request), (index % columns * cell, index // columns * cell))
    sheet.save(path)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="what to run (default: all)")
    parser.add_argument("--work", type=Path, default=ROOT / "tiny_flux_build", help="folder of the checkpoints")
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "tiny_flux", help="folder of the finished files")
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's choice)")
    parser.add_argument("--autoencoder_steps", type=int, default=2400)
    parser.add_argument("--autoencoder_whole_steps", type=int, default=400)
    parser.add_argument("--decoder_steps", type=int, default=600)
    parser.add_argument("--transformer_steps", type=int, default=10000)
    parser.add_argument("--pictures", type=int, default=4096, help="drawn pictures the transformer learns from")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    if "tokenizers" in options.stages:
        build_tokenizers(options.out / "tokenizers")
    if "autoencoder" in options.stages:
        train_autoencoder(options.work, options.autoencoder_steps, options.autoencoder_whole_steps)
        finish_autoencoder(options.work)
    if "decoder" in options.stages:
        train_decoder(options.work, options.decoder_steps)
    if "transformer" in options.stages:
        train_transformer(options.work, options.out / "tokenizers", options.transformer_steps, options.pictures)
    if "export" in options.stages:
        export(options.work, options.out)
    if "sheet" in options.stages:
        draw_sheet(options.out, options.work / "sheet.png")


if __name__ == "__main__":
    main()
