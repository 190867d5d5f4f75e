"""What storage formats change: weights of several distributions, their products, a model's output and LoRA gradients.

    python benchmarks/format_quality.py                           # half of FLUX.1's width, three blocks; some minutes
    python benchmarks/format_quality.py --device cuda --size full # FLUX.1 in its true dimensions
    python benchmarks/format_quality.py --checkpoint model.safetensors   # the weights of a file of yours instead

Errors are the norm of a difference over the norm of what it should be. Weights and products are compared with those in
float32 (with normal inputs products have the weights' error; those of inputs of which one channel in a hundred is fifty
times as large are shown), the model's velocity and its LoRA's gradients with those over bfloat16 weights. The model's
weights have a deviation of one over the root of their inputs, so that every block changes what it passes on. Random
weights know nothing that they could forget: how well a LoRA learns, and how images look, is not measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.formats import FORMATS
from benchmarks.measuring import Attempts, Measure, machine, parser, report
from benchmarks.random_models import Training, add_size_options, config_of, normal_values, open_random

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from benchmarks.random_models import Draw

STORED = ("fp8 by tensor", "fp8 by block", "int8", "nf4")
SIDES = {"full": (3072, 3072), "half": (1536, 1536), "tiny": (256, 256)}
"""Outputs and inputs of the single layer."""
MODELS: dict[str, dict[str, Any]] = {
    "full": {},
    "half": {"hidden_size": 1536, "num_heads": 12, "mlp_hidden": 6144, "depth": 1, "depth_single": 2},
    "tiny": {"depth": 2, "depth_single": 4},
}
TOKENS = 64
DEVIATION = 0.02
"""Of what is drawn."""
SMALLEST_SIDE = 256
"""Of a weight of ``--checkpoint``; smaller ones stay as they are in every format."""


def heavy_values(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Student's t with 3 degrees of freedom, whose deviation is the square root of 3."""
    import torch

    squares = sum(torch.randn(shape, generator=generator, device=generator.device).square() for _ in range(3))
    values = torch.randn(shape, generator=generator, device=generator.device) / (squares / 3).sqrt()
    return values * (DEVIATION / 3**0.5)


