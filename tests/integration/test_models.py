"""Models: dicts, cards, plain stubs, sequence numbers."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from dynamo_grpc import (
    CardMismatchError,
    Context,
    EndpointNotFoundError,
    HandlerEndedError,
    HandlerOutputError,
    InvalidRequestError,
    ModelNotFoundError,
)
from dynamo_grpc.status import from_rpc_error
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import (
    control_pb2,
    control_pb2_grpc,
    endpoint_pb2,
    endpoint_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)

from ..conftest import both_lanes, eventually
from .handlers import NAME, collect, echo, served_key, to_json, toy

pytestmark = both_lanes


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
            for token_id in request.token_ids:
                delta = inference_pb2.ChoiceDelta(token_ids=[token_id])
                yield inference_pb2.GenerateResponse(sequence=token_id - 10, choices=[delta])

    async def tokens(client: Any, numbers: list[int]) -> list[int]:
        asked = {"token_ids": numbers, "stop_conditions": {"max_tokens": 3}}
        items = await collect(await client.generate(asked))
        return [token_id for item in items for token_id in item["token_ids"]]

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
    for numbers in ([10, 12], [10, 11, 11, 12], [11, 10, 12]):
        with pytest.raises(HandlerOutputError, match=r"the worker left some out|twice"):
            await tokens(client, numbers)
    with pytest.raises(HandlerEndedError, match="ended without a finish reason"):
        await tokens(client, [10, 11])
    assert await tokens(client, [10, 11, 12]) == [10, 11, 12]  # it was whole
    assert await tokens(client, [10, 10, 10]) == [10, 10, 10]  # a worker that doesn't number is left alone
    await server.stop(None)


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
