"""Options that say how long a run is and in which precision and memory it works."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from library.errors import UserError
from library.memory.budget import check_budget
from library.memory.plan import MemoryPlan

if TYPE_CHECKING:
    from library.models.pipeline import Pipeline


@dataclass
class ModelOptions:
    """Model"""

    pretrained_model_name_or_path: str | None = None
    """Base model: a checkpoint file or a Diffusers folder."""
    tokenizer_cache_dir: str | None = None
    """Folder of tokenizers, each in a folder named by its hub id with / as _; used before anything else."""
    disable_mmap_load_safetensors: bool = False
    """Read checkpoints with plain file reads instead of memory mapping (faster on some network drives)."""
    sdpa: bool = False
    """Attention by PyTorch's scaled_dot_product_attention (the default)."""
    xformers: bool = False
    """Attention by the xformers package."""
    no_half_vae: bool = False
    """Keep the autoencoder in float32."""
    lowram: bool = False
    """With several processes: load models in one process after another, to need less system RAM at a time."""
    highvram: bool = False
    """Keep the memory of parts that leave the device for those that come next, instead of giving it back in between."""


@dataclass
class PreflightOptions:
    """Checks before training"""

    dry_run: bool = False
    """Check everything, print the plan of the run and whether it fits, and end: nothing is loaded or written."""


@dataclass
class LengthOptions:
    """Training length"""

    max_train_steps: int = 1600
    """Optimizer steps to train."""
    max_train_epochs: int | None = None
    """Epochs to train; overrides --max_train_steps."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients are averaged for one optimizer step."""
    seed: int | None = None
    """Seed of every random draw; unset means a random one, which is logged and stored."""


@dataclass
class VaeOptions:
    """Autoencoder"""

    vae: str | None = None
    """Autoencoder (VAE): a checkpoint file or a Diffusers folder; of Stable Diffusion, in place of the model's own."""


