"""ControlNet-LLLite in the denoising loop: what the hint images make of the inputs of attention layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from library.generation.control_hints import LLLITES, Control, Progress
from library.generation.control_net import ControlFeature
from library.generation.features import weight_bytes
from library.models.sampling import ModelCall, RunModel, StepHook
from library.models.stable_diffusion.control_net_lllite import LLLiteModule, before_layers, open_lllite

if TYPE_CHECKING:
    from library.models.stable_diffusion.pipeline import StableDiffusionPipeline


class LLLites(ControlFeature):
    """The models of ``--control_net_lllite_models``."""

    option = LLLITES

    def open(self, path: str) -> Any:
        """A ControlNet-LLLite's file."""
        return open_lllite(path, self.pipeline.files.unet, self.pipeline.variant, LLLITES)

    def load(self, file: Any) -> dict[str, LLLiteModule]:
        """Its modules by the layers' paths."""
        return file.load(self.pipeline.dtype, self.pipeline.device)

    def file_bytes(self, file: Any) -> int:
        """The memory of its weights."""
        return sum(weight_bytes(file.meta_module(prefix), self.pipeline.dtype) for prefix in file.prefixes.values())

    @property
    def loaded(self) -> Sequence[nn.Module]:
        """The modules, once they are loaded."""
        return [module for model in self.models for module in model.values()]

    def acting(self, hints: list[Tensor]) -> StepHook:
        """What adds to the inputs of the U-Net's layers."""
        return LLLiteHook(self.pipeline, self.models, self.hints.used, [2 * hint - 1 for hint in hints])


class LLLiteHook(StepHook):
    """Adds to the layers' inputs what every model makes of them, the last one first.

    ``models`` hold their modules by the layers' paths; ``hints`` [B, 3, H, W] are in -1..1, for each of them. A hint's
    maps are made once for each size of the latents.
    """

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        models: Sequence[Mapping[str, LLLiteModule]],
        used: Sequence[Control],
        hints: Sequence[Tensor],
    ):
        self.pipeline = pipeline
        self.models = models
        self.used = used
        self.hints = [hint.to(pipeline.device, pipeline.dtype) for hint in hints]
        self.progress = Progress()
        self.maps: dict[tuple[int, str, tuple[int, ...]], Tensor] = {}
        self.acting: list[int] = []
        self.latent_size: tuple[int, int] = (0, 0)

    def attached(self, denoiser: Any) -> AbstractContextManager[Any]:
        """While the context is active, the layers' inputs are added to."""
        paths = {path for model in self.models for path in model}
        return before_layers(denoiser, paths, self._added)

    def around(self, run: RunModel, call: ModelCall) -> Tensor:
        """The call, with the models that act at its step."""
        height, width = call.latents.shape[2:]
        self.latent_size = (height, width)
        step, steps = self.progress.at(call.step)
        acting = [i for i, used in enumerate(self.used) if used.multiplier and used.acts(step, steps)]
        self.acting = acting[::-1]  # a model that is added later stands in front of the others
        try:
            return run(call)
        finally:
            self.acting = []

    def _added(self, path: str, x: Tensor) -> Tensor:
        for index in self.acting:
            module = self.models[index].get(path)
            if module is not None:
                change = module(x.to(self.pipeline.dtype), self._map(index, path, module))
                x = x + (self.used[index].multiplier * change).to(x.dtype)
        return x

    def _map(self, index: int, path: str, module: LLLiteModule) -> Tensor:
        key = (index, path, self.latent_size)
        if key not in self.maps:
            self.maps[key] = module.hint_map(self.hints[index], self.latent_size)
        return self.maps[key]
