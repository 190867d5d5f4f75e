"""Generate images with Lumina Image 2.0 and any number of LoRA files."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from library.console import ConsoleOptions, run_script, say, set_up_console
from library.errors import UserError
from library.families import LUMINA
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
    from library.models.attention import AttentionBackend
    from library.models.lumina.pipeline import LuminaPipeline, LuminaRequest
    from networks.adapters.network_stack import NetworkStack

SESSION = SessionGrammar(
    letters={letter: LINE_OPTIONS[letter] for letter in ("w", "h", "d", "s", "l", "n", "ctr", "rcfg", "fs")}
    | {"g": ("scale", float), "m": ("multipliers", str)},
    lasting=("width", "height", "sample_steps", "scale", "cfg_trunc_ratio", "renorm_cfg", "flow_shift"),
    end="exit",
    help="""A prompt, then any of these ("exit" ends):
  --w 1024 --h 1024  width and height in pixels
  --s 36             steps
  --g 3.5 (or --l)   classifier-free guidance; 1 is none
  --ctr 0.25         guidance acts up to this point of the way from noise (0) to image (1)
  --rcfg 1.0         limits the length of a guided step; 0 does not
  --fs 6.0           shift of the noise schedule
  --n blurry         negative prompt; - is an empty one
  --d 42             seed
  --m 0.8,0.5        strength of each LoRA file
