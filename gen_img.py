"""Generate images with Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from library.console import ConsoleOptions, run_script, set_up_console
from library.generation.control_options import ControlOptions
from library.generation.deep_shrink import DeepShrinkOptions
from library.generation.gradual_latent import GradualLatentOptions
from library.generation.guidance_options import GuidanceOptions
from library.generation.highres_fix import HighresOptions
from library.generation.image_outputs import ImageOutputOptions
from library.generation.image_run import ImageRun
from library.generation.model_options import ModelOptions
from library.generation.network_options import NetworkOptions
from library.generation.parts import DeviceOptions
from library.generation.prompt_sources import ImagePromptOptions
from library.generation.sampling_options import SamplingOptions
from library.generation.start_images import StartImageOptions
from library.generation.text_options import TextOptions
from library.memory.streaming_options import StreamingOptions
from library.options import ConfigOptions, parse_options

if TYPE_CHECKING:
    from networks.adapters.image_networks import ImageNetworks


@dataclass
class GenImgOptions:
    """All options of this script."""

    model: ModelOptions = field(default_factory=ModelOptions)
    prompts: ImagePromptOptions = field(default_factory=ImagePromptOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    text: TextOptions = field(default_factory=TextOptions)
    start: StartImageOptions = field(default_factory=StartImageOptions)
    highres: HighresOptions = field(default_factory=HighresOptions)
    deep_shrink: DeepShrinkOptions = field(default_factory=DeepShrinkOptions)
    gradual_latent: GradualLatentOptions = field(default_factory=GradualLatentOptions)
    control: ControlOptions = field(default_factory=ControlOptions)
    guidance: GuidanceOptions = field(default_factory=GuidanceOptions)
    networks: NetworkOptions = field(default_factory=NetworkOptions)
    output: ImageOutputOptions = field(default_factory=ImageOutputOptions)
    device: DeviceOptions = field(default_factory=DeviceOptions)
    streaming: StreamingOptions = field(default_factory=StreamingOptions)
    config: ConfigOptions = field(default_factory=ConfigOptions)
    console: ConsoleOptions = field(default_factory=ConsoleOptions)


class GenImg(ImageRun):
    """The networks come from ``networks/``, which nothing in ``library/`` knows."""

    options: GenImgOptions
    stack: ImageNetworks

    def open_loras(self) -> ImageNetworks:
        """The networks that the options name, checked against the model's structure."""
        from networks.adapters.image_networks import open_networks

        networks = open_networks(self.options.networks, self.pipeline)
        self.lora_files = list(networks.files)
        return networks


def main() -> None:
    """Read the options and generate the images."""
    options = parse_options(GenImgOptions, __doc__ or "")
    set_up_console(options.console)
    GenImg(options).run()


if __name__ == "__main__":
    run_script(main)
