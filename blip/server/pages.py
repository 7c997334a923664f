"""What browsers see: a page to try the predictor at /, and the API's documentation; all of it from this server."""

import re
from base64 import b64encode
from collections.abc import Awaitable, Callable, Mapping
from hashlib import sha256
from importlib import resources
from pathlib import Path

from fastapi import FastAPI
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from blip.server import extending
from blip.server.answers import send_in_pieces

PAGE = Path(__file__).with_name("page.html")
#: What the page may do: run what is in it, show pictures of its own, ask this server (w3.org/TR/CSP3).
PAGE_POLICY = {
    "default-src": "'none'",
    "img-src": "blob: data:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "parse",
}
#: As much for Swagger UI and ReDoc, which make styles and workers as they run.
DOCUMENTS_POLICY = {
    "default-src": "'self'",
    "style-src": "'self' 'unsafe-inline'",
    "img-src": "'self' data:",
    "worker-src": "blob:",
    "base-uri": "'none'",
    "frame-ancestors": "'none'",
}
#: What the documentation is made of, all in the package fastapi-offline.
ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "redoc.standalone.js": "text/javascript",
    "favicon.png": "image/png",
}


class Content(Response):
    """Bytes, sent in pieces, so that a client that does not read makes the server hold little."""

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_in_pieces(self, [self.body], send)


class HtmlRoute(Route):
    """A route for those that ask for HTML, as browsers do; for others it is not there."""

    @override
    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)  # of the path: most requests are for another
        if match is Match.NONE or wants_html(", ".join(Headers(scope=scope).getlist("accept"))):
            return match, child
        return Match.NONE, {}


def wants_html(accept: str) -> bool:
    """Whether a client names HTML in its Accept, and likes it no less than JSON (RFC 9110, 12.5.1)."""
    weights = {"text/html": 0.0, "application/json": 0.0}
    for part in accept.split(","):
        kind, options = parse_options_header(part)
        try:
            weights[kind.decode()] = float(options.get(b"q", b"1"))
        except ValueError:
            continue
    return weights["text/html"] > 0 and weights["text/html"] >= weights["application/json"]


def add_page(app: FastAPI) -> None:
    """Answer browsers with the page at /; everyone else gets what Cog answers there."""
    page = _html(PAGE.read_text(encoding="utf-8"), PAGE_POLICY, Vary="Accept")
    app.router.routes.insert(0, HtmlRoute("/", _always(page), include_in_schema=False))


def serve_documents(app: FastAPI) -> None:
    """Have /docs and /redoc load nothing from other hosts, as FastAPI's do.

    Raises:
        UnknownCogError: one of them is missing.
    """
    title = "BLIP: the API"
    swagger = get_swagger_ui_html(
        openapi_url="openapi.json",
        title=title,
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="docs/favicon.png",
    )
    redoc = get_redoc_html(
        openapi_url="openapi.json",
        title=title,
        redoc_js_url="docs/redoc.standalone.js",
        redoc_favicon_url="docs/favicon.png",
        with_google_fonts=False,
    )
    for path, document in {"/docs": swagger, "/redoc": redoc}.items():
        app.router.routes.remove(extending.document(app, path))
        app.router.add_route(path, _always(_html(bytes(document.body).decode(), DOCUMENTS_POLICY)))
    folder = resources.files("fastapi_offline") / "static"
    for name, kind in ASSETS.items():
        asset = Content((folder / name).read_bytes(), media_type=kind, headers={"Cache-Control": "max-age=86400"})
        app.router.add_route(f"/docs/{name}", _always(asset))


def _always(response: Response) -> Callable[[Request], Awaitable[Response]]:
    async def answer(_: Request) -> Response:
        return response

    return answer


def _html(text: str, policy: Mapping[str, str], **more: str) -> Response:
    """A page that may do what `policy` says, and run the scripts and use the styles in it; `more` are headers."""
    directives = dict(policy)
    for kind in ("script", "style"):
        allowed = directives.get(f"{kind}-src", policy["default-src"].replace("'none'", ""))
        if "'unsafe-inline'" not in allowed:
            directives[f"{kind}-src"] = f"{allowed} {_hashes(text, kind)}".strip()
    headers = {
        "Content-Security-Policy": "; ".join(map(" ".join, directives.items())),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
        **more,
    }
    return Content(text, media_type="text/html", headers=headers)


def _hashes(text: str, kind: str) -> str:
    """The hashes of what stands in the elements of a kind, as a Content-Security-Policy names them."""
    inline = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
    return " ".join(f"'sha256-{b64encode(sha256(code.encode()).digest()).decode()}'" for code in inline)
