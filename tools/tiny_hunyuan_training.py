"""The tiny pretrained HunyuanImage-2.1 of ``assets/tiny_hunyuan_image``: all of its parts, from nothing.

It learns the drawn images of the tiny FLUX.1, and to write a quoted letter into a corner of them.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from library.models.autoencoder_hunyuan import (
    LATENT_SCALE,
    Downsample,
    HunyuanAutoencoder,
    HunyuanAutoencoderConfig,
    Upsample,
)
from library.models.byt5 import byt5_tokens
from library.models.hunyuan_image.pipeline import HunyuanImageFiles, HunyuanImagePipeline
from library.models.hunyuan_image.text import glyph_text, qwen_tokens
from library.models.hunyuan_image.transformer import HunyuanImageConfig, HunyuanImageTransformer
from library.models.loading import LoadSpec
from library.models.qwen2_5_vl import open_qwen2_5_vl
from library.models.schedules import TRAIN_STEPS
from library.models.tokenizer_files import BPE_FILES, QWEN2_5_VL, load_tokenizer
from tools import tiny_hunyuan_drawings as drawings
from tools.tiny_chroma_training import prompts_of
from tools.tiny_flux_autoencoder import PIXELS, image_batch, image_loss, psnr, stack_images, to_model
from tools.tiny_flux_drawings import WORDS
from tools.tiny_flux_runs import Run, averaged, save
from tools.tiny_hunyuan_text import HEAD_DIM, byt5_state, make_tiny_qwen2_5_vl, tiny_byt5

AVERAGE_DECAY = 0.998

# ------------------------------------------------------------------------------------------------------- autoencoder

AUTOENCODER = HunyuanAutoencoderConfig(widths=(16, 16, 32, 32, 32, 128), res_blocks=1, groups=4)
LATENT_CHANNELS = AUTOENCODER.latent_channels
LOGVAR = -10.0
"""What the predicted log-variances are pulled to: next to nothing is drawn at random when an image is encoded."""
AUTOENCODER_IMAGES = 3000


def autoencoder_images(count: int, seed: int) -> Tensor:
    """Two in three from the model's world, the others free compositions: uint8 [count, 3, 128, 128]."""
    source = random.Random(f"hunyuan autoencoder {seed}")
    pictures = []
    for index in range(count):
        if index % 3 == 2:
            pictures.append(drawings.random_free(source, PIXELS))
        else:
            pictures.append(drawings.draw_lettered(drawings.random_lettered(source), PIXELS))
    return stack_images(pictures)


def initialised_autoencoder(seed: int) -> HunyuanAutoencoder:
    """Random weights from which training starts at once: see ``tiny_flux_autoencoder.initialised_autoencoder``."""
    torch.manual_seed(seed)
    autoencoder = HunyuanAutoencoder(AUTOENCODER)
    resamplers = {module.conv: module for module in autoencoder.modules() if isinstance(module, (Downsample, Upsample))}
    for name, module in autoencoder.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        nn.init.normal_(module.weight, std=0.7 * module.weight[0].numel() ** -0.5)
        nn.init.zeros_(module.bias)
        if name.endswith(("conv2", "proj_out")):
            nn.init.zeros_(module.weight)
        elif name.endswith("conv_out"):
            nn.init.normal_(module.weight, std=0.1 * module.weight[0].numel() ** -0.5)
        else:
            folded = {Downsample: 4, Upsample: 0.25}.get(type(resamplers.get(module)), 1)
            per_group = int(module.out_channels * folded) // AUTOENCODER.groups
            position = torch.arange(module.out_channels) % per_group
            module.bias.data += (position == 0).float() * 2 - (position == 1).float() * 2
    autoencoder.encoder.conv_out.bias.data[LATENT_CHANNELS:] = LOGVAR
    return autoencoder.to(memory_format=torch.channels_last)


def train_hunyuan_autoencoder(work: Path, steps: int, whole_steps: int) -> None:
    """Encoder and decoder together; ``steps`` on 64-pixel crops, of which the last ``whole_steps`` on whole images.

    As in the tiny FLUX.1's training, the latents are pulled to mean 0 and standard deviation 1 per channel, and
    disturbed by noise of up to 0.35.
    """
    autoencoder = initialised_autoencoder(1)
    pictures = autoencoder_images(AUTOENCODER_IMAGES, 1)

    def loss_of_step(step: int) -> tuple[Tensor, str]:
        source = torch.Generator().manual_seed(6_000_000 + step)
        whole = step >= steps - whole_steps
        images = image_batch(pictures, *((4, PIXELS) if whole else (12, 64)), source)
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = autoencoder.encoder(images).float().chunk(2, dim=1)
            latents = LATENT_SCALE * mean
            strength = 0.35 * min(1.0, step / 1500) * torch.rand(len(images), 1, 1, 1, generator=source)
            noise = strength * torch.randn(latents.shape, generator=source)
            made = autoencoder.decoder((latents + noise) / LATENT_SCALE)
        average, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        spread = average.square().mean() + (deviation - 1).square().mean()
        certainty = (logvar - LOGVAR).square().mean()
        note = f"psnr {psnr(made, images):.1f} spread {spread.item():.2f}" if step % 100 == 99 else ""
        return image_loss(made, images) + 0.02 * spread + 1e-3 * certainty, note

    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    modules = {"autoencoder": autoencoder}
    run = Run("autoencoder", modules, [optimizer], steps, 100, work / "hunyuan_autoencoder.pt", AVERAGE_DECAY)
    run.train(loss_of_step, save_every=250)


