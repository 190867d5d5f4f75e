"""Tags by a WD14 tagger: ``model.onnx`` with ``selected_tags.csv``, the layout of SmilingWolf's models.

The network takes images [batch, side, side, 3] in BGR, 0..255 as float, padded with white to a square, and gives a
probability for each row of the table. Options have the names of kohya-ss/sd-scripts' tagging script.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.annotation.images import read_on_white
from library.annotation.model_files import first_line
from library.errors import UserError
from library.files import require_regular
from library.text_files import read_text

if TYPE_CHECKING:
    import numpy
    from PIL import Image

MODEL_FILE, TAGS_FILE = "model.onnx", "selected_tags.csv"
GENERAL, CHARACTER, RATING = 0, 4, 9
"""Values of the table's column ``category``; tags of other categories are not used."""
LEAST_LENGTH = 4
"""Of a tag whose underscores stand for spaces; shorter ones are faces such as ^_^."""
CHARACTER_OF_SERIES = re.compile(r"(.+?)[_ ]\(([^()]+)\)")


@dataclass
class TagOptions:
    """Tags (of a WD14 tagger)"""

    thresh: float = 0.35
    """Least probability of a tag, 0 to 1."""
    general_threshold: float | None = None
    """The same of general tags only; unset means --thresh."""
    character_threshold: float | None = None
    """The same of characters' names only; unset means --thresh."""
    remove_underscore: bool = False
    """Write spaces in the place of underscores, except in tags of up to 3 characters."""
    undesired_tags: str | None = None
    """Tags that are never written, separated as in captions."""
    always_first_tags: str | None = None
    """Tags that stand first, in this order, where they occur."""
    tag_replacement: str | None = None
    """Tags to write instead of others: "old,new;old2,new2"."""
    use_rating_tags: bool = False
    """Write the rating as the first tag."""
    use_rating_tags_as_last_tag: bool = False
    """Write the rating as the last tag."""
    character_tags_first: bool = False
    """Write characters' names before general tags."""
    character_tag_expand: bool = False
    """Write name_(series) as two tags, name and series."""
    frequency_tags: bool = False
    """At the end, list how often each tag was found."""


@dataclass(frozen=True)
class Tag:
    """A row of the table."""

    name: str
    category: int


def read_tags(path: Path) -> list[Tag]:
    """The rows of ``selected_tags.csv``. Raises UserError for a file of another kind."""
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path))))
    except csv.Error as error:
        raise UserError(f"{path}: is not a table of tags ({error}).") from None
    columns = set(rows[0]) if rows else set()
    if not {"name", "category"} <= columns:
        raise UserError(f'{path}: is not a table of tags; it needs the columns "name" and "category".')
    tags = []
    for number, row in enumerate(rows, 2):
        if not row["name"] or not (row["category"] or "").strip().isdecimal():
            raise UserError(f"{path}: line {number} has no name and category of a tag.")
        tags.append(Tag(row["name"], int(row["category"])))
    return tags


class TagChoice:
    """From probabilities to the tags of a caption."""

    def __init__(self, tags: Sequence[Tag], options: TagOptions, separator: str) -> None:
        for name in ("thresh", "general_threshold", "character_threshold"):
            if not 0 <= (getattr(options, name) or 0) <= 1:
                raise UserError(f"--{name} must be a probability from 0 to 1, not {getattr(options, name)}.")
        self.options, self.separator = options, separator.strip() or ","
        general, character = (
            options.thresh if threshold is None else threshold
            for threshold in (options.general_threshold, options.character_threshold)
        )
        self.thresholds = {GENERAL: general, CHARACTER: character}
        self.categories = [tag.category for tag in tags]
        self.names = [self._spelled(tag.name) for tag in tags]
        self.undesired = {self._spelled(name) for name in self._listed(options.undesired_tags)}
        self.first = [self._spelled(name) for name in self._listed(options.always_first_tags)]
        self.replacements = self._read_replacements(options.tag_replacement)
        self.counts: dict[str, int] = {}

    def __call__(self, probabilities: Sequence[float] | numpy.ndarray) -> list[str]:
        """The tags of an image, in the order of the table but for the options about it."""
        options = self.options
        order = (CHARACTER, GENERAL) if options.character_tags_first else (GENERAL, CHARACTER)
        found = [
            name
            for category in order
            for name, own, probability in zip(self.names, self.categories, probabilities)
            if own == category and probability >= self.thresholds[category]
            for name in self._expanded(name, category)
        ]
        ratings = [place for place, category in enumerate(self.categories) if category == RATING]
        if ratings and (options.use_rating_tags or options.use_rating_tags_as_last_tag):
            rating = self.names[max(ratings, key=lambda place: float(probabilities[place]))]
            found.insert(len(found) if options.use_rating_tags_as_last_tag else 0, rating)
        found = [self.replacements.get(name, name) for name in found]
        found = list(dict.fromkeys(name for name in found if name not in self.undesired))
        found = [name for name in self.first if name in found] + [name for name in found if name not in self.first]
        for name in found:
            self.counts[name] = self.counts.get(name, 0) + 1
        return found

    def frequencies(self) -> list[str]:
        """How often each tag was chosen so far, the most frequent first, as lines."""
        return [f"{name}: {count}" for name, count in sorted(self.counts.items(), key=lambda row: (-row[1], row[0]))]

    def _spelled(self, name: str) -> str:
        name = name.strip()
        return name.replace("_", " ") if self.options.remove_underscore and len(name) >= LEAST_LENGTH else name

    def _listed(self, text: str | None) -> list[str]:
        return [name.strip() for name in (text or "").split(self.separator) if name.strip()]

    def _expanded(self, name: str, category: int) -> list[str]:
        if not self.options.character_tag_expand or category != CHARACTER:
            return [name]
        match = CHARACTER_OF_SERIES.fullmatch(name)
        return [match[1], match[2]] if match else [name]

    def _read_replacements(self, text: str | None) -> dict[str, str]:
        found = {}
        for pair in filter(None, (part.strip() for part in (text or "").split(";"))):
            old, comma, new = pair.partition(",")
            if not comma or not old.strip() or not new.strip():
                raise UserError(f'--tag_replacement must be like "old,new;old2,new2"; "{pair}" is not such a pair.')
            found[self._spelled(old)] = self._spelled(new)
        return found


