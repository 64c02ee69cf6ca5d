"""Errors on the wire and back: the status of a call, with `google.rpc` details.

`ErrorInfo.reason` names the class, because a gRPC code alone can't tell "draining" from "lost" from "nobody there".
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from typing import Any, NoReturn

import grpc
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2

from dynamo_grpc.errors import (
    CardMismatchError,
    DeadlineError,
    EndpointNotFoundError,
    EngineShutdown,
    HandlerOutputError,
    HttpError,
    InstanceLostError,
    InternalError,
    InvalidRequestError,
    MeshError,
    OverloadedError,
    RequestCancelledError,
    TooLargeError,
    UnsupportedError,
)

logger = logging.getLogger(__name__)

DOMAIN = "dynamo-grpc"
DETAILS_KEY = "grpc-status-details-bin"
# A trailer over 8 KiB loses the whole status. The text is in it three times: percent-encoded (up to three bytes for
# one), and in the details as message and as description of a field, in base64.
_MAX_TEXT_BYTES = 1200


_HTTP_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ABORTED,
    412: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


def _tree(cls: type[MeshError]) -> list[type[MeshError]]:
    return [cls, *(sub for child in cls.__subclasses__() for sub in _tree(child))]


#: Every class by its reason on the wire.
BY_REASON: dict[str, type[MeshError]] = {c.reason: c for c in reversed(_tree(MeshError)[1:])}
BY_REASON["INTERNAL"] = InternalError

_BY_CODE: dict[grpc.StatusCode, type[MeshError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: EndpointNotFoundError,
    grpc.StatusCode.FAILED_PRECONDITION: CardMismatchError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: InstanceLostError,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedError,
    grpc.StatusCode.CANCELLED: RequestCancelledError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
}


def status_code(error: MeshError) -> grpc.StatusCode:
    """The gRPC code of an error."""
    if isinstance(error, HttpError):
        by_class = grpc.StatusCode.INTERNAL if error.http_status >= 500 else grpc.StatusCode.INVALID_ARGUMENT
        return _HTTP_CODES.get(error.http_status, by_class)
    return error.code


def wire_text(text: str, max_bytes: int = _MAX_TEXT_BYTES) -> str:
    """Text as it fits into a status: valid UTF-8, cut by its bytes."""
    return text.encode("utf-8", "replace")[:max_bytes].decode("utf-8", "ignore")


def status_details(error: MeshError) -> bytes:
    """The error as a serialized `google.rpc.Status`, for the trailer `grpc-status-details-bin`."""
    status = status_pb2.Status(code=status_code(error).value[0], message=wire_text(error.message))
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    if isinstance(error, HttpError):
        info.metadata["http_status"] = str(error.http_status)
    if error.error_id:
        info.metadata["error_id"] = error.error_id
    status.details.add().Pack(info)
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.param:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=wire_text(error.param, 200), description=wire_text(error.message)
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    return bytes(status.SerializeToString())


async def abort(call: Any, error: MeshError, trailers: Sequence[tuple[str, str | bytes]] = ()) -> NoReturn:
    """End a call of grpc.aio with an error and its details."""
    metadata = ((DETAILS_KEY, status_details(error)), *trailers)
    await call.abort(status_code(error), wire_text(error.message), trailing_metadata=metadata)
    raise AssertionError("abort raises")


def from_status(code: grpc.StatusCode, message: str, details: bytes | None) -> MeshError:
    """The error that a call's status stands for.

    Statuses of other servers, without our details, are told apart by their code alone.
    """
    info, retry_after_s, param = error_details_pb2.ErrorInfo(), None, ""
    if details:
        status = status_pb2.Status.FromString(details)
        for detail in status.details:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                detail.Unpack(info)
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                retry = error_details_pb2.RetryInfo()
                detail.Unpack(retry)
                retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
            elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                bad = error_details_pb2.BadRequest()
                detail.Unpack(bad)
                param = bad.field_violations[0].field if bad.field_violations else ""
    if info.domain == DOMAIN and info.reason == HttpError.reason:
        return HttpError(int(info.metadata["http_status"]), message)
    cls = BY_REASON.get(info.reason) if info.domain == DOMAIN else None
    if cls is None and code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:
        # which way it was going: the same words are used for both
        is_answer = message.startswith(("SERVER: Sent", "CLIENT: Received"))
        cls = HandlerOutputError if is_answer else TooLargeError
    cls = cls or _BY_CODE.get(code, InternalError)
    if cls is InternalError and not info.reason:  # a plain servicer's exception: its text is not for clients
        error_id = uuid.uuid4().hex[:12]
        logger.error("a worker failed: %s: %s", code.name, message, extra={"error_id": error_id})
        return InternalError(f"internal error (error id {error_id})", error_id=error_id)
    return cls(message, param=param, retry_after_s=retry_after_s, error_id=info.metadata.get("error_id", ""))


def from_rpc_error(error: grpc.aio.AioRpcError) -> MeshError:
    """The error that a failed call of grpc.aio stands for."""
    trailers = error.trailing_metadata() or ()
    details = next((value for key, value in trailers if key == DETAILS_KEY), None)
    return from_status(error.code(), error.details() or error.code().name, details)  # type: ignore[arg-type]


def has_details(error: grpc.aio.AioRpcError) -> bool:
    """Whether whoever ended the call said why, as all of ours do."""
    return any(key == DETAILS_KEY for key, _ in error.trailing_metadata() or ())


def from_exception(error: BaseException) -> tuple[MeshError, bool]:
    """What an exception out of a handler means to the client, and whether it was unexpected.

    ValueError and TypeError blame the request; an object with an int `code` or `status` (400 to 599) and a str
    `message` keeps its status; anything else is an InternalError with an id and nothing of the exception's text:
    the caller logs the exception under that id.
    """
    if isinstance(error, MeshError):
        return error, False
    if isinstance(error, GeneratorExit):
        return EngineShutdown(), False
    code, message = getattr(error, "code", getattr(error, "status", None)), getattr(error, "message", None)
    if isinstance(code, int) and isinstance(message, str) and 400 <= code <= 599:
        return HttpError(code, message), False
    if isinstance(error, (ValueError, TypeError)) and type(error) in (ValueError, TypeError):
        return InvalidRequestError(str(error) or "the handler refused the request"), False
    error_id = uuid.uuid4().hex[:12]
    return InternalError(f"internal error (error id {error_id})", error_id=error_id), True
