"""What only looks at a run is given: its parts, when the network and the optimizer are built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.training.data import TrainingData
from library.training.optim.optimization import Optimization
from library.training.output.run_outputs import RunOutputs
from library.training.plan.lengths import RunPlan
from library.training.progress import Progress
from library.training.training_options import TrainingOptions

if TYPE_CHECKING:
    import torch

    from library.models.pipeline import Pipeline


@dataclass(frozen=True)
class RunFacts:
    """A run as reports, metadata and states describe it. Nothing in it is changed by those who look."""

    family: str
    options: TrainingOptions
    seed: int
    device: torch.device
    dtype: torch.dtype
    """Of the computation."""
    processes: int
    is_main: bool
    """Whether this is the process that writes."""
    control_parts: frozenset[str]
    """The parts of the pipeline that control images need at every step; none without a ControlNet."""
    sample_side: int
    """Pixels of a sample image's sides where its prompt says nothing."""
    data: TrainingData
    plan: RunPlan
    progress: Progress
    pipeline: Pipeline
    network: Any
    optimization: Optimization
    outputs: RunOutputs
