"""Where the prompts of ``gen_img.py`` come from, and the seed of each image."""

from __future__ import annotations

import dataclasses
import importlib.util
import random
import secrets
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from library.console import say, warn
from library.errors import UserError, in_one_line
from library.generation.dynamic_prompts import expand, is_dynamic, variant_count
from library.generation.image_prompts import OPTION, ImagePrompt, parse_image_prompt, take_seeds
from library.generation.session import PLACE, take_lines
from library.options import all_values
from library.randomness import python_random
from library.text_files import read_text, shown

LARGEST_DRAWN_SEED = 2**32 - 1
MODULE_NAME = "prompt_module"
MODULE_FUNCTION = "get_prompter"
ASK = "\nType prompt:\n"
SOURCES = ("from_file", "from_module", "prompt", "interactive")
"""Options that give prompts; of several, the first one counts."""


@dataclass
class ImagePromptOptions:
    """Prompts"""

    prompt: str | None = None
    """Prompt line, which may hold options such as --n and --w."""
    from_file: str | None = None
    """Text file (UTF-8) with one prompt line on each line; empty lines and those that begin with # are left out."""
    from_module: str | None = None
    """Python file that gives the prompt lines: its get_prompter(args, pipe, networks) returns what is called for each
    line."""
    prompter_module_args: str | None = None
    """Text for the module of --from_module, which reads it from args.prompter_module_args."""
    interactive: bool = False
    """Ask for one prompt line after the other and keep the models loaded."""
    no_preview: bool = False
    """Show no window with each image of --interactive."""
    images_per_prompt: int = 1
    """Images for each prompt line."""
    batch_size: int = 1
    """How many images are generated together; no image depends on it."""
    n_iter: int = 1
    """How many times all prompts are used."""
    seed: int | None = None
    """Seed of the only image, or that from which the images' seeds are drawn; unset draws other ones each time."""
    iter_same_seed: bool = False
    """All images of one iteration of --n_iter have the same seed, but for prompt lines with --d or dynamic prompts."""
    shuffle_prompts: bool = False
    """Put the prompt lines into another order for each iteration."""


@dataclass(frozen=True)
class PromptLine:
    """A line as it was written, and where."""

    text: str
    place: str


