"""Self-contained HTML pages: a template from ``library/page_templates/``, filled with data as JSON.

A page needs no server and no network: styles, scripts and images are inside. The page's script builds what is shown
from the JSON with text nodes, so that no prompt, caption or file name is ever read as HTML; beside that the page's
Content-Security-Policy allows only the scripts and styles that this module put there.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from PIL import Image

TEMPLATES = Path(__file__).parent / "page_templates"
SLOT = re.compile(r"\{\{([\w.]+)\}\}")
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def render_page(template: str, title: str, data: Any) -> str:
    """The page of ``template`` (``report.html``) with ``data``, which must be JSON without NaN.

    A slot ``{{name.css}}``, ``{{name.js}}`` or ``{{name.html}}`` is filled with that file; ``{{title}}``, ``{{data}}``
    and ``{{policy}}`` with what they say. Raises ValueError for data that is no JSON.
    """
    document = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":  # so that no text of the data can end the script element
        document = document.replace(character, f"\\u{ord(character):04x}")
    values = {"title": html.escape(title), "data": document, "policy": "{{policy}}"}
    page = SLOT.sub(lambda slot: _filled(slot[1], values), _template(template))
    return page.replace("{{policy}}", _policy(page), 1)  # stands in the head, before any text of the data


def _filled(name: str, values: dict[str, str]) -> str:
    return values[name] if name in values else _template(name).strip("\n")


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _policy(page: str) -> str:
    """A Content-Security-Policy that allows the page's own scripts and styles by their hashes, and images."""
    allowed = {
        element: " ".join(
            "'sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode() + "'"
            for text in re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        )
        for element in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; "
        "img-src 'self' data: file:; base-uri 'none'; form-action 'none'"
    )


def read_page_data(path: Path) -> Any:
    """The data of a page that ``render_page`` made; None when there is no such page or it cannot be read."""
    try:
        found = DATA.search(path.read_text(encoding="utf-8"))
        return None if found is None else json.loads(found[1])
    except (OSError, ValueError):
        return None


def embedded_image(image: Image.Image, longest_side: int, quality: int = 80) -> str:
    """The image as a ``data:`` address (WebP, or JPEG without WebP), shrunk to at most ``longest_side`` pixels."""
    from PIL import features

    small = image.convert("RGB")
    small.thumbnail((longest_side, longest_side))
    kind = "webp" if features.check("webp") else "jpeg"
    buffer = io.BytesIO()
    small.save(buffer, format=kind.upper(), quality=quality)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def link_from(page: Path, target: Path) -> str:
    """The address of a file as seen from a page: relative where both are on one drive."""
    try:
        return quote(Path(os.path.relpath(target, page.parent)).as_posix())
    except ValueError:  # another drive of Windows
        return target.resolve().as_uri()
