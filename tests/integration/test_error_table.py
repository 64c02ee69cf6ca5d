"""Every error of the mesh, raised by a worker, as clients of HTTP and of gRPC see it: the first thing and in the middle."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from dynamo_grpc import Context, HttpError, MeshError, Worker, errors, status
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import inference_pb2, inference_pb2_grpc

from ..conftest import both_lanes, eventually
from .front import FOLDER, Front, front_of

UNTOLD = {errors.MeshError, errors.ConfigurationError, errors.HttpError}
#: What a client of ours says in its own words, because the call itself can end so.
RETOLD: dict[type[MeshError], tuple[str, ...]] = {
    errors.DeadlineError: ("took longer than its time-out",),
    errors.InstanceLostError: ("was lost: send the request again (what happened)",),
}
RAISED: list[MeshError] = [
    *(cls("what happened", retry_after_s=3.0) for cls in status._tree(MeshError) if cls not in UNTOLD),
    *(HttpError(code, "what happened") for code in (418, 429, 500, 503)),
]


class Raising(Worker):
    """Raises what it is told to, after so many tokens."""

    model_path = FOLDER
    model_name = "raising"

    def __init__(self) -> None:
        self.error: MeshError = errors.InternalError("")
        self.after = 0

    async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[int]:
        for _ in range(self.after):
            yield 300
        raise (
            type(self.error)(self.error.http_status, "what happened")
            if isinstance(self.error, HttpError)
            else type(self.error)("what happened", retry_after_s=3.0)
        )


def name_of(error: MeshError) -> str:
    return f"HttpError({error.http_status})" if isinstance(error, HttpError) else type(error).__name__


async def over_http(front: Front, *, stream: bool) -> tuple[int, dict[str, Any], str | None]:
    body = {"model": "raising", "prompt": "hi", "max_tokens": 9, "stream": stream}
    response = await front.post(body, "/v1/completions")
    if response.status_code == 200 and stream:
        events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
        assert "[DONE]" not in events, "an answer that failed looks whole"
        return 200, json.loads(events[-1])["error"], None
    return response.status_code, response.json()["error"], response.headers.get("retry-after")


@both_lanes
async def test_every_error_over_http(mesh: Mesh) -> None:
    worker, seen, expected = Raising(), {}, {}
    async with front_of(mesh, instance_wait_s=0.02) as front:
        await mesh.serve_worker(worker)
        await eventually(front.frontend.catalog.ready)
        (model,) = front.frontend.catalog.all()
        for error in RAISED:
            for stream, after in ((True, 0), (False, 0), (True, 2)):
                worker.error, worker.after = error, after
                model.instances._full.clear()  # every request should reach the worker
                model.instances._gone.clear()
                model.instances._routable = None
                code, told, retry_after = await over_http(front, stream=stream)
                key = (name_of(error), stream, after)
                is_retold = any(text in told["message"] for text in RETOLD.get(type(error), ()))
                has_delay = error.retry_after_s is not None and not after and not is_retold
                seen[key] = (code, is_retold or told["message"].startswith("what happened"), retry_after)
                expected[key] = (200 if after else error.http_status, True, "3" if has_delay else None)
                assert set(told) == {"message", "type", "param", "code", "request_id"}
    assert seen == expected


@both_lanes
@pytest.mark.parametrize("after", [0, 2])
async def test_every_error_over_grpc(mesh: Mesh, after: int) -> None:
    """A client of generated stubs, without a line of ours."""
    worker, seen, expected = Raising(), {}, {}
    runtime = await mesh.serve_worker(worker)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{runtime.server.port}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        lane: tuple[tuple[str, str], ...] = ()
        if mesh._delivery:
            deliver = stub.Deliver(inference_pb2.DeliverRequest(delivery="ours"))
            await deliver.initial_metadata()
            lane = (("x-delivery", "ours"), ("x-delivery-id", "7"))
        for error in RAISED:
            worker.error, worker.after = error, after
            num_tokens = 0
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                request = inference_pb2.PreprocessedRequest(token_ids=[300])
                async for response in stub.Generate(request, metadata=lane):
                    num_tokens += sum(len(delta.token_ids) for delta in response.choices)
            if lane:  # each output was a token, and went there
                assert num_tokens == 0
                num_tokens = int(caught.value.trailing_metadata().get("x-delivery-outputs", 0))
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            details = caught.value.trailing_metadata()["grpc-status-details-bin"]
            for detail in status_pb2.Status.FromString(details).details:
                for wanted in (info, retry):
                    if detail.Is(wanted.DESCRIPTOR):
                        detail.Unpack(wanted)
            key = name_of(error)
            seen[key] = (
                num_tokens,
                caught.value.code(),
                caught.value.details(),
                info.reason,
                retry.retry_delay.seconds,
            )
            delay = 3 if error.retry_after_s is not None else 0
            expected[key] = (after, status.status_code(error), "what happened", error.reason, delay)
    assert seen == expected
