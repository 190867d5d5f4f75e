"""How much memory a run will take, phase by phase, found by running its own code on tensors without values.

Counted are tensors: weights, the network, its gradients, the optimizer's state, activations at their peak for the
largest batch. Not counted are the libraries and the device's context, what kernels need inside them, and what the
allocator wastes. To be called inside a ``Simulation``, after the network and the optimizer are built.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from library.console import silence
from library.data.batch import Batch
from library.memory.apply import apply_memory_plan
from library.memory.simulation import DataDependentOutputException, Peak, PeakMemory, module_bytes
from library.training.objective.step_inputs import ItemDraws
from library.training.optim.ema import BYTES_PER_VALUE
from library.training.optim.optimizers import create_optimizer, optimizer_name
from library.training.plan.equal_blocks import NotRepeatable, each_kind_once
from library.training.plan.plan_report import MemoryPhase

if TYPE_CHECKING:
    import torch

    from library.data.dataset import DatasetGroup
    from library.models.pipeline import Pipeline
    from library.training.run_facts import RunFacts
    from library.training.step_loss import StepLoss, StepModel

LARGEST_MEASURED = 1 << 24
"""Values of a parameter up to which the optimizer's state is measured at its own shape."""


@dataclass(frozen=True)
class Largest:
    """The batch that takes most memory."""

    width: int
    height: int
    count: int


@dataclass(frozen=True)
class Work:
    """A phase of a run: the parts of the base model that it needs on the device, and what it does with them."""

    name: str
    parts: frozenset[str]
    trains: bool
    """Whether the network and the optimizer are there."""
    is_step: bool
    """Whether it is a training step, with a backward pass."""
    peak: Callable[[], Peak]
    """The activations and gradients, found by doing it."""


def run_phases(run: RunFacts, loss: StepLoss, latents: bool, texts: bool) -> list[Work]:
    """The phases of the run, the training of one step among them.

    ``loss`` does the work of a step. ``latents`` and ``texts``: whether anything has to be cached.
    """
    pipeline, model, options = run.pipeline, loss.model, run.options
    encoders = frozenset(pipeline.encoders) & pipeline.modules.keys()
    largest = largest_batch(run.data.train)
    needed = {pipeline.denoiser, *run.control_parts}
    if model.latents.caching is None:
        needed.add("autoencoder")
    needed |= set(model.text.encoders_at_steps)
    phases = []
    if latents:
        batch = replace(largest, count=max(1, options.cache.vae_batch_size))
        peak = functools.partial(encoding_peak, model, batch)
        phases.append(Work("caching latents", frozenset({"autoencoder"}), False, False, peak))
    if texts and model.text.caching is not None:
        peak = functools.partial(text_peak, model, model.text.caching.batch_size)
        phases.append(Work("caching text", encoders, False, False, peak))
    checkpointing = "with" if options.precision.gradient_checkpointing else "without"
    peak = functools.partial(training_peak, run, loss, largest)
    phases.append(Work(f"training {checkpointing} gradient checkpointing", frozenset(needed), True, True, peak))
    if run.outputs.samples.prompts:
        peak = functools.partial(sampling_peak, run, model)
        phases.append(Work("sample images", frozenset({*needed, "autoencoder"}), True, False, peak))
    return phases


def memory_phases(
    run: RunFacts,
    loss: StepLoss,
    optimizer_bytes: int,
    latents: bool,
    texts: bool,
    held: dict[str, int],
    both_ways: bool = True,
) -> list[MemoryPhase]:
    """The phases of ``run_phases``, each with what it holds at its peak; one that cannot be simulated says why.

    With ``both_ways`` a training step is shown with and without gradient checkpointing. ``held``: bytes in system RAM
    for the whole run, by what they are. The run's memory plan is no longer applied afterwards.
    """
    pipeline = run.pipeline
    weights = {part: module_bytes(pipeline.modules[part]) for part in pipeline.parts if part in pipeline.modules}
    network = module_bytes(run.network)

    def phase(work: Work) -> MemoryPhase:
        on_device = {part: weights[part] for part in weights if part in work.parts and part not in pipeline.on_host}
        on_host = held | {part: weights[part] for part in weights if part in work.parts and part in pipeline.on_host}
        streamed = [blocks for part, blocks in pipeline.streamed.items() if part in on_device]
        if streamed:
            for part in pipeline.streamed.keys() & on_device.keys():
                on_device[part] -= pipeline.streamed[part].bytes
            on_device["streaming ring"] = sum(blocks.ring_bytes for blocks in streamed)
            on_host["streamed blocks"] = sum(blocks.bytes for blocks in streamed)
        for part in pipeline.sharded.keys() & on_device.keys():
            on_device[part] -= pipeline.sharded[part].freed
        of_training = (network, optimizer_bytes) if work.trains else (0, 0)
        try:
            peak = work.peak()
        except Exception as error:  # whatever a model or a network of others cannot do without values
            reason = f"{type(error).__name__}: {_first_line(error)}"
            return MemoryPhase(work.name, on_device, *of_training, None, on_host, reason)
        on_host["activations"] = peak.host
        effort = peak.effort if work.is_step else None
        return MemoryPhase(work.name, on_device, *of_training, peak.device, on_host, effort=effort)

    found = []
    for work in run_phases(run, loss, latents, texts):
        found.append(phase(work))
        if work.is_step and both_ways:
            checkpointing = run.options.precision.gradient_checkpointing
            name = f"(training {'without' if checkpointing else 'with'} gradient checkpointing)"
            with checkpointing_is(pipeline, not checkpointing):
                found.append(phase(replace(work, name=name)))
    return found


