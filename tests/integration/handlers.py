"""Handlers and models that several tests use."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from dynamo_grpc import (
    Context,
)
from dynamo_grpc.cards import load_model

NAME = "test.backend.generate"


async def echo(request: Any) -> AsyncIterator[Any]:
    for item in request:
        yield item


class Endless:
    """Yields numbers until it is ended, and remembers how."""

    def __init__(self, *, silent: bool = False) -> None:
        self.started = asyncio.Event()
        self.ended = asyncio.Event()
        self.how = ""
        self._silent = silent

    async def generate(self, request: Any, context: Context) -> AsyncIterator[int]:
        self.started.set()
        number = 0
        try:
            while not context.is_stopped():
                if not self._silent:
                    yield number
                number += 1
                await asyncio.sleep(0.01)
            self.how = "stopped"
        except asyncio.CancelledError:
            self.how = "cancelled"
            raise
        except GeneratorExit:
            self.how = "left"
            raise
        finally:
            self.ended.set()


async def collect(stream: Any) -> list[Any]:
    return [item.data() async for item in stream]


def toy(context_length: int = 100, **options: Any) -> Any:
    return load_model(None, "toy", context_length=context_length, **options)


def served_key(served: Any) -> str:
    from dynamo_grpc.names import EndpointName

    return EndpointName.parse(served.name).instance_key(served.instance.instance_id)


def to_json(message: Any) -> bytes:
    from dynamo_grpc.records import to_json as convert

    return convert(message)
