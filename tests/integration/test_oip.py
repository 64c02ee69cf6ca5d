"""The Open Inference Protocol at the frontend's gRPC port; Triton's own client against it is in tests/e2e."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from dynamo_frontend.oip import open_inference_pb2 as pb
from dynamo_frontend.oip import open_inference_pb2_grpc as pb_grpc

from dynamo_grpc.testing import Mesh

from ..conftest import eventually, metric
from .front import Front, Watched, front_of, serve_beside
from .test_ingress import check_error


@pytest.fixture
async def grpc_front(mesh: Mesh) -> AsyncIterator[Front]:
    import dynamo_workers.tiny as tiny

    await mesh.serve_worker(tiny.Tiny())
    async with front_of(mesh, grpc_port=0, instance_wait_s=0.5) as front:
        await eventually(front.frontend.catalog.ready)
        yield front


@pytest.fixture
async def stub(grpc_front: Front) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{grpc_front.frontend.ingress.port}") as channel:
        yield pb_grpc.GRPCInferenceServiceStub(channel)


def ask(text: str | None = "The sea", *, model: str = "tiny", streaming: bool | None = None, **options: Any) -> Any:
    request = pb.ModelInferRequest(model_name=model, id="mine")
    if text is not None:
        tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(text.encode())
    if streaming is not None:
        request.inputs.add(name="streaming", datatype="BOOL", shape=[1]).contents.bool_contents.append(streaming)
    for name, value in {"max_tokens": 8, "seed": 1, **options}.items():
        kind = {int: "int64_param", float: "double_param", str: "string_param", bool: "bool_param"}[type(value)]
        setattr(request.parameters[name], kind, value)
    return request


def read(response: Any) -> dict[str, list[str]]:
    """The outputs by name."""
    values = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        elements, at = [], 0
        while at < len(raw):
            (size,) = struct.unpack_from("<I", raw, at)
            elements.append(raw[at + 4 : at + 4 + size].decode())
            at += 4 + size
        assert list(output.shape) == [len(elements)]
        values[output.name] = elements
    return values


async def test_it_answers_as_completions_do(grpc_front: Front, stub: Any) -> None:
    body = {"model": "tiny", "prompt": "The sea", "max_tokens": 8, "seed": 1}
    text = (await grpc_front.post(body, "/v1/completions")).json()["choices"][0]["text"]
    response = await stub.ModelInfer(ask())
    assert read(response) == {"text_output": [text], "finish_reason": ["length"]}
    assert (response.id, response.model_name) == ("mine", "tiny")
    by_json = ask()
    by_json.parameters.clear()
    packed = json.dumps({"max_tokens": 8, "seed": 1, "n": 3, "stop": ["zzz"]}).encode()
    by_json.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1]).contents.bytes_contents.append(packed)
    assert len(read(await stub.ModelInfer(by_json))["text_output"]) == 3
    raw = ask(None)
    raw.inputs.add(name="text_input", datatype="BYTES", shape=[1, 1])
    raw.inputs.add(name="streaming", datatype="BOOL", shape=[1])
    raw.raw_input_contents.extend([struct.pack("<I", 7) + b"The sea", b"\0"])
    raw.outputs.add(name="text_output")
    assert read(await stub.ModelInfer(raw)) == {"text_output": [text]}


async def outputs_of(stub: Any, *requests: Any, metadata: Any = ()) -> list[Any]:
    async def send() -> AsyncIterator[Any]:
        for request in requests:
            yield request

    return [output async for output in stub.ModelStreamInfer(send(), metadata=metadata)]


async def test_a_stream_of_several_requests(grpc_front: Front, stub: Any) -> None:
    text = read(await stub.ModelInfer(ask()))["text_output"][0]
    second, wrong = ask(streaming=False), ask(model="nope", streaming=True)
    second.id, wrong.id = "second", "wrong"
    outputs = await outputs_of(stub, ask(streaming=True), second, wrong)
    by_id: dict[str, list[Any]] = {"mine": [], "second": [], "wrong": []}
    for output in outputs:
        by_id[output.infer_response.id].append(output)
    assert "".join(read(o.infer_response)["text_output"][0] for o in by_id["mine"]) == text
    assert [read(o.infer_response)["text_output"] for o in by_id["second"]] == [[text]]
    assert [o.error_message for o in by_id["wrong"]] == ["there is no model 'nope'; there is 'tiny'"]
    for group in by_id.values():
        flags = [o.infer_response.parameters["triton_final_response"].bool_param for o in group]
        assert flags == [False] * (len(flags) - 1) + [True]
    page = (await grpc_front.http.get("/metrics")).text
    assert metric(page, "dynamo_frontend_requests_total", endpoint="model_stream_infer", status="success") == 2


async def test_a_failure_ends_the_stream_where_that_is_asked_for(stub: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await outputs_of(stub, ask(model="nope"), metadata=(("triton_grpc_error", "true"),))
    check_error(caught.value, "NOT_FOUND", "MODEL_NOT_FOUND", "no model 'nope'", "model")


async def test_leaving_a_stream_ends_its_requests(mesh: Mesh, grpc_front: Front, stub: Any) -> None:
    worker = Watched()
    await serve_beside(mesh, grpc_front, worker)
    call = stub.ModelStreamInfer()
    await call.write(ask(model="watched", streaming=True, max_tokens=8000))
    assert not (await call.read()).error_message
    call.cancel()
    await asyncio.wait_for(worker.ended.wait(), 5)
    await eventually(lambda: not grpc_front.frontend.ingress.requests)


async def test_a_stream_on_which_nothing_runs_holds_nobody_up(grpc_front: Front, stub: Any) -> None:
    ingress = grpc_front.frontend.ingress
    call = stub.ModelStreamInfer()
    await call.write(ask(streaming=False))
    assert not (await call.read()).error_message
    await eventually(lambda: not ingress._held)
    assert ingress._load()[0]["num_running"] == 0
    await asyncio.wait_for(ingress.stop(60.0), 5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
        raise AssertionError("the stream is still open")
    check_error(caught.value, "UNAVAILABLE", "ENGINE_SHUTDOWN", "the frontend is shutting down")


@pytest.mark.parametrize(
    ("request_", "code", "text", "field"),
    [
        (ask(None), "INVALID_ARGUMENT", "give the prompt as text_input", "text_input"),
        (ask(""), "INVALID_ARGUMENT", "the prompt is empty", "prompt"),
        (ask(model="nope"), "NOT_FOUND", "there is no model 'nope'", "model"),
        (ask(streaming=True), "INVALID_ARGUMENT", "streaming is for ModelStreamInfer", "streaming"),
        (ask(top_p=2.0), "INVALID_ARGUMENT", "top_p is 2", "top_p"),
        (ask(tempo=1.0), "INVALID_ARGUMENT", "there is no parameter 'tempo'", "tempo"),
        (ask(prompt="x"), "INVALID_ARGUMENT", "prompt is no parameter", "prompt"),
        (ask(max_tokens="many"), "INVALID_ARGUMENT", "max_tokens", "max_tokens"),
        (ask(suffix="x"), "UNIMPLEMENTED", "suffix is not supported", "suffix"),
    ],
)
async def test_errors(stub: Any, request_: Any, code: str, text: str, field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(request_)
    reason = {"NOT_FOUND": "MODEL_NOT_FOUND", "UNIMPLEMENTED": "UNSUPPORTED"}.get(code, "INVALID_REQUEST")
    check_error(caught.value, code, reason, text, field)


async def test_tensors_that_are_none(stub: Any) -> None:
    async def says(change: Any) -> str:
        request = ask()
        change(request)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ModelInfer(request)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        return str(caught.value.details())

    assert "no input 'pixels'" in await says(lambda r: r.inputs.add(name="pixels"))
    assert "it must be BYTES" in await says(lambda r: setattr(r.inputs[0], "datatype", "FP32"))
    assert "it has one element" in await says(lambda r: r.inputs[0].shape.append(2))
    assert "must have one element" in await says(lambda r: r.inputs[0].contents.bytes_contents.append(b"x"))
    assert "is no UTF-8" in await says(lambda r: r.inputs[0].contents.bytes_contents.__setitem__(0, b"\xff"))
    assert "for 1 inputs" in await says(lambda r: r.raw_input_contents.extend([b"", b""]))
    assert "must have one element" in await says(lambda r: r.raw_input_contents.append(b"\x05\0\0\0x"))
    assert "no output 'pixels'" in await says(lambda r: r.outputs.add(name="pixels"))
    for packed, text in ((b"{", "is no JSON"), (b"[1]", "must be a JSON object")):

        def add(request: Any, packed: bytes = packed) -> None:
            tensor = request.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1])
            tensor.contents.bytes_contents.append(packed)

        assert text in await says(add)


async def test_what_there_is(stub: Any) -> None:
    assert (await stub.ServerLive(pb.ServerLiveRequest())).live
    assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
    assert (await stub.ModelReady(pb.ModelReadyRequest(name="tiny"))).ready
    assert not (await stub.ModelReady(pb.ModelReadyRequest(name="nope"))).ready
    metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name="tiny"))
    assert [tensor.name for tensor in metadata.inputs] == ["text_input", "streaming", "sampling_parameters"]
    config = (await stub.ModelConfig(pb.ModelConfigRequest(name="tiny"))).config
    assert [output.name for output in config.output] == ["text_output", "finish_reason"]
    assert config.model_transaction_policy.decoupled
    index = await stub.RepositoryIndex(pb.RepositoryIndexRequest())
    assert [(model.name, model.state) for model in index.models] == [("tiny", "READY")]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelMetadata(pb.ModelMetadataRequest(name="nope"))
    check_error(caught.value, "NOT_FOUND", "MODEL_NOT_FOUND", "there is 'tiny'", "model")
