"""What the training loop itself costs: the share of a step that is not forward pass, backward pass or optimizer.

    python benchmarks/loop_overhead.py --steps 40
    python benchmarks/loop_overhead.py --width 1024 --resolution 512 --batch_size 2
    python benchmarks/loop_overhead.py --family sd1

Trains a LoRA in a random FLUX.1 that is large enough for a step to take a tenth of a second or more on one CPU thread
(with real models steps are longer and the share is smaller), with latents and text encoder outputs cached on disk and
TensorBoard on; or in the tiny model of another family, as it is. The trainer is the real one; the program wraps its
methods with clocks. A part's time does not contain that of parts called inside it; ``rest`` is what no clock saw.
Medians over the steps, the first of which warm up. The first share is on the clock; the second is on processor time
and so counts the loader's threads too, which work beside the step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Measure, machine, parser, report, run_measured
from benchmarks.tiny_run import make_images, stable_diffusion_training_options, training_options, write_dataset

if TYPE_CHECKING:
    from tools.make_tiny_models import TinyFlux

LIMIT = 0.05
WARM_UP_STEPS = 3
WORK = ("forward", "backward", "optimizer")
PARTS = {
    "wait for data": "the next batch from the loader's threads",
    "to device": "latents and conditioning",
    "noise": "noise, noise levels, targets",
    "forward": "the transformer or U-Net",
    "loss": "loss from prediction and target",
    "backward": "",
    "micro-batch": "seeds, the network's hooks, the loss of the batch",
    "read losses": "the losses as numbers; on a GPU the wait for the step's work",
    "clip gradients": "norm of all gradients, scaling",
    "optimizer": "AdamW's step, gradients set free",
    "schedule": "learning rates and the rest of the update",
    "logging": "TensorBoard, progress bar, running average",
    "after step": "checks of what is due: files, samples, validation, signals",
    "rest": "",
}


class Clock:
    """Seconds of each part of each step: on the clock and, of this thread, of processor time."""

    def __init__(self) -> None:
        self.steps: list[dict[str, list[float]]] = []
        self.start()

    def start(self) -> None:
        """Begin the first step now."""
        self.now: dict[str, list[float]] = {}
        self.inside = ["rest"]
        self.process = time.process_time()
        self.mark = (time.perf_counter(), time.thread_time())

    def charge(self) -> None:
        """Give the time since the last mark to the part that runs."""
        now = (time.perf_counter(), time.thread_time())
        spent = self.now.setdefault(self.inside[-1], [0.0, 0.0])
        for index in range(2):
            spent[index] += now[index] - self.mark[index]
        self.mark = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The time of the block belongs to ``name``."""
        self.charge()
        self.inside.append(name)
        try:
            yield
        finally:
            self.wait_for_device()
            self.charge()
            self.inside.pop()

    def wait_for_device(self) -> None:
        """What was begun on a GPU belongs to the part that began it."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with its time given to ``name``."""

        def call(*arguments: Any, **named: Any) -> Any:
            with self.part(name):
                return function(*arguments, **named)

        return call

    def end_step(self) -> None:
        """A step is done; ``process`` is the processor time of all threads."""
        self.charge()
        process = time.process_time()
        self.now["process"] = [0.0, process - self.process]
        self.process = process
        self.steps.append(self.now)
        self.now = {}


def timed_trainer(clock: Clock, trainer_class: Any) -> Any:
    """A family's trainer with clocks around its methods and those of its loop."""
    import torch

    from library.training.training_loop import TrainingLoop

    class TimedLoop(TrainingLoop):
        def train(self, *arguments: Any) -> None:
            self.accelerator.backward = clock.timed("backward", self.accelerator.backward)
            optimizer, trainer = self.optimization.optimizer, self.step_loss.model
            optimizer.step = clock.timed("optimizer", optimizer.step)
            optimizer.zero_grad = clock.timed("optimizer", optimizer.zero_grad)
            trainer.latents.of = clock.timed("to device", trainer.latents.of)
            objective = type(trainer.objective)
            objective.noisy_input = timed_method(clock, "noise", objective.noisy_input)
            self.step_loss = clock.timed("loss", self.step_loss)
            clock.start()
            super().train(*arguments)

        def epoch_batches(self, *arguments: Any) -> Iterator[Any]:
            batches = iter(super().epoch_batches(*arguments))
            done = object()
            while True:
                with clock.part("wait for data"):
                    following = next(batches, done)
                if following is done:
                    return
                yield following

        def after_step(self, *arguments: Any) -> None:
            with clock.part("after step"):
                super().after_step(*arguments)
            clock.end_step()

    class TimedTrainer(trainer_class):
        loop_class = TimedLoop

    of_loop = {
        "train_batch": "micro-batch",
        "read_step": "read losses",
        "update": "schedule",
        "count_step": "schedule",
        "log_batch": "logging",
    }
    for method, name in of_loop.items():
        setattr(TimedLoop, method, timed_method(clock, name, getattr(TrainingLoop, method)))
    for method, name in {"conditioning": "to device", "predict": "forward"}.items():
        setattr(TimedTrainer, method, timed_method(clock, name, getattr(trainer_class, method)))
    torch.nn.utils.clip_grad_norm_ = clock.timed("clip gradients", torch.nn.utils.clip_grad_norm_)
    return TimedTrainer


