"""The tiny pretrained Chroma of ``assets/tiny_chroma``, made from the tiny FLUX.1 as the real one was made from FLUX.1.

Chroma has no pooled text and no modulation layers: what they did must come from the T5 tokens and from the timestep
alone. Three short trainings, each with the tiny FLUX.1 as its teacher, bring that about: the text encoder, the
approximator, and then all of it on drawn images.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.models.flux.chroma import ChromaConfig, ChromaTransformer
from library.models.flux.pipeline import ChromaPipeline, FluxFiles, FluxPipeline
from library.models.flux.transformer import (
    FluxTransformer,
    image_ids,
    pack_latents,
    sinusoid,
    unpack_latents,
)
from library.models.t5 import T5TextEncoder
from tools import tiny_flux_drawings as drawings
from tools.tiny_flux_autoencoder import cached_scenes
from tools.tiny_flux_runs import Run, averaged, save

APPROXIMATOR = {"approximator_in": 64, "approximator_hidden": 192, "approximator_layers": 3}
TEXT_LENGTH = 16
BATCH = 16
CAPTIONS = 128
TIMES = 512
NOTHING_SAID = 0.1
FEATURE_WEIGHT = 0.03


class TrainableChroma(ChromaTransformer):
    """Chroma with gradients in its approximator."""

    def modulations(self, timesteps: Tensor) -> Tensor:
        return self.distilled_guidance_layer(self.modulation_inputs(timesteps))


class ChromaPainter(nn.Module):
    """T5 and transformer as one: token ids and noisy latents in, velocity out."""

    def __init__(self, teacher: FluxPipeline):
        """With the teacher's weights wherever both models have the same tensors."""
        super().__init__()
        given, flux = teacher.load_transformer().state_dict(), teacher.config
        torch.manual_seed(5)
        self.transformer = TrainableChroma(
            ChromaConfig(
                hidden_size=flux.hidden_size,
                num_heads=flux.num_heads,
                depth=flux.depth,
                depth_single=flux.depth_single,
                in_channels=flux.in_channels,
                out_channels=flux.out_channels,
                context_dim=flux.context_dim,
                mlp_hidden=flux.mlp_hidden,
                axes_dims=flux.axes_dims,
                **APPROXIMATOR,
            )
        )
        own = {name: given.get(name, value) for name, value in self.transformer.state_dict().items()}
        self.transformer.load_state_dict(own)
        (text_encoder,) = teacher.load_text_encoders(["t5xxl"])
        self.t5 = T5TextEncoder(text_encoder.config)
        self.t5.load_state_dict(text_encoder.state_dict())

    def forward(self, latents: Tensor, times: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Velocity of ``latents`` [batch, 16, h, w] at ``times`` [batch]; ``tokens`` and ``mask`` [batch, length]."""
        height, width = latents.shape[-2:]
        text, places = self.t5(tokens, mask), image_ids(height, width)
        made = self.transformer(
            pack_latents(latents), places, text, torch.zeros(text.shape[1], 3), times, txt_attention_mask=mask
        )
        return unpack_latents(made, height, width)


# ---------------------------------------------------------------------------------------------------------- the text


def train_text(work: Path, teacher: FluxPipeline, steps: int) -> None:
    """T5 alone, on captions: it keeps the states of words, and its end and first padding token take what CLIP knew.

    Both tokens together must tell CLIP's pooled vector through one Linear, which is thrown away. So Chroma's
    transformer finds in them what FLUX.1 was given as a vector. From here on padding is hidden from T5.
    """
    painter = ChromaPainter(teacher)
    torch.manual_seed(6)
    pooled_width = teacher.config.vector_dim
    reader = nn.Linear(2 * teacher.config.context_dim, pooled_width)

    def loss_of_step(step: int) -> tuple[Tensor, str]:
        source = random.Random(f"text {step}")
        captions = [drawings.random_caption(drawings.random_scene(source), source) for _ in range(CAPTIONS)]
        wanted = teacher.encode_prompts(captions)
        tokens = teacher.tokenize(captions, ["t5xxl"])
        states, mask = painter.t5(tokens["t5_tokens"], tokens["t5_attn_mask"]), tokens["t5_attn_mask"]
        items, ends = torch.arange(CAPTIONS), mask.sum(dim=1) - 1
        after = (ends + 1).clamp(max=mask.shape[1] - 1)
        read = reader(torch.cat((states[items, ends], states[items, after]), dim=-1))
        lost = (read - wanted["l_pooled"]).square().mean() / wanted["l_pooled"].var(dim=0).mean()
        words = torch.arange(mask.shape[1]) < ends[:, None]
        changed = (states - wanted["t5_out"])[words].square().mean() / wanted["t5_out"].var()
        return lost + changed, f"pooled lost {lost.item():.4f} words changed {changed.item():.4f}"

    optimizer = torch.optim.AdamW(
        [{"params": list(painter.t5.parameters()), "lr": 2e-3}, {"params": list(reader.parameters()), "lr": 5e-3}],
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )
    modules = {"t5": painter.t5, "reader": reader}
    Run("text", modules, [optimizer], steps, 50, work / "chroma_text.pt", 0.99).train(loss_of_step)


# -------------------------------------------------------------------------------------------------- the approximator


@torch.no_grad()
def teacher_modulations(flux: FluxTransformer, times: Tensor, pooled: Tensor) -> Tensor:
    """FLUX.1's modulation vectors in Chroma's order [times, count, hidden], averaged over ``pooled`` [captions, 64]."""
    width, hidden = flux.config.time_dim, flux.config.hidden_size
    guidance = flux.guidance_in(sinusoid(torch.full((1,), 2.5), width))
    vector = flux.time_in(sinusoid(times, width))[:, None] + flux.vector_in(pooled) + guidance
    modulations = [block.modulation for block in flux.single_blocks]
    modulations += [block.img_mod for block in flux.double_blocks] + [block.txt_mod for block in flux.double_blocks]
    parts = [modulation.lin(F.silu(vector)) for modulation in modulations]
    joined = torch.cat([*parts, flux.final_layer.adaLN_modulation(vector)], dim=-1)
    return joined.mean(dim=1).unflatten(-1, (-1, hidden))


def train_approximator(work: Path, teacher: FluxPipeline, steps: int) -> None:
    """The approximator alone: FLUX.1's modulations at random timesteps, averaged over captions."""
    painter, source = ChromaPainter(teacher), random.Random("approximator")
    captions = [drawings.caption(drawings.random_scene(source)) for _ in range(32)]
    pooled = teacher.encode_prompts(captions, ["clip_l"])["l_pooled"]
    wanted = teacher_modulations(teacher.load_transformer(), torch.arange(TIMES + 1) / TIMES, pooled)

    def loss_of_step(step: int) -> tuple[Tensor, str]:
        chosen = torch.randint(TIMES + 1, (32,), generator=torch.Generator().manual_seed(2_000_000 + step))
        return F.mse_loss(painter.transformer.modulations(chosen / TIMES), wanted[chosen]), ""

    approximator = painter.transformer.distilled_guidance_layer
    optimizer = torch.optim.AdamW(approximator.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    run = Run("approximator", {"approximator": approximator}, [optimizer], steps, 50, work / "approximator.pt", 0.99)
    run.train(loss_of_step)


# ------------------------------------------------------------------------------------------------------- all of it


class ImageTokens:
    """The image tokens behind each of a transformer's blocks, gathered during a forward pass."""

    def __init__(self, blocks: Iterable[nn.Module]):
        self.gathered: list[Tensor] = []
        for block in blocks:
            block.register_forward_hook(self._gather)

    def _gather(self, block: nn.Module, inputs: object, output: Tensor | tuple[Tensor, Tensor]) -> None:
        self.gathered.append(output[0] if isinstance(output, tuple) else output)

    def take(self, count: int) -> list[Tensor]:
        """Those of the last pass, ``count`` tokens each, in float32."""
        taken, self.gathered = [tokens[:, -count:].float() for tokens in self.gathered], []
        return taken


class CachedPrompts:
    """A teacher's conditioning of captions, each of which is encoded once."""

    def __init__(self, teacher: FluxPipeline):
        self.teacher = teacher
        self.encoded: dict[str, dict[str, Tensor]] = {}

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        for caption in captions:
            if caption not in self.encoded:
                self.encoded[caption] = self.teacher.encode_prompts([caption])
        names = self.encoded[captions[0]]
        return {name: torch.cat([self.encoded[caption][name] for caption in captions]) for name in names}


def prompts_of(scenes: Sequence[drawings.Scene], source: random.Random) -> tuple[list[str], list[bool]]:
    """Captions, and for which of them something is said: the others are empty or one made-up word.

    They are what a negative prompt is compared with.
    """
    captions, said = [], []
    for scene in scenes:
        says = source.random() >= NOTHING_SAID
        nothing = "" if source.random() < 0.5 else drawings.made_up_word(source)
        captions.append(drawings.random_caption(scene, source) if says else nothing)
        said.append(says)
    return captions, said


def train_chroma(work: Path, teacher: FluxPipeline, steps: int, images: int) -> None:
    """T5 and transformer together: x_t = (1 - t) x + t n, t = sigmoid(0.6 + 1.1 N(0, 1)).

    The target is n - x, and for whatever the teacher can be asked the mean of that and of the teacher's velocity; there
    the image tokens behind each block are pulled to the teacher's, too.
    """
    scenes, latents = cached_scenes(work / f"teacher_latents_{images}.pt", teacher.load_autoencoder, images)
    painter = ChromaPainter(teacher)
    painter.t5.load_state_dict(averaged(work / "chroma_text.pt", "t5"))
    painter.transformer.distilled_guidance_layer.load_state_dict(averaged(work / "approximator.pt", "approximator"))
    conditioning_of = CachedPrompts(teacher)
    ours, theirs = (
        ImageTokens([*transformer.double_blocks, *transformer.single_blocks])
        for transformer in (painter.transformer, teacher.load_transformer())
    )

    def loss_of_step(step: int) -> tuple[Tensor, str]:
        source = torch.Generator().manual_seed(3_000_000 + step)
        chosen = torch.randint(len(scenes), (BATCH,), generator=source)
        captions, said = prompts_of([scenes[index] for index in chosen.tolist()], random.Random(f"chroma {step}"))
        clean = latents[chosen].float()
        noise = torch.randn(clean.shape, generator=source)
        times = torch.sigmoid(0.6 + 1.1 * torch.randn(BATCH, generator=source))
        mixed = torch.lerp(clean, noise, times[:, None, None, None])
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                shown = teacher.predict(mixed, times, conditioning_of(captions), torch.ones(BATCH))
            tokens = padded_tokens(teacher, captions, 2 * TEXT_LENGTH if step % 6 == 5 else TEXT_LENGTH)
            velocity = painter(mixed, times, tokens["t5_tokens"], tokens["t5_attn_mask"])
        taught = torch.tensor(said)[:, None, None, None]
        target = torch.where(taught, torch.lerp(noise - clean, shown.float(), 0.5), noise - clean)
        count, features = mixed[0, 0].numel() // 4, torch.zeros(())
        for made, wanted in zip(ours.take(count), theirs.take(count)):
            features = features + ((made - wanted).square() * taught[:, 0]).mean() / wanted.var()
        error = F.mse_loss(velocity.float(), target)
        return error + FEATURE_WEIGHT * features, f"velocity {error.item():.4f} features {features.item():.3f}"

    run = Run("chroma", {"painter": painter}, chroma_optimizers(painter), steps, 50, work / "chroma.pt", AVERAGE_DECAY)
    run.train(loss_of_step, save_every=250)


AVERAGE_DECAY = 0.997


def padded_tokens(teacher: FluxPipeline, captions: Sequence[str], length: int) -> dict[str, Tensor]:
    """T5's tokens and their mask, padded to ``length``."""
    teacher.text_lengths["t5xxl"] = length
    tokens = teacher.tokenize(captions, ["t5xxl"])
    teacher.text_lengths["t5xxl"] = TEXT_LENGTH
    return tokens


def chroma_optimizers(painter: ChromaPainter) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer's blocks, AdamW for everything else."""
    matrices, others = [], []
    for name, parameter in painter.named_parameters():
        inner = name.startswith(("transformer.double_blocks", "transformer.single_blocks")) and parameter.dim() == 2
        (matrices if inner else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=1.5e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1.1e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


# ------------------------------------------------------------------------------------------------------------ export


def export_chroma(work: Path, teacher: FluxPipeline, out: Path) -> None:
    """Write transformer and T5 in the layouts of the real files, in float16; all else is FLUX.1's."""
    out.mkdir(parents=True, exist_ok=True)
    painter = ChromaPainter(teacher)
    painter.load_state_dict(averaged(work / "chroma.pt", "painter"))
    t5 = {
        "shared.weight" if name == "encoder.embed_tokens.weight" else name: value
        for name, value in painter.t5.state_dict().items()
    }
    save(out / "chroma-tiny.safetensors", painter.transformer.state_dict(), {})
    save(out / "t5xxl.safetensors", t5, {})


def open_chroma(folder: Path, flux: Path) -> ChromaPipeline:
    """The finished files, opened by the project's own loaders."""
    files = FluxFiles(
        transformer=folder / "chroma-tiny.safetensors",
        autoencoder=flux / "ae.safetensors",
        t5xxl=folder / "t5xxl.safetensors",
        tokenizer_cache_dir=flux / "tokenizers",
    )
    return ChromaPipeline(files, torch.float32, "cpu", t5xxl_max_token_length=TEXT_LENGTH)
