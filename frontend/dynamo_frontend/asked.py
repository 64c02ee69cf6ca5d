"""What a request's headers ask for: its id, its time-out, its instance."""

from __future__ import annotations

import random
import re

from fastapi import Request

from dynamo_grpc import InvalidRequestError

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m)?")
_LONGEST_ID = 18  # hexadecimal digits of 64 bits, and 0x
_LONGEST_S = 24 * 3600.0
_HEADERS = "dynamo_frontend.headers"  # in the ASGI scope
_ID = re.compile(r"[!-~]{1,200}")  # no spaces: it stands in lines of logs


def headers_of(request: Request) -> dict[str, str]:
    """The request's headers, read once: looking one up in Starlette's reads them all."""
    scope = request.scope
    if _HEADERS not in scope:
        scope[_HEADERS] = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    headers: dict[str, str] = scope[_HEADERS]
    return headers


def request_id_of(request: Request) -> str:
    """The client's id, or one of ours; the same for the whole request."""
    headers = headers_of(request)
    if not _ID.fullmatch(headers.get("x-request-id", "")):
        headers["x-request-id"] = f"{random.getrandbits(128):032x}"
    return headers["x-request-id"]


def timeout_of(request: Request) -> float | None:
    """The client's time-out: seconds, or with a unit (500ms, 30s, 2m).

    Raises:
        InvalidRequestError: it is no duration above 0.
    """
    text = headers_of(request).get("x-request-timeout")
    if text is None:
        return None
    match = _DURATION.fullmatch(text.strip())
    seconds = float(match[1]) * {"ms": 0.001, "s": 1.0, "m": 60.0}[match[2] or "s"] if match else 0.0
    if not 0 < seconds <= _LONGEST_S:
        raise InvalidRequestError(f"x-request-timeout is {text!r}: give seconds (at most a day), or 500ms, 30s, 2m")
    return seconds


def instance_of(request: Request) -> int | None:
    """The instance that the client wants, by its id as /health shows it."""
    text = headers_of(request).get("x-worker-instance-id")
    if text is None:
        return None
    try:
        if len(text) > _LONGEST_ID:
            raise ValueError
        return int(text, 16)
    except ValueError:
        raise InvalidRequestError(
            f"x-worker-instance-id is {text!r}: give the hexadecimal id that /health shows"
        ) from None
