"""Enlarge images to twice their size in the latents of Stable Diffusion 1.x and 2.x, by a network trained for that.

As a module it is the upscaler of ``gen_img.py --highres_fix_upscaler tools.latent_upscaler``.
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from library.checkpoints import load_tensors
from library.console import ConsoleOptions, run_script, say, set_up_console
from library.devices import default_device
from library.errors import UserError
from library.options import parse_options

if TYPE_CHECKING:
    from PIL.Image import Image

LATENT_SCALE = 0.18215
"""Of the autoencoder of Stable Diffusion 1.x and 2.x, whose latents the network was trained with."""
LATENT_STRIDE = 8
BLOCKS, GROUP = 20, 4
CHANNELS, WIDTH, NARROW = 4, 128, 64


class ResidualBlock(nn.Module):
    """Two convolutions [B, C, h, w] whose result is added to their input."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, C, h, w] to the same."""
        inner = torch.relu(self.bn1(self.conv1(hidden_states)))
        return torch.relu(self.bn2(self.conv2(inner)) + hidden_states)


class Upscaler(nn.Module):
    """Sharpens the latents of an enlarged image; its state dict is the format of kohya-ss/sd-scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, WIDTH, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        for number in range(1, BLOCKS + 1):
            self.add_module(f"resblock{number}", ResidualBlock(WIDTH))
        self.conv2 = nn.Conv2d(WIDTH, NARROW, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(NARROW)
        self.conv3 = nn.Conv2d(NARROW, NARROW, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(NARROW)
        self.conv_final = nn.Conv2d(NARROW, CHANNELS, 1)
        nn.init.zeros_(self.conv_final.weight)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents [B, 4, h, w], not scaled, to the same with more detail."""
        hidden_states = torch.relu(self.bn1(self.conv1(latents)))
        for first in range(1, BLOCKS + 1, GROUP):
            outer = hidden_states
            for number in range(first, first + GROUP):
                hidden_states = self.get_submodule(f"resblock{number}")(hidden_states)
            hidden_states = hidden_states + outer
        hidden_states = torch.relu(self.bn2(self.conv2(hidden_states)))
        return self.conv_final(self.bn3(self.conv3(hidden_states))) + latents

    def support_latents(self) -> bool:
        """Whether it takes latents: it takes images."""
        return False

    @torch.no_grad()
    def upscale(
        self,
        vae: Any,
        lowreso_images: Sequence[Image],
        lowreso_latents: None,
        dtype: torch.dtype,
        width: int,
        height: int,
        batch_size: int = 1,
        vae_batch_size: int = 1,
    ) -> Tensor:
        """Scaled latents [B, 4, height / 8, width / 8] of images, enlarged to that many pixels by LANCZOS before.

        Raises UserError for the autoencoder of another model.
        """
        from library.models.pipeline import from_image

        if abs(vae.config["scaling_factor"] - LATENT_SCALE) > 1e-5:
            raise UserError("tools.latent_upscaler is for Stable Diffusion 1.x and 2.x only.")
        device = self.conv1.weight.device
        pixels = torch.stack([from_image(image, width, height) for image in lowreso_images])
        encoded = [vae.encode(part.to(device, dtype)).latent_dist.mean for part in pixels.split(vae_batch_size)]
        latents = torch.cat(encoded).to(self.conv1.weight.dtype)
        return torch.cat([self(part) for part in latents.split(batch_size)]) * LATENT_SCALE


def create_upscaler(weights: str | None = None) -> Upscaler:
    """The network with the values of a file. Raises UserError for one that is missing or of another network."""
    if weights is None:
        raise UserError(
            'tools.latent_upscaler needs its file: --highres_fix_upscaler_args "weights=upscaler.safetensors".'
        )
    if not Path(weights).is_file():
        raise UserError(f"tools.latent_upscaler: there is no file {weights}.")
    tensors, _ = load_tensors(weights, finite=True)
    upscaler = Upscaler()
    wanted = {name: tensor.shape for name, tensor in upscaler.state_dict().items()}
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}
    shapes = {name: tensor.shape for name, tensor in tensors.items() if name not in counters}
    if shapes != {name: shape for name, shape in wanted.items() if name not in counters}:
        raise UserError(f"tools.latent_upscaler: {weights} holds another network's weights.")
    upscaler.load_state_dict({name: tensors.get(name, torch.tensor(0)) for name in wanted})
    return upscaler.eval().requires_grad_(False)


