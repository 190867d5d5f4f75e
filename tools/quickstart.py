"""Train a LoRA from nothing, without a GPU or a model hub, and look at the result.

``python tools/quickstart.py`` makes the environment ``.venv`` (if it doesn't run in it already), installs
``requirements.txt`` into it, and then does what a user with real weights does: it writes a small data set, its TOML and
a sample prompt file into ``quickstart_output``, starts ``accelerate launch flux_train_network.py`` on the tiny FLUX.1
in ``assets/tiny_flux``, and reports what came out: images before and after, the loss curve, a score, and where the
LoRA lies. ``--family chroma`` does the same with the tiny Chroma in ``assets/tiny_chroma``, ``--family lumina``, with
``lumina_train_network.py``, with the tiny Lumina Image 2.0 in ``assets/tiny_lumina``, ``--family hunyuan_image``, with
``hunyuan_image_train_network.py``, with the tiny HunyuanImage-2.1 in ``assets/tiny_hunyuan_image``, and ``--family
sd15``, with ``train_network.py``, with the tiny Stable Diffusion 1.5 in ``assets/tiny_sd15``, whose images
``gen_img.py`` draws.

The concept is a "zog", a purple disc inside a yellow ring, which the tiny model has never seen. The program ends with 1
when the score says that it wasn't learned, and with the trainer's own code when the training failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from library.console import run_script  # noqa: E402
from library.torch_build import missing_cuda  # noqa: E402
from tools import environment  # noqa: E402
from tools.quickstart_families import FAMILIES, Family  # noqa: E402

if TYPE_CHECKING:
    from tools.score_concept import Score

NAME = "zog"
PIXELS = 128
PROMPTS = (
    "a zog on a red background",
    "a zog on a blue background",
    "a zog on a white background",
    "a zog on a black background",
    "a zog on an orange background",
    "a zog on a green background",
    "a red square on a blue background",
    "a green triangle on a white background",
)
SEEDS = (11, 12)
OWN_FILE = "# Written by tools/quickstart.py, which may overwrite this folder."


@dataclass(frozen=True)
class Folders:
    """Where the quick start keeps its files, and which of ``FAMILIES`` it trains."""

    root: Path
    name: str = "flux"

    @property
    def family(self) -> Family:
        """What is done for its models."""
        return FAMILIES[self.name]

    @property
    def dataset(self) -> Path:
        """Images and captions."""
        return self.root / "dataset"

    @property
    def trained(self) -> Path:
        """The training's output folder."""
        return self.root / "trained"

    @property
    def samples(self) -> Path:
        """Images that the training generates."""
        return self.trained / "sample"

    def drawn(self, moment: str) -> Path:
        """Images of a script that draws, ``before`` or ``after`` the training."""
        return self.root / moment

    @property
    def logs(self) -> Path:
        """Training curves."""
        return self.root / "logs"

    @property
    def dataset_config(self) -> Path:
        """The dataset's description."""
        return self.root / "dataset.toml"

    @property
    def prompts(self) -> Path:
        """The sample prompts."""
        return self.root / "sample_prompts.txt"

    @property
    def lora(self) -> Path:
        """The LoRA."""
        return self.trained / f"{NAME}.safetensors"


def main() -> int:
    """Make the environment, go on inside it, and run the quick start. Returns the exit code."""
    options = parse_arguments()
    if not options.use_this_python:
        seconds = environment.set_up(("requirements.txt",))
        if seconds:
            print(f"installed in {seconds:.0f} s", flush=True)
        if not environment.runs_inside():
            return environment.continue_inside(str(Path(__file__).resolve()), sys.argv[1:])
    suffix = "" if options.family == "flux" else f"_{options.family}"
    output = options.output or ROOT / f"quickstart_output{suffix}"
    steps = options.steps or FAMILIES[options.family].steps
    return quickstart(Folders(output.resolve(), options.family), steps, options.seed, options.threads)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help_of_family = "which tiny model (default flux)"
    parser.add_argument("--family", "--model_type", choices=tuple(FAMILIES), default="flux", help=help_of_family)
    parser.add_argument("--output", type=Path, help="folder for all files (default quickstart_output)")
    defaults = ", ".join(f"{name} {family.steps}" for name, family in FAMILIES.items())
    parser.add_argument("--steps", type=int, help=f"training steps (default: {defaults})")
    parser.add_argument("--seed", type=int, default=1, help="training seed (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--use_this_python", action="store_true", help="make no .venv: everything is installed already")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------- the three acts


