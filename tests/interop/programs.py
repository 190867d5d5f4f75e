"""By which rules ComfyUI and AUTOMATIC1111's web UI find a LoRA file's layers, and what they make of a weight.

Neither can be installed beside this suite, so their rules stand here as tables and formulas, written from what their
sources do: ComfyUI of 2026 (comfy/lora.py, comfy/weight_adapter), web UI 1.10 (extensions-builtin/Lora).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache

import torch
from torch import Tensor

from tests.interop.workbench import Weights, Workbench

Names = dict[str, str]  # a name in files -> the layer's name by our files
Layer = dict[str, Tensor]  # the tensors of a layer in a file by what stands after its name
Dora = Callable[[Tensor, Tensor, Tensor], Tensor]  # a weight, what is added, the scale -> the new weight

CLIP_LAYERS = ("mlp.fc1", "mlp.fc2", *(f"self_attn.{name}_proj" for name in ("k", "q", "v", "out")))


def flat(path: str) -> str:
    """A path with underscores for dots."""
    return path.replace(".", "_")


# ---- Stable Diffusion's U-Net under its two kinds of paths -----------------------------------------------------------

RESNET = {"in_layers.2": "conv1", "out_layers.3": "conv2", "emb_layers.1": "time_emb_proj"}
RESNET |= {"skip_connection": "conv_shortcut", "in_layers.0": "norm1", "out_layers.0": "norm2"}
OUTER = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
OUTER |= {"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
OUTER |= {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}


def both_paths(path: str, levels: int) -> tuple[str, str]:
    """The original path and Diffusers' of a layer, given either; of a model with ``levels`` levels of two blocks each.

    The original code numbers the blocks of all levels through, with a third one in each level that changes the size;
    inside a block, 0 is the residual part, 1 the attention.
    """
    inverted = {theirs: ours for ours, theirs in OUTER.items()}
    if path in OUTER or path in inverted:
        return (path, OUTER[path]) if path in OUTER else (inverted[path], path)
    pairs = dict(_blocks(levels))
    for original, diffusers in pairs.items():
        for ours, theirs, is_original in ((original, diffusers, True), (diffusers, original, False)):
            if path.startswith(f"{ours}."):
                rest = path[len(ours) + 1 :]
                if "resnets" in diffusers:
                    table = RESNET if is_original else {value: key for key, value in RESNET.items()}
                    other = f"{theirs}.{table[rest]}"
                else:
                    other = f"{theirs}.{rest}"
                return (path, other) if is_original else (other, path)
            if path == ours:
                return (path, theirs) if is_original else (theirs, path)
    raise KeyError(path)


def _blocks(levels: int) -> Iterator[tuple[str, str]]:
    for level in range(levels):
        for number in range(2):
            block = 1 + 3 * level + number
            yield f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{number}"
            yield f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{number}"
        yield f"input_blocks.{3 + 3 * level}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
        has_attention = level > 0 if levels == 4 else level < 2
        for number in range(3):
            yield f"output_blocks.{3 * level + number}.0", f"up_blocks.{level}.resnets.{number}"
            yield f"output_blocks.{3 * level + number}.1", f"up_blocks.{level}.attentions.{number}"
        yield f"output_blocks.{3 * level + 2}.{2 if has_attention else 1}.conv", f"up_blocks.{level}.upsamplers.0.conv"
    for original, diffusers in (("0", "resnets.0"), ("1", "attentions.0"), ("2", "resnets.1")):
        yield f"middle_block.{original}", f"mid_block.{diffusers}"


@cache
def unet_paths(bench: Workbench) -> dict[str, tuple[str, str]]:
    """The original path and Diffusers' of every layer of a U-Net, by the layer's name."""
    levels = 3 if bench.family == "sdxl" else 4
    return {name: both_paths(path, levels) for part, path, name in bench.paths if part == "unet"}


# ---- ComfyUI ---------------------------------------------------------------------------------------------------------

_HUNYUAN_IMAGE = (  # paths of its own class
    (r"(_mod|\.modulation)\.linear$", r"\1.lin"),
    (r"_attn_(qkv|proj)$", r"_attn.\1"),
    (r"mlp\.fc1$", "mlp.0"),
    (r"mlp\.fc2$", "mlp.2"),
)


def comfyui_names(bench: Workbench) -> Names:
    """The names that ComfyUI looks for in a LoRA file for these models."""
    names: Names = {}
    originals = unet_paths(bench) if bench.family.startswith("sd") else {}
    for part, path, name in bench.paths:
        if part == "unet":
            original, diffusers = originals.get(name, (path, ""))
            if bench.family == "hunyuan_image":
                for pattern, theirs in _HUNYUAN_IMAGE:
                    original = re.sub(pattern, theirs, original)
            names |= {f"lora_unet_{flat(original)}": name, f"diffusion_model.{original}": name}
            if diffusers:
                names |= {f"{prefix}_{flat(diffusers)}": name for prefix in ("lora_unet", "lycoris")}
            continue
        names[f"text_encoders.{part}.transformer.{'model.' if part == 'gemma2_2b' else ''}{path}"] = name
        if part in ("clip_l", "clip_h", "clip_g") and path.endswith(CLIP_LAYERS):
            prefixes = ("lora_te2",) if part == "clip_g" else ("lora_te", "lora_te1")
            names |= {f"{prefix}_{flat(path)}": name for prefix in prefixes}
        elif part == "t5xxl":
            prefixes = ("lora_te2", "lora_te3") if "clip_l" in bench.parts else ("lora_te1",)
            names |= {f"{prefix}_{flat(path)}": name for prefix in prefixes}
        elif part == "gemma2_2b":
            names[f"lora_te_{flat(path)}"] = name
    return names


def in_comfyui(bench: Workbench, tensors: Mapping[str, Tensor]) -> Weights:
    """The weights as ComfyUI changes them."""
    return _changed(bench, tensors, comfyui_names(bench), _comfyui_dora, alpha_is_per_output=False)


def _comfyui_dora(weight: Tensor, difference: Tensor, scale: Tensor) -> Tensor:
    """Where there is a scale for each output, the norm is that of the weight without the difference."""
    by_output = scale.shape[0] == weight.shape[0]
    norm = row_norm(weight) if by_output else column_norm(weight + difference)
    return (weight + difference) * (scale / (norm + torch.finfo(weight.dtype).eps))


def row_norm(weight: Tensor) -> Tensor:
    """Of each output [out, 1, ...]."""
    return weight.flatten(1).norm(dim=1).view(-1, *(1 for _ in weight.shape[1:]))


def column_norm(weight: Tensor) -> Tensor:
    """Of each input [1, in, ...]."""
    return row_norm(weight.transpose(0, 1)).transpose(0, 1)


# ---- AUTOMATIC1111's web UI ------------------------------------------------------------------------------------------


def web_ui_names(bench: Workbench) -> Names:
    """The names that the web UI looks for; it has no models but Stable Diffusion 1.x, 2.x and XL."""
    names: Names = {}
    if not bench.family.startswith("sd"):
        return names
    for name, (original, diffusers) in unet_paths(bench).items():
        names |= {f"{prefix}_{flat(original)}": name for prefix in ("lora_unet", "oft_unet")}
        if bench.family != "sdxl":  # its numbers of blocks are those of the other two
            names[f"lora_unet_{flat(diffusers)}"] = name
    for part, path, name in bench.paths:
        if part != "unet" and path.endswith(CLIP_LAYERS):
            prefix = {"clip_l": "lora_te1" if bench.family == "sdxl" else "lora_te", "clip_g": "lora_te2"}
            names[f"{prefix.get(part, 'lora_te')}_{flat(path)}"] = name
    return names


def in_web_ui(bench: Workbench, tensors: Mapping[str, Tensor]) -> Weights:
    """The weights as the web UI changes them."""
    return _changed(bench, tensors, web_ui_names(bench), _web_ui_dora, alpha_is_per_output=True)


def _web_ui_dora(weight: Tensor, difference: Tensor, scale: Tensor) -> Tensor:
    """It knows scales for inputs alone."""
    return (weight + difference) * (scale / column_norm(weight + difference))


# ---- what a layer's tensors make of its weight -----------------------------------------------------------------------


def _changed(
    bench: Workbench, tensors: Mapping[str, Tensor], names: Names, dora: Dora, alpha_is_per_output: bool
) -> Weights:
    weights = dict(bench.weights)
    found: dict[str, Layer] = {}
    for key, tensor in tensors.items():
        name = next((key[:at] for at in _dots(key) if key[:at] in names), None)
        if name is not None:
            found.setdefault(name, {})[key[len(name) + 1 :]] = tensor
    for name, own in found.items():
        weights[names[name]] = _merged(weights[names[name]], own, dora, alpha_is_per_output)
    return weights


def _dots(key: str) -> Iterator[int]:
    return (at for at, character in enumerate(key) if character == ".")


def _merged(weight: Tensor, found: Layer, dora: Dora, alpha_is_per_output: bool) -> Tensor:
    if "oft_blocks" in found:
        return turned(weight, found["oft_blocks"], found["alpha"].item() * (len(weight) if alpha_is_per_output else 1))
    for kind in ("w_norm", "diff"):
        if kind in found:
            return weight + found[kind].reshape(weight.shape)
    difference = _difference(found, weight)
    if difference is None:
        return weight
    difference = difference.reshape(weight.shape)
    return dora(weight, difference, found["dora_scale"]) if "dora_scale" in found else weight + difference


def _difference(found: Layer, weight: Tensor) -> Tensor | None:
    def product(one: str, two: str) -> Tensor:
        return found[one].flatten(1) @ found[two].flatten(1)

    rank, difference = 1, None
    for down, up in (("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")):
        if down in found:
            rank, difference = len(found[down]), product(up, down)
    if "hada_w1_a" in found:
        rank = len(found["hada_w1_b"])
        difference = product("hada_w1_a", "hada_w1_b") * product("hada_w2_a", "hada_w2_b")
    if "lokr_w1" in found or "lokr_w1_a" in found:
        halves, ranks = [], []
        for half in ("lokr_w1", "lokr_w2"):
            if half in found:
                halves.append(found[half])
            else:
                ranks.append(len(found[f"{half}_b"]))
                halves.append(product(f"{half}_a", f"{half}_b"))
                if half == "lokr_w2" and found[f"{half}_b"].dim() == 4:
                    halves[-1] = halves[-1].reshape(len(found[f"{half}_a"]), *found[f"{half}_b"].shape[1:])
        first = halves[0].view(*halves[0].shape, *(1 for _ in range(halves[1].dim() - 2)))
        difference = torch.kron(first, halves[1])
        rank = ranks[-1] if ranks else 0
    if difference is None:
        return None
    strength = found["alpha"].item() / rank if "alpha" in found and rank else 1.0
    return strength * difference


def turned(weight: Tensor, blocks: Tensor, constraint: float) -> Tensor:
    """OFT: the outputs in blocks, each turned by a Cayley transform whose generator's norm is limited."""
    skew = blocks - blocks.transpose(1, 2)
    if constraint > 0:
        skew = skew * (constraint / skew.norm()).clamp(max=1)
    identity = torch.eye(skew.shape[1])
    turn = (identity + skew) @ torch.linalg.inv(identity - skew)
    parts = weight.unflatten(0, turn.shape[:2])
    return torch.einsum("knm,kn...->km...", turn, parts).flatten(0, 1)
