"""Which images are gone through, what is there already, and the course through them in batches."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from library.console import messages_above_progress, say, warn
from library.data.captions import find_caption_file
from library.data.config_file import read_config_file
from library.data.images import images_in, list_folder, nested_images
from library.errors import UserError
from library.files import require_writable_folder
from library.image_reading import read_image

if TYPE_CHECKING:
    from PIL import Image

CAPTION_EXTENSION = ".txt"
"""Of captions for a folder, which has no configuration to say otherwise."""
MASK_EXTENSION = ".png"


@dataclass
class ImageOptions:
    """Images"""

    image_dir: str | None = None
    """Folder of the images."""
    dataset_config: str | None = None
    """Dataset configuration whose image_dir folders are processed instead."""
    recursive: bool = False
    """Images in sub-folders too."""
    overwrite: bool = False
    """Overwrite existing files."""
    dry_run: bool = False
    """List the files that would be made, and write nothing."""


@dataclass(frozen=True)
class Folder:
    """A folder of images, and what a dataset configuration says of it."""

    path: str
    place: str
    """Where the user named it, for messages."""
    caption_extension: str = CAPTION_EXTENSION
    mask_dir: str | None = None
    """Its ``conditioning_data_dir``."""


@dataclass(frozen=True)
class Target:
    """A file to be made of an image."""

    image: Path
    file: Path
    existing: Path | None = None
    """What stands in its place already."""


def find_folders(options: ImageOptions) -> list[Folder]:
    """The folders that the options name. Raises UserError for none, or for both ways of naming them."""
    if (options.image_dir is None) == (options.dataset_config is None):
        raise UserError("Give either --image_dir or --dataset_config.")
    if options.image_dir is not None:
        return [Folder(options.image_dir, "--image_dir")]
    path = Path(str(options.dataset_config))
    tables = read_config_file(path)
    found = []
    for number, dataset in enumerate(tables.datasets, 1):
        for place, subset in enumerate(dataset.subsets, 1):
            where = f"{path}: [[datasets]] number {number}, [[datasets.subsets]] number {place}"
            if subset.metadata_file is not None or subset.image_dir is None:
                warn(f"{where} is left out: its captions are in a metadata_file.")
                continue
            given = (table.caption_extension for table in (subset, dataset, tables.general))
            extension = next((value for value in given if value is not None), ".caption")
            extension = extension if extension.startswith(".") else f".{extension}"
            found.append(Folder(subset.image_dir, where, extension, subset.conditioning_data_dir))
    if not found:
        raise UserError(f"{path}: there is no image_dir in this dataset configuration.")
    return found


def caption_targets(folders: Sequence[Folder], options: ImageOptions, extension: str | None) -> list[Target]:
    """The caption file of every image, each once. ``extension`` comes before that of the dataset configuration.

    An empty file counts as none: training refuses it. Raises UserError when there is no image.
    """
    found = []
    for folder in folders:
        ending = extension if extension is not None else folder.caption_extension
        ending = ending if ending.startswith(".") else f".{ending}"
        for place, images, names in _images(folder, options.recursive):
            for image in images:
                file = place / f"{image.stem}{ending}"
                existing = find_caption_file(image, ending, names)
                found.append(Target(image, file, Path(existing) if existing and _is_filled(existing) else None))
    return _each_once(found)


def _is_filled(path: str) -> bool:
    try:
        return os.path.getsize(path) > 0
    except OSError:  # a link that leads nowhere
        return False


def mask_targets(folders: Sequence[Folder], options: ImageOptions, mask_dir: str | None) -> list[Target]:
    """The mask of every image, each once: a PNG of its name in the folder of masks.

    That is ``mask_dir``, or ``conditioning_data_dir`` of the dataset configuration, or a folder beside that of the
    images with ``_masks`` behind its name. Raises UserError when there is no image, for a configuration whose subsets
    don't say where masks belong, and for a mask to be replaced that has another extension.
    """
    found = []
    for folder in folders:
        masks = _mask_folder(folder, mask_dir, len(folders))
        if masks.resolve() == Path(folder.path).resolve():
            raise UserError(f"{masks} is the folder of the images; name another one for the masks.")
        for place, images, _ in _images(folder, options.recursive, without=masks):
            into = masks / place.relative_to(folder.path)
            names = os.listdir(into) if into.is_dir() else []
            there = {path.stem: path for path in images_in(str(into), names)}
            found += [Target(image, into / f"{image.stem}{MASK_EXTENSION}", there.get(image.stem)) for image in images]
    replaced = [target for target in found if options.overwrite and target.existing not in (None, target.file)]
    if replaced:
        raise UserError(
            f"{replaced[0].existing} would remain beside the new {replaced[0].file.name}; remove it, since each image "
            "has one mask."
        )
    return _each_once(found)


def _mask_folder(folder: Folder, mask_dir: str | None, folders: int) -> Path:
    if mask_dir is not None:
        if folders > 1:
            raise UserError(
                f"{mask_dir} is one folder, but the dataset configuration has several of images; give each subset its "
                "conditioning_data_dir instead."
            )
        return Path(mask_dir)
    if folder.mask_dir is not None:
        return Path(folder.mask_dir)
    if folder.place != "--image_dir":
        raise UserError(f"{folder.place}: conditioning_data_dir, the folder of the masks, is missing.")
    path = Path(folder.path)
    name = path.name or path.resolve().name
    return path.resolve().parent / f"{name}_masks" if path.name in ("", "..") else path.with_name(f"{name}_masks")


def _images(
    folder: Folder, recursive: bool, without: Path | None = None
) -> Iterator[tuple[Path, list[Path], set[str]]]:
    """Each folder with images: its path, the images, all names in it. ``without`` is a folder that is passed over."""
    listing = list_folder(folder.path, folder.place)
    images = images_in(folder.path, listing.files)
    nested = nested_images(folder.path, listing.subfolders)
    if without is not None:
        inside = without.resolve()
        nested = [name for name in nested if inside not in Path(folder.path, name).resolve().parents]
    if not images and not (recursive and nested):
        hint = f" itself; --recursive takes the {len(nested)} in its sub-folders too" if nested else ""
        raise UserError(f"{folder.place}: there are no images in {folder.path}{hint}.")
    if images:
        yield Path(folder.path), images, listing.files
    if recursive:
        for below in sorted({os.path.dirname(name) for name in nested}):
            path = os.path.join(folder.path, below)
            files = list_folder(path, folder.place).files
            yield Path(path), images_in(path, files), files


def _each_once(targets: Iterable[Target]) -> list[Target]:
    """A file is made of the first of the images that share it."""
    first: dict[str, Target] = {}
    for target in targets:
        other = first.setdefault(os.path.abspath(target.file), target)
        if os.path.abspath(other.image) != os.path.abspath(target.image):
            warn(f"{other.image.name} and {target.image.name} share {target.file}; it is made of the first one.")
    return list(first.values())


def read_on_white(path: Path) -> Image.Image:
    """An image as RGB, what is transparent in it white. Raises UserError naming the file."""
    from PIL import Image

    image, alpha = read_image(path, alpha=True)
    assert alpha is not None
    return Image.composite(image, Image.new("RGB", image.size, "white"), alpha)


class ImageModel(Protocol):
    """What makes something of images."""

    def prepare(self, path: Path) -> Any:
        """What the model needs of an image, in a thread. Raises UserError for one that cannot be read."""

    def __call__(self, prepared: list[Any]) -> list[Any]:
        """What it makes of a batch, one result for each image."""


@dataclass
class Outcome:
    """What became of the images."""

    written: int = 0
    kept: int = 0
    problems: list[str] = field(default_factory=list)
    """A sentence for each image that could not be read."""

    def line(self, subject: str) -> str:
        """The outcome in one line. ``subject``: "captions"."""
        failed = f", {len(self.problems)} images could not be read" if self.problems else ""
        return f"{subject}: {self.written} written, {self.kept} there already{failed}"


def go_through(
    targets: Sequence[Target],
    options: ImageOptions,
    subject: str,
    batch_size: int,
    load: Callable[[], ImageModel],
    write: Callable[[Target, Any], bool],
    keep: bool = True,
) -> Outcome:
    """Make what is missing, or everything with ``--overwrite`` or without ``keep``, in batches.

    ``load`` gives the model, which is only loaded where there is something to do; ``write`` puts a result into its file
    and says whether that has changed. Each file is written as soon as its batch is done, so that the same command goes
    on after an interruption. Images that cannot be read are left out and listed in the outcome.
    """
    wanted = [target for target in targets if options.overwrite or not keep or target.existing is None]
    outcome = Outcome(kept=len(targets) - len(wanted))
    if options.dry_run:
        for target in wanted:
            say(f"{target.image} -> {target.file}")
        say(f"{subject}: {len(wanted)} would be made, {outcome.kept} there already")
        return outcome
    if not wanted:
        return outcome
    for folder in dict.fromkeys(target.file.parent for target in wanted):
        require_writable_folder(folder, subject)
    _work(wanted, load(), batch_size, write, outcome, subject)
    for problem in outcome.problems:
        warn(problem)
    return outcome


def _work(
    wanted: Sequence[Target],
    model: ImageModel,
    batch_size: int,
    write: Callable[[Target, Any], bool],
    outcome: Outcome,
    subject: str,
) -> None:
    """The next batch is read while the model works."""
    from tqdm import tqdm

    batches = [wanted[start : start + batch_size] for start in range(0, len(wanted), batch_size)]
    with (
        ThreadPoolExecutor(min(batch_size, os.cpu_count() or 1)) as pool,
        messages_above_progress(),
        tqdm(total=len(wanted), desc=subject, unit="image", ascii=True) as bar,
    ):

        def read(batch: Sequence[Target]) -> list[Any]:
            return [pool.submit(_prepared, model, target.image) for target in batch]

        coming = read(batches[0])
        for number, batch in enumerate(batches):
            prepared = [future.result() for future in coming]
            coming = read(batches[number + 1]) if number + 1 < len(batches) else []
            good = [(target, data) for target, data in zip(batch, prepared) if not isinstance(data, UserError)]
            outcome.problems += [str(data) for data in prepared if isinstance(data, UserError)]
            with explaining_memory(len(good)):
                results = model([data for _, data in good]) if good else []
            for (target, _), result in zip(good, results):
                changed = write(target, result)
                outcome.written += changed
                outcome.kept += not changed
            bar.update(len(batch))


MEMORY_IS_FULL = ("out of memory", "DefaultCPUAllocator: ", "Failed to allocate memory")
"""What torch says of a GPU and of the CPU, and onnxruntime of both."""


@contextlib.contextmanager
def explaining_memory(images: int) -> Iterator[None]:
    """A full device becomes a UserError that says what helps."""
    try:
        yield
    except Exception as error:  # torch and onnxruntime have kinds of their own
        if isinstance(error, UserError) or not any(text in str(error) for text in MEMORY_IS_FULL):
            raise
        told = "a batch of" if images > 1 else "even"
        raise UserError(
            f"There is not enough memory for {told} {images} image{'s' if images > 1 else ''}; give a smaller "
            "--batch_size, a smaller dtype or another --device. What is done so far is kept."
        ) from None


def _prepared(model: ImageModel, path: Path) -> Any:
    try:
        return model.prepare(path)
    except UserError as error:
        return error
