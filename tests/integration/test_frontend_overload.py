"""The frontend when there is no room: refusals, thresholds, and what an answer tells of its migrations."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import openai
import pytest

from dynamo_grpc import Context, Worker
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import inference_pb2

from ..conftest import both_lanes, eventually
from .front import FOLDER, Front, front_of

ASK = {"model": "narrow", "prompt": "hi", "max_tokens": 8}


class Narrow(Worker):
    """Serves one request at a time, and lets one wait; each waits for `go` after `gate` tokens."""

    model_path = FOLDER
    model_name = "narrow"
    max_concurrent = 1
    max_queued = 1

    def __init__(self, gate: int = 0) -> None:
        self.go, self.gate = asyncio.Event(), gate
        self.requests: list[inference_pb2.PreprocessedRequest] = []
        self.loaded = {"num_used_blocks": 0, "num_total_blocks": 10, "num_prefill_tokens": 0}

    def load(self) -> Mapping[str, int]:
        return self.loaded

    async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[int]:
        self.requests.append(request)
        for count in range(100):
            if count == self.gate:
                await self.go.wait()
            yield 300 + count


async def ask(front: Front, **more: Any) -> Any:
    return await front.post({**ASK, **more}, "/v1/completions")


async def fill(front: Front, worker: Narrow, num: int = 2) -> list[asyncio.Task[Any]]:
    """One that runs, and one that waits."""
    tasks = []
    for _ in range(num):
        tasks.append(asyncio.ensure_future(ask(front)))
        await eventually(lambda: front.frontend._serving._drain.num_running == len(tasks))
    await eventually(lambda: worker.requests)
    return tasks


@both_lanes
@pytest.mark.parametrize("status", [503, 429, 529])
async def test_a_full_worker_is_told_with_when_to_come_back(mesh: Mesh, status: int) -> None:
    worker = Narrow()
    async with front_of(mesh, overload_status=status) as front:
        runtime = await mesh.serve_worker(worker)
        await eventually(front.frontend.catalog.ready)
        served = next(iter(runtime.server.served.values()))
        tasks = await fill(front, worker)
        await eventually(lambda: served.admission.num_waiting == 1)
        for _ in range(4):
            refused = await ask(front, stream=True)
            assert (refused.status_code, refused.headers["retry-after"]) == (status, "1")
            error = refused.json()["error"]
            assert error["code"] == "overloaded"
            where = f"worker 127.0.0.1:{runtime.server.port} (dynamo.backend.generate)"
            assert error["message"] == f"{where} is full: max_concurrent=1 requests run and max_queued=1 wait"
        worker.go.set()
        assert [(await task).status_code for task in tasks] == [200, 200]
        assert (await ask(front)).status_code == 200
        metrics = (await front.http.get("/metrics")).text
        assert 'model_rejection_total{dynamo_namespace="dynamo",endpoint="completions",model="narrow"} 4.0' in metrics


async def test_what_is_refused_is_never_tokenized(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, num_prepared = Narrow(), 0
    async with front_of(mesh) as front:
        await mesh.serve_worker(worker)
        await eventually(front.frontend.catalog.ready)
        (model,) = front.frontend.catalog.all()
        assert model.preparation is not None
        assert model.preparation.tokenizer is not None
        encode = type(model.preparation.tokenizer).encode_whole

        async def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal num_prepared
            num_prepared += 1
            return await encode(self, *args, **kwargs)

        monkeypatch.setattr(type(model.preparation.tokenizer), "encode_whole", counted)
        monkeypatch.setattr("dynamo_grpc.instances.FULL_S", 60.0)
        tasks = await fill(front, worker)
        answers = [(await ask(front)).status_code for _ in range(20)]
        assert answers == [503] * 20
        assert num_prepared == 3  # the two that are there, and the first that was refused
        worker.go.set()
        await asyncio.gather(*tasks)


async def test_the_frontends_own_limit(mesh: Mesh) -> None:
    worker = Narrow()
    async with front_of(mesh, max_requests=1) as front:
        await mesh.serve_worker(worker)
        await eventually(front.frontend.catalog.ready)
        tasks = await fill(front, worker, 1)
        refused = await ask(front)
        assert refused.status_code == 503
        assert refused.json()["error"]["message"] == "this frontend is full: --max-requests=1 run"
        worker.go.set()
        assert (await tasks[0]).status_code == 200
        assert (await ask(front)).status_code == 200


async def test_busy_thresholds(mesh: Mesh) -> None:
    worker = Narrow()
    worker.go.set()
    async with front_of(mesh) as front:
        runtime = await mesh.serve_worker(worker)
        await eventually(front.frontend.catalog.ready)
        nothing = {
            "model": "narrow",
            "active_decode_blocks_threshold": None,
            "active_prefill_tokens_threshold": None,
            "active_requests_threshold": None,
        }
        assert (await front.http.get("/busy_threshold")).json() == {"thresholds": [nothing]}

        async def post(body: Any) -> Any:
            return await front.post(body, "/busy_threshold")

        set_to = (await post({"model": "narrow", "active_decode_blocks_threshold": 0.8})).json()
        assert set_to == {**nothing, "active_decode_blocks_threshold": 0.8}
        assert (await ask(front)).status_code == 200
        worker.loaded = {"num_used_blocks": 9, "num_total_blocks": 10}
        (model,) = front.frontend.catalog.all()
        await eventually(lambda: model.instances._busy)
        refused = await ask(front)
        assert refused.status_code == 503
        assert refused.json()["error"]["message"] == (
            f"worker 127.0.0.1:{runtime.server.port} is busy: 9 of 10 KV blocks in use, "
            "over active_decode_blocks_threshold=0.8"
        )
        other = Narrow()  # a request is refused only when all are busy
        other.go.set()
        await mesh.serve_worker(other)
        await eventually(lambda: len(model.instances.routable()) == 2)
        assert [(await ask(front)).status_code for _ in range(4)] == [200] * 4
        assert len(other.requests) == 4
        assert (await post({"model": "narrow", "active_decode_blocks_threshold": None})).json() == nothing
        assert model.instances._busy == {}
        for body, text in (
            (
                {"model": "narrow", "active_decode_blocks_threshold": 80},
                "active_decode_blocks_threshold: Input should be",
            ),
            (
                {"model": "narrow", "active_prefill_tokens_threshold": 0.5},
                "active_prefill_tokens_threshold: Input should",
            ),
            ({"model": "narrow", "threshold": 1}, "threshold: Extra inputs are not permitted"),
            ({}, "model: Field required"),
        ):
            response = await post(body)
            assert response.status_code == 400
            assert text in response.json()["error"]["message"]
        assert (await post({"model": "other"})).status_code == 404


async def test_without_the_admin_api_there_are_no_thresholds(mesh: Mesh) -> None:
    async with front_of(mesh, has_admin_api=False) as front:
        assert (await front.http.get("/busy_threshold")).status_code == 404


@both_lanes
@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_tells_that_it_moved(mesh: Mesh, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    has_begun = asyncio.Event()
    monkeypatch.setattr("dynamo_frontend.record.Record.output", lambda *_: has_begun.set())
    lost, other = Narrow(gate=3), Narrow()
    other.go.set()
    async with front_of(mesh) as front:
        runtime = await mesh.serve_worker(lost)
        await eventually(front.frontend.catalog.ready)
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        asking = asyncio.ensure_future(ask(front, **options))
        await asyncio.wait_for(has_begun.wait(), 5)
        await mesh.serve_worker(other)
        await mesh.lose(runtime)
        answer = await asking
        if stream:
            events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            usage = events[-1]["usage"]
        else:
            usage = answer.json()["usage"]
            assert answer.headers["x-migrations"] == "1"
        assert usage == {"prompt_tokens": 1, "completion_tokens": 8, "total_tokens": 9, "num_migrations": 1}
        still = await ask(front)
        assert "x-migrations" not in still.headers
        assert "num_migrations" not in still.json()["usage"]


async def test_a_frontend_that_leaves_says_so_and_goes_on(mesh: Mesh) -> None:
    worker = Narrow()
    worker.go.set()
    async with front_of(mesh) as front:
        await mesh.serve_worker(worker)
        await eventually(front.frontend.catalog.ready)
        front.frontend.is_draining = True
        health = await front.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "draining")
        assert (await front.http.get("/live")).status_code == 200
        assert (await ask(front)).status_code == 200


async def test_the_openai_client_comes_back_when_it_is_told(mesh: Mesh) -> None:
    worker = Narrow()
    async with front_of(mesh) as front:
        await mesh.serve_worker(worker)
        await eventually(front.frontend.catalog.ready)
        tasks = await fill(front, worker)
        patient = front.openai.with_options(max_retries=2)
        asking = asyncio.ensure_future(patient.completions.create(model="narrow", prompt="hi", max_tokens=8))
        (model,) = front.frontend.catalog.all()
        await eventually(lambda: model.instances._full)  # it was refused
        worker.go.set()
        assert (await asking).choices[0].text
        assert [(await task).status_code for task in tasks] == [200, 200]
        with pytest.raises(openai.NotFoundError):  # nobody comes back for that
            await patient.completions.create(model="nobody", prompt="hi")


async def test_bodies_together_have_a_limit(mesh: Mesh) -> None:
    worker = Narrow()
    async with front_of(mesh, max_bodies_bytes=200_000, overload_status=529) as front:
        await mesh.serve_worker(worker)
        await eventually(front.frontend.catalog.ready)
        serving = front.frontend._serving
        large = asyncio.ensure_future(ask(front, padding="x" * 80_000))
        await eventually(lambda: serving.num_running == 1)
        held = serving.bodies.num_bytes
        assert held > 80_000
        for path in ("/v1/completions", "/tokenize"):
            refused = await front.post({**ASK, "padding": "x" * 160_000}, path)
            assert (refused.status_code, refused.headers["retry-after"]) == (529, "1")
            assert "--max-bodies-mb" in refused.json()["error"]["message"]
        assert (await ask(front, padding="x" * 200_000)).status_code == 413  # it would never have room
        assert serving.bodies.num_bytes == held
        small = asyncio.ensure_future(ask(front, padding="x" * 60_000))  # has room always
        await eventually(lambda: serving.num_running == 2)
        worker.go.set()
        assert ((await large).status_code, (await small).status_code) == (200, 200)
        await eventually(lambda: serving.bodies.num_bytes == 0)
        assert (await front.post({**ASK, "padding": "x" * 160_000}, "/tokenize")).status_code == 200
        await eventually(lambda: serving.bodies.num_bytes == 0)


async def test_a_client_that_stops_sending_is_given_up(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with front_of(mesh) as front:
        bodies = front.frontend._serving.bodies

        async def begin(path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            reader, writer = await asyncio.open_connection(front.http.base_url.host, front.http.base_url.port)
            writer.write(
                f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n".encode() + b"x" * 100_000
            )
            return reader, writer

        for path in ("/v1/chat/completions", "/tokenize"):
            _, writer = await begin(path)
            await eventually(lambda: bodies.num_bytes == 100_000)
            writer.transport.abort()
            await eventually(lambda: bodies.num_bytes == 0)
        monkeypatch.setattr("dynamo_frontend.bodies.STALL_S", 0.1)
        for path in ("/v1/chat/completions", "/tokenize"):
            reader, writer = await begin(path)
            answer = await asyncio.wait_for(reader.readline(), 10)
            assert answer.startswith(b"HTTP/1.1 408 ")
            await eventually(lambda: bodies.num_bytes == 0)
            writer.close()
    assert not [record for record in caplog.records if record.exc_info]
