"""How the texts of images are read: options, and their checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from library.errors import UserError

if TYPE_CHECKING:
    from library.models.stable_diffusion.image_text import ImageTexts


@dataclass
class TextOptions:
    """Text"""

    clip_skip: int | None = None
    """Layer of the text encoders that is used, counted from the last; unset means 1, and 2 for XL."""
    max_embeddings_multiples: int | None = None
    """Longest text in units of 75 tokens; unset means 1."""
    emb_normalize_mode: Literal["original", "none", "abs"] = "original"
    """What a text with weights keeps: the mean of its values (original), of their absolute values (abs), or neither."""
    textual_inversion_embeddings: list[str] = field(default_factory=list)
    """Textual Inversion files; each is used where its name, without the ending, stands in a text."""
    XTI_embeddings: list[str] = field(default_factory=list)
    """Extended Textual Inversion files, not for XL; they are used in the same way."""

    def image_texts(self) -> ImageTexts:
        """The rules for the pipeline. Raises UserError for a number that cannot be."""
        from library.models.stable_diffusion.image_text import ImageTexts

        multiples = self.max_embeddings_multiples
        if multiples is not None and multiples < 1:
            raise UserError(f"--max_embeddings_multiples must be at least 1, not {multiples}.")
        return ImageTexts(multiples or 1, self.emb_normalize_mode)