@contextlib.contextmanager
def checkpointing_is(pipeline: Pipeline, on: bool) -> Iterator[None]:
    """For a while, the denoiser's blocks are checkpointed or are not."""
    plan = pipeline.applied[pipeline.denoiser].plan
    if plan.checkpointing == on:
        yield
        return
    for wanted in (replace(plan, checkpointing=on), plan):
        pipeline.applied.pop(pipeline.denoiser).remove()
        pipeline.applied[pipeline.denoiser] = apply_memory_plan(pipeline.block_lists(), wanted)
        if wanted is not plan:
            yield


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:100]


# ---- the peaks of single steps ---------------------------------------------------------------------------------------


def training_peak(run: RunFacts, loss: StepLoss, size: Largest) -> Peak:
    """Activations and gradients of one batch, from its images or cached latents on."""
    before = Peak(0) if loss.model.latents.caching else encoding_peak(loss.model, size)
    if run.optimization.fused is not None:
        run.optimization.fused.only_frees = True  # its steps would look at numbers
    step = _step_peak(run, loss, size)
    highest = (max(before.device, step.device), max(before.host, step.host))
    return Peak(*highest, step.forward_flops, before.effort + step.effort)


def _step_peak(
    run: RunFacts, loss: StepLoss, size: Largest, with_dropout: bool = True, every_block: bool = False
) -> Peak:
    """From latents to gradients."""
    batch = empty_batch(run, loss.model, size)
    run.network.train(with_dropout)
    run.network.set_multiplier(1.0)
    memory = PeakMemory([*run.pipeline.modules.values(), run.network], run.device)
    try:
        trained = run.optimization.parameters
        with memory, contextlib.nullcontext() if every_block else equal_blocks(run.pipeline, memory, trained):
            losses = loss(batch, ItemDraws(run.seed, 0, batch.item_ids))
            forward_flops = memory.effort.flops
            losses.mean().backward()
    except NotRepeatable:
        return _step_peak(run, loss, size, with_dropout, every_block=True)
    except DataDependentOutputException:  # dropout of whole modules looks at a random number
        if not with_dropout:
            raise
        return _step_peak(run, loss, size, False, every_block)
    finally:
        for parameter in run.optimization.parameters:
            parameter.grad = None
    return replace(memory.peak, forward_flops=forward_flops, effort=memory.effort)


@contextlib.contextmanager
def equal_blocks(pipeline: Pipeline, memory: PeakMemory, trained: Sequence[torch.nn.Parameter] = ()) -> Iterator[None]:
    """For a while, of equal blocks of the loaded parts one is simulated."""
    with contextlib.ExitStack() as parts:
        for part, applied in pipeline.applied.items():
            lists = pipeline.blocks_of(part, pipeline.modules[part]).values()
            parts.enter_context(
                each_kind_once([block for blocks in lists for block in blocks], applied, memory, trained)
            )
        yield


def encoding_peak(model: StepModel, size: Largest) -> Peak:
    """The autoencoder at work on pixels of that size."""
    import torch

    pixels = torch.empty(size.count, 3, size.height, size.width)
    generators = [torch.Generator() for _ in range(size.count)]
    with PeakMemory([model.latents.pipeline.load_autoencoder()], model.accelerator.device) as memory:
        model.latents.encode(pixels, generators)
    return replace(memory.peak, effort=memory.effort)


def text_peak(model: StepModel, count: int) -> Peak:
    """The text encoders at work on this many captions."""
    import torch

    pipeline = model.text.pipeline
    memory = PeakMemory(pipeline.load_text_encoders(pipeline.encoders), pipeline.device)
    with torch.no_grad(), memory, equal_blocks(pipeline, memory):
        model.text.encode([""] * count)
    return memory.peak


