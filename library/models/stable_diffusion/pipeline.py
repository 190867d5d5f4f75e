"""Stable Diffusion 1.x, 2.x and XL as one object: its files, its parts, and everything that is done with them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from library.console import warn
from library.devices import move_module
from library.errors import NotFiniteError, UserError
from library.memory.storage import BlocksStoredAs, StorageDtype
from library.models.attention import AttentionBackend
from library.models.autoencoder_parts import all_finite, overflow_advice, visible
from library.models.autoencoder_slices import in_slices
from library.models.clip import ClipFile
from library.models.pipeline import Conditioning, ImageRequest, Pipeline
from library.models.sampling import ClassifierFree, DiffusersSolver, Guidance, NegativeScale, Role, Unguided
from library.models.schedules import TRAIN_STEPS
from library.models.stable_diffusion.added_words import AddedWords
from library.models.stable_diffusion.checkpoint import UnetFile, VaeFile, Variant, open_stable_diffusion
from library.models.stable_diffusion.image_text import ImageTexts, image_chunks, image_tokens, whole_chunks
from library.models.stable_diffusion.prompt_weights import sub_prompts
from library.models.stable_diffusion.sampling import make_scheduler, noises_of_steps
from library.models.stable_diffusion.start_noise import Perturbation, draw_start
from library.models.stable_diffusion.text import (
    CHUNK,
    Join,
    Tokens,
    chunk_count,
    encode,
    encode_for_xl,
    require_clip_skip,
    tokenize,
    weighted_and_joined,
)
from library.models.stable_diffusion.unet import block_lists, set_attention_backend
from library.models.tokenizer_files import CLIP_BIG_G, CLIP_H, CLIP_L, TokenizerKind
from library.prompt_options import PromptOptions
from library.text_files import shown

if TYPE_CHECKING:
    from library.models.stable_diffusion.regions import Regions

Part = Literal["unet", "autoencoder", "text_encoder", "text_encoder_2"]
Encoder = Literal["text_encoder", "text_encoder_2"]
PARTS: tuple[Part, ...] = ("unet", "autoencoder", "text_encoder", "text_encoder_2")
TOKENIZERS: dict[Variant, tuple[TokenizerKind, ...]] = {
    "sd1": (CLIP_L,),
    "sd2": (CLIP_H,),
    "sdxl": (CLIP_L, CLIP_BIG_G),
}
HALF_VAE_REMEDY = "add --no_half_vae"
SMALLEST_SIDE = 64


@dataclass(frozen=True)
class StableDiffusionFiles:
    """Where the model is: a single file or a Diffusers folder, with a ``vae`` that replaces its own."""

    model: Path | str
    vae: Path | str | None = None
    tokenizer_cache_dir: Path | str | None = None
    disable_mmap: bool = False
    model_option: str = "--pretrained_model_name_or_path"
    """The option that names the model in this script, for messages."""


@dataclass
class StableDiffusionRequest(ImageRequest):
    """Sides are rounded down to multiples of the latent stride, at least 64; ``scale`` guides only if more than 1.

    ``time_ids`` in the conditioning of XL override the sizes below.
    """

    sample_steps: int = 30
    scale: float = 7.5
    negative_scale: float | None = None
    """How far guidance leads away from the negative prompt, where the empty one is what it leads away from by
    ``scale``; None: the negative prompt takes the empty one's place."""
    sampler: str = "ddim"
    original_size: tuple[int, int] | None = None
    """SDXL's conditioning: original height and width; None: the image's."""
    negative_original_size: tuple[int, int] | None = None
    """The same for the negative and the empty prompt; None: as for the positive one."""
    crop: tuple[int, int] = (0, 0)
    """SDXL's conditioning: top and left crop coordinates in pixels."""
    target_size: tuple[int, int] | None = None
    """SDXL's conditioning: target height and width; None: the image's."""
    zero_terminal_snr: bool | None = None
    """Whether the noise schedule ends in pure noise; None: as the pipeline was told."""
    clip_sample: bool = False
    """Keep predicted latents within -1..1, in the samplers that can (ddim, heun)."""
    steps_offset: int = 1
    """Moves the timesteps, in the samplers that can; 1 as in the published models' own configuration."""
    strength: float | None = None
    """How much of ``start_latents`` is changed, 0 (nothing) to 1, as a share of the steps; None: ``first_step``."""
    offset_start: bool = False
    """Begin one step below the noise of ``start_latents``, in the samplers that take ``steps_offset``."""
    pyramid_noise: Perturbation | None = None
    """Noise of coarser grids on the start noise, by a discount from one to the next."""
    noise_offset: Perturbation | None = None
    """A number that is added to all of the start noise."""

    @property
    def drawn_over(self) -> bool:
        """Whether it draws over an image by a strength."""
        return self.start_latents is not None and self.strength is not None


