"""Workers that are lost in the middle of an answer: it goes on elsewhere, with no token lost or doubled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamo_grpc import Context, EngineShutdown, InstanceLostError, OverloadedError, RequestCancelledError
from dynamo_grpc.runtime import DistributedRuntime
from dynamo_grpc.testing import Mesh

from ..conftest import both_lanes, eventually
from .handlers import NAME, toy

pytestmark = both_lanes


class Counting:
    """Says 0, 1, 2 … after any prompt; after `gate` tokens it waits until it is lost, or does what `ending` does."""

    def __init__(self, gate: int = 1_000, ending: Any = None, num_choices: int = 1) -> None:
        self.gate, self._ending, self.num_choices = gate, ending, num_choices
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
            if self.num_choices > 1:
                yield {"token_ids": [number], "index": count % self.num_choices}
            else:
                yield number
            number += 1


async def serve(mesh: Mesh, *handlers: Counting) -> list[DistributedRuntime]:
    return [await mesh.serve(NAME, handler.generate, toy(10_000, capabilities=["n"])) for handler in handlers]


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


@pytest.mark.parametrize("gate", [10, 30])  # before and after the tokens of both together are max_tokens
async def test_several_choices_are_not_taken_for_a_whole_answer(mesh: Mesh, gate: int) -> None:
    lost, other = Counting(gate, num_choices=2), Counting(num_choices=2)
    (runtime,) = await serve(mesh, lost)
    client = await mesh.client(NAME)
    asked = {**request(), "sampling_options": {"n": 2}}
    reading = asyncio.ensure_future(read(await client.generate(asked)))
    await asyncio.wait_for(lost.is_waiting.wait(), 5)
    await serve(mesh, other)
    await mesh.lose(runtime)
    with pytest.raises(InstanceLostError, match="it has several choices at once"):
        await asyncio.wait_for(reading, 5)
    assert other.requests == []


async def test_it_looks_for_room_when_the_next_worker_is_full(mesh: Mesh) -> None:
    lost = Counting(gate=4)
    (runtime,) = await serve(mesh, lost)
    client = await mesh.client(NAME)
    reading = asyncio.ensure_future(read(await client.generate(request())))
    await asyncio.wait_for(lost.is_waiting.wait(), 5)
    full = [Counting(gate=0, ending=OverloadedError("full", retry_after_s=1.0)) for _ in range(2)]
    room = Counting()
    await serve(mesh, *full, room)
    await eventually(lambda: len(client.instance_ids()) == 4)
    await mesh.lose(runtime)
    tokens, ends = await asyncio.wait_for(reading, 5)
    assert (tokens, len(ends)) == (list(range(20)), 1)
    assert len(room.requests) == 1


async def test_who_is_asked_by_name_is_asked_alone(mesh: Mesh) -> None:
    lost, other = Counting(gate=4), Counting()
    runtimes = await serve(mesh, lost, other)
    client = await mesh.client(NAME)
    stream = await client.direct(request(), runtimes[0].instance_id)
    reading = asyncio.ensure_future(read(stream))
    await asyncio.wait_for(lost.is_waiting.wait(), 5)
    await mesh.lose(runtimes[0])
    with pytest.raises(InstanceLostError, match="nobody else can take it"):
        await asyncio.wait_for(reading, 5)
    assert (stream._stream.num_migrations, stream._stream.num_retries, other.requests) == (0, 0, [])


async def test_a_stop_gives_an_answer_its_end_when_its_worker_is_lost(mesh: Mesh) -> None:
    is_waiting, other = asyncio.Event(), Counting()

    async def leaving(request: dict[str, Any], context: Context) -> AsyncIterator[int]:
        for number in range(4):
            yield number
        is_waiting.set()
        await context.async_killed_or_stopped()
        raise EngineShutdown

    await mesh.serve(NAME, leaving, toy(10_000, capabilities=["n"]))
    client = await mesh.client(NAME)
    context = Context()
    reading = asyncio.ensure_future(read(await client.generate(request(), context=context)))
    await asyncio.wait_for(is_waiting.wait(), 5)
    await serve(mesh, other)
    await eventually(lambda: len(client.instance_ids()) == 2)
    context.stop_generating()
    tokens, (end,) = await asyncio.wait_for(reading, 5)
    assert (tokens, end["finish_reason"], other.requests) == ([0, 1, 2, 3], "cancelled", [])


async def test_a_kill_ends_the_search(mesh: Mesh) -> None:
    lost = Counting(gate=4)
    (runtime,) = await serve(mesh, lost)
    client = await mesh.client(NAME)
    client._router._wait_s = 60.0
    context = Context()
    reading = asyncio.ensure_future(read(await client.generate(request(), context=context)))
    await asyncio.wait_for(lost.is_waiting.wait(), 5)
    await mesh.lose(runtime)
    await eventually(lambda: not client.instance_ids())
    context.kill()
    with pytest.raises((RequestCancelledError, InstanceLostError)):
        await asyncio.wait_for(reading, 5)


async def test_the_only_worker_of_a_model_is_replaced_while_it_answers(mesh: Mesh) -> None:
    """It leaves the registry first: the model is gone for a moment, and its requests must find the newcomer."""
    from .front import CHAT, Watched, front_of

    first = Watched()
    leaving = await mesh.serve_worker(first)
    async with front_of(mesh, instance_wait_s=10.0) as front:
        await eventually(front.frontend.catalog.ready)
        answer = asyncio.ensure_future(front.post({**CHAT, "model": "watched", "max_tokens": 300, "stream": True}))
        await asyncio.wait_for(first.started.wait(), 5)
        await asyncio.sleep(0.1)
        leaving.drain_limit_s = 0.5
        stopping = asyncio.ensure_future(mesh.stop(leaving))
        await eventually(lambda: not front.frontend.catalog.all())
        await mesh.serve_worker(Watched())
        await stopping
        response = await answer
        assert response.text.endswith("data: [DONE]\n\n"), response.text[-300:]
        assert response.text.count('"content":') == 301  # with the one that names the role
        metrics = (await front.http.get("/metrics")).text
        assert (
            'model_migration_total{dynamo_namespace="dynamo",migration_type="ongoing_request",model="watched"} 1.0'
            in metrics
        )
        assert 'migration_type="new_request"' not in metrics
