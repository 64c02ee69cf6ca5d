"""The shared delivery: it is used, falls back, comes back, and loses nothing."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from dynamo_grpc import Context, HandlerOutputError, SlowReaderError
from dynamo_grpc.inbox import Inbox
from dynamo_grpc.lane import FRAME_BYTES, FRAME_TOKENS, Lane
from dynamo_grpc.records import to_entries
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import endpoint_pb2, inference_pb2

from ..conftest import eventually
from .handlers import NAME, Endless, collect, echo


@pytest.fixture
def frame_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of outputs of each frame that is written."""
    sizes: list[int] = []
    next_frame = Lane.next_frame

    def counted(lane: Lane) -> Any:
        frame = next_frame(lane)
        sizes.append(len(frame.outputs) + len(frame.tokens.ids))
        return frame

    monkeypatch.setattr(Lane, "next_frame", counted)
    return sizes


async def test_many_requests_share_frames(mesh: Mesh, frame_sizes: list[int]) -> None:
    tick = asyncio.Event()

    async def stepping(request: int) -> AsyncIterator[int]:
        for number in range(20):
            await tick.wait()
            yield request * 100 + number
            await asyncio.sleep(0)

    await mesh.serve(NAME, stepping)
    client = await mesh.client(NAME)
    streams = [asyncio.ensure_future(collect(await client.generate(number))) for number in range(50)]
    await asyncio.sleep(0.2)
    tick.set()
    for number, outputs in enumerate(await asyncio.gather(*streams)):
        assert outputs == [number * 100 + i for i in range(20)]
    assert sum(frame_sizes) == 50 * 20
    assert len(frame_sizes) < 500
    assert max(frame_sizes) > 10


async def test_a_delivery_that_breaks_in_the_middle_loses_nothing_and_comes_back(
    mesh: Mesh, frame_sizes: list[int]
) -> None:
    go = asyncio.Event()

    async def counting(request: Any) -> AsyncIterator[int]:
        for number in range(1000):
            yield number
            if number == 300:
                await go.wait()
            if number % 50 == 0:
                await asyncio.sleep(0.001)

    runtime = await mesh.serve(NAME, counting)
    client = await mesh.client(NAME)
    connection = client._instances.routable()[0].connection
    stream = await client.generate(None)
    seen = [(await anext(stream)).data() for _ in range(10)]
    (lane,) = runtime.server.requests.lanes.values()
    lane.finish()  # the Deliver call ends; the request's own goes on
    await eventually(lambda: not lane.is_open)
    go.set()
    assert seen + await collect(stream) == list(range(1000))
    assert 0 < sum(frame_sizes) < 1000
    assert connection.lane is not None
    await eventually(lambda: connection.lane.name)  # type: ignore[union-attr]
    before = sum(frame_sizes)
    assert await collect(await client.generate(None)) == list(range(1000))
    assert sum(frame_sizes) == before + 1000


async def test_outputs_in_flight_when_a_delivery_closes_are_sent_again(mesh: Mesh) -> None:
    lane = Lane()
    for number in range(4):
        lane.put(number % 2, inference_pb2.GenerateResponse(sequence=number))
        lane.put_token(number % 2, number + 4, 100)
    assert [message.sequence for message in lane.take_back(0)] == [0, 2, 4, 6]
    assert [message.sequence for message in lane.take_back(1)] == [1, 3, 5, 7]
    assert lane.take_back(0) == []
    assert not lane.has_outputs


async def test_a_handler_that_never_awaits_delays_nobody(mesh: Mesh) -> None:
    async def busy(request: int) -> AsyncIterator[int]:
        for number in range(request):
            yield number

    await mesh.serve(NAME, busy)
    client = await mesh.client(NAME)
    done: list[str] = []

    async def read(name: str, count: int) -> None:
        outputs = 0
        async for _ in await client.generate(count):
            outputs += 1
            if outputs == 1:
                done.append(f"{name} began")
        assert outputs == count
        done.append(f"{name} ended")

    await asyncio.gather(read("long", 20_000), read("short", 5))
    assert done.index("long began") < done.index("long ended")
    assert done.index("short ended") < done.index("long ended")


async def test_a_handler_that_never_awaits_can_be_cancelled_in_the_middle(mesh: Mesh) -> None:
    steps = 0

    async def busy(request: Any) -> AsyncIterator[int]:
        nonlocal steps
        while True:
            steps += 1
            yield steps

    runtime = await mesh.serve(NAME, busy)
    client = await mesh.client(NAME)
    async with await client.generate(None) as stream:
        async for item in stream:
            if item.data() == 100:
                break
    await eventually(lambda: not runtime.server.requests)
    count = steps
    await asyncio.sleep(0.05)
    assert steps == count


