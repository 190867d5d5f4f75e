"""Lumina Image 2.0 as one object: its files, its parts, and everything that is done with them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from library.errors import UserError
from library.memory.storage import StorageDtype
from library.models.attention import AttentionBackend
from library.models.autoencoder_kl import AutoencoderFile, open_autoencoder
from library.models.flow_pipeline import FlowPipeline, part_path, require_width
from library.models.gemma2 import Gemma2File, open_gemma2
from library.models.lumina.checkpoint import TransformerFile, open_transformer
from library.models.lumina.text import TEXT_LENGTH, encode_gemma, gemma_tokens, with_system_prompt
from library.models.lumina.transformer import LuminaConfig
from library.models.pipeline import Conditioning, ImageRequest
from library.models.recognition import AUTOENCODER_PREFIXES, GEMMA2_PREFIXES
from library.models.sampling import FlowEuler, Guidance, Role, TruncatedClassifierFree, Unguided
from library.models.schedules import lumina_sigmas
from library.models.tokenizer_files import GEMMA_2, TokenizerKind
from library.randomness import draw_noise

Part = Literal["transformer", "autoencoder", "gemma2"]
Encoder = Literal["gemma2"]
PARTS: tuple[Part, ...] = ("transformer", "autoencoder", "gemma2")


@dataclass(frozen=True)
class LuminaFiles:
    """Where the parts are. A part that is None is looked for in the transformer's own folder or file."""

    transformer: Path | str
    gemma2: Path | str | None = None
    autoencoder: Path | str | None = None
    tokenizer_cache_dir: Path | str | None = None
    disable_mmap: bool = False
    transformer_option: str = "--pretrained_model_name_or_path"
    """The option that names the transformer in this script, for messages."""
    gemma2_option: str = "--gemma2"
    autoencoder_option: str = "--ae"


@dataclass
class LuminaRequest(ImageRequest):
    """Sides are rounded up to whole tokens (16 pixels)."""

    width: int = 1024
    height: int = 1024
    sample_steps: int = 36
    scale: float = 3.5
    cfg_trunc_ratio: float = 0.25
    """Guidance acts while t, which runs from 0 (noise) to 1 (image), is below this."""
    renorm_cfg: float = 1.0
    """A guided velocity is at most this many times as long as that for the prompt; 0 leaves it as it is."""
    flow_shift: float = 6.0
    """Shift of the schedule towards more noise."""
    noise_dtype: torch.dtype | None = None
    """The dtype in which noise is drawn; None: the pipeline's."""


