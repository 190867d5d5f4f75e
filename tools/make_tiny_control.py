"""Write tiny models that control a drawing of Stable Diffusion, with random weights: ControlNets, LLLite, CLIP, VGG16.

They have the layouts and key names of the real files and fit the models of ``tools/make_tiny_stable_diffusion.py``.
Example: ``python tools/make_tiny_control.py tiny_control --kind control-net --variant sdxl --layout diffusers``
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Literal, get_args

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from library.console import run_script
from library.files import write_text
from library.lean_imports import diffusers_class, transformers_class
from library.models.loading import on_meta
from library.models.stable_diffusion.checkpoint import Variant
from library.models.stable_diffusion.control_net import HINT
from library.models.stable_diffusion.control_net_lllite import LATENT_STRIDE, PREFIX, LLLiteModule, layers_of
from library.models.stable_diffusion.keys import inverted, renamed, unet_table
from library.safetensors_io import save_file
from tools.make_tiny_stable_diffusion import SHAPES, Shape, build_modules
from tools.tiny_parts import fill_randomly

Kind = Literal["control-net", "lllite", "clip", "clip-vision", "vgg16"]
Layout = Literal["original", "difference", "diffusers"]

HINT_CHANNELS = (4, 8, 8, 16)
VOCABULARY = 514
"""Entries of the tiny CLIP tokenizer."""


def tiny_unet(variant: Variant, shape: Shape, seed: int = 0) -> Any:
    """The U-Net of the tiny model of that seed."""
    with on_meta():
        unet = build_modules(shape, VOCABULARY)["unet"]
    fill_randomly(unet, seed, f"tiny {variant} unet")
    return unet


def make_tiny_control_net(
    folder: Path | str,
    variant: Variant = "sd1",
    layout: Layout = "original",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shape: Shape | None = None,
) -> Path:
    """Write a ControlNet for the tiny model of seed 0; the same seed gives the same ControlNet in each layout.

    Returns the file, or the Diffusers folder.
    """
    folder, shape = Path(folder), shape or SHAPES[variant]
    folder.mkdir(parents=True, exist_ok=True)
    unet = tiny_unet(variant, shape)
    control = diffusers_class("ControlNetModel").from_unet(unet, conditioning_embedding_out_channels=HINT_CHANNELS)
    fill_randomly(control, seed, f"tiny {variant} ControlNet")
    state = {name: value.to(dtype).contiguous() for name, value in control.state_dict().items()}
    if layout == "diffusers":
        write_text(folder / "config.json", control.to_json_string())
        save_file(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        return folder
    if layout == "difference":
        base = unet.state_dict()
        state = {name: value - base[name] if name in base else value for name, value in state.items()}
    path = folder / f"{variant}_control.safetensors"
    tensors = original_state(state, shape)
    if layout == "difference":
        tensors["difference"] = torch.tensor([])
    save_file(tensors, path, {})
    return path


def original_state(state: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """The tensors of diffusers' ControlNet under the original names."""
    table = inverted(unet_table(shape.resnets, shape.attention))
    table["controlnet_mid_block"] = "middle_block_out.0"
    table |= {f"controlnet_down_blocks.{number}": f"zero_convs.{number}.0" for number in range(100)}
    table |= {f"{HINT}blocks.{number}": f"input_hint_block.{2 * number + 2}" for number in range(6)}
    table |= {f"{HINT}conv_in": "input_hint_block.0", f"{HINT}conv_out": "input_hint_block.14"}
    return {f"control_model.{renamed(name, table) or name}": value for name, value in state.items()}


def make_tiny_lllite(
    folder: Path | str, seed: int = 0, shape: Shape | None = None, channels: int = 8, inner: int = 6
) -> Path:
    """Write a ControlNet-LLLite for the tiny SDXL, with a module for each layer that the real files have one for."""
    folder, shape = Path(folder), shape or SHAPES["sdxl"]
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for path, layer in layers_of(tiny_unet("sdxl", shape)).items():
        if "attn2.to_k" in path or "attn2.to_v" in path:
            continue
        block = int(path.split(".")[1])
        level = 2 if path.startswith("middle") or block > 5 else 1 if block > 2 else 0
        level = min(level, len(shape.widths) - 1)
        module = LLLiteModule(_hint_layers(level, channels), layer.in_features, inner)
        fill_randomly(module, seed, f"tiny LLLite {path}")
        name = PREFIX + path.replace(".", "_")
        tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    target = folder / "lllite.safetensors"
    save_file(tensors, target, {})
    return target