def load_autoencoder(work: Path) -> HunyuanAutoencoder:
    """With the averaged weights."""
    autoencoder = HunyuanAutoencoder(AUTOENCODER)
    autoencoder.load_state_dict(averaged(work / "hunyuan_autoencoder.pt", "autoencoder"))
    return autoencoder.to(memory_format=torch.channels_last)


@torch.no_grad()
def encode(autoencoder: HunyuanAutoencoder, pictures: Tensor, batch: int = 16) -> Tensor:
    """The transformer's latents (posterior means) of uint8 images: float32 [count, 64, 4, 4]."""
    with torch.autocast("cpu", torch.bfloat16):
        parts = [autoencoder.encode_unscaled(to_model(part)) for part in pictures.split(batch)]
    return LATENT_SCALE * torch.cat(parts)


def cached_latents(work: Path, count: int) -> tuple[list[drawings.LetteredScene], Tensor]:
    """``count`` scenes and their latents in float16 [count, 64, 4, 4], which are kept in the work folder."""
    path, source = work / f"hunyuan_latents_{count}.pt", random.Random("hunyuan transformer")
    scenes = [drawings.random_lettered(source) for _ in range(count)]
    if not path.exists():
        autoencoder, parts = load_autoencoder(work), []
        for start in range(0, count, 256):
            pictures = [drawings.draw_lettered(scene, PIXELS) for scene in scenes[start : start + 256]]
            parts.append(encode(autoencoder, stack_images(pictures)).half())
        torch.save(torch.cat(parts), path)
    return scenes, torch.load(path, weights_only=True)


# -------------------------------------------------------------------------------- transformer and both text encoders

TEXT_DIM, TEXT_LAYERS = 64, 5
"""Width of Qwen2.5-VL and its layers, of which the last two are never run."""
GLYPH_DIM = 48
TRANSFORMER = HunyuanImageConfig(
    hidden_size=112,
    num_heads=4,
    depth=2,
    depth_single=3,
    refiner_depth=1,
    mlp_hidden=256,
    single_mlp_hidden=256,
    refiner_mlp_hidden=128,
    text_dim=TEXT_DIM,
    glyph_dim=GLYPH_DIM,
    glyph_hidden=96,
    frequency_dim=128,
    axes_dims=(14, 14),
)
BATCH = 24
LETTERED_PROMPTS = tuple(
    drawings.with_letter(f"a {thing} on a {background} background", letter)
    for thing, background, letter in (
        ("red circle", "blue", "A"),
        ("red circle", "blue", "X"),
        ("green square", "yellow", "H"),
        ("big blue diamond", "white", "L"),
        ("small white cross", "red", "O"),
        ("yellow ring", "purple", "T"),
        ("zog", "green", "A"),
        ("black triangle", "orange", "X"),
    )
)
QWEN_FILE = "qwen_2.5_vl.safetensors"


def write_text_encoder(work: Path) -> Path:
    """An untrained Qwen2.5-VL for which each word of the captions is one token, with its tokenizer."""
    words = " ".join([*WORDS, *drawings.LETTERS, "with"])
    path = work / "hunyuan_text" / QWEN_FILE
    return path if path.exists() else make_tiny_qwen2_5_vl(path, TEXT_DIM, layers=TEXT_LAYERS, words=words)


