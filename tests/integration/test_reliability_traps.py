"""What once went wrong between workers that are full, leaving, stuck or strange, each as it was found."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from dynamo_grpc import Context, EngineShutdown, HandlerEndedError, OverloadedError, RegistryError, ResponseTimeoutError
from dynamo_grpc.records import to_entries
from dynamo_grpc.testing import Faults, Mesh
from dynamo_grpc.v1 import inference_pb2, inference_pb2_grpc, model_card_pb2

from ..conftest import both_lanes, both_lanes_long, eventually
from .handlers import NAME, collect, toy
from .test_migration import Counting, read, request


async def one(request: Any) -> AsyncIterator[int]:
    yield 1


class Plain(inference_pb2_grpc.InferenceServicer):
    """A worker without a line of ours, that ends its calls as `how` says."""

    def __init__(self, how: str) -> None:
        self.how, self.num_asked = how, 0

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.num_asked += 1
        if self.how == "cancelled":
            await context.abort(grpc.StatusCode.CANCELLED, "CANCELLED")
        for number in range(3):
            yield inference_pb2.GenerateResponse(
                sequence=number, choices=[inference_pb2.ChoiceDelta(token_ids=[number])]
            )


async def serve_plain(mesh: Mesh, how: str) -> tuple[Plain, grpc.aio.Server]:
    server, servicer = grpc.aio.server(), Plain(how)
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    instance = model_card_pb2.Instance(
        namespace="test", component="backend", endpoint="generate", instance_id=port, epoch=1,
        address=f"127.0.0.1:{port}", kind=model_card_pb2.ENDPOINT_KIND_MODEL, model="toy",
        card_checksum=toy(10_000).card.checksum,
    )  # fmt: skip
    await mesh.registry.register(to_entries(instance, None))
    return servicer, server


@pytest.mark.parametrize("how", ["cancelled", "without a finish"])
async def test_a_call_that_ends_without_a_word_is_taken_elsewhere(mesh: Mesh, how: str) -> None:
    """GRPC ends calls so that a stopping server had not handed to anybody; nobody cancelled them."""
    servicer, server = await serve_plain(mesh, how)
    try:
        await mesh.serve(NAME, Counting().generate, toy(10_000))
        client = await mesh.client(NAME)
        await eventually(lambda: len(client.instance_ids()) == 2)
        for _ in range(6):
            tokens, ends = await read(await client.generate(request()))
            assert (tokens, len(ends)) == (list(range(20)), 1)
        assert servicer.num_asked
    finally:
        await server.stop(None)


async def test_a_stream_without_an_end_is_an_error_with_nobody_else(mesh: Mesh) -> None:
    _, server = await serve_plain(mesh, "without a finish")
    try:
        client = await mesh.client(NAME)
        with pytest.raises(HandlerEndedError, match="ended without a finish reason"):
            await read(await client.generate(request()))
        tokens, (end,) = await read(await client.generate(request(max_tokens=3)))  # it was whole
        assert (tokens, end["finish_reason"]) == ([0, 1, 2], "length")
    finally:
        await server.stop(None)


@both_lanes
async def test_the_one_with_room_is_found_among_many_that_are_full(mesh: Mesh) -> None:
    for _ in range(8):
        await mesh.serve(NAME, Faults(refuse=True).wrap(one))
    await mesh.serve(NAME, one)
    client = await mesh.client(NAME)
    await eventually(lambda: len(client.instance_ids()) == 9)
    for _ in range(30):
        client._instances._full.clear()  # as if it were long ago
        assert await collect(await client.generate(None)) == [1]


@both_lanes
@pytest.mark.parametrize("state", ["draining", "sick"])
async def test_the_one_that_takes_requests_is_found_among_many_that_do_not(mesh: Mesh, state: str) -> None:
    runtimes = [await mesh.serve(NAME, one) for _ in range(8)]
    await mesh.serve(NAME, one)
    client = await mesh.client(NAME)
    await eventually(lambda: len(client.instance_ids()) == 9)
    for runtime in runtimes:  # still listed
        if state == "sick":
            runtime.server.served[NAME].sick_because = "no engine"
        else:
            await runtime.server.drain(0.0)
    for _ in range(20):
        assert await collect(await client.generate(None)) == [1]


@both_lanes_long
async def test_waiting_for_a_turn_is_not_silence_and_a_stuck_handler_is(mesh: Mesh) -> None:
    slow, stuck = Faults(slow_s=0.15), Faults()
    runtime = await mesh.serve(NAME, slow.wrap(stuck.wrap(Counting().generate)), toy(10_000), max_concurrent=1)
    client = await mesh.client(NAME)
    client._router.first_output_s = client._router.output_gap_s = 0.5
    asked = [asyncio.ensure_future(read(await client.generate(request(max_tokens=2)))) for _ in range(6)]
    for answer in await asyncio.gather(*asked):  # the last one waits for 1.5 s
        assert answer[0] == [0, 1]
    assert not client._instances._ejections
    stuck.stall_after = 0
    first = asyncio.ensure_future(read(await client.generate(request())))
    await eventually(lambda: len(runtime.server.requests) == 1)
    second = asyncio.ensure_future(read(await client.generate(request())))
    with pytest.raises(ResponseTimeoutError, match="though its connection stands"):
        await asyncio.wait_for(first, 5)
    with pytest.raises(ResponseTimeoutError, match=r"gave no output for 0.5 s after its turn came"):
        await asyncio.wait_for(second, 5)


@both_lanes
async def test_a_try_that_nobody_ends_is_over_some_day(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    from dynamo_grpc.routing import ejection

    monkeypatch.setattr(ejection, "_FIRST_S", 0.05)
    faults = Faults(fail_after=0)

    async def endless(request: Any) -> AsyncIterator[int]:
        number = 0
        while True:
            yield number
            number += 1
            await asyncio.sleep(0.01)

    broken = await mesh.serve(NAME, faults.wrap(endless))
    await mesh.serve(NAME, endless)
    client = await mesh.client(NAME)
    await eventually(lambda: len(client.instance_ids()) == 2)

    async def first() -> Any:
        try:
            async for item in await client.generate(None):
                return item.data()
        except Exception:
            return None

    await eventually(lambda: len(client.instance_ids()) == 2)
    for _ in range(10):
        await first()
    faults.fail_after = None
    await eventually(lambda: broken.instance_id in client.instance_ids())
    for _ in range(4):
        assert await first() == 0  # one of them tries it, and its first output takes it back
    await eventually(lambda: not client._instances._ejections.is_ejected(_key(client, broken.instance_id)))


def _key(client: Any, instance_id: int) -> str:
    return next(live.key for live in client._instances.all() if live.instance_id == instance_id)


@both_lanes
async def test_an_answer_that_has_begun_goes_to_a_busy_worker_too(mesh: Mesh) -> None:
    lost, busy = Counting(gate=5), Counting()
    runtime = await mesh.serve(NAME, lost.generate, toy(10_000))
    client = await mesh.client(NAME)
    moving = asyncio.ensure_future(read(await client.generate(request())))
    await asyncio.wait_for(lost.is_waiting.wait(), 5)
    other = await mesh.serve(NAME, busy.generate, toy(10_000))
    await eventually(lambda: len(client.instance_ids()) == 2)
    client._instances.mark_busy(_key(client, other.instance_id), "busy by a threshold")
    await mesh.lose(runtime)
    assert (await asyncio.wait_for(moving, 5))[0] == list(range(20))
    await eventually(lambda: client.instance_ids() == [other.instance_id])
    with pytest.raises(OverloadedError, match="busy by a threshold"):
        await client.generate(request())


@both_lanes
async def test_two_workers_that_hand_over_to_each_other(mesh: Mesh) -> None:
    num_left = 0

    class Handing(Counting):
        async def generate(self, request: dict[str, Any], context: Context) -> AsyncIterator[int]:
            nonlocal num_left
            count = 0
            async for number in super().generate(request, context):
                if count == 5 and num_left < 3:
                    num_left += 1
                    raise EngineShutdown
                yield number
                count += 1

    for _ in range(2):
        await mesh.serve(NAME, Handing().generate, toy(10_000))
    client = await mesh.client(NAME)
    await eventually(lambda: len(client.instance_ids()) == 2)
    tokens, ends = await asyncio.wait_for(read(await client.generate(request())), 5)
    assert (tokens, len(ends), num_left) == (list(range(20)), 1, 3)


@both_lanes
async def test_metadata_that_can_not_be_sent_leaves_nothing_behind(mesh: Mesh) -> None:
    await mesh.serve(NAME, one)
    client = await mesh.client(NAME)
    (live,) = client._instances.routable()
    for _ in range(3):
        with pytest.raises(Exception):  # noqa: B017 - whatever it is
            await client.generate(None, context=Context(metadata={"number": 5}))  # type: ignore[dict-item]
    assert (live.connection.num_inflight, live.connection.num_users) == (0, 1)
    assert await collect(await client.generate(None)) == [1]


async def test_a_registry_that_does_not_answer_holds_up_no_request(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model's card says is asked for; not by each request while nobody answers."""
    await mesh.serve(NAME, Counting().generate, toy(10_000))
    client, num_asked = await mesh.client(NAME), 0

    async def silent(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_asked
        num_asked += 1
        raise RegistryError("it does not answer")

    monkeypatch.setattr(client._registry, "list", silent)
    for _ in range(5):
        assert (await read(await client.generate(request())))[0] == list(range(20))
    assert num_asked == 1
