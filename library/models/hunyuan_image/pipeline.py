"""HunyuanImage-2.1 as one object: its files, its parts, and everything that is done with them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from library.memory.storage import StorageDtype
from library.models.attention import AttentionBackend
from library.models.autoencoder_hunyuan import LATENT_SCALE, HunyuanAutoencoderFile, open_hunyuan_autoencoder
from library.models.byt5 import open_byt5
from library.models.flow_pipeline import DoubleSinglePipeline, part_path, require_width
from library.models.hunyuan_image.checkpoint import TransformerFile, open_transformer
from library.models.hunyuan_image.text import encode_glyphs, encode_qwen, glyph_text, qwen_tokens
from library.models.hunyuan_image.transformer import HunyuanImageConfig
from library.models.loading import TensorSource
from library.models.pipeline import Conditioning, ImageRequest
from library.models.qwen2_5_vl import Qwen25VLFile, open_qwen2_5_vl
from library.models.sampling import AdaptiveProjected, FlowEuler, Guidance, Role, Unguided
from library.models.schedules import TRAIN_STEPS, flow_sigmas
from library.models.t5 import T5File
from library.models.tokenizer_files import QWEN2_5_VL, TokenizerKind
from library.randomness import draw_noise, seeded_generator

Part = Literal["transformer", "autoencoder", "text_encoder", "byt5"]
Encoder = Literal["text_encoder", "byt5"]
PARTS: tuple[Part, ...] = ("transformer", "autoencoder", "text_encoder", "byt5")
ENCODERS: tuple[Encoder, ...] = ("text_encoder", "byt5")


@dataclass(frozen=True)
class HunyuanImageFiles:
    """Where the parts are. A part that is None is looked for in the transformer's own Diffusers folder."""

    transformer: Path | str
    text_encoder: Path | str | None = None
    byt5: Path | str | None = None
    autoencoder: Path | str | None = None
    tokenizer_cache_dir: Path | str | None = None
    disable_mmap: bool = False
    transformer_option: str = "--pretrained_model_name_or_path"
    """The option that names the transformer in this script, for messages; the others are --text_encoder, --byt5 and
    --vae."""


@dataclass
class HunyuanImageRequest(ImageRequest):
    """Sides are rounded up to whole tokens (32 pixels)."""

    width: int = 2048
    height: int = 2048
    sample_steps: int = 50
    scale: float = 3.5
    flow_shift: float = 5.0
    """Shift of the schedule towards more noise."""
    apg_start_step_ocr: int = 38
    """The last step with classifier-free guidance where the prompt quotes a text; after it, guidance is projected."""
    apg_start_step_general: int = 5
    """The same for other prompts."""
    guidance_rescale: float = 0.0
    """Share of the positive prediction's standard deviation in a guided one."""
    guidance_rescale_apg: float = 0.0
    """The same for projected guidance."""


