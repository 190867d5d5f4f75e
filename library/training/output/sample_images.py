"""Sample images during training: which prompts, when, and under which file names."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.console import say, warn
from library.errors import UserError, in_one_line
from library.files import writing
from library.prompt_options import (
    TRIGGER,
    PromptOptions,
    check_prompt_values,
    names_trigger,
    read_prompt_file,
    with_trigger,
)


@dataclass
class SampleOptions:
    """Sample images"""

    sample_every_n_steps: int | None = None
    """Generate sample images every N steps."""
    sample_every_n_epochs: int | None = None
    """Generate sample images every N epochs; overrides --sample_every_n_steps."""
    sample_at_first: bool = False
    """Generate sample images before training."""
    sample_prompts: str | None = None
    """File of sample prompts (.txt, .toml or .json)."""


@dataclass
class SamplerOptions:
    """Sample images"""

    sample_sampler: str = "ddim"
    """Sampler of Stable Diffusion samples; a prompt's --ss wins."""


class Samples:
    """The sample images of a run."""

    def __init__(self, options: SampleOptions, output_dir: str | None, output_name: str | None) -> None:
        """Reads the prompt file.

        Raises UserError when it cannot be read, when a prompt holds values that no image can have, or when samples are
        due without a file.
        """
        self.options = options
        self.folder = Path(output_dir or ".") / "sample"
        self.prefix = f"{output_name}_" if output_name else ""
        for name in ("sample_every_n_steps", "sample_every_n_epochs"):
            value = getattr(options, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, not {value}.")
        wanted = options.sample_at_first or options.sample_every_n_steps or options.sample_every_n_epochs
        if wanted and not options.sample_prompts:
            raise UserError(
                "Sample images are enabled, but --sample_prompts is missing; name a .txt, .toml or .json file."
            )
        self.prompts: list[PromptOptions] = read_prompt_file(Path(options.sample_prompts)) if wanted else []  # type: ignore[arg-type]
        for number, prompt in enumerate(self.prompts, 1):
            check_prompt_values(prompt, f"{options.sample_prompts}, prompt {number}: ")
        self.batch_size = 1
        """The largest number of images that are generated together."""
        if wanted and not self.prompts:
            say(f"{options.sample_prompts} contains no prompts; sampling is skipped.")

    def name_trigger(self, word: str | None, words: Sequence[str]) -> None:
        """Put the trigger word in the place of ``[trigger]``: ``word``, or else the only one of ``words``.

        Raises UserError when a prompt needs one and there are several; logs a warning when there is none.
        """
        for number, prompt in enumerate(self.prompts, 1):
            if not names_trigger(prompt):
                continue
            place = f"{self.options.sample_prompts}, prompt {number}"
            if not word and len(words) > 1:
                raise UserError(f"{place}: {TRIGGER} may stand for {' or '.join(words)}; write the word itself.")
            if not word and not words:
                warn(f"{place}: {TRIGGER} stands for nothing without --trigger_word; it is kept as written.")
            self.prompts[number - 1] = with_trigger(prompt, word or "".join(words))

    def due_at_start(self) -> bool:
        """Whether samples are generated before the first step."""
        return bool(self.prompts) and self.options.sample_at_first

    def due_after_step(self, step: int) -> bool:
        """Whether samples are generated after ``step``."""
        every = self.options.sample_every_n_steps
        return bool(self.prompts and every and not self.options.sample_every_n_epochs and step % every == 0)

    def due_after_epoch(self, epoch: int) -> bool:
        """Whether samples are generated after ``epoch`` (1-based)."""
        every = self.options.sample_every_n_epochs
        return bool(self.prompts and every and epoch % every == 0)

    def file_name(self, index: int, prompt: PromptOptions, step: int, epoch: int | None) -> str:
        """``{name_}{e000001 or 000100}_{index:02d}_{YYYYmmddHHMMSS}[_{seed}].png``."""
        moment = f"{step:06d}" if epoch is None else f"e{epoch:06d}"
        seed = "" if prompt.seed is None else f"_{prompt.seed}"
        return f"{self.prefix}{moment}_{index:02d}_{time.strftime('%Y%m%d%H%M%S')}{seed}.png"

    def images(self, step: int, epoch: int | None) -> dict[int, Path]:
        """The newest image file of each prompt's index that was drawn at this moment, by any process."""
        if not self.folder.is_dir():
            return {}
        moment = f"{step:06d}" if epoch is None else f"e{epoch:06d}"
        name = re.compile(re.escape(f"{self.prefix}{moment}_") + r"(\d{2,})_(\d{14})(_-?\d+)?\.png")
        found: dict[int, tuple[str, Path]] = {}
        for path in self.folder.iterdir():
            match = name.fullmatch(path.name)
            if match and int(match[1]) < len(self.prompts):
                index, drawn = int(match[1]), (match[2], path)
                found[index] = max(found.get(index, drawn), drawn)
        return {index: path for index, (_, path) in found.items()}

    def draw(
        self,
        generate: Callable[[Sequence[PromptOptions]], Sequence[Any]],
        step: int,
        epoch: int | None,
        process_index: int = 0,
        num_processes: int = 1,
        log_image: Callable[[int, PromptOptions, Any], None] | None = None,
        common: Callable[[PromptOptions], Hashable] | None = None,
        writes: bool = True,
    ) -> None:
        """Draw every prompt of this process (dealt round robin) and write the images, if this process ``writes``.

        ``generate(prompts)`` returns a PIL image for each; prompts with equal ``common(prompt)`` may come together, up
        to ``batch_size``. Whatever fails is named in a warning.
        """
        start, drawn = time.perf_counter(), 0
        mine = [i for i in range(len(self.prompts)) if i % num_processes == process_index]
        waiting = self.batches(mine, common)
        while waiting:
            batch = waiting.pop(0)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                images = generate([self.prompts[index] for index in batch])
            except Exception as error:  # nothing about an image may cost anyone a training
                if len(batch) == 1:
                    self.warn_of(batch[0], step, error)
                else:
                    warn(f"{len(batch)} sample images together failed: {in_one_line(error)}. Each is generated alone.")
                    waiting[:0] = [[index] for index in batch]
                continue
            if writes:
                drawn += sum([self.write(index, image, step, epoch, log_image) for index, image in zip(batch, images)])
        say(f"step {step}: {drawn} sample images in {time.perf_counter() - start:.1f} s")

    def batches(self, indices: Sequence[int], common: Callable[[PromptOptions], Hashable] | None) -> list[list[int]]:
        """The prompts that are generated together, in the order of the first of each batch."""
        if common is None or self.batch_size == 1:
            return [[index] for index in indices]
        alike: dict[Hashable, list[int]] = {}
        for index in indices:
            alike.setdefault(common(self.prompts[index]), []).append(index)
        size = self.batch_size
        return sorted(group[at : at + size] for group in alike.values() for at in range(0, len(group), size))

    def write(
        self,
        index: int,
        image: Any,
        step: int,
        epoch: int | None,
        log_image: Callable[[int, PromptOptions, Any], None] | None,
    ) -> bool:
        """Write and log a drawn image; False, with a warning, if that fails."""
        prompt = self.prompts[index]
        try:
            with writing(self.folder / self.file_name(index, prompt, step, epoch)) as file:
                image.save(file, format="PNG")
            if log_image is not None:
                log_image(index, prompt, image)
        except Exception as error:
            self.warn_of(index, step, error)
            return False
        return True

    def warn_of(self, index: int, step: int, error: Exception) -> None:
        """Log that an image failed."""
        warn(f"step {step}: sample image {index + 1} failed: {in_one_line(error)}. The training continues.")
