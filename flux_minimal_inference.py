"""Generate images with FLUX.1 (dev, schnell) or Chroma and any number of LoRA files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from library.console import ConsoleOptions, run_script, say, set_up_console
from library.errors import UserError
from library.families import FLUX
from library.generation.image_files import ImageFileOptions
from library.generation.inference_run import InferenceRun
from library.generation.lora_files import LoraFileOptions
from library.generation.part_dtypes import DtypeOptions
from library.generation.parts import DeviceOptions, ReadingOptions
from library.generation.prompts import ImageOptions, PromptSourceOptions
from library.generation.session import SessionGrammar
from library.memory.streaming_options import StreamingOptions
from library.options import ConfigOptions, parse_options
from library.prompt_options import LINE_OPTIONS, PromptOptions

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.models.flux.pipeline import FluxPipeline, FluxRequest
    from networks.adapters.network_stack import NetworkStack

STEPS = {"schnell": 4}
DEFAULT_STEPS = 50
SESSION = SessionGrammar(
    letters={letter: LINE_OPTIONS[letter] for letter in ("w", "h", "d", "s", "g", "l", "n", "cn")}
    | {"c": ("scale", float), "m": ("multipliers", str)},
    lasting=("width", "height", "sample_steps", "guidance_scale", "scale"),
    help="""A prompt, then any of these (an empty line ends):
  --w 1360 --h 768   width and height in pixels
  --s 20             steps
  --g 3.5            guidance of FLUX.1 dev
  --c 4 (or --l 4)   classifier-free guidance; 1 is none
  --n blurry         negative prompt; - is an empty one
  --d 42             seed
  --cn edges.png     control image, with a ControlNet
  --m 0.8,0.5        strength of each LoRA file
Sizes, steps, guidance and strengths stay for the lines that follow.""",
)


@dataclass
class ModelFileOptions:
    """Model files"""

    ckpt_path: str | None = None
    """Transformer: a file, one of its shards, or a Diffusers folder."""
    model_type: Literal["flux", "chroma"] = "flux"
    """Kind of model: flux (dev, schnell, and models built like them) or chroma."""
    clip_l: str | None = None
    """CLIP-L text encoder file; Chroma has none."""
    t5xxl: str | None = None
    """T5-XXL text encoder file."""
    ae: str | None = None
    """Autoencoder file."""


@dataclass
class FluxImageOptions(ImageOptions):
    """Image"""

    prompt: str = "A photo of a cat"
    negative_prompt: str | None = None
    """What to keep away from; needs --cfg_scale, and unset counts as an empty one."""
    steps: int | None = None
    """Denoising steps; unset means 4 for schnell, else 50."""
    width: int = 1360
    """Pixels, rounded up to a multiple of 16."""
    height: int = 768
    """Pixels, rounded up to a multiple of 16."""
    guidance: float = 3.5
    """Guidance that FLUX.1 dev was distilled with; schnell and Chroma have none."""
    cfg_scale: float = 1.0
    """Classifier-free guidance, at twice the time; 1 is none."""
    apply_t5_attn_mask: bool = False
    """Hide the padding of prompts from T5 and from the transformer; Chroma always does."""
    t5xxl_max_token_length: int | None = None
    """Prompt length in T5 tokens; unset means 512, and 256 for schnell."""


@dataclass
class ControlNetOptions:
    """ControlNet"""

    controlnet_model_name_or_path: str | None = None
    """FLUX.1 ControlNet: a file, one of its shards, or a Diffusers folder."""
    controlnet_mode: int | None = None
    """Number of the kind of control, for a ControlNet that has several (union)."""
    controlnet_image: str | None = None
    """Control image; a prompt's --cn wins."""
    controlnet_strength: float = 1.0
    """Factor for what the ControlNet adds."""


@dataclass
class FluxDtypeOptions(DtypeOptions):
    """Dtypes"""

    clip_l_dtype: str | None = None
    """The same for CLIP-L; unset means --dtype."""
    ae_dtype: str | None = None
    """The same for the autoencoder, where fp8 counts as bf16; unset means --dtype."""
    t5xxl_dtype: str | None = None
    """The same for T5-XXL; unset means --dtype."""
    flux_dtype: str | None = None
    """The same for the transformer; unset means --dtype."""


