"""Build the tiny pretrained models of ``assets`` from nothing: drawn data, fixed seeds, no download.

The stages, in their order:

    tokenizers    CLIP and T5 tokenizers of a few hundred pieces
    autoencoder   encoder and decoder together, on crops, then on whole images
    decoder       the decoder alone, on noisy latents, so that the small errors of a sampler are drawn over
    transformer   DiT, CLIP and T5 together, on cached latents, as a rectified flow
    export        everything in the layouts of the real files, in float16, into assets/tiny_flux
    sheet         a contact sheet of images, to look at

From the finished FLUX.1 in assets/tiny_flux:

    chroma_text   T5 takes over what CLIP knew
    approximator  the network that gives all modulations
    chroma        DiT and T5 together, with the FLUX.1 as their teacher
    chroma_export Chroma's DiT and T5 into assets/tiny_chroma; autoencoder and tokenizers are FLUX.1's
    chroma_sheet  a contact sheet
    lumina        Lumina's DiT and Gemma 2 together, with the FLUX.1 as their teacher
    lumina_export Lumina's DiT and Gemma 2 into assets/tiny_lumina; the autoencoder is FLUX.1's
    lumina_sheet  a contact sheet
    sd15_autoencoder  Stable Diffusion 1.5's autoencoder, which begins as FLUX.1's
    sd15          its U-Net and CLIP together
    sd15_export   the whole model into assets/tiny_sd15
    sd15_sheet    a contact sheet

HunyuanImage-2.1 shares nothing with FLUX.1 but the drawings:

    hunyuan_autoencoder  encoder and decoder together, on crops, then on whole images
    hunyuan              DiT, Qwen2.5-VL and ByT5 together, on cached latents
    hunyuan_export       everything into assets/tiny_hunyuan_image
    hunyuan_sheet        a contact sheet, with quoted letters in its last row

``python tools/build_tiny_flux.py`` runs them all, about three hours on one core; ``--stages export sheet``
only some. A stage that was stopped resumes from its last checkpoint in the work folder. Training uses the project's own
autoencoder and transformer classes, with bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from library.console import run_script  # noqa: E402
from library.models.flux.pipeline import FluxFiles, FluxPipeline  # noqa: E402
from library.models.flux.transformer import (  # noqa: E402
    FluxConfig,
    FluxTransformer,
    image_ids,
    pack_latents,
    rope_axes,
    unpack_latents,
)
from tools import tiny_flux_drawings as drawings  # noqa: E402
from tools.tiny_chroma_training import (  # noqa: E402
    export_chroma,
    open_chroma,
    train_approximator,
    train_chroma,
    train_text,
)
from tools.tiny_flux_autoencoder import (  # noqa: E402
    LATENT_CHANNELS,
    cached_scenes,
    finish_autoencoder,
    load_folded,
    train_autoencoder,
    train_decoder,
)
from tools.tiny_flux_runs import Run, averaged, save  # noqa: E402
from tools.tiny_flux_sheet import SHEET_PROMPTS, draw_sheet  # noqa: E402
from tools.tiny_flux_tokenizers import CLIP_TOKENIZER, T5_TOKENIZER, build_tokenizers  # noqa: E402
from tools.tiny_hunyuan_training import (  # noqa: E402
    LETTERED_PROMPTS,
    export_hunyuan,
    open_hunyuan,
    train_hunyuan,
    train_hunyuan_autoencoder,
)
from tools.tiny_lumina_training import export_lumina, open_lumina, train_lumina  # noqa: E402
from tools.tiny_sd15_training import export_sd15, open_sd15, train_sd15, train_sd15_autoencoder  # noqa: E402

STAGES = ("tokenizers", "autoencoder", "decoder", "transformer", "export", "sheet")
CHROMA_STAGES = ("chroma_text", "approximator", "chroma", "chroma_export", "chroma_sheet")
LUMINA_STAGES = ("lumina", "lumina_export", "lumina_sheet")
HUNYUAN_STAGES = ("hunyuan_autoencoder", "hunyuan", "hunyuan_export", "hunyuan_sheet")
HUNYUAN_OUT = ROOT / "assets" / "tiny_hunyuan_image"
SD15_STAGES = ("sd15_autoencoder", "sd15", "sd15_export", "sd15_sheet")
ALL_STAGES = (*STAGES, *CHROMA_STAGES, *LUMINA_STAGES, *HUNYUAN_STAGES, *SD15_STAGES)


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


def train_transformer(work: Path, tokenizers: Path, steps: int, images: int) -> None:
    """DiT, CLIP and T5 together: x_t = (1 - t) x + t n, target n - x, t = sigmoid(0.6 + 1.1 N(0, 1)).

    The guidance input is random and so learned to be ignored. Every sixth step has the longer text, so that padding of
    another length does not surprise the model.
    """
    scenes, latents = cached_scenes(work / f"latents_{images}.pt", lambda: load_folded(work), images)
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
    autoencoder = load_folded(work)
    if (work / "decoder.pt").exists():
        autoencoder.decoder.load_state_dict(averaged(work / "decoder.pt", "decoder"))
    clip = {
        f"text_model.{name.removeprefix('text_model.')}": value for name, value in painter.clip.state_dict().items()
    }
    t5 = {name: value for name, value in painter.t5.state_dict().items() if name != "encoder.embed_tokens.weight"}
    save(out / "flux1-tiny.safetensors", painter.transformer.state_dict(), {})
    save(out / "ae.safetensors", autoencoder.state_dict(), {"norm_num_groups": autoencoder.config.groups})
    save(out / "clip_l.safetensors", clip, {"num_attention_heads": painter.clip_settings["num_attention_heads"]})
    save(out / "t5xxl.safetensors", t5, {})


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


def main() -> None:
    """Run the stages of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=ALL_STAGES, help="what to run (default: all)")
    parser.add_argument("--work", type=Path, default=ROOT / "tiny_flux_build", help="folder of the checkpoints")
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "tiny_flux", help="folder of the finished files")
    parser.add_argument("--chroma_out", type=Path, default=ROOT / "assets" / "tiny_chroma", help="the same of Chroma's")
    parser.add_argument("--lumina_out", type=Path, default=ROOT / "assets" / "tiny_lumina", help="the same of Lumina's")
    parser.add_argument("--hunyuan_out", type=Path, default=HUNYUAN_OUT, help="the same of HunyuanImage-2.1's")
    parser.add_argument("--sd15_out", type=Path, default=ROOT / "assets" / "tiny_sd15", help="the same of SD 1.5's")
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's choice)")
    parser.add_argument("--autoencoder_steps", type=int, default=2400)
    parser.add_argument("--autoencoder_whole_steps", type=int, default=400)
    parser.add_argument("--decoder_steps", type=int, default=600)
    parser.add_argument("--transformer_steps", type=int, default=10000)
    parser.add_argument("--images", type=int, default=4096, help="drawn images the transformer learns from")
    parser.add_argument("--chroma_text_steps", type=int, default=600)
    parser.add_argument("--approximator_steps", type=int, default=400)
    parser.add_argument("--chroma_steps", type=int, default=3500)
    parser.add_argument("--lumina_steps", type=int, default=2000)
    parser.add_argument("--hunyuan_autoencoder_steps", type=int, default=2000)
    parser.add_argument("--hunyuan_autoencoder_whole_steps", type=int, default=500)
    parser.add_argument("--hunyuan_steps", type=int, default=2000)
    parser.add_argument("--hunyuan_images", type=int, default=2048, help="the same of HunyuanImage-2.1")
    parser.add_argument("--sd15_autoencoder_steps", type=int, default=950)
    parser.add_argument("--sd15_steps", type=int, default=1600)
    options = parser.parse_args()
    options.stages = options.stages or ALL_STAGES
    if options.threads:
        torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    build_flux(options)
    if set(options.stages) & set(CHROMA_STAGES):
        build_chroma(options)
    if set(options.stages) & set(LUMINA_STAGES):
        build_lumina(options)
    if set(options.stages) & set(HUNYUAN_STAGES):
        build_hunyuan(options)
    if set(options.stages) & set(SD15_STAGES):
        build_sd15(options)


