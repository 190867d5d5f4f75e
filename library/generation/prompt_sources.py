"""Where the prompts of ``gen_img.py`` come from, and the seed of each image."""

from __future__ import annotations

from dataclasses import dataclass

from library.errors import UserError


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
    """How many images are drawn together; no image depends on it."""
    n_iter: int = 1
    """How many times all prompts are drawn."""
    seed: int | None = None
    """Seed of the only image, or that from which the images' seeds are drawn; unset draws other ones each time."""
    iter_same_seed: bool = False
    """All prompt lines of one iteration of --n_iter have the same seed, but for those with --d."""
    shuffle_prompts: bool = False
    """Put the prompt lines into another order for each iteration."""


def check_prompt_options(options: ImagePromptOptions) -> None:
    """Raises UserError for numbers that cannot be and for prompts from two places."""
    for name in ("images_per_prompt", "batch_size", "n_iter"):
        value = getattr(options, name)
        if value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}.")
    if options.seed is not None and not -(2**63) <= options.seed < 2**64:
        raise UserError(f"--seed {options.seed} does not fit into 64 bits.")
    sources = [name for name in ("from_file", "from_module", "interactive") if getattr(options, name)]
    if len(sources) > 1:
        raise UserError(f"--{sources[0]} and --{sources[1]} are mutually exclusive.")
