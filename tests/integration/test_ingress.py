"""The frontend's gRPC port: the same contract as a worker's, over all models of the mesh."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dynamo_grpc import Context, EngineShutdown, ModelInput, ModelType, Worker
from dynamo_grpc.services import fold
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

from ..conftest import both_lanes, eventually, metric
from .front import CHAT, FOLDER, Front, Watched, front_of, serve_beside
from .test_embeddings import Embedder, vector
from .test_frontend_overload import Narrow


class Client:
    """The stubs of one port."""

    def __init__(self, port: int) -> None:
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self.inference: Any = inference_pb2_grpc.InferenceStub(self.channel)
        self.control: Any = control_pb2_grpc.ControlStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)

    async def outputs(self, request: Any, **kwargs: Any) -> list[Any]:
        return [output async for output in self.inference.Generate(request, **kwargs)]

    async def answer(self, request: Any) -> Any:
        """A whole stream, folded, after its rules are checked."""
        outputs = await self.outputs(request)
        assert [output.sequence for output in outputs] == list(range(len(outputs)))
        assert [output.HasField("usage") for output in outputs] == [False] * (len(outputs) - 1) + [True]
        folded = inference_pb2.GenerateResponse()
        for output in outputs:
            fold(folded, output)
        return folded

    async def fails(self, request: Any, code: str, reason: str, text: str, field: str = "") -> Any:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.outputs(request)
        return check_error(caught.value, code, reason, text, field)

    async def serves(self, service: str = "") -> str:
        try:
            answer = await self.health.Check(health_pb2.HealthCheckRequest(service=service))
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def check_error(error: grpc.aio.AioRpcError, code: str, reason: str, text: str, field: str = "") -> Any:
    assert (error.code().name, text in error.details()) == (code, True), error  # type: ignore[operator]
    packed = next(value for key, value in error.trailing_metadata() or () if key == "grpc-status-details-bin")
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status_pb2.Status.FromString(packed).details:  # type: ignore[arg-type]
        detail.Unpack(info), detail.Unpack(bad), detail.Unpack(retry)
    assert (info.reason, info.domain) == (reason, "dynamo-grpc")
    assert [violation.field for violation in bad.field_violations] == ([field] if field else [])
    return retry


@asynccontextmanager
async def opened(front: Front) -> AsyncIterator[Client]:
    client = Client(front.frontend.ingress.port)
    async with client.channel:
        yield client


@pytest.fixture
async def grpc_front(mesh: Mesh) -> AsyncIterator[Front]:
    import dynamo_workers.tiny as tiny

    await mesh.serve_worker(tiny.Tiny())
    async with front_of(mesh, grpc_port=0, instance_wait_s=1.0) as front:
        await eventually(front.frontend.catalog.ready)
        yield front


@pytest.fixture
async def client(grpc_front: Front) -> AsyncIterator[Client]:
    async with opened(grpc_front) as made:
        yield made


def ask(**fields: Any) -> Any:
    stop = {"max_tokens": 12, **fields.pop("stop", {})}
    sampling = {"seed": 1, **fields.pop("sampling", {})}
    return inference_pb2.PreprocessedRequest(stop_conditions=stop, sampling_options=sampling, **fields)


TOOLS: list[Any] = [{"type": "function", "function": {"name": "f"}}]


def chat(text: str) -> list[Any]:
    return [inference_pb2.ChatMessage(role="user", content=[{"text": {"text": text}}])]


@both_lanes
async def test_the_same_answer_as_over_http(grpc_front: Front, client: Client) -> None:
    body = {**CHAT, "max_tokens": 12}
    over_http = (await grpc_front.post(body)).json()["choices"][0]["message"]["content"]
    by_chat = await client.answer(ask(messages=chat(CHAT["messages"][0]["content"])))
    assert by_chat.choices[0].text == over_http
    assert len(by_chat.choices[0].token_ids) == 12
    assert by_chat.worker.instance_id
    assert by_chat.usage.completion_tokens == 12
    completion = {"model": "tiny", "prompt": "The sea", "seed": 1, "max_tokens": 12}
    text = (await grpc_front.post(completion, "/v1/completions")).json()["choices"][0]["text"]
    by_text = await client.answer(ask(text="The sea", model="tiny"))
    assert by_text.choices[0].text == text
    tokens = (await grpc_front.post({"model": "tiny", "prompt": "The sea"}, "/tokenize")).json()["tokens"]
    by_ids = await client.answer(ask(token_ids=tokens))
    assert by_ids.choices[0].token_ids == by_text.choices[0].token_ids
    assert not by_ids.choices[0].HasField("text")
    assert by_ids.choices[0].finish.reason == inference_pb2.FINISH_REASON_LENGTH


async def test_text_comes_where_it_is_wanted(client: Client) -> None:
    wanted = await client.answer(ask(token_ids=[5, 6, 7], output_options={"text": True}))
    assert wanted.choices[0].text
    unwanted = await client.answer(ask(text="The sea", output_options={"text": False}))
    assert unwanted.choices[0].token_ids
    assert not unwanted.choices[0].text
    formatted = await client.answer(ask(messages=chat("Hi"), output_options={"formatted_prompt": True}))
    assert formatted.annotations["formatted_prompt"].endswith("Hi<|end|><|assistant|>")


async def test_stop_strings(client: Client) -> None:
    whole = (await client.answer(ask(token_ids=[5, 6, 7], output_options={"text": True}))).choices[0]
    word = whole.text.split()[3]
    cut = (await client.answer(ask(token_ids=[5, 6, 7], stop={"stop": [word]}))).choices[0]
    assert cut.text == whole.text[: whole.text.index(word)]
    assert (cut.finish.reason, cut.finish.stop_string) == (inference_pb2.FINISH_REASON_STOP, word)
    kept = await client.answer(ask(token_ids=[5, 6, 7], stop={"stop": [word], "include_stop_str_in_output": True}))
    assert kept.choices[0].text == cut.text + word
    token = whole.token_ids[4]
    shown = (await client.answer(ask(token_ids=[5, 6, 7], stop={"stop_token_ids": [token]}))).choices[0]
    assert shown.finish.stop_token_id == token
    assert shown.token_ids[-1] == token


@both_lanes
async def test_choices_and_log_probabilities(mesh: Mesh, grpc_front: Front, client: Client) -> None:
    many = await client.answer(
        ask(token_ids=[5, 6], sampling={"n": 3}, output_options={"logprobs": 2, "prompt_logprobs": 1})
    )
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    assert {len(choice.logprobs.token_logprobs) for choice in many.choices} == {12}
    assert len(many.prompt_info.logprobs.token_logprobs) == 2
    assert many.usage.completion_tokens == 36
    await serve_beside(mesh, grpc_front, Counting())
    each = await client.answer(ask(model="counting", token_ids=[5, 6], sampling={"n": 2}))
    assert [list(choice.token_ids) for choice in each.choices] == [list(range(300, 312))] * 2
    assert (each.usage.prompt_tokens, each.usage.completion_tokens) == (2, 24)


@both_lanes
async def test_a_whole_answer(client: Client) -> None:
    for request in (ask(text="The sea", sampling={"n": 2}), ask(token_ids=[5, 6, 7])):
        once = await client.inference.GenerateOnce(request)
        folded = await client.answer(request)
        assert once.choices == folded.choices
        assert once.usage == folded.usage
        assert once.sequence == 0


@pytest.mark.parametrize(
    ("request_", "code", "reason", "text", "field"),
    [
        (ask(model="nope", text="x"), "NOT_FOUND", "MODEL_NOT_FOUND", "there is no model 'nope'", "model"),
        (ask(), "INVALID_ARGUMENT", "INVALID_REQUEST", "the prompt is empty", "token_ids"),
        (ask(text=""), "INVALID_ARGUMENT", "INVALID_REQUEST", "the prompt is empty", "text"),
        (ask(text="x", token_ids=[5]), "INVALID_ARGUMENT", "INVALID_REQUEST", "one prompt, not", "text"),
        (ask(text="x", messages=chat("y")), "INVALID_ARGUMENT", "INVALID_REQUEST", "one prompt, not", "messages"),
        (ask(token_ids=[99999]), "INVALID_ARGUMENT", "INVALID_REQUEST", "ids go from 0 to", "token_ids"),
        (ask(text="x", sampling={"top_p": 2}), "INVALID_ARGUMENT", "INVALID_REQUEST", "top_p is 2", "top_p"),
        (ask(text="x", stop={"stop": [""]}), "INVALID_ARGUMENT", "INVALID_REQUEST", "stop string is empty", "stop"),
        (ask(text="x", stop={"stop": ["y"] * 17}), "INVALID_ARGUMENT", "INVALID_REQUEST", "at most 16", "stop"),
        (ask(text="x", mdc_sum="y"), "FAILED_PRECONDITION", "CARD_MISMATCH", "model card y", ""),
        (
            ask(messages=[{"role": "user", "content": [{"image_url": {"url": "u"}}]}]),
            "UNIMPLEMENTED", "UNSUPPORTED", "takes no images", "messages.0.content.0",
        ),
        (ask(messages=[{"role": "wizard", "content": [{"text": {"text": "x"}}]}]), "INVALID_ARGUMENT", "INVALID_REQUEST", "the role 'wizard'", "messages.0.role"),
        (ask(token_ids=[5], sampling={"n": 1_000_000}), "INVALID_ARGUMENT", "INVALID_REQUEST", "at most 128", "n"),
        (ask(messages=[{"role": "user"}]), "INVALID_ARGUMENT", "INVALID_REQUEST", "no content", "messages.0.content"),
        (ask(messages=chat("x"), tools={"tools": TOOLS}), "UNIMPLEMENTED", "UNSUPPORTED", "knows no tools", "tools"),
        (ask(messages=chat("x"), tools={"tools": [{}]}), "INVALID_ARGUMENT", "INVALID_REQUEST", "Field required", "tools.0.type"),
        (ask(text="x", tools={"tools": TOOLS}), "INVALID_ARGUMENT", "INVALID_REQUEST", "tools are for chats", "tools"),
        (
            ask(text="x", guided_decoding={"regex": "x"}),
            "UNIMPLEMENTED", "UNSUPPORTED", "guided_decoding", "guided_decoding",
        ),
        (
            ask(text="x", routing={"instance_id": 7}),
            "UNAVAILABLE", "NO_INSTANCES", "instance_id=7 not found", "",
        ),
        (ask(text="x" * 400_000), "INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED", "shorten the prompt", "text"),
    ],
)  # fmt: skip
async def test_errors(client: Client, request_: Any, code: str, reason: str, text: str, field: str) -> None:
    await client.fails(request_, code, reason, text, field)


async def test_which_models_there_are(mesh: Mesh, grpc_front: Front, client: Client) -> None:
    described = await client.control.Describe(control_pb2.DescribeRequest())
    assert [card.name for card in described.cards] == ["tiny"]
    assert described.state == control_pb2.WORKER_STATE_READY
    assert not described.instances
    assert [await client.serves(name) for name in ("", "model/tiny", "dynamo_grpc.v1.Inference", "no")] == [
        *["SERVING"] * 3,
        "NOT_FOUND",
    ]
    await serve_beside(mesh, grpc_front, Counting())
    await client.fails(ask(token_ids=[5]), "NOT_FOUND", "MODEL_NOT_FOUND", "there is 'counting', 'tiny'", "model")
    await eventually(lambda: "model/counting" in grpc_front.frontend.ingress._told_models)
    for runtime in list(mesh._tasks):
        await mesh.stop(runtime)
    await eventually(lambda: not grpc_front.frontend.catalog.ready())
    await eventually(lambda: not grpc_front.frontend.ingress._told_models)
    assert [await client.serves(name) for name in ("", "model/tiny")] == ["NOT_SERVING"] * 2
    await client.fails(ask(model="tiny", text="x"), "UNAVAILABLE", "NO_INSTANCES", "no worker serves it now")


@both_lanes
async def test_a_cancel_and_a_deadline_end_the_worker(mesh: Mesh, grpc_front: Front, client: Client) -> None:
    worker = Watched()
    await serve_beside(mesh, grpc_front, worker)
    request = ask(model="watched", token_ids=[5], stop={"max_tokens": 8000})
    for is_silent in (False, True):
        worker.started.clear(), worker.ended.clear()
        worker.is_silent = is_silent
        call = client.inference.Generate(request)
        if not is_silent:
            await call.read()
        await asyncio.wait_for(worker.started.wait(), 5)
        call.cancel()
        await asyncio.wait_for(worker.ended.wait(), 5)
    worker.ended.clear()
    with pytest.raises(grpc.aio.AioRpcError, match="Deadline Exceeded"):
        await client.outputs(request, timeout=0.3)
    await asyncio.wait_for(worker.ended.wait(), 5)
    await eventually(lambda: not grpc_front.frontend.ingress.requests)
    told = grpc_front.frontend._serving.book.told()
    assert [error["error_type"] for error in told["errors"]] == ["deadline_exceeded", "cancelled", "cancelled"]


@both_lanes
async def test_a_gentle_stop(mesh: Mesh, grpc_front: Front, client: Client) -> None:
    worker = Counting(pause_s=0.01)
    await serve_beside(mesh, grpc_front, worker)
    request = ask(model="counting", token_ids=[5], stop={"max_tokens": 8000}, request_id="gently")
    reading = asyncio.ensure_future(client.outputs(request))
    await eventually(lambda: worker.requests)
    assert (await client.control.Stop(control_pb2.StopRequest(request_id="gently"))).found
    outputs = await reading
    assert outputs[-1].choices[0].finish.reason == inference_pb2.FINISH_REASON_CANCELLED
    assert not (await client.control.Stop(control_pb2.StopRequest(request_id="gently"))).found


class Counting(Worker):
    """Says 300, 301 …, one choice at a time."""

    model_path = FOLDER
    model_name = "counting"

    def __init__(self, pause_s: float = 0.0) -> None:
        self._pause_s = pause_s
        self.loses_at = -1
        self.requests: list[Any] = []

    async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[int]:
        self.requests.append(request)
        given = len(request.token_ids) - (request.resume.num_prompt_tokens or len(request.token_ids))
        for number in range(given, 10_000):
            if context.is_stopped():
                return
            if number == self.loses_at:
                raise EngineShutdown
            yield 300 + number % 100
            await asyncio.sleep(self._pause_s)


@both_lanes
async def test_an_answer_goes_on_at_another_worker(mesh: Mesh, grpc_front: Front, client: Client) -> None:
    workers = [Counting(pause_s=0.01), Counting(pause_s=0.01)]
    await serve_beside(mesh, grpc_front, workers[0])
    await mesh.serve_worker(workers[1])
    model = await grpc_front.frontend.catalog.find("counting")
    await eventually(lambda: len(model.instances.routable()) == 2)
    for worker in workers:
        worker.loses_at = 5
    # whoever has it first loses it; the other one takes it up there
    reading = asyncio.ensure_future(client.outputs(ask(model="counting", token_ids=[5])))
    await eventually(lambda: workers[0].requests or workers[1].requests)
    first = next(worker for worker in workers if worker.requests)
    next(worker for worker in workers if worker is not first).loses_at = -1
    outputs = await reading
    assert [t for output in outputs for choice in output.choices for t in choice.token_ids] == list(range(300, 312))
    assert [output.sequence for output in outputs] == list(range(len(outputs)))
    assert len({output.worker.instance_id for output in outputs if output.HasField("worker")}) == 2
    assert outputs[-1].usage.completion_tokens == 12


async def test_no_room(mesh: Mesh) -> None:
    worker = Narrow()
    await mesh.serve_worker(worker)
    async with front_of(mesh, grpc_port=0, max_requests=1) as front, opened(front) as client:
        await eventually(front.frontend.catalog.ready)
        running = asyncio.ensure_future(client.answer(ask(text="hi")))
        await eventually(lambda: worker.requests)
        retry = await client.fails(ask(text="hi"), "RESOURCE_EXHAUSTED", "OVERLOADED", "--max-requests=1")
        assert retry.retry_delay.ToMilliseconds() > 0
        assert (await front.post({"model": "narrow", "prompt": "x"}, "/v1/completions")).status_code == 503
        worker.go.set()
        assert (await running).usage.completion_tokens == 12


async def test_it_ends_after_what_runs(mesh: Mesh) -> None:
    worker = Narrow(gate=3)
    await mesh.serve_worker(worker)
    async with front_of(mesh, grpc_port=0) as front, opened(front) as client:
        await eventually(front.frontend.catalog.ready)
        running = asyncio.ensure_future(client.answer(ask(text="hi")))
        await eventually(lambda: worker.requests)
        await front.frontend.ingress.say_draining()
        assert await client.serves() == "NOT_SERVING"
        assert (await client.control.Describe(control_pb2.DescribeRequest())).state == control_pb2.WORKER_STATE_DRAINING
        stopping = asyncio.ensure_future(front.frontend.ingress.stop(10.0))
        await asyncio.sleep(0)
        await client.fails(ask(text="hi"), "UNAVAILABLE", "DRAINING", "the frontend is shutting down")
        assert not stopping.done()
        worker.go.set()
        assert (await running).usage.completion_tokens == 12
        await asyncio.wait_for(stopping, 5)


async def test_what_is_left_at_the_end_is_told_to_come_again(mesh: Mesh) -> None:
    worker = Narrow(gate=3)
    await mesh.serve_worker(worker)
    async with front_of(mesh, grpc_port=0) as front, opened(front) as client:
        await eventually(front.frontend.catalog.ready)
        running = asyncio.ensure_future(client.answer(ask(text="hi")))
        await eventually(lambda: worker.requests)
        await front.frontend.ingress.stop(0.05)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running
        check_error(caught.value, "UNAVAILABLE", "ENGINE_SHUTDOWN", "the frontend is shutting down")


async def test_vectors(mesh: Mesh, grpc_front: Front, client: Client) -> None:
    await serve_beside(mesh, grpc_front, Embedder())
    tokens = (await grpc_front.post({"model": "vectors", "prompt": "The sea"}, "/tokenize")).json()["tokens"]
    inputs = [{"text": "The sea"}, {"token_ids": [7, 8]}]
    answer = await client.inference.Embed(inference_pb2.EmbedRequest(model="vectors", inputs=inputs))
    given = [list(embedding.values) for embedding in answer.embeddings]
    assert given == [pytest.approx(vector(ids)) for ids in (tokens, [7, 8])]
    for model, inputs, code, text in (
        ("vectors", [], "INVALID_ARGUMENT", "nothing to embed"),
        ("vectors", [{"text": "x", "token_ids": [1]}], "INVALID_ARGUMENT", "not both"),
        ("tiny", [{"text": "x"}], "UNIMPLEMENTED", "does not serve embeddings"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.inference.Embed(inference_pb2.EmbedRequest(model=model, inputs=inputs))
        assert (caught.value.code().name, text in caught.value.details()) == (code, True)
    await client.fails(ask(model="vectors", token_ids=[5]), "UNIMPLEMENTED", "UNSUPPORTED", "embeddings alone", "model")


class Talker(Worker):
    """Takes text and yields it."""

    model_name = "talker"
    model_input = ModelInput.Text
    model_type = ModelType.Chat | ModelType.Completions

    def __init__(self) -> None:
        self.requests: list[inference_pb2.PreprocessedRequest] = []
        self.size = 0

    async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[Any]:
        self.requests.append(request)
        if self.size:
            for _ in range(10_000):
                yield "x" * self.size
                await asyncio.sleep(0)
        for word in "one two three four".split():
            yield word + " "
        yield inference_pb2.GenerateResponse(usage=inference_pb2.Usage(prompt_tokens=3, completion_tokens=4))


async def test_a_worker_that_takes_text(mesh: Mesh, grpc_front: Front, client: Client) -> None:
    worker = Talker()
    await serve_beside(mesh, grpc_front, worker)
    answer = await client.answer(ask(model="talker", messages=chat("Hi"), stop={"stop": ["three"]}))
    assert answer.choices[0].text == "one two "
    assert answer.choices[0].finish.stop_string == "three"
    assert worker.requests[0].messages == chat("Hi")
    assert (await client.answer(ask(model="talker", text="Hi"))).usage.completion_tokens == 4
    await client.fails(ask(model="talker", token_ids=[5]), "UNIMPLEMENTED", "UNSUPPORTED", "takes text", "token_ids")


@both_lanes
async def test_a_client_that_takes_nothing_is_given_up(
    mesh: Mesh, grpc_front: Front, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_frontend.ingress.LOOK_S", 0.05)
    monkeypatch.setattr("dynamo_frontend.ingress.STALL_S", 0.2)
    worker = Talker()
    worker.size = 50_000
    await serve_beside(mesh, grpc_front, worker)
    call = client.inference.Generate(ask(model="talker", text="Hi"))
    await call.initial_metadata()
    await eventually(lambda: grpc_front.frontend._serving.book.told()["errors"] or is_given_up(grpc_front))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    check_error(caught.value, caught.value.code().name, "SLOW_READER", "")
    await eventually(lambda: not grpc_front.frontend.ingress.requests)


@pytest.mark.parametrize("where", ["frontend", "worker"])
async def test_a_client_that_goes_in_the_middle_of_a_write(
    mesh: Mesh, grpc_front: Front, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """It left: nobody's mistake, and no error in a log."""
    worker = Talker()
    worker.size = 50_000
    await serve_beside(mesh, grpc_front, worker)
    ports = {"frontend": grpc_front.frontend.ingress.port, "worker": list(mesh._tasks)[-1].server.port}
    for number in range(10):
        leaving = Client(ports[where])
        call = leaving.inference.Generate(ask(model="talker", text="Hi"))
        await call.read()
        await asyncio.sleep(0.005 * number)
        call.cancel()
        await leaving.channel.close()
    await eventually(lambda: not grpc_front.frontend.ingress.requests and not list(mesh._tasks)[-1].server.requests)
    assert [record for record in caplog.records if record.levelname in ("ERROR", "WARNING")] == []
    told = grpc_front.frontend._serving.book.told()
    assert {error["error_type"] for error in told["errors"]} == ({"cancelled"} if where == "frontend" else set())


