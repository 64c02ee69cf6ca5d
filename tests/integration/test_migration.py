"""Workers that are lost in the middle of an answer: it goes on elsewhere, with no token lost or doubled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamo_grpc import Context, EngineShutdown, InstanceLostError, RequestCancelledError
from dynamo_grpc.runtime import DistributedRuntime
from dynamo_grpc.testing import Mesh

from ..conftest import both_lanes, eventually
from .handlers import NAME, toy

pytestmark = both_lanes


class Counting:
    """Says 0, 1, 2 … after any prompt; after `gate` tokens it waits until it is lost, or does what `ending` does."""

    def __init__(self, gate: int = 1_000, ending: Any = None) -> None:
        self.gate, self._ending = gate, ending
        self.requests: list[dict[str, Any]] = []
        self.is_waiting = asyncio.Event()

    async def generate(self, request: dict[str, Any], context: Context) -> AsyncIterator[int]:
        self.requests.append(request)
        num_prompt = request.get("resume", {}).get("num_prompt_tokens") or len(request["token_ids"])
        number = len(request["token_ids"]) - num_prompt
        for count in range(1_000):
            if count == self.gate:
                self.is_waiting.set()
                if self._ending is not None:
                    raise self._ending
                await asyncio.Event().wait()
            yield number
            number += 1


async def serve(mesh: Mesh, *handlers: Counting) -> list[DistributedRuntime]:
    return [await mesh.serve(NAME, handler.generate, toy(10_000)) for handler in handlers]


def request(**stop: Any) -> dict[str, Any]:
    return {"token_ids": [70, 71], "stop_conditions": {"max_tokens": 20, **stop}}


async def read(stream: Any) -> tuple[list[int], list[dict[str, Any]]]:
    """The tokens, and the items that end the stream."""
    items = [item.data() async for item in stream]
    return [token for item in items for token in item["token_ids"]], [i for i in items if "finish_reason" in i]


async def test_it_goes_on_where_it_was(mesh: Mesh) -> None:
    lost, other = Counting(gate=7), Counting()
    (runtime,) = await serve(mesh, lost)
    client = await mesh.client(NAME)
    reading = asyncio.ensure_future(read(await client.generate(request(min_tokens=3))))
    await asyncio.wait_for(lost.is_waiting.wait(), 5)
    await serve(mesh, other)
    await eventually(lambda: len(client.instance_ids()) == 2)
    await mesh.lose(runtime)
    tokens, (end,) = await asyncio.wait_for(reading, 10)
    assert tokens == list(range(20))
    assert end["finish_reason"] == "length"
    assert end["completion_usage"] == {"prompt_tokens": 2, "completion_tokens": 20, "total_tokens": 22}
    (resumed,) = other.requests
    assert resumed["token_ids"] == [70, 71, *range(7)]
    assert resumed["resume"]["num_prompt_tokens"] == 2
    assert resumed["resume"]["num_attempts"] == 1
    assert (resumed["stop_conditions"]["max_tokens"], resumed["stop_conditions"].get("min_tokens", 0)) == (13, 0)


async def test_it_goes_on_three_times_and_no_more(mesh: Mesh) -> None:
    handlers = [Counting(gate=3) for _ in range(4)]
    runtimes = await serve(mesh, handlers[0])
    client = await mesh.client(NAME)
    reading = asyncio.ensure_future(read(await client.generate(request())))
    for number, handler in enumerate(handlers):
        await asyncio.wait_for(handler.is_waiting.wait(), 5)
        if number < 3:
            runtimes += await serve(mesh, handlers[number + 1])
            newcomer = runtimes[-1].instance_id
            await eventually(lambda newcomer=newcomer: newcomer in client.instance_ids())
        await mesh.lose(runtimes[number])
    with pytest.raises(InstanceLostError, match="it can't go on elsewhere: it has gone on elsewhere 3 times"):
        await asyncio.wait_for(reading, 10)
    assert [len(handler.requests[0]["token_ids"]) for handler in handlers] == [2, 5, 8, 11]


async def test_an_engine_that_shuts_down_hands_over(mesh: Mesh) -> None:
    await serve(mesh, *(Counting(gate=4, ending=EngineShutdown()) for _ in range(3)))
    client = await mesh.client(NAME)
    await eventually(lambda: len(client.instance_ids()) == 3)
    await serve(mesh, Counting())
    await eventually(lambda: len(client.instance_ids()) == 4)
    for _ in range(4):
        tokens, ends = await read(await client.generate(request()))
        assert (tokens, len(ends)) == (list(range(20)), 1)


@pytest.mark.parametrize("ending", [ValueError("no"), asyncio.CancelledError()])
async def test_what_the_handler_refuses_goes_nowhere(mesh: Mesh, ending: BaseException) -> None:
    handlers = [Counting(gate=4, ending=ending), Counting(gate=4, ending=ending)]
    await serve(mesh, *handlers)
    client = await mesh.client(NAME)
    with pytest.raises((ValueError, RequestCancelledError)):
        await read(await client.generate(request()))
    assert sum(len(handler.requests) for handler in handlers) == 1


async def test_with_nobody_left_the_loss_is_told(mesh: Mesh) -> None:
    lost = Counting(gate=4)
    (runtime,) = await serve(mesh, lost)
    client = await mesh.client(NAME)
    reading = asyncio.ensure_future(read(await client.generate(request())))
    await asyncio.wait_for(lost.is_waiting.wait(), 5)
    await mesh.lose(runtime)
    with pytest.raises(InstanceLostError):
        await asyncio.wait_for(reading, 5)


async def test_a_worker_that_drains_hands_over_what_is_left(mesh: Mesh) -> None:
    leaving, other = Counting(gate=6), Counting()
    (runtime,) = await serve(mesh, leaving)
    client = await mesh.client(NAME)
    reading = asyncio.ensure_future(read(await client.generate(request())))
    await asyncio.wait_for(leaving.is_waiting.wait(), 5)
    await serve(mesh, other)
    await eventually(lambda: len(client.instance_ids()) == 2)
    runtime.drain_limit_s = 0.2
    await mesh.stop(runtime)
    tokens, ends = await asyncio.wait_for(reading, 5)
    assert (tokens, len(ends)) == (list(range(20)), 1)