class LuminaPipeline(FlowPipeline[LuminaRequest]):
    """Opens the files by their headers, loads parts when they are needed, and runs them.

    ``parts`` are those that will be needed. ``system_prompt`` goes before positive prompts, and before negative ones
    ``system_prompt_in_negative`` says so. Raises UserError, before anything is loaded, when one of the files isn't
    what it should be, doesn't fit the others, or isn't given.
    """

    all_parts = PARTS
    denoiser = "transformer"
    request_class = LuminaRequest
    block_list_names = ("context_refiner", "noise_refiner", "layers")
    read_on_host = frozenset({"attention_mask"})
    files: OpenedFiles

    def __init__(
        self,
        files: LuminaFiles,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        dtypes: Mapping[Part, StorageDtype | None] | None = None,
        parts: Collection[Part] = PARTS,
        gemma2_max_token_length: int | None = None,
        system_prompt: str = "",
        system_prompt_in_negative: bool = False,
        attention_backend: AttentionBackend = "sdpa",
    ):
        super().__init__(dtype, device, dtypes, attention_backend, files.tokenizer_cache_dir)
        self.encoders: tuple[Encoder, ...] = ("gemma2",)
        self.parts = tuple(parts)
        self.files = open_files(files, self.parts)
        self.text_length = gemma2_max_token_length or TEXT_LENGTH
        self.system_prompts: dict[Role, str] = {
            "positive": system_prompt,
            "negative": system_prompt if system_prompt_in_negative else "",
        }

    @property
    def config(self) -> LuminaConfig:
        """The transformer's sizes, inferred from its file."""
        return self.files.transformer.config

    @property
    def latent_channels(self) -> int:
        """Channels of a latent; 2 x 2 positions are one token."""
        return self.config.latent_channels

    def prepare(self, part: str, module: Any) -> None:
        """The transformer gets the attention backend."""
        if part == "transformer":
            module.set_attention_backend(self.attention_backend)

    def tokenizer_kind(self, encoder: str) -> TokenizerKind:
        """Gemma 2's."""
        return GEMMA_2

    # Texts and prediction

    def encode_prompts(
        self,
        prompts: Sequence[str],
        encoders: Collection[Encoder] | None = None,
        role: Role = "positive",
        trained: Collection[Encoder] = (),
    ) -> dict[str, Tensor]:
        """Conditioning, batch first: ``hidden_state`` [B, L, width], ``attention_mask`` and ``input_ids`` [B, L].

        The system prompt of the ``role`` goes before each prompt.
        """
        if encoders is not None and "gemma2" not in encoders:
            return {}
        texts = [with_system_prompt(prompt, self.system_prompts[role]) for prompt in prompts]
        tokens = gemma_tokens(self.tokenizer("gemma2"), texts, self.text_length)
        (encoder,) = self.load_text_encoders(["gemma2"])
        return encode_gemma(encoder, tokens, "gemma2" in trained)

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity (noise minus image) [B, 16, h, w] of noisy ``latents``; ``timesteps`` [B] are sigmas in 0..1.

        The model itself runs the other way: its time is 0 for noise and 1 for an image, its velocity image minus noise.
        """
        device = latents.device
        text, mask = conditioning["hidden_state"].to(device), conditioning["attention_mask"]
        return -self.load_transformer()(latents, 1 - timesteps.to(device).float(), text, mask)

    # Drawing

    def solver(self, request: LuminaRequest) -> FlowEuler:
        """Euler steps over the grid of kohya-ss/sd-scripts."""
        return FlowEuler(lumina_sigmas(request.sample_steps, request.flow_shift))

    def guidance(self, request: LuminaRequest) -> Guidance:
        """Classifier-free, truncated and renormalised; a scale of 1, or a truncation to nothing, is none."""
        if request.scale == 1 or request.cfg_trunc_ratio <= 0:
            return Unguided()
        return TruncatedClassifierFree(request.scale, request.cfg_trunc_ratio, request.renorm_cfg)

    def start_noise(self, request: LuminaRequest, generators: Sequence[torch.Generator]) -> Tensor:
        """Drawn on the device, in the request's dtype: so that a seed gives the image that users know."""
        height, width = (side // self.latent_stride for side in self.image_size(request))
        return draw_noise((self.latent_channels, height, width), generators, request.noise_dtype or self.dtype)


@dataclass(frozen=True)
class OpenedFiles:
    """The opened files of the parts that a pipeline needs."""

    transformer: TransformerFile
    autoencoder: AutoencoderFile | None
    gemma2: Gemma2File | None


def open_files(files: LuminaFiles, parts: Collection[Part]) -> OpenedFiles:
    """Open the files of ``parts`` and check that they fit together. Raises UserError."""
    transformer = open_transformer(files.transformer, files.disable_mmap, files.transformer_option)
    config, source = transformer.config, transformer.source
    autoencoder = gemma2 = None
    if "gemma2" in parts:
        option = files.gemma2_option
        found = part_path(
            files.transformer,
            source,
            files.gemma2,
            option=option,
            name="Gemma 2",
            subfolder="text_encoder",
            prefixes=tuple(prefix for prefix in GEMMA2_PREFIXES if prefix.startswith("text_encoders.")),
        )
        gemma2 = open_gemma2(found, files.disable_mmap, option)
        require_width(transformer, gemma2.source, gemma2.hidden_size, config.text_dim)
    if "autoencoder" in parts:
        option = files.autoencoder_option
        found = part_path(
            files.transformer,
            source,
            files.autoencoder,
            option=option,
            name="autoencoder",
            subfolder="vae",
            prefixes=AUTOENCODER_PREFIXES,
        )
        autoencoder = open_autoencoder(found, files.disable_mmap, option)
        require_width(transformer, autoencoder.source, autoencoder.config.latent_channels, config.latent_channels)
    return OpenedFiles(transformer, autoencoder, gemma2)


def require_text_length(length: int | None) -> None:
    """Raises UserError for a number of ``--gemma2_max_token_length`` that cannot be."""
    if length is not None and length < 1:
        raise UserError("--gemma2_max_token_length must be at least 1.")
