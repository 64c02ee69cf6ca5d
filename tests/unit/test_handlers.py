from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import BaseModel

from dynamo_grpc import ConfigurationError, Context, HandlerOutputError, InvalidRequestError, dynamo_endpoint
from dynamo_grpc.handlers import Handler


async def items(function: Any, request: Any = "x") -> list[Any]:
    return [item async for item in Handler(function)(request, Context("r1"))]


async def test_all_shapes_of_handlers() -> None:
    async def plain(request: Any) -> AsyncIterator[Any]:
        yield request

    async def with_context(request: Any, context: Context) -> AsyncIterator[Any]:
        yield context.id()

    async def other_name(request: Any, ctx: Any) -> AsyncIterator[Any]:
        yield ctx.id()

    async def option(request: Any, factor: int = 2) -> AsyncIterator[Any]:
        yield factor

    async def unary(request: Any) -> Any:
        return request * 2

    class Object:
        async def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
            yield context.id()

        async def __call__(self, request: Any) -> AsyncIterator[Any]:
            yield "called"

    assert await items(plain) == ["x"]
    assert await items(with_context) == ["r1"]
    assert await items(other_name) == ["r1"]
    assert await items(option) == [2]
    assert await items(unary) == ["xx"]
    assert await items(Object().generate) == ["r1"]
    assert await items(Object()) == ["called"]


@pytest.mark.parametrize("function", [5, lambda request: None, len], ids=["no callable", "sync", "builtin"])
def test_what_is_no_handler_is_refused(function: Any) -> None:
    with pytest.raises(ConfigurationError, match="handler"):
        Handler(function)


def test_other_arguments_are_refused() -> None:
    async def nothing() -> None: ...

    async def three(a: Any, b: Any, c: Any) -> None: ...

    for function in (nothing, three):
        with pytest.raises(ConfigurationError, match="must take"):
            Handler(function)


async def test_leaving_a_stream_closes_the_handler() -> None:
    ended = []

    async def endless(request: Any) -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            ended.append(True)

    stream = Handler(endless)("x", Context())
    assert await anext(stream) == 1
    await stream.aclose()  # type: ignore[attr-defined]
    assert ended


class Words(BaseModel):
    words: list[str]


async def test_declared_types_are_checked() -> None:
    @dynamo_endpoint(Words, str)
    async def join(request: Words) -> AsyncIterator[str]:
        yield " ".join(request.words)

    @dynamo_endpoint(str, int)
    async def liar(request: str) -> AsyncIterator[Any]:
        yield 1
        yield "two"

    @dynamo_endpoint(str, Words)
    async def model(request: str) -> Words:
        return Words(words=[request])

    assert await items(join, {"words": ["a", "b"]}) == ["a b"]
    assert await items(join, '{"words": ["a"]}') == ["a"]
    assert await items(model) == [{"words": ["x"]}]
    with pytest.raises(InvalidRequestError, match="words"):
        await items(join, {"words": 5})
    with pytest.raises(InvalidRequestError, match="expected str, got int"):
        await items(liar, 5)
    with pytest.raises(HandlerOutputError, match=r"liar yielded 'two' \(str\), and declares int"):
        await items(liar)


async def test_a_declared_method_with_a_context() -> None:
    class Server:
        @dynamo_endpoint(str, str)
        async def generate(self, request: str, context: Context) -> AsyncIterator[str]:
            yield request + context.id()

    assert await items(Server().generate) == ["xr1"]