async def test_what_is_sent_last_arrives_although_the_worker_stops(mesh: Mesh) -> None:
    async def quick(request: Any, context: Context) -> AsyncIterator[int]:
        yield 0
        await asyncio.sleep(0.02)
        for number in range(1, 200):
            yield number

    for _ in range(15):
        runtime = await mesh.serve(NAME, quick)
        client = await mesh.client(NAME)
        streams = [await client.generate(None) for _ in range(10)]
        for stream in streams:
            await anext(stream)
        stopping = asyncio.ensure_future(mesh.stop(runtime))
        for stream in streams:
            assert [item.data() async for item in stream] == list(range(1, 200))
        await stopping


async def test_frames_are_bounded_and_first_outputs_go_first() -> None:
    def sizes(*lengths: int) -> list[int]:
        lane = Lane()
        for length in lengths:
            lane.put(1, endpoint_pb2.CallResponse(data=b"x" * length))
        counted = []
        while lane.has_outputs:
            counted.append(len(lane.next_frame().outputs))
        return counted

    third = FRAME_BYTES * 3 // 8
    assert sizes(*[third] * 7) == [2, 2, 2, 1]
    lane = Lane()
    for number in range(5):
        lane.put(1, inference_pb2.GenerateResponse(sequence=number))
    lane.put(2, inference_pb2.GenerateResponse(), is_first=True)
    assert [output.id for output in lane.next_frame().outputs] == [2, 1, 1, 1, 1, 1]


async def test_an_output_that_comes_by_both_ways_counts_once() -> None:
    inbox = Inbox()
    inbox.put_by_lane(0, inference_pb2.GenerateResponse())
    inbox.put(inference_pb2.GenerateResponse(sequence=0))
    inbox.put(inference_pb2.GenerateResponse(sequence=1))
    read: list[Any] = []
    await inbox.read(lambda outputs: bool(read.extend(outputs)))
    assert [output.sequence for output in read] == [0, 1]


async def test_single_tokens_do_not_wait_for_messages() -> None:
    lane = Lane()
    for number in range(100):
        lane.put(1, endpoint_pb2.CallResponse(data=b"x" * 1000))
        lane.put_token(2, number, 7)
    frame = lane.next_frame()
    assert 0 < len(frame.outputs) < 100
    assert len(frame.tokens.ids) == 100


async def test_single_tokens_travel_as_rows() -> None:
    lane = Lane()
    for number in range(FRAME_TOKENS + 1):
        lane.put_token(1, number, number * 2)
    lane.put(2, inference_pb2.GenerateResponse(), is_first=True)
    frame = lane.next_frame()
    assert [output.id for output in frame.outputs] == [2]
    assert list(frame.tokens.ids) == [1] * FRAME_TOKENS
    assert list(frame.tokens.sequences) == list(range(FRAME_TOKENS))
    assert frame.tokens.token_ids[-1] == FRAME_TOKENS * 2 - 2
    assert list(lane.next_frame().tokens.token_ids) == [FRAME_TOKENS * 2]
    assert not lane.has_outputs


async def test_large_outputs_travel(mesh: Mesh) -> None:
    async def large(request: int) -> AsyncIterator[bytes]:
        for number in range(4):
            yield bytes([number]) * request

    await mesh.serve(NAME, large)
    client = await mesh.client(NAME)
    outputs = await collect(await client.generate(5_000_000))
    assert [(len(output), output[0]) for output in outputs] == [(5_000_000, number) for number in range(4)]


async def test_a_client_that_leaves_a_stream_gets_nothing_more_of_it(mesh: Mesh) -> None:
    endless = Endless()
    await mesh.serve(NAME, endless.generate)
    client = await mesh.client(NAME)
    connection = client._instances.routable()[0].connection
    async with await client.generate(None) as stream:
        await anext(stream)
        assert connection.lane is not None
        assert len(connection.lane._inboxes) == 1
    assert connection.lane._inboxes == {}
    await asyncio.wait_for(endless.ended.wait(), 2)


async def test_a_name_is_taken_once(mesh: Mesh) -> None:
    import grpc

    await mesh.serve(NAME, echo)
    client = await mesh.client(NAME)
    connection = client._instances.routable()[0].connection
    assert connection.lane is not None
    for name in ("", connection.lane.name):
        call = connection.inference.Deliver(inference_pb2.DeliverRequest(delivery=name))
        with pytest.raises(grpc.aio.AioRpcError, match="no other one has"):
            await call.read()