def _hint_layers(level: int, channels: int) -> tuple[tuple[int, int, int], ...]:
    """The convolutions of the hint for layers that see the latents halved ``level`` times."""
    half = channels // 2
    first = (3, half, 4)
    rest = {0: [(half, channels, 2)], 1: [(half, channels, 4)], 2: [(half, half, 4), (half, channels, 2)]}[level]
    stride = 1
    for _, _, factor in (first, *rest):
        stride *= factor
    assert stride == LATENT_STRIDE * 2**level
    return (first, *rest)


def make_tiny_clip(folder: Path | str, seed: int = 0) -> Path:
    """Write a CLIP that reads texts and images, as the one that guides drawings; it knows the tiny tokenizer's ids."""
    text = {
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "eos_token_id": VOCABULARY - 1, "bos_token_id": VOCABULARY - 2},
    }
    config_class = transformers_class("clip.configuration_clip", "CLIPConfig")
    config = config_class(text_config=text, vision_config=_vision_sizes(), projection_dim=24)
    return _write_transformers(folder, transformers_class("clip.modeling_clip", "CLIPModel")(config), seed)


def make_tiny_clip_vision(folder: Path | str, seed: int = 0, projection: int = 80) -> Path:
    """Write a CLIP that reads images, as the one of CLIP vision conditioning, with outputs as XL's pooled text."""
    model_class = transformers_class("clip.modeling_clip", "CLIPVisionModelWithProjection")
    config_class = transformers_class("clip.configuration_clip", "CLIPVisionConfig")
    config = config_class(**_vision_sizes(), projection_dim=projection)
    return _write_transformers(folder, model_class(config), seed)


def _vision_sizes() -> dict[str, Any]:
    return {
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": 32, "patch_size": 8},
    }


def _write_transformers(folder: Path | str, model: nn.Module, seed: int) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fill_randomly(model, seed, type(model).__name__)
    config: Any = model.config
    write_text(folder / "config.json", json.dumps({**config.to_dict(), "architectures": [type(model).__name__]}))
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


VGG16_LAYERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
"""torchvision's indices of VGG16's convolutions."""
VGG16_WIDTHS = (4, 4, 6, 6, 8, 8, 8, 8, 8, 8, 8, 8, 8)


def make_tiny_vgg16(folder: Path | str, seed: int = 0) -> Path:
    """Write the weights of a narrow VGG16 as a pickled file under torchvision's names."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, Tensor] = {}
    inputs = 3
    for index, width in zip(VGG16_LAYERS, VGG16_WIDTHS):
        layer = nn.Conv2d(inputs, width, 3)
        fill_randomly(layer, seed, f"tiny VGG16 {index}")
        state |= {f"features.{index}.{name}": value for name, value in layer.state_dict().items()}
        inputs = width
    state |= {"classifier.0.weight": torch.zeros(2, 2), "classifier.0.bias": torch.zeros(2)}
    path = folder / "vgg16.pth"
    torch.save(state, path)
    return path


def main() -> None:
    """Read the command line and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--kind", choices=get_args(Kind), default="control-net", help="what is written")
    parser.add_argument("--variant", choices=get_args(Variant), default="sd1", help="the family of a ControlNet")
    parser.add_argument("--layout", choices=get_args(Layout), default="original", help="a ControlNet's layout")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    arguments = parser.parse_args()
    folder, seed = arguments.folder, arguments.seed
    if arguments.kind == "control-net":
        print(make_tiny_control_net(folder, arguments.variant, arguments.layout, seed))
    else:
        makers = {
            "lllite": make_tiny_lllite,
            "clip": make_tiny_clip,
            "clip-vision": make_tiny_clip_vision,
            "vgg16": make_tiny_vgg16,
        }
        print(makers[arguments.kind](folder, seed))


if __name__ == "__main__":
    run_script(main)
