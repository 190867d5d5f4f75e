"""How long the checks before training and ``--dry_run`` take on a large dataset, and in how much memory.

    python benchmarks/dry_run.py
    python benchmarks/dry_run.py --images 1000 --folder /tmp/images

Writes a folder of small images (PNG, JPEG and WebP in turn, with captions), and runs the FLUX.1 trainer with
``--dry_run`` on it, in a fresh process each time: on ten of the images, on all of them, on all with a CMYK, a 16-bit
and an EXIF-rotated image among them, and at last with a truncated and an empty file too, which must end the run.
Latents and captions are to be cached on disk, so that the plan looks for every cache file. Nothing is cached by the
operating system but what writing the folder left there.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Measure, machine, parser, peak_memory, report, run_measured
from benchmarks.tiny_run import training_options, write_dataset

SIZES = [(320, 256), (256, 320), (256, 256), (384, 224)]
VARIANTS = 48
"""Different images; the others are copies."""
FEW = 10
BUCKETS = "enable_bucket = true\nmin_bucket_reso = 128\nmax_bucket_reso = 512\nbucket_reso_steps = 32"


def encoded_images() -> list[tuple[str, bytes]]:
    """(extension, file) of images with shapes and grain."""
    import numpy
    from PIL import Image

    draw = numpy.random.default_rng(0)
    found = []
    for number in range(VARIANTS):
        width, height = SIZES[number % len(SIZES)]
        coarse = Image.fromarray(draw.integers(0, 256, (height // 32, width // 32, 3), dtype=numpy.uint8))
        picture = coarse.resize((width, height), Image.Resampling.BICUBIC)
        extension, format = [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")][number % 3]
        data = io.BytesIO()
        picture.save(data, format)
        found.append((extension, data.getvalue()))
    return found


def write_images(folder: Path, count: int) -> Path:
    """``count`` images and their captions."""
    folder.mkdir(parents=True)
    files = encoded_images()
    for number in range(count):
        extension, data = files[number % len(files)]
        (folder / f"{number:06d}.{extension}").write_bytes(data)
        (folder / f"{number:06d}.txt").write_text(f"an image, number {number}, of coloured clouds", encoding="utf-8")
    return folder


def add_oddities(folder: Path) -> None:
    """A CMYK, a 16-bit and an EXIF-rotated image, which are converted or taken as stored."""
    import numpy
    from PIL import Image

    Image.new("CMYK", (256, 256), (10, 120, 200, 30)).save(folder / "cmyk.jpg")
    values = numpy.arange(256 * 256, dtype=numpy.uint16).reshape(256, 256)
    Image.fromarray(values).save(folder / "sixteen_bit.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (320, 256), (90, 30, 60)).save(folder / "turned.jpg", exif=turned)
    for name in ("cmyk", "sixteen_bit", "turned"):
        (folder / f"{name}.txt").write_text("an odd image", encoding="utf-8")


def add_damage(folder: Path) -> None:
    """A truncated and an empty file."""
    data = (folder / "000000.png").read_bytes()
    (folder / "truncated.png").write_bytes(data[: len(data) // 2])
    (folder / "empty.jpg").write_bytes(b"")


def dry_run_here(result: Path, arguments: list[str]) -> None:
    """Do the dry run in this process and write what it took into ``result``."""
    start = time.perf_counter()
    from flux_train_network import FluxNetworkTrainer, FluxTrainingOptions
    from library.console import set_up_console
    from library.errors import UserError
    from library.options import parse_options

    options = parse_options(FluxTrainingOptions, "", arguments)
    set_up_console(options.console)

    class TimedTrainer(FluxNetworkTrainer):
        seconds = 0.0

        def read_data(self) -> None:
            begin = time.perf_counter()
            try:
                super().read_data()
            finally:
                TimedTrainer.seconds = time.perf_counter() - begin

    error = ""
    try:
        TimedTrainer(options).train()
    except UserError as mistake:
        error = str(mistake)
    taken = {"seconds": time.perf_counter() - start, "data": TimedTrainer.seconds, "memory": peak_memory()}
    result.write_text(json.dumps({**taken, "error": error}), encoding="utf-8")


def dry_run(folder: Path, files: Path, threads: int) -> dict[str, Any]:
    """What ``dry_run_here`` writes, from a fresh process; with the processor time and what was printed."""
    from tools.make_tiny_models import make_tiny_flux

    dataset = write_dataset(folder / "dataset.toml", files, 256, 4)
    text = dataset.read_text(encoding="utf-8").replace("[general]", f"[general]\n{BUCKETS}")
    dataset.write_text(text, encoding="utf-8")
    models = make_tiny_flux(folder / "models")
    arguments = [*training_options(models, dataset, folder / "output", 1000), "--dry_run"]
    result = folder / "result.json"
    usage = run_measured([sys.executable, __file__, "--dry_run_here", result, *arguments], threads)
    if (folder / "output").exists():
        sys.exit("error: the dry run made the output folder")
    return {**json.loads(result.read_text(encoding="utf-8")), "cpu": usage.cpu, "output": usage.output}


def main() -> None:
    """Measure and report."""
    if sys.argv[1:2] == ["--dry_run_here"]:
        dry_run_here(Path(sys.argv[2]), sys.argv[3:])
        return
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=int, default=10_000, help="images in the folder")
    arguments.add_argument("--folder", type=Path, help="where the images are put for a while")
    arguments.add_argument("--threads", type=int, default=1, help="threads of torch on a CPU")
    arguments.add_argument("--show", action="store_true", help="print the plan and the message, too")
    options = arguments.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        runs = {"few": dry_run(folder, write_images(folder / "few", FEW), options.threads)}
        files = write_images(folder / "all", options.images)
        runs["all"] = dry_run(folder, files, options.threads)
        add_oddities(files)
        runs["odd"] = dry_run(folder, files, options.threads)
        add_damage(files)
        runs["damaged"] = dry_run(folder, files, options.threads)
    finally:
        shutil.rmtree(folder)
    if options.show:
        print(runs["odd"]["output"])
    print(runs["damaged"]["error"])
    if runs["few"]["error"] or runs["all"]["error"] or runs["odd"]["error"] or not runs["damaged"]["error"]:
        sys.exit("error: only the damaged folder must be refused")
    few, all_ = runs["few"], runs["all"]
    count = f"{options.images:,} images"
    report(
        "dry_run",
        [
            Measure(f"{count}: whole program", all_["seconds"], "s"),
            Measure(f"{count}: reading and checking the data", all_["data"], "s"),
            Measure(f"{count}: processor time", all_["cpu"], "s"),
            Measure(f"{FEW} images: whole program", few["seconds"], "s"),
            Measure(f"{count}: peak memory above {FEW} images", (all_["memory"] - few["memory"]) / 2**20, "MiB"),
            Measure(f"{FEW} images: peak memory", few["memory"] / 2**20, "MiB"),
            Measure(f"{count} and three odd ones: whole program", runs["odd"]["seconds"], "s"),
            Measure("and two damaged: until the message", runs["damaged"]["seconds"], "s"),
        ],
        options,
        machine("cpu", options.threads),
    )


if __name__ == "__main__":
    main()
