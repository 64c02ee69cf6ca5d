"""The library over real gRPC: streaming, errors, cancel, retry, drain."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from dynamo_grpc import (
    CardMismatchError,
    Context,
    DeadlineError,
    DrainingError,
    EndpointNotFoundError,
    EngineShutdown,
    HandlerEndedError,
    HandlerOutputError,
    HttpError,
    InstanceLostError,
    InternalError,
    InvalidRequestError,
    MeshError,
    ModelNotFoundError,
    NoInstancesError,
    RequestCancelledError,
    RouterMode,
    TooLargeError,
    current_context,
)
from dynamo_grpc.cards import load_model
from dynamo_grpc.connections import CHANNEL_OPTIONS
from dynamo_grpc.errors import from_rpc_error
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import (
    control_pb2,
    control_pb2_grpc,
    endpoint_pb2,
    endpoint_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)

from ..conftest import eventually

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


async def test_values_of_all_kinds_travel(mesh: Mesh) -> None:
    await mesh.serve(NAME, echo)
    client = await mesh.client(NAME)
    values = [1, 2.5, "text", True, None, {"a": [1, {"b": None}]}, []]
    assert await collect(await client.generate(values)) == values
    raw = await client.generate(values, annotated=False)
    assert [value async for value in raw] == values


async def test_bytes_travel_as_they_are(mesh: Mesh) -> None:
    async def reverse(request: bytes) -> bytes:
        return request[::-1]

    await mesh.serve(NAME, reverse)
    assert await collect(await (await mesh.client(NAME)).generate(b"\x00\xff")) == [b"\xff\x00"]


async def test_three_instances_share_the_load(mesh: Mesh) -> None:
    seen: list[int] = []
    for number in range(3):

        async def handler(request: Any, number: int = number) -> int:
            seen.append(number)
            return number

        await mesh.serve(NAME, handler)
    client = await mesh.client(NAME)
    await eventually(lambda: len(client.instance_ids()) == 3)
    for _ in range(30):
        await collect(await client.round_robin(None))
    assert [seen.count(number) for number in range(3)] == [10, 10, 10]
    for instance_id in client.instance_ids():
        (one,) = await collect(await client.direct(None, instance_id))
        assert await collect(await client.direct(None, instance_id)) == [one]
    with pytest.raises(NoInstancesError, match="instance_id=5 not found"):
        await client.direct(None, 5)
    assert len(await collect(await client.random(None))) == 1


async def test_power_of_two_and_least_loaded_avoid_the_busy_one(mesh: Mesh) -> None:
    slow = Endless(silent=True)
    await mesh.serve(NAME, slow.generate)
    await mesh.serve(NAME, echo)
    client = await mesh.client(NAME, RouterMode.LeastLoaded)
    await eventually(lambda: len(client.instance_ids()) == 2)
    waiting = []
    while not slow.started.is_set():
        stream = await client.generate([])
        waiting.append(asyncio.ensure_future(collect(stream)))
        await asyncio.sleep(0.05)
    for _ in range(20):
        assert await collect(await client.generate([1])) == [1]
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


# -- ending a request ---------------------------------------------------------------------------------------------------


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


# -- errors -------------------------------------------------------------------------------------------------------------


class TeapotError(Exception):
    code, message = 418, "short and stout"


@pytest.mark.parametrize(
    ("raised", "cls", "text"),
    [
        (ValueError("n is odd"), InvalidRequestError, "n is odd"),
        (HttpError(418, "a teapot"), HttpError, "a teapot"),
        (TeapotError(), HttpError, "short and stout"),
        (KeyError("secret"), InternalError, "internal error"),
        (asyncio.CancelledError(), RequestCancelledError, "cancelled"),
        (EngineShutdown(), EngineShutdown, "shutting down"),
        (GeneratorExit(), EngineShutdown, "shutting down"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_what_a_handler_raises(
    mesh: Mesh, raised: BaseException, cls: type[MeshError], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: Any) -> AsyncIterator[int]:
        if request == "fail":
            raise raised
        yield 1

    await mesh.serve(NAME, handler)
    client = await mesh.client(NAME)
    with pytest.raises(cls, match=text) as caught, caplog.at_level(logging.ERROR):
        await collect(await client.generate("fail"))
    assert type(caught.value) is cls
    assert "secret" not in str(caught.value)
    if cls is InternalError:
        assert caught.value.error_id
        assert caught.value.error_id in {getattr(record, "error_id", "") for record in caplog.records}
        assert "secret" in caplog.text
    assert await collect(await client.generate("work")) == [1]  # it goes on serving


async def test_what_a_handler_may_not_yield_is_named(mesh: Mesh) -> None:
    async def bad_handler(request: Any) -> AsyncIterator[Any]:
        yield "fine"
        yield {1, 2}

    await mesh.serve(NAME, bad_handler)
    client, seen = await mesh.client(NAME), []
    with pytest.raises(HandlerOutputError, match=r"bad_handler yielded \{1, 2\} \(set\)"):
        async for item in await client.generate(None):
            seen.append(item.data())
    assert seen == ["fine"]


async def test_unknown_names_are_told_with_the_nearest(mesh: Mesh) -> None:
    await mesh.serve(NAME, echo)
    client = await mesh.runtime().endpoint("test.backend.genrate").client()
    with pytest.raises(NoInstancesError, match=r"did you mean 'test\.backend\.generate'"):
        await client.wait_for_instances(0.2)
    with pytest.raises(NoInstancesError, match=r"did you mean 'test\.backend\.generate'"):
        await client.generate(None)


async def test_requests_that_are_no_json_are_refused_before_they_leave(mesh: Mesh) -> None:
    await mesh.serve(NAME, echo)
    with pytest.raises(InvalidRequestError, match="set"):
        await (await mesh.client(NAME)).generate({1})


async def test_a_request_over_the_limit_fails_alone(mesh: Mesh) -> None:
    async def size(request: bytes) -> int:
        return len(request)

    await mesh.serve(NAME, size)
    client = await mesh.client(NAME)
    with pytest.raises(TooLargeError):
        await collect(await client.generate(b"x" * (65 * 2**20)))
    assert await collect(await client.generate(b"x" * (40 * 2**20))) == [40 * 2**20]


# -- instances come and go ----------------------------------------------------------------------------------------------


async def test_a_lost_instance_is_left_before_the_first_output(mesh: Mesh) -> None:
    stuck = Endless(silent=True)
    lost = await mesh.serve(NAME, stuck.generate)
    client = await mesh.client(NAME)
    reading = asyncio.ensure_future(collect(await client.generate(["a", "b"])))
    await asyncio.wait_for(stuck.started.wait(), 2)
    await mesh.serve(NAME, echo)
    await eventually(lambda: len(client.instance_ids()) == 2)
    await mesh.lose(lost)
    assert await asyncio.wait_for(reading, 5) == ["a", "b"]
    await eventually(lambda: len(client.instance_ids()) == 1)
    for _ in range(5):
        assert await collect(await client.generate(["c"])) == ["c"]


async def test_a_lost_instance_is_told_after_the_first_output(mesh: Mesh) -> None:
    endless = Endless()
    lost = await mesh.serve(NAME, endless.generate)
    await mesh.serve(NAME, echo)
    client = await mesh.client(NAME)
    stream = await client.direct(None, lost.instance_id)
    assert (await anext(stream)).data() == 0
    await mesh.lose(lost)
    with pytest.raises((InstanceLostError, RequestCancelledError)):
        await collect(stream)


async def test_engine_shutdown_takes_a_request_elsewhere(mesh: Mesh) -> None:
    async def leaving(request: Any) -> AsyncIterator[int]:
        raise EngineShutdown
        yield 1

    await mesh.serve(NAME, leaving)
    await mesh.serve(NAME, echo)
    client = await mesh.client(NAME)
    await eventually(lambda: len(client.instance_ids()) == 2)
    for _ in range(6):
        assert await collect(await client.generate(["a"])) == ["a"]


async def test_a_client_errors_are_not_tried_elsewhere(mesh: Mesh) -> None:
    calls = []

    async def refusing(request: Any) -> AsyncIterator[int]:
        calls.append(1)
        raise ValueError("no")
        yield 1

    for _ in range(2):
        await mesh.serve(NAME, refusing)
    client = await mesh.client(NAME)
    await eventually(lambda: len(client.instance_ids()) == 2)
    with pytest.raises(InvalidRequestError):
        await collect(await client.generate(None))
    assert len(calls) == 1


async def test_drain_finishes_what_runs_and_refuses_what_is_new(mesh: Mesh) -> None:
    release = asyncio.Event()

    async def slow(request: Any) -> AsyncIterator[int]:
        yield 1
        await release.wait()
        yield 2

    runtime = await mesh.serve(NAME, slow)
    client = await mesh.client(NAME)
    stream = await client.generate(None)
    assert (await anext(stream)).data() == 1
    stopping = asyncio.ensure_future(mesh.stop(runtime))
    await eventually(lambda: not client.instances())
    address = f"127.0.0.1:{runtime.server.port}"
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in endpoint_pb2_grpc.EndpointStub(channel).Call(endpoint_pb2.CallRequest()):
                pass
    assert isinstance(from_rpc_error(caught.value), DrainingError)
    release.set()
    assert await collect(stream) == [2]
    await asyncio.wait_for(stopping, 5)


async def test_drain_by_control(mesh: Mesh) -> None:
    runtime = await mesh.serve(NAME, echo)
    client = await mesh.client(NAME)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{runtime.server.port}") as channel:
        await control_pb2_grpc.ControlStub(channel).Drain(control_pb2.DrainRequest())
        await eventually(lambda: not client.instances())
        await mesh._tasks[runtime]


async def test_a_client_survives_a_restart_of_its_server(mesh: Mesh) -> None:
    first = await mesh.serve(NAME, echo)
    client = await mesh.client(NAME)
    assert await collect(await client.generate([1])) == [1]
    await mesh.stop(first)
    with pytest.raises(NoInstancesError):
        await client.generate([1])
    await mesh.serve(NAME, echo)
    await client.wait_for_instances(5)
    assert await collect(await client.generate([2])) == [2]


async def test_two_endpoints_of_one_process(mesh: Mesh) -> None:
    async def other(request: Any) -> str:
        return "other"

    runtime = mesh.runtime()
    tasks = [
        asyncio.ensure_future(runtime.endpoint("test.backend.a").serve_endpoint(echo)),
        asyncio.ensure_future(runtime.endpoint("test.backend.b").serve_endpoint(other)),
    ]
    a, b = await mesh.client("test.backend.a"), await mesh.client("dyn://test.backend.b")
    assert await collect(await a.generate(["x"])) == ["x"]
    assert await collect(await b.generate(None)) == ["other"]
    assert a.instance_ids() == b.instance_ids()
    runtime.shutdown()
    await asyncio.wait_for(asyncio.gather(*tasks), 5)


async def test_the_health_check_payload_must_give_an_output_first(mesh: Mesh) -> None:
    healthy = asyncio.Event()

    async def handler(request: Any) -> AsyncIterator[Any]:
        if request == "check":
            await healthy.wait()
        yield request

    runtime = mesh.runtime()
    serving = asyncio.ensure_future(runtime.endpoint(NAME).serve_endpoint(handler, health_check_payload="check"))
    client = await mesh.runtime().endpoint(NAME).client()
    with pytest.raises(NoInstancesError):
        await client.wait_for_instances(0.3)
    healthy.set()
    await client.wait_for_instances(5)
    runtime.shutdown()
    await serving


# -- models -------------------------------------------------------------------------------------------------------------


def toy(context_length: int = 100, **options: Any) -> Any:
    return load_model(None, "toy", context_length=context_length, **options)


async def test_a_handler_of_a_model_gets_and_gives_dicts(mesh: Mesh) -> None:
    seen: list[Any] = []

    async def handler(request: dict[str, Any], context: Context) -> AsyncIterator[Any]:
        seen.append(request)
        yield {"token_ids": [7, 8], "index": 0}
        yield {"token_ids": [9], "finish_reason": "stop"}

    await mesh.serve(NAME, handler, toy())
    client = await mesh.client(NAME)
    request = {"token_ids": [1, 2], "sampling_options": {"temperature": 0.0}, "stop_conditions": {"max_tokens": 5}}
    items = await collect(await client.generate(request))
    assert items == [
        {"token_ids": [7, 8], "index": 0},
        {
            "token_ids": [9],
            "index": 0,
            "finish_reason": "stop",
            "completion_usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
        },
    ]
    (got,) = seen
    assert got["sampling_options"] == {"temperature": 0.0}
    assert got["stop_conditions"] == {"max_tokens": 5}
    assert got["token_ids"] == [1, 2]
    assert await collect(await client.generate([3, 4])) is not None


async def test_two_cards_of_one_model_the_first_holds(mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    async def handler(request: Any) -> AsyncIterator[int]:
        yield 5

    first = await mesh.serve("test.a.generate", handler, toy(100))
    second = await mesh.serve("test.b.generate", handler, toy(200))
    one, two = toy(100).card.checksum, toy(200).card.checksum
    served = second.server.served["test.b.generate"]
    await eventually(lambda: served.refused_because)
    assert one in served.refused_because
    assert two in served.refused_because
    assert f"card {one}" in caplog.text
    async with grpc.aio.insecure_channel(f"127.0.0.1:{second.server.port}") as channel:
        answer = await control_pb2_grpc.ControlStub(channel).Describe(control_pb2.DescribeRequest())
        assert one in answer.reason
    await mesh.stop(first)
    await eventually(lambda: not served.refused_because)  # now its own card is the first


async def test_a_request_for_another_card_is_refused(mesh: Mesh) -> None:
    async def handler(request: Any) -> AsyncIterator[int]:
        yield 5

    await mesh.serve(NAME, handler, toy())
    with pytest.raises(CardMismatchError, match=f"other.*{toy().card.checksum}"):
        await collect(await (await mesh.client(NAME)).generate({"token_ids": [1], "mdc_sum": "other"}))


async def test_plain_stubs_get_the_same_with_details(mesh: Mesh) -> None:
    async def handler(request: Any) -> AsyncIterator[Any]:
        yield 5
        yield [6, 7]

    runtime = await mesh.serve(NAME, handler, toy(capabilities=["n"]))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{runtime.server.port}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        request = inference_pb2.PreprocessedRequest(token_ids=[1])
        responses = [response async for response in stub.Generate(request)]
        assert [t for r in responses for c in r.choices for t in c.token_ids] == [5, 6, 7]
        assert responses[0].worker.instance_id == runtime.instance_id
        once = await stub.GenerateOnce(request)
        assert list(once.choices[0].token_ids) == [5, 6, 7]
        assert once.usage == responses[-1].usage
        assert once.choices[0].finish.reason == inference_pb2.FINISH_REASON_STOP
        for wrong, cls in (
            (inference_pb2.PreprocessedRequest(token_ids=[1], model="nope"), ModelNotFoundError),
            (inference_pb2.PreprocessedRequest(), InvalidRequestError),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GenerateOnce(wrong, metadata=(("x-request-id", "my-id"),))
            assert isinstance(from_rpc_error(caught.value), cls)
            assert dict(list(caught.value.trailing_metadata()))["x-request-id"] == "my-id"  # type: ignore[arg-type]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in endpoint_pb2_grpc.EndpointStub(channel).Call(
                endpoint_pb2.CallRequest(endpoint="test.backend.genrate")
            ):
                pass
        assert isinstance(error := from_rpc_error(caught.value), EndpointNotFoundError)
        assert "did you mean 'test.backend.generate'" in error.message


async def test_lost_and_doubled_outputs_are_noticed(mesh: Mesh) -> None:
    class Bad(inference_pb2_grpc.InferenceServicer):
        async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:  # type: ignore[override]
            for sequence in request.token_ids:
                yield inference_pb2.GenerateResponse(sequence=sequence)

    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(Bad(), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    runtime = await mesh.serve(NAME, echo, toy())
    served = runtime.server.served[NAME]
    served.instance.address = f"127.0.0.1:{port}"
    await runtime._registrations.copy().pop().update({served_key(served): to_json(served.instance)})
    client = await mesh.client(NAME)
    await eventually(lambda: client.instances()[0].address.endswith(str(port)))
    for sequences, what in (([0, 2], "lost"), ([0, 1, 1], "doubled")):
        with pytest.raises(HandlerEndedError, match=what):
            await collect(await client.generate(sequences))
    assert await collect(await client.generate([0, 0, 0])) == []  # one that doesn't number is left alone
    await server.stop(None)


def served_key(served: Any) -> str:
    from dynamo_grpc.names import EndpointName

    return EndpointName.parse(served.name).instance_key(served.instance.instance_id)


def to_json(message: Any) -> bytes:
    from dynamo_grpc.records import to_json as convert

    return convert(message)


async def test_another_process_at_an_old_address_is_not_taken_for_the_instance(mesh: Mesh) -> None:
    """A killed worker's lease stands for seconds; who gets its port meanwhile may be anybody."""
    other = mesh.runtime()
    await other.start_server()  # starting: nothing is served yet
    good = await mesh.serve(NAME, echo)
    stale = await mesh.serve("test.other.generate", echo)
    from dynamo_grpc.names import EndpointName

    name = EndpointName.parse(NAME)
    for instance_id, address in ((5, f"127.0.0.1:{other.server.port}"), (6, f"127.0.0.1:{stale.server.port}")):
        instance = good.server.served[NAME].instance
        copy = type(instance)()
        copy.CopyFrom(instance)
        copy.instance_id, copy.address = instance_id, address
        await mesh.registry.register({name.instance_key(instance_id): to_json(copy)})
    client = await mesh.client(NAME)
    await eventually(lambda: len(client.instance_ids()) == 3)
    for _ in range(9):
        assert await collect(await client.generate(["a"])) == ["a"]
    assert sorted(client.instance_ids()) == [5, good.instance_id]  # 6 is known to be somebody else


