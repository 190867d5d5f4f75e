"""Open a Stable Diffusion 1.x, 2.x or XL model: recognise it, infer its sizes, build its parts on ``meta``, load them.

Layouts read: the original single file (LDM names) and a Diffusers model folder. Every part is given under the names of
diffusers' and transformers' modules.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from library.checkpoints import Checkpoint, open_checkpoint
from library.errors import UserError
from library.lean_imports import diffusers_class
from library.models.autoencoder_parts import norm_groups
from library.models.clip import ClipFile, clip_file, name_below_text_model
from library.models.loading import Origin, TensorSource, on_meta
from library.models.pipeline import OpenedPart
from library.models.recognition import AUTOENCODER_PREFIXES, TRANSFORMER_PREFIXES, Kind, refuse_unless
from library.models.stable_diffusion.keys import (
    OLD_ATTENTION,
    autoencoder_table,
    open_clip_origins,
    renamed,
    unet_table,
    unet_topology,
)
from library.models.stable_diffusion.unet import meta_unet

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel

Variant = Literal["sd1", "sd2", "sdxl"]
MODEL_NAMES: dict[Variant, str] = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
}
BASE_MODEL_VERSIONS: dict[Variant, str] = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
"""``ss_base_model_version`` of their LoRA files; for one that predicts v, ``_v`` stands behind it."""
WANTED = "a Stable Diffusion 1.x, 2.x or XL checkpoint"
WANTED_VAE = "a Stable Diffusion autoencoder (VAE)"
UNET_PREFIX = TRANSFORMER_PREFIXES[0]
HUGGING_FACE = "cond_stage_model.transformer."
OPEN_CLIP = "cond_stage_model.model."
SDXL_HUGGING_FACE = "conditioner.embedders.0.transformer."
SDXL_OPEN_CLIP = "conditioner.embedders.1.model."
REFINER_OPEN_CLIP = "conditioner.embedders.0.model."
OPEN_CLIP_H_LAYERS = 24  # of which Stable Diffusion 2 uses all but the last
SCALING_FACTORS: dict[Variant, float] = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
LATENT_CHANNELS = 4
SPECIAL_INPUTS = {5: "depth", 7: "upscaler", 8: "InstructPix2Pix", 9: "inpainting"}
HEADS = 8  # of Stable Diffusion 1, whatever the width
HEAD_DIM = 64  # of the later ones
TIME_IDS = 6
EDM_KEYS = {"edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"}
EDM = "was trained with the EDM schedule (as Playground 2.5 and CosXL), which is not supported."
PREDICTIONS = {"v_prediction": True, "epsilon": False}


@dataclass(frozen=True)
class UnetFile(OpenedPart["UNet2DConditionModel"]):
    """An opened U-Net, ready to be loaded; ``config`` holds the arguments of diffusers' class."""

    source: TensorSource
    config: dict[str, Any]

    def meta_module(self) -> UNet2DConditionModel:
        """The module on torch's meta device: its structure without its values."""
        return meta_unet(self.config)


@dataclass(frozen=True)
class VaeFile(OpenedPart["AutoencoderKL"]):
    """An opened image autoencoder, ready to be loaded; ``config`` holds the arguments of diffusers' class."""

    source: TensorSource
    config: dict[str, Any]

    def meta_module(self) -> AutoencoderKL:
        """The module on torch's meta device: its structure without its values."""
        autoencoder_class = diffusers_class("AutoencoderKL")
        with on_meta():
            return autoencoder_class(**self.config)


@dataclass(frozen=True)
class StableDiffusionModel:
    """An opened model: its parts, ready to be loaded, and what its files say about their training."""

    variant: Variant
    unet: UnetFile
    autoencoder: VaeFile
    text_encoders: tuple[ClipFile, ...]
    """One in Stable Diffusion 1 and 2, two in XL."""
    predicts_v: bool | None
    """Whether the U-Net predicts v and not the noise; None where the files don't say."""
    zero_terminal_snr: bool | None = None
    """Whether its noise schedule was rescaled so that the last step is pure noise; None where the files don't say."""