@dataclass
class FluxDeviceOptions(DeviceOptions):
    """Device"""

    attn_mode: Literal["sdpa", "split", "xformers", "flash", "sage"] = "sdpa"
    """Attention: torch's own (sdpa), the same for one item at a time (split), or a package of that name."""


@dataclass
class FluxInferenceOptions:
    """All options of this script."""

    model: ModelFileOptions = field(default_factory=ModelFileOptions)
    image: FluxImageOptions = field(default_factory=FluxImageOptions)
    sources: PromptSourceOptions = field(default_factory=PromptSourceOptions)
    lora: LoraFileOptions = field(default_factory=LoraFileOptions)
    control: ControlNetOptions = field(default_factory=ControlNetOptions)
    dtypes: FluxDtypeOptions = field(default_factory=FluxDtypeOptions)
    device: FluxDeviceOptions = field(default_factory=FluxDeviceOptions)
    streaming: StreamingOptions = field(default_factory=StreamingOptions)
    reading: ReadingOptions = field(default_factory=ReadingOptions)
    output: ImageFileOptions = field(default_factory=ImageFileOptions)
    config: ConfigOptions = field(default_factory=ConfigOptions)
    console: ConsoleOptions = field(default_factory=ConsoleOptions)


class FluxInference(InferenceRun[PromptOptions]):
    """FLUX.1 and Chroma: two text encoders or one, embedded guidance, flow matching in Euler steps."""

    script = "flux_minimal_inference.py"
    family = FLUX
    sampler = "Euler"
    session = SESSION
    dtype_options = {
        "transformer": "flux_dtype",
        "controlnet": "flux_dtype",
        "autoencoder": "ae_dtype",
        "clip_l": "clip_l_dtype",
        "t5xxl": "t5xxl_dtype",
    }
    never_8_bits = ("autoencoder", "controlnet")
    unused_in_prompts = ("sample_sampler", "cfg_trunc_ratio", "renorm_cfg", "flow_shift")
    options: FluxInferenceOptions
    pipeline: FluxPipeline

    # ---- checks -----------------------------------------------------------------------------------------------------

    def check_options(self) -> None:
        """Options that are missing, and lengths that cannot be."""
        if not self.options.model.ckpt_path:
            raise UserError("--ckpt_path is missing; it names the transformer's file or a Diffusers folder.")
        length = self.options.image.t5xxl_max_token_length
        if length is not None and length < 1:
            raise UserError("--t5xxl_max_token_length must be at least 1.")
        if self.options.control.controlnet_image is not None:
            self.require_controlnet("--controlnet_image")

    def require_controlnet(self, place: str) -> None:
        """Raises UserError where a control image has no ControlNet."""
        if not self.options.control.controlnet_model_name_or_path:
            raise UserError(f"{place} needs --controlnet_model_name_or_path.")

    def check_prompt(self, prompt: PromptOptions, place: str = "") -> None:
        """As for every family; and the control image is read."""
        super().check_prompt(prompt, place)
        if prompt.controlnet_image is not None:
            self.require_controlnet(f"{place}--cn")
            self.control_image(prompt, place)

    def default_prompt(self) -> PromptOptions:
        """The command line as a prompt."""
        image = self.options.image
        steps = STEPS.get(self.pipeline.variant, DEFAULT_STEPS)
        return PromptOptions(
            prompt=image.prompt,
            negative_prompt=image.negative_prompt,
            width=image.width,
            height=image.height,
            seed=image.seed,
            sample_steps=steps if image.steps is None else image.steps,
            scale=image.cfg_scale,
            guidance_scale=image.guidance,
            controlnet_image=self.options.control.controlnet_image,
        )

    def say_what_has_no_effect(self) -> None:
        """What every script says, and what the kind of model does not have."""
        super().say_what_has_no_effect()
        options, variant = self.options, self.pipeline.variant
        if variant != "dev" and options.image.guidance != FluxImageOptions.guidance:
            say(f"--guidance has no effect: {variant} has no embedded guidance")
        if "clip_l" not in self.pipeline.encoders and (options.model.clip_l or options.dtypes.clip_l_dtype):
            say(f"--clip_l and --clip_l_dtype have no effect: {variant} has no CLIP-L")
        without_image = any(prompt.controlnet_image is None for prompt in self.file_prompts)
        if options.control.controlnet_model_name_or_path and without_image and not options.sources.interactive:
            say("prompts without a control image (--controlnet_image, --cn) are generated without the ControlNet")

    # ---- models -----------------------------------------------------------------------------------------------------

    def open_pipeline(self) -> FluxPipeline:
        """Open the model files by their headers and find the tokenizers."""
        from library.models.flux.pipeline import PIPELINES, FluxFiles

        model, image, control = self.options.model, self.options.image, self.options.control
        files = FluxFiles(
            transformer=model.ckpt_path or "",
            autoencoder=model.ae,
            clip_l=model.clip_l,
            t5xxl=model.t5xxl,
            tokenizer_cache_dir=self.options.reading.tokenizer_cache_dir,
            disable_mmap=self.options.reading.disable_mmap_load_safetensors,
            controlnet=control.controlnet_model_name_or_path,
            controlnet_mode=control.controlnet_mode,
            transformer_option="--ckpt_path",
        )
        stored: dict[Any, Any] = {part: dtype.stored for part, dtype in self.dtypes.items()}
        pipeline = PIPELINES[model.model_type](
            files,
            dtype=self.dtypes["transformer"].compute,
            device=self.device,
            dtypes=stored,
            t5xxl_max_token_length=image.t5xxl_max_token_length,
            apply_t5_attn_mask=image.apply_t5_attn_mask,
            attention_backend=self.options.device.attn_mode,
        )
        pipeline.load_tokenizers(pipeline.encoders)
        return pipeline

    def open_loras(self) -> NetworkStack:
        """The LoRA files, checked against the models' structure."""
        from networks import lora_flux, oft_flux
        from networks.adapters.network_stack import NetworkStack, lora_or_oft

        return NetworkStack.of_pipeline(
            self.pipeline,
            [(file.path, file.multiplier) for file in self.lora_files],
            lora_or_oft(lora_flux, oft_flux),
            ("clip_l", "t5xxl"),
            [FLUX],
            self.options.lora.merge_lora_weights,
        )

    # ---- images ---------------------------------------------------------------------------------------------------

    def denoising_parts(self, prompt: PromptOptions) -> tuple[str, ...]:
        """The transformer, and what a control image goes through."""
        if prompt.controlnet_image is None:
            return ("transformer",)
        encoder = ("autoencoder",) if self.pipeline.control_takes_latents else ()
        return ("transformer", "controlnet", *encoder)

    def request(self, prompt: PromptOptions) -> FluxRequest:
        """The schedule is shifted with the image's size, but not for schnell."""
        return self.pipeline.request(
            prompt,
            shift=self.pipeline.variant != "schnell",
            control_image=self.control_image(prompt),
            control_strength=self.options.control.controlnet_strength,
            noise_dtype=self.noise_dtype,
        )

    def control_image(self, prompt: PromptOptions, place: str = "") -> Image | None:
        """The control image of a prompt. Raises UserError, beginning with ``place``, when it cannot be read."""
        if prompt.controlnet_image is None:
            return None
        from library.image_reading import read_given_image

        return read_given_image(prompt.controlnet_image, f"{place}control image")

    def recorded(self, prompt: PromptOptions) -> PromptOptions:
        """Without guidance for models that have none."""
        prompt = super().recorded(prompt)
        return prompt if self.pipeline.variant == "dev" else replace(prompt, guidance_scale=None)

    def settings(self, prompt: PromptOptions) -> Mapping[str, str]:
        """Also the kind of model, the ControlNet, and how prompts are read."""
        return {
            "model-type": self.options.model.model_type,
            **super().settings(prompt),
            **self.control_settings(prompt),
            "t5xxl-max-token-length": str(self.pipeline.text_lengths["t5xxl"]),
            "apply-t5-attn-mask": str(self.pipeline.apply_t5_attn_mask).lower(),
        }

    def control_settings(self, prompt: PromptOptions) -> Mapping[str, str]:
        """The ControlNet and its image, where one acts."""
        control = self.options.control
        if not (control.controlnet_model_name_or_path and prompt.controlnet_image):
            return {}
        return {
            "controlnet": Path(control.controlnet_model_name_or_path).name,
            "control-image": Path(prompt.controlnet_image).name,
            "control-strength": f"{control.controlnet_strength:g}",
        }


def main() -> None:
    """Read the options and generate the images."""
    options = parse_options(FluxInferenceOptions, __doc__ or "")
    set_up_console(options.console)
    FluxInference(options).run()


if __name__ == "__main__":
    run_script(main)