def build_flux(options: argparse.Namespace) -> None:
    """Run the chosen stages of FLUX.1."""
    if "tokenizers" in options.stages:
        build_tokenizers(options.out / "tokenizers")
    if "autoencoder" in options.stages:
        train_autoencoder(options.work, options.autoencoder_steps, options.autoencoder_whole_steps)
        finish_autoencoder(options.work)
    if "decoder" in options.stages:
        train_decoder(options.work, options.decoder_steps)
    if "transformer" in options.stages:
        train_transformer(options.work, options.out / "tokenizers", options.transformer_steps, options.images)
    if "export" in options.stages:
        export(options.work, options.out)
    if "sheet" in options.stages:
        draw_sheet(open_pipeline(options.out), options.work / "sheet.png", guidance_scale=1.0)


def build_chroma(options: argparse.Namespace) -> None:
    """Run the chosen stages of Chroma."""
    work, teacher = options.work, open_pipeline(options.out)
    if "chroma_text" in options.stages:
        train_text(work, teacher, options.chroma_text_steps)
    if "approximator" in options.stages:
        train_approximator(work, teacher, options.approximator_steps)
    if "chroma" in options.stages:
        train_chroma(work, teacher, options.chroma_steps, options.images)
    if "chroma_export" in options.stages:
        export_chroma(work, teacher, options.chroma_out)
    if "chroma_sheet" in options.stages:
        pipeline = open_chroma(options.chroma_out, options.out)
        draw_sheet(pipeline, work / "chroma_sheet.png", guidance_scale=0.0)
        draw_sheet(pipeline, work / "chroma_sheet_guided.png", guidance_scale=0.0, negative_prompt="", scale=2.0)