@dataclass(frozen=True)
class _Parts:
    """The parts' tensors under Diffusers' names, before anything is concluded from their shapes."""

    unet: TensorSource
    autoencoder: TensorSource | None
    text_encoders: tuple[TensorSource, ...]
    predicts_v: bool | None
    zero_terminal_snr: bool | None


def open_stable_diffusion(
    path: Path | str,
    *,
    vae: Path | str | None = None,
    disable_mmap: bool = False,
    option: str = "--pretrained_model_name_or_path",
) -> StableDiffusionModel:
    """Open ``path`` (an original single file or a Diffusers folder) by its headers only; ``vae`` replaces its VAE.

    Raises UserError, naming ``option`` and what the file is, when it isn't a text-to-image model of these families or
    a part is missing.
    """
    path = Path(path)
    if (path / "unet").is_dir():
        parts = _open_folder(path, vae is None, disable_mmap, option)
    else:
        parts = _open_single_file(path, disable_mmap, option)
    variant = infer_variant(parts.unet)
    encoders = _text_encoders(variant, parts)
    if vae is not None:
        autoencoder = open_vae(vae, variant, disable_mmap)
    elif parts.autoencoder is not None:
        autoencoder = _vae_file(parts.autoencoder, parts.autoencoder.exceptions.get("scaling_factor"), variant)
    else:
        raise UserError(f"{parts.unet.checkpoint.label} has no autoencoder (VAE) in it; name one with --vae.")
    unet = UnetFile(parts.unet, infer_unet_config(parts.unet, variant, encoders[-1].projection_size))
    return StableDiffusionModel(variant, unet, autoencoder, encoders, parts.predicts_v, parts.zero_terminal_snr)


# Single files


def _open_single_file(path: Path, disable_mmap: bool, option: str) -> _Parts:
    checkpoint = open_checkpoint(path, "transformer", disable_mmap, option)
    kind = refuse_unless(checkpoint, {"sd1", "sd2", "sdxl"}, WANTED)
    if any(key in EDM_KEYS for key in checkpoint):
        raise UserError(f"{checkpoint.label} {EDM}")
    unet = _part(checkpoint, (UNET_PREFIX,), "unet")
    if unet is None:
        raise UserError(
            f"{checkpoint.label} holds the U-Net alone; {WANTED} with its text encoders is needed here (a single file "
            'whose keys start with "model.diffusion_model.", or a Diffusers folder with unet/ and text_encoder/).'
        )
    table = unet_table(*unet_topology(unet.names()))
    unet.remap({renamed(name, table) or name: Origin((name,)) for name in unet.names()})
    autoencoder = _part(checkpoint, AUTOENCODER_PREFIXES, "vae")
    if autoencoder is not None:
        _name_autoencoder(autoencoder)
    return _Parts(
        unet,
        autoencoder,
        _original_text_encoders(checkpoint, kind),
        "v_pred" in checkpoint or _metadata_says_v(checkpoint),
        "ztsnr" in checkpoint or None,
    )


def _part(checkpoint: Checkpoint, prefixes: tuple[str, ...], part: str) -> TensorSource | None:
    """The tensors whose keys start with one of ``prefixes``, and no others; None where there are none."""
    source = TensorSource(checkpoint, prefixes, part)
    source.drop([name for name, origin in source.origins.items() if not origin.keys[0].startswith(prefixes)])
    return source if source.origins else None


def _metadata_says_v(checkpoint: Checkpoint) -> bool | None:
    return {"v": True, "epsilon": False}.get(checkpoint.metadata.get("modelspec.prediction_type", ""))


