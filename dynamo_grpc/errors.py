"""All errors of the mesh: one tree, one table, and their form on the wire.

Each class says who must act, its gRPC code, its HTTP status and whether a retry may help. On the wire an error is the
status of its call with `google.rpc` details; `ErrorInfo.reason` names the class, because a gRPC code alone can't tell
"draining" from "lost" from "nobody there". This module knows no servers and no HTTP library.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import ClassVar

import grpc


class Retry(enum.Enum):
    """Whether trying again may help."""

    NEVER = "never"
    ELSEWHERE = "another instance"
    LATER = "after a back-off"
    MIGRATE = "another instance, also after the first output"


class Actor(enum.Enum):
    """Who has to do something about it."""

    CLIENT = "client"
    AUTHOR = "worker author"
    OPERATOR = "operator"
    NOBODY = "nobody"


class MeshError(Exception):
    """Base of all errors of the mesh.

    Attributes:
        message: one sentence that says what is wrong and, where it can, what to do.
        param: name of the field that is wrong, if one is.
        retry_after_s: seconds after which a retry may succeed, if known.
        error_id: finds the error in the worker's log, for errors whose cause isn't told.
    """

    reason: ClassVar[str] = "INTERNAL"
    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    http_status: int = 500
    retry: ClassVar[Retry] = Retry.NEVER
    actor: ClassVar[Actor] = Actor.AUTHOR

    def __init__(
        self, message: str, *, param: str = "", retry_after_s: float | None = None, error_id: str = ""
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.error_id = error_id

    def say_more(self, text: str) -> None:
        """Add to the message."""
        self.message = f"{self.message}; {text}"
        self.args = (self.message,)


class InternalError(MeshError):
    """Something broke that nobody expected; the cause is in the log under `error_id`."""


class HandlerOutputError(MeshError):
    """A handler yielded something that it may not yield."""

    reason = "HANDLER_OUTPUT"


class HandlerEndedError(MeshError):
    """A stream ended without saying how: outputs were lost or doubled, or there was no finish."""

    reason = "STREAM_INCOMPLETE"
    retry = Retry.MIGRATE


class InvalidRequestError(MeshError, ValueError):
    """The request is wrong; it will be wrong everywhere."""

    reason = "INVALID_REQUEST"
    code = grpc.StatusCode.INVALID_ARGUMENT
    http_status = 400
    actor = Actor.CLIENT


class InvalidNameError(InvalidRequestError):
    """A name of a namespace, component or endpoint can't be one."""

    reason = "INVALID_NAME"


class ContextLengthError(InvalidRequestError):
    """Prompt and answer don't fit into the model's context."""

    reason = "CONTEXT_LENGTH_EXCEEDED"


class UnsupportedError(MeshError):
    """The worker can't do what the request asks for."""

    reason = "UNSUPPORTED"
    code = grpc.StatusCode.UNIMPLEMENTED
    http_status = 400
    actor = Actor.CLIENT


class ModelNotFoundError(MeshError):
    """No such model."""

    reason = "MODEL_NOT_FOUND"
    code = grpc.StatusCode.NOT_FOUND
    http_status = 404
    actor = Actor.CLIENT


class EndpointNotFoundError(MeshError):
    """No such endpoint."""

    reason = "ENDPOINT_NOT_FOUND"
    code = grpc.StatusCode.NOT_FOUND
    http_status = 404
    actor = Actor.CLIENT


class FileNotKnownError(MeshError):
    """A model card names no file with this hash."""

    reason = "FILE_NOT_FOUND"
    code = grpc.StatusCode.NOT_FOUND
    http_status = 404
    actor = Actor.CLIENT


class CardMismatchError(MeshError):
    """The worker's model card is not the one that the request was prepared with, or not the one that holds."""

    reason = "CARD_MISMATCH"
    code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 412
    retry = Retry.ELSEWHERE
    actor = Actor.OPERATOR


class TooLargeError(MeshError):
    """The request is larger than the limit."""

    reason = "TOO_LARGE"
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 413
    actor = Actor.CLIENT


