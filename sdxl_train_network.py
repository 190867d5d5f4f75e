"""Train a network such as a LoRA inside a frozen Stable Diffusion XL model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.console import run_script, set_up_console
from library.devices import to_device
from library.errors import UserError
from library.options import parse_options
from library.training.run_options import ClipSkipOptions
from train_network import StableDiffusionNetworkTrainer, StableDiffusionTrainingOptions

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.batch import Batch
    from library.data.cache import LatentFormat, TextFormat
    from library.models.stable_diffusion.pipeline import StableDiffusionPipeline


@dataclass
class SdxlTrainingOptions(StableDiffusionTrainingOptions):
    """All options of this script."""


class SdxlNetworkTrainer(StableDiffusionNetworkTrainer):
    """Stable Diffusion XL: two text encoders, and a U-Net that is conditioned on the sizes of its images."""

    options_class = SdxlTrainingOptions
    family = "Stable Diffusion XL"
    unused_groups = (*StableDiffusionNetworkTrainer.unused_groups, ClipSkipOptions)
    bucket_divisor = 32
    options: SdxlTrainingOptions
    encoders = ("text_encoder", "text_encoder_2")
    sample_side = 1024

    def check_family_options(self) -> None:
        """As for 1.x and 2.x; there is no --v2, and the layer of the text encoders is part of the model."""
        if self.options.stable_diffusion.v2:
            raise UserError("--v2 is for Stable Diffusion 2.x; train such a model with train_network.py.")
        super().check_family_options()

    def require_variant(self, pipeline: StableDiffusionPipeline) -> None:
        """Raises UserError unless the file is of this script's kind."""
        if pipeline.variant != "sdxl":
            path = self.options.model.pretrained_model_name_or_path
            kind = "1.x" if pipeline.variant == "sd1" else "2.x"
            raise UserError(f"{path} is a Stable Diffusion {kind} model; {self.how_else('train_network.py')}.")

    def latent_format(self) -> LatentFormat:
        """``<stem>_WWWWxHHHH_sdxl.npz``; an old ``<stem>.npz`` comes first."""
        return self.unscaled_latents("_sdxl.npz")

    def text_format(self) -> TextFormat:
        """``<stem>_te_outputs.npz``."""
        files, length = self.pipeline.files, self.text_length()
        assert files.text_encoder_2 is not None
        arrays: dict[str, tuple[int | None, ...]] = {
            "hidden_state1": (length, files.text_encoder.hidden_size),
            "hidden_state2": (length, files.text_encoder_2.hidden_size),
            "pool2": (files.text_encoder_2.projection_size,),
        }
        return self.text_outputs("_te_outputs.npz", arrays)

    def network_text_encoders(self, encoders: Mapping[str, Any]) -> Any:
        """Both text encoders as a list, or an empty one."""
        return list(encoders.values())

    def network_base(self) -> Any:
        """The U-Net's layers under the original names, which SDXL's LoRA files have."""
        from library.models.stable_diffusion.original_names import under_original_names

        return under_original_names(self.pipeline.load_transformer())

    def conditioning(self, batch: Batch) -> dict[str, Tensor]:
        """Both encoders' outputs and ``time_ids`` [batch, 6]: original size, top and left of the crop, target size."""
        import torch

        sizes = zip(batch.original_sizes, batch.crop_top_lefts, batch.target_sizes)
        time_ids = torch.tensor([[*original, *crop, *target] for original, crop, target in sizes], dtype=torch.float32)
        return {**super().conditioning(batch), "time_ids": to_device(time_ids, self.accelerator.device)}

    def model_version(self) -> str:
        """``ss_base_model_version``."""
        return "sdxl_base_v1-0"


def main() -> None:
    """Read the options and train."""
    options = parse_options(SdxlTrainingOptions, __doc__ or "")
    set_up_console(options.console)
    SdxlNetworkTrainer.of(options).train()


if __name__ == "__main__":
    run_script(main)
