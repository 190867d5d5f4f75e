"""Draw the features of ``gen_img.py`` with the tiny Stable Diffusion 1.5, on one sheet, to look at.

    python tools/gen_img_sheet.py --lora quickstart_output_sd15/trained/zog.safetensors

Each row is one run of ``gen_img.py``. The LoRA is that of ``python tools/quickstart.py --family sd15``; without one,
its row is left out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from PIL import Image, ImageDraw, ImageFont  # noqa: E402

from library.console import run_script  # noqa: E402

MODEL = ROOT / "assets" / "tiny_sd15" / "sd15-tiny.safetensors"
PIXELS = 128
GAP, LINE = 6, 16
COLUMNS = 5
CIRCLE, TRIANGLE = "a big red circle on a blue background", "a green triangle on a white background"
TALL = "a yellow square on a purple background"


@dataclass
class Row:
    """One run: a prompt line for each image, with its caption."""

    title: str
    lines: dict[str, str]
    options: list[str | Path] = field(default_factory=list)
    given: dict[str, Path] = field(default_factory=dict)
    """Images that the run is given, to be shown in front, with their captions."""


def rows(folder: Path, lora: Path | None) -> list[Row]:
    """What the sheet shows. Images that it needs are drawn into ``folder``."""
    start, hole, halves = folder / "start.png", folder / "hole.png", folder / "halves.png"
    draw_given(start, hole, halves)
    large = ["--W", "256", "--H", "256"]
    couple = f"{CIRCLE} AND {TALL}"
    made = [
        Row(
            "text to image",
            {
                "": f"{CIRCLE} --d 1",
                "--n white --l 7.5": f"{TRIANGLE} --d 2 --n white --l 7.5",
                "--l 1": f"{TRIANGLE} --d 2 --l 1",
                "--s 4": f"{TALL} --d 4 --s 4",
                "--w 192": f"{TALL} --d 4 --w 192",
            },
        ),
        Row(
            f"image to image, --strength: {TRIANGLE}",
            {f"{strength:g}": f"{TRIANGLE} --d 5 --t {strength}" for strength in (0.4, 0.6, 0.8, 0.95)},
            ["--image_path", start],
            {"--image_path": start},
        ),
        Row(
            f"inpainting: {CIRCLE}",
            {f"seed {seed}": f"{CIRCLE} --d {seed} --t 0.9" for seed in (1, 2, 3)},
            ["--image_path", start, "--mask_path", hole],
            {"--image_path": start, "--mask_path": hole},
        ),
        Row(
            "Attention Couple: " + couple,
            {f"seed {seed}": f"{couple} --d {seed}" for seed in (1, 2, 3, 4)},
            ["--mask_path", halves],
            {"--mask_path": halves},
        ),
    ]
    if lora is not None:
        network = ["--network_module", "networks.lora", "--network_weights", lora]
        amounts = (0.0, 0.25, 0.5, 0.75, 1.0)
        lines = {f"--am {amount:g}": f"a zog on a red background --d 11 --l 3 --am {amount}" for amount in amounts}
        made.append(Row("a LoRA's strength: a zog on a red background", lines, network))
    once = {"": f"{CIRCLE} --d 3"}
    made += [
        Row("256 x 256 at once; --highres_fix_scale 0.5; --ds_depth_1 1; --gradual_latent_timesteps 900", once, large),
        Row("", once, [*large, "--highres_fix_scale", "0.5", "--strength", "0.3"]),
        Row("", once, [*large, "--ds_depth_1", "1", "--ds_timesteps_1", "300"]),
        Row("", once, [*large, "--sampler", "euler_a", "--gradual_latent_timesteps", "900"]),
    ]
    return made


def draw_given(start: Path, hole: Path, halves: Path) -> None:
    """A start image, a mask of its right half, and the regions of two prompts."""
    from tools.tiny_flux_drawings import COLOURS, Layer, draw

    layers = [Layer("square", COLOURS["orange"], (0.5, 0.5), 0.3)]
    Image.fromarray(draw(layers, COLOURS["black"], PIXELS)).save(start)
    middle = (PIXELS // 2, 0, PIXELS, PIXELS)
    mask = Image.new("L", (PIXELS, PIXELS))
    mask.paste(255, middle)
    mask.save(hole)
    regions = Image.new("RGB", (PIXELS, PIXELS), (255, 0, 0))
    regions.paste((0, 255, 0), middle)
    regions.save(halves)


def draw_row(row: Row, folder: Path) -> list[Image.Image]:
    """The images of a row, by a run of ``gen_img.py``."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(row.lines.values()) + "\n", encoding="utf-8")
    command = [sys.executable, ROOT / "gen_img.py", "--ckpt", MODEL, "--from_file", prompts, "--outdir", folder]
    command += ["--sequential_file_name", "--W", PIXELS, "--H", PIXELS, "--steps", 20, "--scale", 5, *row.options]
    subprocess.run(list(map(str, command)), check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("im_*.png"))]


def sheet(drawn: list[tuple[Row, list[Image.Image]]]) -> Image.Image:
    """All rows, with titles and captions; rows without a title go on beside the one before."""
    font = ImageFont.load_default(size=12)
    placed: list[tuple[int, int, str, Image.Image | None]] = []
    top, left, lowest = GAP, GAP, 0
    for row, images in drawn:
        if row.title:
            top, left = max(top, lowest), GAP
            placed.append((left, top, row.title, None))
            top += LINE + 2
        shown = [(caption, Image.open(path).convert("RGB")) for caption, path in row.given.items()]
        for caption, image in [*shown, *zip(row.lines, images)]:
            placed.append((left, top, caption, image))
            left += image.width + GAP
            lowest = max(lowest, top + image.height + (LINE if caption else 0) + 2 * GAP)
    width = max(left + (image.width if image else 0) for left, _, _, image in placed) + GAP
    made = Image.new("RGB", (width, lowest), "white")
    pen = ImageDraw.Draw(made)
    for left, top, words, image in placed:
        if image is not None:
            made.paste(image, (left, top))
        pen.text((left, top + (image.height + 1 if image else 0)), words, fill="black", font=font)
    return made


def main() -> None:
    """Read the command line and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", type=Path, help="the quick start's LoRA")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "gen_img_features.png")
    options = parser.parse_args()
    drawn = []
    with tempfile.TemporaryDirectory() as name:
        for number, row in enumerate(rows(Path(name), options.lora)):
            folder = Path(name) / str(number)
            folder.mkdir()
            drawn.append((row, draw_row(row, folder)))
        made = sheet(drawn)
    made.quantize(256, dither=Image.Dither.NONE).save(options.out, optimize=True)
    print(f"{options.out} {options.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    run_script(main)
