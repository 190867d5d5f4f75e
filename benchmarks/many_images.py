"""How much processor time and memory an image of a large dataset takes before training, in a folder and in metadata.

    python benchmarks/many_images.py
    python benchmarks/many_images.py --images 20000

Writes a folder of small images with captions (hard links to a few files) and a metadata file that names them all, and
lets the FLUX.1 trainer read each in a fresh process: list, look at every image, read captions, sort into buckets, and
look for every cache file. The same is done with a tenth of the images: what an image takes must not grow with their
number.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.dry_run import BUCKETS, encoded_images
from benchmarks.measuring import Measure, machine, parser, present_memory, report, run_measured
from benchmarks.tiny_run import training_options

Taken = tuple[float, float]
"""Seconds of processor time and bytes of memory for each image."""


def link_images(folder: Path, count: int) -> Path:
    """``count`` images and their captions, which take no room on the disk but for their names."""
    originals = folder.with_name(f"{folder.name}_originals")
    for path in (folder, originals):
        path.mkdir(parents=True)
    files = []
    for number, (extension, data) in enumerate(encoded_images()):
        (image := originals / f"{number}.{extension}").write_bytes(data)
        (caption := originals / f"{number}.txt").write_text(f"coloured clouds, number {number}", encoding="utf-8")
        files.append((image, caption))
    for number in range(count):
        for original in files[number % len(files)]:
            os.link(original, folder / f"{number:07d}{original.suffix}")
    return folder


def write_datasets(folder: Path, images: Path) -> dict[str, Path]:
    """Dataset descriptions over the same images, by kind."""
    entries = {path.stem: {"caption": "coloured clouds"} for path in images.iterdir() if path.suffix != ".txt"}
    (metadata := folder / "metadata.json").write_text(json.dumps(entries), encoding="utf-8")
    subsets = {
        "folder": f"image_dir = '{images.as_posix()}'\ncaption_extension = '.txt'",
        "metadata": f"image_dir = '{images.as_posix()}'\nmetadata_file = '{metadata.as_posix()}'",
    }
    found = {}
    for kind, subset in subsets.items():
        found[kind] = folder / f"{kind}.toml"
        general = f"[general]\nresolution = 256\nbatch_size = 4\n{BUCKETS}\n"
        found[kind].write_text(f"{general}[[datasets]]\n[[datasets.subsets]]\n{subset}\n", encoding="utf-8")
    return found


def read_here(result: Path, arguments: list[str]) -> None:
    """Read the data in this process and write what that took into ``result``."""
    from flux_train_network import FluxNetworkTrainer, FluxTrainingOptions
    from library.options import parse_options

    trainer = FluxNetworkTrainer(parse_options(FluxTrainingOptions, "", arguments))
    trainer.check_options()
    trainer.prepare_output()
    trainer.check_network()
    trainer.start_processes()
    memory, start = present_memory(), time.process_time()
    trainer.read_data()
    trainer.plan_steps()
    trainer.open_pipeline()
    caches = [*trainer.latents.open_caches(), *trainer.text.open_caches()]
    taken = {"seconds": time.process_time() - start, "memory": present_memory() - memory}
    result.write_text(json.dumps({**taken, "entries": sum(len(cache.entries) for cache in caches)}), encoding="utf-8")


def measure(folder: Path, count: int) -> dict[str, Taken]:
    """What each of ``count`` images takes, by kind."""
    from tools.make_tiny_models import make_tiny_flux

    folder.mkdir()
    images = link_images(folder / "images", count)
    models, result, found = make_tiny_flux(folder / "models"), folder / "result.json", {}
    for kind, dataset in write_datasets(folder, images).items():
        arguments = training_options(models, dataset, folder / "output", 1000)
        run_measured([sys.executable, __file__, "--read_here", result, *arguments])
        taken = json.loads(result.read_text(encoding="utf-8"))
        if taken["entries"] != 2 * count:
            sys.exit(f"error: {taken['entries']} cache entries for {count} images")
        found[kind] = (taken["seconds"] / count, taken["memory"] / count)
    return found


def main() -> None:
    """Measure and report."""
    if sys.argv[1:2] == ["--read_here"]:
        read_here(Path(sys.argv[2]), sys.argv[3:])
        return
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=int, default=100_000, help="images; a tenth of them is measured, too")
    arguments.add_argument("--folder", type=Path, help="where the images are put for a while")
    options = arguments.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        many = measure(folder / "many", options.images)
        few = measure(folder / "few", options.images // 10)
    finally:
        shutil.rmtree(folder)
    measures = []
    for kind, (seconds, memory) in many.items():
        what = f"{options.images:,} images in a {kind}" if kind == "folder" else f"{options.images:,} images in {kind}"
        measures += [
            Measure(f"{what}: processor time", seconds * options.images, "s"),
            Measure(f"{what}: memory", memory * options.images / 2**20, "MiB"),
            Measure(f"{what}: time of each, against a tenth of them", seconds / few[kind][0], "times", 1.5),
            Measure(f"{what}: memory of each, against a tenth of them", memory / few[kind][1], "times", 1.5),
        ]
    report("many_images", measures, options, machine("cpu", 1))


if __name__ == "__main__":
    main()