class Tagger:
    """A tagger's network, and its tags."""

    def __init__(self, path: Path, options: TagOptions, separator: str, on_cpu: bool) -> None:
        """``path`` is the ONNX file or its folder. Raises UserError for files that are missing or of another kind."""
        file = path / MODEL_FILE if path.is_dir() else path
        table = file.parent / TAGS_FILE
        if not table.is_file():
            raise UserError(f"--model: {TAGS_FILE}, the table of the tags, is missing beside {file}.")
        tags = read_tags(table)
        self.choice = TagChoice(tags, options, separator)
        self.file, self.session = file, _open_session(file, on_cpu)
        entry = self.session.get_inputs()[0]
        self.input, shape = entry.name, entry.shape
        if len(shape) != 4 or shape[3] != 3 or not isinstance(shape[1], int) or shape[1] != shape[2]:
            raise UserError(f"--model: {file} takes {shape}, not images [batch, side, side, 3] as WD14 taggers do.")
        self.side = shape[1]
        self.fixed_batch = shape[0] if isinstance(shape[0], int) else None
        count = self.session.get_outputs()[0].shape[-1]
        if isinstance(count, int):
            self._check_count(count)

    def prepare(self, path: Path) -> numpy.ndarray:
        """An image as the network takes it: [side, side, 3]. Raises UserError."""
        return self.pixels(read_on_white(path))

    def pixels(self, image: Image.Image) -> numpy.ndarray:
        """BGR, 0..255 as float32, in the middle of a white square."""
        import numpy
        from PIL import Image as images

        side = max(image.size)
        square = images.new("RGB", (side, side), "white")
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        resized = square.resize((self.side, self.side), images.Resampling.BICUBIC)
        return numpy.ascontiguousarray(numpy.asarray(resized, dtype=numpy.float32)[..., ::-1])

    def __call__(self, prepared: list[Any]) -> list[list[str]]:
        """The tags of each image."""
        import numpy

        size = self.fixed_batch or len(prepared)
        found: list[list[str]] = []
        for start in range(0, len(prepared), size):
            part = prepared[start : start + size]
            batch = numpy.stack(part + [part[0]] * (size - len(part)))
            probabilities = self.session.run(None, {self.input: batch})[0][: len(part)]
            self._check_count(probabilities.shape[-1])
            if not ((probabilities >= 0) & (probabilities <= 1)).all():
                raise UserError(
                    f"--model: {self.file} gives numbers that are no probabilities; it is not a WD14 tagger."
                )
            found += [self.choice(row) for row in probabilities]
        return found

    def _check_count(self, count: int) -> None:
        if count != len(self.choice.names):
            raise UserError(
                f"--model: {self.file} tells {count} tags apart, but {TAGS_FILE} beside it names "
                f"{len(self.choice.names)}; they belong to different models."
            )


def _open_session(file: Path, on_cpu: bool) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise UserError(
            'WD14 taggers need the package onnxruntime: "pip install onnxruntime" (or onnxruntime-gpu).'
        ) from None

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    there = onnxruntime.get_available_providers()
    wanted = ["CPUExecutionProvider"] if on_cpu else ["CUDAExecutionProvider", "CPUExecutionProvider"]
    try:
        require_regular(file)
        return onnxruntime.InferenceSession(
            str(file), settings, providers=[provider for provider in wanted if provider in there]
        )
    except UserError:
        raise
    except Exception as error:  # each kind of damage has an exception of its own
        raise UserError(f"--model: {file} cannot be read as an ONNX model ({first_line(error)}).") from None
