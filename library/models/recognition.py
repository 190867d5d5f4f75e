"""What a checkpoint is, inferred from its tensors' names and shapes, so that a file of the wrong family is named."""

from __future__ import annotations

import bisect
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from library.checkpoints import Checkpoint
from library.errors import UserError

# Names under which programs put a whole model into one file together with its other parts.
TRANSFORMER_PREFIXES = ("model.diffusion_model.",)
AUTOENCODER_PREFIXES = ("vae.", "first_stage_model.")
CLIP_L_PREFIXES = ("text_encoders.clip_l.transformer.", "conditioner.embedders.0.transformer.")
T5_PREFIXES = ("text_encoders.t5xxl.transformer.",)
GEMMA2_PREFIXES = (
    *("text_encoders.gemma2_2b.transformer.model.", "gemma2_2b.transformer.model.", "transformer.model."),
    *("model.", ""),
)
QWEN2_5_VL_PREFIXES = (
    *("text_encoders.qwen25_7b.transformer.model.", "qwen25_7b.transformer.model.", "transformer.model."),
    *("model.language_model.", "language_model.model.", "model.", ""),
)
BYT5_PREFIXES = ("text_encoders.byt5_small.transformer.", "byt5_small.transformer.", "module.text_tower.")
PART_PREFIXES = (
    *("model.diffusion_model.", "vae.", "first_stage_model.", "text_encoders.", "conditioner.", "cond_stage_model."),
    *("model_ema.", "loss."),  # what a training run leaves in its files
)

