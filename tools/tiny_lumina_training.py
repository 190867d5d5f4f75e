"""The tiny pretrained Lumina Image 2.0 of ``assets/tiny_lumina``: its text encoder and transformer, from nothing.

It learns the drawn images of the tiny FLUX.1, whose autoencoder it shares and which is its teacher. Gemma 2 and
the transformer learn together; the tokenizer is a small one of Gemma's kind, in which each word of the captions is one
piece.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.models.flux.pipeline import FluxPipeline
from library.models.gemma2 import Gemma2TextEncoder, gemma2_config
from library.models.lumina.pipeline import LuminaFiles, LuminaPipeline
from library.models.lumina.text import with_system_prompt
from library.models.lumina.transformer import LuminaConfig, LuminaTransformer
from tools import tiny_flux_drawings as drawings
from tools.make_tiny_models import gemma_tokenizer, tokenizer_entries
from tools.tiny_chroma_training import CachedPrompts, ImageTokens, prompts_of
from tools.tiny_flux_autoencoder import cached_scenes
from tools.tiny_flux_runs import Run, averaged, save

TRANSFORMER = LuminaConfig(
    dim=144,
    heads=6,
    kv_heads=2,
    head_dim=24,
    layers=4,
    refiner_layers=1,
    ffn_dim=384,
    text_dim=96,
    time_dim=144,
    axes_dims=(8, 8, 8),
)
GEMMA = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "query_pre_attn_scalar": 24,
}
SYSTEM_PROMPTS = tuple(
    f"You are an assistant designed to generate {kind}."
    for kind in (
        "high-quality images based on user prompts",
        "high-quality images with the highest degree of image-text alignment based on textual prompts",
        "superior images with the superior degree of image-text alignment based on textual prompts or user prompts",
    )
)
"""Those that Lumina Image 2.0 was trained with."""
TOKENIZER_ENTRIES = 640
TEXT_LENGTH = 48
"""Enough for a system prompt and a caption."""
BATCH = 16
TAUGHT_BY = (1, 2, 4, 5)
"""For each layer the block of the teacher whose image tokens it is to lead to."""
FEATURE_WEIGHT = 0.1
TAUGHT_STEPS = 0.4
"""The part of the steps that has the teacher."""
AVERAGE_DECAY = 0.998


def caption_tokenizer() -> bytes:
    """A sentencepiece model in which each word of the captions and of the system prompts is one piece."""
    source = random.Random("tokenizer")
    captions = [drawings.caption(drawings.random_scene(source)) for _ in range(60)]
    prompts = [with_system_prompt(captions[0], prompt) for prompt in SYSTEM_PROMPTS]
    return gemma_tokenizer(" ".join([*captions, *prompts, *drawings.WORDS]), TOKENIZER_ENTRIES)


class LuminaPainter(nn.Module):
    """Gemma 2 and the transformer as one: prompts and noisy latents in, velocity out."""

    def __init__(self) -> None:
        super().__init__()
        from sentencepiece import SentencePieceProcessor

        self.tokenizer = caption_tokenizer()
        self.pieces = SentencePieceProcessor(model_proto=self.tokenizer)
        torch.manual_seed(7)
        self.gemma = Gemma2TextEncoder(gemma2_config({"vocab_size": tokenizer_entries(self.tokenizer), **GEMMA}))
        self.transformer = LuminaTransformer(TRANSFORMER)
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if "embed_tokens" in name:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)  # Gemma multiplies by the root of the width
            elif parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            if "adaLN_modulation" in name or "final_layer" in name:
                nn.init.zeros_(parameter)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [batch, length], as long as the longest prompt."""
        ids = [[self.pieces.bos_id(), *self.pieces.encode(prompt)] for prompt in prompts]
        longest = max(map(len, ids))
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        return torch.tensor([row + [self.pieces.pad_id()] * (longest - len(row)) for row in ids]), mask

    def forward(self, latents: Tensor, times: Tensor, prompts: Sequence[str]) -> Tensor:
        """Velocity (image minus noise) of ``latents`` [batch, 16, h, w] at ``times`` [batch], 0 being noise."""
        ids, mask = self.tokenize(prompts)
        return self.transformer(latents, times, self.gemma(ids, mask), mask)


