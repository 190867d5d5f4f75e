"""FLUX.1 and Chroma as one object each: files, parts, and everything that is done with them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from library.memory.storage import StorageDtype
from library.models.attention import AttentionBackend
from library.models.autoencoder_kl import AutoencoderFile, open_autoencoder
from library.models.clip import ClipFile, open_clip
from library.models.flow_pipeline import DoubleSinglePipeline, part_path, require_width
from library.models.flux.checkpoint import ModelType, TransformerFile, Variant, open_transformer
from library.models.flux.controlnet import ControlNetFile, open_controlnet
from library.models.flux.text import T5_LENGTH, attended_text, clip_tokens, encode_clip, encode_t5, t5_tokens
from library.models.flux.transformer import FluxConfig, image_ids, pack_latents, unpack_latents
from library.models.pipeline import Conditioning, ImageRequest, from_image
from library.models.recognition import AUTOENCODER_PREFIXES, CLIP_L_PREFIXES, T5_PREFIXES
from library.models.sampling import FlowEuler, Role
from library.models.schedules import flow_sigmas, flux_shift
from library.models.t5 import T5File, open_t5
from library.models.tokenizer_files import CLIP_L, T5_XXL, TokenizerKind
from library.randomness import draw_noise

if TYPE_CHECKING:
    from PIL import Image

Part = Literal["transformer", "autoencoder", "clip_l", "t5xxl", "controlnet"]
Encoder = Literal["clip_l", "t5xxl"]
PARTS: tuple[Part, ...] = ("transformer", "autoencoder", "clip_l", "t5xxl", "controlnet")
ENCODERS: tuple[Encoder, ...] = ("clip_l", "t5xxl")
T5_FOLDERS: dict[ModelType, str] = {"flux": "text_encoder_2", "chroma": "text_encoder"}
"""Where T5 is in a Diffusers folder."""


@dataclass(frozen=True)
class FluxFiles:
    """Where the parts are. A part that is None is looked for in the transformer's own folder or file."""

    transformer: Path | str
    autoencoder: Path | str | None = None
    clip_l: Path | str | None = None
    t5xxl: Path | str | None = None
    controlnet: Path | str | None = None
    """None: there is none."""
    controlnet_mode: int | None = None
    """The kind of control that a union ControlNet is given."""
    tokenizer_cache_dir: Path | str | None = None
    disable_mmap: bool = False
    transformer_option: str = "--pretrained_model_name_or_path"
    """The option that names the transformer in this script, for messages; the others are --ae, --clip_l, --t5xxl,
    --controlnet_model_name_or_path and --controlnet_mode."""


@dataclass
class FluxRequest(ImageRequest):
    """Sides are rounded up to whole packed positions (16 pixels)."""

    guidance_scale: float = 3.5
    """The distilled guidance that dev-like models are given; schnell and Chroma have none."""
    shift: bool = True
    """Whether the schedule follows the image's size; the inference script leaves it off for schnell."""
    control_image: Image.Image | Tensor | None = None
    """For the ControlNet, stretched to the image's size; as a tensor [3, H, W] of that size, in -1..1."""
    control_strength: float = 1.0
    """Factor for what the ControlNet adds."""
    noise_dtype: torch.dtype | None = None
    """The dtype in which noise is drawn; None: the pipeline's."""


