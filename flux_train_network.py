"""Train a LoRA for FLUX.1 (dev and schnell) or Chroma.

``FluxNetworkTrainer`` trains FLUX.1; ``ChromaNetworkTrainer`` below it says what is different for Chroma.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from library.console import run_script, say, set_up_console, warn
from library.data.options import TextCacheOptions
from library.errors import UserError
from library.image_reading import read_given_image
from library.options import parse_options
from library.prompt_options import PromptOptions
from library.training.caching import caches_text
from library.training.flow_matching_hooks import FlowMatchingHooks
from library.training.network.contract import NetworkOptions, parse_network_args
from library.training.objective.flow_matching import FlowMatchingOptions
from library.training.objective.step_inputs import NoisyInput
from library.training.part_dtypes import part_dtypes
from library.training.run_options import VaeOptions
from library.training.training_options import TrainingOptions
from train_network import NetworkTrainer

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from library.data.batch import Batch
    from library.data.cache import LatentFormat, TextFormat
    from library.models.flux.pipeline import Encoder, FluxPipeline
    from library.models.pipeline import ImageRequest


SPLIT_MODE = 18
"""``--blocks_to_swap`` of ``--split_mode``."""


@dataclass
class FluxOptions:
    """FLUX.1"""

    model_type: Literal["flux", "chroma"] = "flux"
    """Base model: flux (FLUX.1 dev, schnell and the like) or chroma."""
    clip_l: str | None = None
    """CLIP-L text encoder file; Chroma takes none."""
    t5xxl: str | None = None
    """T5-XXL text encoder file."""
    ae: str | None = None
    """Autoencoder file."""
    controlnet_model_name_or_path: str | None = None
    """FLUX.1 ControlNet (XLabs or InstantX type) that the LoRA is trained together with; it stays as it is."""
    controlnet_mode: int | None = None
    """Kind of control that a union ControlNet is given (usually 0 canny, 1 tile, 2 depth, 3 blur, 4 pose, 5 grey)."""
    t5xxl_max_token_length: int | None = None
    """Caption length in T5 tokens; unset means 512, and 256 for schnell."""
    apply_t5_attn_mask: bool = False
    """Hide the padding of captions from T5 and from the transformer; always on for Chroma."""
    split_mode: bool = False
    """Deprecated; the same as --blocks_to_swap 18."""


@dataclass
class FluxFlowOptions(FlowMatchingOptions):
    """Flow matching"""

    guidance_scale: float = 3.5
    """Embedded guidance given to the model in training; 1.0 is recommended for FLUX.1 dev, 0.0 for Chroma."""


@dataclass
class FluxTrainingOptions(TrainingOptions):
    """All options of this script."""

    flux: FluxOptions = field(default_factory=FluxOptions)
    text_cache: TextCacheOptions = field(default_factory=TextCacheOptions)
    flow: FluxFlowOptions = field(default_factory=FluxFlowOptions)


class FluxNetworkTrainer(FlowMatchingHooks, NetworkTrainer):
    """The FLUX.1 family: flow matching on packed latents, CLIP-L and T5 conditioning, embedded guidance."""

    options_class = FluxTrainingOptions
    family = "FLUX.1"
    unused_groups = (*FlowMatchingHooks.unused_groups, VaeOptions)
    bucket_divisor = 32
    size_divisor = 16
    sample_step = 16
    encoders: tuple[Encoder, ...] = ("clip_l", "t5xxl")
    version = "flux1"
    """``ss_base_model_version``."""
    cache_parts = {"latents": ("transformer", "autoencoder"), "text": ("transformer", "clip_l", "t5xxl")}
    options: FluxTrainingOptions
    pipeline: FluxPipeline

    @classmethod
    def of(cls, options: Any) -> FluxNetworkTrainer:
        """The trainer of ``--model_type``."""
        return (ChromaNetworkTrainer if options.flux.model_type == "chroma" else cls)(options)

    # ---- checks -----------------------------------------------------------------------------------------------------

    def check_options(self) -> None:
        """As for every family; ``--split_mode`` is what it stands for."""
        streaming = self.options.streaming
        if self.options.flux.split_mode:
            warn("--split_mode is deprecated; use --blocks_to_swap.")
            if streaming.blocks_to_swap is None:
                streaming.blocks_to_swap = SPLIT_MODE
            else:
                self.report_unused(["split_mode"], "beside --blocks_to_swap")
        super().check_options()

    def check_family_options(self) -> None:
        """Forbidden combinations, and options without effect."""
        options, flux = self.options, self.options.flux
        self.takes_control_images = bool(flux.controlnet_model_name_or_path)
        self.trained_encoders = self.encoders_to_train()
        if caches_text(options.text_cache) and "t5xxl" in self.trained_encoders:
            raise UserError(
                "T5-XXL is trained (by train_t5xxl=True, or because the file of --dim_from_weights holds it), so that "
                "captions are encoded at every step; leave out --cache_text_encoder_outputs."
            )
        if flux.t5xxl_max_token_length is not None and flux.t5xxl_max_token_length < 1:
            raise UserError("--t5xxl_max_token_length must be at least 1.")
        self.say_what_has_no_effect()

    def encoders_to_train(self) -> tuple[Encoder, ...]:
        """CLIP-L unless only the transformer is trained; T5-XXL on request, or with a file that holds its modules."""
        network = self.options.network
        if network.network_train_unet_only:
            return ()
        train_t5 = trains_t5xxl(network)
        if network.dim_from_weights and network.network_module == "networks.lora_flux" and network.network_weights:
            from networks.lora_flux import holds_t5xxl

            train_t5 = train_t5 or holds_t5xxl(network.network_weights)
        return ("clip_l", "t5xxl") if train_t5 else ("clip_l",)

    def prompt_options_without_effect(self) -> list[str]:
        """Those of Stable Diffusion and Lumina, and control images without a ControlNet."""
        control = [] if self.takes_control_images else ["controlnet_image"]
        return ["sample_sampler", "cfg_trunc_ratio", "renorm_cfg", "flow_shift", *control]

    def prepare_output(self) -> None:
        """As for every family. Raises UserError when a control image of a sample prompt cannot be read."""
        super().prepare_output()
        for number, prompt in enumerate(self.outputs.samples.prompts, start=1):
            self.prompt_control(prompt, f"{self.options.samples.sample_prompts}, prompt {number}: ")

    def say_what_has_no_effect(self) -> None:
        """One line for each reason why given options change nothing for FLUX.1."""
        if not self.takes_control_images:
            self.report_unused(["controlnet_mode"], "without --controlnet_model_name_or_path")
        self.report_unused_flow_options()

    # ---- models and caches ------------------------------------------------------------------------------------------

    def pipeline_class(self) -> type[FluxPipeline]:
        """The pipeline of this model, imported now."""
        from library.models.flux.pipeline import FluxPipeline

        return FluxPipeline

    def make_pipeline(self, parts: tuple[Any, ...] = ()) -> FluxPipeline:
        """Open the checkpoint files by their headers."""
        from library.models.flux.pipeline import PARTS, FluxFiles

        options, flux = self.options, self.options.flux
        files = FluxFiles(
            transformer=options.model.pretrained_model_name_or_path or "",
            autoencoder=flux.ae,
            clip_l=flux.clip_l if "clip_l" in self.encoders else None,
            t5xxl=flux.t5xxl,
            controlnet=flux.controlnet_model_name_or_path,
            controlnet_mode=flux.controlnet_mode,
            tokenizer_cache_dir=options.model.tokenizer_cache_dir,
            disable_mmap=options.model.disable_mmap_load_safetensors,
        )
        return self.pipeline_class()(
            files,
            dtype=self.weight_dtype,
            device=self.accelerator.device,
            dtypes=part_dtypes(options.model, options.precision, self.weight_dtype, "transformer", ("clip_l", "t5xxl")),
            t5xxl_max_token_length=flux.t5xxl_max_token_length,
            apply_t5_attn_mask=flux.apply_t5_attn_mask,
            attention_backend="xformers" if options.model.xformers else "sdpa",
            parts=parts or PARTS,
        )

    def open_pipeline(self, parts: tuple[Any, ...] = ()) -> None:
        """As for every family; what a model without embedded guidance does not use is named."""
        super().open_pipeline(parts)
        if self.pipeline.variant == "schnell":
            self.report_unused(["guidance_scale"], "for FLUX.1 schnell")

    def control_parts(self) -> set[str]:
        """The ControlNet, and the autoencoder where it takes latents."""
        if not self.takes_control_images:
            return set()
        return {"controlnet", "autoencoder"} if self.pipeline.control_takes_latents else {"controlnet"}

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
            "l_pooled": self.pipeline.pooled_shape,
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

    def conditioning(self, batch: Batch) -> dict[str, Tensor]:
        """As for every family; with a ControlNet also ``control_image``, the batch's [B, 3, H, W] in -1..1."""
        conditioning = super().conditioning(batch)
        if self.takes_control_images:
            assert batch.conditioning_images is not None
            images = batch.conditioning_images.to(self.accelerator.device, non_blocking=True)
            conditioning = {**conditioning, "control_image": images}
        return conditioning

    def predict(self, noisy: NoisyInput, conditioning: dict[str, Tensor]) -> Tensor:
        """The transformer's velocity."""
        import torch

        guidance = torch.full_like(noisy.sigmas, self.options.flow.guidance_scale)
        control = conditioning.get("control_image")
        return self.pipeline.predict(noisy.latents, noisy.sigmas, conditioning, guidance, control)

    # ---- samples and metadata ---------------------------------------------------------------------------------------

    def sample_request(self, prompt: PromptOptions) -> ImageRequest:
        """With the control image, where a ControlNet takes part."""
        width, height = self.sample_size(prompt)
        return self.pipeline.request(prompt, width=width, height=height, control_image=self.prompt_control(prompt))

    def prompt_control(self, prompt: PromptOptions, place: str = "") -> Image | None:
        """The control image of a sample prompt, if a ControlNet takes part; ``place`` begins a UserError's sentence."""
        if not (self.takes_control_images and prompt.controlnet_image):
            return None
        return read_given_image(prompt.controlnet_image, f"{place}control image")

    def family_metadata(self) -> dict[str, Any]:
        """How flow matching was set up."""
        flux = self.options.flux
        values = self.flow_metadata("weighting_scheme", "guidance_scale")
        values |= {"ss_model_type": flux.model_type, "ss_apply_t5_attn_mask": flux.apply_t5_attn_mask}
        if self.takes_control_images:
            values["ss_controlnet"] = Path(flux.controlnet_model_name_or_path or "").name
            values |= {} if flux.controlnet_mode is None else {"ss_controlnet_mode": flux.controlnet_mode}
        return {"ss_base_model_version": self.version, **values}

    def architecture(self) -> tuple[str, str]:
        """``flux-1-dev`` or ``flux-1-schnell``."""
        return f"flux-1-{self.pipeline.variant}", "https://github.com/black-forest-labs/flux"


