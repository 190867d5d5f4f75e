"""Train a LoRA for Lumina Image 2.0."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from library.console import run_script, say, set_up_console
from library.data.options import TextCacheOptions
from library.errors import UserError
from library.options import parse_options
from library.prompt_options import PromptOptions
from library.training.caching import caches_text
from library.training.flow_matching_hooks import FlowMatchingHooks
from library.training.objective.flow_matching import FlowMatchingOptions, TimestepSampling
from library.training.part_dtypes import part_dtypes
from library.training.run_options import VaeOptions
from library.training.training_options import TrainingOptions
from train_network import NetworkTrainer

if TYPE_CHECKING:
    from library.data.cache import LatentFormat, TextFormat
    from library.models.attention import AttentionBackend
    from library.models.lumina.pipeline import Encoder, LuminaPipeline, LuminaRequest


@dataclass
class LuminaOptions:
    """Lumina Image 2.0"""

    gemma2: str | None = None
    """Gemma 2 text encoder file."""
    ae: str | None = None
    """Autoencoder file (FLUX.1's)."""
    gemma2_max_token_length: int | None = None
    """Caption length in Gemma 2 tokens, the system prompt included; unset means 256."""
    system_prompt: str = ""
    """Text before every caption and every sample prompt (not before negative prompts)."""
    use_flash_attn: bool = False
    """Attention of the package flash-attn."""
    use_sage_attn: bool = False
    """Attention of the package sageattention for sample images; it cannot train."""
    sample_batch_size: int | None = None
    """Sample images of equal size and settings that are generated together; unset means the training batch size."""


@dataclass
class LuminaFlowOptions(FlowMatchingOptions):
    """Flow matching"""

    shifts_table: ClassVar[bool] = True

    timestep_sampling: TimestepSampling = "shift"
    """How noise levels are drawn; nextdit_shift is recommended."""
    model_prediction_type: Literal["raw", "additive", "sigma_scaled"] = "raw"
    """What the loss compares: velocity (raw, recommended), velocity + input (additive) or latents (sigma_scaled)."""
    discrete_flow_shift: float = 6.0
    """Shift towards more noise, of noise levels (--timestep_sampling shift and sigma) and in sample images."""


@dataclass
class LuminaTrainingOptions(TrainingOptions):
    """All options of this script."""

    lumina: LuminaOptions = field(default_factory=LuminaOptions)
    text_cache: TextCacheOptions = field(default_factory=TextCacheOptions)
    flow: LuminaFlowOptions = field(default_factory=LuminaFlowOptions)


class LuminaNetworkTrainer(FlowMatchingHooks, NetworkTrainer):
    """Lumina Image 2.0: flow matching on latents of FLUX.1's autoencoder, Gemma 2 conditioning."""

    options_class = LuminaTrainingOptions
    family = "Lumina Image 2.0"
    unused_groups = (*FlowMatchingHooks.unused_groups, VaeOptions)
    bucket_divisor = 16
    size_divisor = 16
    sample_side = 1024
    sample_step = 16
    prediction_type = "epsilon"  # as kohya-ss/sd-scripts writes it, whatever is predicted
    encoders: tuple[Encoder, ...] = ("gemma2",)
    cache_parts = {"latents": ("transformer", "autoencoder"), "text": ("transformer", "gemma2")}
    options: LuminaTrainingOptions
    pipeline: LuminaPipeline

    # ---- checks -----------------------------------------------------------------------------------------------------

    def check_family_options(self) -> None:
        """Forbidden values, and options without effect."""
        from library.models.attention import require_backend

        options, lumina = self.options, self.options.lumina
        for name in ("gemma2_max_token_length", "sample_batch_size"):
            value = getattr(lumina, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, not {value}.")
        self.trained_encoders = () if options.network.network_train_unet_only else self.encoders
        if caches_text(options.text_cache) and self.trained_encoders:
            self.stop_caching_text()
        for backend in (self.training_attention, self.sampling_attention):
            require_backend(backend)
        self.say_what_has_no_effect()

    def stop_caching_text(self) -> None:
        """Captions of a text encoder that is trained are encoded at every step: a cache would only take time."""
        cache = self.options.text_cache
        self.report_unused(
            ["cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"],
            "while Gemma 2 is trained, which encodes the captions at every step (--network_train_unet_only trains the "
            "transformer alone)",
        )
        cache.cache_text_encoder_outputs = cache.cache_text_encoder_outputs_to_disk = False

    def say_what_has_no_effect(self) -> None:
        """One line for each reason why given options change nothing."""
        if self.options.lumina.use_sage_attn:
            attention = self.training_attention
            say(f"--use_sage_attn: for sample images only; it has no backward pass, so {attention} attention trains")
        self.report_unused_flow_options(shifts_samples=True)

    @property
    def training_attention(self) -> AttentionBackend:
        """The attention of training steps."""
        if self.options.lumina.use_flash_attn:
            return "flash"
        return "xformers" if self.options.model.xformers else "sdpa"

    @property
    def sampling_attention(self) -> AttentionBackend:
        """The attention of sample images."""
        return "sage" if self.options.lumina.use_sage_attn else self.training_attention

    def prompt_options_without_effect(self) -> Iterable[str]:
        """Those of Stable Diffusion and FLUX.1."""
        return ("sample_sampler", "guidance_scale", "controlnet_image")

    def prepare_output(self) -> None:
        """As for every family; sample images are generated in batches."""
        super().prepare_output()
        lumina, samples = self.options.lumina, self.outputs.samples
        samples.batch_size = lumina.sample_batch_size or self.options.dataset.train_batch_size
        if not samples.prompts:
            self.report_unused(["sample_batch_size"], "without sample prompts")

    # ---- models and caches ------------------------------------------------------------------------------------------

    def make_pipeline(self, parts: tuple[Any, ...] = ()) -> LuminaPipeline:
        """Open the checkpoint files by their headers."""
        from library.models.lumina.pipeline import PARTS, LuminaFiles, LuminaPipeline

        options, lumina = self.options, self.options.lumina
        files = LuminaFiles(
            transformer=options.model.pretrained_model_name_or_path or "",
            gemma2=lumina.gemma2,
            autoencoder=lumina.ae,
            tokenizer_cache_dir=options.model.tokenizer_cache_dir,
            disable_mmap=options.model.disable_mmap_load_safetensors,
        )
        return LuminaPipeline(
            files,
            dtype=self.weight_dtype,
            device=self.accelerator.device,
            dtypes=part_dtypes(options.model, options.precision, self.weight_dtype, "transformer", self.encoders),
            gemma2_max_token_length=lumina.gemma2_max_token_length,
            system_prompt=lumina.system_prompt,
            attention_backend=self.training_attention,
            parts=parts or PARTS,
        )

    def latent_format(self) -> LatentFormat:
        """``<stem>_WWWWxHHHH_lumina.npz`` with one set of arrays for each latent size."""
        from library.data.cache import LatentFormat

        channels, stride = self.pipeline.latent_channels, self.pipeline.latent_stride
        return LatentFormat(suffix="_lumina.npz", channels=channels, stride=stride)

    def text_format(self) -> TextFormat:
        """``<stem>_lumina_te.npz``."""
        from library.data.cache import TextFormat

        length = self.pipeline.text_length
        arrays = {
            "hidden_state": (length, self.pipeline.config.text_dim),
            "attention_mask": (length,),
            "input_ids": (length,),
        }
        return TextFormat(suffix="_lumina_te.npz", arrays=arrays, flags={})

    def text_identity(self) -> str:
        """The encoder and the system prompt (the length shows in the shapes)."""
        return f"{super().text_identity()} system_prompt={self.options.lumina.system_prompt!r}"

    # ---- samples and metadata ---------------------------------------------------------------------------------------

    @contextmanager
    def while_sampling(self) -> Iterator[None]:
        """The transformer's attention is that of sample images."""
        self.pipeline.load_transformer().set_attention_backend(self.sampling_attention)
        try:
            yield
        finally:
            self.pipeline.load_transformer().set_attention_backend(self.training_attention)

    def sample_request(self, prompt: PromptOptions) -> LuminaRequest:
        """The schedule is the run's, or the prompt's own."""
        shift = self.options.flow.discrete_flow_shift if prompt.flow_shift is None else prompt.flow_shift
        width, height = self.sample_size(prompt)
        return self.pipeline.request(prompt, width=width, height=height, flow_shift=shift)

    def family_metadata(self) -> dict[str, Any]:
        """How flow matching was set up, and the system prompt."""
        values = self.flow_metadata("weighting_scheme")
        if self.options.lumina.system_prompt:
            values["ss_system_prompt"] = self.options.lumina.system_prompt
        return {"ss_base_model_version": "lumina2", **values}

    def architecture(self) -> tuple[str, str]:
        """``lumina-2``."""
        return "lumina-2", "https://github.com/Alpha-VLLM/Lumina-Image-2.0"


def main() -> None:
    """Read the options and train."""
    options = parse_options(LuminaTrainingOptions, __doc__ or "")
    set_up_console(options.console)
    LuminaNetworkTrainer.of(options).train()


if __name__ == "__main__":
    run_script(main)
