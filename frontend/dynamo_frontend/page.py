"""The page at `/`: a playground, the mesh at a glance, the API's reference. All of it comes from the package."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse

_FOLDER = Path(__file__).resolve().parent / "page"
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
#: Nothing but what this server has, in no other page's frame.
_POLICY = "default-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"


def add_page(app: FastAPI) -> None:
    """Serve it."""
    for path in sorted(_FOLDER.iterdir()):
        if path.suffix in _TYPES:
            _add(app, "/" if path.name == "index.html" else f"/page/{path.name}", path)
    app.add_api_route("/docs", lambda: RedirectResponse("/#api"), methods=["GET", "HEAD"], include_in_schema=False)


def _add(app: FastAPI, url: str, path: Path) -> None:
    data = path.read_bytes()
    tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
    headers = {
        "etag": tag,
        "cache-control": "no-cache",  # asked for again, and answered with 304
        "content-security-policy": _POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers, media_type=f"{_TYPES[path.suffix]}; charset=utf-8")

    app.add_api_route(url, answer, methods=["GET", "HEAD"], include_in_schema=False)
