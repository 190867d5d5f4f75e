"""A real browser for tests: Chromium without a window, driven through chromedriver by the standard library alone.

chromedriver speaks W3C WebDriver, which is JSON over HTTP; the few calls that tests need are here.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = """
--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --hide-scrollbars --disable-dev-shm-usage --lang=en-US
""".split()
KEYS = {"Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
"""Keys by their DOM names, with the codes that Chromium wants beside them."""
DESKTOP, PHONE = (1280, 900), (390, 844)


def browser_program() -> tuple[str, str] | None:
    """Chromium and its driver; None when one of them is not installed."""
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    driver = shutil.which("chromedriver")
    return (chromium, driver) if chromium and driver else None


class Browser:
    """One Chromium with a fresh profile. Close it when done."""

    def __init__(self, profile: Path) -> None:
        programs = browser_program()
        assert programs is not None
        chromium, driver = programs
        self._driver = subprocess.Popen(
            [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._base = f"http://127.0.0.1:{self._port()}"
        options = {"binary": chromium, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        logging = {"browser": "ALL", "performance": "ALL"}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": logging}
        try:
            session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        except BaseException:
            self._end_driver()
            raise
        self._base += f"/session/{session}"

    def _port(self) -> int:
        assert self._driver.stdout is not None
        for line in self._driver.stdout:
            if "started successfully on port" in line:
                return int(line.strip().rstrip(".").rsplit(" ", 1)[1])
        raise RuntimeError("chromedriver did not start")

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data=data, method=method)
        # Its own opener: a proxy of the environment must not stand between a test and its browser.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from None

    def tool(self, command: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def look_like(self, size: tuple[int, int], dark: bool = False) -> None:
        """Take a screen of this size in CSS pixels (below 500 wide: a phone's touch screen) and a colour scheme."""
        phone = size[0] < 500
        self.tool(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=phone
        )
        self.tool("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tool("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, page: Path | str, fragment: str = "") -> None:
        """Load a file or an address; what the console and the network said before is forgotten."""
        self._call("POST", "/url", {"url": "about:blank"})
        self.console(), self.requests()
        address = page if isinstance(page, str) else page.resolve().as_uri()
        self._call("POST", "/url", {"url": address + fragment})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a JavaScript function body returns; ``arguments`` are its ``arguments``."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def wait_for(self, script: str) -> Any:
        """The value of a script as soon as it is true. Raises TimeoutError."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            if value := self.run(script):
                return value
            time.sleep(0.02)
        raise TimeoutError(script)

    def press(self, key: str) -> None:
        """One of KEYS."""
        for kind in ("keyDown", "keyUp"):
            self.tool("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=KEYS[key])

    def click(self, x: float, y: float) -> None:
        """A mouse click at a point of the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self.tool("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def point(self, x: float, y: float) -> None:
        """Move the mouse to a point of the window."""
        self.tool("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def console(self) -> list[str]:
        """Errors and warnings of the page since the last call."""
        entries = self._call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[str]:
        """Addresses that were requested since the last call, without images in the page and the browser's own."""
        messages = [
            json.loads(entry["message"])["message"] for entry in self._call("POST", "/se/log", {"type": "performance"})
        ]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [address for address in sent if not address.startswith(("data:", "about:", "chrome:"))]

    def screenshot(self, path: Path, whole_page: bool = False) -> None:
        """A PNG of the window, or of everything on the page."""
        shot: dict[str, Any] = {"format": "png"}
        if whole_page:
            size = self.run("const d = document.documentElement; return [d.clientWidth, d.scrollHeight]")
            clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
            shot.update(captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(self.tool("Page.captureScreenshot", **shot)["data"]))

    def close(self) -> None:
        """End Chromium and its driver."""
        try:
            self._call("DELETE", "")
        finally:
            self._end_driver()

    def _end_driver(self) -> None:
        self._driver.terminate()
        self._driver.wait(10)
        if self._driver.stdout is not None:
            self._driver.stdout.close()
