"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}` with the right status."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from dynamo_grpc import (
    ContextLengthError,
    InvalidRequestError,
    MeshError,
    ModelNotFoundError,
    OverloadedError,
    RequestCancelledError,
    TooLargeError,
    UnsupportedError,
)
from dynamo_grpc.status import from_exception

#: A part of a place that is a field's name; pydantic adds the types of unions.
_FIELD = re.compile(r"(?!(str|int|float|bool)$)[a-z_][a-z0-9_]*")

_CODES: dict[type[MeshError], str] = {
    ContextLengthError: "context_length_exceeded",
    ModelNotFoundError: "model_not_found",
    UnsupportedError: "unsupported_value",
    OverloadedError: "overloaded",
    TooLargeError: "request_too_large",
}


def to_mesh_error(error: BaseException) -> tuple[MeshError, bool]:
    """What an exception means to the client, and whether it was unexpected."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or _FIELD.fullmatch(part))
        return InvalidRequestError(f"{where}: {first['msg']}" if where else first["msg"], param=where), False
    if isinstance(error, MeshError):
        return error, False
    if isinstance(error, ClientDisconnect):
        return RequestCancelledError("the client went away while it was sending"), False
    told, _ = from_exception(RuntimeError()) if isinstance(error, (ValueError, TypeError)) else from_exception(error)
    return told, True


def body(error: MeshError, request_id: str) -> bytes:
    """The error as JSON."""
    kind = "invalid_request_error"
    if error.http_status >= 500:
        kind = "service_unavailable" if error.http_status in (503, 529) else "server_error"
    elif error.http_status == 429:
        kind = "rate_limit_error"
    content: dict[str, Any] = {
        "message": error.message,
        "type": kind,
        "param": error.param or None,
        "code": _CODES.get(type(error), error.reason.lower() if error.http_status >= 500 else None),
        "request_id": request_id,
    }
    return orjson.dumps({"error": content})


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a client expects its errors.

    Attributes:
        body: the error as JSON.
        event: what stands before it in a stream.
        event_body: the error in a stream, if that is another one; by the event's number.
        id_header: the header that has the request's id, beside x-request-id.
    """

    body: Callable[[MeshError, str], bytes]
    event: bytes = b""
    id_header: str = ""
    event_body: Callable[[MeshError, str, int], bytes] | None = None


def responses_event(error: MeshError, request_id: str, number: int) -> bytes:
    """The error as an event of the Responses API, with the envelope that OpenAI's clients look for in any stream."""
    whole = orjson.loads(body(error, request_id))
    told = whole["error"]
    event = {"type": "error", "code": told["code"] or told["type"], "message": told["message"], "param": told["param"]}
    return orjson.dumps({**event, "sequence_number": number, **whole})


OPENAI = Dialect(body)
RESPONSES = Dialect(body, b"event: error\n", event_body=responses_event)


def headers(error: MeshError) -> list[tuple[bytes, bytes]]:
    """When to come back, if that is known."""
    if error.retry_after_s is None:
        return [(b"retry-after", b"1")] if isinstance(error, OverloadedError) else []
    return [(b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode())]
