"""FLUX.1 or Chroma as one object: its files, its parts, and everything that is done with them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from library.devices import empty_cache
from library.errors import UserError
from library.memory.fp8 import StorageDtype
from library.models.attention import AttentionBackend, require_backend
from library.models.autoencoder_kl import AutoencoderFile, AutoencoderKL, open_autoencoder
from library.models.clip import ClipFile, open_clip
from library.models.flux.checkpoint import ModelType, TransformerFile, Variant, open_transformer
from library.models.flux.chroma import ChromaTransformer
from library.models.flux.controlnet import ControlNetFile, FluxControlNet, open_controlnet
from library.models.flux.sampling import denoise, draw_noise, guided, schedule
from library.models.flux.text import T5_LENGTH, attended_text, clip_tokens, encode_clip, encode_t5, t5_tokens
from library.models.flux.transformer import FluxConfig, FluxTransformer, image_ids, pack_latents, unpack_latents
from library.models.loading import TensorSource
from library.models.recognition import AUTOENCODER_PREFIXES, CLIP_L_PREFIXES, T5_PREFIXES
from library.models.t5 import T5File, open_t5
from library.models.tokenizer_files import CLIP_L, T5_XXL, load_tokenizer

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase

Part = Literal["transformer", "autoencoder", "clip_l", "t5xxl", "controlnet"]
Encoder = Literal["clip_l", "t5xxl"]
Conditioning = Mapping[str, Tensor]
PARTS: tuple[Part, ...] = ("transformer", "autoencoder", "clip_l", "t5xxl", "controlnet")
ENCODERS: tuple[Encoder, ...] = ("clip_l", "t5xxl")


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
    model_type: ModelType = "flux"
    """What the transformer must be; Chroma takes no CLIP-L."""
    transformer_option: str = "--pretrained_model_name_or_path"
    """The option that names the transformer in this script, for messages; the others are --ae, --clip_l, --t5xxl,
    --controlnet_model_name_or_path and --controlnet_mode."""


@dataclass
class ImageRequest:
    """What ``generate`` needs for one image. Prompts may be given as already encoded conditioning."""

    prompt: str = ""
    negative_prompt: str | None = None
    """Used when ``scale`` isn't 1; None means no classifier-free guidance, an empty prompt is one."""
    width: int = 512
    height: int = 512
    seed: int | None = None
    sample_steps: int = 20
    guidance_scale: float = 3.5
    """The distilled guidance that dev-like models are given; schnell and Chroma have none."""
    scale: float = 1.0
    """Classifier-free guidance; 1 turns it off."""
    shift: bool = True
    """Whether the schedule follows the image's size; the inference script leaves it off for schnell."""
    conditioning: Conditioning | None = None
    negative_conditioning: Conditioning | None = None
    control_image: Image.Image | Tensor | None = None
    """For the ControlNet, stretched to the image's size; as a tensor [3, H, W] of that size, in -1..1."""
    control_strength: float = 1.0
    """Factor for what the ControlNet adds."""