class HunyuanPainter(nn.Module):
    """Both text encoders and the transformer as one: captions and noisy latents in, velocity out."""

    def __init__(self, work: Path) -> None:
        super().__init__()
        opened = open_qwen2_5_vl(write_text_encoder(work))
        self.tokenizer = load_tokenizer(QWEN2_5_VL, opened.source.checkpoint, opened.vocabulary)
        torch.manual_seed(9)
        self.qwen = opened.load(LoadSpec())
        self.byt5 = tiny_byt5(GLYPH_DIM, 0)
        self.transformer = HunyuanImageTransformer(TRANSFORMER)
        self.requires_grad_(True)
        for name, parameter in self.transformer.named_parameters():
            if parameter.dim() >= 2:
                nn.init.xavier_uniform_(parameter.flatten(1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            if "_mod." in name or "modulation" in name.lower() or name.startswith("final_layer."):
                nn.init.zeros_(parameter)

    def forward(self, latents: Tensor, sigmas: Tensor, captions: Sequence[str], quoting: Sequence[str]) -> Tensor:
        """Velocity (noise minus image) of ``latents`` [batch, 64, h, w] at ``sigmas`` [batch], 1 being noise.

        Qwen2.5-VL reads ``captions``, and ByT5 what ``quoting``, as many of them, quote.
        """
        tokens = qwen_tokens(self.tokenizer, captions)
        text, mask = self.qwen(tokens.ids)[:, tokens.crop :], tokens.mask[:, tokens.crop :]
        quoted = [glyph_text(caption) for caption in quoting]
        rows = [row for row, words in enumerate(quoted) if words is not None]
        glyphs, glyph_mask = text.new_zeros(len(captions), 1, GLYPH_DIM), torch.zeros(len(captions), 1)
        if rows:
            read = byt5_tokens([words for words in quoted if words is not None], TEXT_DIM)
            states = self.byt5(read["input_ids"], read["attention_mask"])
            glyphs = states.new_zeros(len(captions), *states.shape[1:]).index_copy(0, torch.tensor(rows), states)
            glyph_mask = torch.zeros(glyphs.shape[:2], dtype=torch.int64)
            glyph_mask[rows] = read["attention_mask"]
        return self.transformer(latents, TRAIN_STEPS * sigmas, text, mask, glyphs, glyph_mask)


def painter_optimizers(painter: HunyuanPainter) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer's blocks, AdamW for everything else."""
    matrices, others = [], []
    for name, parameter in painter.named_parameters():
        inner = name.startswith("transformer.") and "blocks." in name and parameter.dim() == 2
        (matrices if inner else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train_hunyuan(work: Path, steps: int, images: int) -> None:
    """Both text encoders and the transformer together: x_s = (1 - s) x + s n, s = sigmoid(1.0 + 1.3 N(0, 1)).

    The target is n - x. Of a caption that quotes a letter, Qwen2.5-VL is shown any other in its place: which one is to
    be written, only the glyphs tell.
    """
    scenes, latents = cached_latents(work, images)
    painter = HunyuanPainter(work)

    def loss_of_step(step: int) -> tuple[Tensor, str]:
        source = torch.Generator().manual_seed(7_000_000 + step)
        words = random.Random(f"hunyuan {step}")
        chosen = torch.randint(len(scenes), (BATCH,), generator=source)
        drawn = [scenes[index] for index in chosen.tolist()]
        said, says = prompts_of([lettered.scene for lettered in drawn], words)
        letters = [lettered.letter if spoken else None for lettered, spoken in zip(drawn, says)]
        others = [letter and words.choice(sorted(drawings.LETTERS)) for letter in letters]
        captions, quoting = (list(map(drawings.with_letter, said, each)) for each in (others, letters))
        clean = latents[chosen].float()
        noise = torch.randn(clean.shape, generator=source)
        sigmas = torch.sigmoid(1.0 + 1.3 * torch.randn(BATCH, generator=source))
        mixed = torch.lerp(clean, noise, sigmas[:, None, None, None])
        return F.mse_loss(painter(mixed, sigmas, captions, quoting), noise - clean), ""

    modules, optimizers = {"painter": painter}, painter_optimizers(painter)
    run = Run("hunyuan", modules, optimizers, steps, 100, work / "hunyuan.pt", AVERAGE_DECAY)
    run.train(loss_of_step, save_every=250)


# ------------------------------------------------------------------------------------------------------------ export

FILES = {
    "transformer": "hunyuan-image-tiny.safetensors",
    "text_encoder": QWEN_FILE,
    "byt5": "byt5_glyph.safetensors",
    "autoencoder": "vae.safetensors",
}


def export_hunyuan(work: Path, out: Path) -> None:
    """Write all parts in the layouts of the real files, in float16, and Qwen2.5-VL's tokenizer beside it."""
    out.mkdir(parents=True, exist_ok=True)
    painter = HunyuanPainter(work)
    painter.load_state_dict(averaged(work / "hunyuan.pt", "painter"))
    untrained = write_text_encoder(work)
    for name in BPE_FILES:
        shutil.copy(untrained.parent / name, out)
    layers = {name: value for name, value in load_file(untrained).items() if name.startswith("model.layers.")}
    qwen = layers | {f"model.{name}": value for name, value in painter.qwen.state_dict().items()}
    save(out / FILES["transformer"], painter.transformer.state_dict(), {})
    save(out / FILES["text_encoder"], qwen, {"head_dim": HEAD_DIM})
    save(out / FILES["byt5"], byt5_state(painter.byt5, torch.float16), {})
    save(out / FILES["autoencoder"], load_autoencoder(work).state_dict(), {"norm_num_groups": AUTOENCODER.groups})


def open_hunyuan(folder: Path) -> HunyuanImagePipeline:
    """The finished files, opened by the project's own loaders."""
    return HunyuanImagePipeline(
        HunyuanImageFiles(**{part: folder / name for part, name in FILES.items()}), torch.float32, "cpu"
    )
