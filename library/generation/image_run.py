"""The course of ``gen_img.py``: prompts to batches, batches through one or two stages to files.

An image depends on its own prompt, seed and inputs alone: a batch holds images whose settings are equal, and nothing of
one of them reaches another.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tqdm import tqdm

from library.console import say, warn
from library.families import SDXL, STABLE_DIFFUSION
from library.generation.control_options import open_control
from library.generation.deep_shrink import open_deep_shrink
from library.generation.failed_images import FailedImages
from library.generation.features import Batch, Feature, check_features, models_at_work
from library.generation.gradual_latent import open_gradual_latent
from library.generation.guidance_options import open_clip_vision, open_guidance
from library.generation.highres_fix import open_highres
from library.generation.image_files import ImageRecord, UsedLora, lora_hash
from library.generation.image_outputs import ImageOutputs, image_record
from library.generation.image_prompts import ImagePrompt, check_image_prompt
from library.generation.image_texts import EncodedText, ImageTexts
from library.generation.inference_run import InferenceRun
from library.generation.model_options import check_model_options, open_model
from library.generation.part_dtypes import PartDtype
from library.generation.preview import Preview
from library.generation.prompt_sources import SOURCES, ImagePrompts, PromptLine
from library.generation.sampling_options import check_sampling, default_prompt, request_fields, sampling_settings
from library.generation.start_images import open_start_images
from library.generation.unused_options import unused_options
from library.models.stable_diffusion.sampling import require_sampler
from library.safetensors_io import legacy_hash

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from library.generation.lora_files import LoraFile
    from library.models.sampling import Role
    from library.models.stable_diffusion.pipeline import StableDiffusionPipeline, StableDiffusionRequest


class ImageRun(InferenceRun[ImagePrompt]):
    """Stable Diffusion 1.x, 2.x and XL, with everything that ``gen_img.py`` adds to the drawing."""

    script = "gen_img.py"
    family = STABLE_DIFFUSION
    denoiser = "unet"
    dtype_options: ClassVar[Mapping[str, str]] = {}
    output_option = "--outdir"
    lora_option = "--network_weights"
    pipeline: StableDiffusionPipeline
    defaults: ImagePrompt

    def __init__(self, options: Any):
        self.shows_steps = True
        """Whether each batch has a progress bar of its own: not beside one of all images."""
        self.bar: tqdm[Any] | None = None
        super().__init__(options)
        self.image_texts = ImageTexts(self.pipeline, self.text_strengths, self.stack.set_multipliers, self.at_work)

    # ---- options and files ------------------------------------------------------------------------------------------

    @property
    def keeps_encoders(self) -> bool:
        """They do: texts are encoded batch by batch."""
        return True

    @property
    def images_together(self) -> int:
        """``--batch_size``."""
        count: int = self.options.prompts.batch_size
        return count

    def check_sources(self) -> None:
        """Checked with the prompts."""

    def check_options(self) -> None:
        """Sizes, numbers and names that can be known without a file. Raises UserError."""
        require_sampler(self.options.sampling.sampler, "--sampler")
        check_sampling(self.options.sampling)
        check_model_options(self.options.model)

    @property
    def output_folder(self) -> Path:
        """``--outdir``."""
        return Path(self.options.output.outdir)

    def read_lora_files(self) -> list[LoraFile]:
        """They are read with the networks."""
        return []

    def part_dtypes(self) -> tuple[dict[str, PartDtype], torch.dtype]:
        """One dtype for all parts, but for the autoencoder with ``--no_half_vae``."""
        import torch

        dtype, model = self.options.model.dtype, self.options.model
        dtypes = dict.fromkeys(("unet", "autoencoder", "text_encoder", "text_encoder_2"), PartDtype(dtype, dtype))
        if model.no_half_vae:
            dtypes["autoencoder"] = PartDtype(torch.float32, torch.float32)
        return dtypes, torch.float32

    def open_pipeline(self) -> StableDiffusionPipeline:
        """The model, with the words of embedding files."""
        from library.generation.textual_inversion import add_textual_inversions

        pipeline = open_model(self.options.model, self.options.text, self.device)
        self.family = SDXL if pipeline.variant == "sdxl" else STABLE_DIFFUSION
        add_textual_inversions(self.options.text.textual_inversion_embeddings, pipeline)
        return pipeline

    def open_features(self) -> list[Feature]:
        """What the options add to the loop; the first one is the innermost around the model."""
        from library.generation.regions import open_regions
        from library.generation.xti import open_xti

        options, pipeline = self.options, self.pipeline
        guides, count = options.control.guide_image_path, options.prompts.images_per_prompt
        self.start = open_start_images(options.start, options.sampling, count, regional=bool(self.stack.acting))
        self.regions = open_regions(options.networks, self.start, self.stack, pipeline)
        self.highres = open_highres(options.highres, pipeline)
        start_image = self.start.image if self.start is not None and self.start.files else None
        features: list[Feature | None] = [
            self.regions,
            open_xti(options.text.XTI_embeddings, pipeline),
            open_control(options.control, pipeline, options.highres.highres_fix_disable_control_net),
            open_deep_shrink(pipeline),
            open_gradual_latent(),
            self.start,
            open_clip_vision(options.guidance, pipeline, start_image),
            *open_guidance(options.guidance, guides, pipeline),
        ]
        return [feature for feature in features if feature is not None]

    def default_prompt(self) -> ImagePrompt:
        """The command line as a prompt."""
        options = self.options
        return default_prompt(
            options.sampling, self.pipeline.variant, options.start, options.deep_shrink, options.gradual_latent
        )

    def read_prompts(self) -> Sequence[ImagePrompt]:
        """The images that are known ahead, checked; where there are none, the command line alone."""
        self.features = self.open_features()
        self.source = ImagePrompts(self.options.prompts, self.defaults, self.recorded_lines())
        known: dict[ImagePrompt, None] = {}

        def check(prompt: ImagePrompt, place: str) -> None:
            self.check_prompt(prompt, place)
            known[replace(prompt, prompt="", raw_prompt=None, seed=None, number=0)] = None

        self.source.check(check)
        return list(known) or [self.defaults]

    def recorded_lines(self) -> list[PromptLine]:
        """The prompts that the start images hold, for a run that has no others."""
        sources = self.options.prompts
        if self.start is None or any(getattr(sources, name) not in (None, False) for name in SOURCES):
            return []
        return self.start.recorded_lines()

    def check_prompt(self, prompt: ImagePrompt, place: str = "") -> None:
        """Raises UserError, beginning with ``place``, for a prompt that cannot be generated."""
        check_image_prompt(prompt, place)
        check_features(self.features, prompt, place)

    @property
    def feature_bytes(self) -> int:
        """The weights of the models of features."""
        return sum({name: size for feature in self.features for name, size in feature.model_bytes.items()}.values())

    def say_what_has_no_effect(self) -> None:
        """What acts through guidance or beside another option; groups of options say the rest when they are opened."""
        prompts = self.file_prompts if self.source.known_ahead else None
        for line in unused_options(self.options, self.pipeline.variant == "sdxl", prompts, self.defaults):
            say(line)
        unguided = [prompt for prompt in self.file_prompts if self.negative(prompt) is None]
        if any(prompt.negative_prompt for prompt in unguided):
            say("a negative prompt has no effect without guidance, which a --scale above 1 gives")
        if any(prompt.negative_scale is not None for prompt in unguided):
            warn("--negative_scale has no effect without guidance, which a --scale above 1 gives")

    # ---- texts --------------------------------------------------------------------------------------------------

    def texts_of_image(self, prompt: ImagePrompt) -> dict[Role, list[EncodedText]]:
        """The texts of an image by their roles."""
        return self.image_texts.of(prompt, self.request(prompt))

    def text_strengths(self, prompt: ImagePrompt, role: Role, part: int) -> tuple[float, ...]:
        """The networks' strengths for a text of a prompt, where its outputs depend on them."""
        acts = self.stack.acts_on(*self.pipeline.encoders)
        return self.regions.text_strengths(prompt, role, part) if acts else ()

    # ---- batches ------------------------------------------------------------------------------------------------

    def request(self, prompt: ImagePrompt) -> StableDiffusionRequest:
        """The pipeline's request for an image, without its texts."""
        sizes = {}
        for field, height, width in (
            ("original_size", prompt.original_height, prompt.original_width),
            ("negative_original_size", prompt.original_height_negative, prompt.original_width_negative),
        ):
            if height is not None or width is not None:
                sizes[field] = (height or prompt.height, width or prompt.width)
        crop = (prompt.crop_top or 0, prompt.crop_left or 0)
        return self.pipeline.request(prompt, **sizes, crop=crop, **request_fields(self.options.sampling))

    def key(self, prompt: ImagePrompt) -> Hashable:
        """What images must have in common to be generated together."""
        texts = self.texts_of_image(prompt)
        return (
            self.request(prompt).common(),
            [(role, len(group), group[0][1]) for role, group in texts.items()],
            self.stack.strengths(prompt.network_mul),
            [(feature.option, feature.acts_on(prompt), feature.key(prompt)) for feature in self.features],
        )

    def batches(self, lines: Iterable[Sequence[ImagePrompt]]) -> Iterator[list[ImagePrompt]]:
        """Images that follow each other and may be generated together, at most ``--batch_size``."""
        sized = self.start.sized if self.start and not self.highres else lambda image: image
        images = (sized(image) for line in lines for image in line)
        for _, group in itertools.groupby(images, self.key):
            while batch := list(itertools.islice(group, self.options.prompts.batch_size)):
                yield batch

    # ---- the course ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Draw everything that is requested."""
        source, options = self.source, self.options
        source.open_module(options, self.pipeline, self.stack.networks)
        start_image = self.start.file if self.start is not None and self.start.files else None
        with ImageOutputs(options.output, start_image, stage=2 if self.highres else 0) as self.outputs:
            if source.interactive:
                self.preview = Preview(enabled=not options.prompts.no_preview)
                return source.session(self.draw_typed)
            total = None if source.count is None else source.count - self.outputs.existing(source)
            self.shows_steps = total is not None and total <= options.prompts.batch_size
            with tqdm(total=total, unit="image", desc="images", disable=self.shows_steps) as self.bar:
                failed = FailedImages()
                for batch in self.batches(map(self.outputs.wanted, source)):
                    with failed.going_on(batch):
                        self.draw_batch(batch)
                failed.require_none()

    def draw_typed(self, images: list[ImagePrompt]) -> None:
        """Draw the images of a line of a session. Raises UserError for what cannot be drawn."""
        for prompt in images:
            self.check_prompt(prompt)
        for batch in self.batches([self.outputs.wanted(images)]):
            for prompt, image in zip(batch, self.draw_batch(batch)):
                self.preview.show(image, prompt.prompt)

    def draw_batch(self, prompts: Sequence[ImagePrompt]) -> list[Image]:
        """Draw images together, in one stage or two, and write their files."""
        with self.explaining_memory(prompts):
            self.image_texts.encode([texts for prompt in prompts for texts in self.texts_of_image(prompt).values()])
            self.stack.set_multipliers(self.stack.strengths(prompts[0].network_mul), "unet")
            images = self.images_of(prompts) if self.highres is None else self.images_of_two_stages(prompts)
        for position, (prompt, image) in enumerate(zip(prompts, images)):
            self.save_image(image, prompt, position)
        return images

    # ---- stages -------------------------------------------------------------------------------------------------

    def encoded_request(self, prompt: ImagePrompt) -> StableDiffusionRequest:
        """The request for an image with its texts; of several sub-prompts, the last one stands for all."""
        from library.models.pipeline import CONDITIONINGS

        request, outputs = self.request(prompt), self.image_texts.conditioning
        for role, texts in self.texts_of_image(prompt).items():
            setattr(request, CONDITIONINGS[role], outputs(texts[-1]))
            if role == "positive" and len(texts) > 1:
                request.sub_conditionings = [outputs(text) for text in texts]
        return request

    def latents_of(
        self, prompts: Sequence[ImagePrompt], stage: int = 0, start: Sequence[Tensor] | None = None
    ) -> Tensor:
        """The latents [B, 4, h, w], float32, of images generated together, over those of ``start`` if given."""
        requests = [self.encoded_request(prompt) for prompt in prompts]
        for request, latents in zip(requests, start or ()):
            request.start_latents = latents
        height, width = self.pipeline.image_size(requests[0])
        batch = Batch(prompts, requests, [prompt.number for prompt in prompts], height, width, stage)
        if self.start is not None and start is None:
            with self.at_work("autoencoder"):
                self.start.encode(batch, self.pipeline)
        acting = [feature for feature in self.features if feature.acts_on(prompts[0])]
        parts = dict.fromkeys(part for feature in acting for part in feature.parts)
        with models_at_work(acting, self.pipeline.device, self.options.device.offload):
            hooks = [hook for feature in acting if (hook := feature.hook(batch)) is not None]
            with self.at_work("unet", *parts):
                return self.pipeline.generate_latents(*requests, hooks=hooks, progress=self.shows_steps)

    def decoded(self, latents: Tensor, prompts: Sequence[ImagePrompt], stage: int = 0) -> list[Image]:
        """The images of latents [B, 4, h, w], which the features see too."""
        from library.models.pipeline import to_image

        with self.at_work("autoencoder"):
            images = [to_image(pixels) for pixels in self.pipeline.decode_latents(latents)]
        numbers = [prompt.number for prompt in prompts]
        batch = Batch(prompts, (), numbers, images[0].height, images[0].width, stage)
        for feature in self.features:
            if feature.acts_on(prompts[0]):
                feature.drawn(batch, images)
        return images

    def images_of(self, prompts: Sequence[ImagePrompt]) -> list[Image]:
        """The images of prompts that are generated together in one stage."""
        return self.decoded(self.latents_of(prompts), prompts)

    def images_of_two_stages(self, prompts: Sequence[ImagePrompt]) -> list[Image]:
        """The images of Highres. fix: small ones, which may be kept, and large ones that are drawn over them."""
        highres: Any = self.highres
        first, second = [highres.first(prompt) for prompt in prompts], [highres.second(prompt) for prompt in prompts]
        keeps, latents = self.options.highres.highres_fix_save_1st, self.latents_of(first, stage=1)
        images = self.decoded(latents, first, stage=1) if keeps or not highres.takes_latents else None
        if keeps and images is not None:
            for position, (prompt, image) in enumerate(zip(first, images)):
                self.outputs.save_first_stage(image, prompt, self.record(prompt), position)
        given = (latents, None) if highres.takes_latents else (None, images)
        height, width = self.pipeline.image_size(self.request(second[0]))
        with self.at_work("autoencoder"):
            start = highres.enlarged(*given, width, height)
        return self.decoded(self.latents_of(second, stage=2, start=start), second, stage=2)

    # ---- files --------------------------------------------------------------------------------------------------

    def save_image(self, image: Image, prompt: ImagePrompt, position: int) -> None:
        """Write the file of a finished image; ``position`` is its place in the batch."""
        path = self.outputs.save(image, prompt, self.record(prompt), position)
        if self.bar is not None:
            self.bar.update()
        with tqdm.external_write_mode():
            say(f"saved {path} ({image.width}x{image.height}, seed {prompt.seed})")

    def record(self, prompt: ImagePrompt) -> ImageRecord:
        """How the image of ``prompt`` is made."""
        for file in self.lora_files:
            if file.path not in self.hashes:
                self.hashes[file.path] = lora_hash(file.path)
        model, options = self.pipeline.opened("unet").source.checkpoint, self.options
        settings = {"clip-skip": options.text.clip_skip, "emb-normalize-mode": options.text.emb_normalize_mode}
        acting = [feature.settings(prompt) for feature in self.features if feature.acts_on(prompt)]
        acting += [] if self.highres is None else [self.highres.settings(prompt)]
        drawn_over = self.start is not None and bool(self.start.files)
        acting.append(sampling_settings(options.sampling, drawn_over))
        return image_record(
            self.script,
            prompt,
            model.path.name,
            legacy_hash(model.files[0]),
            sizes=self.pipeline.variant == "sdxl",
            loras=[
                UsedLora(file.path.name, multiplier, self.hashes[file.path])
                for file, multiplier in zip(self.lora_files, self.stack.multipliers)
            ],
            settings={key: str(value) for key, value in settings.items() if value is not None}
            | {key: value for texts in acting for key, value in texts.items()},
        )
