"""Captions: read from files, and made into the prompt of one training sample.

The steps and their order are those of kohya-ss/sd-scripts, so that a caption file means the same here. Everything
random comes from the ``random.Random`` that is passed in.
"""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from library.errors import UserError
from library.prompt_options import name_trigger
from library.text_files import read_text

WILDCARD = re.compile(r"\{([^}]+)\}")
# Private-use characters stand for {{ and }} while wildcards are replaced.
OPEN_BRACE, CLOSE_BRACE = "\ue000", "\ue001"
CAPTION_BYTES = 1 << 20
"""More than any caption has: what is longer is another file under a caption's name."""


@dataclass(frozen=True)
class CaptionRules:
    """The caption options of one subset (names and meaning as in the dataset configuration)."""

    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    enable_wildcard: bool = False
    shuffle_caption: bool = False
    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    token_warmup_min: int = 1
    token_warmup_step: float = 0.0
    caption_tag_dropout_rate: float = 0.0
    secondary_separator: str | None = None
    trigger_word: str | None = None

    def changing_options(self) -> list[str]:
        """The options in use which give a caption more than one outcome (wildcards aside: they depend on the text)."""
        names = (
            "caption_dropout_rate",
            "caption_dropout_every_n_epochs",
            "shuffle_caption",
            "token_warmup_step",
            "caption_tag_dropout_rate",
        )
        return [name for name in names if getattr(self, name)]


def make_caption(
    caption: str, rules: CaptionRules, *, rng: random.Random, epoch: int, step: int, max_train_steps: int
) -> str:
    """The prompt for one access to one image.

    ``epoch`` counts from 1; 0 stands for "no epoch" and is never one that drops captions. ``step`` is the number of
    updates done, of ``max_train_steps`` in all (for the token warm-up).
    """
    caption = _add_prefix_and_suffix(caption, rules)
    if _is_dropped(rules, rng, epoch):
        return ""
    if rules.enable_wildcard:
        caption = _choose(caption, rng)
    else:
        caption = caption.split("\n")[0]
    caption = name_trigger(caption, rules.trigger_word)
    separator = rules.caption_separator
    if rules.shuffle_caption or rules.token_warmup_step > 0 or rules.caption_tag_dropout_rate > 0:
        caption, separator = _vary_tags(caption, rules, rng, step, max_train_steps), ","
    caption = _replace_secondary_separator(caption, rules)
    return put_trigger_word(caption, rules.trigger_word, separator)


_OF_ONE = random.Random(0)
"""For choices that have a single option left. (To make one for each caption takes longer than all else.)"""


def fixed_caption(caption: str, rules: CaptionRules) -> str:
    """The one prompt that ``caption`` always gives, for caching: prefix, suffix and separators applied.

    Raises UserError naming the options that give it more than one.
    """
    if options := rules.changing_options():
        raise UserError(f"text encoder outputs cannot be cached with {', '.join(options)}: they change the caption.")
    if rules.enable_wildcard and (reason := _choice_in(caption, rules)):
        raise UserError(
            f"text encoder outputs cannot be cached with enable_wildcard when a caption has {reason}: "
            "each use of the image may choose another text."
        )
    return make_caption(caption, rules, rng=_OF_ONE, epoch=0, step=0, max_train_steps=1)