def is_given_up(front: Front) -> bool:
    return any(running.ended_by is not None for running in front.frontend.ingress.requests)


async def test_what_is_counted(grpc_front: Front, client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "dynamo_frontend.requests")
    await client.answer(ask(text="The sea", request_id="mine"))
    await client.inference.GenerateOnce(ask(text="The sea"))
    text = (await httpx.AsyncClient().get(f"{grpc_front.url}/metrics")).text
    for endpoint in ("generate", "generate_once"):
        labels = {"endpoint": endpoint, "model": "tiny"}
        assert metric(text, "dynamo_frontend_requests_total", status="success", **labels) == 1
        assert metric(text, "dynamo_frontend_output_tokens_total", **labels) == 12
        assert metric(text, "dynamo_frontend_inflight_requests", **labels) == 0
    assert "mine generate model=tiny status=200 finish=length tokens=2+12" in caplog.text
    debug = json.loads((await grpc_front.http.get("/debug/requests")).text)
    assert debug["requests"] == []


async def test_its_place_is_free_when_a_client_takes_nothing(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its write hangs for as long as it is there; nothing else waits for that."""
    monkeypatch.setattr("dynamo_frontend.ingress.LOOK_S", 0.05)
    monkeypatch.setattr("dynamo_frontend.ingress.STALL_S", 0.2)
    worker = Talker()
    worker.size = 50_000
    await mesh.serve_worker(worker)
    async with front_of(mesh, grpc_port=0, max_requests=1) as front, opened(front) as client:
        await eventually(front.frontend.catalog.ready)
        idle = client.inference.Generate(ask(text="Hi"))
        await idle.initial_metadata()
        await eventually(
            lambda: [e["error_type"] for e in front.frontend._serving.book.told()["errors"]] == ["slow_reader"]
        )
        assert front.frontend._serving.book.told()["requests"] == []
        worker.size = 0
        assert (await client.answer(ask(text="Hi"))).choices[0].text == "one two three four "
        idle.cancel()


async def test_a_resumed_request_is_counted_whole(grpc_front: Front, client: Client) -> None:
    whole = (await client.answer(ask(token_ids=[5, 6, 7]))).choices[0].token_ids
    rest = await client.answer(
        ask(token_ids=[5, 6, 7, *whole[:4]], stop={"max_tokens": 8}, resume={"num_prompt_tokens": 3, "num_attempts": 1})
    )
    assert list(rest.choices[0].token_ids) == list(whole[4:])
    assert (rest.usage.prompt_tokens, rest.usage.completion_tokens) == (3, 12)


async def test_a_request_is_one_line(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "dynamo_frontend.requests")
    with pytest.raises(grpc.aio.AioRpcError):
        await client.outputs(ask(text="x", model="a\nforged line", request_id="b\nanother"))
    assert "\n" not in caplog.records[-1].getMessage()
