"""Generate images with HunyuanImage-2.1 and any number of LoRA files."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from library.console import ConsoleOptions, run_script, say, set_up_console
from library.errors import UserError
from library.families import HUNYUAN_IMAGE
from library.generation.inference_run import InferenceRun
from library.generation.latent_files import LatentFile, read_latents, save_latents
from library.generation.lora_files import LoraFile, check_pattern, one_each
from library.generation.part_dtypes import DtypeOptions, PartDtype
from library.generation.parts import DeviceOptions, ReadingOptions
from library.generation.prompts import ImageOptions, PromptSourceOptions
from library.generation.session import SessionGrammar
from library.memory.streaming_options import StreamingOptions
from library.options import ConfigOptions, parse_options
from library.prompt_options import LINE_OPTIONS, PromptOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.models.attention import AttentionBackend
    from library.models.hunyuan_image.pipeline import HunyuanImagePipeline, HunyuanImageRequest, Part

BACKENDS: Mapping[str, AttentionBackend] = {
    **{"torch": "sdpa", "sdpa": "sdpa"},
    **{"flash": "flash", "xformers": "xformers", "sageattn": "sage"},
}
"""The attention of ``--attn_mode``."""
SESSION = SessionGrammar(
    letters={letter: LINE_OPTIONS[letter] for letter in ("w", "h", "d", "s", "l", "n", "fs")}
    | {"g": ("scale", float), "m": ("multipliers", str)},
    lasting=(),
    end="exit",
    help="""A prompt, then any of these ("exit" ends):
  --w 2048 --h 2048  width and height in pixels
  --s 50             steps
  --g 3.5 (or --l)   classifier-free guidance; 1 is none
  --fs 5.0           shift of the noise schedule
  --n blurry         negative prompt; - is an empty one
  --d 42             seed
  --m 0.8,0.5        strength of each LoRA file, for all lines that follow
What a line leaves open is taken from the command line.""",
)


@dataclass
class ModelFileOptions:
    """Model files"""

    dit: str | None = None
    """Transformer: a file, one of its shards, or a Diffusers folder."""
    vae: str | None = None
    """Autoencoder file; unset means the one in the Diffusers folder."""
    text_encoder: str | None = None
    """Qwen2.5-VL text encoder file; unset means the one in the Diffusers folder."""
    byt5: str | None = None
    """ByT5 text encoder file, which reads the texts that prompts quote; unset means the one in the Diffusers folder."""


@dataclass
class HunyuanImageImageOptions(ImageOptions):
    """Image"""

    negative_prompt: str = ""
    """What to keep away from; needs a --guidance_scale other than 1."""
    infer_steps: int = 50
    """Denoising steps."""
    image_size: list[int] = field(default_factory=lambda: [2048, 2048])
    """Height and width in pixels, multiples of 32."""
    guidance_scale: float = 3.5
    """Classifier-free guidance of the first steps (see --apg_start_step_general); 1 turns all guidance off."""
    apg_start_step_general: int = 5
    """The last step, from 0, with --guidance_scale; those after it have adaptive projected guidance."""
    apg_start_step_ocr: int = 38
    """The same for prompts that quote a text."""
    guidance_rescale: float = 0.0
    """How far guided steps keep the contrast of unguided ones: 0 not at all, 1 wholly; 0.5 is usual."""
    guidance_rescale_apg: float = 0.0
    """The same for steps with adaptive projected guidance."""
    flow_shift: float = 5.0
    """Shift of the noise schedule: more steps at high noise for larger numbers; 1 is none."""


@dataclass
class HunyuanImageLoraOptions:
    """LoRA"""

    lora_weight: list[str] = field(default_factory=list)
    """LoRA or OFT files; they act together."""
    lora_multiplier: list[float] = field(default_factory=list)
    """Strength of each file; 1.0 where missing."""
    include_patterns: list[str] = field(default_factory=list)
    """For each file a regular expression: only modules act whose name holds it."""
    exclude_patterns: list[str] = field(default_factory=list)
    """For each file a regular expression: modules whose name holds it do not act."""
    merge_lora_weights: bool = False
    """Merge them into the model's weights: as fast as the model alone, but multipliers stay as they are."""
    lycoris: bool = False
    """Read the files with the package lycoris-lora, and merge them: for LoHa, LoKr and other kinds."""
    save_merged_model: str | None = None
    """Write the transformer with the files merged into it to this .safetensors file, and generate no image."""


