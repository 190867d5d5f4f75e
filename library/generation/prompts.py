"""What an inference script draws: prompts from the command line or a file, with defaults filled in."""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass
from pathlib import Path

from library.errors import UserError
from library.prompt_options import Prompt, PromptOptions, read_prompt_file


@dataclass
class ImageOptions:
    """Image"""

    prompt: str | None = None
    """The prompt."""
    negative_prompt: str | None = None
    """What to keep away from, with classifier-free guidance; unset counts as an empty one."""
    steps: int | None = None
    """Denoising steps."""
    seed: int | None = None
    """Seed of the noise; unset draws one for each image."""


@dataclass
class PromptSourceOptions:
    """Many prompts"""

    from_file: str | None = None
    """File of prompts (.txt, .toml or .json), as for the sample images of a training."""
    interactive: bool = False
    """Ask for one prompt after the other and keep the models loaded."""


def check_sources(options: PromptSourceOptions) -> None:
    """Raises UserError when prompts are to come from two places."""
    if options.from_file is not None and options.interactive:
        raise UserError("--from_file and --interactive are mutually exclusive.")


def read_prompts(options: PromptSourceOptions, defaults: PromptOptions) -> list[PromptOptions]:
    """The prompts of ``--from_file`` with ``defaults`` for what they leave open; without a file, the defaults alone.

    Raises UserError for a file that cannot be read or holds none.
    """
    if options.from_file is None:
        return [defaults]
    prompts = read_prompt_file(Path(options.from_file))
    if not prompts:
        raise UserError(f"--from_file: {options.from_file} contains no prompts.")
    return [with_defaults(prompt, defaults) for prompt in prompts]


def with_defaults(own: PromptOptions, defaults: PromptOptions) -> PromptOptions:
    """``own``, with the value of ``defaults`` wherever it has None; its prompt is always its own."""
    given = {name: value for name, value in vars(own).items() if value is not None}
    return dataclasses.replace(defaults, **given)


def with_seed(prompt: Prompt) -> Prompt:
    """``prompt`` with a seed: its own, or one of 32 bits that nobody knew before."""
    return prompt if prompt.seed is not None else dataclasses.replace(prompt, seed=secrets.randbits(32))