class FluxPipeline:
    """Opens the files by their headers, loads parts when asked, and runs them.

    ``dtype`` is every part's dtype unless ``dtypes`` names another for it (None there: as in the file).
    ``parts`` are those that will be needed. Raises UserError, before anything is loaded, when one of their files isn't
    what it should be, doesn't fit the others, or isn't given.

    Chroma has no CLIP-L, and its text is always masked. Methods that take ``encoders`` mean all of them by None.
    """

    swappable_blocks = FluxTransformer.swappable_blocks

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
        require_backend(attention_backend)
        self.dtype = dtype
        self.device = torch.device(device)
        self.dtypes: dict[Part, StorageDtype | None] = {part: dtype for part in PARTS}
        self.dtypes.update(dtypes or {})
        is_chroma = files.model_type == "chroma"
        self.apply_t5_attn_mask = apply_t5_attn_mask or is_chroma
        self.attention_backend = attention_backend
        self.encoders: tuple[Encoder, ...] = ("t5xxl",) if is_chroma else ENCODERS
        absent = {*ENCODERS, "controlnet"} - {*self.encoders, *(("controlnet",) if files.controlnet else ())}
        self.parts = tuple(part for part in parts if part not in absent)
        self.files = open_files(files, self.parts)
        self.tokenizer_cache_dir = files.tokenizer_cache_dir
        self.modules: dict[Part, nn.Module] = {}
        """The loaded parts; a trainer may put a wrapped module in the place of the original."""
        self.tokenizers: dict[Encoder, PreTrainedTokenizerBase] = {}
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
    def latent_stride(self) -> int:
        """Pixels per latent position; an image's sides must be multiples of twice that."""
        return self.files.autoencoder.config.stride if self.files.autoencoder else 8

    @property
    def latent_channels(self) -> int:
        """Channels of a latent; 2 x 2 positions are packed into one token."""
        return self.config.in_channels // 4

    @property
    def control_takes_latents(self) -> bool:
        """Whether there is a ControlNet whose image goes through the autoencoder."""
        return self.files.controlnet is not None and self.files.controlnet.config.takes_latents

    # Parts

    def meta_module(self, part: Part) -> nn.Module:
        """A part's module on torch's meta device: its structure without its numbers."""
        return self._opened(part).meta_module()

    def load_transformer(self) -> FluxTransformer | ChromaTransformer:
        """Load the transformer, or give the loaded one."""
        if "transformer" not in self.modules:
            transformer = self.files.transformer.load(self.dtypes["transformer"], self.device)
            transformer.set_attention_backend(self.attention_backend)
            self.modules["transformer"] = transformer
        return self.modules["transformer"]  # type: ignore[return-value]

    def load_controlnet(self) -> FluxControlNet:
        """Load the ControlNet, or give the loaded one."""
        if "controlnet" not in self.modules:
            controlnet = self._opened("controlnet").load(self.dtypes["controlnet"], self.device)
            controlnet.set_attention_backend(self.attention_backend)
            self.modules["controlnet"] = controlnet
        return self.modules["controlnet"]  # type: ignore[return-value]

    def load_autoencoder(self) -> AutoencoderKL:
        """Load the autoencoder, or give the loaded one."""
        if "autoencoder" not in self.modules:
            self.modules["autoencoder"] = self._opened("autoencoder").load(self.dtypes["autoencoder"], self.device)
        return self.modules["autoencoder"]  # type: ignore[return-value]

    def load_text_encoders(self, encoders: Collection[Encoder] | None = None) -> list[Any]:
        """Load the text encoders with their tokenizers, or give the loaded ones."""
        encoders = self.encoders if encoders is None else encoders
        for encoder in encoders:
            self._tokenizer(encoder)
            if encoder not in self.modules:
                self.modules[encoder] = self._opened(encoder).load(self.dtypes[encoder], self.device)
        return [self.modules[encoder] for encoder in encoders]

    def load_tokenizers(self, encoders: Collection[Encoder] | None = None) -> None:
        """Find the tokenizers. Raises UserError when there is none or one is too large for its encoder."""
        for encoder in self.encoders if encoders is None else encoders:
            self._tokenizer(encoder)

    def unload(self, part: Part | Literal["text_encoders"]) -> None:
        """Forget a part and give its memory back; it can be loaded again."""
        names = ENCODERS if part == "text_encoders" else (part,)
        if any([self.modules.pop(name, None) is not None for name in names]):
            empty_cache(self.device)

    def move(self, part: Part | Literal["text_encoders"], device: torch.device | str) -> None:
        """Move a loaded part, e.g. to the CPU while others work on the accelerator."""
        for name in ENCODERS if part == "text_encoders" else (part,):
            if name in self.modules:
                self.modules[name].to(device)
        if torch.device(device) != self.device:
            empty_cache(self.device)

    def _opened(self, part: Part) -> Any:
        opened = getattr(self.files, part)
        if opened is None:
            raise RuntimeError(f"the pipeline was opened without its {part}")
        return opened

    def _tokenizer(self, encoder: Encoder) -> PreTrainedTokenizerBase:
        if encoder not in self.tokenizers:
            kind = CLIP_L if encoder == "clip_l" else T5_XXL
            opened = self._opened(encoder)
            self.tokenizers[encoder] = load_tokenizer(
                kind, opened.source.checkpoint, opened.vocabulary, self.tokenizer_cache_dir
            )
        return self.tokenizers[encoder]

    # Work

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        """Latents [B, 16, H/8, W/8], float32 and scaled, of ``pixels`` [B, 3, H, W] in -1..1.

        Item i is drawn from its posterior by the CPU generator ``generators[i]``; None takes the posterior's mean.
        """
        with self._autoencoders_own_format():
            return self.load_autoencoder().encode(pixels, generators)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], float32 in -1..1, of ``latents`` [B, 16, H/8, W/8]."""
        with self._autoencoders_own_format():
            return self.load_autoencoder().decode(latents).float().clamp(-1, 1)

    def _autoencoders_own_format(self) -> torch.autocast:
        """Without autocast: an autoencoder that is kept in float32 must also compute in it."""
        return torch.autocast(self.device.type, enabled=False)

    def tokenize(self, prompts: Sequence[str], encoders: Collection[Encoder] | None = None) -> dict[str, Tensor]:
        """Token ids, batch first on the CPU: ``l_tokens`` [B, 77], ``t5_tokens`` and ``t5_attn_mask`` [B, L]."""
        encoders = self.encoders if encoders is None else encoders
        tokens: dict[str, Tensor] = {}
        if "clip_l" in encoders:
            tokens |= clip_tokens(self._tokenizer("clip_l"), prompts, self.text_lengths["clip_l"])
        if "t5xxl" in encoders:
            tokens |= t5_tokens(self._tokenizer("t5xxl"), prompts, self.text_lengths["t5xxl"])
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
                end_of_text = self._tokenizer("clip_l").eos_token_id
                conditioning |= encode_clip(module, tokens, end_of_text, encoder in trained)
            else:
                conditioning |= encode_t5(module, tokens, self.apply_t5_attn_mask, encoder in trained)
        return conditioning

    def encode_prompts(
        self, prompts: Sequence[str], encoders: Collection[Encoder] | None = None, trained: Collection[Encoder] = ()
    ) -> dict[str, Tensor]:
        """Conditioning, batch first: ``l_pooled`` [B, 768] (not of Chroma), ``t5_out`` [B, L, 4096], ``txt_ids``
        [B, L, 3], ``t5_attn_mask`` [B, L]."""
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
        height, width = latents.shape[-2:]
        control = None if control_image is None else self.encode_control(control_image)
        tokens = self._velocity_tokens(
            pack_latents(latents), (height, width), timesteps, conditioning, guidance, control
        )
        return unpack_latents(tokens, height, width)

    def _velocity_tokens(
        self,
        tokens: Tensor,
        size: tuple[int, int],
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance: Tensor | None,
        control: Tensor | None = None,
        control_strength: float = 1.0,
    ) -> Tensor:
        device = tokens.device
        if self.variant == "chroma":
            conditioning = attended_text(conditioning)
        inputs: dict[str, Any] = dict(
            img=tokens,
            img_ids=image_ids(*size, device=device),
            txt=conditioning["t5_out"].to(device),
            txt_ids=conditioning["txt_ids"].to(device),
            timesteps=timesteps,
            y=conditioning["l_pooled"].to(device) if "clip_l" in self.encoders else None,
            guidance=guidance,
            txt_attention_mask=conditioning["t5_attn_mask"] if self.apply_t5_attn_mask else None,
        )
        residuals = {} if control is None else self._residuals(control, control_strength, inputs)
        return self.load_transformer()(**inputs, **residuals)

    @torch.no_grad()
    def _residuals(self, control: Tensor, strength: float, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the ControlNet adds to the transformer's tokens, as arguments of the transformer."""
        controlnet = self.load_controlnet()
        mode = self._opened("controlnet").mode
        return controlnet.residuals(self.config, strength, **inputs, control=control, mode=mode)

    @torch.no_grad()
    def generate(self, request: ImageRequest, dtype: torch.dtype | None = None, progress: bool = False) -> Image.Image:
        """One image. ``dtype`` is the dtype in which noise is drawn (the pipeline's by default)."""
        latents = self.generate_latents(request, dtype, progress)
        return to_image(self.decode_latents(latents)[0])

    @torch.no_grad()
    def generate_latents(
        self, request: ImageRequest, dtype: torch.dtype | None = None, progress: bool = False
    ) -> Tensor:
        """The latents [1, 16, h, w], float32, of one image; sides are rounded up to whole packed positions."""
        conditioning, batch = self._request_conditioning(request)
        step = 2 * self.latent_stride
        rows, columns = -(-request.height // step), -(-request.width // step)
        noise = draw_noise(rows * columns, self.config.in_channels, request.seed, self.device, dtype or self.dtype)
        guidance = torch.full((batch,), request.guidance_scale, device=self.device)
        control = self._request_control(request, columns * step, rows * step, batch)

        def velocity(tokens: Tensor, timesteps: Tensor) -> Tensor:
            tokens, timesteps = tokens.expand(batch, -1, -1), timesteps.expand(batch)
            size, strength = (2 * rows, 2 * columns), request.control_strength
            out = self._velocity_tokens(tokens, size, timesteps, conditioning, guidance, control, strength)
            return guided(out[1:], out[:1], request.scale) if batch == 2 else out

        sigmas = schedule(request.sample_steps, rows * columns, request.shift)
        return unpack_latents(denoise(velocity, noise, sigmas, progress), 2 * rows, 2 * columns)

    def _request_conditioning(self, request: ImageRequest) -> tuple[Conditioning, int]:
        """The conditioning of a request and its batch size: 2 with classifier-free guidance, unconditional first."""
        positive = request.conditioning or self.encode_prompts([request.prompt])
        if request.scale == 1 or (request.negative_conditioning is None and request.negative_prompt is None):
            return positive, 1
        negative = request.negative_conditioning or self.encode_prompts([request.negative_prompt or ""])
        return {name: torch.cat((negative[name].to(value), value)) for name, value in positive.items()}, 2

    def _request_control(self, request: ImageRequest, width: int, height: int, batch: int) -> Tensor | None:
        """What the ControlNet takes of the request's image, for each item of the batch."""
        image = request.control_image
        if image is None:
            return None
        pixels = image if isinstance(image, Tensor) else from_image(image, width, height)
        return self.encode_control(pixels.reshape(1, *pixels.shape[-3:])).expand(batch, -1, -1, -1)


def from_image(picture: Image.Image, width: int, height: int) -> Tensor:
    """Pixels [3, height, width], float32 in -1..1, of a PIL image stretched to that size."""
    import numpy
    from PIL import Image

    picture = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(numpy.array(picture)).permute(2, 0, 1) / 127.5 - 1.0


def to_image(pixels: Tensor) -> Image.Image:
    """A PIL image of ``pixels`` [3, H, W] in -1..1."""
    from PIL import Image

    return Image.fromarray((127.5 * (pixels.permute(1, 2, 0) + 1)).to(torch.uint8).cpu().numpy())


@dataclass(frozen=True)
class OpenedFiles:
    """The opened files of the parts that a pipeline needs."""

    transformer: TransformerFile
    autoencoder: AutoencoderFile | None
    clip_l: ClipFile | None
    t5xxl: T5File | None
    controlnet: ControlNetFile | None = None


def open_files(files: FluxFiles, parts: Collection[Part]) -> OpenedFiles:
    """Open the files of ``parts`` and check that they fit together. Raises UserError."""
    transformer = open_transformer(files.transformer, files.disable_mmap, files.transformer_option, files.model_type)
    autoencoder = clip_l = t5xxl = controlnet = None
    if "autoencoder" in parts:
        path = _part_path(files, transformer, files.autoencoder, "--ae", "autoencoder", "vae", AUTOENCODER_PREFIXES)
        autoencoder = open_autoencoder(path, files.disable_mmap, "--ae")
        _require_width(transformer, autoencoder.source, 4 * autoencoder.config.latent_channels, "in_channels")
    if "clip_l" in parts:
        path = _part_path(files, transformer, files.clip_l, "--clip_l", "CLIP-L", "text_encoder", CLIP_L_PREFIXES)
        clip_l = open_clip(path, files.disable_mmap, "--clip_l")
        _require_width(transformer, clip_l.source, clip_l.hidden_size, "vector_dim")
    if "t5xxl" in parts:
        folder = "text_encoder" if files.model_type == "chroma" else "text_encoder_2"
        path = _part_path(files, transformer, files.t5xxl, "--t5xxl", "T5-XXL", folder, T5_PREFIXES)
        t5xxl = open_t5(path, files.disable_mmap, "--t5xxl")
        _require_width(transformer, t5xxl.source, t5xxl.hidden_size, "context_dim")
    if "controlnet" in parts and files.controlnet:
        stride = autoencoder.config.stride if autoencoder else None
        controlnet = open_controlnet(files.controlnet, transformer, stride, files.controlnet_mode, files.disable_mmap)
    return OpenedFiles(transformer, autoencoder, clip_l, t5xxl, controlnet)


def _part_path(
    files: FluxFiles,
    transformer: TransformerFile,
    given: Path | str | None,
    option: str,
    name: str,
    subfolder: str,
    prefixes: tuple[str, ...],
) -> Path | str:
    """A part's path: what was given, else the transformer's own model folder or all-in-one file."""
    if given:
        return given
    if (Path(files.transformer) / subfolder).is_dir():
        return files.transformer
    if any(key.startswith(prefixes) for key in transformer.source.checkpoint):
        return files.transformer
    raise UserError(f"{option} is missing: it names the {name} file that belongs to the transformer.")


def _require_width(transformer: TransformerFile, source: TensorSource, width: int, field: str) -> None:
    wanted = getattr(transformer.config, field)
    if width != wanted:
        raise UserError(
            f"{source.checkpoint.label} gives {width} channels, but the transformer "
            f"{transformer.source.checkpoint.path} takes {wanted}: they don't belong together."
        )