class OverloadedError(MeshError):
    """There is no room now; `retry_after_s` says when there may be."""

    reason = "OVERLOADED"
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 503
    retry = Retry.LATER
    actor = Actor.CLIENT


class SlowReaderError(MeshError):
    """The client doesn't read its answer: what is kept for it has a limit."""

    reason = "SLOW_READER"
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 408
    actor = Actor.CLIENT


class NoInstancesError(MeshError):
    """Nobody serves the endpoint now."""

    reason = "NO_INSTANCES"
    code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    retry = Retry.LATER
    actor = Actor.OPERATOR


class DrainingError(MeshError):
    """The worker takes no new requests."""

    reason = "DRAINING"
    code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    retry = Retry.ELSEWHERE
    actor = Actor.NOBODY


class NotReadyError(MeshError):
    """The worker is still starting."""

    reason = "NOT_READY"
    code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    retry = Retry.ELSEWHERE
    actor = Actor.NOBODY


class WrongInstanceError(MeshError):
    """Another process answers at the address: the instance that was meant is gone."""

    reason = "WRONG_INSTANCE"
    code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    retry = Retry.ELSEWHERE
    actor = Actor.NOBODY


class InstanceLostError(MeshError):
    """The worker, or the connection to it, broke."""

    reason = "INSTANCE_LOST"
    code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    retry = Retry.MIGRATE
    actor = Actor.OPERATOR


class ResponseTimeoutError(MeshError):
    """The worker gave no output for longer than it may, though its connection stands: its handler is stuck."""

    reason = "RESPONSE_TIMEOUT"
    code = grpc.StatusCode.UNAVAILABLE
    http_status = 504
    retry = Retry.MIGRATE
    actor = Actor.AUTHOR


class EngineShutdown(MeshError):  # noqa: N818 - the name that handlers written for Dynamo raise
    """Raised by a handler: this worker is going away, take the request elsewhere."""

    reason = "ENGINE_SHUTDOWN"
    code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    retry = Retry.MIGRATE
    actor = Actor.NOBODY

    def __init__(self, message: str = "the engine is shutting down", **kwargs: object) -> None:
        super().__init__(message, **kwargs)  # type: ignore[arg-type]


class RequestCancelledError(MeshError):
    """The request was cancelled, by its client or by its handler; it is never tried again."""

    reason = "CANCELLED"
    code = grpc.StatusCode.CANCELLED
    http_status = 499
    actor = Actor.CLIENT


class DeadlineError(MeshError):
    """The request's time is over."""

    reason = "DEADLINE_EXCEEDED"
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    http_status = 504
    actor = Actor.CLIENT


class ConfigurationError(MeshError):
    """A setting is wrong; said at start, never on the wire."""

    reason = "CONFIGURATION"
    actor = Actor.OPERATOR


class RegistryError(MeshError):
    """The registry refused, or can't be reached."""

    reason = "REGISTRY"
    code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    retry = Retry.LATER
    actor = Actor.OPERATOR


class _HttpErrorMisuse(ValueError):  # noqa: N818
    """A class of its own: the mistake is the handler's, not the client's as with a plain ValueError."""


class HttpError(MeshError):
    """Raised by a handler to end a request with an HTTP status of its choice.

    Args:
        code: HTTP status, 400 to 599.
        message: shown to the client; cut at 8192 characters as in Dynamo (and at 1200 bytes on the wire).

    Raises:
        ValueError: code is no int in range, or message no str.
    """

    reason = "HTTP"
    actor = Actor.CLIENT

    def __init__(self, code: int, message: str) -> None:
        if isinstance(code, bool) or not isinstance(code, int) or not 400 <= code <= 599:
            raise _HttpErrorMisuse(f"HttpError takes a status from 400 to 599, not {code!r}")
        if not isinstance(message, str):
            raise _HttpErrorMisuse(f"HttpError takes a str as message, not {message!r}")
        super().__init__(message[:8192])
        self.http_status = code


def names(items: Sequence[str], limit: int = 10) -> str:
    """A list of names for a message: quoted, cut after `limit`, "none" when empty."""
    shown = ", ".join(repr(item) for item in items[:limit])
    return (shown + (f" and {len(items) - limit} more" if len(items) > limit else "")) or "none"