class ChromaNetworkTrainer(FluxNetworkTrainer):
    """Chroma: T5 alone, whose text is always masked, and no embedded guidance; only the transformer is trained."""

    family = "Chroma"
    encoders = ("t5xxl",)
    version = "chroma"

    def check_family_options(self) -> None:
        """As for FLUX.1; what Chroma needs is set and logged. Raises UserError if text encoders are to be trained."""
        options, flux = self.options, self.options.flux
        if options.network.network_train_text_encoder_only:
            raise UserError(
                "--network_train_text_encoder_only: of Chroma only the transformer is trained; leave it out."
            )
        if trains_t5xxl(options.network):
            raise UserError("train_t5xxl=True: Chroma trains the transformer alone; leave it out.")
        if not flux.apply_t5_attn_mask:
            flux.apply_t5_attn_mask = True
            say("--apply_t5_attn_mask is on: Chroma needs it")
        if options.flow.guidance_scale:
            say(f"--guidance_scale is 0, not {options.flow.guidance_scale:g}: Chroma has no embedded guidance")
            options.flow.guidance_scale = 0.0
        self.report_unused(["clip_l", "text_encoder_lr"], "for Chroma")
        super().check_family_options()

    def encoders_to_train(self) -> tuple[Encoder, ...]:
        """None."""
        return ()

    def prepare_output(self) -> None:
        """As for FLUX.1."""
        super().prepare_output()
        if any(prompt.guidance_scale for prompt in self.outputs.samples.prompts):
            say("sample prompts: guidance (--g) is 0 for Chroma, which has no embedded guidance; --l is its CFG scale")

    def pipeline_class(self) -> type[FluxPipeline]:
        """Chroma's."""
        from library.models.flux.pipeline import ChromaPipeline

        return ChromaPipeline

    def network_text_encoders(self, encoders: Mapping[str, Any]) -> Any:
        """The networks' list is [CLIP-L, T5-XXL] here too."""
        return [None, *super().network_text_encoders(encoders)]

    def architecture(self) -> tuple[str, str]:
        """``chroma``."""
        return "chroma", "https://huggingface.co/lodestones/Chroma"


def trains_t5xxl(options: NetworkOptions) -> bool:
    """Whether ``--network_args`` says train_t5xxl=True."""
    return parse_network_args(options).get("train_t5xxl", "").strip().lower() == "true"


def main() -> None:
    """Read the options and train."""
    options = parse_options(FluxTrainingOptions, __doc__ or "")
    set_up_console(options.console)
    FluxNetworkTrainer.of(options).train()


if __name__ == "__main__":
    run_script(main)
