"""The files of ``gen_img.py``: their names, the text in them, and which of them are there already."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.console import say, warn
from library.errors import UserError, in_one_line
from library.files import require_writable_folder, write_new
from library.generation.image_files import SUFFIXES, ImageRecord, UsedLora, image_bytes, text_in_image
from library.generation.image_pages import ImagePages
from library.generation.image_prompts import ImagePrompt
from library.generation.recorded_prompts import holds_another_prompt
from library.image_reading import open_image

if TYPE_CHECKING:
    from PIL import Image

FIRST_STAGE, SECOND_STAGE = 1, 2
"""Stages of Highres. fix; 0 is the only stage of other images."""
DIGITS = {0: "", FIRST_STAGE: "0", SECOND_STAGE: "1"}
"""What stands for a stage in file names."""
WEB_UI_SAMPLERS = {
    "ddim": "DDIM",
    "pndm": "PLMS",
    "lms": "LMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm_2": "DPM2",
    "dpm_2_a": "DPM2 a",
    "dpmsolver++": "DPM++ 2M",
}
"""Names of samplers in AUTOMATIC1111's web UI, where it has them."""


StartImage = Callable[[int], Path]
"""The file that the image with this running number is drawn over."""


@dataclass
class ImageOutputOptions:
    """Files"""

    outdir: str = "outputs"
    """Folder for the images."""
    sequential_file_name: bool = False
    """Number the images: im_000001.png and so on."""
    use_original_file_name: bool = False
    """Name each image after the start image that it was made from."""
    skip_existing: bool = False
    """Draw only the images whose files are not there yet, so that an interrupted run goes on; unless the images have
    other names, it numbers them as --sequential_file_name does."""
    grid: bool = False
    """Also write one image with all images of the run: grid.png."""
    report: bool = False
    """Also write a page with all images of the run, their prompts and settings: report.html."""
    no_metadata: bool = False
    """Write no text into the images."""


def image_record(
    script: str,
    prompt: ImagePrompt,
    model: str,
    model_hash: str,
    *,
    sizes: bool,
    loras: Sequence[UsedLora] = (),
    settings: Mapping[str, str] | None = None,
    web_ui_settings: Mapping[str, str] | None = None,
) -> ImageRecord:
    """How the image of ``prompt``, with every value decided, was made; ``sizes``: the model is XL.

    The keys are those of kohya-ss/sd-scripts; a size that is not given is written as "None", as there.
    """
    own: dict[str, Any] = {
        "negative-scale": prompt.negative_scale,
        "clip-prompt": prompt.clip_prompt,
        "strength": prompt.strength,
        "raw-prompt": prompt.raw_prompt,
    }
    written = {key: str(value) for key, value in own.items() if value is not None}
    if sizes:
        for name in ("original_height", "original_width", "original_height_negative", "original_width_negative"):
            written[name.replace("_", "-")] = str(getattr(prompt, name))
        written |= {"crop-top": str(prompt.crop_top), "crop-left": str(prompt.crop_left)}
    sampler = prompt.sample_sampler or "ddim"
    strength = {} if prompt.strength is None else {"Denoising strength": f"{prompt.strength:g}"}
    return ImageRecord(
        script=script,
        prompt=prompt,
        sampler=sampler,
        model=model,
        model_hash=model_hash,
        loras=loras,
        settings={**written, **(settings or {})},
        web_ui_sampler=WEB_UI_SAMPLERS.get(sampler.lower().removeprefix("k_")),
        web_ui_settings={**strength, **(web_ui_settings or {})},
    )


@dataclass(frozen=True)
class FileName:
    """The name that an image is to have: with a number where others of the run have the same."""

    folder: Path
    stem: str
    suffix: str
    count: int = 0
    """How many others of the run have the same name."""

    def paths(self) -> Iterator[Path]:
        """The name, and those that follow it where a file is there."""
        count = self.count
        while True:
            yield self.folder / f"{self.stem}{f'_{count:03d}' if count else ''}{self.suffix}"
            count += 1


class FileNames:
    """Gives the images of a run their names, in the order of their numbers; no two have the same."""

    def __init__(self, options: ImageOutputOptions, start_image: StartImage | None = None, stage: int = 0):
        self.folder = Path(options.outdir)
        self.start_image = start_image if options.use_original_file_name else None
        self.numbered = options.sequential_file_name or options.skip_existing
        self.stage = stage
        self._counts: dict[str, int] = {}
        self._taken: set[str] = set()

    @property
    def has_fixed_names(self) -> bool:
        """Whether images have the same names whenever they are drawn."""
        return self.numbered or self.start_image is not None

    def name(self, image: ImagePrompt) -> FileName | None:
        """The name of the next image; None when it is the moment at which it is drawn."""
        if image.file_name is not None:
            return self._once(self.folder, image.file_name)
        if self.start_image is not None:
            return self._once(self.folder, f"{self.start_image(image.number).stem}.png")
        if self.numbered:
            return FileName(self.folder, f"im_{DIGITS[self.stage]}{image.number + 1:06d}", ".png")
        return None

    def _once(self, folder: Path, wanted: str) -> FileName:
        path = folder / wanted
        stem, suffix = (path.stem, path.suffix) if path.suffix.lower() in SUFFIXES else (path.name, ".png")
        count = self._counts.get(str(path).lower(), 0)
        while True:
            name = FileName(path.parent, stem, suffix, count)
            key = str(next(name.paths())).lower()
            count += 1
            if key not in self._taken:
                break
        self._taken.add(key)
        self._counts[str(path).lower()] = count
        return name


