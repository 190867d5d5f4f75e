"""Caches of latents and of text encoder outputs: one pass through the encoder, then none.

In memory, or in ``.npz`` files beside the images under the names and keys of kohya-ss/sd-scripts. A family names its
format and gives its encode function. Each entry carries what it was made from (image, caption, encoder, options); an
entry that no longer matches, or is damaged, is rebuilt; one of another program, without that mark, is taken if its
arrays fit. Entries are written as they are made, each file in one step, so an interrupted run continues where it was.
"""

from __future__ import annotations

from library.data.cache_entries import CacheReport
from library.data.latent_cache import LatentCache, LatentFormat, check_latents_cacheable
from library.data.text_cache import TextCache, TextFormat, check_text_cacheable

__all__ = [
    "CacheReport",
    "LatentCache",
    "LatentFormat",
    "TextCache",
    "TextFormat",
    "check_latents_cacheable",
    "check_text_cacheable",
]
