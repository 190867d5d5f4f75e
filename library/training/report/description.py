"""The facts about a run that its reports print, gathered from the run itself."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.training.report.timing import peak_device_memory, peak_process_memory
from library.training.report.wording import EndFacts, FileFacts, Forecast, GroupFacts, PartFacts, StartFacts

if TYPE_CHECKING:
    from torch import nn

    from library.training.report.timing import RunClock
    from library.training.run_facts import RunFacts


def start_facts(run: RunFacts) -> StartFacts:
    """A run that stands before its first step."""
    options, pipeline, optimization, train = run.options, run.pipeline, run.optimization, run.data.train
    loaded = {part: pipeline.modules[part] for part in pipeline.parts if part in pipeline.modules}
    schedule = options.lr_scheduler
    return StartFacts(
        family=run.family,
        device=device_name(run.device),
        processes=run.processes,
        dtype=dtype_name(run.dtype),
        attention=str(pipeline.attention_backend),
        gradient_checkpointing=options.precision.gradient_checkpointing,
        parts=[part_facts(part, module) for part, module in loaded.items()],
        absent=[part for part in pipeline.parts if part not in loaded],
        network=str(options.network.network_module),
        network_dtype=", ".join(sorted({dtype_name(parameter.dtype) for parameter in optimization.parameters})),
        modules=module_counts(run.network, pipeline.denoiser),
        groups=group_facts(optimization.optimizer.param_groups, optimization.group_names),
        optimizer=optimization.created.description,
        schedule="none" if optimization.created.schedule_free else schedule.lr_scheduler_type or schedule.lr_scheduler,
        batch_sizes=list(dict.fromkeys(dataset.settings.batch_size for dataset in train.datasets)),
        accumulation=run.plan.accumulation,
        images_per_epoch=train.sample_count,
        steps=run.plan.max_steps,
        epochs=run.plan.epochs,
        steps_per_epoch=run.plan.steps_per_epoch,
        start_step=run.progress.step,
        seed=run.seed,
        average_decay=options.optimizer.ema_decay,
    )


def device_name(device: Any) -> str:
    """The device, with the name of its hardware where there is one."""
    if device.type != "cuda":
        return str(device)
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})"


def dtype_name(dtype: Any) -> str:
    """``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def part_facts(name: str, module: nn.Module) -> PartFacts:
    """A loaded part of the base model; weights in a storage format count as the numbers that they stand for."""
    from library.memory.stored_linear import StoredLinear

    bytes_of: Counter[str] = Counter()
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    count = 0
    for layer in module.modules():
        if isinstance(layer, StoredLinear):
            count += layer.in_features * layer.out_features
            stored = [tensors.pop(id(buffer)) for buffer in layer.buffers()]
            bytes_of[layer.format_name] += sum(tensor.numel() * tensor.element_size() for tensor in stored)
    for tensor in tensors.values():
        count += tensor.numel()
        bytes_of[dtype_name(tensor.dtype)] += tensor.numel() * tensor.element_size()
    most = max(bytes_of, key=lambda dtype: bytes_of[dtype], default="")
    return PartFacts(name, count, most, bytes_of.total())


def module_counts(network: Any, image_model: str) -> dict[str, int]:
    """How many modules the network has in the transformer or U-Net and in text encoders, if it tells."""
    lists = {image_model: "unet_loras", "text encoder": "text_encoder_loras"}
    return {model: len(getattr(network, name)) for model, name in lists.items() if hasattr(network, name)}


def group_facts(groups: Sequence[Mapping[str, Any]], names: Sequence[str] | None) -> list[GroupFacts]:
    """The optimizer's groups with the rates that their schedule begins from; without names they are numbered."""
    found = []
    for number, group in enumerate(groups, start=1):
        rate = group.get("initial_lr", group.get("lr"))
        parameters = group["params"]
        found.append(
            GroupFacts(
                name=names[number - 1] if names and number <= len(names) else f"group {number}",
                tensors=len(parameters),
                parameters=sum(parameter.numel() for parameter in parameters),
                learning_rate=None if rate is None else float(rate),
            )
        )
    return found


def end_facts(run: RunFacts, clock: RunClock, page: Path | None, forecast: Forecast | None = None) -> EndFacts:
    """A run that has done its last step; ``page`` is its report, ``forecast`` the memory that it was to take."""
    progress, outputs = run.progress, run.outputs
    losses = {"average": progress.record.average} if progress.record.losses else {}
    written = dict.fromkeys([*outputs.written, *([page] if page else [])])
    return EndFacts(
        steps=progress.step - progress.first_step,
        images=progress.images,
        seconds=time.time() - progress.process_started_at,
        parts=clock.seconds,
        peak_process_bytes=peak_process_memory(),
        peak_device_bytes=peak_device_memory(),
        losses={**losses, **progress.validation_losses},
        left_out=progress.left_out,
        forecast=forecast,
        files=[FileFacts(path, size_on_disk(path)) for path in written if path.exists()],
        samples=[FileFacts(path, size_on_disk(path)) for path in dict.fromkeys(outputs.sample_files) if path.exists()],
        interrupted=progress.ended_by,
    )


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
    return path.stat().st_size
