"""Write captions for a folder of images, by a model that you name.

    python tools/caption_images.py --image_dir images/cats --model models/wd-swinv2-tagger-v3 --remove_underscore
    python tools/caption_images.py --dataset_config dataset.toml --model models/Florence-2-large --batch_size 8

The model is a WD14 tagger (``model.onnx`` with ``selected_tags.csv``), or a folder of BLIP, Florence-2 or Qwen2.5-VL in
the layout of transformers; its files say which. Nothing is fetched. Captions that are there already are kept, so that
the same command goes on after an interruption. It ends with 1 when images could not be read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from library.annotation.captioner import CAPTIONERS, Caption, SentenceOptions
from library.annotation.images import ImageModel, ImageOptions, Target, caption_targets, find_folders, go_through
from library.annotation.model_files import ModelOptions, device_and_dtype, model_path, transformers_kind
from library.annotation.tagger import MODEL_FILE, TAGS_FILE, Tagger, TagOptions
from library.console import ConsoleOptions, run_script, say, set_up_console, show, warn
from library.data.captions import read_caption
from library.data.images import first_names
from library.errors import UserError
from library.files import write_text
from library.options import ConfigOptions, changed_options, declared_options, parse_options


@dataclass
class CaptionFileOptions:
    """Caption files"""

    caption_extension: str | None = None
    """Extension of the caption files; unset means that of the dataset configuration, and .txt with --image_dir."""
    append_tags: bool = False
    """Add what is new to captions that are there already."""
    caption_separator: str = ", "
    """What separates tags, and an added caption from the one before it."""
    prefix: str = ""
    """Text that every caption begins with, such as "photo, "."""
    suffix: str = ""
    """Text that every caption ends with."""


@dataclass
class CaptionImagesOptions:
    """Options of tools/caption_images.py."""

    model: ModelOptions = field(default_factory=ModelOptions)
    images: ImageOptions = field(default_factory=ImageOptions)
    files: CaptionFileOptions = field(default_factory=CaptionFileOptions)
    tags: TagOptions = field(default_factory=TagOptions)
    sentences: SentenceOptions = field(default_factory=SentenceOptions)
    config: ConfigOptions = field(default_factory=ConfigOptions)
    console: ConsoleOptions = field(default_factory=ConsoleOptions)


def choose_model(path: Path, options: CaptionImagesOptions) -> Callable[[], ImageModel]:
    """What reads the model at ``path``, after its kind is known. Raises UserError for one that is none of ours."""
    is_tagger = path.suffix == ".onnx" or (path / TAGS_FILE).is_file() or (path / MODEL_FILE).is_file()
    if is_tagger:
        say_unused(options, "sentences", "a WD14 tagger")
        say_unused(options, "model", "a WD14 tagger", only={"dtype"})
        on_cpu = (options.model.device or "").startswith("cpu")
        return lambda: Tagger(path, options.tags, options.files.caption_separator, on_cpu)
    if not path.is_dir():
        raise UserError(f"--model: {path} is neither a folder nor an .onnx file.")
    kind = transformers_kind(path, list(CAPTIONERS), f"captions without {MODEL_FILE} and {TAGS_FILE}")
    say_unused(options, "tags", f"a model of the type {kind}")
    return lambda: CAPTIONERS[kind](path, kind, options.sentences, *device_and_dtype(options.model))


def say_unused(options: CaptionImagesOptions, group: str, kind: str, only: set[str] | None = None) -> None:
    """Say which options of a group were given in vain."""
    declared = declared_options(type(options))
    names = [name for name in changed_options(options) if declared[name].group == group]
    for name in names:
        if only is None or name in only:
            warn(f"--{name} has no effect: the model is {kind}.")


class CaptionWriter:
    """Puts what a model says into caption files."""

    def __init__(self, options: CaptionFileOptions) -> None:
        self.options = options
        self.empty: list[Path] = []
        """Images of which the model said nothing."""
        self.cut: list[Path] = []
        """Images whose caption was longer than --max_length."""

    def __call__(self, target: Target, result: list[str] | Caption) -> bool:
        """Write the caption file; False where it says so already."""
        is_sentence = isinstance(result, Caption)
        if isinstance(result, Caption):
            text = " ".join(result.text.split())
            parts = [text] if text else []
            if not result.complete:
                self.cut.append(target.image)
        else:
            parts = result
        if not parts:
            self.empty.append(target.image)
        former = self._former(target) if self.options.append_tags else ""
        lines = [self._added(line, parts, is_sentence) for line in former.split("\n")]
        text = "\n".join(lines) if former else self._whole(parts)
        if former and text == former:
            return False
        write_text(target.file, f"{text}\n")
        return True

    def _whole(self, parts: list[str]) -> str:
        text = self.options.caption_separator.join(parts)
        return " ".join(f"{self.options.prefix}{text}{self.options.suffix}".split())

    def _added(self, former: str, parts: list[str], is_sentence: bool) -> str:
        """A line with those parts behind it that are not in it yet."""
        separator = self.options.caption_separator
        there = [part.strip() for part in former.split(separator.strip() or separator)]
        new = [part for part in parts if part not in (former if is_sentence else there)]
        return separator.join([former, *new])

    def _former(self, target: Target) -> str:
        """What is there: one line, or several for ``enable_wildcard``."""
        return read_caption(target.existing, enable_wildcard=True).caption if target.existing else ""


def named(images: list[Path]) -> str:
    """How many, and the first few, for a message."""
    return f"{len(images)} ({first_names([image.name for image in images])})"


def main() -> None:
    """Write the captions. The exit code is 1 where images could not be read."""
    options = parse_options(CaptionImagesOptions, __doc__ or "")
    set_up_console(options.console)
    files, images = options.files, options.images
    if options.model.batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, not {options.model.batch_size}.")
    if files.append_tags and images.overwrite:
        raise UserError("--append_tags and --overwrite are mutually exclusive: captions are extended or replaced.")
    load = choose_model(model_path(options.model.model), options)
    targets = caption_targets(find_folders(images), images, files.caption_extension)
    write = CaptionWriter(files)
    models: list[Any] = []

    def loaded() -> ImageModel:
        models.append(load())
        return models[0]

    keep = not files.append_tags
    outcome = go_through(targets, images, "captions", options.model.batch_size, loaded, write, keep)
    if write.empty:
        warn(f"images of which the model said nothing: {named(write.empty)}")
    if write.cut:
        warn(f"images whose caption was cut off, which a larger --max_length prevents: {named(write.cut)}")
    if models and options.tags.frequency_tags and isinstance(models[0], Tagger):
        for line in models[0].choice.frequencies():
            show(line)
    if not images.dry_run:
        say(outcome.line("captions"))
    sys.exit(1 if outcome.problems else 0)


if __name__ == "__main__":
    run_script(main)
