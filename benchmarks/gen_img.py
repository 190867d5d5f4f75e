"""How fast ``gen_img.py`` draws: against diffusers' pipeline, from the command to its first image, and per text.

    python benchmarks/gen_img.py
    python benchmarks/gen_img.py --variant sdxl --batch 2 --side 512

A random model of the family's structure, and the tiny Stable Diffusion 1.5 that ships with the project. Against
diffusers' own pipeline, both draw the same batch in turns in one process, texts encoded anew each time, from the same
weights with the same sampler, to images of 8 bits. The start is the processor time of a whole run that draws one image.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import ROOT, Measure, machine, parser, report, run_measured

TINY = ROOT / "assets" / "tiny_sd15" / "sd15-tiny.safetensors"
PROMPT, NEGATIVE = "a big red circle on a blue background", "small"
SCHEDULERS = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "euler_a": "EulerAncestralDiscreteScheduler"}
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
SLOWEST, LATEST, ENCODED_ONCE = 0.95, 4.0, 1.0


def parse_arguments() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--variant", choices=("sd1", "sd2", "sdxl"), default="sd1")
    arguments.add_argument("--sampler", choices=tuple(SCHEDULERS), default="ddim")
    arguments.add_argument("--side", type=int, default=128, help="of the images, in pixels")
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--steps", type=int, default=10)
    arguments.add_argument("--repeats", type=int, default=9, help="rounds, in each of which both draw once")
    arguments.add_argument("--runs", type=int, default=3, help="of the whole program")
    return arguments.parse_args()


class Ours:
    """This project's pipeline."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        import torch

        from library.models.stable_diffusion.pipeline import (
            StableDiffusionFiles,
            StableDiffusionPipeline,
            StableDiffusionRequest,
        )

        self.pipeline = StableDiffusionPipeline(StableDiffusionFiles(folder), torch.float32, "cpu")
        settings: dict[str, Any] = {"sampler": options.sampler, "sample_steps": options.steps, "scale": 7.5}
        sizes = {"width": options.side, "height": options.side}
        self.requests = [
            StableDiffusionRequest(PROMPT, NEGATIVE, seed=seed, **settings, **sizes) for seed in range(options.batch)
        ]

    def __call__(self) -> list[Any]:
        return self.pipeline.generate_batch(self.requests)


class Theirs:
    """diffusers' pipeline."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        import diffusers

        name = "StableDiffusionXLPipeline" if options.variant == "sdxl" else "StableDiffusionPipeline"
        self.pipeline = getattr(diffusers, name).from_pretrained(folder)
        own = {"clip_sample": False} if options.sampler == "ddim" else {}
        self.pipeline.scheduler = getattr(diffusers, SCHEDULERS[options.sampler])(**SCHEDULE, **own)
        self.pipeline.set_progress_bar_config(disable=True)
        self.options = options

    def __call__(self) -> list[Any]:
        import torch

        count, side = self.options.batch, self.options.side
        return self.pipeline(
            [PROMPT] * count,
            negative_prompt=[NEGATIVE] * count,
            height=side,
            width=side,
            num_inference_steps=self.options.steps,
            guidance_scale=7.5,
            generator=[torch.Generator().manual_seed(seed) for seed in range(count)],
        ).images


def in_turns(options: argparse.Namespace) -> list[Measure]:
    """Images per second of processor time, ours and theirs, and the median ratio over the rounds."""
    from tools.make_tiny_stable_diffusion import make_tiny_stable_diffusion

    with tempfile.TemporaryDirectory() as name:
        folder = make_tiny_stable_diffusion(name, options.variant, "diffusers")
        ours, theirs = Ours(folder, options), Theirs(folder, options)
        for mine, other in zip(ours(), theirs()):  # which also warms up
            if max(abs(a - b) for a, b in zip(mine.tobytes(), other.tobytes())) > 1:
                sys.exit("error: the two do not draw the same image")
        taken = [(_processor_seconds(ours), _processor_seconds(theirs)) for _ in range(options.repeats)]
    ratio = statistics.median(other / mine for mine, other in taken)
    speeds = [options.batch / statistics.median(column) for column in zip(*taken)]
    return [
        Measure("images per second of processor time", speeds[0], "/s"),
        Measure("the same of diffusers' pipeline", speeds[1], "/s"),
        Measure("ratio", ratio, "x", SLOWEST, "higher"),
    ]


def _processor_seconds(draw: Any) -> float:
    start = time.process_time()
    draw()
    return time.process_time() - start


def whole_program(options: argparse.Namespace, folder: Path) -> list[Measure]:
    """The processor time of a command that draws one image."""
    words = [sys.executable, ROOT / "gen_img.py", "--ckpt", TINY, "--outdir", folder, "--prompt", PROMPT]
    words += ["--W", options.side, "--H", options.side, "--steps", options.steps, "--scale", 5]
    taken = [run_measured(words).cpu for _ in range(options.runs)]
    return [Measure("from the command to the first image, processor time", statistics.median(taken), "s", LATEST)]


def text_passes(folder: Path) -> list[Measure]:
    """How often a text goes through the text encoder in a run with three prompts, of which two are alike."""
    import gen_img
    from library.models.clip import ClipTextEncoder

    passes, own = [], ClipTextEncoder.__init__

    def counting(self: Any, *arguments: Any, **named: Any) -> None:
        own(self, *arguments, **named)
        self.text_model.register_forward_hook(lambda module, inputs, output: passes.append(len(output[0])))

    prompts = folder / "prompts.txt"
    lines = ["a red circle --d 1", "a red circle --d 2", "a blue square --d 3"]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    ClipTextEncoder.__init__ = counting  # type: ignore[method-assign]
    try:
        words = ["--ckpt", TINY, "--outdir", folder, "--from_file", prompts, "--W", 64, "--H", 64, "--steps", 2]
        sys.argv = ["gen_img.py", *map(str, words)]
        gen_img.main()
    finally:
        ClipTextEncoder.__init__ = own  # type: ignore[method-assign]
    distinct = 3  # two prompts and the empty negative one
    return [Measure("passes of the text encoder for each text", sum(passes) / distinct, "", ENCODED_ONCE)]


def main() -> None:
    """Measure and report."""
    import torch

    options = parse_arguments()
    torch.set_num_threads(1)
    measures = in_turns(options)
    with tempfile.TemporaryDirectory() as name:
        measures += whole_program(options, Path(name))
        measures += text_passes(Path(name))
    report("gen_img", measures, options, machine("cpu", 1))


if __name__ == "__main__":
    main()
