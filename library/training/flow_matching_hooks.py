"""What the families that train by flow matching have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from library.console import say
from library.training.family_hooks import FamilyHooks
from library.training.objective.flow_matching import FlowMatching, objective_notice, unused_flow_options
from library.training.objective.noise_options import StableDiffusionNoiseOptions
from library.training.objective.step_inputs import NoisyInput
from library.training.output.sample_images import SamplerOptions
from library.training.run_options import ClipSkipOptions, StableDiffusionModelOptions

if TYPE_CHECKING:
    from torch import Tensor


class FlowMatchingHooks(FamilyHooks):
    """A family whose options have a ``flow`` group, and whose pipeline predicts a velocity from latents and sigmas."""

    unused_groups: ClassVar[tuple[type, ...]] = (
        *FamilyHooks.unused_groups,
        StableDiffusionModelOptions,
        ClipSkipOptions,
        StableDiffusionNoiseOptions,
        SamplerOptions,
    )

    def report_unused_flow_options(self, shifts_samples: bool = False) -> None:
        """Say which given options change nothing, a line for each reason, and what is trained.

        ``shifts_samples``: ``--discrete_flow_shift`` also acts on sample images.
        """
        if not self.options.noise.ip_noise_gamma:
            self.report_unused(["ip_noise_gamma_random_strength"], "without --ip_noise_gamma")
        acts = {"discrete_flow_shift"} if shifts_samples and self.options.samples.sample_prompts else set()
        for reason, names in unused_flow_options(self.options.flow):
            self.report_unused([name for name in names if name not in acts], reason)
        say(objective_notice(self.options.flow))

    def make_objective(self) -> FlowMatching:
        """Flow matching."""
        return FlowMatching(self.options.flow, self.options.noise)

    def predict(self, noisy: NoisyInput, conditioning: dict[str, Tensor]) -> Tensor:
        """The transformer's velocity."""
        return self.pipeline.predict(noisy.latents, noisy.sigmas, conditioning)

    def flow_metadata(self, *more: str) -> dict[str, Any]:
        """How flow matching was set up, as ``ss_*`` entries; ``more`` names options that only some families write."""
        names = "logit_mean logit_std mode_scale timestep_sampling sigmoid_scale model_prediction_type".split()
        names += ["discrete_flow_shift", *more]
        return {f"ss_{name}": getattr(self.options.flow, name) for name in names}