class ImagePrompts:
    """The images that a run draws: a list for each prompt line, line after line, over all iterations.

    Iterating again gives the same images with the same seeds, unless a module gives the lines. ``defaults`` are the
    command line's values for what a prompt leaves open; ``recorded`` are lines for a run that has no other source.
    Raises UserError for options that cannot be and for a source that is missing or holds no prompt.
    """

    def __init__(self, options: ImagePromptOptions, defaults: ImagePrompt, recorded: Sequence[PromptLine] = ()):
        _check_options(options)
        given = [name for name in SOURCES if getattr(options, name) not in (None, False)]
        if not given and not recorded:
            raise UserError(
                "Nothing to generate: give --prompt, --from_file, --from_module or --interactive, or an --image_path "
                "whose images hold their prompts."
            )
        self.options = options
        self.defaults = defaults
        self.source = given[0] if given else "recorded"
        for name in given[1:]:
            warn(f"--{name} has no effect with --{given[0]}.")
        self.lines = list(recorded) if self.source == "recorded" else self._lines()
        """The prompt lines; none where a module or the user gives them one by one."""
        self.module = _import_module(Path(options.from_module or "")) if self.source == "from_module" else None
        self._prompter: Callable[..., Any] | None = None
        self._arguments: tuple[Any, ...] = ()
        self._read: dict[PromptLine, ImagePrompt] = {}
        self._base_seed = secrets.randbits(32) if options.seed is None else options.seed
        self._say_what_has_no_effect()

    @property
    def interactive(self) -> bool:
        """Whether the user types the lines; then ``session`` draws them."""
        return self.source == "interactive"

    @property
    def known_ahead(self) -> bool:
        """Whether all images are known before the first one is drawn."""
        return self.source not in ("interactive", "from_module")

    @property
    def count(self) -> int | None:
        """How many images there are; None where that is not known ahead. Raises UserError as iterating does."""
        if not self.known_ahead:
            return None
        variants = sum(variant_count(*self._without_seeds(line)) for line in self.lines)
        return variants * self.options.images_per_prompt * self.options.n_iter

    def check(self, check: Callable[[ImagePrompt, str], None] | None = None) -> None:
        """Read all lines that are known ahead; each image goes through ``check(image, place)``.

        ``place`` says where the line stands and ends in ": ". Raises UserError for the first mistake.
        """
        for place, images in self._known_images():
            for image in images if images[0].dynamic else images[:1]:
                if check is not None:
                    check(image, f"{place}: ")
        if self.known_ahead:
            for line in self.lines:
                self._say_how_seeds_fit(line)

    def open_module(self, options: Any, pipeline: Any, networks: Sequence[Any]) -> None:
        """Let the module of ``--from_module`` make its prompter. Raises UserError when it fails.

        It gets all ``options`` of the script by name, and the models by the names of ``ModelParts``.
        """
        if self.module is None:
            return
        args, pipe = SimpleNamespace(**all_values(options)), ModelParts(pipeline, self.defaults)
        self._arguments = (args, pipe)
        with _ModuleErrors(self.module):
            self._prompter = getattr(self.module, MODULE_FUNCTION)(args, pipe, networks)
        if not callable(self._prompter):
            raise UserError(f"--from_module: {MODULE_FUNCTION} must return something that can be called.")
        if self.options.shuffle_prompts and not callable(getattr(self._prompter, "shuffle", None)):
            raise UserError("--shuffle_prompts: the prompter of --from_module has no shuffle().")
        if hasattr(self._prompter, "__len__"):
            with _ModuleErrors(self.module):
                say(f"--from_module: {len(self._prompter)} prompt lines")

    def __iter__(self) -> Iterator[list[ImagePrompt]]:
        known = self._known_images() if self.known_ahead else self._images_of_module()
        return (images for _, images in known)

    def session(self, draw: Callable[[list[ImagePrompt]], None]) -> None:
        """Ask for prompt lines and hand the images of each to ``draw``; a mistake or Ctrl-C does not end the session.

        A line without a prompt before its options is requested again.
        """
        draw_seed = _drawn_by(random.Random(self._base_seed))
        number = 0

        def take(line: str) -> None:
            nonlocal number
            if not OPTION.split(" " + line.strip())[0].strip():
                return
            images = self._images(PromptLine(line, PLACE), draw_seed, None, number, 0)
            number += len(images)
            draw(images)

        take_lines(take, ASK, end=None)

    # ---- lines ------------------------------------------------------------------------------------------------------

    def _lines(self) -> list[PromptLine]:
        if self.source == "prompt":
            return [PromptLine(self.options.prompt or "", "--prompt")]
        if self.source != "from_file":
            return []
        path = Path(self.options.from_file or "")
        if path.suffix.lower() in (".json", ".toml"):
            raise UserError(f"--from_file: {path} must be a text file with one prompt line on each line.")
        numbered = enumerate(read_text(path, "--from_file").split("\n"), 1)
        lines = [PromptLine(s, f"{path}, line {n}") for n, s in numbered if s.strip() and not s.startswith("#")]
        if not lines:
            raise UserError(f"--from_file: {path} holds no prompts.")
        return lines

    def _known_images(self) -> Iterator[tuple[str, list[ImagePrompt]]]:
        """Place and images of each line that is known ahead."""
        number = 0
        draw_seed = self._seed_source()
        for iteration in range(self.options.n_iter):
            iter_seed = draw_seed() if self.options.iter_same_seed else None
            for line in self._ordered(iteration):
                images = self._images(line, draw_seed, iter_seed, number, iteration)
                number += len(images)
                yield line.place, images

    def _ordered(self, iteration: int) -> list[PromptLine]:
        lines = list(self.lines)
        if self.options.shuffle_prompts and self.source != "recorded":
            python_random(self._base_seed, "order of prompts", iteration).shuffle(lines)
        return lines

    def _images_of_module(self) -> Iterator[tuple[str, list[ImagePrompt]]]:
        """Place and images of each line that the module gives; a line with a mistake is reported and left out."""
        prompter: Any = self._prompter
        module: Any = self.module
        seed_random, number, place = random.Random(self._base_seed), 0, 0
        draw_seed = _drawn_by(seed_random)
        for iteration in range(self.options.n_iter):
            iter_seed = draw_seed() if self.options.iter_same_seed else None
            first, prompt_index = number, 0
            if self.options.shuffle_prompts:
                prompter.shuffle()
            while True:
                with _ModuleErrors(module):
                    text = prompter(*self._arguments, seed_random, iter_seed, prompt_index, number - first)
                if text is None:
                    break
                if not isinstance(text, str):
                    raise UserError(f"--from_module: a prompt must be text, not {shown(text)}.")
                prompt_index, place = prompt_index + 1, place + 1
                line = PromptLine(text, f"--from_module, prompt {place}")
                try:
                    images = self._images(line, draw_seed, iter_seed, number, iteration)
                except UserError as error:
                    warn(f"{error} It is left out.")
                    continue
                number += len(images)
                yield line.place, images

    def _images(
        self, line: PromptLine, draw_seed: Callable[[], int], iter_seed: int | None, number: int, iteration: int
    ) -> list[ImagePrompt]:
        """The images of a line; the first one has this running number."""
        text, given = take_seeds(line.text, line.place)
        count, dynamic = self.options.images_per_prompt, is_dynamic(text)
        if dynamic:  # so that a seed of the command line's draws gives each image other choices
            seeds = [*given[:count], *(draw_seed() for _ in range(count - len(given)))]
        elif given:
            seeds = [given[min(index, len(given) - 1)] for index in range(count)]
        else:
            seeds = [draw_seed() if iter_seed is None else iter_seed for _ in range(count)]
        images: list[ImagePrompt] = []
        for seed, prompts in zip(seeds, expand(text, seeds, line.place)):
            for prompt in prompts:
                index = len(images)
                read = self._parsed(PromptLine(prompt, line.place))
                image = dataclasses.replace(
                    read, seed=seed, number=number + index, index=index, iteration=iteration, dynamic=dynamic
                )
                images.append(image)
        return images

    def _parsed(self, line: PromptLine) -> ImagePrompt:
        """A line without seeds and groups; each one is read once, so that a mistake in it is reported once."""
        if line not in self._read:
            if not self.known_ahead:
                self._read.clear()  # only the last one: there is no end to the others
            self._read[line] = parse_image_prompt(line.text, self.defaults, line.place)
        return self._read[line]

    @staticmethod
    def _without_seeds(line: PromptLine) -> tuple[str, str]:
        return take_seeds(line.text, line.place)[0], line.place

    # ---- seeds ------------------------------------------------------------------------------------------------------

    def _seed_source(self) -> Callable[[], int]:
        """Draws the seeds of images: always ``--seed`` itself for one prompt line with one image."""
        seed = self.options.seed
        if seed is not None and len(self.lines) == 1 and self.options.images_per_prompt == 1:
            return lambda: seed
        return _drawn_by(random.Random(self._base_seed))

    def _say_how_seeds_fit(self, line: PromptLine) -> None:
        """A line about a number of seeds that is not the number of images."""
        text, given = take_seeds(line.text, line.place)
        count = self.options.images_per_prompt
        if len(given) > count:
            warn(f"{line.place}: --d gives {len(given)} seeds, but --images_per_prompt is {count}.")
        elif 1 < len(given) < count and not is_dynamic(text):
            warn(f"{line.place}: --d gives {len(given)} seeds for {count} images; the last one is used again.")

    def _say_what_has_no_effect(self) -> None:
        options = self.options
        if options.prompter_module_args is not None and self.source != "from_module":
            say("--prompter_module_args has no effect without --from_module")
        if self.interactive:
            for name in ("n_iter", "iter_same_seed", "shuffle_prompts"):
                if getattr(options, name) != getattr(ImagePromptOptions, name):
                    say(f"--{name} has no effect with --interactive")
        elif options.no_preview:
            say("--no_preview has no effect without --interactive")
        if options.shuffle_prompts and self.source == "recorded":
            say("--shuffle_prompts has no effect on prompts that come from images")
        if options.iter_same_seed and options.images_per_prompt > 1:
            say("--iter_same_seed: the images of a prompt line have the same seed, too")


