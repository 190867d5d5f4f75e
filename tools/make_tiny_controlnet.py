"""Write a tiny random ControlNet that fits the tiny FLUX.1 of make_tiny_models.py, for trying out commands and tests.

Examples: ``python tools/make_tiny_controlnet.py tiny_controlnet`` and
``python tools/make_tiny_controlnet.py tiny_controlnet --kind instantx --layout diffusers``
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch import Tensor, nn

from library.console import run_script
from library.files import write_text
from library.models.flux.controlnet import HINT_NAMES, ControlNetConfig, FluxControlNet
from library.models.flux.transformer import FluxConfig
from library.safetensors_io import save_file
from tools.make_tiny_models import Variant, fill_randomly, transformer_config
from tools.other_layouts import diffusers_transformer_config, diffusers_transformer_state

Layout = Literal["original", "diffusers"]
Kind = Literal["xlabs", "instantx", "union"]

HINT_CHANNELS = (3, *(16 for _ in HINT_NAMES))
MODES = 3


def make_tiny_controlnet(
    folder: Path | str,
    layout: Layout = "original",
    kind: Kind = "xlabs",
    variant: Variant = "dev",
    seed: int = 0,
    zero: bool = False,
) -> Path:
    """Write a ControlNet and return its path: a file in the original layout, a folder in Diffusers'.

    ``xlabs`` takes pixels, ``instantx`` and ``union`` latents; the latter two exist in Diffusers' layout only. The same
    seed gives the same weights in each layout. ``zero``: one that is not trained yet, so that it adds nothing.
    """
    if layout == "original" and kind != "xlabs":
        raise ValueError(f"{kind} ControlNets have the Diffusers layout only")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    controlnet = FluxControlNet(controlnet_config(kind, variant))
    fill_randomly(controlnet, seed, f"tiny {kind} controlnet")
    if zero:
        for parameter in (
            *controlnet.controlnet_blocks.parameters(),
            *controlnet.controlnet_blocks_for_single.parameters(),
        ):
            nn.init.zeros_(parameter)
    state = {key: value.contiguous() for key, value in controlnet.state_dict().items()}
    if layout == "original":
        save_file(state, folder / "controlnet.safetensors")
        return folder / "controlnet.safetensors"
    write_text(folder / "config.json", json.dumps(diffusers_controlnet_config(controlnet.control)))
    tensors = diffusers_controlnet_state(state, controlnet.control.streams)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return folder


def controlnet_config(kind: Kind = "xlabs", variant: Variant = "dev") -> ControlNetConfig:
    """One block of each kind, but no single block where control is given as pixels."""
    streams = replace(transformer_config(variant), depth=1, depth_single=0 if kind == "xlabs" else 1)
    return ControlNetConfig(
        streams,
        hint_channels=HINT_CHANNELS if kind == "xlabs" else (),
        modes=MODES if kind == "union" else 0,
        original=kind == "xlabs",
    )


def diffusers_controlnet_config(config: ControlNetConfig) -> dict[str, Any]:
    """The ``config.json`` of Diffusers' class."""
    return {
        **diffusers_transformer_config(config.streams),
        "_class_name": "FluxControlNetModel",
        "patch_size": 1 if config.takes_latents else 2,
        "num_mode": config.modes or None,
        "conditioning_embedding_channels": None if config.takes_latents else config.hint_channels[-1],
    }


def diffusers_controlnet_state(state: dict[str, Tensor], streams: FluxConfig) -> dict[str, Tensor]:
    """A ControlNet's tensors under Diffusers' names."""
    names = {"pos_embed_input": "controlnet_x_embedder", "controlnet_mode_embedder": "controlnet_mode_embedder"}
    names |= {f"controlnet_blocks.{index}": f"controlnet_blocks.{index}" for index in range(streams.depth)}
    for index in range(streams.depth_single):
        names[f"controlnet_blocks_for_single.{index}"] = f"controlnet_single_blocks.{index}"
    names |= {f"input_hint_block.{2 * index}": f"input_hint_block.{name}" for index, name in enumerate(HINT_NAMES)}
    own = {key: key.rsplit(".", 1) for key in state}
    renamed = {f"{names[name]}.{kind}": state[key] for key, (name, kind) in own.items() if name in names}
    shared = {key: state[key] for key, (name, _) in own.items() if name not in names}
    return {**diffusers_transformer_state(shared, streams), **renamed}


def main() -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the file goes")
    parser.add_argument("--layout", choices=get_args(Layout), default="original", help="whose key names and files")
    parser.add_argument("--kind", choices=get_args(Kind), default="xlabs", help="what it takes and knows")
    parser.add_argument(
        "--variant", choices=get_args(Variant), default="dev", help="with or without guidance embedding"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    arguments = parser.parse_args()
    if arguments.layout == "original" and arguments.kind != "xlabs":
        parser.error(f"--kind {arguments.kind} exists in --layout diffusers only")
    print(make_tiny_controlnet(**vars(arguments)))


if __name__ == "__main__":
    run_script(main)
