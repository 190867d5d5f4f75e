"""Train a LoRA for FLUX.1 (dev and schnell)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from library.console import run_script, say, set_up_console, warn
from library.data.options import TextCacheOptions
from library.errors import UserError
from library.options import parse_options
from library.prompt_options import PromptOptions
from library.training.flow_matching import (
    FlowMatchingOptions,
    add_noise,
    apply_prediction_type,
    guidance_vector,
    noise_to_signal,
    objective_notice,
    sample_sigmas,
    sigma_weights,
    training_target,
    unused_flow_options,
)
from library.training.network_contract import parse_network_args
from library.training.noise import draw_input_perturbation, draw_noise
from library.training.step_inputs import ItemDraws, NoisyInput
from library.training.training_options import TrainingOptions
from train_network import NetworkTrainer

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from library.data.cache import LatentFormat, TextFormat
    from library.models.flux.pipeline import Encoder, FluxPipeline, Part

NO_EFFECT = (
    "v2 v_parameterization vae clip_skip max_token_length weighted_captions mem_eff_attn sample_sampler noise_offset "
    "noise_offset_random_strength adaptive_noise_scale multires_noise_iterations multires_noise_discount "
    "zero_terminal_snr min_snr_gamma scale_v_pred_loss_like_noise_pred v_pred_like_loss debiased_estimation_loss "
    "ddp_gradient_as_bucket_view ddp_static_graph"
).split()


@dataclass
class FluxOptions:
    """FLUX.1"""

    model_type: Literal["flux", "chroma"] = "flux"
    """Base model: flux, or chroma (not yet available)."""
    clip_l: str | None = None
    """CLIP-L text encoder file."""
    t5xxl: str | None = None
    """T5-XXL text encoder file."""
    ae: str | None = None
    """Autoencoder file."""
    controlnet_model_name_or_path: str | None = None
    """FLUX.1 ControlNet to train together with (not yet available)."""
    t5xxl_max_token_length: int | None = None
    """Caption length in T5 tokens; unset means 512, and 256 for schnell."""
    apply_t5_attn_mask: bool = False
    """Hide the padding of captions from T5 and from the transformer."""
    blocks_to_swap: int | None = None
    """Transformer blocks kept in CPU memory (not yet available)."""
    split_mode: bool = False
    """Deprecated; use --blocks_to_swap."""


@dataclass
class FluxTrainingOptions(TrainingOptions):
    """All options of this script."""

    flux: FluxOptions = field(default_factory=FluxOptions)
    text_cache: TextCacheOptions = field(default_factory=TextCacheOptions)
    flow: FlowMatchingOptions = field(default_factory=FlowMatchingOptions)


class FluxNetworkTrainer(NetworkTrainer):
    """The FLUX.1 family: flow matching on packed latents, CLIP-L and T5 conditioning, embedded guidance."""

    options_class = FluxTrainingOptions
    family = "FLUX.1"
    bucket_divisor = 32
    size_divisor = 16
    options: FluxTrainingOptions
    opened_parts: tuple[Part, ...] = ()
    """The parts whose files are needed; all of them unless something else is said here (by the caching tools)."""

    # ---- checks -----------------------------------------------------------------------------------------------------

    def check_family_options(self) -> None:
        """Forbidden combinations, and options without effect."""
        options, flux = self.options, self.options.flux
        if flux.model_type == "chroma":
            raise UserError("--model_type chroma is not available yet; this script trains FLUX.1 dev and schnell.")
        if flux.controlnet_model_name_or_path:
            raise UserError("--controlnet_model_name_or_path is not available yet; leave it out.")
        trained: tuple[Encoder, ...] = ()
        if not options.network.network_train_unet_only:
            train_t5 = parse_network_args(options.network).get("train_t5xxl", "").lower() == "true"
            trained = ("clip_l", "t5xxl") if train_t5 else ("clip_l",)
        self.take_text_options(options.text_cache, trained)
        if self.cache_text and "t5xxl" in self.trained_encoders:
            raise UserError("train_t5xxl=True encodes captions at every step; leave out --cache_text_encoder_outputs.")
        if flux.blocks_to_swap and options.precision.cpu_offload_checkpointing:
            raise UserError("--blocks_to_swap and --cpu_offload_checkpointing exclude each other.")
        if flux.t5xxl_max_token_length is not None and flux.t5xxl_max_token_length < 1:
            raise UserError("--t5xxl_max_token_length must be at least 1.")
        self.say_what_has_no_effect()

    def prepare_output(self) -> None:
        """As for every family; prompt options that FLUX.1 does not have are named."""
        super().prepare_output()
        unused = ("sample_sampler", "controlnet_image", "cfg_trunc_ratio", "renorm_cfg", "flow_shift")
        given = [name for name in unused if any(getattr(prompt, name) is not None for prompt in self.samples.prompts)]
        if given:
            say(f"no effect in sample prompts for FLUX.1: {', '.join(given)}")

    def say_what_has_no_effect(self) -> None:
        """One line for each reason why given options change nothing for FLUX.1."""
        flux = self.options.flux
        self.note_without_effect(NO_EFFECT)
        if flux.split_mode:
            warn("--split_mode is deprecated; use --blocks_to_swap.")
        if flux.blocks_to_swap or flux.split_mode:
            say("--blocks_to_swap has no effect yet: all blocks stay on the device")
            self.no_effect += [name for name in ("blocks_to_swap", "split_mode") if getattr(flux, name)]
        if not self.options.noise.ip_noise_gamma:
            self.note_without_effect(["ip_noise_gamma_random_strength"], "without --ip_noise_gamma")
        for reason, names in unused_flow_options(self.options.flow):
            self.note_without_effect(names, reason)
        say(objective_notice(self.options.flow))

    # ---- models and caches ------------------------------------------------------------------------------------------

    def make_pipeline(self) -> FluxPipeline:
        """Open the four checkpoint files by their headers and find the tokenizers."""
        from library.models.flux.pipeline import ENCODERS, FluxFiles, FluxPipeline

        options, flux = self.options, self.options.flux
        files = FluxFiles(
            transformer=options.model.pretrained_model_name_or_path or "",
            autoencoder=flux.ae,
            clip_l=flux.clip_l,
            t5xxl=flux.t5xxl,
            tokenizer_cache_dir=options.model.tokenizer_cache_dir,
            disable_mmap=options.model.disable_mmap_load_safetensors,
        )
        return FluxPipeline(
            files,
            dtype=self.weight_dtype,
            device=self.accelerator.device,
            dtypes=self.number_formats("transformer", ENCODERS),
            t5xxl_max_token_length=flux.t5xxl_max_token_length,
            apply_t5_attn_mask=flux.apply_t5_attn_mask,
            attention_backend="xformers" if options.model.xformers else "sdpa",
            **({"parts": self.opened_parts} if self.opened_parts else {}),
        )

    def open_pipeline(self) -> None:
        """As for every family; what a model without embedded guidance does not use is named."""
        super().open_pipeline()
        if self.pipeline.variant == "schnell":
            self.note_without_effect(["guidance_scale"], "for FLUX.1 schnell")

    def latent_format(self) -> LatentFormat:
        """``<stem>_WWWWxHHHH_flux.npz`` with one set of arrays for each latent size."""
        from library.data.cache import LatentFormat

        return LatentFormat(
            suffix="_flux.npz", channels=self.pipeline.latent_channels, stride=self.pipeline.latent_stride
        )

    def text_format(self) -> TextFormat:
        """``<stem>_flux_te.npz``."""
        from library.data.cache import TextFormat

        length, config = self.pipeline.text_lengths["t5xxl"], self.pipeline.config
        arrays: dict[str, tuple[int | None, ...]] = {
            "l_pooled": (config.vector_dim,),
            "t5_out": (length, config.context_dim),
            "txt_ids": (length, 3),
            "t5_attn_mask": (length,),
        }
        return TextFormat(
            suffix="_flux_te.npz",
            arrays=arrays,
            flags={"apply_t5_attn_mask": self.options.flux.apply_t5_attn_mask},
        )

    # ---- the training step ------------------------------------------------------------------------------------------

    def noisy_input(self, latents: Tensor, draws: ItemDraws, timestep: int | None = None) -> NoisyInput:
        """Flow matching: a point between image and noise, and the velocity there."""
        import torch

        options, device = self.options, latents.device
        flow, shape = options.flow, tuple(latents.shape[1:])
        if timestep is None:
            tokens = (shape[1] // 2) * (shape[2] // 2)
            sigmas = sample_sigmas(flow, draws.generators("sigma"), tokens, options.noise).to(device)
        else:
            sigmas = torch.full((len(latents),), timestep / 1000, device=device)
        noise = draw_noise(shape, draws.generators("noise")).to(device)
        extra = draw_input_perturbation(options.noise, shape, draws.generators("ip_noise"))
        noisy = add_noise(latents, noise, sigmas, None if extra is None else extra.to(device))
        return NoisyInput(
            latents=noisy,
            sigmas=sigmas,
            target=training_target(flow, latents, noise, noisy, sigmas),
            weights=sigma_weights(flow, sigmas),
            noise_to_signal=noise_to_signal(sigmas),
        )

    def predict(self, noisy: NoisyInput, conditioning: dict[str, Tensor]) -> Tensor:
        """The transformer's velocity, as ``--model_prediction_type`` reads it."""
        guidance = guidance_vector(self.options.flow, len(noisy.latents), noisy.latents.device)
        velocity = self.pipeline.predict(noisy.latents, noisy.sigmas, conditioning, guidance)
        return apply_prediction_type(self.options.flow, velocity, noisy.latents, noisy.sigmas)

    # ---- samples and metadata ---------------------------------------------------------------------------------------

    def sample_image(self, index: int, prompt: PromptOptions) -> Image:
        """A sample image; sides are rounded down to multiples of 16, at least 64."""
        from library.models.flux.pipeline import PictureRequest

        scale = 1.0 if prompt.scale is None else prompt.scale
        negative = (prompt.negative_prompt or "") if scale != 1.0 else None
        request = PictureRequest(
            prompt=prompt.prompt,
            negative_prompt=negative,
            width=max(64, (prompt.width or 512) // 16 * 16),
            height=max(64, (prompt.height or 512) // 16 * 16),
            seed=prompt.seed,
            sample_steps=prompt.sample_steps or 20,
            guidance_scale=3.5 if prompt.guidance_scale is None else prompt.guidance_scale,
            scale=scale,
            conditioning=self.sample_conditioning(prompt.prompt),
            negative_conditioning=None if negative is None else self.sample_conditioning(negative),
        )
        return self.pipeline.generate(request)

    def family_metadata(self) -> dict[str, Any]:
        """How flow matching was set up."""
        options = self.options
        flow = {
            name: getattr(options.flow, name)
            for name in (
                "weighting_scheme logit_mean logit_std mode_scale guidance_scale timestep_sampling sigmoid_scale "
                "model_prediction_type discrete_flow_shift"
            ).split()
        }
        values = {"model_type": options.flux.model_type, "apply_t5_attn_mask": options.flux.apply_t5_attn_mask, **flow}
        return {"ss_base_model_version": "flux1", **{f"ss_{name}": value for name, value in values.items()}}

    def architecture(self) -> tuple[str, str]:
        """``flux-1-dev`` or ``flux-1-schnell``."""
        return f"flux-1-{self.pipeline.variant}", "https://github.com/black-forest-labs/flux"


def main() -> None:
    """Read the options and train."""
    options = parse_options(FluxTrainingOptions, __doc__ or "")
    set_up_console(options.console)
    FluxNetworkTrainer(options).train()


if __name__ == "__main__":
    run_script(main)