def _original_text_encoders(checkpoint: Checkpoint, kind: Kind) -> tuple[TensorSource, ...]:
    if any(key.startswith(REFINER_OPEN_CLIP) for key in checkpoint):
        raise UserError(f"{checkpoint.label} is the refiner of Stable Diffusion XL; the base model is needed here.")
    if kind.name == "sdxl":
        wanted: tuple[tuple[str, str], ...] = ((SDXL_HUGGING_FACE, "text_encoder"), (SDXL_OPEN_CLIP, "text_encoder_2"))
    else:
        is_open_clip = any(key.startswith(OPEN_CLIP) for key in checkpoint)
        wanted = ((OPEN_CLIP if is_open_clip else HUGGING_FACE, "text_encoder"),)
    encoders = []
    for prefix, part in wanted:
        source = _part(checkpoint, (prefix,), part)
        if source is None:
            raise UserError(
                f'{checkpoint.label} is {kind.description} without a text encoder: no key starts with "{prefix}".'
            )
        if prefix in (OPEN_CLIP, SDXL_OPEN_CLIP):
            _name_open_clip(source, drops_last=prefix == OPEN_CLIP)
        else:
            _name_hugging_face(source)
        encoders.append(source)
    return tuple(encoders)


def _name_hugging_face(source: TensorSource, is_projected: bool = False) -> None:
    name_below_text_model(source)
    source.drop(["logit_scale"] if is_projected else ["logit_scale", "text_projection.weight", "text_projection"])


def _name_open_clip(source: TensorSource, drops_last: bool) -> None:
    """Stable Diffusion 2 uses the next-to-last layer's output, so the last layer is left out with the projection."""
    layers = source.count(r"transformer\.resblocks\.(\d+)\.")
    if drops_last and layers != OPEN_CLIP_H_LAYERS - 1:
        layers -= 1
        source.drop([name for name in source.names() if name.startswith(f"transformer.resblocks.{layers}.")])
    if drops_last:
        source.drop([name for name in source.names() if name.startswith("text_projection")])
    source.drop([name for name in source.names() if name.endswith(("logit_scale", "position_ids", "attn_mask"))])
    for name in source.names():  # those that become others' rows or columns
        if name.endswith((".in_proj_weight", ".in_proj_bias")) or name == "text_projection":
            source.sizes(name, 1 if name.endswith("_bias") else 2)
    source.remap(open_clip_origins({name: source.shape(name) for name in source.names()}, layers))


def _name_autoencoder(source: TensorSource) -> None:
    """Original names become Diffusers', and the attention's 1x1 convolutions matrices; both layouts come in."""
    own = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    source.drop([name for name in source.names() if not name.startswith(own)])  # what the training of a VAE leaves
    table = autoencoder_table(
        source.count(r"encoder\.down\.(\d+)\."), source.count(r"encoder\.down\.0\.block\.(\d+)\.")
    )
    origins = {}
    for name in source.names():
        new = renamed(name, table) or name
        head, attention, rest = new.partition(".attentions.0.")
        if attention:
            layer, _, kind = rest.rpartition(".")
            shape = source.shape(name)
            is_convolution = len(shape) == 4 and shape[2:] == (1, 1)
            new = f"{head}{attention}{OLD_ATTENTION.get(layer, layer)}.{kind}"
            origins[new] = Origin((name,), shape=shape[:2] if is_convolution else None)
        elif new != name:
            origins[new] = Origin((name,))
    source.remap(origins)


# Diffusers folders


def _open_folder(path: Path, with_autoencoder: bool, disable_mmap: bool, option: str) -> _Parts:
    unet = open_checkpoint(path / "unet", None, disable_mmap, option)
    refuse_unless(unet, {"sd1", "sd2", "sdxl"}, WANTED)
    encoders = []
    for part in ("text_encoder", "text_encoder_2"):
        if (path / part).is_dir():
            source = TensorSource(open_checkpoint(path / part, None, disable_mmap, option), part=part)
            _name_hugging_face(source, is_projected=part == "text_encoder_2")
            encoders.append(source)
    autoencoder = None
    if with_autoencoder and (path / "vae").is_dir():
        autoencoder = TensorSource(open_checkpoint(path / "vae", None, disable_mmap, option), part="vae")
        refuse_unless(autoencoder.checkpoint, {"sd-vae"}, WANTED_VAE, AUTOENCODER_PREFIXES)
        _name_autoencoder(autoencoder)
    scheduler = _read_scheduler(path / "scheduler" / "scheduler_config.json")
    return _Parts(
        TensorSource(unet, part="unet"),
        autoencoder,
        tuple(encoders),
        PREDICTIONS.get(scheduler.get("prediction_type", "")),
        scheduler.get("rescale_betas_zero_snr"),
    )