# ---- the program -----------------------------------------------------------------------------------------------------


@dataclass
class UpscalingOptions:
    """Enlarging"""

    vae_path: str | None = None
    """Model or autoencoder (file or Diffusers folder) of Stable Diffusion 1.x or 2.x."""
    weights: str | None = None
    """The network's file."""
    image_pattern: str | None = None
    """Images, as a pattern such as images/*.png; their sides are cut to multiples of 8."""
    output_dir: str = "."
    """Folder for the enlarged images, which are named as the others with "_upscaled"."""
    batch_size: int = 4
    """Images that go through the network together."""
    vae_batch_size: int = 1
    """Images that go through the autoencoder together."""
    debug: bool = False
    """Also write what LANCZOS alone makes of each image, with "_lanczos"."""


@dataclass
class LatentUpscalerOptions:
    """All options of this tool."""

    upscaling: UpscalingOptions = field(default_factory=UpscalingOptions)
    console: ConsoleOptions = field(default_factory=ConsoleOptions)


def main(arguments: list[str] | None = None) -> None:
    """Read the options and enlarge the images."""
    options = parse_options(LatentUpscalerOptions, __doc__ or "", arguments)
    set_up_console(options.console)
    run(options.upscaling)


@torch.no_grad()
def run(options: UpscalingOptions) -> None:
    """Enlarge every image. Raises UserError for options and files that cannot be used."""
    from PIL import Image

    from library.files import require_writable_folder
    from library.image_reading import read_given_image
    from library.models.loading import LoadSpec
    from library.models.pipeline import to_image
    from library.models.stable_diffusion.checkpoint import open_vae

    for name in ("vae_path", "weights", "image_pattern"):
        if not getattr(options, name):
            raise UserError(f"--{name} is missing.")
    for name in ("batch_size", "vae_batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(options, name)}.")
    files = [Path(name) for name in sorted(glob.glob(options.image_pattern or "")) if Path(name).is_file()]
    if not files:
        raise UserError(f"--image_pattern {options.image_pattern} matches no file.")
    output = Path(options.output_dir)
    require_writable_folder(output, "--output_dir")
    device = default_device()
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    upscaler = create_upscaler(options.weights).to(device, dtype)
    vae = open_vae(options.vae_path or "", "sd1", option="--vae_path").load(LoadSpec.of(dtype, lambda name: device))
    output.mkdir(parents=True, exist_ok=True)
    images = [_cut(read_given_image(file, "--image_pattern")) for file in files]
    for size in dict.fromkeys(image.size for image in images):
        alike = [index for index, image in enumerate(images) if image.size == size]
        for start in range(0, len(alike), options.batch_size):
            chosen = alike[start : start + options.batch_size]
            width, height = (2 * side for side in size)
            latents = upscaler.upscale(
                vae, [images[i] for i in chosen], None, dtype, width, height, len(chosen), options.vae_batch_size
            )
            for index, latent in zip(chosen, latents):
                pixels = vae.decode((latent / LATENT_SCALE)[None]).sample[0]
                path = output / f"{files[index].stem}_upscaled.png"
                to_image(pixels.float().clamp(-1, 1)).save(path)
                if options.debug:
                    plain = images[index].resize((width, height), Image.Resampling.LANCZOS)
                    plain.save(output / f"{files[index].stem}_lanczos.png")
                say(f"saved {path} ({width}x{height})")


def _cut(image: Image) -> Image:
    """Without the pixels that are too many for whole latent positions."""
    width, height = (side // LATENT_STRIDE * LATENT_STRIDE for side in image.size)
    return image.crop((0, 0, width, height))


if __name__ == "__main__":
    run_script(main)