def lumina_optimizers(painter: LuminaPainter, readers: nn.ModuleList) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer's blocks, AdamW for everything else."""
    blocks = ("transformer.layers.", "transformer.noise_refiner.", "transformer.context_refiner.")
    matrices, others = [], list(readers.parameters())
    for name, parameter in painter.named_parameters():
        (matrices if name.startswith(blocks) and parameter.dim() == 2 else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train_lumina(work: Path, teacher: FluxPipeline, steps: int, images: int) -> None:
    """Gemma 2 and transformer together: x_s = (1 - s) x + s n, s = sigmoid(1.0 + 1.4 N(0, 1)).

    The target is x - n. In the first steps it is, for whatever the teacher can be asked, the mean of that and of the
    teacher's velocity, and the teacher's image tokens have to be read from those behind the layers, through a Linear
    each that is thrown away; that part of the loss fades, and then the teacher is left.
    """
    scenes, latents = cached_scenes(work / f"teacher_latents_{images}.pt", teacher.load_autoencoder, images)
    painter, flux = LuminaPainter(), teacher.load_transformer()
    torch.manual_seed(8)
    readers = nn.ModuleList(nn.Linear(TRANSFORMER.dim, teacher.config.hidden_size) for _ in TAUGHT_BY)
    ours = ImageTokens(painter.transformer.layers)
    theirs = ImageTokens([*flux.double_blocks, *flux.single_blocks])
    conditioning_of = CachedPrompts(teacher)
    for part in (painter.gemma.layers[-1], painter.gemma.norm):  # they never run
        part.requires_grad_(False)

    def loss_of_step(step: int) -> tuple[Tensor, str]:
        source = torch.Generator().manual_seed(4_000_000 + step)
        chosen = torch.randint(len(scenes), (BATCH,), generator=source)
        words = random.Random(f"lumina {step}")
        captions, said = prompts_of([scenes[index] for index in chosen.tolist()], words)
        system = words.choice(SYSTEM_PROMPTS) if words.random() < 0.2 else ""
        prompts = [with_system_prompt(caption, system if says else "") for caption, says in zip(captions, said)]
        clean = latents[chosen].float()
        noise = torch.randn(clean.shape, generator=source)
        sigmas = torch.sigmoid(1.0 + 1.4 * torch.randn(BATCH, generator=source))
        mixed = torch.lerp(clean, noise, sigmas[:, None, None, None])
        target, remaining = clean - noise, 1 - step / (TAUGHT_STEPS * steps)
        taught = torch.tensor(said)[:, None, None, None]
        if remaining > 0:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                shown = -teacher.predict(mixed, sigmas, conditioning_of(captions), torch.ones(BATCH)).float()
            target = torch.where(taught, torch.lerp(target, shown, 0.5), target)
        error = F.mse_loss(painter(mixed, 1 - sigmas, prompts), target)
        count, features = mixed[0, 0].numel() // 4, torch.zeros(())
        read = ours.take(count)
        if remaining <= 0:
            return error, ""
        given = theirs.take(count)
        for reader, index, made in zip(readers, TAUGHT_BY, read):
            wanted = given[index]
            missed = (reader(made) - wanted).square() / wanted.var(dim=(0, 1))
            features = features + (missed * taught[:, 0]).mean()
        note = f"velocity {error.item():.4f} features {features.item() / len(readers):.3f}"
        return error + FEATURE_WEIGHT * remaining * features, note

    modules = {"painter": painter, "readers": readers}
    optimizers = lumina_optimizers(painter, readers)
    run = Run("lumina", modules, optimizers, steps, 100, work / "lumina.pt", AVERAGE_DECAY)
    run.train(loss_of_step, save_every=250)


# ------------------------------------------------------------------------------------------------------------ export


def export_lumina(work: Path, out: Path) -> None:
    """Write transformer and Gemma 2 in the layouts of the real files, in float16; the tokenizer is in the latter."""
    out.mkdir(parents=True, exist_ok=True)
    painter = LuminaPainter()
    painter.load_state_dict(averaged(work / "lumina.pt", "painter"))
    gemma = {f"model.{name}": value for name, value in painter.gemma.state_dict().items()}
    gemma["spiece_model"] = torch.tensor(list(painter.tokenizer), dtype=torch.uint8)
    save(out / "lumina-tiny.safetensors", painter.transformer.state_dict(), {})
    save(out / "gemma2.safetensors", gemma, {"head_dim": GEMMA["head_dim"]})


def open_lumina(folder: Path, flux: Path, system_prompt: str = "") -> LuminaPipeline:
    """The finished files, opened by the project's own loaders."""
    files = LuminaFiles(
        transformer=folder / "lumina-tiny.safetensors",
        gemma2=folder / "gemma2.safetensors",
        autoencoder=flux / "ae.safetensors",
    )
    return LuminaPipeline(files, torch.float32, "cpu", gemma2_max_token_length=TEXT_LENGTH, system_prompt=system_prompt)
