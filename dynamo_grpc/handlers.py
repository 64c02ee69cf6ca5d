"""A user's handler as one kind of thing: whatever its shape, it is called with a request and gives an async stream."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar, get_origin

from dynamo_grpc.context import Context
from dynamo_grpc.errors import ConfigurationError, HandlerOutputError, InvalidRequestError

_F = TypeVar("_F", bound=Callable[..., Any])


class Handler:
    """A callable `(request)` or `(request, context)`: an async generator, or a coroutine that gives one value.

    Raises:
        ConfigurationError: it is not callable, is synchronous, or takes other arguments.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        if not callable(function):
            raise ConfigurationError(f"a handler must be callable, not {function!r}")
        self.name = getattr(function, "__qualname__", type(function).__qualname__)
        target = function if inspect.isroutine(function) else type(function).__call__
        target = inspect.unwrap(target)
        self._is_generator = inspect.isasyncgenfunction(target)
        if not (self._is_generator or inspect.iscoroutinefunction(target)):
            raise ConfigurationError(
                f"handler {self.name} must be an async generator (async def with yield), or a coroutine that returns "
                "one value"
            )
        self._function = function
        self._takes_context = _takes_context(function, self.name)

    def __call__(self, request: Any, context: Context) -> AsyncGenerator[Any, None]:
        """Run the handler. Closing the stream closes the handler's generator."""
        result = self._function(request, context) if self._takes_context else self._function(request)
        return result if self._is_generator else _once(result)


async def _once(value: Awaitable[Any]) -> AsyncGenerator[Any, None]:
    yield await value


def _takes_context(function: Callable[..., Any], name: str) -> bool:
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    required = [p for p in positional if p.default is p.empty]
    if not len(positional) >= 1 or len(required) > 2:
        raise ConfigurationError(f"handler {name} must take (request) or (request, context)")
    return len(positional) > 1 and (len(required) == 2 or positional[1].name == "context")


def dynamo_endpoint(request_type: Any, response_type: Any) -> Callable[[_F], _F]:
    """Declare what a handler takes and yields; both are checked.

    A request type with `model_validate` (a pydantic model) is made from the request's JSON value, or from a str that
    holds JSON; other classes are compared by isinstance, typing generics are not checked.

    Example:
        @dynamo_endpoint(str, str)
        async def greet(request):
            yield f"hello {request}"

    Raises (when the handler runs):
        InvalidRequestError: the request is not of its type.
        HandlerOutputError: the handler yielded something else; names the handler and what it gave.
    """

    def decorate(function: _F) -> _F:
        name = getattr(function, "__qualname__", repr(function))
        handler_is_generator = inspect.isasyncgenfunction(function)

        def check(item: Any) -> Any:
            if hasattr(item, "model_dump") and isinstance(item, response_type):
                return item.model_dump(mode="json")
            if not _is_instance(item, response_type):
                raise HandlerOutputError(
                    f"handler {name} yielded {item!r:.80} ({type(item).__name__}), and declares "
                    f"{getattr(response_type, '__name__', response_type)}"
                )
            return item

        def parsed(args: tuple[Any, ...]) -> tuple[Any, ...]:
            # (request), (self, request), (request, context) or (self, request, context)
            index = next((i for i, arg in enumerate(args) if isinstance(arg, Context)), len(args)) - 1
            return (*args[:index], _parse(args[index], request_type), *args[index + 1 :])

        if handler_is_generator:

            @functools.wraps(function)
            async def generator(*args: Any) -> AsyncIterator[Any]:
                stream = function(*parsed(args))
                try:
                    async for item in stream:
                        yield check(item)
                finally:
                    await stream.aclose()

            return generator  # type: ignore[return-value]

        @functools.wraps(function)
        async def coroutine(*args: Any) -> Any:
            return check(await function(*parsed(args)))

        return coroutine  # type: ignore[return-value]

    return decorate


def _is_instance(value: Any, kind: Any) -> bool:
    if kind is Any or get_origin(kind) is not None or not isinstance(kind, type):
        return True
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _parse(request: Any, kind: Any) -> Any:
    if hasattr(kind, "model_validate"):
        try:
            return kind.model_validate(json.loads(request) if isinstance(request, (str, bytes)) else request)
        except ValueError as error:
            raise InvalidRequestError(f"invalid request: {error}") from error
    if not _is_instance(request, kind):
        raise InvalidRequestError(f"invalid request: expected {kind.__name__}, got {type(request).__name__}")
    return request
