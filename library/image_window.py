"""Images in a window of OpenCV, on machines that have a display."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

POLLED = 100
"""Milliseconds after which it is looked whether the window is still there."""


def window_trouble() -> str | None:
    """Why no window can be opened, as far as that is known without trying."""
    # Without a display OpenCV's window library would end the process instead of raising.
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return "there is no display"
    try:
        import cv2  # noqa: F401
    except ImportError as error:
        return f"OpenCV cannot be imported ({error})"
    return None


def show_image(image: Image.Image, title: str) -> int | None:
    """Show an image until a key is pressed: its code, -1 when the window was closed, None when none can be opened."""
    if window_trouble() is not None:
        return None
    import cv2
    import numpy

    try:
        cv2.imshow(title, numpy.asarray(image.convert("RGB"))[:, :, ::-1])
        while True:
            key = cv2.waitKey(POLLED)
            if key >= 0:
                return key & 0xFF
            if cv2.getWindowProperty(title, cv2.WND_PROP_VISIBLE) < 1:  # closed by the mouse
                return -1
    except cv2.error:  # a build without windows
        return None


def close_windows() -> None:
    """Close every window that ``show_image`` opened."""
    import contextlib

    import cv2

    with contextlib.suppress(cv2.error):
        cv2.destroyAllWindows()