def quickstart(folders: Folders, steps: int, seed: int, threads: int) -> int:
    """Write the data, train, report. Returns the exit code."""
    begin = time.time()
    if not may_overwrite(folders):
        print(f"{folders.root} holds other files; name an empty or new folder with --output", file=sys.stderr)
        return 2
    prepare(folders)
    commands = [training_command(folders, steps, seed, threads)]
    if folders.family.drawn_by:
        commands = [drawing_command(folders, "before"), *commands, drawing_command(folders, "after")]
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    variables["CUDA_VISIBLE_DEVICES"] = ""  # the tiny model trains on the CPU
    for command in commands:
        print("\n" + readable(command) + "\n", flush=True)
        code = environment.run_to_its_end(command, variables)
        if code:
            print(f"the command ended with exit code {code}; see the message above", file=sys.stderr)
            return code
    return report(folders, commands, steps, time.time() - begin)


def may_overwrite(folders: Folders) -> bool:
    """Whether the output folder is new, empty, or an earlier quick start's."""
    if not folders.root.exists() or (folders.root.is_dir() and not any(folders.root.iterdir())):
        return True
    config = folders.dataset_config
    return config.is_file() and config.read_text(encoding="utf-8").startswith(OWN_FILE)


def prepare(folders: Folders) -> None:
    """Write the data set, its configuration and the sample prompts; what an earlier run left there goes away.

    Beside the concept's images there are ordinary ones as regularisation images, so that the LoRA learns what is
    special about the concept instead of turning everything into it.
    """
    from tools.tiny_flux_drawings import concept_images, ordinary_images

    for folder in (folders.dataset, folders.trained, folders.logs, folders.drawn("before"), folders.drawn("after")):
        if folder.exists():
            shutil.rmtree(folder)
    sets = {"concept": concept_images(15, PIXELS, seed=0), "ordinary": ordinary_images(48, PIXELS, seed=0)}
    for name, images in sets.items():
        (folders.dataset / name).mkdir(parents=True)
        for index, (image, caption) in enumerate(images):
            image.save(folders.dataset / name / f"{index:02d}.png")
            (folders.dataset / name / f"{index:02d}.txt").write_text(caption + "\n", encoding="utf-8")
        print(f"wrote {len(images)} captioned images to {folders.dataset / name}", flush=True)
    folders.dataset_config.write_text(dataset_description(folders.dataset), encoding="utf-8")
    lines = [f"{prompt} {sample_options(folders.family)} --d {seed}" for seed in SEEDS for prompt in PROMPTS]
    folders.prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")


def sample_options(family: Family) -> str:
    """The options of a sample prompt."""
    return f"--w {PIXELS} --h {PIXELS} --s 20 {family.samples}"


def dataset_description(dataset: Path) -> str:
    """The dataset TOML: a fifth of the concept's images is kept for validation."""
    return f"""{OWN_FILE}
[general]
caption_extension = ".txt"

[[datasets]]
resolution = {PIXELS}
batch_size = 8

  [[datasets.subsets]]
  image_dir = "{(dataset / "concept").as_posix()}"
  num_repeats = 4
  validation_split = 0.2

  [[datasets.subsets]]
  image_dir = "{(dataset / "ordinary").as_posix()}"
  is_reg = true
"""