LORA_KEY = re.compile(
    r"\.(lora_(down|up|A|B|mid)|hada_w\d_[ab]|lokr_w\d(_[ab])?|oft_blocks|oft_diag)(\.|$)|_lora\.(down|up)\."
)


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint.

    ``keys`` are names that it has (a trailing dot: any name that starts so), ``without`` one that it doesn't have,
    ``sized`` a (key, axis, size) that tells it from its likes.
    """

    name: str
    description: str
    keys: tuple[str, ...]
    without: str | None = None
    sized: tuple[str, int, int] | None = None


SD_ATTENTION = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
SDXL_ATTENTION = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
UNET_ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
FLUX_DOUBLE = "double_blocks.0.img_attn.qkv.weight"
REFINER = "txt_in.individual_token_refiner."
DIFFUSERS_REFINER = "context_embedder.token_refiner."
HUNYUAN_LATENTS = "img_in.proj.weight"
DIFFUSERS_LATENTS = "x_embedder.proj.weight"
DIFFUSERS_TIME = "time_guidance_embed."
IMAGE_REFINER = "the refiner of HunyuanImage-2.1 (it works on images that are there already), which is not supported"
DISTILLED = "a distilled HunyuanImage-2.1 file (few steps, guidance built in), which cannot be trained"
JOINT = "transformer_blocks.0.attn.add_k_proj.weight"
DIFFUSERS_POOLED = "time_text_embed.text_embedder.linear_1.weight"
CAPTIONS = "cap_embedder.1.weight"
DIFFUSERS_CAPTIONS = "time_caption_embed.caption_embedder.1.weight"
APPROXIMATOR = "distilled_guidance_layer.in_proj.weight"
ENCODER = "encoder.down.0.block.0.conv1.weight"
DIFFUSERS_ENCODER = "encoder.down_blocks.0.resnets.0.conv1.weight"
FLATTENED_ENCODER = "encoder.down_blocks.0.conv1.weight"
DECODER = "decoder.conv_in.weight"
CLIP = "text_model.encoder.layers.0.self_attn.q_proj.weight"
T5 = "encoder.block.0.layer.0.SelfAttention.q.weight"
LLM = "layers.0.self_attn.q_proj.weight"
LLM_NORM = "layers.0.post_attention_layernorm.weight"
GEMMA_NORM = "layers.0.pre_feedforward_layernorm.weight"
LLM_WORDS = "embed_tokens.weight"
LLM_PREFIXES = ("model.", "", "language_model.model.", "model.language_model.")
CONTROLNET = "controlnet_blocks."
IN_DIFFUSERS = "in the Diffusers layout"


def _language_models(prefix: str) -> Iterator[Kind]:
    """Language models, whose names have ``prefix`` in front."""
    query_norm, query_bias = "layers.0.self_attn.q_norm.weight", "layers.0.self_attn.q_proj.bias"
    for tower in ("visual.", "model.visual."):  # it has the same name under every prefix
        yield Kind("qwen3-vl", "a Qwen3-VL text encoder", (prefix + LLM, prefix + query_norm, tower))
        of_qwen2 = (prefix + LLM, prefix + query_bias, tower + "blocks.0.mlp.fc1.weight")
        yield Kind("qwen2-vl", "a Qwen2-VL text encoder (of the generation before Qwen2.5-VL)", of_qwen2)
    for name, description, keys in (
        ("gemma3", "a Gemma 3 text encoder", (LLM, GEMMA_NORM, query_norm)),
        ("gemma2", "a Gemma 2 text encoder", (LLM, GEMMA_NORM)),
        ("qwen3", "a Qwen 3 text encoder", (LLM, query_norm)),
        ("qwen2.5-vl", "a Qwen2.5-VL text encoder", (LLM, query_bias)),
    ):
        yield Kind(name, description, tuple(prefix + key for key in keys))
    gemma_keys = tuple(prefix + key for key in (LLM, LLM_NORM, LLM_WORDS))
    yield Kind("gemma1", "a text encoder of the first Gemma", gemma_keys, sized=(prefix + LLM_WORDS, 0, 256000))
    yield Kind("llm", "a language model (Llama type)", (prefix + LLM,))


# The first that fits is taken, so the more special stand above the more general.
KINDS = (
    Kind("flux-controlnet", "a FLUX ControlNet file", (CONTROLNET, FLUX_DOUBLE)),
    Kind(
        "flux-controlnet-diffusers",
        f"a FLUX ControlNet file {IN_DIFFUSERS}",
        (CONTROLNET, JOINT, "controlnet_x_embedder.", "x_embedder.weight", DIFFUSERS_POOLED),
    ),
    Kind("sd-controlnet", f"a Stable Diffusion ControlNet file {IN_DIFFUSERS}", ("controlnet_cond_embedding.",)),
    Kind("sd-controlnet", "a Stable Diffusion ControlNet file", ("control_model.input_hint_block.",)),
    Kind("sd-controlnet", "a Stable Diffusion ControlNet file", ("input_hint_block.", "zero_convs.")),
    Kind("controlnet", "a ControlNet file of another model family", (CONTROLNET,)),
    Kind("chroma-radiance", "a Chroma Radiance file (pixel space), which is not supported", ("nerf_blocks.",)),
    Kind("chroma-x0", "a Chroma file of the x0-prediction variant, which is not supported", (APPROXIMATOR, "__x0__")),
    Kind("chroma", "a Chroma file", (APPROXIMATOR, FLUX_DOUBLE)),
    Kind("chroma-diffusers", f"a Chroma file {IN_DIFFUSERS}", (APPROXIMATOR, JOINT)),
    Kind("flux2", "a FLUX.2 file", ("single_stream_modulation.",)),
    Kind("flux", "a FLUX.1 file", (FLUX_DOUBLE, "img_in.weight", "vector_in.in_layer.weight")),
    Kind("flux-diffusers", f"a FLUX.1 file {IN_DIFFUSERS}", (JOINT, "x_embedder.weight", DIFFUSERS_POOLED)),
    Kind("hunyuan-video", "a HunyuanVideo file", (REFINER, "vision_in.")),
    Kind("hunyuan-image-refiner", IMAGE_REFINER, (REFINER, HUNYUAN_LATENTS), sized=(HUNYUAN_LATENTS, 1, 128)),
    Kind("hunyuan-image-distilled", DISTILLED, (REFINER, "byt5_in.", "time_r_in.")),
    Kind("hunyuan-image-distilled", DISTILLED, (REFINER, "byt5_in.", "guidance_in.")),
    Kind("hunyuan-image", "a HunyuanImage-2.1 file", (REFINER, "byt5_in.")),
    Kind("hunyuan-video", "a HunyuanVideo file", (REFINER,)),
    Kind(
        "hunyuan-image-refiner",
        IMAGE_REFINER,
        (DIFFUSERS_REFINER, DIFFUSERS_TIME, DIFFUSERS_LATENTS),
        sized=(DIFFUSERS_LATENTS, 1, 128),
    ),
    Kind("hunyuan-image-distilled", DISTILLED, (DIFFUSERS_REFINER, f"{DIFFUSERS_TIME}timestep_embedder_r.")),
    Kind("hunyuan-image-distilled", DISTILLED, (DIFFUSERS_REFINER, f"{DIFFUSERS_TIME}guidance_embedder.")),
    Kind(
        "hunyuan-image-diffusers",
        f"a HunyuanImage-2.1 file {IN_DIFFUSERS}",
        (DIFFUSERS_REFINER, DIFFUSERS_TIME, "context_embedder_2."),
    ),
    Kind("hunyuan-video", f"a HunyuanVideo file {IN_DIFFUSERS}", (DIFFUSERS_REFINER,)),
    Kind("sd3", "a Stable Diffusion 3 file", ("joint_blocks.0.context_block.attn.qkv.weight",)),
    Kind("sd3", f"a Stable Diffusion 3 file {IN_DIFFUSERS}", (JOINT, "pos_embed.proj.weight")),
    Kind("qwen-image", "a Qwen-Image file", (JOINT, "txt_norm.weight")),
    Kind("z-image", "a Z-Image file", (CAPTIONS, "context_refiner.", "cap_pad_token")),
    Kind("lumina", "a Lumina Image 2.0 file", (CAPTIONS, "context_refiner.")),
    Kind("omnigen2", "an OmniGen2 file", (DIFFUSERS_CAPTIONS, "ref_image_refiner.")),
    Kind("lumina-diffusers", f"a Lumina Image 2.0 file {IN_DIFFUSERS}", (DIFFUSERS_CAPTIONS, "context_refiner.")),
    Kind("sdxl", "a Stable Diffusion XL file", (SDXL_ATTENTION,), without=SD_ATTENTION),
    Kind("sd2", "a Stable Diffusion 2.x file", (SD_ATTENTION,), sized=(SD_ATTENTION, 1, 1024)),
    Kind("sd1", "a Stable Diffusion 1.x file", (SD_ATTENTION,)),
    Kind("sdxl", f"a Stable Diffusion XL file {IN_DIFFUSERS}", (UNET_ATTENTION, "add_embedding.")),
    Kind("sd2", f"a Stable Diffusion 2.x file {IN_DIFFUSERS}", (UNET_ATTENTION,), sized=(UNET_ATTENTION, 1, 1024)),
    Kind("sd1", f"a Stable Diffusion 1.x file {IN_DIFFUSERS}", (UNET_ATTENTION,)),
    Kind("wan", "a Wan video file", ("blocks.0.cross_attn.norm_k.weight", "text_embedding.0.weight")),
    Kind("pixart", "a PixArt file", ("blocks.0.cross_attn.kv_linear.weight",)),
    Kind("aura-flow", "an AuraFlow file", ("double_layers.0.attn.w1q.weight",)),
    Kind("hunyuan-vae", "a HunyuanImage autoencoder", (ENCODER, DECODER), sized=(DECODER, 1, 64)),
    Kind(
        "hunyuan-vae-diffusers",
        f"a HunyuanImage autoencoder {IN_DIFFUSERS}",
        (FLATTENED_ENCODER, DECODER),
        sized=(DECODER, 1, 64),
    ),
    Kind("sd-vae", "a Stable Diffusion autoencoder (VAE)", (ENCODER, "quant_conv.weight")),
    Kind("ae", "a FLUX autoencoder (AE)", (ENCODER, DECODER)),
    Kind("sd-vae", f"a Stable Diffusion autoencoder (VAE) {IN_DIFFUSERS}", (DIFFUSERS_ENCODER, "quant_conv.weight")),
    Kind("ae-diffusers", f"an autoencoder (VAE) {IN_DIFFUSERS}", (DIFFUSERS_ENCODER, DECODER)),
    Kind("clip-full", "a full CLIP file (text and image)", (CLIP, "vision_model.")),
    Kind("clip-g", "a CLIP-G text encoder", (CLIP,), sized=(CLIP, 0, 1280)),
    Kind("clip-l", "a CLIP-L text encoder", (CLIP,)),
    Kind(
        "clip-l", "a CLIP text encoder", ("encoder.layers.0.self_attn.q_proj.weight", "embeddings.position_embedding.")
    ),
    Kind("open-clip", "a text encoder in the OpenCLIP layout", ("transformer.resblocks.",)),
    *(
        Kind("byt5-glyph", "a glyph ByT5 text encoder", (T5, words), sized=(words, 0, 1510))
        for words in ("shared.weight", "encoder.embed_tokens.weight")
    ),
    Kind("byt5", "a ByT5 text encoder", (T5,), sized=(T5, 1, 1472)),
    Kind("t5-full", "a full T5 file (encoder and decoder)", (T5, "decoder.block.")),
    Kind("t5", "a T5 text encoder", (T5,)),
    *(kind for prefix in LLM_PREFIXES for kind in _language_models(prefix)),
)


def recognise(checkpoint: Checkpoint, prefixes: tuple[str, ...] = TRANSFORMER_PREFIXES) -> Kind | None:
    """The kind of a checkpoint, or None when it is none that we know.

    Where keys start with one of ``prefixes``, only those are looked at: that part of an all-in-one file.
    """
    tried = (names_of_part(checkpoint, group) for group in (prefixes, TRANSFORMER_PREFIXES, AUTOENCODER_PREFIXES))
    originals = next(filter(None, tried), None) or {key: key for key in checkpoint}
    if any(map(LORA_KEY.search, originals)):
        return Kind("lora", "a LoRA file", ())
    in_order = sorted(originals)
    for kind in KINDS:
        if not all(_has(in_order, key) for key in kind.keys) or kind.without in originals:
            continue
        if kind.sized is None:
            return kind
        name, dimension, size = kind.sized
        if checkpoint.shape(originals[name])[dimension : dimension + 1] == (size,):
            return kind
    return None


def names_of_part(checkpoint: Checkpoint, prefixes: tuple[str, ...]) -> dict[str, str]:
    """One part's names without prefix, and the file's keys; empty where no key starts with one of ``prefixes``.

    Keys without any known prefix belong to the part too: files exist in which only some keys carry it.
    """
    if not any(key.startswith(prefixes) for key in checkpoint):
        return {}
    names = {}
    for key in checkpoint:
        if key.startswith(prefixes):
            names[key.removeprefix(next(filter(key.startswith, prefixes)))] = key
        elif not key.startswith(PART_PREFIXES):
            names[key] = key
    return names


def _has(names: Sequence[str], key: str) -> bool:
    """Whether ``key``, or for one that ends in a dot a name that starts with it, is among names in order."""
    place = bisect.bisect_left(names, key)
    found = names[place] if place < len(names) else ""
    return found.startswith(key) if key.endswith(".") else found == key


def refuse_unless(
    checkpoint: Checkpoint, kinds: Collection[str], wanted: str, prefixes: tuple[str, ...] = TRANSFORMER_PREFIXES
) -> Kind:
    """The checkpoint's kind; raises UserError unless its name is one of ``kinds``.

    The message says what the file is, and that ``wanted`` ("a FLUX.1 transformer") is needed.
    """
    kind = recognise(checkpoint, prefixes)
    if kind is not None and kind.name in kinds:
        return kind
    what = f"is {kind.description}" if kind is not None else "is not a checkpoint of a known kind"
    raise UserError(f"{checkpoint.label} {what}; {wanted} is needed here.")