async def test_a_reader_that_never_reads_costs_bounded_memory(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    import dynamo_grpc.inbox as inbox

    monkeypatch.setattr(inbox, "MAX_UNREAD_BYTES", 1_000)
    endless = Endless()

    async def busy(request: Any) -> AsyncIterator[int]:
        async for number in endless.generate(request, Context()):
            for _ in range(50):
                yield number

    await mesh.serve(NAME, busy)
    client = await mesh.client(NAME)
    stream = await client.generate(None)
    await asyncio.wait_for(endless.ended.wait(), 10)
    with pytest.raises(SlowReaderError, match="the reader is too slow"):
        await collect(stream)


@pytest.mark.parametrize("number", ["", "x", "-1", "9" * 30])
async def test_a_call_that_names_no_number_gets_its_outputs_itself(mesh: Mesh, number: str) -> None:
    from dynamo_grpc.metadata import DELIVERY, DELIVERY_ID

    runtime = await mesh.serve(NAME, echo)
    client = await mesh.client(NAME)
    connection = client._instances.routable()[0].connection
    assert connection.lane is not None
    request = endpoint_pb2.CallRequest()
    request.json.list_value.values.add(number_value=7)
    call = connection.endpoint.Call(request, metadata=((DELIVERY, connection.lane.name), (DELIVERY_ID, number)))
    assert [response.json.number_value async for response in call] == [7]
    await eventually(lambda: not runtime.server.requests)


@pytest.mark.parametrize(
    ("sequences", "what"),
    [
        ([0, 1, 2, 2, 3], "gave output 2 twice"),
        ([0, 1, 3, 4], "output 3 came after 1"),
        ([0, 2], "output 2 came after 0"),
    ],
)
@pytest.mark.parametrize("others", [0, 1])
async def test_a_wrong_number_ends_the_request_loudly(mesh: Mesh, sequences: list[int], what: str, others: int) -> None:
    """A worker that numbers wrongly can't be trusted, also if another one is there: a plain servicer, by its own call."""
    from dynamo_grpc.v1 import inference_pb2_grpc, model_card_pb2

    num_asked, has_ended = 0, asyncio.Event()

    class Servicer(inference_pb2_grpc.InferenceServicer):
        async def Generate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
            nonlocal num_asked
            num_asked += 1
            try:
                for sequence in sequences:
                    delta = inference_pb2.ChoiceDelta(token_ids=[sequence])
                    yield inference_pb2.GenerateResponse(sequence=sequence, choices=[delta])
                await asyncio.Event().wait()  # it need not end to be found out
            finally:
                has_ended.set()

    async with contextlib.AsyncExitStack() as stack:
        for number in range(1 + others):
            server = grpc.aio.server()
            inference_pb2_grpc.add_InferenceServicer_to_server(Servicer(), server)  # type: ignore[no-untyped-call]
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            stack.push_async_callback(server.stop, None)
            instance = model_card_pb2.Instance(
                namespace="test", component="backend", endpoint="generate", instance_id=number + 1, epoch=1,
                address=f"127.0.0.1:{port}", kind=model_card_pb2.ENDPOINT_KIND_MODEL, model="toy",
            )  # fmt: skip
            await mesh.registry.register(to_entries(instance, None))
        client = await mesh.client(NAME)
        await eventually(lambda: len(client.instance_ids()) == 1 + others)
        lanes = [live.connection.lane for live in client._instances.routable()]
        await eventually(lambda: all(lane and lane.has_answered and not lane.name for lane in lanes))
        seen = []
        with pytest.raises(HandlerOutputError, match=what):
            async for item in await client.generate([1, 2]):
                seen += item.data()["token_ids"]
        assert seen == list(range(len(seen)))
        await asyncio.wait_for(has_ended.wait(), 5)
        assert num_asked == 1


async def test_a_number_that_never_comes_by_the_delivery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_grpc.inbox._LATE_S", 0.05)
    inbox, broken = Inbox(), []
    inbox.has_lane, inbox.on_broken = True, lambda: broken.append(1)
    for sequence in (0, 1, 3, 4):
        inbox.put_by_lane(sequence, inference_pb2.GenerateResponse(sequence=sequence))
    await eventually(lambda: broken)
    assert "number 2 never came" in str(inbox.error)
    twice = Inbox()
    twice.has_lane = True
    for sequence in (0, 1, 1):
        twice.put_by_lane(sequence, inference_pb2.GenerateResponse(sequence=sequence))
    assert "gave output 1 twice" in str(twice.error)
