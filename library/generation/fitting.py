"""``--vram_budget`` and ``--blocks_to_swap auto`` of inference scripts: what waits in system RAM so that images fit.

The parts' work on the largest image is simulated, and weights are added by arithmetic. Nothing is chosen that changes
an image. Of all that fits, the fastest is taken: the fewest streamed blocks, with as little else as possible.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from library.console import silence, size_text
from library.errors import UserError
from library.generation.parts import computing_in
from library.memory.budget import GIB, budget_bytes, least_budget, usable
from library.memory.simulation import PeakMemory, Simulation
from library.models.pipeline import CONDITIONINGS, joined_conditioning

if TYPE_CHECKING:
    from torch import Tensor

    from library.memory.stream_choice import StreamedBlocks
    from library.models.pipeline import Text
    from library.prompt_options import PromptOptions


FEATURES = "features"
"""Stands among the parts for the models of features, such as ControlNets. Only their weights are counted."""


@dataclass(frozen=True)
class Phase:
    """What works at a time, and which parts are on the device meanwhile."""

    works: Sequence[str]
    bytes: int
    """Of its activations, and of the largest weight that a storage format makes dense."""
    beside: Sequence[str]
    """Parts that are on the device too, unless they are offloaded."""


@dataclass(frozen=True)
class Choice:
    """What waits in system RAM."""

    blocks: int
    encoders: bool
    offload: bool


def fit(run: Any) -> str:
    """Set the options with which the images of an ``InferenceRun`` fit into memory; returns a line that names them.

    Options that were given stay. Raises UserError, before any model is loaded, when nothing fits.
    """
    options, pipeline = run.options, run.pipeline
    only_streams = options.device.vram_budget is None
    why = "--blocks_to_swap auto" if only_streams else f"--vram_budget {options.device.vram_budget:g}"
    budget = budget_bytes(options.device.vram_budget, pipeline.device)
    prompt = max(run.file_prompts, key=lambda prompt: (prompt.width or 0) * (prompt.height or 0))
    phases = phases_of(run, prompt)
    parts = {part for phase in phases for part in (*phase.works, *phase.beside)}
    own = parts - {*pipeline.on_host, FEATURES}
    weights = {part: pipeline.part_bytes(part) + run.stack.part_bytes(part) for part in own}
    weights[FEATURES] = run.feature_bytes
    slots, given = options.streaming.block_swap_ring_size, options.streaming.blocks_to_swap
    encoders = {encoder: pipeline.every_block(encoder, slots) for encoder in pipeline.encoders}
    blocks = pipeline.block_sizes()
    counts = [given] if isinstance(given, int) else range(pipeline.most_to_swap(blocks) + 1)
    swapped = {count: pipeline.blocks_for(count, blocks, slots) for count in counts if count}

    def needed(choice: Choice) -> int:
        streamed: dict[str, StreamedBlocks] = dict(encoders) if choice.encoders else {}
        if choice.blocks:
            streamed[pipeline.denoiser] = swapped[choice.blocks]
        kept = {part: size - (streamed[part].freed if part in streamed else 0) for part, size in weights.items()}
        return max(
            phase.bytes + sum(kept.get(part, 0) for part in {*phase.works, *(() if choice.offload else phase.beside)})
            for phase in phases
        )

    choices = [
        Choice(count, streams, offload)
        for count in counts
        for streams in (options.streaming.stream_text_encoders, *(() if only_streams else (True,)))
        for offload in (options.device.offload, *(() if only_streams else (True,)))
    ]
    sizes = {choice: needed(choice) for choice in choices}
    chosen = next((choice for choice, size in sizes.items() if size <= usable(budget)), None)
    if chosen is None:
        least = least_budget(min(sizes.values()))
        raise UserError(
            f"{why}: an image of {prompt.width}x{prompt.height} does not fit into {budget / GIB:g} GiB; "
            f"--vram_budget {least:g} is the least that these dtypes allow."
        )
    words = [
        *(["--offload"] if chosen.offload and not options.device.offload else []),
        *(["--stream_text_encoders"] if chosen.encoders and not options.streaming.stream_text_encoders else []),
        *([f"--blocks_to_swap {chosen.blocks}"] if chosen.blocks and chosen.blocks != given else []),
    ]
    options.device.offload, options.streaming.stream_text_encoders = chosen.offload, chosen.encoders
    options.streaming.blocks_to_swap = chosen.blocks or None
    does = f"chooses {' '.join(words)}" if words else "needs no other options"
    return f"{why} {does}: {size_text(sizes[chosen])} of {budget / GIB:g} GiB on the device at the peak"


def phases_of(run: Any, prompt: PromptOptions) -> list[Phase]:
    """The phases of drawing ``prompt``, each with the memory of its work."""
    pipeline, device = run.pipeline, run.pipeline.device
    drawing, encoders = run.denoising_parts(prompt), pipeline.encoders
    features = (FEATURES,) if run.feature_bytes else ()
    stay = tuple(encoders) if run.keeps_encoders else ()
    dtypes, dense = pipeline.dtypes, {part: pipeline.dense_bytes(part) for part in (pipeline.denoiser, *encoders)}

    @contextlib.contextmanager
    def at_work(*parts: str) -> Iterator[PeakMemory]:
        memory = PeakMemory([pipeline.load(part) for part in parts], device)
        with memory, computing_in(device, run.dtypes[parts[0]].compute):
            yield memory

    pipeline.dtypes = {part: getattr(dtype, "compute", dtype) for part, dtype in dtypes.items()}
    phases: list[Phase] = []
    try:
        with silence(), torch.random.fork_rng(devices=[]), torch.no_grad(), Simulation(pipeline).running():
            texts: dict[Text, dict[str, Tensor]] = {text: {} for text in run.texts_of(prompt)}
            for encoder in encoders:
                with at_work(encoder) as memory:
                    for text, outputs in pipeline.encode_texts(texts, [encoder]).items():
                        texts[text].update(outputs)
                beside = (*stay, *drawing, *features, "autoencoder") if stay else ()
                phases.append(Phase((encoder,), memory.peak.device + dense[encoder], beside))
            request = run.request(prompt)
            for (_, role), outputs in texts.items():
                setattr(request, CONDITIONINGS[role], outputs)
            together = run.images_together
            given = [pipeline.request_conditioning(request, role) for _, role in texts for _ in range(together)]
            conditioning = joined_conditioning(given)
            height, width = (side // pipeline.latent_stride for side in pipeline.image_size(request))
            latents = torch.empty(len(given), pipeline.latent_channels, height, width, device=device)
            with at_work(*drawing) as memory:
                pipeline.predictor([request])(latents, torch.empty(len(given), device=device), conditioning)
            work = memory.peak.device + dense[pipeline.denoiser]
            phases.append(Phase((*drawing, *features), work, (*stay, "autoencoder")))
            with at_work("autoencoder") as memory:
                pipeline.decode_latents(latents[:together])
            phases.append(Phase(("autoencoder",), memory.peak.device, (*stay, *drawing, *features)))
    finally:
        for part in pipeline.parts:
            pipeline.release(part)
        pipeline.dtypes = dtypes
    return phases