@dataclass
class PrecisionOptions:
    """Precision and memory"""

    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Dtype of the computation; no means float32."""
    full_fp16: bool = False
    """Also keep the trained network in float16; needs --mixed_precision fp16."""
    full_bf16: bool = False
    """Also keep the trained network in bfloat16; needs --mixed_precision bf16."""
    fp8_base: bool = False
    """Keep the frozen base model in 8-bit floats."""
    fp8_base_unet: bool = False
    """Keep only the frozen U-Net or transformer in 8-bit floats."""
    fp8_scaled: bool = False
    """Keep the frozen U-Net or transformer in 8-bit floats with finer scales; text encoders follow --fp8_base."""
    fp8_scaled_granularity: Literal["tensor", "channel", "block"] | None = None
    """What shares a scale with --fp8_scaled (block: 64 inputs of a channel); unset: block, with --fp8_fast tensor."""
    fp8_fast: bool = False
    """Also multiply weights in fp8 as they are: faster, rounds activations; not by block, from RTX 40 and H100 on."""
    base_format: Literal["int8", "nf4"] | None = None
    """Keep the frozen U-Net or transformer in 8-bit integers, or in 4 bits (bitsandbytes' normal floats)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them."""
    cpu_offload_checkpointing: bool = False
    """With --gradient_checkpointing: keep the stored block inputs in CPU memory."""
    keep_attention_outputs: bool = False
    """With --gradient_checkpointing: keep the outputs of attention too: faster, with more memory."""
    vram_budget: float | None = None
    """GiB of the device (8 for an 8 GB GPU) that the run has to fit into: options that save memory are chosen so."""
    torch_compile: bool = False
    """Compile the blocks of the transformer or U-Net, each when it first runs (torch.compile)."""
    dynamo_backend: Literal[
        "no",
        "eager",
        "aot_eager",
        "inductor",
        "aot_ts_nvfuser",
        "nvprims_nvfuser",
        "cudagraphs",
        "ofi",
        "fx2trt",
        "onnxrt",
        "tensort",
        "tensorrt",
        "ipex",
        "tvm",
    ] = "inductor"
    """Compiler of --torch_compile."""
    compile_dynamic: Literal["auto", "true", "false"] = "auto"
    """Whether --torch_compile compiles once for all sizes of images; auto: if there are several."""


@dataclass
class DistributionOptions:
    """Several processes"""

    ddp_timeout: int | None = None
    """Minutes until processes that wait for each other give up."""
    deepspeed: bool = False
    """DeepSpeed; unsupported."""
    zero_stage: int = 2
    """DeepSpeed ZeRO stage."""
    offload_optimizer_device: Literal["cpu", "nvme"] | None = None
    """DeepSpeed optimizer offload."""
    offload_optimizer_nvme_path: str | None = None
    """DeepSpeed optimizer offload path."""
    offload_param_device: Literal["cpu", "nvme"] | None = None
    """DeepSpeed parameter offload."""
    offload_param_nvme_path: str | None = None
    """DeepSpeed parameter offload path."""
    zero3_init_flag: bool = False
    """DeepSpeed ZeRO 3 initialisation."""
    zero3_save_16bit_model: bool = False
    """DeepSpeed ZeRO 3 saving."""
    fp16_master_weights_and_gradients: bool = False
    """DeepSpeed float16 master weights."""


@dataclass
class ObsoleteDistributionOptions:
    """Several processes"""

    ddp_gradient_as_bucket_view: bool = False
    """Accepted for old command lines; gradients are averaged in one flat buffer anyway."""
    ddp_static_graph: bool = False
    """Accepted for old command lines; gradients are averaged outside the graph anyway."""


@dataclass
class StableDiffusionModelOptions:
    """Stable Diffusion models"""

    v2: bool = False
    """Base model is Stable Diffusion 2.x."""
    v_parameterization: bool = False
    """Base model predicts v."""
    max_token_length: Literal[75, 150, 225] | None = None
    """Longest caption in tokens; unset means 75."""
    weighted_captions: bool = False
    """Read (word:1.2) and [word] in captions as weights."""
    mem_eff_attn: bool = False
    """Attention in slices, slower and with little memory."""


@dataclass
class ClipSkipOptions:
    """Stable Diffusion models"""

    clip_skip: int | None = None
    """Use the text encoder's n-th layer from the back."""


def check_precision(options: PrecisionOptions) -> None:
    """Raises UserError for combinations of precision options that are mutually exclusive."""
    if options.full_fp16 and options.mixed_precision != "fp16":
        raise UserError("--full_fp16 needs --mixed_precision fp16.")
    if options.full_bf16 and options.mixed_precision != "bf16":
        raise UserError("--full_bf16 needs --mixed_precision bf16.")
    check_budget(options.vram_budget)
    for name in ("fp8_base", "fp8_base_unet", "fp8_scaled", "base_format"):
        if getattr(options, name) and options.mixed_precision == "no":
            raise UserError(f"--{name} needs --mixed_precision fp16 or bf16.")
    if options.fp8_fast and not (options.fp8_base or options.fp8_base_unet or options.fp8_scaled):
        raise UserError("--fp8_fast needs weights in fp8: --fp8_base, --fp8_base_unet or --fp8_scaled.")
    if options.fp8_fast and options.base_format is not None:
        raise UserError("--fp8_fast multiplies weights in fp8, and --base_format keeps others; leave out one of them.")
    if options.fp8_fast and options.fp8_scaled and options.fp8_scaled_granularity == "block":
        raise UserError("--fp8_fast needs --fp8_scaled_granularity tensor or channel, not block.")
    for name in ("fp8_base_unet", "fp8_scaled"):
        if options.base_format is not None and getattr(options, name):
            raise UserError(
                f"--base_format and --{name} are mutually exclusive: both say how the U-Net or transformer is kept."
            )
    if options.keep_attention_outputs and options.torch_compile and options.gradient_checkpointing:
        raise UserError("--keep_attention_outputs and --torch_compile are mutually exclusive.")


COMPILERS = {"tensort": "tensorrt"}
"""Names that old command lines misspell."""


def check_compiler(options: PrecisionOptions) -> None:
    """Raises UserError when torch knows no compiler of the name ``--dynamo_backend`` on this machine."""
    if not options.torch_compile or options.dynamo_backend == "no":
        return
    import torch

    known = torch.compiler.list_backends(exclude_tags=())
    if COMPILERS.get(options.dynamo_backend, options.dynamo_backend) not in known:
        usual = ", ".join(name for name in ("inductor", "cudagraphs", "aot_eager", "eager") if name in known)
        raise UserError(
            f"--dynamo_backend {options.dynamo_backend} is unavailable on this machine; torch provides {usual}."
        )


def memory_plans(
    pipeline: Pipeline, options: PrecisionOptions, trained: Iterable[str], sizes: int
) -> dict[str, MemoryPlan]:
    """What the options say is done block by block, but for streaming: to the denoiser and ``trained`` encoders.

    ``sizes``: how many sizes the training images have.
    """
    backend = COMPILERS.get(options.dynamo_backend, options.dynamo_backend)
    plan = MemoryPlan(
        checkpointing=options.gradient_checkpointing,
        offload_inputs=options.cpu_offload_checkpointing,
        keep_attention=options.keep_attention_outputs,
        compiler=backend if options.torch_compile and backend != "no" else None,
        dynamic={"true": True, "false": False, "auto": True if sizes > 1 else None}[options.compile_dynamic],
    )
    return {pipeline.denoiser: plan, **{encoder: replace(plan, compiler=None) for encoder in trained}}


@dataclass
class HubOptions:
    """Upload to Hugging Face"""

    huggingface_repo_id: str | None = None
    """Repository (owner/name) that saved files are uploaded to."""
    huggingface_repo_type: str | None = None
    """Kind of repository: model, dataset or space."""
    huggingface_path_in_repo: str | None = None
    """Folder inside the repository."""
    huggingface_token: str | None = None
    """Access token."""
    huggingface_repo_visibility: str | None = None
    """public makes a new repository public; anything else keeps it private."""
    save_state_to_huggingface: bool = False
    """Also upload states."""
    resume_from_huggingface: bool = False
    """--resume names a state in a repository: owner/name/path[:revision[:type]]."""
    async_upload: bool = False
    """Upload in the background; the final file is always waited for."""
