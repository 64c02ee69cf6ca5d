"""A worker that leaves: what runs, what waits, what is handed over, and in which order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamo_grpc import Context, DrainingError, EngineShutdown
from dynamo_grpc.testing import Mesh

from ..conftest import both_lanes, eventually, metric
from .handlers import NAME, Endless, collect, toy
from .test_migration import Counting, read, request

pytestmark = both_lanes


async def test_a_graceful_endpoint_finishes_what_runs(mesh: Mesh) -> None:
    go = asyncio.Event()

    async def handler(request: Any) -> AsyncIterator[int]:
        yield 1
        await go.wait()
        yield 2

    runtime = await mesh.serve(NAME, handler)
    client = await mesh.client(NAME)
    reading = asyncio.ensure_future(collect(await client.generate(None)))
    await eventually(lambda: len(runtime.server.requests) == 1)
    stopping = asyncio.ensure_future(mesh.stop(runtime))
    await eventually(lambda: client.instance_ids() == [])
    assert not stopping.done()
    go.set()
    assert await reading == [1, 2]
    await stopping


async def test_one_that_is_not_hands_over_at_once(mesh: Mesh) -> None:
    leaving, other = Counting(gate=6), Counting()
    runtime = await mesh.serve(NAME, leaving.generate, toy(10_000), graceful_shutdown=False)
    client = await mesh.client(NAME)
    reading = asyncio.ensure_future(read(await client.generate(request())))
    await asyncio.wait_for(leaving.is_waiting.wait(), 5)
    await mesh.serve(NAME, other.generate, toy(10_000))
    await eventually(lambda: len(client.instance_ids()) == 2)
    runtime.drain_limit_s = 60  # is for graceful ones
    await asyncio.wait_for(mesh.stop(runtime), 5)
    tokens, ends = await asyncio.wait_for(reading, 5)
    assert (tokens, len(ends)) == (list(range(20)), 1)
    assert other.requests[0]["token_ids"] == [70, 71, *range(6)]
    assert runtime.server.metrics is not None
    assert (
        metric(runtime.server.metrics.text(), "dynamo_component_handed_over_requests_total", dynamo_endpoint="generate")
        == 1.0
    )


async def test_two_endpoints_of_a_process_each_leave_in_their_way(mesh: Mesh) -> None:
    runtime, stays, goes = mesh.runtime(), Endless(), Endless()
    serving = [
        asyncio.ensure_future(runtime.endpoint("a.b.stays").serve_endpoint(stays.generate)),
        asyncio.ensure_future(runtime.endpoint("a.b.goes").serve_endpoint(goes.generate, graceful_shutdown=False)),
    ]
    reading, contexts = {}, {"stays": Context(), "goes": Context()}
    for name, context in contexts.items():
        client = await mesh.client(f"a.b.{name}")
        reading[name] = asyncio.ensure_future(collect(await client.generate(None, context=context)))
    await asyncio.wait_for(asyncio.gather(stays.started.wait(), goes.started.wait()), 5)
    runtime.drain_limit_s = 60
    runtime.shutdown()
    with pytest.raises(EngineShutdown, match="this worker leaves"):
        await asyncio.wait_for(reading["goes"], 5)
    assert (stays.how, goes.how) == ("", "cancelled")
    contexts["stays"].stop_generating()
    await asyncio.wait_for(reading["stays"], 5)
    assert stays.how == "stopped"
    await asyncio.wait_for(asyncio.gather(*serving), 5)


async def test_those_who_wait_for_their_turn_go_elsewhere_at_once(mesh: Mesh) -> None:
    full, other = Counting(gate=5), Counting()
    runtime = await mesh.serve(NAME, full.generate, toy(10_000), max_concurrent=1)
    client = await mesh.client(NAME)
    context = Context()
    running = asyncio.ensure_future(read(await client.generate(request(), context=context)))
    await asyncio.wait_for(full.is_waiting.wait(), 5)
    waiting = asyncio.ensure_future(read(await client.generate(request())))
    await eventually(lambda: runtime.server.served[NAME].admission.num_waiting == 1)
    await mesh.serve(NAME, other.generate, toy(10_000))
    await eventually(lambda: len(client.instance_ids()) == 2)
    runtime.drain_limit_s = 60
    stopping = asyncio.ensure_future(mesh.stop(runtime))
    tokens, _ = await asyncio.wait_for(waiting, 5)
    assert tokens == list(range(20))
    assert not running.done()
    context.kill()
    await asyncio.wait_for(stopping, 5)
    await asyncio.gather(running, return_exceptions=True)


async def test_what_comes_while_it_leaves_is_told_to_go_elsewhere(mesh: Mesh) -> None:
    endless = Endless()
    runtime = await mesh.serve(NAME, endless.generate)
    client = await mesh.client(NAME)
    context = Context()
    reading = asyncio.ensure_future(collect(await client.generate(None, context=context)))
    await asyncio.wait_for(endless.started.wait(), 5)
    stopping = asyncio.ensure_future(runtime.server.drain(10))
    await asyncio.sleep(0)
    with pytest.raises(DrainingError):
        await collect(await client.direct(None, runtime.instance_id))
    context.stop_generating()
    await reading
    await stopping


async def test_a_handler_that_does_not_end_keeps_nobody(mesh: Mesh) -> None:
    release = asyncio.Event()

    async def stubborn(request: Any) -> AsyncIterator[int]:
        yield 1
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()

    runtime = await mesh.serve(NAME, stubborn)
    client = await mesh.client(NAME)
    reading = asyncio.ensure_future(collect(await client.generate(None)))
    await eventually(lambda: len(runtime.server.requests) == 1)
    runtime.drain_limit_s = 0.1
    await asyncio.wait_for(mesh.stop(runtime), 6)
    release.set()
    with pytest.raises(Exception):  # noqa: B017 - the port closed under it, or it was handed over
        await asyncio.wait_for(reading, 5)
