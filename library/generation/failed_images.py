"""Images of a long run that cannot be generated: the others are generated, and the end says which ones are missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from library.console import warn
from library.errors import UserError, in_one_line
from library.generation.image_prompts import ImagePrompt

MOST_IN_A_ROW = 3
"""Batches; after this many without an image, the run ends."""
MOST_NAMED = 20
"""Numbers of images in the message at the end."""


class FailedImages:
    """Keeps a run going after a batch that fails, such as one that is too large or has a broken start image.

    It does not where nothing was drawn before, nor after several such batches in a row: then the reason is the same for
    all, such as a full disk.
    """

    def __init__(self) -> None:
        self.numbers: list[int] = []
        """Running numbers, from 1, of the images that are missing."""
        self._drawn = False
        self._in_a_row = 0

    @contextlib.contextmanager
    def going_on(self, prompts: Sequence[ImagePrompt]) -> Iterator[None]:
        """Draw a batch within it: a UserError is a warning, unless the run is to end."""
        try:
            yield
        except UserError as error:
            self._in_a_row += 1
            if not self._drawn or self._in_a_row >= MOST_IN_A_ROW:
                raise
            numbers = [prompt.number + 1 for prompt in prompts]
            self.numbers += numbers
            with tqdm.external_write_mode():
                warn(f"{_images(numbers)} cannot be generated ({in_one_line(error)}); the run continues.")
        else:
            self._drawn, self._in_a_row = True, 0

    def require_none(self) -> None:
        """Raises UserError that names the images which are missing."""
        if self.numbers:
            raise UserError(f"{_images(self.numbers)} could not be generated; the warnings above say why.")


def _images(numbers: Sequence[int]) -> str:
    named = ", ".join(map(str, numbers[:MOST_NAMED])) + (", ..." if len(numbers) > MOST_NAMED else "")
    return f"image {named}" if len(numbers) == 1 else f"{len(numbers)} images ({named})"