def build_lumina(options: argparse.Namespace) -> None:
    """Run the chosen stages of Lumina."""
    work = options.work
    if "lumina" in options.stages:
        train_lumina(work, open_pipeline(options.out), options.lumina_steps, options.images)
    if "lumina_export" in options.stages:
        export_lumina(work, options.lumina_out)
    if "lumina_sheet" in options.stages:
        draw_sheet(open_lumina(options.lumina_out, options.out), work / "lumina_sheet.png", scale=3.5)


def build_hunyuan(options: argparse.Namespace) -> None:
    """Run the chosen stages of HunyuanImage-2.1."""
    work = options.work
    if "hunyuan_autoencoder" in options.stages:
        train_hunyuan_autoencoder(work, options.hunyuan_autoencoder_steps, options.hunyuan_autoencoder_whole_steps)
    if "hunyuan" in options.stages:
        train_hunyuan(work, options.hunyuan_steps, options.hunyuan_images)
    if "hunyuan_export" in options.stages:
        export_hunyuan(work, options.hunyuan_out)
    if "hunyuan_sheet" in options.stages:
        pipeline = open_hunyuan(options.hunyuan_out)
        draw_sheet(pipeline, work / "hunyuan_sheet.png", [*SHEET_PROMPTS, *LETTERED_PROMPTS], sample_steps=20)


def build_sd15(options: argparse.Namespace) -> None:
    """Run the chosen stages of Stable Diffusion 1.5."""
    work, flux = options.work, open_pipeline(options.out)
    if "sd15_autoencoder" in options.stages:
        train_sd15_autoencoder(work, flux, options.sd15_autoencoder_steps)
    if "sd15" in options.stages:
        train_sd15(work, flux, options.sd15_steps, options.images)
    if "sd15_export" in options.stages:
        export_sd15(work, flux, options.sd15_out)
    if "sd15_sheet" in options.stages:
        draw_sheet(open_sd15(options.sd15_out), work / "sd15_sheet.png", scale=5.0, sample_steps=20)


if __name__ == "__main__":
    run_script(main)
