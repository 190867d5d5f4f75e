"""Words that stand for vectors of their own instead of rows of a text encoder's embedding (Textual Inversion).

Gal et al., "An Image is Worth One Word", arXiv 2208.01618. A word's vectors have token ids behind the vocabulary, which
the embedding of the loaded encoder is taught; its weights stay as they are in the file.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.devices import to_device

if TYPE_CHECKING:
    from library.models.clip import ClipTextEncoder
    from library.models.tokenizer_files import Tokenizer


class AddedWords:
    """The added words of one text encoder, which has ``vocabulary`` rows in its embedding.

    A word is found in a text where it stands alone, between characters that belong to no word, in exactly its letters.
    """

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary
        self.ids: dict[str, range] = {}
        """The token ids of each word's vectors."""
        self.vectors: dict[str, Tensor] = {}
        """Of each word, [vectors, hidden]; no vectors for one that this encoder does not see."""

    def add(self, word: str, vectors: Tensor) -> None:
        """Let ``word`` stand for ``vectors`` [vectors, hidden]."""
        first = self.vocabulary + sum(map(len, self.ids.values()))
        self.ids[word] = range(first, first + len(vectors))
        self.vectors[word] = vectors

    def tokens(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """The token ids of ``text``, without start and end of text."""
        ids: list[int] = []
        for index, part in enumerate(self._split(text)):
            if index % 2:
                ids += self.ids[part]
            else:
                ids += tokenizer(part, add_special_tokens=False, verbose=False).input_ids
        return ids

    def _split(self, text: str) -> list[str]:
        """Text and words in turn, text first."""
        if not self.ids:
            return [text]
        names = "|".join(re.escape(word) for word in sorted(self.ids, key=len, reverse=True))
        return re.split(rf"(?<!\w)({names})(?!\w)", text)

    def holds(self, ids: Tensor, words: Iterable[str]) -> bool:
        """Whether one of these words is in a text of token ``ids``."""
        wanted = {number for word in words for number in self.ids[word]}
        return not wanted.isdisjoint(ids.flatten().tolist())

    def attach(self, encoder: ClipTextEncoder) -> None:
        """Let the embedding of a loaded ``encoder`` know the words, also those that are added later."""
        embedding: Any = encoder.text_model.embeddings.token_embedding
        of_vocabulary = embedding.forward

        def forward(ids: Tensor) -> Tensor:
            embedded = of_vocabulary(ids.clamp(max=self.vocabulary - 1))
            is_added = ids >= self.vocabulary
            if is_added.any():
                rows = torch.cat(list(self.vectors.values()))
                rows = to_device(rows, embedded.device, embedded.dtype)
                embedded[is_added] = rows[ids[is_added] - self.vocabulary]
            return embedded

        embedding.forward = forward

    @contextlib.contextmanager
    def replaced(self, vectors: Mapping[str, Tensor]) -> Iterator[None]:
        """While it is active, words have other vectors, of the same number."""
        own = self.vectors
        self.vectors = {**own, **vectors}
        try:
            yield
        finally:
            self.vectors = own