def timed_method(clock: Clock, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method with its time given to ``name``."""

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        with clock.part(name):
            return method(self, *arguments, **named)

    return call


def train_here(result: Path, family: str, arguments: list[str]) -> None:
    """Train in this process and write the seconds of each step's parts into ``result``."""
    import torch

    from library.console import set_up_console
    from library.families import by_model
    from library.options import parse_options

    trainer_class = by_model(family).trainer_class()
    options: Any = parse_options(trainer_class.options_class, "", arguments)
    set_up_console(options.console)
    clock = Clock()
    timed_trainer(clock, trainer_class)(options).train()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result.write_text(json.dumps({"device": device, "steps": clock.steps}), encoding="utf-8")


def write_models(folder: Path, options: argparse.Namespace) -> TinyFlux:
    """The tiny models with a larger transformer in place of the tiny one."""
    from dataclasses import replace

    from library.models.flux.transformer import FluxTransformer, rope_axes
    from library.safetensors_io import save_file
    from tools.make_tiny_models import fill_randomly, make_tiny_flux, transformer_config

    files = make_tiny_flux(folder)
    config = replace(
        transformer_config(),
        hidden_size=options.width,
        num_heads=options.width // 64,
        depth=options.double_blocks,
        depth_single=options.single_blocks,
        mlp_hidden=4 * options.width,
        axes_dims=rope_axes(64),
    )
    transformer = FluxTransformer(config)
    fill_randomly(transformer, 0, "benchmark transformer")
    save_file(transformer.state_dict(), files.transformer)
    return files


def train(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train in a fresh process; what ``train_here`` writes."""
    images = make_images(folder / "images", count=8, size=options.resolution)
    steps = options.steps + WARM_UP_STEPS
    # Epochs of a usual length: what happens between them belongs to no step.
    repeats = -(-steps * options.batch_size // 8)
    dataset = write_dataset(folder / "dataset.toml", images, options.resolution, options.batch_size, repeats)
    more = {"network_dim": options.rank, "max_data_loader_n_workers": options.workers, "logging_dir": folder / "logs"}
    if options.family == "flux":
        models = write_models(folder / "models", options)
        arguments = training_options(models, dataset, folder / "output", steps, more)
    else:
        from tools.make_tiny_stable_diffusion import make_tiny_stable_diffusion

        model = make_tiny_stable_diffusion(folder / "models", options.family)
        arguments = stable_diffusion_training_options(model, dataset, folder / "output", steps, more)
    result = folder / "seconds.json"
    run_measured([sys.executable, __file__, "--train_here", result, options.family, *arguments], options.threads)
    return json.loads(result.read_text(encoding="utf-8"))


def shares(steps: list[dict[str, list[float]]]) -> tuple[float, float]:
    """The median share of a step outside ``WORK``: on the clock, and of processor time."""
    wall, cpu = [], []
    for step in steps:
        total = sum(seconds[0] for seconds in step.values())
        wall.append(1 - sum(step[part][0] for part in WORK) / total)
        cpu.append(1 - sum(step[part][1] for part in WORK) / step["process"][1])
    return statistics.median(wall), statistics.median(cpu)


def print_parts(steps: list[dict[str, list[float]]]) -> dict[str, float]:
    """Print and return the median milliseconds of each part."""
    parts = {part: 1000 * statistics.median(step.get(part, [0.0])[0] for step in steps) for part in PARTS}
    total = sum(parts.values())
    print(f"\n{'part of a step':16} {'ms':>9} {'share':>7}   what it is")
    for part, milliseconds in parts.items():
        print(f"{part:16} {milliseconds:9.3f} {milliseconds / total:7.2%}   {PARTS[part]}".rstrip())
    return parts


def main() -> None:
    """Measure and report."""
    if sys.argv[1:2] == ["--train_here"]:
        train_here(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
        return
    arguments = parser(__doc__)
    arguments.add_argument("--family", choices=("flux", "sd1", "sd2", "sdxl"), default="flux")
    arguments.add_argument("--steps", type=int, default=30, help="measured steps")
    arguments.add_argument("--width", type=int, default=384, help="hidden size, a multiple of 64 (FLUX.1: 3072)")
    arguments.add_argument("--double_blocks", type=int, default=1)
    arguments.add_argument("--single_blocks", type=int, default=2)
    arguments.add_argument("--resolution", type=int, default=256, help="side of the images in pixels")
    arguments.add_argument("--batch_size", type=int, default=1)
    arguments.add_argument("--rank", type=int, default=16)
    arguments.add_argument("--workers", type=int, default=2, help="threads that load batches")
    arguments.add_argument("--threads", type=int, default=1, help="threads of torch on a CPU")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = train(options, Path(name))
    steps = result["steps"][WARM_UP_STEPS:]
    parts = print_parts(steps)
    wall, cpu = shares(steps)
    report(
        "loop_overhead",
        [
            Measure("share of a step outside forward, backward, optimizer", wall, "x", LIMIT),
            Measure("the same of processor time, loader threads included", cpu, "x", LIMIT),
            Measure("a step", sum(parts.values()), "ms"),
        ],
        options,
        machine(result["device"], options.threads),
        milliseconds=parts,
    )


if __name__ == "__main__":
    main()
