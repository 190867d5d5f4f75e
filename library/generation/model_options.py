"""Which model draws, and how it computes: options, and the pipeline that they name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.console import say, warn
from library.errors import UserError

if TYPE_CHECKING:
    import torch

    from library.generation.text_options import TextOptions
    from library.models.attention import AttentionBackend
    from library.models.stable_diffusion.checkpoint import Variant
    from library.models.stable_diffusion.pipeline import StableDiffusionPipeline


@dataclass
class ModelOptions:
    """Model"""

    ckpt: str | None = None
    """Model: a checkpoint file, a pattern that one file matches, a Diffusers folder, or an id on the hub."""
    v1: bool = False
    """The model is a Stable Diffusion 1.x; it is recognised without this."""
    v2: bool = False
    """The model is a Stable Diffusion 2.x; it is recognised without this."""
    sdxl: bool = False
    """The model is a Stable Diffusion XL; it is recognised without this."""
    v_parameterization: bool = False
    """The model predicts v, such as 768-v-ema.ckpt of 2.x; needed where its files don't say so."""
    zero_terminal_snr: bool = False
    """Draw along a noise schedule that ends in pure noise, for models that were trained so."""
    vae: str | None = None
    """Autoencoder instead of the model's own: a file in any layout, a Diffusers folder, or an id on the hub."""
    tokenizer_cache_dir: str | None = None
    """Folder in which tokenizers are looked for first, and kept when they are downloaded."""
    fp16: bool = False
    """Compute in float16."""
    bf16: bool = False
    """Compute in bfloat16."""
    no_half_vae: bool = False
    """Keep the autoencoder in float32."""
    xformers: bool = False
    """Attention of the package xformers."""
    sdpa: bool = False
    """Attention of PyTorch itself; this is the default."""
    diffusers_xformers: bool = False
    """The same as --xformers."""
    opt_channels_last: bool = False
    """Keep weights of convolutions in the memory format channels_last, which is faster on some GPUs."""
    vae_slices: int | None = None
    """Let the autoencoder work through images in this many slices, with the same result in less memory; 16 or 32."""
    vae_batch_size: float | None = None
    """Images that go through the autoencoder together; below 1 a share of the batch, unset all of it."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that is computed in. Raises UserError when there are two."""
        import torch

        if self.fp16 and self.bf16:
            raise UserError("--fp16 and --bf16 cannot be used together; choose one.")
        return torch.float16 if self.fp16 else torch.bfloat16 if self.bf16 else torch.float32

    @property
    def attention_backend(self) -> AttentionBackend:
        """The attention that is requested, or PyTorch's own, with a line, where its package is missing."""
        from library.models.attention import or_torch

        if not (self.xformers or self.diffusers_xformers):
            return "sdpa"
        option = "--xformers" if self.xformers else "--diffusers_xformers"
        if self.sdpa:
            say(f"--sdpa has no effect with {option}")
        return or_torch("xformers", option)


VARIANT_OPTIONS: dict[Variant, str] = {"sd1": "v1", "sd2": "v2", "sdxl": "sdxl"}
"""The option that names each kind of model."""


def open_model(options: ModelOptions, text: TextOptions, device: torch.device) -> StableDiffusionPipeline:
    """The pipeline that the options name, opened by its files' headers.

    What the files say counts; an option that says otherwise is named. Raises UserError for options and files that
    cannot be used.
    """
    import torch

    from library.models.hub import find_model
    from library.models.stable_diffusion.pipeline import StableDiffusionFiles, StableDiffusionPipeline
    from library.models.stable_diffusion.text import require_clip_skip

    check_model_options(options)
    dtype, rules = options.dtype, text.image_texts()
    files = StableDiffusionFiles(
        model=find_model(options.ckpt or "", "--ckpt"),
        vae=None if options.vae is None else find_model(options.vae, "--vae", "vae"),
        tokenizer_cache_dir=options.tokenizer_cache_dir,
        model_option="--ckpt",
    )
    pipeline = StableDiffusionPipeline(
        files,
        dtype,
        device,
        dtypes={"autoencoder": torch.float32} if options.no_half_vae else None,
        clip_skip=text.clip_skip,
        image_texts=rules,
        attention_backend=options.attention_backend,
    )
    layers = [pipeline.opened(encoder).sizes["num_hidden_layers"] for encoder in pipeline.encoders]
    require_clip_skip(text.clip_skip, min(layers))
    follow_files(options, pipeline)
    pipeline.channels_last = options.opt_channels_last
    pipeline.vae_slices, pipeline.vae_batch_size = options.vae_slices, options.vae_batch_size
    pipeline.load_tokenizers()
    return pipeline


def check_model_options(options: ModelOptions) -> None:
    """What can be known without the files. Raises UserError."""
    if not options.ckpt:
        raise UserError("--ckpt is missing; it names the model: a checkpoint file or a Diffusers folder.")
    kinds = [f"--{name}" for name in VARIANT_OPTIONS.values() if getattr(options, name)]
    if len(kinds) > 1:
        raise UserError(f"{' and '.join(kinds)} cannot be used together; leave them out, the model is recognised.")
    if options.vae_slices is not None and options.vae_slices < 1:
        raise UserError(f"--vae_slices must be at least 1, not {options.vae_slices}.")
    if options.vae_batch_size is not None and options.vae_batch_size <= 0:
        raise UserError(f"--vae_batch_size must be above 0, not {options.vae_batch_size:g}.")


def follow_files(options: ModelOptions, pipeline: StableDiffusionPipeline) -> None:
    """Let the pipeline predict what the model's files say, or the options where they say nothing.

    Every option that the files contradict is named, and what they say without an option.
    """
    from library.models.stable_diffusion.checkpoint import MODEL_NAMES

    model, name = pipeline.model, options.ckpt
    for variant, option in VARIANT_OPTIONS.items():
        if getattr(options, option) and variant != model.variant:
            warn(f"--{option} has no effect: {name} is a {MODEL_NAMES[model.variant]} model")
    pipeline.v_parameterization = options.v_parameterization if model.predicts_v is None else model.predicts_v
    if pipeline.v_parameterization and not options.v_parameterization:
        say(f"{name} predicts v: --v_parameterization is taken as given")
    if options.v_parameterization and not pipeline.v_parameterization:
        warn(f"--v_parameterization has no effect: {name} says that it predicts noise")
    pipeline.zero_terminal_snr = options.zero_terminal_snr or bool(model.zero_terminal_snr)
    if pipeline.zero_terminal_snr and not options.zero_terminal_snr:
        say(f"{name} was trained with a noise schedule that ends in pure noise: --zero_terminal_snr is taken as given")
