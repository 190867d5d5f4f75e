"""LoRA files as other programs write them: the names that their published files have, made from the same numbers.

Each layout is a rule for names. What a layer of a file does is known beforehand (``Numbers``), so that what this suite
makes of the file can be compared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.interop.programs import CLIP_LAYERS, column_norm, row_norm, unet_paths
from tests.interop.workbench import Weights, Workbench

RANK, ALPHA = 3, 6.0
DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
LUMINA = {
    "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.out": ("attn.to_out.0",),
    "feed_forward.w1": ("feed_forward.linear_1",),
    "feed_forward.w2": ("feed_forward.linear_2",),
    "feed_forward.w3": ("feed_forward.linear_3",),
    "adaLN_modulation.1": ("norm1.linear",),
}
HUNYUAN_IMAGE = {"_attn.qkv": "_attn_qkv", "_attn.proj": "_attn_proj", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
HUNYUAN_IMAGE |= {"_mod.lin": "_mod.linear", "modulation.lin": "modulation.linear"}


@dataclass(frozen=True)
class Named:
    """A layer, or rows of one, under the name that a program gives it."""

    name: str
    layer: str
    """By our files' names."""
    rows: slice


@dataclass(frozen=True)
class Layout:
    """How a program names layers and tensors."""

    names: Callable[[Workbench], Iterator[Named]]
    keys: tuple[str, str] = (".lora_down.weight", ".lora_up.weight")
    has_alpha: bool = True
    scales: str = ""
    """Of DoRA: "out" or "in" for ``.dora_scale``, "peft" for PEFT's magnitudes, none."""

    def file(self, bench: Workbench) -> tuple[dict[str, Tensor], Weights]:
        """The tensors of a file with random numbers, and what each weight becomes with it."""
        generator = torch.Generator().manual_seed(5)
        tensors, weights = {}, {name: weight.clone() for name, weight in bench.weights.items()}
        for one in self.names(bench):
            base = bench.weights[one.layer][one.rows]
            down = torch.randn(RANK, *base.shape[1:], generator=generator) * 0.3
            up = torch.randn(len(base), RANK, *(1 for _ in base.shape[2:]), generator=generator) * 0.3
            strength = ALPHA / RANK if self.has_alpha else 1.0
            summed = base + (strength * up.flatten(1) @ down.flatten(1)).reshape(base.shape)
            tensors |= {one.name + self.keys[0]: down, one.name + self.keys[1]: up}
            if self.has_alpha:
                tensors[f"{one.name}.alpha"] = torch.tensor(ALPHA)
            if self.scales:
                norm = (column_norm if self.scales == "in" else row_norm)(summed)
                scale = norm * (0.5 + torch.rand(norm.shape, generator=generator))
                summed = summed * (scale / norm)
                if self.scales == "peft":
                    tensors[f"{one.name}.lora_magnitude_vector"] = scale.flatten()
                else:
                    tensors[f"{one.name}.dora_scale"] = scale
            weights[one.layer][one.rows] = summed
        return tensors, weights


WHOLE = slice(None)


def _blocks(bench: Workbench) -> Iterator[tuple[str, str]]:
    """The path and the name of each layer in the blocks."""
    for part, path, name in bench.paths:
        if part == "unet" and path.split(".")[0] in LISTS and bench.weights[name].dim() > 1:
            yield path, name


LISTS = ("double_blocks", "single_blocks", "layers", "noise_refiner", "context_refiner")