# -- the server ---------------------------------------------------------------------------------------------------------


async def test_a_servicer_of_ones_own_beside_ours(mesh: Mesh) -> None:
    async def shout(request: bytes, context: Any) -> bytes:
        return request.upper()

    method = grpc.unary_unary_rpc_method_handler(shout)
    handler = grpc.method_handlers_generic_handler("my.package.Shout", {"Shout": method})
    runtime = mesh.runtime()
    runtime.server.add_servicer(lambda server: server.add_generic_rpc_handlers((handler,)), "my.package.Shout")
    serving = asyncio.ensure_future(runtime.endpoint(NAME).serve_endpoint(echo))
    client = await mesh.client(NAME)
    assert await collect(await client.generate([1])) == [1]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{runtime.server.port}") as channel:
        assert await channel.unary_unary("/my.package.Shout/Shout")(b"hey") == b"HEY"
    runtime.shutdown()
    await serving


async def test_a_proxy_in_the_environment_is_not_asked(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    await mesh.serve(NAME, echo)
    assert await collect(await (await mesh.client(NAME)).generate([1])) == [1]


async def test_load_is_told_when_it_changes(mesh: Mesh) -> None:
    endless = Endless(silent=True)
    runtime = await mesh.serve(NAME, endless.generate)
    client = await mesh.client(NAME)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{runtime.server.port}") as channel:
        request = control_pb2.WatchLoadRequest()
        request.min_interval.FromMilliseconds(10)
        loads = control_pb2_grpc.ControlStub(channel).WatchLoad(request)
        assert (await loads.read()).num_running == 0
        reading = asyncio.ensure_future(collect(await client.generate(None)))
        assert (await loads.read()).num_running == 1
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert (await loads.read()).num_running == 0
        loads.cancel()


@pytest.mark.full
async def test_a_stream_that_is_silent_for_45_s_lives(mesh: Mesh) -> None:
    async def slow(request: Any) -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(45)
        yield 2

    await mesh.serve(NAME, slow)
    assert await collect(await (await mesh.client(NAME)).generate(None)) == [1, 2]


# -- what once went wrong -------------------------------------------------------------------------------------------------


async def test_one_of_two_endpoints_that_ends_early_holds_nobody_up(mesh: Mesh) -> None:
    runtime = mesh.runtime()
    a = asyncio.ensure_future(runtime.endpoint("test.backend.a").serve_endpoint(echo))
    b = asyncio.ensure_future(runtime.endpoint("test.backend.b").serve_endpoint(echo))
    client_a, client_b = await mesh.client("test.backend.a"), await mesh.client("test.backend.b")
    a.cancel()
    await asyncio.gather(a, return_exceptions=True)
    await eventually(lambda: not client_a.instances())
    assert await collect(await client_b.generate([1])) == [1]
    runtime.shutdown()
    await asyncio.wait_for(b, 5)


async def test_a_handler_that_never_awaits_can_be_cancelled(mesh: Mesh) -> None:
    steps = []

    async def busy(request: Any) -> AsyncIterator[int]:
        while True:
            steps.append(1)
            yield 5

    runtime = await mesh.serve(NAME, busy, toy(context_length=10**9))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{runtime.server.port}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.GenerateOnce(inference_pb2.PreprocessedRequest(token_ids=[1]), timeout=0.2)
        await eventually(lambda: not runtime.server.requests)
        count = len(steps)
        await asyncio.sleep(0.1)
        assert len(steps) == count


@pytest.mark.parametrize("request_id", ["plain", "räksmörgås", "x" * 300])
async def test_a_stop_that_overtakes_its_request_is_not_lost(mesh: Mesh, request_id: str) -> None:
    endless = Endless()
    await mesh.serve(NAME, endless.generate)
    client, context = await mesh.client(NAME), Context(request_id)
    stream = await client.generate(None, context=context)
    context.stop_generating()
    await asyncio.wait_for(collect(stream), 5)
    assert endless.how == "stopped"


@pytest.mark.parametrize("text", ["x" * 5000, "中" * 2000, "\ud800 a lone surrogate"])
async def test_any_text_of_an_error_arrives_with_its_status(mesh: Mesh, text: str) -> None:
    async def handler(request: Any) -> AsyncIterator[int]:
        raise InvalidRequestError(text, param="x")
        yield 1

    await mesh.serve(NAME, handler)
    with pytest.raises(InvalidRequestError) as caught:
        await collect(await (await mesh.client(NAME)).generate(None))
    assert caught.value.param == "x"
    assert caught.value.message[:100] == text[:100].replace("\ud800", "?")


async def test_the_text_of_a_plain_servicers_exception_is_not_for_clients(mesh: Mesh) -> None:
    class Plain(endpoint_pb2_grpc.EndpointServicer):
        async def Call(self, request: Any, context: Any) -> Any:  # type: ignore[override]
            raise KeyError("secret")
            yield

    server = grpc.aio.server()
    endpoint_pb2_grpc.add_EndpointServicer_to_server(Plain(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    runtime = await mesh.serve(NAME, echo)
    instance = runtime.server.served[NAME].instance
    instance.address = f"127.0.0.1:{port}"
    await runtime._registrations.copy().pop().update({served_key(runtime.server.served[NAME]): to_json(instance)})
    client = await mesh.client(NAME)
    await eventually(lambda: client.instances()[0].address.endswith(str(port)))
    with pytest.raises(InternalError) as caught:
        await collect(await client.generate(None))
    assert "secret" not in str(caught.value)
    await server.stop(None)


async def test_a_refused_worker_serves_no_client_of_the_library(mesh: Mesh) -> None:
    async def first(request: Any) -> AsyncIterator[int]:
        yield 1

    async def second(request: Any) -> AsyncIterator[int]:
        yield 2

    await mesh.serve(NAME, first, toy(100))
    refused = await mesh.serve(NAME, second, toy(200))
    await eventually(lambda: refused.server.served[NAME].refused_because)
    client = await mesh.client(NAME)
    await eventually(lambda: len(client.instances()) == 2)
    for _ in range(6):
        items = await collect(await client.generate([5]))
        assert items[0]["token_ids"] == [1]


async def test_closing_twice_and_late_is_fine(mesh: Mesh) -> None:
    await mesh.serve(NAME, echo)
    async with mesh.runtime() as runtime:
        async with await runtime.endpoint(NAME).client() as client:
            await client.wait_for_instances(5)
            stream = await client.generate([1, 2])
    await stream.aclose()
