"""The preview of ``--interactive``: each image in a window until a key is pressed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.console import say
from library.image_window import close_windows, show_image, window_trouble

if TYPE_CHECKING:
    from PIL import Image

LONGEST_TITLE = 128
"""Characters of the prompt in a window's title."""


class Preview:
    """Shows images one after the other; where no window can be opened, it says so once and shows none."""

    def __init__(self, enabled: bool = True):
        self.enabled = enabled

    def show(self, image: Image.Image, prompt: str) -> None:
        """Show an image and wait for a key, or until its window is closed."""
        if not self.enabled:
            return
        trouble = window_trouble()
        if trouble is None and show_image(image, prompt[:LONGEST_TITLE] or "image") is not None:
            close_windows()
            return
        self.enabled = False
        say(f"no preview: {trouble or 'this OpenCV opens no windows'} (--no_preview leaves it out)")