def has_trigger_word(text: str, word: str) -> bool:
    """Whether ``word`` stands in ``text``, in the same case and not as a part of another word."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def put_trigger_word(text: str, word: str | None, separator: str = ",") -> str:
    """``text``, with the trigger word and the separator before it if it lacks the word."""
    if not word or has_trigger_word(text, word):
        return text
    return f"{word}{separator.rstrip()} {text}" if text.strip() else word


def lacks_trigger_word(caption: str, rules: CaptionRules) -> bool:
    """Whether the trigger word is put before ``caption``, or before some outcome of its lines and wildcards."""
    word = rules.trigger_word
    if not word:
        return False
    lines = name_trigger(_add_prefix_and_suffix(caption, rules), word).split("\n")
    if not rules.enable_wildcard:
        return not has_trigger_word(lines[0], word)
    return any(not has_trigger_word(WILDCARD.sub("", line), word) for line in lines)


def _add_prefix_and_suffix(caption: str, rules: CaptionRules) -> str:
    if rules.caption_prefix:
        caption = f"{rules.caption_prefix} {caption}"
    if rules.caption_suffix:
        caption = f"{caption} {rules.caption_suffix}"
    return caption


def _is_dropped(rules: CaptionRules, rng: random.Random, epoch: int) -> bool:
    if rules.caption_dropout_rate > 0 and rng.random() < rules.caption_dropout_rate:
        return True
    every = rules.caption_dropout_every_n_epochs
    return every > 0 and epoch > 0 and epoch % every == 0


def _choose(caption: str, rng: random.Random) -> str:
    if "\n" in caption:
        caption = rng.choice(caption.split("\n"))
    caption = caption.replace("{{", OPEN_BRACE).replace("}}", CLOSE_BRACE)
    caption = WILDCARD.sub(lambda match: rng.choice(match[1].split("|")), caption)
    return caption.replace(OPEN_BRACE, "{").replace(CLOSE_BRACE, "}")


def _choice_in(caption: str, rules: CaptionRules) -> str | None:
    caption = _add_prefix_and_suffix(caption, rules)
    if "\n" in caption:
        return "several lines"
    protected = caption.replace("{{", OPEN_BRACE).replace("}}", CLOSE_BRACE)
    for match in WILDCARD.finditer(protected):
        if "|" in match[1]:
            return f"the choice {match[0]}"
    return None


def _vary_tags(caption: str, rules: CaptionRules, rng: random.Random, step: int, max_train_steps: int) -> str:
    fixed, flexible, suffix = _split_tags(caption, rules)
    flexible = flexible[: _tags_in_use(len(flexible), rules, step, max_train_steps)]
    if rules.shuffle_caption:
        rng.shuffle(flexible)
    if rules.caption_tag_dropout_rate > 0:
        flexible = [tag for tag in flexible if rng.random() >= rules.caption_tag_dropout_rate]
    return ", ".join(fixed + flexible + suffix)


def _split_tags(caption: str, rules: CaptionRules) -> tuple[list[str], list[str], list[str]]:
    """Tags that stay in front, tags that may vary, tags that stay at the end.

    Those with the trigger word are the last ones of the first kind.
    """
    fixed, flexible, suffix = _split_by_place(caption, rules)
    if word := rules.trigger_word:
        fixed += [tag for tag in flexible if has_trigger_word(tag, word)]
        flexible = [tag for tag in flexible if not has_trigger_word(tag, word)]
    return fixed, flexible, suffix


def _split_by_place(caption: str, rules: CaptionRules) -> tuple[list[str], list[str], list[str]]:
    if rules.keep_tokens_separator and rules.keep_tokens_separator in caption:
        parts = [*caption.split(rules.keep_tokens_separator, 2), ""]
        tags = [[tag.strip() for tag in part.split(rules.caption_separator) if tag.strip()] for part in parts]
        return tags[0], tags[1], tags[2]
    tokens = [tag.strip() for tag in caption.strip().split(rules.caption_separator)]
    keep = max(rules.keep_tokens, 0)
    return tokens[:keep], tokens[keep:], []


def _tags_in_use(count: int, rules: CaptionRules, step: int, max_train_steps: int) -> int:
    warmup = rules.token_warmup_step
    if warmup < 1:
        warmup = math.floor(warmup * max_train_steps)
    if not warmup or step >= warmup:
        return count
    return math.floor(step * (count - rules.token_warmup_min) / warmup) + rules.token_warmup_min


def _replace_secondary_separator(caption: str, rules: CaptionRules) -> str:
    if rules.secondary_separator:
        return caption.replace(rules.secondary_separator, rules.caption_separator)
    return caption


def caption_file_names(stem: str, extension: str) -> list[str]:
    """Names that the caption file of an image may have; the second one ignores a face-detection suffix."""
    names = [stem + extension]
    if stem.count("_") >= 4:
        names.append(stem.rsplit("_", 4)[0] + extension)
    return names


def find_caption_file(image: Path, extension: str, names_in_folder: Collection[str]) -> str | None:
    """The path of the caption file of ``image``, or None. ``names_in_folder`` is the folder's listing."""
    folder, name = os.path.split(image)
    for candidate in caption_file_names(os.path.splitext(name)[0], extension):
        if candidate in names_in_folder:
            return os.path.join(folder, candidate)
    return None


@dataclass(frozen=True, slots=True)
class CaptionFile:
    """The caption that a file gives, and what else stands in it."""

    caption: str
    unused_lines: int = 0
    """Lines after the first that are not blank and of which no use is made."""


def read_caption(path: str | Path, *, enable_wildcard: bool) -> CaptionFile:
    """The first line of a caption file, stripped; with wildcards all lines that are not blank.

    Raises UserError for an empty file and one that ``read_text`` refuses, such as one of more than ``CAPTION_BYTES``.
    """
    text = read_text(path, byte_limit=CAPTION_BYTES)
    if not text:
        raise UserError(f"{path}: the caption file is empty; write a caption in it or delete it.")
    first, *rest = text.replace("\r", "\n").split("\n")
    if enable_wildcard:
        return CaptionFile("\n".join(line.strip() for line in (first, *rest) if line.strip()))
    return CaptionFile(first.strip(), sum(1 for line in rest if line.strip()))


def count_tags(captions: Collection[str]) -> dict[str, int]:
    """How often each tag occurs: captions split at commas, lower case (``ss_tag_frequency`` of LoRA files)."""
    counts: dict[str, int] = {}
    for caption in captions:
        for tag in caption.split(","):
            if tag := tag.strip().lower():
                counts[tag] = counts.get(tag, 0) + 1
    return counts
