"""What handlers raise and yield, and what clients see of it."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamo_grpc import (
    EngineShutdown,
    HandlerOutputError,
    HttpError,
    InternalError,
    InvalidRequestError,
    MeshError,
    NoInstancesError,
    RequestCancelledError,
    TooLargeError,
)
from dynamo_grpc.testing import Mesh

from ..conftest import both_lanes
from .handlers import NAME, collect, echo

pytestmark = both_lanes


class TeapotError(Exception):
    code, message = 418, "short and stout"


@pytest.mark.parametrize(
    ("raised", "cls", "text"),
    [
        (ValueError("n is odd"), InvalidRequestError, "n is odd"),
        (HttpError(418, "a teapot"), HttpError, "a teapot"),
        (TeapotError(), HttpError, "short and stout"),
        (KeyError("secret"), InternalError, "internal error"),
        (asyncio.CancelledError(), RequestCancelledError, "cancelled"),
        (EngineShutdown(), EngineShutdown, "shutting down"),
        (GeneratorExit(), EngineShutdown, "shutting down"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_what_a_handler_raises(
    mesh: Mesh, raised: BaseException, cls: type[MeshError], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: Any) -> AsyncIterator[int]:
        if request == "fail":
            raise raised
        yield 1

    await mesh.serve(NAME, handler)
    client = await mesh.client(NAME)
    with pytest.raises(cls, match=text) as caught, caplog.at_level(logging.ERROR):
        await collect(await client.generate("fail"))
    assert type(caught.value) is cls
    assert "secret" not in str(caught.value)
    if cls is InternalError:
        assert caught.value.error_id
        assert caught.value.error_id in {getattr(record, "error_id", "") for record in caplog.records}
        assert "secret" in caplog.text
    assert await collect(await client.generate("work")) == [1]  # it goes on serving


async def test_what_a_handler_may_not_yield_is_named(mesh: Mesh) -> None:
    async def bad_handler(request: Any) -> AsyncIterator[Any]:
        yield "fine"
        yield {1, 2}

    await mesh.serve(NAME, bad_handler)
    client, seen = await mesh.client(NAME), []
    with pytest.raises(HandlerOutputError, match=r"bad_handler yielded \{1, 2\} \(set\)"):
        async for item in await client.generate(None):
            seen.append(item.data())
    assert seen == ["fine"]


async def test_unknown_names_are_told_with_the_nearest(mesh: Mesh) -> None:
    await mesh.serve(NAME, echo)
    client = await mesh.runtime().endpoint("test.backend.genrate").client()
    with pytest.raises(NoInstancesError, match=r"did you mean 'test\.backend\.generate'"):
        await client.wait_for_instances(0.2)
    with pytest.raises(NoInstancesError, match=r"did you mean 'test\.backend\.generate'"):
        await client.generate(None)


async def test_requests_that_are_no_json_are_refused_before_they_leave(mesh: Mesh) -> None:
    await mesh.serve(NAME, echo)
    with pytest.raises(InvalidRequestError, match="set"):
        await (await mesh.client(NAME)).generate({1})


async def test_a_request_over_the_limit_fails_alone(mesh: Mesh) -> None:
    async def size(request: bytes) -> int:
        return len(request)

    await mesh.serve(NAME, size)
    client = await mesh.client(NAME)
    with pytest.raises(TooLargeError):
        await collect(await client.generate(b"x" * (65 * 2**20)))
    assert await collect(await client.generate(b"x" * (40 * 2**20))) == [40 * 2**20]