def _read_scheduler(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a valid scheduler configuration.")
    if str(config.get("_class_name")).startswith("EDM"):
        raise UserError(f"{path.parent.parent} {EDM}")
    prediction = config.get("prediction_type")
    if prediction is not None and prediction not in PREDICTIONS:
        raise UserError(
            f'{path}: the prediction type "{prediction}" is not supported, only {" and ".join(PREDICTIONS)}.'
        )
    return config


# What shapes tell


def infer_variant(unet: TensorSource) -> Variant:
    """The family of a U-Net under Diffusers' names.

    XL is conditioned on sizes; 2.x is 1024 wide in the text, or has matrices where 1.x has 1x1 convolutions.
    """
    if any(name.startswith("add_embedding.") for name in unet.names()):
        return "sdxl"
    is_linear = len(unet.shape("down_blocks.0.attentions.0.proj_in.weight")) == 2
    return "sd2" if is_linear or _context_width(unet) == 1024 else "sd1"


def _context_width(unet: TensorSource) -> int:
    return unet.sizes("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight", 2)[1]


def _text_encoders(variant: Variant, parts: _Parts) -> tuple[ClipFile, ...]:
    """Raises UserError unless there are as many as the U-Net needs, and as wide together as its cross-attention."""
    label = parts.unet.checkpoint.label
    needed = 2 if variant == "sdxl" else 1
    if len(parts.text_encoders) != needed:
        raise UserError(f"{label} has {len(parts.text_encoders)} text encoders; this U-Net needs {needed}.")
    first_activation = "gelu" if variant == "sd2" else "quick_gelu"
    encoders = [clip_file(parts.text_encoders[0], first_activation)]
    encoders += [clip_file(source, "gelu", is_projected=True) for source in parts.text_encoders[1:]]
    width = sum(encoder.hidden_size for encoder in encoders)
    if width != _context_width(parts.unet):
        raise UserError(
            f"{label}: the U-Net reads text {_context_width(parts.unet)} wide, but its text encoder gives {width}."
        )
    return tuple(encoders)


def infer_unet_config(source: TensorSource, variant: Variant, pooled_width: int | None = None) -> dict[str, Any]:
    """Arguments of ``UNet2DConditionModel`` from the shapes of tensors under Diffusers' names.

    ``pooled_width`` is that of XL's second text encoder. What shapes cannot give (``attention_head_dim``, which in
    diffusers is the number of heads, and ``norm_num_groups``) follows the published models unless the configuration
    says otherwise. Raises UserError for models with extra inputs and for sizes that don't fit together.
    """
    _refuse_special_inputs(source)
    levels = range(source.count(r"down_blocks\.(\d+)\."))
    widths = [source.sizes(f"down_blocks.{level}.resnets.0.conv1.weight", 4)[0] for level in levels]
    middle = source.count(r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.")
    depths = [source.count(rf"down_blocks\.{level}\.attentions\.\d+\.transformer_blocks\.(\d+)\.") for level in levels]
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    exceptions = source.exceptions
    heads = exceptions.get("num_attention_heads") or exceptions.get("attention_head_dim")
    heads = heads or (HEADS if variant == "sd1" else [width // HEAD_DIM for width in widths])
    _check_heads(source, widths, heads, depths)
    config = {
        "in_channels": source.sizes("conv_in.weight", 4)[1],
        "out_channels": source.sizes("conv_out.weight", 4)[0],
        "block_out_channels": widths,
        "layers_per_block": source.count(r"down_blocks\.0\.resnets\.(\d+)\."),
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        # Diffusers takes the middle's depth from the last level, which has none of its own in some models.
        "transformer_layers_per_block": [*(depth or 1 for depth in depths[:-1]), depths[-1] or middle],
        "attention_head_dim": heads,
        "norm_num_groups": norm_groups(source, widths),
        "cross_attention_dim": _context_width(source),
        "use_linear_projection": len(source.shape("mid_block.attentions.0.proj_in.weight")) == 2,
        "upcast_attention": bool(exceptions.get("upcast_attention", False)),
    }
    if variant == "sdxl":
        inputs = source.sizes("add_embedding.linear_1.weight", 2)[1]
        config["addition_embed_type"] = "text_time"
        config["projection_class_embeddings_input_dim"] = inputs
        config["addition_time_embed_dim"] = _time_id_width(source, inputs, pooled_width)
    return config


def _time_id_width(source: TensorSource, inputs: int, pooled_width: int | None) -> int:
    width, rest = divmod(inputs - (pooled_width or 0), TIME_IDS)
    if pooled_width is None or width <= 0 or rest:
        raise UserError(
            f"{source.checkpoint.label}: its size conditioning ({inputs} inputs) doesn't fit a pooled text of "
            f"{pooled_width} and {TIME_IDS} sizes; the base model of Stable Diffusion XL is needed here."
        )
    return width


def _refuse_special_inputs(source: TensorSource) -> None:
    channels = source.sizes("conv_in.weight", 4)[1]
    if channels != LATENT_CHANNELS:
        special = SPECIAL_INPUTS.get(channels, "a special kind")
        raise UserError(
            f"{source.checkpoint.label} is a Stable Diffusion model with extra image inputs ({special}: {channels} "
            "input channels); a text-to-image model is needed here."
        )


def _check_heads(source: TensorSource, widths: Sequence[int], heads: int | Sequence[int], depths: list[int]) -> None:
    """Raises UserError unless ``heads`` fit the width of every level that attends, which is where a depth isn't 0."""
    counts = [heads] * len(widths) if isinstance(heads, int) else list(heads)
    if len(counts) != len(widths):
        raise UserError(
            f"{source.checkpoint.label}: attention heads are given for {len(counts)} of {len(widths)} levels."
        )
    for level, (width, count) in enumerate(zip(widths, counts)):
        attends = depths[level] > 0 or level == len(widths) - 1  # the middle is as the last level
        if attends and (count < 1 or width % count):
            raise UserError(
                f"{source.checkpoint.label}: {width} channels cannot be split into "
                f"{f'{count} attention heads' if count else f'attention heads of {HEAD_DIM}'}; a model that was made "
                'with another number says so as "attention_head_dim" in the "config" entry of its metadata.'
            )


def open_vae(path: Path | str, variant: Variant, disable_mmap: bool = False, option: str = "--vae") -> VaeFile:
    """Open a replacement autoencoder by its headers only, to be used with a model of the family ``variant``.

    ``path``: a Diffusers folder (or a model's, with ``vae/`` in it), or a file in the original layout, bare or in a
    whole checkpoint, or in Diffusers'. Latents are scaled as the U-Net knows them. Raises UserError, naming ``option``
    and what the file is, when it isn't a Stable Diffusion autoencoder.
    """
    checkpoint = open_checkpoint(path, "vae", disable_mmap, option)
    refuse_unless(checkpoint, {"sd-vae"}, WANTED_VAE, AUTOENCODER_PREFIXES)
    source = _part(checkpoint, AUTOENCODER_PREFIXES, "vae") or TensorSource(checkpoint, part="vae")
    _name_autoencoder(source)
    return _vae_file(source, None, variant)


def _vae_file(source: TensorSource, scaling_factor: float | None, variant: Variant) -> VaeFile:
    """Arguments of ``AutoencoderKL`` from the shapes of tensors under Diffusers' names."""
    latent_channels = source.sizes("decoder.conv_in.weight", 4)[1]
    if latent_channels != LATENT_CHANNELS:
        raise UserError(
            f"{source.checkpoint.label} is an autoencoder with {latent_channels} latent channels; Stable Diffusion's "
            f"have {LATENT_CHANNELS}."
        )
    levels = range(source.count(r"encoder\.down_blocks\.(\d+)\."))
    widths = [source.sizes(f"encoder.down_blocks.{level}.resnets.0.conv1.weight", 4)[0] for level in levels]
    config = {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": source.count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": latent_channels,
        "norm_num_groups": norm_groups(source, widths),
        "scaling_factor": float(scaling_factor or SCALING_FACTORS[variant]),
        "sample_size": 1024 if variant == "sdxl" else 512,
    }
    return VaeFile(source, config)