class ImageOutputs:
    """Writes the images of a run. Use it as a context: at its end, also after an error, its pages are complete.

    ``start_image`` gives the file that an image is drawn over by its running number; ``stage`` is that of finished
    images.
    Raises UserError for a folder that cannot be written.
    """

    def __init__(self, options: ImageOutputOptions, start_image: StartImage | None = None, stage: int = 0):
        self.options = options
        self.folder = Path(options.outdir)
        self.start_image = start_image
        self.stage = stage
        require_writable_folder(self.folder, "--outdir")
        self.pages = ImagePages(self.folder, options.grid, options.report, goes_on=options.skip_existing)
        self._file_names = self._new_names()
        self._names: dict[int, FileName | None] = {}
        self._saved = False
        self._say_how_files_are_named()

    def __enter__(self) -> ImageOutputs:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.pages.finish()
        if kind is not None and self._saved and (self.options.skip_existing or self._file_names.has_fixed_names):
            added = "" if self.options.skip_existing else " with --skip_existing"
            say(f"the same command{added} generates the missing images")

    def existing(self, lines: Iterable[Sequence[ImagePrompt]]) -> int:
        """How many images of the lines are there already and will be skipped (none without ``--skip_existing``).

        Raises UserError for a file of another prompt: it is of another run.
        """
        if not self.options.skip_existing:
            return 0
        names = self._new_names()
        named = [(names.name(image), image) for images in lines for image in images]
        count = sum(name is not None and self._is_there(name, image) for name, image in named)
        if count:
            say(f"--skip_existing: {count} of {len(named)} images already exist")
        return count

    def wanted(self, images: Sequence[ImagePrompt]) -> list[ImagePrompt]:
        """Those of the next images that are to be drawn: the others' files are there already (``--skip_existing``)."""
        wanted = []
        for image in images:
            name = self._file_names.name(image)
            if name is not None and self.options.skip_existing and self._is_there(name, image):
                self._show_existing(next(name.paths()), image)
            else:
                self._names[image.number] = name
                wanted.append(image)
        return wanted

    def save(self, image: Image.Image, prompt: ImagePrompt, record: ImageRecord, position: int = 0) -> Path:
        """Write the image of ``prompt``; ``position``: its place in the batch. Returns its path.

        No file is replaced: where the name is taken, a number follows it. Raises UserError when it cannot be written.
        """
        name = self._names.pop(prompt.number, None)
        wanted = name or self._of_the_moment(prompt, position, self.stage)
        path = self._write(image, wanted, {} if self.options.no_metadata else record.entries())
        if name is not None and path != next(name.paths()):
            warn(f"{next(name.paths())} is there already; the image is {path.name}.")
        self.pages.add(path, image, prompt, record.entries())
        self._saved = True
        return path

    def save_first_stage(self, image: Image.Image, prompt: ImagePrompt, record: ImageRecord, position: int = 0) -> Path:
        """The same for the first stage of Highres. fix (``--highres_fix_save_1st``), whose name differs."""
        name = self._names.get(prompt.number)
        if name is None:
            name = self._of_the_moment(prompt, position, FIRST_STAGE)
        elif prompt.file_name is None and self._file_names.numbered and self._file_names.start_image is None:
            name = FileName(self.folder, f"im_{DIGITS[FIRST_STAGE]}{prompt.number + 1:06d}", ".png")
        else:
            name = FileName(name.folder, f"{name.stem}_1st", name.suffix, name.count)
        return self._write(image, name, {} if self.options.no_metadata else record.entries())

    # ---- names ------------------------------------------------------------------------------------------------------

    def _new_names(self) -> FileNames:
        return FileNames(self.options, self.start_image, self.stage)

    def _of_the_moment(self, prompt: ImagePrompt, position: int, stage: int) -> FileName:
        moment = time.strftime("%Y%m%d%H%M%S")
        return FileName(self.folder, f"im_{moment}_{DIGITS[stage]}{position:03d}_{prompt.seed}", ".png")

    def _is_there(self, name: FileName, image: ImagePrompt) -> bool:
        """Whether an image's file is there. Raises UserError when it is that of another prompt."""
        path = next(name.paths())
        if not path.exists():
            return False
        if holds_another_prompt(text_in_image(path), image.prompt):
            raise UserError(
                f"--skip_existing: {path} has another prompt than image {image.number + 1} of this run; continue with "
                "the same prompts (and --seed, where it chooses among them), or name another --outdir."
            )
        return True

    def _say_how_files_are_named(self) -> None:
        options = self.options
        if options.use_original_file_name and self.start_image is None:
            say("--use_original_file_name has no effect without --image_path")
        elif options.use_original_file_name and options.sequential_file_name:
            say("--sequential_file_name has no effect with --use_original_file_name")
        if options.skip_existing and not options.sequential_file_name and self._file_names.start_image is None:
            say("--skip_existing: images are numbered, as with --sequential_file_name; --f names one itself")
        if options.no_metadata and options.skip_existing:
            say("--no_metadata: --skip_existing knows images by their names alone")

    # ---- files ------------------------------------------------------------------------------------------------------

    def _write(self, image: Image.Image, name: FileName, text: Mapping[str, str]) -> Path:
        try:
            name.folder.mkdir(parents=True, exist_ok=True)
            return write_new(name.paths(), image_bytes(image, name.suffix.lower(), text))
        except (OSError, ValueError) as error:
            raise UserError(f"{next(name.paths())}: cannot be written ({in_one_line(error)}).") from None

    def _show_existing(self, path: Path, prompt: ImagePrompt) -> None:
        """Put a skipped image on the pages, too."""
        if not self.pages.wanted:
            return
        with open_image(path) as image:
            self.pages.add(path, image, prompt, text_in_image(path))
