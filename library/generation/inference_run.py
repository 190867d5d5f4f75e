"""Prompts to image files: the course of an inference script, the same for every model family.

A family's script adds its options, its pipeline, and how a prompt becomes the pipeline's request.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from library.console import say, warn
from library.errors import UserError
from library.families import Family
from library.files import require_writable_folder
from library.generation.image_files import ImageRecord, UsedLora, lora_hash, save_image
from library.generation.lora_files import (
    LoraFile,
    check_not_merged,
    parse_lora_files,
    parse_multipliers,
    trigger_word,
)
from library.generation.part_dtypes import PartDtype, resolve_part_dtypes
from library.generation.parts import Parts, computing_in
from library.generation.prompts import check_sources, read_prompts, with_seed
from library.generation.session import Session, SessionGrammar
from library.memory.budget import check_budget
from library.memory.streaming_options import check_streaming_options
from library.models.streamed_parts import stream_blocks
from library.prompt_options import TRIGGER, Prompt, check_prompt_values, names_trigger, with_trigger
from library.safetensors_io import legacy_hash
from library.torch_build import missing_cuda

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from library.models.pipeline import ImageRequest, Pipeline, Text

TextKey = tuple["Text", tuple[float, ...]]
CPU_IS_FULL = "DefaultCPUAllocator: "
TEXTS_KEPT = 64  # in a session; the outputs of one text take some megabytes


class InferenceRun(ABC, Generic[Prompt]):
    """Opens everything by headers at once; parts are loaded when their work comes.

    Raises UserError, before anything heavy is loaded, for options and files that cannot be used.
    """

    script: ClassVar[str]
    """The entry script's file name."""
    family: Family
    """Whose images it draws."""
    sampler: ClassVar[str]
    """The sampler's name in the images' text."""
    session: ClassVar[SessionGrammar]
    """What a line of ``--interactive`` may say."""
    denoiser: ClassVar[str] = "transformer"
    """The part that works on noise."""
    dtype_options: ClassVar[Mapping[str, str]]
    """The option that names a part's dtype, by part."""
    never_8_bits: ClassVar[Collection[str]] = ("autoencoder",)
    """Parts for which fp8 counts as bfloat16."""
    unused_in_prompts: ClassVar[Collection[str]] = ()
    """Fields of prompts that are there for other families."""
    output_option: ClassVar[str] = "--output_dir"
    """The option that says where images go (see ``output_folder``)."""
    lora_option: ClassVar[str] = "--lora_weights"
    """The option that names LoRA files (see ``read_lora_files``)."""
    options: Any
    """Has the groups ``image`` (ImageOptions), ``sources`` (PromptSourceOptions), ``lora`` (LoraFileOptions),
    ``output`` (ImageFileOptions), ``dtypes`` (DtypeOptions with those of ``dtype_options``), ``device`` (DeviceOptions)
    and ``streaming`` (StreamingOptions)."""

    def __init__(self, options: Any):
        self.options = options
        if options.device.device is None and (message := missing_cuda()):
            warn(message)
        self.check_sources()
        self.lora_files: list[LoraFile] = self.read_lora_files()
        self.check_options()
        require_writable_folder(self.output_folder, self.output_option)
        self.dtypes, self.noise_dtype = self.part_dtypes()
        self.pipeline = self.open_pipeline()
        self.pipeline.require_storable()
        check_streaming_options(options.streaming)
        check_budget(options.device.vram_budget)
        self.defaults = self.default_prompt()
        check_prompt_values(self.defaults)
        self.stack = self.open_loras()
        self.file_prompts = self.read_prompts()
        for line in self.fit_memory():
            say(line)
        self.parts = Parts(self.pipeline, options.device.offload, self.stack.enter, self.stack.move)
        self.texts: dict[TextKey, dict[str, Tensor]] = {}
        """Text outputs, on the CPU, by ``text_key``."""
        self.hashes: dict[Path, str] = {}
        self.say_what_has_no_effect()

    # ---- what a family gives ----------------------------------------------------------------------------------------

    def check_sources(self) -> None:
        """Raises UserError when prompts are to come from two places."""
        check_sources(self.options.sources)

    def check_options(self) -> None:
        """What can be known from the options alone. Raises UserError."""

    def read_prompts(self) -> Sequence[Prompt]:
        """The prompts that are known ahead, checked. Raises UserError."""
        sources = self.options.sources
        given: Any = read_prompts(sources, self.defaults)
        prompts = [self.with_trigger(self.as_meant(prompt)) for prompt in given]
        for number, prompt in enumerate(prompts, 1):
            self.check_prompt(prompt, "" if sources.from_file is None else f"{sources.from_file}, prompt {number}: ")
        return prompts

    def with_trigger(self, prompt: Prompt) -> Prompt:
        """``prompt`` with the LoRA files' trigger word in the place of ``[trigger]``.

        Logs a warning when no file says one.
        """
        if not names_trigger(prompt):
            return prompt
        word = trigger_word(self.lora_files)
        if word is None:
            warn(f"no {self.lora_option} file names a trigger word in its metadata: {TRIGGER} stays as it is written.")
        return with_trigger(prompt, word)

    def read_lora_files(self) -> list[LoraFile]:
        """The LoRA files that the options name. Raises UserError for one that is missing."""
        return parse_lora_files(self.options.lora)

    @property
    def output_folder(self) -> Path:
        """Where images are written."""
        return Path(self.options.output.output_dir)

    def part_dtypes(self) -> tuple[dict[str, PartDtype], torch.dtype]:
        """The dtypes of each part, and the one that noise is drawn in. Raises UserError for an unknown name."""
        return resolve_part_dtypes(self.options.dtypes, self.dtype_options, self.denoiser, self.never_8_bits)

    def as_meant(self, prompt: Prompt) -> Prompt:
        """A prompt of ``--from_file`` as this family means its fields."""
        return prompt

    @abstractmethod
    def open_pipeline(self) -> Pipeline[Any]:
        """The family's pipeline, opened by headers, with its tokenizers."""

    @abstractmethod
    def open_loras(self) -> Any:
        """The ``networks.adapters.network_stack.NetworkStack`` of ``lora_files``."""

    @abstractmethod
    def default_prompt(self) -> Prompt:
        """The command line as a prompt, with every value decided but the seed and the negative prompt."""

    def denoising_parts(self, prompt: Prompt) -> tuple[str, ...]:
        """The parts that work on noise."""
        return (self.pipeline.denoiser,)

    def request(self, prompt: Prompt) -> ImageRequest:
        """The pipeline's request for a prompt."""
        return self.pipeline.request(prompt)

    def recorded(self, prompt: Prompt) -> Prompt:
        """``prompt`` as the image's text names it: without what did not act."""
        return replace(prompt, negative_prompt=self.negative(prompt))

    def settings(self, prompt: Prompt) -> Mapping[str, str]:
        """What else an image depends on, for its text: the dtypes, and what a family adds."""
        dtypes = self.options.dtypes
        names = {option: getattr(dtypes, option) for option in ("dtype", *self.dtype_options.values())}
        scaled = {"fp8-scaled": "true"} if dtypes.fp8_scaled else {}
        return {option.replace("_", "-"): name for option, name in names.items() if name} | scaled

    def file_name(self, prompt: Prompt) -> str:
        """The name of an image's file, without its ending; one that is there already gets a number."""
        return time.strftime("%Y%m%d_%H%M%S")

    def check_prompt(self, prompt: Prompt, place: str = "") -> None:
        """Say to which size the image is rounded.

        Raises UserError, beginning with ``place``, for a prompt that cannot be generated.
        """
        check_prompt_values(prompt, place)
        height, width = self.pipeline.image_size(self.pipeline.request(prompt))
        if (width, height) != (prompt.width, prompt.height):
            say(f"{place}{prompt.width}x{prompt.height} is rounded to {width}x{height}")

    def say_what_has_no_effect(self) -> None:
        """One line for each reason why given options change nothing."""
        options = self.options
        if options.lora.merge_lora_weights and not self.lora_files:
            say(f"--merge_lora_weights has no effect without {self.lora_option}")
        if options.sources.from_file is not None and options.image.prompt != type(options.image).prompt:
            say("--prompt has no effect with --from_file")
        if options.sources.interactive:
            return
        unused = [n for n in self.unused_in_prompts if any(getattr(p, n) is not None for p in self.file_prompts)]
        if unused:
            say(f"no effect in prompts for {self.family.name}: {', '.join(unused)}")
        negatives = [(prompt.negative_prompt, self.negative(prompt)) for prompt in self.file_prompts]
        if any(given and acts is None for given, acts in negatives):
            say("a negative prompt has no effect without classifier-free guidance")
        if any(given is None and acts is not None for given, acts in negatives):
            say("classifier-free guidance without a negative prompt leads away from the empty prompt")

    def fit_memory(self) -> Iterator[str]:
        """Choose what is offloaded and streamed, as the options say; yields lines that say what. Raises UserError."""
        options = self.options
        if options.device.vram_budget is not None or options.streaming.blocks_to_swap == "auto":
            from library.generation.fitting import fit

            yield fit(self)
        yield from stream_blocks(self.pipeline, options.streaming)

    # ---- the course -------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where parts work. Raises UserError for one that this machine does not have."""
        device: torch.device = self.options.device.torch_device()
        return device

    @property
    def keeps_encoders(self) -> bool:
        """Whether text encoders stay loaded while images are generated, for the prompts that follow."""
        return bool(self.options.sources.interactive)

    @property
    def images_together(self) -> int:
        """The largest number of images that are generated together."""
        return 1

    @property
    def feature_bytes(self) -> int:
        """The weights of models beside the pipeline's parts that take part in the denoising."""
        return 0

    def negative(self, prompt: Prompt) -> str | None:
        """The negative prompt that acts: with classifier-free guidance there is one, if only the empty one."""
        guidance = self.pipeline.guidance(self.pipeline.request(prompt))
        return prompt.negative_prompt or "" if "negative" in guidance.roles else None

    def texts_of(self, prompt: Prompt) -> list[Text]:
        """The texts of a prompt that act, each with its role."""
        positive: Text = (prompt.prompt, "positive")
        negative = self.negative(prompt)
        return [positive] if negative is None else [positive, (negative, "negative")]

    def prompts(self) -> list[Prompt]:
        """What to draw, each prompt with a seed."""
        return [with_seed(prompt) for prompt in self.file_prompts]

    def run(self) -> None:
        """Draw everything that is requested."""
        if self.options.sources.interactive:
            Session(self.session, self.defaults).run(self.draw_line)
            return
        prompts = self.prompts()
        self.encode(prompts)
        for prompt in prompts:
            self.draw(prompt)

    def draw_line(self, prompt: Any, multipliers: str | None) -> None:
        """Draw one prompt of a session. Raises UserError for values that cannot be."""
        prompt = self.with_trigger(prompt)
        self.check_prompt(prompt)
        if multipliers is not None:
            check_not_merged(self.options.lora, "--m")
            self.stack.set_multipliers(parse_multipliers(multipliers, len(self.lora_files), "--m"))
        prompt = with_seed(prompt)
        self.encode([prompt], keep_encoders=True)
        self.draw(prompt)

    @contextlib.contextmanager
    def explaining_memory(self, prompts: Sequence[Prompt]) -> Iterator[None]:
        """A full device becomes a UserError that says what helps."""
        import torch

        try:
            yield
        except RuntimeError as error:  # of which torch.OutOfMemoryError is one kind, and the CPU's allocator has none
            if not isinstance(error, torch.OutOfMemoryError) and CPU_IS_FULL not in str(error):
                raise
            sizes = ", ".join(dict.fromkeys(f"{prompt.width}x{prompt.height}" for prompt in prompts))
            raise UserError(
                f"{self.pipeline.device} ran out of memory while generating an image of {sizes}; use --vram_budget, "
                "a smaller dtype or a smaller image."
            ) from None

    def draw(self, prompt: Prompt) -> None:
        """Draw an encoded prompt and write its file."""
        with self.explaining_memory([prompt]):
            image = self.image(prompt)
        self.save(image, self.file_name(prompt), self.text_of(prompt), prompt.seed)

    def text_of(self, prompt: Prompt) -> Mapping[str, str]:
        """The text that says in a file how it was made; nothing with ``--no_metadata``."""
        return {} if self.options.output.no_metadata else self.record(prompt).entries()

    def save(self, image: Image, name: str, text: Mapping[str, str], seed: object) -> None:
        """Write an image's file, with ``text``."""
        path = save_image(image, self.output_folder, name, text)
        say(f"saved {path} ({image.width}x{image.height}, seed {seed})")

    def encode(self, prompts: Sequence[Prompt], keep_encoders: bool = False) -> None:
        """Make the text outputs of ``prompts`` that are not there yet; then let the text encoders go."""
        keys = {self.text_key(text): text for prompt in prompts for text in self.texts_of(prompt)}
        made: dict[TextKey, dict[str, Tensor]] = {key: {} for key in keys if key not in self.texts}
        for encoder in self.pipeline.encoders if made else ():
            with self.explaining_memory(prompts), self.at_work(encoder):
                encoded = self.pipeline.encode_texts([keys[key] for key in made], [encoder])
                for key, outputs in made.items():
                    outputs.update({name: tensor.cpu() for name, tensor in encoded[keys[key]].items()})
            if not keep_encoders:
                self.stack.leave(encoder)
                self.pipeline.release(encoder)
        self.texts.update(made)
        if keep_encoders:
            self.texts.update({key: self.texts.pop(key) for key in keys})  # the newest last
            while len(self.texts) > TEXTS_KEPT:
                del self.texts[next(iter(self.texts))]

    def text_key(self, text: Text) -> TextKey:
        """What the outputs of a text depend on: where LoRA files change the text encoders, also their strengths."""
        return text, tuple(self.stack.multipliers) if self.stack.acts_on(*self.pipeline.encoders) else ()

    def text_outputs(self, text: Text) -> dict[str, Tensor]:
        """The conditioning of an encoded text, where the pipeline wants it."""
        outputs, host = self.texts[self.text_key(text)], self.pipeline.read_on_host
        return {name: value if name in host else value.to(self.pipeline.device) for name, value in outputs.items()}

    def encoded_request(self, prompt: Prompt) -> ImageRequest:
        """The request for an encoded prompt."""
        request = self.request(prompt)
        request.conditioning = self.text_outputs((prompt.prompt, "positive"))
        negative = self.negative(prompt)
        request.negative_conditioning = None if negative is None else self.text_outputs((negative, "negative"))
        return request

    @contextlib.contextmanager
    def at_work(self, *parts: str) -> Iterator[None]:
        """While it is active, these parts are where they work and computation is in the first one's dtype."""
        device = self.pipeline.device_of(parts[0])
        with self.parts.at_work(*parts), computing_in(device, self.dtypes[parts[0]].compute):
            yield

    def latents(self, prompt: Prompt) -> Tensor:
        """The latents [1, C, h, w], float32, of an encoded prompt."""
        with self.at_work(*self.denoising_parts(prompt)):
            return self.pipeline.generate_latents(self.encoded_request(prompt), progress=True)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [1, 3, height, width], float32 in -1..1."""
        with self.at_work("autoencoder"):
            return self.pipeline.decode_latents(latents)

    def image(self, prompt: Prompt) -> Image:
        """The image of an encoded prompt."""
        return self.image_of(self.latents(prompt))

    def image_of(self, latents: Tensor) -> Image:
        """The image of ``latents`` [1, ...]."""
        from library.models.pipeline import to_image

        return to_image(self.decode(latents)[0])

    def record(self, prompt: Prompt) -> ImageRecord:
        """How the image of ``prompt`` is made."""
        for file in self.lora_files:
            if file.path not in self.hashes:
                self.hashes[file.path] = lora_hash(file.path)
        model = self.pipeline.opened(self.pipeline.denoiser).source.checkpoint
        height, width = self.pipeline.image_size(self.pipeline.request(prompt))
        return ImageRecord(
            script=self.script,
            prompt=replace(self.recorded(prompt), width=width, height=height),
            sampler=self.sampler,
            model=model.path.name,
            model_hash=legacy_hash(model.files[0]),
            loras=[
                UsedLora(file.path.name, multiplier, self.hashes[file.path])
                for file, multiplier in zip(self.lora_files, self.stack.multipliers)
            ],
            settings=self.settings(prompt),
        )