All but seed and negative prompt stay for the lines that follow.""",
)


@dataclass
class ModelFileOptions:
    """Model files"""

    pretrained_model_name_or_path: str | None = None
    """Transformer: a file, one of its shards, an all-in-one file (Neta-Lumina), or a Diffusers folder."""
    gemma2_path: str | None = None
    """Gemma 2 text encoder file; unset means the one in the all-in-one file or Diffusers folder."""
    ae_path: str | None = None
    """Autoencoder file (FLUX.1's); unset means the one in the all-in-one file or Diffusers folder."""


@dataclass
class LuminaImageOptions(ImageOptions):
    """Image"""

    prompt: str = "A beautiful sunset over the mountains"
    negative_prompt: str = ""
    """What to keep away from; needs a --guidance_scale other than 1."""
    steps: int = 36
    image_width: int = 1024
    """Pixels, rounded up to a multiple of 16."""
    image_height: int = 1024
    """Pixels, rounded up to a multiple of 16."""
    guidance_scale: float = 3.5
    """Classifier-free guidance, which doubles the time of a step; 1 is none."""
    cfg_trunc_ratio: float = 0.25
    """Guidance acts while t, which runs from 0 (noise) to 1 (image), is below this; 1 guides every step."""
    renorm_cfg: float = 1.0
    """A guided step is at most this many times as long as an unguided one; 0 leaves its length as it is."""
    discrete_flow_shift: float = 6.0
    """Shift of the noise schedule: more steps at high noise for larger numbers; 1 is none."""


@dataclass
class LuminaTextOptions:
    """Text"""

    system_prompt: str = ""
    """Text before the prompt, as in training."""
    add_system_prompt_to_negative_prompt: bool = False
    """Put it before the negative prompt, too."""
    gemma2_max_token_length: int = 256
    """Prompt length in Gemma 2 tokens, the system prompt included."""


@dataclass
class LuminaDtypeOptions(DtypeOptions):
    """Dtypes"""

    dtype: str = "bf16"
    """Dtype of the transformer and of the noise: bf16, fp16, fp32 (float), or fp8."""
    gemma2_dtype: str = "bf16"
    """Dtype of Gemma 2."""
    ae_dtype: str = "bf16"
    """Dtype of the autoencoder, where fp8 counts as bf16."""


@dataclass
class LuminaDeviceOptions(DeviceOptions):
    """Device"""

    use_flash_attn: bool = False
    """Attention of the package flash-attn."""
    use_sage_attn: bool = False
    """Attention of the package sageattention, with 8-bit integers: faster, not exact."""


@dataclass
class LuminaFileOptions(ImageFileOptions):
    """Files"""

    output_dir: str = "outputs"


@dataclass
class LuminaInferenceOptions:
    """All options of this script."""

    model: ModelFileOptions = field(default_factory=ModelFileOptions)
    image: LuminaImageOptions = field(default_factory=LuminaImageOptions)
    text: LuminaTextOptions = field(default_factory=LuminaTextOptions)
    sources: PromptSourceOptions = field(default_factory=PromptSourceOptions)
    lora: LoraFileOptions = field(default_factory=LoraFileOptions)
    dtypes: LuminaDtypeOptions = field(default_factory=LuminaDtypeOptions)
    device: LuminaDeviceOptions = field(default_factory=LuminaDeviceOptions)
    streaming: StreamingOptions = field(default_factory=StreamingOptions)
    reading: ReadingOptions = field(default_factory=ReadingOptions)
    output: LuminaFileOptions = field(default_factory=LuminaFileOptions)
    config: ConfigOptions = field(default_factory=ConfigOptions)
    console: ConsoleOptions = field(default_factory=ConsoleOptions)


class LuminaInference(InferenceRun[PromptOptions]):
    """Lumina Image 2.0: one text encoder, truncated and renormalised guidance, flow matching in Euler steps."""

    script = "lumina_minimal_inference.py"
    family = LUMINA
    sampler = "Euler"
    session = SESSION
    dtype_options = {"transformer": "dtype", "gemma2": "gemma2_dtype", "autoencoder": "ae_dtype"}
    unused_in_prompts = ("sample_sampler", "guidance_scale", "controlnet_image")
    options: LuminaInferenceOptions
    pipeline: LuminaPipeline

    # ---- checks -----------------------------------------------------------------------------------------------------

    def check_options(self) -> None:
        """Options that are missing, and lengths that cannot be."""
        if not self.options.model.pretrained_model_name_or_path:
            raise UserError("--pretrained_model_name_or_path is missing; it names the transformer's file or a folder.")
        length = self.options.text.gemma2_max_token_length
        if length < 1:
            raise UserError(f"--gemma2_max_token_length must be at least 1, not {length}.")

    def default_prompt(self) -> PromptOptions:
        """The command line as a prompt."""
        image = self.options.image
        return PromptOptions(
            prompt=image.prompt,
            negative_prompt=image.negative_prompt,
            width=image.image_width,
            height=image.image_height,
            seed=image.seed,
            sample_steps=image.steps,
            scale=image.guidance_scale,
            cfg_trunc_ratio=image.cfg_trunc_ratio,
            renorm_cfg=image.renorm_cfg,
            flow_shift=image.discrete_flow_shift,
        )

    def say_what_has_no_effect(self) -> None:
        """What every script says, and what has nothing to act on here."""
        super().say_what_has_no_effect()
        text, device = self.options.text, self.options.device
        if text.add_system_prompt_to_negative_prompt and not text.system_prompt:
            say("--add_system_prompt_to_negative_prompt has no effect without --system_prompt")
        if device.use_flash_attn and device.use_sage_attn:
            say("--use_flash_attn has no effect with --use_sage_attn")

    # ---- models -----------------------------------------------------------------------------------------------------

    @property
    def attention_backend(self) -> AttentionBackend:
        """The backend that the options name."""
        if self.options.device.use_sage_attn:
            return "sage"
        return "flash" if self.options.device.use_flash_attn else "sdpa"

    def open_pipeline(self) -> LuminaPipeline:
        """Open the model files by their headers and find the tokenizer."""
        from library.models.lumina.pipeline import LuminaFiles, LuminaPipeline

        model, text, reading = self.options.model, self.options.text, self.options.reading
        files = LuminaFiles(
            transformer=model.pretrained_model_name_or_path or "",
            gemma2=model.gemma2_path,
            autoencoder=model.ae_path,
            tokenizer_cache_dir=reading.tokenizer_cache_dir,
            disable_mmap=reading.disable_mmap_load_safetensors,
            gemma2_option="--gemma2_path",
            autoencoder_option="--ae_path",
        )
        stored: dict[Any, Any] = {part: dtype.stored for part, dtype in self.dtypes.items()}
        pipeline = LuminaPipeline(
            files,
            dtype=self.dtypes["transformer"].compute,
            device=self.device,
            dtypes=stored,
            gemma2_max_token_length=text.gemma2_max_token_length,
            system_prompt=text.system_prompt,
            system_prompt_in_negative=text.add_system_prompt_to_negative_prompt,
            attention_backend=self.attention_backend,
        )
        pipeline.load_tokenizers()
        return pipeline

    def open_loras(self) -> NetworkStack:
        """The LoRA files, checked against the models' structure."""
        from networks import lora_lumina, oft_lumina
        from networks.adapters.network_stack import NetworkStack, lora_or_oft

        return NetworkStack.of_pipeline(
            self.pipeline,
            [(file.path, file.multiplier) for file in self.lora_files],
            lora_or_oft(lora_lumina, oft_lumina),
            ("gemma2",),
            [LUMINA],
            self.options.lora.merge_lora_weights,
        )

    # ---- images ---------------------------------------------------------------------------------------------------

    def request(self, prompt: PromptOptions) -> LuminaRequest:
        """Noise is drawn in --dtype."""
        return self.pipeline.request(prompt, noise_dtype=self.noise_dtype)

    def file_name(self, prompt: PromptOptions) -> str:
        """``image_YYYYmmddHHMMSS_seed``, as kohya-ss/sd-scripts names them."""
        return f"image_{time.strftime('%Y%m%d%H%M%S')}_{prompt.seed}"

    def recorded(self, prompt: PromptOptions) -> PromptOptions:
        """Where no step is guided, the scale is 1."""
        recorded = super().recorded(prompt)
        return replace(recorded, scale=1.0) if self.negative(prompt) is None else recorded

    def settings(self, prompt: PromptOptions) -> Mapping[str, str]:
        """Also the schedule, what acts of guidance, and how prompts are read."""
        settings = {**super().settings(prompt), "discrete-flow-shift": str(prompt.flow_shift)}
        text, guided = self.options.text, self.negative(prompt) is not None
        if guided:
            settings |= {"cfg-trunc-ratio": str(prompt.cfg_trunc_ratio), "renorm-cfg": str(prompt.renorm_cfg)}
        if text.system_prompt:
            settings["system-prompt"] = text.system_prompt
        if text.system_prompt and guided:
            settings["add-system-prompt-to-negative-prompt"] = str(text.add_system_prompt_to_negative_prompt).lower()
        return {**settings, "gemma2-max-token-length": str(text.gemma2_max_token_length)}


def main() -> None:
    """Read the options and generate the images."""
    options = parse_options(LuminaInferenceOptions, __doc__ or "")
    set_up_console(options.console)
    LuminaInference(options).run()


if __name__ == "__main__":
    run_script(main)