def training_command(folders: Folders, steps: int, seed: int, threads: int) -> list[str]:
    """The command, as a user with real weights would type it, with the tiny model in their place."""
    family = folders.family
    settings: dict[str, object] = {
        **family.files,
        **family.only_tiny,
        **family.settings,
        "dataset_config": folders.dataset_config,
        "output_dir": folders.trained,
        "output_name": NAME,
        "save_model_as": "safetensors",
        "network_module": family.network_module,
        "network_dim": 16,
        "network_alpha": 16,
        "optimizer_type": "AdamW",
        "lr_scheduler": "cosine",
        "max_train_steps": steps,
        "mixed_precision": "no",
        "seed": seed,
        "validate_every_n_steps": max(1, steps // 12),
        "validate_every_n_epochs": steps,
        "log_with": "tensorboard",
        "logging_dir": folders.logs,
    }
    flags = ["network_train_unet_only", "cache_latents", "sdpa", *family.flags]
    if family.drawn_by is None:
        settings |= {"sample_prompts": folders.prompts, "sample_every_n_steps": sample_interval(steps)}
        flags.append("sample_at_first")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", str(threads)]
    launch += [
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--cpu",
    ]
    arguments: list[str] = []
    for name, value in settings.items():
        arguments += [f"--{name}", *value] if isinstance(value, tuple) else [f"--{name}={value}"]
    arguments += [f"--{flag}" for flag in flags]
    return [*launch, str(ROOT / family.script), *arguments]


def drawing_command(folders: Folders, moment: str) -> list[str]:
    """The command that draws the sample prompts ``before`` or ``after`` the training."""
    family = folders.family
    settings: dict[str, object] = {
        "ckpt": family.files["pretrained_model_name_or_path"],
        "from_file": folders.prompts,
        "outdir": folders.drawn(moment),
        "batch_size": len(SEEDS) * len(PROMPTS),
    }
    if moment == "after":
        settings |= {"network_module": family.network_module, "network_weights": folders.lora}
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    return [sys.executable, str(ROOT / str(family.drawn_by)), *arguments, "--sequential_file_name"]


def sample_interval(steps: int) -> int:
    """Steps between sample images: four times in a run."""
    return max(1, steps // 4)


def readable(command: list[str]) -> str:
    """The command with one option on a line, or on Windows, whose two shells join lines in different ways, on one."""
    if sys.platform == "win32":
        return subprocess.list2cmdline(command).replace(str(ROOT) + os.sep, "")
    script = next(index for index, part in enumerate(command) if part.endswith(".py"))
    head = " ".join(command[: script + 1])
    head = head.replace(f"{sys.executable} -m accelerate.commands.launch", "accelerate launch")
    head = head.replace(sys.executable, "python")
    return " \\\n  ".join(
        [
            head.replace(str(ROOT) + os.sep, ""),
            *(shlex.quote(part.replace(str(ROOT) + os.sep, "")) for part in command[script + 1 :]),
        ]
    )


# ----------------------------------------------------------------------------------------------------------- report


def sample_images(folder: Path, moment: str) -> list[Path]:
    """The sample images of one moment (``e000000`` or a step such as ``000300``) in the order of the prompts.

    Raises FileNotFoundError when a prompt has none.
    """
    pattern = re.compile(rf"{NAME}_{moment}_(\d+)_\d{{14}}(_\d+)?\.png")
    found = {int(match[1]): path for path in sorted(folder.iterdir()) if (match := pattern.fullmatch(path.name))}
    missing = [index for index in range(len(PROMPTS) * len(SEEDS)) if index not in found]
    if missing:
        raise FileNotFoundError(f"{folder}: no sample {NAME}_{moment} for the prompts {missing}")
    return [found[index] for index in range(len(PROMPTS) * len(SEEDS))]


def images_before_and_after(folders: Folders, steps: int) -> dict[str, list[Path]]:
    """The images of both moments in the order of the prompts."""
    if folders.family.drawn_by:
        return {moment: sorted(folders.drawn(moment).glob("*.png")) for moment in ("before", "after")}
    last = steps // sample_interval(steps) * sample_interval(steps)
    moments = {"before": "e000000", "after": f"{last:06d}"}
    return {word: sample_images(folders.samples, moment) for word, moment in moments.items()}


def report(folders: Folders, commands: list[list[str]], steps: int, seconds: float) -> int:
    """Write the images and ``report.md``, print the report, and return 0 if the concept was learned, else 1."""
    from tools.score_concept import failures, read_images, read_prompts, score

    files = images_before_and_after(folders, steps)
    before_after_image(files["before"], files["after"], folders.root / "before_after.png")
    curves = read_scalars(folders.logs)
    loss = averaged_curve(next((values for tag, values in curves.items() if tag == "loss/current"), []))
    validation = curves.get("loss/validation/step_average", [])
    loss_image({"training loss": loss, "validation loss": validation}, folders.root / "loss.png")
    prompts = read_prompts(folders.prompts)
    before, after = (score(read_images(files[word]), prompts) for word in ("before", "after"))
    problems = failures(after, before)
    listing = "\n\n".join(map(readable, commands))
    text = "\n".join(report_lines(folders, steps, seconds, loss, validation, before, after, problems))
    (folders.root / "report.md").write_text(f"{text}\n\n```\n{listing}\n```\n", encoding="utf-8")
    print("\n" + text)
    return 1 if problems else 0


def report_lines(
    folders: Folders,
    steps: int,
    seconds: float,
    loss: list[tuple[int, float]],
    validation: list[tuple[int, float]],
    before: Score,
    after: Score,
    problems: list[str],
) -> list[str]:
    """The report as Markdown."""
    lines = [
        "# Quick start",
        "",
        "The concept was learned." if not problems else "The concept was NOT learned: " + "; ".join(problems) + ".",
        "",
        f"- {steps} steps with everything around them took {seconds:.0f} s",
        f"- LoRA: {folders.lora} ({folders.lora.stat().st_size / 1e6:.2f} MB)",
        f"- images before and after: {folders.root / 'before_after.png'}",
        f"- loss curve: {folders.root / 'loss.png'}",
        f"- the whole run as a page: {folders.trained / f'{NAME}.report.html'}",
        f"- TensorBoard: tensorboard --logdir {folders.logs}",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| yellow in the zog images | {before.coverage:.1%} | {after.coverage:.1%} |",
        f"| complete zogs | {before.strict:.0%} | {after.strict:.0%} |",
        f"| right background | {before.background:.0%} | {after.background:.0%} |",
    ]
    if validation:
        first, last = validation[0], validation[-1]
        lines.append(f"| validation loss (steps {first[0]} and {last[0]}) | {first[1]:.4f} | {last[1]:.4f} |")
    if loss:
        lines += ["", f"training loss {loss[0][1]:.3f} {sparkline([value for _, value in loss])} {loss[-1][1]:.3f}"]
    return [*lines, "", *next_lines(folders.family)]


def next_lines(family: Family) -> list[str]:
    """How to train the real model: the command, where its files go, and a torch that can do it."""
    import tomli

    presets = presets_of(family)
    chosen = presets[preset_size(list(presets))]
    given = tomli.loads(chosen.read_text(encoding="utf-8"))["files"]
    files = ", ".join(Path(name).name for name in given.values() if name.startswith("models/"))
    sizes = ", ".join(map(str, presets))
    guide = f"docs/{Path(family.script).stem}.md"
    lines = [
        "Now the real model:",
        "",
        f"1. Put its files into models/: {files} ({guide} tells where they are).",
        "2. Put your images and their captions (cat1.png, cat1.txt) into images/.",
        "3. Run",
        "",
        "    .venv\\Scripts\\activate" if os.name == "nt" else "    source .venv/bin/activate",
        f"    accelerate launch {family.script} --config_file {chosen.relative_to(ROOT).as_posix()}",
        "",
        f"The LoRA is written to output/. configs/ has such files for GPUs with {sizes} GB.",
        "With --dry_run at its end, the command checks everything and trains nothing.",
    ]
    message = missing_cuda()
    return [*lines, "", message] if message else lines


def presets_of(family: Family) -> dict[int, Path]:
    """The real model's files in ``configs/`` by the size of the GPU in GB, the smallest first."""
    paths = {int(path.stem.rpartition("_")[2][:-2]): path for path in ROOT.glob(f"configs/{family.preset}_*gb.toml")}
    return dict(sorted(paths.items()))


def preset_size(sizes: list[int]) -> int:
    """The largest of ``sizes`` (in GB) that this machine's GPU has; where torch sees none, that for 12 GB, if there is.

    A GPU that is smaller than all of them gets the smallest.
    """
    import torch

    if not torch.cuda.is_available():
        return 12 if 12 in sizes else sizes[0]
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return max((size for size in sizes if size <= 1.06 * memory), default=sizes[0])  # 7.6 GiB are sold as 8 GB


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of the TensorBoard files below ``folder``: tag -> (step, value), in order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars: dict[str, list[tuple[int, float]]] = {}
    for parent in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(parent), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            scalars.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return scalars


def averaged_curve(values: list[tuple[int, float]], window: int = 20) -> list[tuple[int, float]]:
    """Means of ``window`` points each: single steps of diffusion training say little."""
    groups = [values[start : start + window] for start in range(0, len(values), window)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def sparkline(values: list[float]) -> str:
    """The values as a row of block characters, or of digits where the console can't show those."""
    blocks = "▁▂▃▄▅▆▇█"
    try:
        blocks.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        blocks = "01234567"
    low, high = min(values), max(values)
    return "".join(blocks[int((value - low) / ((high - low) or 1) * 7.999)] for value in values)


def before_after_image(before: list[Path], after: list[Path], path: Path) -> None:
    """For each prompt and seed the image before and after, side by side, with the prompt in front."""
    from PIL import Image, ImageDraw, ImageFont

    cell, gap, head, count = PIXELS, 6, 30, len(PROMPTS)
    font = ImageFont.load_default(size=14)
    margin = 16 + int(max(font.getlength(prompt) for prompt in PROMPTS))
    sheet = Image.new("RGB", (margin + 2 * len(SEEDS) * (cell + gap), head + count * (cell + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for group, (word, files) in enumerate((("before", before), ("after", after))):
        left = margin + group * len(SEEDS) * (cell + gap)
        pen.text((left, 8), word, fill="black", font=font)
        for index, file in enumerate(files):
            column, row = divmod(index, count)
            sheet.paste(Image.open(file).convert("RGB"), (left + column * (cell + gap), head + row * (cell + gap)))
    for row, prompt in enumerate(PROMPTS):
        pen.text((8, head + row * (cell + gap) + cell // 2 - 8), prompt, fill="black", font=font)
    sheet.save(path)


def loss_image(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """The curves as a small line chart."""
    from PIL import Image, ImageDraw, ImageFont

    width, height, margin = 640, 320, 48
    chart = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(chart), ImageFont.load_default(size=13)
    points = [point for curve in curves.values() for point in curve]
    if points:
        last = max(step for step, _ in points) or 1
        low, high = min(value for _, value in points), max(value for _, value in points)
        span = (high - low) or 1.0
        pen.rectangle((margin, margin, width - margin, height - margin), outline="gray")
        pen.text((4, margin - 8), f"{high:.3f}", fill="black", font=font)
        pen.text((4, height - margin - 8), f"{low:.3f}", fill="black", font=font)
        pen.text((width - margin - 40, height - margin + 6), f"step {last}", fill="black", font=font)
        for index, (name, curve) in enumerate(curves.items()):
            colour = ("#2658d6", "#d62626")[index % 2]
            line = [
                (
                    margin + (width - 2 * margin) * step / last,
                    height - margin - (height - 2 * margin) * (value - low) / span,
                )
                for step, value in curve
            ]
            if len(line) > 1:
                pen.line(line, fill=colour, width=2)
            pen.text((margin + 8 + 160 * index, margin - 22), name, fill=colour, font=font)
    chart.save(path)


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))
