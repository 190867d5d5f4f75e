"""Train a LoRA for HunyuanImage-2.1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from library.console import run_script, set_up_console, warn
from library.data.options import TextCacheOptions
from library.errors import UserError
from library.options import parse_options
from library.prompt_options import PromptOptions
from library.training.flow_matching_hooks import FlowMatchingHooks
from library.training.objective.flow_matching import FlowMatching, FlowMatchingOptions, TimestepSampling
from library.training.part_dtypes import part_dtypes
from library.training.training_options import TrainingOptions
from train_network import NetworkTrainer

if TYPE_CHECKING:
    from library.data.cache import LatentFormat, TextFormat
    from library.models.attention import AttentionBackend
    from library.models.hunyuan_image.pipeline import HunyuanImagePipeline, HunyuanImageRequest

BACKENDS: Mapping[str, AttentionBackend] = {"torch": "sdpa", "sdpa": "sdpa", "xformers": "xformers", "flash": "flash"}
"""The attention of ``--attn_mode``."""


@dataclass
class HunyuanImageOptions:
    """HunyuanImage-2.1"""

    text_encoder: str | None = None
    """Qwen2.5-VL text encoder: a file, one of its shards, or a Diffusers folder."""
    byt5: str | None = None
    """ByT5 text encoder file, which reads the texts that captions quote."""
    fp8_vl: bool = False
    """Keep Qwen2.5-VL in 8-bit floats."""
    text_encoder_cpu: bool = False
    """Encode captions on the CPU; more threads (accelerate's --num_cpu_threads_per_process) make that faster."""
    vae_chunk_size: int | None = None
    """Rows that a convolution of the autoencoder works on at a time, for less memory; 16 is usual, unset means all."""
    attn_mode: Literal["torch", "xformers", "flash", "sageattn", "sdpa"] | None = None
    """Attention: PyTorch's own (torch, sdpa) or a package's; sageattn cannot train. Overrides --xformers and --sdpa."""
    split_attn: bool = False
    """Attention for one item of a batch at a time, without a mask; needed by xformers with more than one."""


@dataclass
class HunyuanImageFlowOptions(FlowMatchingOptions):
    """Flow matching"""

    shifts_table: ClassVar[bool] = True

    timestep_sampling: TimestepSampling = "sigma"
    """How noise levels are drawn."""
    model_prediction_type: Literal["raw", "additive", "sigma_scaled"] = "raw"
    """What the loss compares: velocity (raw, recommended), velocity + input (additive) or latents (sigma_scaled)."""
    discrete_flow_shift: float = 5.0
    """Shift towards more noise, of noise levels (--timestep_sampling shift and sigma)."""


@dataclass
class HunyuanImageTrainingOptions(TrainingOptions):
    """All options of this script."""

    hunyuan_image: HunyuanImageOptions = field(default_factory=HunyuanImageOptions)
    text_cache: TextCacheOptions = field(default_factory=TextCacheOptions)
    flow: HunyuanImageFlowOptions = field(default_factory=HunyuanImageFlowOptions)


class HunyuanImageNetworkTrainer(FlowMatchingHooks, NetworkTrainer):
    """HunyuanImage-2.1: flow matching on latents of a 32x autoencoder, Qwen2.5-VL and ByT5 conditioning."""

    options_class = HunyuanImageTrainingOptions
    family = "HunyuanImage-2.1"
    bucket_divisor = 32
    size_divisor = 32
    sample_step = 32
    prediction_type = "epsilon"  # as kohya-ss/sd-scripts writes it, whatever is predicted
    default_resolution = 512
    cache_parts = {"latents": ("transformer", "autoencoder"), "text": ("transformer", "text_encoder", "byt5")}
    options: HunyuanImageTrainingOptions
    pipeline: HunyuanImagePipeline

    # ---- checks -----------------------------------------------------------------------------------------------------

    def check_options(self) -> None:
        """As for every family; 8-bit floats without finer scales are refused first. Raises UserError."""
        for name in ("fp8_base", "fp8_base_unet"):
            if getattr(self.options.precision, name):
                raise UserError(
                    f"--{name} is not supported for HunyuanImage-2.1; use --fp8_scaled with --mixed_precision bf16 or "
                    "fp16."
                )
        super().check_options()

    def check_family_options(self) -> None:
        """Forbidden values and combinations, and options without effect."""
        from library.models.attention import require_backend

        options, hunyuan = self.options, self.options.hunyuan_image
        if not options.network.network_train_unet_only:
            raise UserError(
                "--network_train_unet_only is required: HunyuanImage-2.1's text encoders are not trained, as there "
                "are no LoRA modules for them."
            )
        if hunyuan.vae_chunk_size is not None and hunyuan.vae_chunk_size < 1:
            raise UserError(f"--vae_chunk_size must be at least 1, not {hunyuan.vae_chunk_size}.")
        if hunyuan.attn_mode == "sageattn":
            raise UserError(
                "--attn_mode sageattn: SageAttention has no backward pass, so it cannot train; use torch, flash or "
                "xformers."
            )
        if hunyuan.attn_mode is not None:
            self.report_unused(["xformers", "sdpa"], "beside --attn_mode")
        require_backend(self.attention)
        self.say_what_has_no_effect()

    @property
    def attention(self) -> AttentionBackend:
        """The attention of training steps and sample images."""
        hunyuan = self.options.hunyuan_image
        mode = hunyuan.attn_mode or ("xformers" if self.options.model.xformers else "torch")
        backend = BACKENDS[mode]
        return "split" if backend == "sdpa" and hunyuan.split_attn else backend

    def read_data(self) -> None:
        """As for every family. Raises UserError for xformers with batches and without ``--split_attn``."""
        super().read_data()
        largest = max(dataset.settings.batch_size for group in self.data.groups for dataset in group.datasets)
        if self.attention == "xformers" and largest > 1 and not self.options.hunyuan_image.split_attn:
            raise UserError(f"xformers needs --split_attn for batches of more than one image; this run has {largest}.")
        if len({dataset.settings.resolution for dataset in self.data.train.datasets}) > 1:
            warn("several resolutions: HunyuanImage-2.1 was not trained for that, and results may be unexpected.")

    def say_what_has_no_effect(self) -> None:
        """One line for each reason why given options change nothing."""
        self.report_unused(["text_encoder_lr"], "while only the transformer is trained")
        self.report_unused_flow_options()

    def prompt_options_without_effect(self) -> Iterable[str]:
        """Those of Stable Diffusion, FLUX.1 and Lumina."""
        return ("sample_sampler", "guidance_scale", "controlnet_image", "cfg_trunc_ratio", "renorm_cfg")

    # ---- models and caches ------------------------------------------------------------------------------------------

    def make_pipeline(self, parts: tuple[Any, ...] = ()) -> HunyuanImagePipeline:
        """Open the checkpoint files by their headers."""
        from library.memory.storage import BlocksStoredAs
        from library.models.hunyuan_image.pipeline import PARTS, HunyuanImageFiles, HunyuanImagePipeline

        options, hunyuan = self.options, self.options.hunyuan_image
        files = HunyuanImageFiles(
            transformer=options.model.pretrained_model_name_or_path or "",
            text_encoder=hunyuan.text_encoder,
            byt5=hunyuan.byt5,
            autoencoder=options.vae.vae,
            tokenizer_cache_dir=options.model.tokenizer_cache_dir,
            disable_mmap=options.model.disable_mmap_load_safetensors,
        )
        dtypes = part_dtypes(options.model, options.precision, self.weight_dtype, "transformer", ())
        if hunyuan.fp8_vl:
            dtypes["text_encoder"] = BlocksStoredAs(self.weight_dtype)
        return HunyuanImagePipeline(
            files,
            dtype=self.weight_dtype,
            device=self.accelerator.device,
            dtypes=dtypes,
            text_encoders_on_host=hunyuan.text_encoder_cpu,
            vae_chunk_size=hunyuan.vae_chunk_size,
            attention_backend=self.attention,
            parts=parts or PARTS,
        )

    def latent_format(self) -> LatentFormat:
        """``<stem>_WWWWxHHHH_hi.npz`` with one set of arrays, not yet scaled, for each latent size."""
        from library.data.cache import LatentFormat

        channels, stride = self.pipeline.latent_channels, self.pipeline.latent_stride
        return LatentFormat(suffix="_hi.npz", channels=channels, stride=stride)

    def text_format(self) -> TextFormat:
        """``<stem>_hi_te.npz``; an entry is as long as its caption."""
        from library.data.cache import TextFormat
        from library.models.hunyuan_image.text import GLYPH_LENGTH

        config = self.pipeline.config
        return TextFormat(
            suffix="_hi_te.npz",
            arrays={
                "vlm_embed": (None, config.text_dim),
                "vlm_mask": (None,),
                "byt5_embed": (GLYPH_LENGTH, config.glyph_dim),
                "byt5_mask": (GLYPH_LENGTH,),
                "ocr_mask": (),
            },
            lengths={"vlm_embed": "vlm_mask", "vlm_mask": "vlm_mask"},
        )

    # ---- the training step ------------------------------------------------------------------------------------------

    def make_objective(self) -> FlowMatching:
        """Flow matching on scaled latents, each position of which is a token."""
        from library.models.autoencoder_hunyuan import LATENT_SCALE

        return FlowMatching(self.options.flow, self.options.noise, patch_size=1, latent_scale=LATENT_SCALE)

    # ---- samples and metadata ---------------------------------------------------------------------------------------

    def sample_request(self, prompt: PromptOptions) -> HunyuanImageRequest:
        """512 x 512 pixels in 20 steps where the prompt says nothing."""
        width, height = self.sample_size(prompt)
        return self.pipeline.request(prompt, width=width, height=height, sample_steps=prompt.sample_steps or 20)

    def family_metadata(self) -> dict[str, Any]:
        """How flow matching was set up."""
        return {"ss_base_model_version": "hunyuan-image-2.1", **self.flow_metadata()}

    def architecture(self) -> tuple[str, str]:
        """``hunyuan-image-2.1``."""
        return "hunyuan-image-2.1", "diffusers"


def main() -> None:
    """Read the options and train."""
    options = parse_options(HunyuanImageTrainingOptions, __doc__ or "")
    set_up_console(options.console)
    HunyuanImageNetworkTrainer.of(options).train()


if __name__ == "__main__":
    run_script(main)