@dataclass
class HunyuanImageDtypeOptions(DtypeOptions):
    """Dtypes"""

    dtype: str = "bf16"
    """Dtype of the transformer and the text encoders: bf16, fp16, fp32, or fp8."""
    vae_dtype: str | None = None
    """Dtype of the autoencoder, where fp8 counts as bf16; unset means --dtype."""
    fp8: bool = False
    """Keep the transformer in 8-bit floats with a scale for each weight; --fp8_scaled is more exact."""
    fp8_vl: bool = False
    """Keep Qwen2.5-VL in 8-bit floats with a scale for each weight."""


@dataclass
class HunyuanImageDeviceOptions(DeviceOptions):
    """Device"""

    text_encoder_cpu: bool = False
    """Encode prompts on the CPU."""
    vae_chunk_size: int | None = None
    """Rows that a convolution of the autoencoder works on at a time, for less memory; 16 is usual, unset means all."""
    attn_mode: Literal["torch", "sdpa", "flash", "sageattn", "xformers"] = "torch"
    """Attention: PyTorch's own (torch, sdpa), or a package's; sageattn computes in 8-bit integers and is not exact."""


@dataclass
class HunyuanImageFileOptions:
    """Files"""

    save_path: str | None = None
    """Folder for the images, or the name of an image, which ends in .png."""
    output_type: Literal["images", "latent", "latent_images"] = "images"
    """What is written: images, latents to be decoded later, or both."""
    latent_path: list[str] = field(default_factory=list)
    """Files of latents; they are decoded, and no image is generated."""
    no_metadata: bool = False
    """Write no text into images and files of latents."""


@dataclass
class HunyuanImageInferenceOptions:
    """All options of this script."""

    model: ModelFileOptions = field(default_factory=ModelFileOptions)
    image: HunyuanImageImageOptions = field(default_factory=HunyuanImageImageOptions)
    sources: PromptSourceOptions = field(default_factory=PromptSourceOptions)
    lora: HunyuanImageLoraOptions = field(default_factory=HunyuanImageLoraOptions)
    dtypes: HunyuanImageDtypeOptions = field(default_factory=HunyuanImageDtypeOptions)
    device: HunyuanImageDeviceOptions = field(default_factory=HunyuanImageDeviceOptions)
    streaming: StreamingOptions = field(default_factory=StreamingOptions)
    reading: ReadingOptions = field(default_factory=ReadingOptions)
    output: HunyuanImageFileOptions = field(default_factory=HunyuanImageFileOptions)
    config: ConfigOptions = field(default_factory=ConfigOptions)
    console: ConsoleOptions = field(default_factory=ConsoleOptions)