@dataclass(frozen=True)
class OpenedFiles:
    """The opened files of the parts."""

    unet: UnetFile
    autoencoder: VaeFile
    text_encoder: ClipFile
    text_encoder_2: ClipFile | None


class StableDiffusionPipeline(Pipeline[StableDiffusionRequest]):
    """Opens the model by its headers, loads parts when they are needed, and runs them.

    ``clip_skip`` has no effect for XL but in texts of images, which are read as ``image_texts`` says. Raises UserError,
    before anything is loaded, when the files aren't a Stable Diffusion model or an argument doesn't fit them.
    """

    all_parts = PARTS
    denoiser = "unet"
    request_class = StableDiffusionRequest
    files: OpenedFiles

    def __init__(
        self,
        files: StableDiffusionFiles,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        dtypes: Mapping[Part, StorageDtype | None] | None = None,
        v_parameterization: bool = False,
        zero_terminal_snr: bool = False,
        clip_skip: int | None = None,
        max_token_length: int | None = 75,
        weighted_captions: bool = False,
        image_texts: ImageTexts | None = None,
        attention_backend: AttentionBackend = "sdpa",
    ):
        super().__init__(dtype, device, dtypes, attention_backend, files.tokenizer_cache_dir)
        self.chunks = chunk_count(max_token_length)
        model = open_stable_diffusion(
            files.model, vae=files.vae, disable_mmap=files.disable_mmap, option=files.model_option
        )
        self.model = model
        """The opened model, with what its files say of its training."""
        first, *second = model.text_encoders
        self.files = OpenedFiles(model.unet, model.autoencoder, first, second[0] if second else None)
        self.encoders: tuple[Encoder, ...] = ("text_encoder", "text_encoder_2") if second else ("text_encoder",)
        self.parts: tuple[Part, ...] = ("unet", "autoencoder", *self.encoders)
        if self.variant != "sdxl":
            require_clip_skip(clip_skip, first.sizes["num_hidden_layers"])
        self.v_parameterization = v_parameterization
        self.zero_terminal_snr = zero_terminal_snr
        self.clip_skip = clip_skip
        self.weighted_captions = weighted_captions
        self.image_texts = image_texts or ImageTexts()
        self.words: dict[Encoder, AddedWords] = {}
        """Words that texts of images may have beside the vocabulary, by encoder."""
        self.layer_words: dict[str, dict[str, Tensor]] = {}
        """Vectors that some of these words have in a layer of the U-Net, [vectors, hidden], by layer and word."""
        self.cut_texts: set[str] = set()
        """Texts of images that were too long."""
        self.channels_last = False
        """Keep the weights of convolutions in that memory format."""
        self.vae_slices: int | None = None
        """Slices in which the autoencoder works through an image."""
        self.vae_batch_size: float | None = None
        """Images that go through the autoencoder together; below 1 a share of a batch, None all of it."""

    @property
    def variant(self) -> Variant:
        """Which of the families the model belongs to."""
        return self.model.variant

    @property
    def predicts_v(self) -> bool | None:
        """Whether the files say that the U-Net predicts v and not the noise; None: they don't say."""
        return self.model.predicts_v

    @property
    def latent_stride(self) -> int:
        """Pixels per latent position."""
        return 2 ** (len(self.files.autoencoder.config["block_out_channels"]) - 1)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.files.autoencoder.config["latent_channels"]

    @property
    def latent_scale(self) -> float:
        """What the autoencoder's latents are multiplied by for the U-Net."""
        return self.files.autoencoder.config["scaling_factor"]

    def prepare(self, part: str, module: Any) -> None:
        """The U-Net gets the attention backend, a text encoder the added words, convolutions their memory format."""
        if part == "unet":
            set_attention_backend(module, self.attention_backend)
        if part in self.words:
            self.words[part].attach(module)  # type: ignore[index]
        if self.channels_last and part in ("unet", "autoencoder"):
            move_module(module, memory_format=torch.channels_last)

    streams_first = "large"  # they lie where the image is smallest, and hold almost all of the bytes

    def block_lists(self, denoiser: Any = None) -> dict[str, Sequence[nn.Module]]:
        """The U-Net's residual and transformer blocks, stage by stage in the order in which they run."""
        return {**block_lists(self.load("unet") if denoiser is None else denoiser)}

    def tokenizer_kind(self, encoder: str) -> TokenizerKind:
        """One of CLIP's."""
        return TOKENIZERS[self.variant][self.encoders.index(encoder)]  # type: ignore[arg-type]

    def _compute_dtype(self, part: Part) -> torch.dtype:
        """The dtype that a part computes in."""
        dtype = self.dtypes[part]
        if isinstance(dtype, BlocksStoredAs):
            return dtype.compute
        return dtype or self.load(part).dtype

    # Images and texts

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        """Latents [B, 4, H/8, W/8], float32 and not scaled, of ``pixels`` [B, 3, H, W] in -1..1.

        Item i is drawn from its posterior by the CPU generator ``generators[i]``; None takes the posterior's mean.
        Raises UserError when the autoencoder's values overflow.
        """
        means, logvars = zip(*(self._encode(batch) for batch in pixels.split(self.images_at_once(len(pixels)))))
        latents = torch.cat(means)
        if generators is not None:
            if len(generators) != len(latents):
                raise ValueError(f"{len(generators)} generators for {len(latents)} images")
            noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
            latents = latents + torch.exp(0.5 * torch.cat(logvars)) * noise.to(latents.device)
        if not all_finite(latents):
            advice = overflow_advice(self._compute_dtype("autoencoder"), HALF_VAE_REMEDY)
            raise NotFiniteError(f"The autoencoder gives NaN latents; {advice}.")
        return latents

    def images_at_once(self, images: int) -> int:
        """How many of that many images go through the autoencoder at once."""
        share = self.vae_batch_size
        if share is None:
            return images
        return max(1, int(share if share >= 1 else share * images))

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, float32, of the latents of ``pixels``."""
        autoencoder: Any = self.load_autoencoder()
        dtype, device = self._compute_dtype("autoencoder"), next(autoencoder.parameters()).device
        with _without_autocast(device), in_slices(autoencoder, self.vae_slices, pixels.shape[2]):
            posterior = autoencoder.encode(pixels.to(device, dtype)).latent_dist
        return posterior.mean.float(), posterior.logvar.float()

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], float32 in -1..1, of scaled ``latents`` [B, 4, H/8, W/8].

        NaN values become black, with a warning. Raises UserError where a damaged file is the reason.
        """
        pixels = self.decode_pixels(latents)
        if not all_finite(pixels):
            self.require_finite_files(*(["autoencoder"] if all_finite(latents) else self.parts))
        advice = overflow_advice(self._compute_dtype("autoencoder"), HALF_VAE_REMEDY)
        return visible(pixels, latents, "the U-Net", advice)

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """As ``decode_latents``, but gradients flow and NaN values stay."""
        return torch.cat([self._decode(batch) for batch in latents.split(self.images_at_once(len(latents)))])

    def _decode(self, latents: Tensor) -> Tensor:
        """Pixels, float32, of scaled ``latents``."""
        autoencoder: Any = self.load_autoencoder()
        dtype, device = self._compute_dtype("autoencoder"), next(autoencoder.parameters()).device
        unscaled = (latents.float() / self.latent_scale).to(device, dtype)
        height = latents.shape[2] * self.latent_stride
        slices = None if torch.is_grad_enabled() else self.vae_slices  # in which nothing can be differentiated
        with _without_autocast(device), in_slices(autoencoder, slices, height):
            return autoencoder.decode(unscaled).sample.float()

    def tokenize(self, prompts: Sequence[str], encoders: Collection[Encoder] | None = None) -> dict[Encoder, Tokens]:
        """Token chunks of the prompts for each encoder (all by default), on the CPU."""
        encoders = self.encoders if encoders is None else encoders
        self.load_tokenizers(encoders)
        return {
            encoder: tokenize(self.tokenizers[encoder], prompts, self.chunks, self.weighted_captions)
            for encoder in encoders
        }

    def first_tokens(self, prompts: Sequence[str]) -> Tensor:
        """The first chunk [B, 77] of each prompt for the first encoder, on the CPU; weights of words are left out."""
        encoder = self.encoders[0]
        self.load_tokenizers([encoder])
        return tokenize(self.tokenizers[encoder], prompts, 1, True).ids[:, 0]

    def encode_tokens(
        self,
        tokens: Mapping[Encoder, Tokens],
        trained: Collection[Encoder] = (),
        xl_layer: int = 2,
        join: Join = weighted_and_joined,
    ) -> dict[str, Tensor]:
        """The conditioning of ``tokens``, from their encoders; gradients flow through the ``trained`` ones.

        ``xl_layer`` is the layer from the end that XL takes.
        """
        conditioning: dict[str, Tensor] = {}
        for encoder, module in zip(tokens, self.load_text_encoders(list(tokens))):
            with torch.set_grad_enabled(encoder in trained):
                if self.variant != "sdxl":
                    conditioning["hidden_state"] = encode(module, tokens[encoder], self.clip_skip, join)
                    continue
                number = self.encoders.index(encoder) + 1
                end_of_text = self.tokenizers[encoder].eos_token_id
                states, pooled = encode_for_xl(module, tokens[encoder], end_of_text, xl_layer, join)
                conditioning[f"hidden_state{number}"] = states
                if pooled is not None:
                    conditioning[f"pool{number}"] = pooled
        return conditioning

    def encode_prompts(
        self,
        prompts: Sequence[str],
        encoders: Collection[Encoder] | None = None,
        role: Role = "positive",
        trained: Collection[Encoder] = (),
    ) -> dict[str, Tensor]:
        """Conditioning, batch first, n chunks of 75 tokens long; it is the same for both roles.

        1.x and 2.x: ``hidden_state`` [B, 75 n + 2, 768 or 1024]. XL: ``hidden_state1`` [B, 75 n + 2, 768],
        ``hidden_state2`` [B, 75 n + 2, 1280] and ``pool2`` [B, 1280].
        """
        return self.encode_tokens(self.tokenize(prompts, encoders), trained)

    def chunks_needed(self, texts: Sequence[str]) -> int:
        """How many chunks of 75 tokens the longest of ``texts`` fills, at most as many as images may have.

        All texts of an image need the same number. A text that is cut is named in a warning, once.
        """
        most, needed = self.image_texts.max_chunks, 1
        for text in texts:
            lengths = [len(image_chunks(self.tokenizer(name), text, self.words.get(name))) for name in self.encoders]
            if max(lengths) > most and text not in self.cut_texts:
                self.cut_texts.add(text)
                warn(
                    f"{shown(text)} needs {max(lengths)} x {CHUNK} tokens and is cut after {most} x {CHUNK}; use "
                    f"--max_embeddings_multiples {max(lengths)} or more."
                )
            needed = max(needed, *lengths)
        return min(needed, most)

    @torch.no_grad()
    def encode_image_texts(
        self, texts: Sequence[str], encoders: Collection[Encoder] | None = None, *, chunks: int
    ) -> list[dict[str, Tensor]]:
        """The conditioning [1, ...] of each text of an image, ``chunks`` chunks long; see ``image_text.py``.

        Every text is encoded by itself, so that its conditioning depends on nothing else. As ``encode_prompts`` gives
        it, but with ``77 chunks`` positions and, for XL, of the layer that ``clip_skip`` names. Where words have other
        vectors in layers of the U-Net, ``hidden_state.LAYER`` is the text of each.
        """
        encoders = self.encoders if encoders is None else encoders

        def join(states: Tensor, tokens: Tokens) -> Tensor:
            return whole_chunks(states, tokens, self.image_texts.normalization)

        conditionings = []
        for text in texts:
            tokens = {}
            for encoder in encoders:
                tokenizer = self.tokenizer(encoder)
                tokens[encoder] = image_tokens(
                    tokenizer, image_chunks(tokenizer, text, self.words.get(encoder)), chunks
                )
            conditioning = self.encode_tokens(tokens, xl_layer=self.clip_skip or 2, join=join)
            for layer, vectors in self.layer_words.items():
                words = self.words["text_encoder"]
                state = conditioning["hidden_state"]
                if words.holds(tokens["text_encoder"].ids, vectors):
                    with words.replaced(vectors):
                        state = self.encode_tokens(tokens, join=join)["hidden_state"]
                conditioning[f"hidden_state.{layer}"] = state
            conditionings.append(conditioning)
        return conditionings

    def unet_text(self, conditioning: Conditioning, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
        """What diffusers' U-Nets and ControlNets are given of ``conditioning``, by the names of their arguments."""
        states = self.context(conditioning)
        if self.variant != "sdxl":
            return {"encoder_hidden_states": states.to(device, dtype)}
        # In a half format, sizes above 2048 or 256 would be rounded before they become sinusoids.
        time_ids = conditioning["time_ids"].to(device, torch.float32)
        added = {"text_embeds": conditioning["pool2"].to(device, dtype), "time_ids": time_ids}
        return {"encoder_hidden_states": states.to(device, dtype), "added_cond_kwargs": added}

    def context(self, conditioning: Conditioning) -> Tensor:
        """What cross-attention attends to [B, positions, width]; of XL, the states of both text encoders."""
        if self.variant != "sdxl":
            return conditioning["hidden_state"]
        return torch.cat([conditioning["hidden_state1"], conditioning["hidden_state2"]], dim=-1)

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, **arguments: Any) -> Tensor:
        """What the U-Net predicts (noise, or v) [B, 4, h, w], float32, for noisy scaled ``latents``.

        ``timesteps`` [B] are in 0..999; ``arguments`` are further ones of diffusers' U-Net. XL's ``conditioning`` also
        holds ``time_ids`` [B, 6]: the original height and width, the crop's top and left, the target height and width.
        """
        unet: Any = self.load_transformer()
        text = self.unet_text(conditioning, latents.device, self._compute_dtype("unet"))
        out = unet(latents.to(self._compute_dtype("unet")), timesteps.to(latents.device), **text, **arguments)
        return out.sample.float()

    # Regions

    def sub_prompts(self, text: str) -> list[str]:
        """The parts of a prompt between " AND "."""
        return sub_prompts(text)

    def regions(self, contexts: Sequence[Tensor], masks_at: Callable[[int, int], Tensor]) -> Regions:
        """Regions of the image, each with a text [B, positions, width] (see ``context``)."""
        from library.models.stable_diffusion.regions import Regions

        dtype = self._compute_dtype("unet")
        return Regions([context.to(self.device, dtype) for context in contexts], masks_at, self.attention_backend)

    # Drawing

    def request(self, prompt: PromptOptions, **fields: Any) -> StableDiffusionRequest:
        """As for every family; the sampler is the prompt's."""
        if prompt.sample_sampler is not None:
            fields = {"sampler": prompt.sample_sampler, **fields}
        return super().request(prompt, **fields)

    def image_size(self, request: StableDiffusionRequest) -> tuple[int, int]:
        """Height and width, rounded down to whole latent positions, at least 64."""
        stride = self.latent_stride
        height, width = (max(SMALLEST_SIDE, side // stride * stride) for side in (request.height, request.width))
        return height, width

    def solver(self, request: StableDiffusionRequest) -> DiffusersSolver:
        """The request's sampler. Raises UserError for an unknown one, and for steps that it cannot make."""
        rescaled = request.zero_terminal_snr
        scheduler = make_scheduler(
            request.sampler,
            v_prediction=self.v_parameterization,
            zero_terminal_snr=self.zero_terminal_snr if rescaled is None else rescaled,
            clip_sample=request.clip_sample,
            steps_offset=request.steps_offset if request.sample_steps < TRAIN_STEPS else 0,  # all timesteps are taken
        )
        leads = False
        if request.drawn_over:
            if "skip_prk_steps" in scheduler.config:  # its Runge-Kutta steps are for the beginning, where all is noise
                scheduler.register_to_config(skip_prk_steps=True)
            leads = request.offset_start and scheduler.order == 1 and "steps_offset" in scheduler.config
        solver = DiffusersSolver(scheduler, request.sample_steps, lead=int(leads))
        if not solver.timesteps.isfinite().all():  # in float32, dpm_2_a cannot go from pure noise to almost none
            raise UserError(
                f"The sampler {request.sampler} cannot make {request.sample_steps} steps along the noise schedule of "
                "--zero_terminal_snr; more steps or another sampler would do."
            )
        return solver

    def first_step(self, request: StableDiffusionRequest, solver: Any) -> int:
        """By the request's strength, if it has one."""
        return super().first_step(request, solver) if request.strength is None else solver.first_step(request.strength)

    def start_noise(self, request: StableDiffusionRequest, generators: Sequence[torch.Generator]) -> Tensor:
        """As for every family, with pyramid noise and offset.

        The noise of an image that is drawn over follows on that and on as much noise as stochastic samplers need.
        """
        height, width = (side // self.latent_stride for side in self.image_size(request))
        over = noises_of_steps(request.sampler, request.sample_steps) if request.drawn_over else None
        shape = (self.latent_channels, height, width)
        noise = [draw_start(shape, g, request.pyramid_noise, request.noise_offset, over) for g in generators]
        return torch.stack(noise).to(self.device)

    def guidance(self, request: StableDiffusionRequest) -> Guidance:
        """Classifier-free for scales above 1, with a scale of its own for the negative prompt if there is one."""
        if request.scale <= 1:
            return Unguided()
        if request.negative_scale is None:
            return ClassifierFree(request.scale)
        return NegativeScale(request.scale, request.negative_scale)

    def request_conditioning(self, request: StableDiffusionRequest, role: Role) -> Conditioning:
        """For XL with the sizes."""
        conditioning = super().request_conditioning(request, role)
        if self.variant != "sdxl":
            return conditioning
        size = self.image_size(request)
        original = request.original_size or size
        if role != "positive":
            original = request.negative_original_size or original
        sizes = time_ids(original, request.crop, request.target_size or size)
        return {"time_ids": sizes, **conditioning}


def time_ids(original_size: tuple[int, int], crop: tuple[int, int], target_size: tuple[int, int]) -> Tensor:
    """XL's size conditioning [1, 6], float32: each argument is (height, width) or (top, left), in pixels."""
    return torch.tensor([[*original_size, *crop, *target_size]], dtype=torch.float32)


def _without_autocast(device: torch.device) -> torch.autocast:
    """XL's autoencoder overflows in float16, so one that is kept in float32 must also compute in it."""
    return torch.autocast(device.type, enabled=False)