class FluxPipeline(DoubleSinglePipeline[FluxRequest]):
    """FLUX.1: opens the files by their headers, loads parts when they are needed, and runs them.

    ``parts`` are those that will be needed. Raises UserError, before anything is loaded, when one of their files isn't
    what it should be, doesn't fit the others, or isn't given.
    """

    all_parts = PARTS
    denoiser = "transformer"
    request_class = FluxRequest
    read_on_host = frozenset({"txt_ids"})
    model_type: ClassVar[ModelType] = "flux"
    """What the transformer must be."""
    all_encoders: ClassVar[tuple[Encoder, ...]] = ENCODERS
    files: OpenedFiles

    def __init__(
        self,
        files: FluxFiles,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        dtypes: Mapping[Part, StorageDtype | None] | None = None,
        parts: Collection[Part] = PARTS,
        t5xxl_max_token_length: int | None = None,
        apply_t5_attn_mask: bool = False,
        attention_backend: AttentionBackend = "sdpa",
    ):
        super().__init__(dtype, device, dtypes, attention_backend, files.tokenizer_cache_dir)
        self.apply_t5_attn_mask = apply_t5_attn_mask
        self.encoders: tuple[Encoder, ...] = self.all_encoders
        absent = {*ENCODERS, "controlnet"} - {*self.encoders, *(("controlnet",) if files.controlnet else ())}
        self.parts = tuple(part for part in parts if part not in absent)
        self.files = open_files(files, self.parts, self.model_type)
        self.text_lengths: dict[Encoder, int] = {
            "clip_l": self.files.clip_l.max_length if self.files.clip_l else 77,
            "t5xxl": t5xxl_max_token_length or T5_LENGTH[self.variant],
        }

    @property
    def config(self) -> FluxConfig:
        """The transformer's sizes, inferred from its file."""
        return self.files.transformer.config

    @property
    def variant(self) -> Variant:
        """``chroma``; ``dev`` where the transformer is guidance-distilled; else ``schnell``."""
        return self.files.transformer.variant

    @property
    def latent_channels(self) -> int:
        """Channels of a latent; 2 x 2 positions are packed into one token."""
        return self.config.in_channels // 4

    @property
    def pooled_shape(self) -> tuple[int, ...]:
        """The shape of a prompt's ``l_pooled``."""
        return (self.config.vector_dim,)

    @property
    def control_takes_latents(self) -> bool:
        """Whether there is a ControlNet whose image goes through the autoencoder."""
        return self.files.controlnet is not None and self.files.controlnet.config.takes_latents

    def prepare(self, part: str, module: Any) -> None:
        """Transformer and ControlNet get the attention backend."""
        if part in ("transformer", "controlnet"):
            module.set_attention_backend(self.attention_backend)

    def tokenizer_kind(self, encoder: str) -> TokenizerKind:
        """CLIP's or T5's."""
        return CLIP_L if encoder == "clip_l" else T5_XXL

    # Images and texts

    def tokenize(self, prompts: Sequence[str], encoders: Collection[Encoder] | None = None) -> dict[str, Tensor]:
        """Token ids, batch first on the CPU: ``l_tokens`` [B, 77], ``t5_tokens`` and ``t5_attn_mask`` [B, L]."""
        encoders = self.encoders if encoders is None else encoders
        tokens: dict[str, Tensor] = {}
        if "clip_l" in encoders:
            tokens |= clip_tokens(self.tokenizer("clip_l"), prompts, self.text_lengths["clip_l"])
        if "t5xxl" in encoders:
            tokens |= t5_tokens(self.tokenizer("t5xxl"), prompts, self.text_lengths["t5xxl"])
        return tokens

    def encode_tokens(
        self,
        tokens: Mapping[str, Tensor],
        encoders: Collection[Encoder] | None = None,
        trained: Collection[Encoder] = (),
    ) -> dict[str, Tensor]:
        """The conditioning of ``tokens``, from the named ``encoders``; gradients flow through the ``trained`` ones."""
        encoders = self.encoders if encoders is None else encoders
        conditioning: dict[str, Tensor] = {}
        for encoder, module in zip(encoders, self.load_text_encoders(encoders)):
            if encoder == "clip_l":
                end_of_text = self.tokenizer("clip_l").eos_token_id
                conditioning |= encode_clip(module, tokens, end_of_text, encoder in trained)
            else:
                conditioning |= encode_t5(module, tokens, self.apply_t5_attn_mask, encoder in trained)
        return conditioning

    def encode_prompts(
        self,
        prompts: Sequence[str],
        encoders: Collection[Encoder] | None = None,
        role: Role = "positive",
        trained: Collection[Encoder] = (),
    ) -> dict[str, Tensor]:
        """Conditioning, batch first: ``l_pooled`` [B, 768] (not of Chroma), ``t5_out`` [B, L, 4096], ``txt_ids``
        [B, L, 3], ``t5_attn_mask`` [B, L]. It is the same for both roles."""
        return self.encode_tokens(self.tokenize(prompts, encoders), encoders, trained)

    @torch.no_grad()
    def encode_control(self, control_image: Tensor) -> Tensor:
        """What the ControlNet takes of images [B, 3, H, W] in -1..1: the same, or latents (the posterior's mean)."""
        if not self.control_takes_latents:
            return control_image.to(self.device)
        return self.encode_images(control_image.to(self.device), None)

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance: Tensor | None = None,
        control_image: Tensor | None = None,
    ) -> Tensor:
        """The velocity (noise minus image) [B, 16, h, w] of noisy ``latents``; ``timesteps`` [B] are sigmas in 0..1.

        ``guidance`` [B] is needed by dev-like models and ignored by the others. ``control_image`` [B, 3, H, W],
        in -1..1 and of the images' size, goes to the ControlNet, through which no gradient flows.
        """
        control = None if control_image is None else self.encode_control(control_image)
        return self._velocity(latents, timesteps, conditioning, guidance, control)

    def _velocity(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance: Tensor | None,
        control: Tensor | None = None,
        control_strength: float = 1.0,
    ) -> Tensor:
        """As ``predict``; ``control`` is what the ControlNet takes, from ``encode_control``."""
        device, (height, width) = latents.device, latents.shape[-2:]
        inputs: dict[str, Any] = dict(
            img=pack_latents(latents),
            img_ids=image_ids(height, width),
            timesteps=timesteps.to(device),
            guidance=guidance,
            **self.text_inputs(conditioning, device),
        )
        residuals = {} if control is None else self._residuals(control, control_strength, inputs)
        return unpack_latents(self.load_transformer()(**inputs, **residuals), height, width)

    def text_inputs(self, conditioning: Conditioning, device: torch.device) -> dict[str, Any]:
        """What the transformer is given of the text, as its arguments."""
        return dict(
            txt=conditioning["t5_out"].to(device),
            txt_ids=conditioning["txt_ids"],
            y=conditioning["l_pooled"].to(device),
            txt_attention_mask=conditioning["t5_attn_mask"] if self.apply_t5_attn_mask else None,
        )

    @torch.no_grad()
    def _residuals(self, control: Tensor, strength: float, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the ControlNet adds to the transformer's tokens, as arguments of the transformer."""
        mode = self.opened("controlnet").mode
        return self.load("controlnet").residuals(self.config, strength, **inputs, control=control, mode=mode)

    # Drawing

    def solver(self, request: FluxRequest) -> FlowEuler:
        """Euler steps; the schedule is shifted with the image's size."""
        shift = flux_shift(self.image_tokens(request)) if request.shift else 1.0
        return FlowEuler(flow_sigmas(request.sample_steps, shift))

    def start_noise(self, request: FluxRequest, generators: Sequence[torch.Generator]) -> Tensor:
        """Drawn as packed tokens on the device, in the request's dtype, for the same reason."""
        height, width = (side // self.latent_stride for side in self.image_size(request))
        shape = (self.image_tokens(request), self.config.in_channels)
        return unpack_latents(draw_noise(shape, generators, request.noise_dtype or self.dtype), height, width)

    def predictor(self, requests: Sequence[FluxRequest]) -> Callable[[Tensor, Tensor, Conditioning], Tensor]:
        """With each request's guidance and control image."""
        guidance = torch.tensor([request.guidance_scale for request in requests], device=self.device)
        controls = [control for request in requests if (control := self._request_control(request)) is not None]
        control = self.encode_control(torch.stack(controls)) if controls else None

        def predict(latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
            copies = len(latents) // len(requests)
            controlled = None if control is None else control.repeat(copies, 1, 1, 1)
            strength = requests[0].control_strength
            return self._velocity(latents, timesteps, conditioning, guidance.repeat(copies), controlled, strength)

        return predict

    def _request_control(self, request: FluxRequest) -> Tensor | None:
        """The pixels [3, H, W] of a request's control image."""
        image = request.control_image
        if image is None:
            return None
        if isinstance(image, Tensor):
            return image.reshape(image.shape[-3:])
        height, width = self.image_size(request)
        return from_image(image, width, height)


class ChromaPipeline(FluxPipeline):
    """Chroma: T5 alone, whose text is always masked."""

    model_type = "chroma"
    all_encoders = ("t5xxl",)
    read_on_host = frozenset({"t5_attn_mask", "txt_ids"})

    def __init__(self, files: FluxFiles, dtype: torch.dtype, device: torch.device | str, **arguments: Any):
        super().__init__(files, dtype, device, **{**arguments, "apply_t5_attn_mask": True})

    @property
    def pooled_shape(self) -> tuple[int, ...]:
        """That of the zeros which kohya-ss/sd-scripts looks for in Chroma's cache files; nothing reads them."""
        return (77, 1)

    def encode_prompts(
        self,
        prompts: Sequence[str],
        encoders: Collection[Encoder] | None = None,
        role: Role = "positive",
        trained: Collection[Encoder] = (),
    ) -> dict[str, Tensor]:
        """As of FLUX.1, with zeros for ``l_pooled``."""
        conditioning = super().encode_prompts(prompts, encoders, role, trained)
        return {**conditioning, "l_pooled": conditioning["t5_out"].new_zeros(len(prompts), *self.pooled_shape)}

    def text_inputs(self, conditioning: Conditioning, device: torch.device) -> dict[str, Any]:
        """Without a pooled text, and without the padding that no item attends to."""
        text = attended_text(conditioning)
        return dict(
            txt=text["t5_out"].to(device),
            txt_ids=text["txt_ids"],
            y=None,
            txt_attention_mask=text["t5_attn_mask"],
        )


PIPELINES: dict[ModelType, type[FluxPipeline]] = {"flux": FluxPipeline, "chroma": ChromaPipeline}


@dataclass(frozen=True)
class OpenedFiles:
    """The opened files of the parts that a pipeline needs."""

    transformer: TransformerFile
    autoencoder: AutoencoderFile | None
    clip_l: ClipFile | None
    t5xxl: T5File | None
    controlnet: ControlNetFile | None = None


def open_files(files: FluxFiles, parts: Collection[Part], model_type: ModelType = "flux") -> OpenedFiles:
    """Open the files of ``parts`` and check that they fit together. Raises UserError."""
    transformer = open_transformer(files.transformer, files.disable_mmap, files.transformer_option, model_type)
    config = transformer.config

    def path(given: Path | str | None, option: str, name: str, subfolder: str, prefixes: tuple[str, ...]) -> Path | str:
        return part_path(
            files.transformer,
            transformer.source,
            given,
            option=option,
            name=name,
            subfolder=subfolder,
            prefixes=prefixes,
        )

    autoencoder = clip_l = t5xxl = controlnet = None
    if "autoencoder" in parts:
        found = path(files.autoencoder, "--ae", "autoencoder", "vae", AUTOENCODER_PREFIXES)
        autoencoder = open_autoencoder(found, files.disable_mmap, "--ae")
        require_width(transformer, autoencoder.source, 4 * autoencoder.config.latent_channels, config.in_channels)
    if "clip_l" in parts:
        found = path(files.clip_l, "--clip_l", "CLIP-L", "text_encoder", CLIP_L_PREFIXES)
        clip_l = open_clip(found, files.disable_mmap, "--clip_l")
        require_width(transformer, clip_l.source, clip_l.hidden_size, config.vector_dim)
    if "t5xxl" in parts:
        found = path(files.t5xxl, "--t5xxl", "T5-XXL", T5_FOLDERS[model_type], T5_PREFIXES)
        t5xxl = open_t5(found, files.disable_mmap, "--t5xxl")
        require_width(transformer, t5xxl.source, t5xxl.hidden_size, config.context_dim)
    if "controlnet" in parts and files.controlnet:
        stride = autoencoder.config.stride if autoencoder else None
        controlnet = open_controlnet(files.controlnet, transformer, stride, files.controlnet_mode, files.disable_mmap)
    return OpenedFiles(transformer, autoencoder, clip_l, t5xxl, controlnet)
