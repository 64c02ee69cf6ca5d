"""More requests than there is room for: another worker first, then a refusal that says when to come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamo_grpc import Context, OverloadedError
from dynamo_grpc.testing import Mesh

from ..conftest import both_lanes, eventually
from .handlers import NAME, collect, toy
from .test_migration import Counting, read, request


class Gate:
    """Answers when it is opened, and knows who came."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.order: list[Any] = []

    async def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
        self.order.append(request)
        await self.open.wait()
        yield request


@both_lanes
async def test_another_worker_is_tried_before_anybody_is_refused(mesh: Mesh) -> None:
    gates = [Gate(), Gate()]
    runtimes = [await mesh.serve(NAME, gate.generate, max_concurrent=1, max_queued=0) for gate in gates]
    client = await mesh.client(NAME)
    await eventually(lambda: len(client.instance_ids()) == 2)
    reading = [asyncio.ensure_future(collect(await client.direct("a", runtimes[0].instance_id)))]
    await eventually(lambda: gates[0].order)
    reading.append(asyncio.ensure_future(collect(await client.generate("b"))))
    await eventually(lambda: gates[1].order)
    for _ in range(3):  # at the workers, and from what is known of them
        with pytest.raises(OverloadedError, match=r"max_concurrent=1 requests run and none may wait") as refused:
            await collect(await client.generate("c"))
        assert refused.value.retry_after_s is not None
    for gate in gates:
        gate.open.set()
    assert sorted(await asyncio.gather(*reading)) == [["a"], ["b"]]
    assert await collect(await client.generate("d")) == ["d"]  # at once: a request of ours has just ended there
    assert sum(runtime.server.served[NAME].admission.num_refused for runtime in runtimes) <= 4


@both_lanes
async def test_cancelled_while_it_waits_it_never_runs(mesh: Mesh) -> None:
    gate = Gate()
    runtime = await mesh.serve(NAME, gate.generate, max_concurrent=1)
    client = await mesh.client(NAME)
    admission = runtime.server.served[NAME].admission
    first = asyncio.ensure_future(collect(await client.generate("a")))
    await eventually(lambda: gate.order)
    left, stopped = Context(), Context()
    leaving = asyncio.ensure_future(collect(await client.generate("b", context=left)))
    stopping = asyncio.ensure_future(collect(await client.generate("c", context=stopped)))
    await eventually(lambda: admission.num_waiting == 2)
    left.kill()
    stopped.stop_generating()
    assert await asyncio.wait_for(stopping, 5) == []  # a gentle end of nothing
    await eventually(lambda: admission.num_waiting == 0)
    gate.open.set()
    assert await first == ["a"]
    assert gate.order == ["a"]
    await asyncio.gather(leaving, return_exceptions=True)
    await eventually(lambda: admission.num_running == 0)


@both_lanes
async def test_priorities_of_models_requests(mesh: Mesh) -> None:
    handler = Counting(gate=1)
    runtime = await mesh.serve(NAME, handler.generate, toy(10_000), max_concurrent=1)
    client = await mesh.client(NAME)
    first = Context()
    reading = [asyncio.ensure_future(read(await client.generate(request(), context=first)))]
    await asyncio.wait_for(handler.is_waiting.wait(), 5)
    for priority in (0, 2, 1):
        asked = {**request(max_tokens=1), "priority": priority}
        reading.append(asyncio.ensure_future(read(await client.generate(asked))))
        await eventually(lambda: runtime.server.served[NAME].admission.num_waiting == len(reading) - 1)
    first.kill()
    await asyncio.gather(*reading, return_exceptions=True)
    assert [asked.get("priority", 0) for asked in handler.requests] == [0, 2, 1, 0]


@both_lanes
async def test_an_answer_that_goes_on_here_finds_room_though_it_is_full(mesh: Mesh) -> None:
    lost, full = Counting(gate=5), Counting(gate=1)
    runtime = await mesh.serve(NAME, lost.generate, toy(10_000))
    client = await mesh.client(NAME)
    moving = asyncio.ensure_future(read(await client.generate(request())))
    await asyncio.wait_for(lost.is_waiting.wait(), 5)
    other = await mesh.serve(NAME, full.generate, toy(10_000), max_concurrent=1, max_queued=0)
    await eventually(lambda: len(client.instance_ids()) == 2)
    blocking = Context()
    asked = client.direct(request(), other.instance_id, context=blocking)
    blocked = asyncio.ensure_future(read(await asked))
    await asyncio.wait_for(full.is_waiting.wait(), 5)
    await mesh.lose(runtime)
    await eventually(lambda: other.server.served[NAME].admission.num_waiting == 1)
    full.gate = 1_000
    blocking.kill()
    tokens, ends = await asyncio.wait_for(moving, 5)
    assert (tokens, len(ends)) == (list(range(20)), 1)
    await asyncio.gather(blocked, return_exceptions=True)


async def test_the_load_is_told(mesh: Mesh) -> None:
    from dynamo_grpc.v1 import control_pb2

    gate, used = Gate(), {"num_used_blocks": 3, "num_total_blocks": 10}
    await mesh.serve(NAME, gate.generate, max_concurrent=1, load=lambda: used)
    client = await mesh.client(NAME)
    (live,) = client._instances.routable()
    reading = [asyncio.ensure_future(collect(await client.generate(name))) for name in "ab"]
    await eventually(lambda: gate.order)
    interval = control_pb2.WatchLoadRequest()
    interval.min_interval.FromMilliseconds(20)
    async for load in live.connection.control.WatchLoad(interval):
        if load.num_waiting == 1:
            break
    assert (load.num_running, load.num_used_blocks, load.num_total_blocks) == (1, 3, 10)
    gate.open.set()
    await asyncio.gather(*reading)