def sampling_peak(run: RunFacts, model: StepModel) -> Peak:
    """The largest sample images: a step of their denoising with guidance (twice as many), then their decoding."""
    import torch

    stride = run.pipeline.latent_stride
    prompts = run.outputs.samples.prompts
    images = min(run.outputs.samples.batch_size, len(prompts))
    sides = [(prompt.width or run.sample_side, prompt.height or run.sample_side) for prompt in prompts]
    width, height = (max(64, side // 64 * 64) for side in max(sides, key=lambda pair: pair[0] * pair[1]))
    batch = empty_batch(run, model, Largest(width, height, 2 * images))
    latents = torch.empty(
        2 * images, run.pipeline.latent_channels, height // stride, width // stride, device=run.device
    )
    run.network.eval()
    memory = PeakMemory([*run.pipeline.modules.values(), run.network], run.device)
    with torch.no_grad(), memory, run.optimization.averaged(), equal_blocks(run.pipeline, memory):
        noisy = model.objective.noisy_input(latents, ItemDraws(run.seed, 0, batch.item_ids))
        conditioning = model.conditioning(batch)
        with model.accelerator.autocast():
            model.objective.read_prediction(model.predict(noisy, conditioning), noisy)
        del noisy, conditioning
        run.pipeline.decode_latents(latents[:images])
    return memory.peak


def largest_batch(group: DatasetGroup) -> Largest:
    """The bucket and batch size with the most pixels."""
    found = [
        Largest(width, height, min(dataset.settings.batch_size, len(samples)))
        for dataset in group.datasets
        for (width, height), samples in dataset.bucket_samples().items()
    ]
    return max(found, key=lambda size: size.width * size.height * size.count)


def empty_batch(run: RunFacts, model: StepModel, size: Largest) -> Batch:
    """A batch of that size with cached latents, and cached text where the run caches it."""
    import torch

    count, stride = size.count, run.pipeline.latent_stride
    text = None
    if model.text.caching is not None:
        arrays = model.text.caching.format.arrays.items()
        text = {name: torch.empty(count, *(side or 1 for side in shape or ())) for name, shape in arrays}
    return Batch(
        item_ids=list(range(count)),
        image_keys=[str(number) for number in range(count)],
        captions=[run.data.train.items[0].caption] * count,
        images=None,
        latents=torch.empty(count, run.pipeline.latent_channels, size.height // stride, size.width // stride),
        text=text,
        alpha_masks=None,
        conditioning_images=torch.empty(count, 3, size.height, size.width) if run.control_parts else None,
        loss_weights=torch.ones(count),
        group_size=count,
        original_sizes=[(size.height, size.width)] * count,
        crop_top_lefts=[(0, 0)] * count,
        target_sizes=[(size.height, size.width)] * count,
        flipped=[False] * count,
        network_multipliers=[1.0] * count,
        custom_attributes=[{}] * count,
    )


# ---- the optimizer's state -------------------------------------------------------------------------------------------


def optimizer_state_bytes(options: Any, parameters: Iterable[torch.nn.Parameter]) -> tuple[int, str]:
    """The memory of the optimizer's state and of the weights' average, and a remark where it was not measured.

    One step is done on a parameter of each shape, outside of the simulation and on the CPU. For optimizers that need
    another device the bytes per value are taken from their name.
    """
    shapes = Counter(tuple(parameter.shape) for parameter in parameters)
    values = sum(math.prod(shape) * count for shape, count in shapes.items())
    average = 0 if options.ema_decay is None else values * BYTES_PER_VALUE
    try:
        with silence(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sizes = _state_sizes(options, list(shapes))
        return average + round(sum(size * count for size, count in zip(sizes, shapes.values()))), ""
    except Exception:  # kernels that only CUDA has, for one
        per_value = 2 if "8bit" in optimizer_name(options).lower() else 8
        return average + values * per_value, f"{per_value} bytes of optimizer state per value are assumed"


def _state_sizes(options: Any, shapes: Sequence[tuple[int, ...]]) -> list[float]:
    """Bytes of the state of one parameter of each shape; very large ones are measured at a part of their rows."""
    import torch

    rows = [max(1, min(shape[0], LARGEST_MEASURED // math.prod(shape[1:]))) if shape else 1 for shape in shapes]
    # Each shape twice, to distinguish look-up tables that parameters share from what is a parameter's own.
    sizes = [(count, *shape[1:]) for count, shape in zip(rows, shapes) for _ in range(2)]
    parameters = [torch.nn.Parameter(torch.full(size, 1e-3)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = create_optimizer(options, parameters).optimizer
    optimizer.step()
    states = [list(optimizer.state[parameter].values()) for parameter in parameters]
    times = Counter(id(value) for state in states for value in state)
    return [
        sum(_bytes(value) for value in state if times[id(value)] == 1) * (shape[0] if shape else 1) / count
        for state, shape, count in zip(states[::2], shapes, rows)
    ]


def _bytes(value: Any) -> int:
    """Of a state tensor; single numbers don't count."""
    import torch

    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) and value.numel() > 1 else 0