class HunyuanImageInference(InferenceRun[PromptOptions]):
    """HunyuanImage-2.1: two text encoders, guidance that is projected later, flow matching in Euler steps."""

    script = "hunyuan_image_minimal_inference.py"
    family = HUNYUAN_IMAGE
    sampler = "Euler"
    session = SESSION
    dtype_options = {"transformer": "dtype", "text_encoder": "dtype", "byt5": "dtype", "autoencoder": "vae_dtype"}
    unused_in_prompts = ("sample_sampler", "controlnet_image", "cfg_trunc_ratio", "renorm_cfg")
    output_option = "--save_path"
    lora_option = "--lora_weight"
    options: HunyuanImageInferenceOptions
    pipeline: HunyuanImagePipeline

    # ---- checks -----------------------------------------------------------------------------------------------------

    @property
    def decodes(self) -> bool:
        """Whether files of latents are decoded, which needs nothing but the autoencoder."""
        return bool(self.options.output.latent_path)

    @property
    def merges(self) -> bool:
        """Whether LoRA files are merged into a file of the transformer, which needs nothing else."""
        return self.options.lora.save_merged_model is not None

    def check_options(self) -> None:
        """Options that are missing or mutually exclusive, and invalid values."""
        options, image = self.options, self.options.image
        if not options.model.dit and not self.decodes:
            raise UserError("--dit is missing; it names the transformer's file or a folder.")
        if len(image.image_size) != 2:
            raise UserError(f"--image_size takes height and width; {len(image.image_size)} numbers given.")
        if self.decodes and (self.merges or options.sources.from_file or options.sources.interactive):
            raise UserError("--latent_path only decodes: leave out --from_file, --interactive and --save_merged_model.")
        if self.merges:
            self.check_merge()
        else:
            if not options.output.save_path:
                raise UserError("--save_path is missing; it names a folder for the images, or an image.")
            given = (image.prompt is not None, options.sources.from_file is not None, options.sources.interactive)
            if not any(given) and not self.decodes:
                raise UserError("nothing to generate: give --prompt, --from_file or --interactive (or --latent_path).")
        rows = options.device.vae_chunk_size
        if rows is not None and rows < 1:
            raise UserError(f"--vae_chunk_size must be at least 1, not {rows}.")
        for name in ("guidance_rescale", "guidance_rescale_apg"):
            if not 0 <= getattr(image, name) <= 1:
                raise UserError(f"--{name} must be between 0 and 1, not {getattr(image, name):g}.")
        if options.device.text_encoder_cpu and options.streaming.stream_text_encoders:
            raise UserError("--text_encoder_cpu and --stream_text_encoders are mutually exclusive.")

    def check_merge(self) -> None:
        """Raises UserError where ``--save_merged_model`` has nothing to merge or nowhere to write."""
        from networks.lora_tools.options import check_output

        if not self.lora_files:
            raise UserError("--save_merged_model needs --lora_weight.")
        model = Path(str(self.options.model.dit))
        inputs = [str(path) for path in (model, *(file.path for file in self.lora_files))]
        check_output(str(self.options.lora.save_merged_model), inputs, (".safetensors",), "--save_merged_model")

    def read_lora_files(self) -> list[LoraFile]:
        """Each with its multiplier and its patterns."""
        lora = self.options.lora
        names = lora.lora_weight
        for option in ("include_patterns", "exclude_patterns"):
            for pattern in getattr(lora, option):
                check_pattern(pattern, f"--{option}")
        for name in names:
            if not Path(name).is_file():
                raise UserError(f"--lora_weight: there is no file {name}.")
        for multiplier in lora.lora_multiplier:
            if not math.isfinite(multiplier):
                raise UserError(f"--lora_multiplier: {multiplier} is not a finite number.")
        multipliers = one_each(names, lora.lora_multiplier, 1.0)
        patterns = [one_each(names, given, "") for given in (lora.include_patterns, lora.exclude_patterns)]
        return [LoraFile(Path(name), *values) for name, *values in zip(names, multipliers, *patterns)]

    def default_prompt(self) -> PromptOptions:
        """The command line as a prompt."""
        image = self.options.image
        height, width = image.image_size
        return PromptOptions(
            prompt=image.prompt or "",
            negative_prompt=image.negative_prompt,
            width=width,
            height=height,
            seed=image.seed,
            sample_steps=image.infer_steps,
            scale=image.guidance_scale,
            flow_shift=image.flow_shift,
        )

    def as_meant(self, prompt: PromptOptions) -> PromptOptions:
        """``--g`` is classifier-free guidance, too."""
        if prompt.guidance_scale is None:
            return prompt
        return replace(prompt, scale=prompt.guidance_scale, guidance_scale=None)

    def check_prompt(self, prompt: PromptOptions, place: str = "") -> None:
        """As for every family, but sizes are not rounded. Raises UserError for others than multiples of 32."""
        request = self.pipeline.request(prompt)
        if (request.height, request.width) != self.pipeline.image_size(request):
            step = self.pipeline.latent_stride
            raise UserError(
                f"{place}height and width (--image_size) must be multiples of {step}, not {prompt.height} and "
                f"{prompt.width}."
            )
        super().check_prompt(prompt, place)

    def say_what_has_no_effect(self) -> None:
        """What every script says, and what has nothing to act on here."""
        super().say_what_has_no_effect()
        options, lora = self.options, self.options.lora
        if options.dtypes.fp8 and options.dtypes.fp8_scaled:
            say("--fp8 has no effect with --fp8_scaled")
        for name in ("lora_multiplier", "include_patterns", "exclude_patterns"):
            count = len(lora.lora_weight)
            if len(getattr(lora, name)) > count:
                say(f"--{name}: only the first {count} have an effect, one for each file")
        if lora.lycoris and not lora.lora_weight:
            say("--lycoris has no effect without --lora_weight")
        if self.decodes and options.image.prompt is not None:
            say("--prompt has no effect with --latent_path")

    # ---- models -----------------------------------------------------------------------------------------------------

    @property
    def output_folder(self) -> Path:
        """The folder that ``--save_path`` names, or the one of the image that it names."""
        output, merged = self.options.output, self.options.lora.save_merged_model
        if merged is not None:
            return Path(merged).parent
        path = Path(output.save_path or "")
        return path.parent if self.image_name is not None else path

    @property
    def image_name(self) -> str | None:
        """The name of an image, without its ending, that ``--save_path`` gives; None for a folder."""
        path = Path(self.options.output.save_path or "")
        return path.stem if path.suffix.lower() == ".png" and not path.is_dir() else None

    @property
    def wanted_parts(self) -> tuple[Part, ...]:
        """The parts that this run works with."""
        if self.decodes:
            return ("autoencoder",)
        if self.merges:
            return ("transformer",)
        drawing: tuple[Part, ...] = ("transformer", "text_encoder", "byt5")
        fits = self.options.device.vram_budget is not None or self.options.streaming.blocks_to_swap == "auto"
        return drawing if self.options.output.output_type == "latent" and not fits else (*drawing, "autoencoder")

    def part_dtypes(self) -> tuple[dict[str, PartDtype], torch.dtype]:
        """Also ``--fp8`` and ``--fp8_vl``; where files are merged, the transformer is as its file has it."""
        from library.memory.storage import BlocksStoredAs

        dtypes, noise = super().part_dtypes()
        options = self.options.dtypes
        for part, wanted in (("transformer", options.fp8 and not options.fp8_scaled), ("text_encoder", options.fp8_vl)):
            if wanted:
                compute = dtypes[part].compute
                dtypes[part] = PartDtype(BlocksStoredAs(compute), compute)
        return dtypes, noise

    def open_pipeline(self) -> HunyuanImagePipeline:
        """Open the model files by their headers and find the tokenizer."""
        from library.models.hunyuan_image.pipeline import HunyuanImageFiles, HunyuanImagePipeline

        model, device, reading = self.options.model, self.options.device, self.options.reading
        files = HunyuanImageFiles(
            transformer=model.dit or "",
            text_encoder=model.text_encoder,
            byt5=model.byt5,
            autoencoder=model.vae,
            tokenizer_cache_dir=reading.tokenizer_cache_dir,
            disable_mmap=reading.disable_mmap_load_safetensors,
            transformer_option="--dit",
        )
        parts = self.wanted_parts
        stored: dict[Any, Any] = {part: None if self.merges else dtype.stored for part, dtype in self.dtypes.items()}
        pipeline = HunyuanImagePipeline(
            files,
            dtype=self.dtypes["transformer"].compute,
            device="cpu" if self.merges else self.device,
            dtypes=stored,
            parts=parts,
            text_encoders_on_host=device.text_encoder_cpu,
            vae_chunk_size=device.vae_chunk_size,
            attention_backend=BACKENDS[device.attn_mode],
        )
        if "text_encoder" in parts:
            pipeline.load_tokenizers()
        return pipeline

    def open_loras(self) -> Any:
        """The LoRA files, checked against the models' structure; of LyCORIS's, whether they can be read."""
        from networks import lora_hunyuan_image, oft_hunyuan_image
        from networks.adapters.network_stack import NetworkStack, lora_or_oft

        lora = self.options.lora
        used = [] if self.decodes else self.lora_files
        files = [(file.path, file.multiplier) for file in used]
        keep = [file.keeps if file.include or file.exclude else None for file in used]
        if lora.lycoris or self.decodes:
            from library.training.network.lycoris_files import LycorisStack

            return LycorisStack(files, "transformer", keep)
        return NetworkStack.of_pipeline(
            self.pipeline,
            files,
            lora_or_oft(lora_hunyuan_image, oft_hunyuan_image),
            (),
            [HUNYUAN_IMAGE],
            lora.merge_lora_weights or self.merges,
            keep,
        )

    def fit_memory(self) -> Iterator[str]:
        """As for every family, where anything is drawn."""
        if not self.decodes and not self.merges:
            yield from super().fit_memory()

    # ---- the course -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Draw, decode or merge.

        The text encoders are gone before the transformer comes, and the transformer before the autoencoder: each has
        the device's memory to itself.
        """
        if self.merges:
            self.write_merged_model()
        elif self.decodes:
            for path in map(Path, self.options.output.latent_path):
                self.decode_file(path, self.read(path))
        elif self.options.sources.interactive:
            super().run()
        else:
            prompts = self.prompts()
            self.encode(prompts)
            drawn = [self.drawn(prompt) for prompt in prompts]
            self.stack.leave("transformer")
            self.pipeline.release("transformer")
            for prompt, latents, name in drawn:
                self.write_image(prompt, latents, name)

    def draw(self, prompt: PromptOptions) -> None:
        """Draw an encoded prompt of a session."""
        self.write_image(*self.drawn(prompt))

    def drawn(self, prompt: PromptOptions) -> tuple[PromptOptions, Tensor, str]:
        """An encoded prompt with its latents, on the CPU, and the name of its files; latents are written if wanted."""
        with self.explaining_memory([prompt]):
            latents = self.latents(prompt).cpu()
        name, output = self.file_name(prompt), self.options.output
        if output.output_type != "images":
            own = None if output.no_metadata else prompt
            path = save_latents(latents, self.output_folder, f"{name}_latent", own, self.text_of(prompt))
            say(f"saved {path}")
        return prompt, latents, name

    def write_image(self, prompt: PromptOptions, latents: Tensor, name: str) -> None:
        """Decode latents into an image's file, if images are wanted."""
        if self.options.output.output_type == "latent":
            return
        with self.explaining_memory([prompt]):
            image = self.image_of(latents.to(self.pipeline.device))
        self.save(image, self.name_of_image(name), self.text_of(prompt), prompt.seed)

    def read(self, path: Path) -> LatentFile:
        """A file of latents. Raises UserError."""
        channels = self.pipeline.opened("autoencoder").config.latent_channels
        rows, columns = (side // self.pipeline.latent_stride for side in self.options.image.image_size)
        return read_latents(path, channels, rows, columns)

    def decode_file(self, path: Path, file: LatentFile) -> None:
        """Decode a file of latents into an image's file, with the text that the file has."""
        with self.explaining_memory([self.defaults]):
            image = self.image_of(file.latents.to(self.pipeline.device))
        seed = file.text.get("seed", "0")
        name = self.image_name or f"{time_flag()}_{seed}__{path.stem}"
        self.save(image, name, {} if self.options.output.no_metadata else file.text, seed)

    def write_merged_model(self) -> None:
        """Write the transformer with the files merged into it, tensor by tensor; with ``--lycoris`` it is loaded."""
        from library.models.loading import require_fit
        from library.modelspec import IMPLEMENTATION_VERSION, standard_entries
        from library.safetensors_io import save_file, save_one_by_one

        path = Path(str(self.options.lora.save_merged_model))
        entries = {
            "modelspec.sai_model_spec": "1.0.1",
            **standard_entries("hunyuan-image-2.1"),
            "modelspec.title": path.stem,
            "modelspec.implementation_version": IMPLEMENTATION_VERSION,
            "modelspec.merged_from": ", ".join(file.path.stem for file in self.lora_files),
        }
        metadata = {} if self.options.output.no_metadata else entries
        if self.options.lora.lycoris:
            module = self.pipeline.load("transformer")
            self.stack.enter("transformer", module, self.pipeline.device)
            save_file(module.state_dict(), path, metadata)
        else:
            source = self.pipeline.opened("transformer").source
            tensors = require_fit(self.pipeline.meta_module("transformer"), source)
            described = {name: tensor.to(source.stored_dtype(name)) for name, tensor in tensors.items()}
            save_one_by_one(described, self.merged_tensor, path, metadata)
        say(f"saved {path}")

    def merged_tensor(self, name: str) -> Tensor:
        """A tensor of the transformer's file with the effect of the LoRA files."""
        tensor = self.pipeline.opened("transformer").source.load(name, None, "cpu")
        return self.stack.merged_weight("transformer", name.removesuffix(".weight"), tensor)

    # ---- images -----------------------------------------------------------------------------------------------------

    def request(self, prompt: PromptOptions) -> HunyuanImageRequest:
        """With the start of projected guidance, which prompts leave open."""
        image = self.options.image
        names = ("apg_start_step_ocr", "apg_start_step_general", "guidance_rescale", "guidance_rescale_apg")
        return self.pipeline.request(prompt, **{name: getattr(image, name) for name in names})

    def file_name(self, prompt: PromptOptions) -> str:
        """What the names of a prompt's files begin with: that of ``--save_path``, else time and seed."""
        return self.image_name or f"{time_flag()}_{prompt.seed}"

    def name_of_image(self, name: str) -> str:
        """``name`` as kohya-ss/sd-scripts ends it, unless ``--save_path`` gives it."""
        return name if self.image_name is not None else f"{name}_"

    def recorded(self, prompt: PromptOptions) -> PromptOptions:
        """Where no step is guided, the scale is 1."""
        recorded = super().recorded(prompt)
        return replace(recorded, scale=1.0) if self.negative(prompt) is None else recorded

    def settings(self, prompt: PromptOptions) -> Mapping[str, str]:
        """Also the schedule, how steps are guided, and which weights are in 8 bits."""
        image, dtypes = self.options.image, self.options.dtypes
        settings = {**super().settings(prompt), "flow-shift": str(prompt.flow_shift)}
        if self.negative(prompt) is not None:
            names = ("apg_start_step_general", "apg_start_step_ocr", "guidance_rescale", "guidance_rescale_apg")
            settings |= {name.replace("_", "-"): str(getattr(image, name)) for name in names}
        in_8_bits = {"fp8": dtypes.fp8 and not dtypes.fp8_scaled, "fp8-vl": dtypes.fp8_vl}
        return {**settings, **{name: "true" for name, is_so in in_8_bits.items() if is_so}}


def time_flag() -> str:
    """The time as kohya-ss/sd-scripts begins a file's name with it."""
    now = time.time()
    return f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}-{int(now * 1000) % 1000:03d}"


def main() -> None:
    """Read the options and generate the images."""
    options = parse_options(HunyuanImageInferenceOptions, __doc__ or "")
    set_up_console(options.console)
    HunyuanImageInference(options).run()


if __name__ == "__main__":
    run_script(main)
