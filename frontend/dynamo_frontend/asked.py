"""What a request's headers ask for: its id, its time-out, its instance."""

from __future__ import annotations

import random
import re

from fastapi import Request

from dynamo_grpc import InvalidRequestError

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m)?")
_LONGEST_S = 24 * 3600.0
_ID = re.compile(r"[ -~]{1,200}")


def request_id_of(request: Request) -> str:
    """The client's id, or one of ours; the same for the whole request."""
    if not hasattr(request.state, "request_id"):
        given = request.headers.get("x-request-id", "")
        request.state.request_id = given if _ID.fullmatch(given) else f"{random.getrandbits(128):032x}"
    return str(request.state.request_id)


def timeout_of(request: Request) -> float | None:
    """The client's time-out: seconds, or with a unit (500ms, 30s, 2m).

    Raises:
        InvalidRequestError: it is no duration above 0.
    """
    text = request.headers.get("x-request-timeout")
    if text is None:
        return None
    match = _DURATION.fullmatch(text.strip())
    seconds = float(match[1]) * {"ms": 0.001, "s": 1.0, "m": 60.0}[match[2] or "s"] if match else 0.0
    if not 0 < seconds <= _LONGEST_S:
        raise InvalidRequestError(f"x-request-timeout is {text!r}: give seconds (at most a day), or 500ms, 30s, 2m")
    return seconds


def instance_of(request: Request) -> int | None:
    """The instance that the client wants, by its id as /health shows it."""
    text = request.headers.get("x-worker-instance-id")
    if text is None:
        return None
    try:
        return int(text, 16)
    except ValueError:
        raise InvalidRequestError(
            f"x-worker-instance-id is {text!r}: give the hexadecimal id that /health shows"
        ) from None
