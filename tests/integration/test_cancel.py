"""Ending a request: leaving, killing, stopping, deadlines."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamo_grpc import (
    Context,
    DeadlineError,
    RequestCancelledError,
    current_context,
)
from dynamo_grpc.testing import Mesh

from ..conftest import both_lanes
from .handlers import NAME, Endless, collect

pytestmark = both_lanes


async def test_leaving_a_stream_cancels_the_handler(mesh: Mesh) -> None:
    endless = Endless()
    await mesh.serve(NAME, endless.generate)
    client = await mesh.client(NAME)
    async with await client.generate(None) as stream:
        async for item in stream:
            if item.data() == 2:
                break
    await asyncio.wait_for(endless.ended.wait(), 2)
    assert endless.how in ("cancelled", "left")


async def test_breaking_out_of_a_plain_loop_cancels_the_handler_too(mesh: Mesh) -> None:
    endless = Endless()
    await mesh.serve(NAME, endless.generate)
    client = await mesh.client(NAME)

    async def first() -> Any:
        async for item in await client.generate(None):
            return item.data()

    assert await first() == 0
    await asyncio.wait_for(endless.ended.wait(), 2)


async def test_cancelling_the_callers_task_cancels_the_handler_before_its_first_output(mesh: Mesh) -> None:
    endless = Endless(silent=True)
    await mesh.serve(NAME, endless.generate)
    client = await mesh.client(NAME)

    async def call() -> None:
        async with await client.generate(None) as stream:
            async for _ in stream:
                pass

    task = asyncio.ensure_future(call())
    await asyncio.wait_for(endless.started.wait(), 2)
    task.cancel()
    await asyncio.wait_for(endless.ended.wait(), 2)
    assert endless.how == "cancelled"


async def test_kill_ends_a_request_at_once(mesh: Mesh) -> None:
    endless = Endless(silent=True)
    await mesh.serve(NAME, endless.generate)
    client, context = await mesh.client(NAME), Context()
    stream = await client.generate(None, context=context)
    reading = asyncio.ensure_future(collect(stream))
    await asyncio.wait_for(endless.started.wait(), 2)
    context.kill()
    with pytest.raises(RequestCancelledError):
        await reading
    await asyncio.wait_for(endless.ended.wait(), 2)
    assert endless.how == "cancelled"


async def test_a_gentle_stop_is_seen_by_the_handler(mesh: Mesh) -> None:
    endless = Endless()
    await mesh.serve(NAME, endless.generate)
    client, context = await mesh.client(NAME), Context()
    seen = []
    async for item in await client.generate(None, context=context):
        seen.append(item.data())
        if len(seen) == 3:
            context.stop_generating()
    assert seen[:3] == [0, 1, 2]
    assert endless.how == "stopped"


async def test_leaving_after_a_gentle_stop_lets_the_handler_finish(mesh: Mesh) -> None:
    endless = Endless()
    await mesh.serve(NAME, endless.generate)
    client, context = await mesh.client(NAME), Context()
    async with await client.generate(None, context=context) as stream:
        async for item in stream:
            if item.data() == 2:
                context.stop_generating()
                break
    await asyncio.wait_for(endless.ended.wait(), 2)
    assert endless.how == "stopped"


async def test_a_deadline_ends_the_handler_too(mesh: Mesh) -> None:
    endless = Endless(silent=True)
    await mesh.serve(NAME, endless.generate)
    client = await mesh.client(NAME)
    with pytest.raises(DeadlineError):
        await collect(await client.generate(None, context=Context(timeout_s=0.2)))
    await asyncio.wait_for(endless.ended.wait(), 2)
    assert endless.how == "cancelled"


async def test_a_nested_call_inherits_the_context(mesh: Mesh) -> None:
    endless = Endless(silent=True)
    await mesh.serve("test.back.generate", endless.generate)
    back = await mesh.client("test.back.generate")
    seen: dict[str, Any] = {}

    async def middle(request: Any, context: Context) -> AsyncIterator[Any]:
        seen["id"], seen["metadata"], seen["current"] = context.id(), context.metadata, current_context() is context
        async for item in await back.generate(request):  # context is not handed on
            yield item.data()

    await mesh.serve("test.middle.generate", middle)
    client = await mesh.client("test.middle.generate")
    context = Context("the-id", {"tenant": "größe"}, timeout_s=20)
    reading = asyncio.ensure_future(collect(await client.generate(None, context=context)))
    await asyncio.wait_for(endless.started.wait(), 2)
    context.stop_generating()
    await asyncio.wait_for(reading, 5)
    assert endless.how == "stopped"
    assert seen == {"id": "the-id", "metadata": {"tenant": "größe"}, "current": True}


async def test_the_remaining_time_travels(mesh: Mesh) -> None:
    async def handler(request: Any, context: Context) -> Any:
        return context.remaining_s()

    await mesh.serve(NAME, handler)
    client = await mesh.client(NAME)
    (left,) = await collect(await client.generate(None, context=Context(timeout_s=30)))
    assert 20 < left <= 31  # gRPC rounds up
    assert await collect(await client.generate(None)) == [None]
