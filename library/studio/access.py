"""Who may speak to the page: browsers that were given the token, from the page itself, under the address it has.

A page on this machine can be reached by every site that its user visits, so each request is looked at before anything
else: ``Host`` (a site whose name leads to 127.0.0.1), the cookie that only the token gives, ``Sec-Fetch-Site`` and
``Origin`` (another site's form or script), and a second token in every form (what a browser would send by itself is not
enough). Answers tell the browser to run only the page's own script, to load nothing from elsewhere and to let nobody
frame it.
"""

from __future__ import annotations

import hmac
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Request, Response
    from werkzeug.wrappers import Response as AnyResponse

FORM_TOKEN = "form-token"
"""The field with the second token."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
DOCUMENT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'self'"
)
"""Of HTML files that runs have written: shown in a frame of an origin of their own, with no way to anything."""


class Access:
    """The two tokens, and the port that the page is served at."""

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self.token = secrets.token_urlsafe(32)
        """In the address that is printed."""
        self.session = secrets.token_urlsafe(32)
        """In the cookie of a browser that has shown the token."""
        self.form_token = secrets.token_urlsafe(32)

    @property
    def address(self) -> str:
        """The address that opens the page."""
        return f"http://127.0.0.1:{self.port}/?token={self.token}"

    @property
    def cookie(self) -> str:
        """Name of the cookie: browsers send those of all ports of an address to each of them."""
        return f"studio-{self.port}"

    def opens(self, token: str) -> bool:
        """Whether this is the token."""
        return _same(token, self.token)

    def refusal(self, request: Request) -> str | None:
        """Why a request is refused, in a sentence; None when it is not. The cookie is looked at by ``knows``."""
        host = request.headers.get("Host", "")
        if host not in (f"127.0.0.1:{self.port}", f"localhost:{self.port}"):
            return "This page is served at 127.0.0.1 only."
        site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
        reads = request.method in ("GET", "HEAD")
        own = f"http://{host}"
        if site not in (None, "same-origin", "none" if reads else "same-origin"):
            return "Requests of other pages are refused."
        # With "Referrer-Policy: no-referrer" a browser sends "null" for the page's own forms.
        if origin is not None and origin != own and not (origin == "null" and site == "same-origin"):
            return "Requests of other pages are refused."
        if reads:
            return None
        if site is None and origin is None:
            return "A request that changes something must say which page it comes from."
        given = request.headers.get("X-Form-Token") or request.form.get(FORM_TOKEN, "")
        return (
            None if _same(given, self.form_token) else "The form is of an earlier start of the studio: load it again."
        )

    def knows(self, request: Request) -> bool:
        """Whether the browser has shown the token before."""
        return _same(request.cookies.get(self.cookie, ""), self.session)

    def give_cookie(self, response: AnyResponse) -> None:
        """Let the browser be known from now on."""
        response.set_cookie(self.cookie, self.session, httponly=True, samesite="Strict", path="/")


def protect(response: Response) -> Response:
    """Set the headers that every answer has."""
    headers = response.headers
    headers.setdefault("Content-Security-Policy", POLICY)
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Referrer-Policy"] = "no-referrer"
    headers["Cross-Origin-Opener-Policy"] = "same-origin"
    headers["Cross-Origin-Resource-Policy"] = "same-origin"
    headers.setdefault("Cache-Control", "no-store")
    return response


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode())
