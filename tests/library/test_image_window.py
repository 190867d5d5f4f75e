"""Images in a window, by a stand-in for OpenCV: this machine has no display."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from library.generation.preview import Preview
from library.image_window import close_windows, show_image

IMAGE = Image.new("RGBA", (4, 2), (1, 2, 3, 255))


class Error(Exception):
    """As cv2.error."""


def opencv(keys: list[int], visible: int = 1, works: bool = True) -> SimpleNamespace:
    """An OpenCV whose user presses these keys; -1 is none."""
    shown: list[tuple[str, tuple[int, ...], list[int]]] = []

    def imshow(title: str, pixels) -> None:
        if not works:
            raise Error("The function is not implemented")
        shown.append((title, pixels.shape, pixels[0, 0].tolist()))

    return SimpleNamespace(
        error=Error,
        imshow=imshow,
        waitKey=lambda milliseconds: keys.pop(0),
        getWindowProperty=lambda title, what: visible,
        WND_PROP_VISIBLE=4,
        destroyAllWindows=lambda: shown.append(("closed", (), [])),
        shown=shown,
    )


@pytest.fixture
def display(monkeypatch):
    """A display and this OpenCV."""

    def use(module: object) -> None:
        monkeypatch.setenv("DISPLAY", ":0")
        monkeypatch.setitem(sys.modules, "cv2", module)

    return use


def test_the_key_that_is_pressed_after_a_while(display):
    cv2 = opencv([-1, -1, 256 + 27])
    display(cv2)
    assert show_image(IMAGE, "cat") == 27
    close_windows()
    assert cv2.shown == [("cat", (2, 4, 3), [3, 2, 1]), ("closed", (), [])], "blue comes first"


def test_a_window_that_is_closed_by_the_mouse_does_not_wait_for_ever(display):
    display(opencv([-1], visible=0))
    assert show_image(IMAGE, "cat") == -1


@pytest.mark.parametrize("title, shown", [("x" * 200, "x" * 128), ("", "image")])
def test_the_preview_is_named_by_the_prompt(display, title, shown):
    cv2 = opencv([13])
    display(cv2)
    Preview().show(IMAGE, title)
    assert [entry[0] for entry in cv2.shown] == [shown, "closed"]


@pytest.mark.parametrize("module, reason", [(None, "OpenCV cannot be imported"), ("headless", "opens no windows")])
def test_without_windows_one_line_is_said_and_the_session_goes_on(display, caplog, module, reason):
    caplog.set_level("INFO")
    display(opencv([], works=False) if module else None)
    preview = Preview()
    preview.show(IMAGE, "a")
    preview.show(IMAGE, "b")
    assert caplog.text.count("no preview") == 1 and reason in caplog.text and "--no_preview" in caplog.text


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="displays are named by the environment on Linux")
def test_without_a_display_opencv_is_not_called(monkeypatch, caplog):
    caplog.set_level("INFO")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    cv2 = opencv([])
    monkeypatch.setitem(sys.modules, "cv2", cv2)
    Preview().show(IMAGE, "a")
    assert cv2.shown == [] and "there is no display" in caplog.text


def test_no_preview_shows_nothing(display):
    cv2 = opencv([])
    display(cv2)
    Preview(enabled=False).show(IMAGE, "a")
    assert cv2.shown == []