def outlier_values(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal values, of which one in a thousand is twenty times as large."""
    import torch

    large = torch.rand(shape, generator=generator, device=generator.device) < 1e-3
    return normal_values(shape, generator) * (1 + 19 * large)


def uneven_values(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal values whose outputs (rows) differ in size: their deviations are log-normal."""
    import torch

    rows = torch.randn(shape[:1] + (1,) * (len(shape) - 1), generator=generator, device=generator.device).exp()
    return normal_values(shape, generator) * rows


DISTRIBUTIONS: dict[str, Draw] = {
    "normal": normal_values,
    "heavy tails": heavy_values,
    "rare outliers": outlier_values,
    "uneven rows": uneven_values,
}


def of_unit_gain(draw: Draw) -> Draw:
    """Values whose deviation is one over the root of the inputs."""
    return lambda shape, generator: draw(shape, generator) / (DEVIATION * shape[-1] ** 0.5)


def error(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over the norm of what is wanted, in percent."""
    return 100 * ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def as_stored(weight: Tensor, name: str) -> Tensor:
    """The weight as float32 after it has been in the format."""
    import torch

    from library.memory import formats
    from library.memory.storage import Storage

    return formats.quantise(weight, Storage(**FORMATS[name])).to(torch.float32)


def usable(device: torch.device) -> list[str]:
    """The formats that the device can work with; one that it cannot is printed."""
    from library.errors import UserError
    from library.memory import formats
    from library.memory.storage import Storage

    found = []
    for name in STORED:
        try:
            formats.require(Storage(**FORMATS[name]), device)
            found.append(name)
        except UserError as problem:
            print(f"left out: {name}: {problem}")
    return found


def measure_layers(size: str, device: torch.device, names: list[str]) -> Iterator[Measure]:
    """A layer's weights, and its products with inputs of which some channels are far larger."""
    import torch

    generator = torch.Generator(device).manual_seed(1)
    outputs, inputs = SIDES[size]
    channels = torch.rand(inputs, generator=generator, device=device) < 0.01
    given = torch.randn(TOKENS, inputs, generator=generator, device=device) * (1 + 49 * channels)
    for distribution, draw in DISTRIBUTIONS.items():
        weight = draw((outputs, inputs), generator)
        exact = given @ weight.t()
        for name in names:
            stored = as_stored(weight.bfloat16(), name)
            yield Measure(f"{distribution}: {name}: weights", error(stored, weight), "%")
            yield Measure(f"{distribution}: {name}: products", error(given @ stored.t(), exact), "%")


def measure_models(
    size: str,
    device: str,
    resolution: int,
    names: list[str],
    attempts: Attempts,
    distributions: Sequence[str] = ("normal", "heavy tails"),
) -> Iterator[Measure]:
    """The velocity of a random FLUX.1 and the gradients of a LoRA on it, of which neither part is zero."""
    from library.memory.storage import Storage

    for distribution in distributions:
        draw = of_unit_gain(DISTRIBUTIONS[distribution])
        exact: tuple[Tensor, Tensor] | None = None
        for name in ("bfloat16", *names):
            with attempts.part(f"model, {distribution}, {name}"):
                storage = Storage(**FORMATS[name]) if FORMATS[name] else None
                pipeline = open_random(
                    config_of("flux", "tiny" if size == "tiny" else "full", **MODELS[size]), device, storage
                )
                found = outcome(Training(pipeline, device, resolution, draw=draw))
                if exact is None:
                    exact = found
                    continue
                place = f"model, {distribution}: {name}"
                for what, value, wanted in zip(("velocity", "LoRA's gradients"), found, exact):
                    yield Measure(f"{place}: {what}", error(value, wanted), "%")


def outcome(training: Training) -> tuple[Tensor, Tensor]:
    """The velocity, and all gradients in one vector."""
    import torch

    generator = torch.Generator(training.device).manual_seed(2)
    with torch.no_grad():
        for name, parameter in training.network.named_parameters():
            if "lora_up" in name:
                parameter.normal_(0, 0.01, generator=generator)
    velocity = training.velocity().detach().float()
    training.gradients()
    return velocity, torch.cat([p.grad.float().flatten() for p in training.parameters if p.grad is not None])


def measure_file(path: Path, device: torch.device, names: list[str], count: int) -> Iterator[Measure]:
    """The weights of a file: the error over ``count`` of its matrices, evenly chosen, and the largest of one."""
    import torch

    from library.checkpoints import open_checkpoint

    source = open_checkpoint(path)
    keys = [key for key in source.keys() if len(source.shape(key)) == 2 and min(source.shape(key)) >= SMALLEST_SIDE]  # noqa: SIM118
    chosen = keys[:: max(1, -(-len(keys) // count))]
    print(f"{path}: {len(chosen)} of {len(keys)} matrices")
    totals, worst, size = dict.fromkeys(names, 0.0), dict.fromkeys(names, (0.0, "")), 0.0
    for key in chosen:
        weight = source.load(key, torch.float32, device)
        size += weight.double().square().sum().item()
        for name in names:
            stored = as_stored(weight.bfloat16(), name)
            totals[name] += (stored.double() - weight.double()).square().sum().item()
            worst[name] = max(worst[name], (error(stored, weight), key))
    for name in names:
        yield Measure(f"{name}: weights", 100 * (totals[name] / size) ** 0.5, "%")
        yield Measure(f"{name}: worst, {worst[name][1]}", worst[name][0], "%")


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__)
    add_size_options(arguments, sizes=("tiny", "half", "full"), default="half")
    arguments.add_argument("--resolution", type=int, default=256, help="pixels of the model's image, a square")
    arguments.add_argument("--checkpoint", type=Path, help="measure the weights of this file and nothing else")
    arguments.add_argument("--matrices", type=int, default=64, help="most weights of --checkpoint that are measured")
    options = arguments.parse_args()
    import torch

    device = torch.device(options.device)
    attempts, names, measures = Attempts(), usable(device), []
    if options.checkpoint is not None:
        measures += measure_file(options.checkpoint, device, names, options.matrices)
    else:
        measures += measure_layers(options.size, device, names)
        measures += measure_models(options.size, options.device, options.resolution, names, attempts)
    report(
        "format_quality",
        measures,
        options,
        machine(options.device, torch.get_num_threads()),
        failures=attempts.failures,
    )
    attempts.finish()


if __name__ == "__main__":
    main()
