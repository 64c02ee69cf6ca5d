"""The table of errors, and that an error survives the wire."""

import grpc
import pytest

from dynamo_grpc import errors, status
from dynamo_grpc.errors import HttpError, MeshError, Retry
from dynamo_grpc.status import from_exception, from_status, status_code, status_details

TABLE = [
    # class, gRPC code, HTTP status, retry
    (errors.InvalidRequestError, "INVALID_ARGUMENT", 400, Retry.NEVER),
    (errors.InvalidNameError, "INVALID_ARGUMENT", 400, Retry.NEVER),
    (errors.ContextLengthError, "INVALID_ARGUMENT", 400, Retry.NEVER),
    (errors.UnsupportedError, "UNIMPLEMENTED", 400, Retry.NEVER),
    (errors.ModelNotFoundError, "NOT_FOUND", 404, Retry.NEVER),
    (errors.EndpointNotFoundError, "NOT_FOUND", 404, Retry.NEVER),
    (errors.FileNotKnownError, "NOT_FOUND", 404, Retry.NEVER),
    (errors.CardMismatchError, "FAILED_PRECONDITION", 412, Retry.ELSEWHERE),
    (errors.TooLargeError, "RESOURCE_EXHAUSTED", 413, Retry.NEVER),
    (errors.OverloadedError, "RESOURCE_EXHAUSTED", 503, Retry.LATER),
    (errors.SlowReaderError, "RESOURCE_EXHAUSTED", 408, Retry.NEVER),
    (errors.NoInstancesError, "UNAVAILABLE", 503, Retry.LATER),
    (errors.DrainingError, "UNAVAILABLE", 503, Retry.ELSEWHERE),
    (errors.NotReadyError, "UNAVAILABLE", 503, Retry.ELSEWHERE),
    (errors.WrongInstanceError, "UNAVAILABLE", 503, Retry.ELSEWHERE),
    (errors.InstanceLostError, "UNAVAILABLE", 503, Retry.MIGRATE),
    (errors.ResponseTimeoutError, "UNAVAILABLE", 504, Retry.MIGRATE),
    (errors.EngineShutdown, "UNAVAILABLE", 503, Retry.MIGRATE),
    (errors.RegistryError, "UNAVAILABLE", 503, Retry.LATER),
    (errors.RequestCancelledError, "CANCELLED", 499, Retry.NEVER),
    (errors.DeadlineError, "DEADLINE_EXCEEDED", 504, Retry.NEVER),
    (errors.InternalError, "INTERNAL", 500, Retry.NEVER),
    (errors.HandlerOutputError, "INTERNAL", 500, Retry.NEVER),
    (errors.HandlerEndedError, "INTERNAL", 500, Retry.MIGRATE),
]


@pytest.mark.parametrize(("cls", "code", "status", "retry"), TABLE, ids=lambda v: getattr(v, "__name__", str(v)))
def test_every_error_survives_the_wire(cls: type[MeshError], code: str, status: int, retry: Retry) -> None:
    error = cls("what happened", param="top_p", retry_after_s=2.5, error_id="abc")
    assert (status_code(error).name, error.http_status, error.retry) == (code, status, retry)
    back = from_status(status_code(error), error.message, status_details(error))
    assert type(back) is cls
    assert (back.message, back.param, back.retry_after_s, back.error_id) == ("what happened", "top_p", 2.5, "abc")


def test_the_table_is_complete() -> None:
    untold = {errors.MeshError, errors.ConfigurationError, errors.HttpError}
    assert set(status._tree(MeshError)) - untold == {row[0] for row in TABLE}


@pytest.mark.parametrize("status", [400, 403, 404, 418, 429, 499, 500, 502, 503])
def test_a_http_error_keeps_its_status(status: int) -> None:
    error = HttpError(status, "teapot")
    back = from_status(status_code(error), error.message, status_details(error))
    assert isinstance(back, HttpError)
    assert (back.http_status, back.message) == (status, "teapot")


@pytest.mark.parametrize(("code", "message"), [(True, "x"), ("400", "x"), (200, "x"), (600, "x"), (400, 5)])
def test_a_http_error_refuses_other_things(code: object, message: object) -> None:
    with pytest.raises(ValueError, match="HttpError takes"):
        HttpError(code, message)  # type: ignore[arg-type]


def test_foreign_statuses_are_told_apart_by_their_code() -> None:
    assert type(from_status(grpc.StatusCode.UNAVAILABLE, "Socket closed", None)) is errors.InstanceLostError
    assert type(from_status(grpc.StatusCode.UNIMPLEMENTED, "no", None)) is errors.UnsupportedError
    assert type(from_status(grpc.StatusCode.DATA_LOSS, "oh", None)) is errors.InternalError
    too_large = "SERVER: Received message larger than max (5 vs. 4)"
    assert type(from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, too_large, None)) is errors.TooLargeError
    answer = too_large.replace("SERVER", "CLIENT")
    assert type(from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, answer, None)) is errors.HandlerOutputError


def test_exceptions_of_handlers() -> None:
    class Teapot(Exception):
        code, message = 418, "short and stout"

    assert type(from_exception(ValueError("n is odd"))[0]) is errors.InvalidRequestError
    assert from_exception(ValueError("n is odd"))[0].message == "n is odd"
    assert type(from_exception(GeneratorExit())[0]) is errors.EngineShutdown
    assert from_exception(Teapot())[0].http_status == 418
    told, is_unexpected = from_exception(KeyError("secret"))
    assert is_unexpected
    assert "secret" not in told.message
    assert told.error_id in told.message
    # a JSONDecodeError is a ValueError of somebody else's: its text is not for clients
    assert type(from_exception(UnicodeDecodeError("utf-8", b"x", 0, 1, "secret"))[0]) is errors.InternalError


def test_details_fit_into_a_trailer() -> None:
    assert len(status_details(errors.InvalidRequestError("x" * 100_000, param="p"))) < 8000