def _drawn_by(generator: random.Random) -> Callable[[], int]:
    return lambda: generator.randint(0, LARGEST_DRAWN_SEED)


def _check_options(options: ImagePromptOptions) -> None:
    """Raises UserError for numbers that cannot be."""
    for name in ("images_per_prompt", "batch_size", "n_iter"):
        value = getattr(options, name)
        if value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}.")
    if options.seed is not None and not -(2**63) <= options.seed < 2**64:
        raise UserError(f"--seed {options.seed} does not fit into 64 bits.")


# ---- the user's module -----------------------------------------------------------------------------------------------


def _import_module(path: Path) -> ModuleType:
    """The Python file as the module ``prompt_module``. Raises UserError when it cannot be, or lacks its function."""
    read_text(path, "--from_module")
    spec = importlib.util.spec_from_file_location(MODULE_NAME, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--from_module: {path} must be a Python file (.py).")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE_NAME] = module
    with _ModuleErrors(module):
        spec.loader.exec_module(module)
    if not callable(getattr(module, MODULE_FUNCTION, None)):
        raise UserError(f"--from_module: {path} has no function {MODULE_FUNCTION}(args, pipe, networks).")
    return module


class ModelParts:
    """The ``pipe`` of a prompt module: parts of the model, which are loaded when they are needed.

    A module cannot change how images are generated other than by its prompt lines; NotImplementedError says so.
    """

    def __init__(self, pipeline: Any, defaults: ImagePrompt):
        self._pipeline = pipeline
        self._defaults = defaults

    @property
    def unet(self) -> Any:
        """The U-Net."""
        return self._pipeline.load(self._pipeline.denoiser)

    @property
    def vae(self) -> Any:
        """The autoencoder."""
        return self._pipeline.load_autoencoder()

    @property
    def text_encoders(self) -> list[Any]:
        """One or two."""
        return self._pipeline.load_text_encoders()

    @property
    def tokenizers(self) -> list[Any]:
        """One for each text encoder."""
        return [self._pipeline.tokenizer(encoder) for encoder in self._pipeline.encoders]

    @property
    def device(self) -> Any:
        """Where they work."""
        return self._pipeline.device

    @property
    def scheduler(self) -> Any:
        """diffusers' scheduler of the command line's sampler and steps; every batch is generated with a new one."""
        return self._pipeline.solver(self._pipeline.request(self._defaults)).scheduler

    def set_control_nets(self, *arguments: Any, **keywords: Any) -> None:
        """Refused: ControlNets are opened before the first prompt."""
        raise NotImplementedError("ControlNets are chosen by --control_net_models for the whole run")

    def set_gradual_latent(self, *arguments: Any, **keywords: Any) -> None:
        """Refused: each prompt line says it itself."""
        raise NotImplementedError("Gradual Latent is set by --gradual_latent_timesteps, or by --glt in a prompt line")


class _ModuleErrors:
    """Errors of a user's module become one sentence with the module's line."""

    def __init__(self, module: ModuleType):
        self.file = str(module.__file__)

    def __enter__(self) -> None:
        """Nothing is needed before."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception):
            return
        line = error.lineno if isinstance(error, SyntaxError) else _last_line(traceback.extract_tb(trace), self.file)
        where = f"{self.file}, line {line}" if line else self.file
        raise UserError(f"--from_module: {where}: {in_one_line(error)}.") from error


def _last_line(frames: Iterable[traceback.FrameSummary], file: str) -> int | None:
    return next((frame.lineno for frame in reversed([*frames]) if frame.filename == file), None)
