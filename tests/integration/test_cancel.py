"""Ending a request: leaving, killing, stopping, deadlines."""

import asyncio
import contextlib
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

from ..conftest import both_lanes, eventually, metric
from .handlers import NAME, Endless, collect, toy

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


@pytest.mark.parametrize("how", ["kill", "deadline"])
async def test_an_engines_abort_is_called_at_once_whatever_the_handler_does(mesh: Mesh, how: str) -> None:
    aborted, release, started = [], asyncio.Event(), asyncio.Event()

    async def abort() -> None:
        await asyncio.sleep(0)
        aborted.append("async")

    def broken() -> None:
        raise RuntimeError("no engine")

    async def handler(request: Any, context: Context) -> AsyncIterator[int]:
        for callback in (broken, lambda: aborted.append("plain"), abort):
            context.on_cancel(callback)
        started.set()
        while not release.is_set():  # an engine that takes its time
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()
        yield 1
        yield 2

    runtime = await mesh.serve(NAME, handler)
    client = await mesh.client(NAME)
    context = Context(timeout_s=0.2 if how == "deadline" else None)
    reading = asyncio.ensure_future(collect(await client.generate(None, context=context)))
    await asyncio.wait_for(started.wait(), 5)
    if how == "kill":
        context.kill()
    with pytest.raises((RequestCancelledError, DeadlineError)):
        await reading
    await eventually(lambda: aborted == ["plain", "async"])
    assert len(runtime.server.requests) == 1  # it still runs, and is counted
    release.set()
    await eventually(lambda: not runtime.server.requests)
    assert runtime.server.metrics is not None
    assert (
        metric(
            runtime.server.metrics.text(), "dynamo_component_cancel_to_stop_seconds_count", dynamo_endpoint="generate"
        )
        == 1.0
    )


async def test_no_abort_for_a_request_that_ends_by_itself(mesh: Mesh) -> None:
    aborted = []

    async def handler(request: Any, context: Context) -> AsyncIterator[int]:
        context.on_cancel(lambda: aborted.append(1))
        yield 1

    await mesh.serve(NAME, handler)
    client = await mesh.client(NAME)
    assert await collect(await client.generate(None)) == [1]
    assert aborted == []


async def test_tokens_for_nobody_are_counted_and_end_the_handler(mesh: Mesh) -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def handler(request: Any) -> AsyncIterator[Any]:
        yield 5
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
        yield [6, 7, 8]  # it should have let it pass
        raise AssertionError("nobody took it")

    runtime = await mesh.serve(NAME, handler, toy())
    client, context = await mesh.client(NAME), Context()
    reading = asyncio.ensure_future(collect(await client.generate([1, 2], context=context)))
    await asyncio.wait_for(started.wait(), 5)
    context.kill()
    await asyncio.wait_for(cancelled.wait(), 5)
    await eventually(lambda: not runtime.server.requests)
    assert runtime.server.metrics is not None
    assert (
        metric(runtime.server.metrics.text(), "dynamo_component_tokens_after_cancel_total", dynamo_endpoint="generate")
        == 3.0
    )
    await asyncio.gather(reading, return_exceptions=True)


async def test_it_travels_through_proxies(mesh: Mesh) -> None:
    """Client, two proxies, an engine: each hop in a process's runtime of its own."""
    endless = Endless()
    await mesh.serve("hop.two.generate", endless.generate)
    runtimes = []

    def proxy_of(client: Any) -> Any:
        async def proxy(request: Any) -> AsyncIterator[Any]:
            async for item in await client.generate(request):  # the context is not handed on
                yield item.data()

        return proxy

    for name, behind in (("hop.one.generate", "hop.two.generate"), ("hop.zero.generate", "hop.one.generate")):
        runtimes.append(await mesh.serve(name, proxy_of(await mesh.client(behind))))
    client = await mesh.client("hop.zero.generate")
    async with await client.generate(None) as stream:
        async for item in stream:
            if item.data() == 3:
                break
    await asyncio.wait_for(endless.ended.wait(), 5)
    assert endless.how in ("cancelled", "left")
    for runtime in runtimes:
        await eventually(lambda runtime=runtime: not runtime.server.requests)