def parts_of(bench: Workbench, path: str, name: str) -> list[tuple[str, slice]]:
    """What Diffusers calls the parts of a layer in the blocks, and the rows of each."""
    lists, number, layer = path.split(".", 2)
    height, width = bench.weights[name].shape
    if lists in ("double_blocks", "single_blocks"):
        if bench.family == "hunyuan_image":
            for theirs, ours in HUNYUAN_IMAGE.items():
                layer = layer.replace(ours, theirs)
        table, prefix = (DOUBLE, "") if lists == "double_blocks" else (SINGLE, "single_")
        names = [f"{prefix}transformer_blocks.{number}.{part}" for part in table[layer]]
        sizes = [width] * 3 + [height - 3 * width] if len(names) > 1 else [height]
    else:
        names = [f"{lists}.{number}.{part}" for part in LUMINA[layer]]
        sizes = [width, (height - width) // 2, (height - width) // 2] if len(names) > 1 else [height]
    edges = [sum(sizes[:index]) for index in range(len(names) + 1)]
    return [(part, slice(begin, end)) for part, begin, end in zip(names, edges, edges[1:])]


def diffusers(prefix: str, separator: str = ".") -> Callable[[Workbench], Iterator[Named]]:
    """Diffusers' names of a transformer's layers behind ``prefix``."""

    def names(bench: Workbench) -> Iterator[Named]:
        for path, name in _blocks(bench):
            for part, rows in parts_of(bench, path, name):
                yield Named(prefix + part.replace(".", separator), name, rows)

    return names


def original(
    prefix: str, separator: str = ".", change: Mapping[str, str] = {}
) -> Callable[[Workbench], Iterator[Named]]:
    """The original names behind ``prefix``, with ``change`` in their ends."""

    def names(bench: Workbench) -> Iterator[Named]:
        for path, name in _blocks(bench):
            for ours, theirs in change.items():
                path = path.replace(ours, theirs)
            yield Named(prefix + path.replace(".", separator), name, WHOLE)

    return names


def numbered(bench: Workbench) -> Iterator[Named]:
    """OneTrainer's newer files: original names, the parts of joined layers by their number."""
    for path, name in _blocks(bench):
        parts = parts_of(bench, path, name)
        for number, (_, rows) in enumerate(parts):
            yield Named(f"transformer.{path}" + (f".{number}" if len(parts) > 1 else ""), name, rows)


def encoders(clip: str, t5: str = "", separator: str = "_") -> Callable[[Workbench], Iterator[Named]]:
    """The layers of CLIP-L (and T5) behind these prefixes."""

    def names(bench: Workbench) -> Iterator[Named]:
        for part, path, name in bench.paths:
            prefix = clip if part == "clip_l" and path.endswith(CLIP_LAYERS) else t5 if part == "t5xxl" else ""
            if prefix and bench.weights[name].dim() > 1:
                yield Named(prefix + path.replace(".", separator), name, WHOLE)

    return names


def together(*rules: Callable[[Workbench], Iterator[Named]]) -> Callable[[Workbench], Iterator[Named]]:
    """What each of the rules names."""
    return lambda bench: (one for rule in rules for one in rule(bench))


def xlabs(bench: Workbench) -> Iterator[Named]:
    """The attention of double blocks, q, k, v of single ones as one, and what follows."""
    for path, name in _blocks(bench):
        lists, number, layer = path.split(".", 2)
        block, width = f"{lists}.{number}.processor", bench.weights[name].shape[1]
        stream = 1 if layer.startswith("img") else 2
        if layer.endswith(("attn.qkv", "attn.proj")):
            yield Named(f"{block}.{layer.rpartition('.')[2]}_lora{stream}", name, WHOLE)
        elif layer in ("linear1", "linear2"):
            yield Named(
                f"{block}.{'qkv' if layer == 'linear1' else 'proj'}_lora",
                name,
                slice(0, 3 * width) if layer == "linear1" else WHOLE,
            )


def unet(prefix: str, separator: str, is_original: bool) -> Callable[[Workbench], Iterator[Named]]:
    """The U-Net's attention behind ``prefix``, by original or Diffusers' paths."""

    def names(bench: Workbench) -> Iterator[Named]:
        for name, paths in unet_paths(bench).items():
            path = paths[0 if is_original else 1]
            if "transformer_blocks" in path and bench.weights[name].dim() > 1:
                yield Named(prefix + path.replace(".", separator), name, WHOLE)

    return names


def clips(first: str, second: str, separator: str) -> Callable[[Workbench], Iterator[Named]]:
    """Stable Diffusion's text encoders behind these prefixes."""

    def names(bench: Workbench) -> Iterator[Named]:
        for part, path, name in bench.paths:
            if part != "unet" and path.endswith(CLIP_LAYERS):
                yield Named((second if part == "clip_g" else first) + path.replace(".", separator), name, WHOLE)

    return names


PEFT = {"keys": (".lora_A.weight", ".lora_B.weight"), "has_alpha": False}
SIMPLE: dict[str, Any] = {"keys": (".down.weight", ".up.weight"), "has_alpha": False}
KOHYA_UNET = together(unet("lora_unet_", "_", False), clips("lora_te_", "", "_"))
KOHYA_XL = together(unet("lora_unet_", "_", True), clips("lora_te1_", "lora_te2_", "_"))
DIFFUSERS_XL = together(unet("lora_unet_", "_", False), clips("lora_te1_", "lora_te2_", "_"))
OMI_UNET = together(unet("unet.", ".", False), clips("clip_l.", "clip_g.", "."))
LAYOUTS: Mapping[str, Mapping[str, Layout]] = {
    "sd-scripts, musubi-tuner, fluxgym": {
        "sd1": Layout(KOHYA_UNET),
        "sdxl": Layout(KOHYA_XL),
        "flux": Layout(together(original("lora_unet_", "_"), encoders("lora_te1_", "lora_te3_"))),
        "chroma": Layout(original("lora_unet_", "_")),
        "lumina": Layout(original("lora_unet_", "_")),
        "hunyuan_image": Layout(original("lora_unet_", "_")),
    },
    "AI-toolkit": {
        "sd1": Layout(KOHYA_UNET),
        "sdxl": Layout(DIFFUSERS_XL),
        "flux": Layout(diffusers("transformer."), **PEFT),
        "chroma": Layout(original("diffusion_model."), **PEFT),
        "lumina": Layout(diffusers("transformer."), **PEFT),
    },
    "OneTrainer": {
        "sd1": Layout(KOHYA_UNET),
        "sdxl": Layout(DIFFUSERS_XL),
        "flux": Layout(together(diffusers("lora_transformer_", "_"), encoders("lora_te1_", "lora_te2_"))),
        "chroma": Layout(together(diffusers("lora_transformer_", "_"), encoders("", "lora_te_"))),
    },
    "OneTrainer, OMI names": {
        "sd1": Layout(together(unet("unet.", ".", True), clips("clip_l.", "", "."))),
        "sdxl": Layout(together(unet("unet.", ".", True), clips("clip_l.", "clip_g.", "."))),
        "flux": Layout(together(numbered, encoders("clip_l.", "t5.", "."))),
        "chroma": Layout(together(numbered, encoders("", "t5.", "."))),
    },
    "OneTrainer, DoRA": {
        "sd1": Layout(KOHYA_UNET, scales="in"),
        "sdxl": Layout(DIFFUSERS_XL, scales="out"),
        "flux": Layout(together(diffusers("lora_transformer_", "_"), encoders("lora_te1_")), scales="in"),
        "chroma": Layout(diffusers("lora_transformer_", "_"), scales="out"),
    },
    "SimpleTuner, Diffusers, PEFT": {
        "sd1": Layout(together(unet("unet.", ".", False), clips("text_encoder.", "", ".")), **PEFT),
        "sdxl": Layout(together(unet("unet.", ".", False), clips("text_encoder.", "text_encoder_2.", ".")), **PEFT),
        "flux": Layout(together(diffusers("transformer."), encoders("text_encoder.", "", ".")), **PEFT),
        "chroma": Layout(diffusers("transformer."), **PEFT),
        "lumina": Layout(diffusers("transformer."), **PEFT),
        "hunyuan_image": Layout(diffusers("transformer."), **PEFT),
    },
    "SimpleTuner, LyCORIS names": {
        "sd1": Layout(unet("lycoris_", "_", False)),
        "sdxl": Layout(unet("lycoris_", "_", False)),
        "flux": Layout(diffusers("lycoris_", "_")),
        "chroma": Layout(diffusers("lycoris_", "_")),
        "lumina": Layout(diffusers("lycoris_", "_")),
        "hunyuan_image": Layout(diffusers("lycoris_", "_")),
    },
    "PEFT, DoRA": {
        "sd1": Layout(unet("unet.", ".", False), scales="peft", **PEFT),
        "flux": Layout(diffusers("transformer."), scales="peft", **PEFT),
        "lumina": Layout(diffusers("transformer."), scales="peft", **PEFT),
        "hunyuan_image": Layout(diffusers("transformer."), scales="peft", **PEFT),
    },
    "diffusion-pipe, ComfyUI": {
        "sd1": Layout(unet("diffusion_model.", ".", True), **PEFT),
        "sdxl": Layout(unet("diffusion_model.", ".", True), **PEFT),
        "flux": Layout(original("diffusion_model."), **PEFT),
        "chroma": Layout(original("diffusion_model."), **PEFT),
        "lumina": Layout(original("diffusion_model."), **PEFT),
        "hunyuan_image": Layout(
            original("diffusion_model.", change={ours: theirs for theirs, ours in HUNYUAN_IMAGE.items()}), **PEFT
        ),
    },
    "XLabs": {"flux": Layout(xlabs, **SIMPLE)},
}
"""By program and family."""