class HunyuanImagePipeline(DoubleSinglePipeline[HunyuanImageRequest]):
    """Opens the files by their headers, loads parts when they are needed, and runs them.

    ``parts`` are those that will be needed; an autoencoder alone decodes latents. Raises UserError, before anything is
    loaded, when one of the files isn't what it should be, doesn't fit the others, or isn't given.
    """

    all_parts = PARTS
    denoiser = "transformer"
    request_class = HunyuanImageRequest
    read_on_host = frozenset({"vlm_mask", "byt5_mask"})
    token_side = 1
    files: OpenedFiles

    def __init__(
        self,
        files: HunyuanImageFiles,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        dtypes: Mapping[Part, StorageDtype | None] | None = None,
        parts: Collection[Part] = PARTS,
        text_encoders_on_host: bool = False,
        vae_chunk_size: int | None = None,
        attention_backend: AttentionBackend = "sdpa",
    ):
        super().__init__(dtype, device, dtypes, attention_backend, files.tokenizer_cache_dir)
        self.encoders: tuple[Encoder, ...] = ENCODERS
        self.parts = tuple(parts)
        self.files = open_files(files, self.parts)
        self.vae_chunk_size = vae_chunk_size
        self.on_host = ENCODERS if text_encoders_on_host else ()

    @property
    def config(self) -> HunyuanImageConfig:
        """The transformer's sizes, inferred from its file."""
        return self.opened("transformer").config

    @property
    def latent_stride(self) -> int:
        """Pixels per latent position, and the side of a token."""
        return self.files.autoencoder.config.stride if self.files.autoencoder else 32

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.files.autoencoder.config.latent_channels if self.files.autoencoder else self.config.in_channels

    def prepare(self, part: str, module: Any) -> None:
        """The transformer gets the attention backend, the autoencoder the height of its strips."""
        if part == "transformer":
            module.set_attention_backend(self.attention_backend)
        elif part == "autoencoder":
            module.set_chunk_size(self.vae_chunk_size)

    def tokenizer_kind(self, encoder: str) -> TokenizerKind:
        """Qwen2.5-VL's."""
        return QWEN2_5_VL

    def load_tokenizers(self, encoders: Collection[str] | None = None) -> None:
        """As for every family; ByT5 reads bytes and has none."""
        wanted = self.encoders if encoders is None else encoders
        super().load_tokenizers([encoder for encoder in wanted if encoder != "byt5"])

    # Images and texts

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], float32 in -1..1, of ``latents`` [B, 64, h, w] as the transformer gives them."""
        return super().decode_latents(latents / LATENT_SCALE)

    def encode_prompts(
        self,
        prompts: Sequence[str],
        encoders: Collection[Encoder] | None = None,
        role: Role = "positive",
        trained: Collection[Encoder] = (),
    ) -> dict[str, Tensor]:
        """Conditioning, batch first: ``vlm_embed`` [B, L, width] and ``vlm_mask`` [B, L] of the prompts, ``byt5_embed``
        [B, 128, width], ``byt5_mask`` [B, 128] and ``ocr_mask`` [B] of the texts that they quote. It is the same for
        both roles."""
        encoders = self.encoders if encoders is None else encoders
        conditioning: dict[str, Tensor] = {}
        for encoder, module in zip(encoders, self.load_text_encoders(encoders)):
            if encoder == "text_encoder":
                conditioning |= encode_qwen(module, qwen_tokens(self.tokenizer("text_encoder"), prompts))
            else:
                conditioning |= encode_glyphs(module, prompts)
        return conditioning

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity (noise minus image) [B, 64, h, w] of noisy ``latents``; ``timesteps`` [B] are sigmas in 0..1."""
        device = latents.device
        return self.load_transformer()(
            latents,
            TRAIN_STEPS * timesteps.to(device).float(),
            conditioning["vlm_embed"].to(device),
            conditioning["vlm_mask"],
            conditioning["byt5_embed"].to(device),
            conditioning["byt5_mask"],
        )

    # Drawing

    def solver(self, request: HunyuanImageRequest) -> FlowEuler:
        """Euler steps over a shifted schedule."""
        return FlowEuler(flow_sigmas(request.sample_steps, request.flow_shift))

    def guidance(self, request: HunyuanImageRequest) -> Guidance:
        """Classifier-free, later projected; when, depends on whether the prompt quotes a text. A scale of 1 is none."""
        if request.scale == 1:
            return Unguided()
        quotes = glyph_text(request.prompt) is not None
        return AdaptiveProjected(
            request.scale,
            request.apg_start_step_ocr if quotes else request.apg_start_step_general,
            request.guidance_rescale,
            request.guidance_rescale_apg,
        )

    def generator(self, request: HunyuanImageRequest) -> torch.Generator:
        """On the CPU, as users of kohya-ss/sd-scripts know it."""
        return seeded_generator(request.seed)

    def start_noise(self, request: HunyuanImageRequest, generators: Sequence[torch.Generator]) -> Tensor:
        """Drawn on the CPU in bfloat16: so that a seed gives the image that users of kohya-ss/sd-scripts know."""
        height, width = (side // self.latent_stride for side in self.image_size(request))
        noise = draw_noise((self.latent_channels, height, width), generators, torch.bfloat16)
        return noise.to(self.device)


@dataclass(frozen=True)
class OpenedFiles:
    """The opened files of the parts that a pipeline needs."""

    transformer: TransformerFile | None
    autoencoder: HunyuanAutoencoderFile | None
    text_encoder: Qwen25VLFile | None
    byt5: T5File | None


def open_files(files: HunyuanImageFiles, parts: Collection[Part]) -> OpenedFiles:
    """Open the files of ``parts`` and check that they fit together. Raises UserError."""
    transformer = autoencoder = text_encoder = byt5 = None
    if "transformer" in parts:
        transformer = open_transformer(files.transformer, files.disable_mmap, files.transformer_option)

    def path(given: Path | str | None, option: str, name: str, subfolder: str) -> Path | str:
        return part_path(files.transformer, None, given, option=option, name=name, subfolder=subfolder)

    def require(source: TensorSource, width: int, wanted: Callable[[HunyuanImageConfig], int]) -> None:
        if transformer is not None:
            require_width(transformer, source, width, wanted(transformer.config))

    if "text_encoder" in parts:
        found = path(files.text_encoder, "--text_encoder", "Qwen2.5-VL", "text_encoder")
        text_encoder = open_qwen2_5_vl(found, files.disable_mmap, "--text_encoder")
        require(text_encoder.source, text_encoder.hidden_size, lambda config: config.text_dim)
    if "byt5" in parts:
        found = path(files.byt5, "--byt5", "byT5", "text_encoder_2")
        byt5 = open_byt5(found, files.disable_mmap, "--byt5")
        require(byt5.source, byt5.hidden_size, lambda config: config.glyph_dim)
    if "autoencoder" in parts:
        found = path(files.autoencoder, "--vae", "autoencoder", "vae")
        autoencoder = open_hunyuan_autoencoder(found, files.disable_mmap, "--vae")
        require(autoencoder.source, autoencoder.config.latent_channels, lambda config: config.in_channels)
    return OpenedFiles(transformer, autoencoder, text_encoder, byt5)
