"""Make masks for ``--masked_loss`` of images: by a model that you name, a backdrop's colour, or transparency.

    python tools/make_masks.py --image_dir images/ann --model models/segformer-b3 --classes person --feather 4
    python tools/make_masks.py --image_dir images/cats --model models/clipseg-rd64-refined --classes "a cat"
    python tools/make_masks.py --dataset_config dataset.toml --color "#00ff00" --tolerance 40

Masks go into ``conditioning_data_dir`` of the dataset configuration, or into a folder beside the images. The model is a
folder of SegFormer, Mask2Former or CLIPSeg in the layout of transformers. Nothing is fetched. Masks that are there
already are kept. It ends with 1 when images could not be read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from library.annotation.images import ImageModel, ImageOptions, Target, find_folders, go_through, mask_targets
from library.annotation.masks import AlphaMasks, ColorMasks, MaskShapeOptions, check_shape, shaped
from library.annotation.model_files import ModelOptions, device_and_dtype, model_path, transformers_kind
from library.annotation.segmenter import SEGMENTERS
from library.console import ConsoleOptions, run_script, say, set_up_console, warn
from library.data.images import first_names
from library.errors import UserError
from library.files import writing
from library.image_reading import read_image
from library.options import ConfigOptions, changed_options, parse_options

if TYPE_CHECKING:
    import numpy


@dataclass
class MaskOptions:
    """What counts"""

    classes: list[str] = field(default_factory=list)
    """With --model: the classes that count, by the model's names; with CLIPSeg texts, such as "a cat"."""
    threshold: float = 0.5
    """With CLIPSeg: least probability of a pixel that counts."""
    color: str | None = None
    """Colour of a backdrop, which does not count: #00ff00, 0,255,0 or lime."""
    tolerance: int = 16
    """With --color: largest difference of a channel from it, 0 to 255."""
    alpha: bool = False
    """What is opaque counts, by the images' own transparency."""


@dataclass
class MaskFileOptions:
    """Mask files"""

    mask_dir: str | None = None
    """Folder of the masks; unset means conditioning_data_dir, and with --image_dir the folder NAME_masks beside it."""
    alpha_dir: str | None = None
    """Write copies of the images into this folder, the mask as their transparency, for alpha_mask = true."""


@dataclass
class MakeMasksOptions:
    """Options of tools/make_masks.py."""

    model: ModelOptions = field(default_factory=ModelOptions)
    images: ImageOptions = field(default_factory=ImageOptions)
    masks: MaskOptions = field(default_factory=MaskOptions)
    files: MaskFileOptions = field(default_factory=MaskFileOptions)
    shape: MaskShapeOptions = field(default_factory=MaskShapeOptions)
    config: ConfigOptions = field(default_factory=ConfigOptions)
    console: ConsoleOptions = field(default_factory=ConsoleOptions)


SOURCES = {
    "model": ("classes", "threshold", "device", "dtype"),
    "color": ("tolerance",),
    "alpha": (),
}
"""Where masks may come from, each with the options that belong to it."""


def choose_source(options: MakeMasksOptions) -> Callable[[], ImageModel]:
    """What makes the masks. Raises UserError where none, or more than one, is named."""
    masks, given = options.masks, changed_options(options)
    sources = [name for name in SOURCES if given.get(name)]
    if len(sources) != 1:
        raise UserError("Give one of --model, --color and --alpha: where the masks come from.")
    for source, names in SOURCES.items():
        for name in names:
            if name in given and source != sources[0]:
                warn(f"--{name} has no effect without --{source}.")
    if masks.alpha:
        return AlphaMasks
    if masks.color is not None:
        by_color = ColorMasks(masks.color, masks.tolerance)
        return lambda: by_color
    folder = model_path(options.model.model)
    if not folder.is_dir():
        raise UserError(f"--model: {folder} is not a folder.")
    kind = transformers_kind(folder, list(SEGMENTERS), "masks")
    if not 0 < masks.threshold < 1:
        raise UserError(f"--threshold must be between 0 and 1, not {masks.threshold}.")
    if kind != "clipseg" and "threshold" in given:
        warn(f"--threshold has no effect: the model is one of the type {kind}.")
    return lambda: SEGMENTERS[kind](folder, masks.classes, masks.threshold, *device_and_dtype(options.model))


class MaskWriter:
    """Puts masks into files."""

    def __init__(self, shape: MaskShapeOptions, as_alpha: bool) -> None:
        self.shape, self.as_alpha = shape, as_alpha
        self.empty: list[str] = []
        """Names of images in which nothing counts, before the background's weight."""
        self.full: list[str] = []
        """Names of images in which everything counts: they have no transparency, say, or no such backdrop."""

    def __call__(self, target: Target, mask: numpy.ndarray) -> bool:
        """Write a mask as 8-bit greyscale, white where the image counts; or the image with this transparency."""
        import numpy
        from PIL import Image

        mask = shaped(mask.astype(numpy.float32), self.shape)
        if mask.max() <= self.shape.background:
            self.empty.append(target.image.name)
        elif mask.min() >= 1:
            self.full.append(target.image.name)
        image = Image.fromarray((mask * 255).round().clip(0, 255).astype(numpy.uint8))
        if self.as_alpha:
            pixels, alpha = read_image(target.image)[0], image
            pixels.putalpha(alpha)
            image = pixels
        with writing(target.file) as file:
            image.save(file, "PNG")
        return True


def main() -> None:
    """Make the masks. The exit code is 1 where images could not be read."""
    options = parse_options(MakeMasksOptions, __doc__ or "")
    set_up_console(options.console)
    files, images = options.files, options.images
    if options.model.batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, not {options.model.batch_size}.")
    if files.mask_dir is not None and files.alpha_dir is not None:
        raise UserError("Give either --mask_dir or --alpha_dir.")
    check_shape(options.shape)
    load = choose_source(options)
    targets = mask_targets(find_folders(images), images, files.mask_dir or files.alpha_dir)
    write = MaskWriter(options.shape, as_alpha=files.alpha_dir is not None)
    outcome = go_through(targets, images, "masks", options.model.batch_size, load, write)
    for what, names in (("nothing", write.empty), ("everything", write.full)):
        if names:
            warn(f"images in which {what} counts: {len(names)} ({first_names(names)})")
    if not images.dry_run:
        folders = list(dict.fromkeys(str(target.file.parent) for target in targets))
        say(f"{outcome.line('masks')}; they are in {first_names(folders)}")
    sys.exit(1 if outcome.problems else 0)


if __name__ == "__main__":
    run_script(main)
