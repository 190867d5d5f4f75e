"""Self-contained pages: data goes in and comes back as it was, and nothing in it can become HTML."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from functools import cache
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.html_pages import TEMPLATES, embedded_image, link_from, read_page_data, render_page

PAGES = ("report.html", "contact_sheet.html", "image_report.html", "queue.html")
TEXTS = st.text() | st.sampled_from(
    ["</script><script>alert(1)</script>", "<!--<script>", "{{data}}", "{{policy}}", "a&b\u2028"]
)


class Elements(HTMLParser):
    """The elements that a browser would see."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@cache
def elements_without_data(template):
    return Elements(render_page(template, "", {"texts": []})).found


@pytest.mark.parametrize("template", PAGES)
@given(title=TEXTS, texts=st.lists(TEXTS))
def test_data_comes_back_and_adds_no_element(template, tmp_path_factory, title, texts):
    path = tmp_path_factory.getbasetemp() / template
    path.write_text(render_page(template, title, {"texts": texts}), encoding="utf-8", newline="")
    assert read_page_data(path) == {"texts": texts}
    plain = elements_without_data(template)
    found = Elements(path.read_text(encoding="utf-8")).found
    assert [tag for tag, _ in found] == [tag for tag, _ in plain]
    assert found == plain


@pytest.mark.parametrize("template", PAGES)
def test_nothing_is_loaded_from_elsewhere_and_only_own_scripts_run(template):
    page = render_page(template, "t", {})
    assert "{{" not in page.replace("{{", "", 0) or re.search(r"\{\{[\w.]+\}\}", page) is None
    for _, attributes in Elements(page).found:
        for name in ("src", "href", "action", "data", "srcset"):
            assert not re.match(r"(?i)\s*(https?:)?//", attributes.get(name) or "")
    assert not re.search(r"(?i)@import|url\(|fetch\(|XMLHttpRequest|importScripts", page)
    policy = next(a["content"] for _, a in Elements(page).found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    for script in re.findall(r"<script>(.*?)</script>", page, re.DOTALL):
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy


def test_every_template_file_is_used_and_ascii():
    used = "".join((TEMPLATES / page).read_text(encoding="utf-8") for page in PAGES)
    for path in TEMPLATES.iterdir():
        assert path.name in PAGES or f"{{{{{path.name}}}}}" in used
        assert path.read_text(encoding="utf-8").isascii()


def test_numbers_that_json_has_not_are_refused():
    with pytest.raises(ValueError, match="JSON"):
        render_page("report.html", "t", {"loss": float("nan")})


@pytest.mark.parametrize("text", ["", "<p>no data</p>", '<script type="application/json" id="data">{"a"</script>'])
def test_another_file_is_no_page(tmp_path, text):
    path = tmp_path / "page.html"
    assert read_page_data(path) is None
    path.write_text(text, encoding="utf-8")
    assert read_page_data(path) is None
    path.write_bytes(b"\xff\xfe")
    assert read_page_data(path) is None


@pytest.mark.parametrize(
    ("mode", "size"), [("RGB", (800, 400)), ("RGBA", (30, 60)), ("L", (100, 100)), ("P", (90, 10))]
)
def test_an_embedded_image_is_small_and_keeps_its_shape(mode, size):
    address = embedded_image(Image.new(mode, size), 200)
    with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as image:
        assert max(image.size) == min(200, max(size))
        assert image.width / image.height == pytest.approx(size[0] / size[1], rel=0.1)
    assert address.startswith(("data:image/webp;base64,", "data:image/jpeg;base64,"))


def test_links_are_relative_addresses(tmp_path):
    assert link_from(tmp_path / "a.html", tmp_path / "sample" / "100%, 50#.png") == "sample/100%25%2C%2050%23.png"
    assert link_from(tmp_path / "out" / "a.html", tmp_path / "b.png") == "../b.png"


def test_data_is_compact_json():
    page = render_page("report.html", "t", {"a": [1, 2.5, None]})
    assert '{"a":[1,2.5,null]}' in page and json.loads('{"a":[1,2.5,null]}')
