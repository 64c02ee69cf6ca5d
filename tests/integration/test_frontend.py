"""The frontend over real HTTP, with the tiny model behind it in the same process."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import dynamo_workers.tiny as tiny
import httpx
import openai
import pytest

from dynamo_grpc import Context, HttpError, ModelInput, Worker, prompt_text
from dynamo_grpc.cards import load_model
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import inference_pb2

from ..conftest import both_servers, eventually
from .front import CHAT, FOLDER, Front, Watched, front_of

# -- answers ------------------------------------------------------------------------------------------------------------


@both_servers
async def test_the_openai_client_gets_a_chat(front: Front) -> None:
    whole = await front.openai.chat.completions.create(**CHAT, max_tokens=12)
    choice = whole.choices[0]
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.completion_tokens, whole.usage.total_tokens) == (12, whole.usage.prompt_tokens + 12)
    pieces, usage, reasons = [], None, []
    stream = await front.openai.chat.completions.create(
        **CHAT, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        for streamed in chunk.choices:
            pieces.append(streamed.delta.content or "")
            reasons.append(streamed.finish_reason)
    assert "".join(pieces) == choice.message.content
    assert usage == whole.usage
    assert reasons[-1] == "length"
    assert set(reasons[:-1]) == {None}


async def test_the_openai_clients_raw_answers(front: Front) -> None:
    raw = await front.openai.chat.completions.with_raw_response.create(**CHAT, max_tokens=3)
    assert raw.parse().id == f"chatcmpl-{raw.headers['x-request-id']}"
    chat = front.openai.chat.completions
    async with chat.with_streaming_response.create(**CHAT, max_tokens=3, stream=True) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = [line async for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    async with chat.stream(**CHAT) as stream:  # the accumulator takes whole answers alone
        final = await stream.get_final_completion()
    begin = raw.parse().choices[0].message.content
    assert begin
    assert str(final.choices[0].message.content).startswith(begin)


async def test_the_openai_client_gets_completions(front: Front) -> None:
    whole = await front.openai.completions.create(model="tiny", prompt="The sea", seed=1)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 16  # OpenAI's default
    stream = await front.openai.completions.create(model="tiny", prompt="The sea", seed=1, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == whole.choices[0].text
    ids = tiny.load()[1].encode("The sea").ids
    by_ids = await front.openai.completions.create(model="tiny", prompt=ids, seed=1)
    assert by_ids.choices[0].text == whole.choices[0].text


async def test_every_answer_has_its_id(front: Front) -> None:
    ids = {"x-request-id": "mine"}
    for path in ("/v1/models", "/v1/models/tiny", "/health", "/metrics", "/", "/nowhere", "/debug/requests"):
        answer = await front.http.get(path, headers=ids)
        assert answer.headers.get_list("x-request-id") == ["mine"], path
        assert (await front.http.get(path)).headers["x-request-id"] != "mine"
    for path, body in (
        ("/tokenize", {"model": "tiny", "prompt": "x"}),
        ("/detokenize", {"model": "tiny", "tokens": [5]}),
    ):
        answer = await front.post(body, path, headers=ids)
        assert answer.headers.get_list("x-request-id") == ["mine"], path


async def test_models(front: Front) -> None:
    assert [model.id async for model in front.openai.models.list()] == ["tiny"]
    assert (await front.openai.models.retrieve("tiny")).id == "tiny"
    with pytest.raises(openai.NotFoundError):
        await front.openai.models.retrieve("nope")


@both_servers
async def test_all_of_an_answer(front: Front) -> None:
    whole = await front.openai.chat.completions.create(**CHAT)
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.completion_tokens >= 64
    assert "\ufffd" not in (whole.choices[0].message.content or "")


@both_servers
async def test_a_connection_outlives_a_bad_request(front: Front) -> None:
    async with httpx.AsyncClient(base_url=front.url, limits=httpx.Limits(max_connections=1)) as http:
        for body in ({**CHAT, "temperature": "hot"}, {**CHAT, "temperature": -1}, {**CHAT, "model": "nope"}):
            for content in (json.dumps(body), "{"):
                assert (await http.post("/v1/chat/completions", content=content)).status_code in (400, 404)
                good = await http.post("/v1/chat/completions", content=json.dumps({**CHAT, "max_tokens": 1}))
                assert good.status_code == 200


@both_servers
async def test_several_choices_and_logprobs(front: Front) -> None:
    whole = await front.openai.chat.completions.create(
        **{**CHAT, "n": 3, "max_tokens": 8, "logprobs": True, "top_logprobs": 2, "temperature": 1.0}
    )
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in whole.choices}) > 1
    content = whole.choices[1].logprobs.content  # type: ignore[union-attr]
    assert content is not None
    assert "".join(entry.token for entry in content) == whole.choices[1].message.content
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in content)
    parts: dict[int, str] = {}
    stream = await front.openai.chat.completions.create(
        **{**CHAT, "n": 3, "max_tokens": 8, "temperature": 1.0}, stream=True
    )
    async for chunk in stream:
        for choice in chunk.choices:
            parts[choice.index] = parts.get(choice.index, "") + (choice.delta.content or "")
    assert parts == {choice.index: choice.message.content for choice in whole.choices}
    old = await front.openai.completions.create(model="tiny", prompt="The sea", logprobs=2, max_tokens=4, seed=1)
    assert old.choices[0].logprobs is not None
    assert "".join(old.choices[0].logprobs.tokens or ()) == old.choices[0].text


@both_servers
async def test_stop_strings_end_the_answer_and_the_worker(front: Front) -> None:
    whole = await front.openai.chat.completions.create(**CHAT, temperature=0)
    text = whole.choices[0].message.content or ""
    stop = text[20:26]
    cut = await front.openai.chat.completions.create(**CHAT, temperature=0, stop=[stop, "never said"])
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    kept = await front.post({**CHAT, "temperature": 0, "stop": stop, "include_stop_str_in_output": True})
    assert kept.json()["choices"][0]["message"]["content"] == text[: text.index(stop) + len(stop)]
    stream = await front.openai.chat.completions.create(**CHAT, temperature=0, stop=stop, stream=True)
    assert "".join([c.choices[0].delta.content or "" async for c in stream]) == text[: text.index(stop)]


@both_servers
async def test_the_event_stream_as_bytes(front: Front) -> None:
    response = await front.post({**CHAT, "max_tokens": 3, "stream": True}, headers={"x-request-id": "my-id"})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-request-id"] == "my-id"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    first = json.loads(events[0].removeprefix("data: "))
    assert first["id"] == "chatcmpl-my-id"
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}


async def test_unknown_fields_are_tolerated_and_named(front: Front) -> None:
    response = await front.post({**CHAT, "max_tokens": 1, "made_up": 1, "another": {}})
    assert response.status_code == 200
    assert response.headers["x-warning"] == "unknown fields are ignored: another, made_up"


# -- errors -------------------------------------------------------------------------------------------------------------


WRONG: list[tuple[dict[str, Any], int, str, str]] = [
    ({"model": "tinny"}, 404, "model", "'tiny' (did you mean 'tiny'?)"),
    ({"temperature": -1}, 400, "temperature", "-1"),
    ({"top_p": 2}, 400, "top_p", "at most 1"),
    ({"max_tokens": -3}, 400, "max_tokens", "greater than or equal to 1"),
    ({"messages": [{"role": "user"}]}, 400, "messages.0.content", "no content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "messages.0.content.0.text", "no text"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages.0.content.0",
        "takes no images",
    ),
    ({"messages": []}, 400, "messages", "at least 1"),
    ({"messages": [{"role": "user", "content": "sea " * 9000}]}, 400, "messages", "8192"),
    ({"logit_bias": {"99999": 1}}, 400, "logit_bias", "vocabulary"),
    ({"stop": [""]}, 400, "stop", "empty"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools", "knows no tools"),
    ({"seed": 2**63}, 400, "seed", "less than"),
    ({"min_tokens": 5_000_000_000}, 400, "min_tokens", "less than"),
    ({"priority": 2**40}, 400, "priority", "less than"),
    ({"model": "x" * 300}, 400, "model", "256"),
    ({"messages": [{"role": "user", "content": "x", "name": 5}]}, 400, "messages.0.name", "string"),
    ({"top_k": 2**40}, 400, "top_k", "out of range"),
    ({"stop": ["x"] * 17}, 400, "stop", "at most 16"),
    ({"n": 129}, 400, "n", "128"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "20"),
    ({"messages": [{"role": "user", "content": "x"}] * 4097}, 400, "messages", "4096"),
    ({"min_tokens": 9, "max_tokens": 3}, 400, "min_tokens", "more than max_tokens"),
    ({"frequency_penalty": 3}, 400, "frequency_penalty", "at most 2"),
    ({"presence_penalty": -3}, 400, "presence_penalty", "at least -2"),
    ({"min_p": 2}, 400, "min_p", "at most 1"),
    ({"top_k": -2}, 400, "top_k", "at least -1"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty", "above 0"),
    ({"logit_bias": {"5": 101}}, 400, "logit_bias", "from -100 to 100"),
    ({"reasoning_effort": "low"}, 400, "reasoning_effort", "knows no reasoning effort"),
    ({"store": True}, 400, "store", "not supported"),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_bad_chats(front: Front, stream: bool) -> None:
    for change, status, param, text in WRONG:
        error = await front.error({**CHAT, **change, "stream": stream}, status)
        assert (error["param"], error["type"]) == (param, "invalid_request_error"), change
        assert text in error["message"]


async def test_bad_completions(front: Front) -> None:
    path = "/v1/completions"
    assert "empty" in (await front.error({"model": "tiny", "prompt": ""}, 400, path))["message"]
    assert "vocabulary" in (await front.error({"model": "tiny", "prompt": [1, 999999]}, 400, path))["message"]
    assert (await front.error({"model": "tiny", "prompt": [-1]}, 400, path))["param"] == "prompt"
    huge = await front.error({"model": "tiny", "prompt": "hello sea " * 1_000_000}, 400, path)
    assert (huge["param"], huge["code"]) == ("prompt", "context_length_exceeded")
    many = await front.error({"model": "tiny", "prompt": ["a"] * 600, "n": 2}, 400, path)
    assert "600 prompts with 2 choices each: at most 1024" in many["message"]
    assert (await front.error({"model": "tiny", "prompt": ["a", ""]}, 400, path))["message"] == "the prompt is empty"
    for one in (["The sea"], [[300, 301]]):
        assert (await front.post({"model": "tiny", "prompt": one, "max_tokens": 1}, path)).status_code == 200
    long = await front.error({"model": "tiny", "prompt": [5] * 9000}, 400, path)
    assert long["code"] == "context_length_exceeded"
    assert "9000" in long["message"]
    assert "8192" in long["message"]


@both_servers
async def test_bad_bodies(front: Front) -> None:
    assert "no JSON" in (await front.error("{", 400))["message"]
    assert "no JSON" in (await front.error(b"\xff", 400))["message"]
    assert (await front.error("[1]", 400))["type"] == "invalid_request_error"
    for wrong in ("soon", "0", "-1", "10000000000"):
        assert "x-request-timeout" in (await front.error(CHAT, 400, headers={"x-request-timeout": wrong}))["message"]
    strange = await front.post({**CHAT, "max_tokens": 1, "a\r\nb: c": 1})
    assert strange.headers["x-warning"] == "unknown fields are ignored: a??b: c"
    for wrong in ("zz", "1" * 4500):
        assert (await front.error(CHAT, 400, headers={"x-worker-instance-id": wrong}))["message"]
    response = await front.http.get("/v1/nothing")
    assert (response.status_code, "Not Found" in response.json()["error"]["message"]) == (404, True)
    assert (await front.http.get("/v1/chat/completions")).status_code == 405


@both_servers
async def test_a_huge_body_is_refused_and_the_frontend_lives(front: Front) -> None:
    response = await front.post(b"x" * (100 * 2**20))
    assert response.status_code == 413
    assert "64 MiB" in response.json()["error"]["message"]

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 2**20

    with contextlib.suppress(httpx.WriteError, httpx.ReadError):  # it may hang up before all is sent
        response = await front.http.post("/v1/chat/completions", content=chunks())
        assert response.status_code == 413
    assert (await front.post({**CHAT, "max_tokens": 1})).status_code == 200


async def test_the_openai_clients_exceptions(front: Front) -> None:
    create = front.openai.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="there is no model 'nope'") as missing:
        await create(**{**CHAT, "model": "nope"})
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        await create(**CHAT, temperature=-1, stream=True)
    assert bad.value.param == "temperature"


class Failing(Worker):
    """Fails as its prompt says: the number of tokens chooses."""

    model_path = FOLDER
    model_name = "failing"
    capabilities = ("n",)
    raises: ClassVar[list[Exception]] = [ValueError("n is odd"), HttpError(418, "a teapot"), KeyError("secret")]

    async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[Any]:
        if request.token_ids[0] >= 10:
            yield 300  # fails in the middle
        raise self.raises[request.token_ids[0] % 10]


@both_servers
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_handler_that_raises(mesh: Mesh, front: Front, stream: bool) -> None:
    await mesh.serve_worker(Failing())
    await eventually(lambda: len(front.frontend.catalog.ready()) == 2)
    body = {"model": "failing", "stream": stream}
    path = "/v1/completions"
    assert (await front.error({**body, "prompt": [0]}, 400, path))["message"] == "n is odd"
    assert (await front.error({**body, "prompt": [1]}, 418, path))["message"] == "a teapot"
    error = await front.error({**body, "prompt": [2]}, 500, path)
    assert "error id" in error["message"]
    assert "secret" not in json.dumps(error)
    if not stream:
        assert (await front.error({**body, "prompt": [11]}, 418, path))["message"] == "a teapot"
        return
    response = await front.post({**body, "prompt": [11]}, path)
    assert response.status_code == 200
    last = response.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "a teapot"
    assert "[DONE]" not in response.text


# -- ending a request -----------------------------------------------------------------------------------------------------


@both_servers
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("silent", [False, True], ids=["in the middle", "before the first token"])
async def test_a_client_that_goes_ends_the_handler(front: Front, watched: Watched, stream: bool, silent: bool) -> None:
    watched.is_silent = silent
    body = {**CHAT, "model": "watched", "stream": stream}
    task = asyncio.ensure_future(front.post(body))
    await asyncio.wait_for(watched.started.wait(), 5)
    assert not watched.ended.is_set()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.wait_for(watched.ended.wait(), 5)
    metrics = (await front.http.get("/metrics")).text
    assert 'error_type="cancelled"' in metrics
    assert (
        'dynamo_frontend_inflight_requests{dynamo_namespace="dynamo",endpoint="chat_completions",model="watched"} 0.0'
        in metrics
    )


@both_servers
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_client_that_goes_after_a_large_body_ends_the_handler(
    front: Front, watched: Watched, stream: bool
) -> None:
    watched.is_silent = True
    text = "the sea " * 100  # the tiny context is small: the size comes from a field that nobody knows
    message = {"role": "user", "content": text}
    body = json.dumps({"model": "watched", "messages": [message], "stream": stream, "extra": "x" * 200_000}).encode()
    host, port = front.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode())
    await asyncio.sleep(0.1)  # the body comes when the request waits for it
    writer.write(body)
    await asyncio.wait_for(watched.started.wait(), 5)
    writer.transport.abort()
    await asyncio.wait_for(watched.ended.wait(), 5)


@both_servers
async def test_the_openai_client_can_stop_reading(front: Front, watched: Watched) -> None:
    stream = await front.openai.chat.completions.create(**{**CHAT, "model": "watched"}, stream=True)
    async for _ in stream:
        break
    await stream.close()
    await asyncio.wait_for(watched.ended.wait(), 5)


@both_servers
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_deadline_is_told_as_504(front: Front, watched: Watched, stream: bool) -> None:
    watched.is_silent = True
    error = await front.error(
        {**CHAT, "model": "watched", "stream": stream}, 504, headers={"x-request-timeout": "200ms"}
    )
    assert "time-out" in error["message"]
    await asyncio.wait_for(watched.ended.wait(), 5)


# -- models come and go ---------------------------------------------------------------------------------------------------


async def test_two_models_and_one_that_leaves(mesh: Mesh, front: Front) -> None:
    runtime = await mesh.serve_worker(tiny.Tiny(), model_name="second")
    await eventually(lambda: len(front.frontend.catalog.ready()) == 2)
    assert [model.id async for model in front.openai.models.list()] == ["second", "tiny"]
    assert (await front.post({**CHAT, "model": "second", "max_tokens": 1})).status_code == 200
    await mesh.stop(runtime)
    await eventually(lambda: len(front.frontend.catalog.ready()) == 1, 1.0)
    error = await front.error({**CHAT, "model": "second"}, 503)
    assert "known, but no worker serves it" in error["message"]


async def test_a_known_model_is_waited_for(mesh: Mesh) -> None:
    runtime = await mesh.serve_worker(tiny.Tiny())
    async with front_of(mesh, instance_wait_s=20.0) as front:
        await eventually(front.frontend.catalog.ready)
        for how in (mesh.stop, mesh.lose):
            await how(runtime)
            waiting = asyncio.ensure_future(front.post({**CHAT, "max_tokens": 1}))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            runtime = await mesh.serve_worker(tiny.Tiny())
            assert (await waiting).status_code == 200


async def test_a_request_whose_only_worker_is_lost_waits_for_the_next(mesh: Mesh) -> None:
    first = Watched()
    first.is_silent = True
    lost = await mesh.serve_worker(first)
    async with front_of(mesh, instance_wait_s=20.0) as front:
        await eventually(front.frontend.catalog.ready)
        waiting = asyncio.ensure_future(front.post({**CHAT, "model": "watched", "max_tokens": 2}))
        await asyncio.wait_for(first.started.wait(), 5)
        await mesh.lose(lost)
        await mesh.serve_worker(Watched())
        assert (await waiting).status_code == 200


async def test_a_whole_answer_survives_the_loss_of_its_worker_in_the_middle(mesh: Mesh) -> None:
    first = Watched()  # for ever
    lost = await mesh.serve_worker(first)
    async with front_of(mesh, instance_wait_s=20.0) as front:
        await eventually(front.frontend.catalog.ready)
        waiting = asyncio.ensure_future(front.post({**CHAT, "model": "watched", "max_tokens": 200}))
        await asyncio.wait_for(first.started.wait(), 5)
        await asyncio.sleep(0.1)
        await mesh.serve_worker(Watched())
        await mesh.lose(lost)
        answer = await waiting
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 200


async def test_a_worker_that_leaves_while_its_files_are_fetched(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading
    import time

    import dynamo_grpc.control as control

    read, reading, is_slow = control._read, threading.Event(), True

    def slow(path: Path | None) -> bytes | None:
        reading.set()
        while is_slow:
            time.sleep(0.01)
        return read(path)

    monkeypatch.setattr(control, "_read", slow)
    first = await mesh.serve_worker(tiny.Tiny())
    async with front_of(mesh) as front:
        await asyncio.to_thread(reading.wait, 5)
        await mesh.serve_worker(tiny.Tiny())
        await mesh.stop(first)
        is_slow = False
        await eventually(front.frontend.catalog.ready)
        assert (await front.post({**CHAT, "max_tokens": 1})).status_code == 200


async def test_no_worker_at_all(mesh: Mesh) -> None:
    async with front_of(mesh, instance_wait_s=0.2) as front:
        await eventually(lambda: front.frontend.catalog.is_connected)
        health = await front.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "unhealthy")
        assert (await front.http.get("/live")).status_code == 200
        assert (await front.error(CHAT, 404))["code"] == "model_not_found"
        runtime = await mesh.serve_worker(tiny.Tiny())
        await eventually(front.frontend.catalog.ready)
        health = await front.http.get("/health")
        assert (health.status_code, health.json()["models"]) == (200, ["tiny"])
        await mesh.lose(runtime)  # killed: its lease still stands
        await eventually(lambda: not front.frontend.catalog.ready())
        response = await front.post(CHAT)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")


async def test_the_instance_can_be_named(mesh: Mesh, front: Front) -> None:
    other = await mesh.serve_worker(tiny.Tiny())
    await eventually(lambda: len(front.frontend.catalog.ready()[0].instances.routable()) == 2)
    header = {"x-worker-instance-id": f"{other.instance_id:016x}"}
    for _ in range(3):
        assert (await front.post({**CHAT, "max_tokens": 1}, headers=header)).status_code == 200
    error = await front.error(CHAT, 503, headers={"x-worker-instance-id": "1"})
    assert "not found" in error["message"]


class Upper(Worker):
    """Takes text and messages, gives text."""

    model_name = "upper"
    model_input = ModelInput.Text

    async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[Any]:
        for word in prompt_text(request).split():
            yield word.upper() + " "
        yield inference_pb2.GenerateResponse(usage=inference_pb2.Usage(prompt_tokens=3, completion_tokens=2))


async def test_a_worker_that_takes_text(mesh: Mesh, front: Front) -> None:
    await mesh.serve_worker(Upper())
    await eventually(lambda: len(front.frontend.catalog.ready()) == 2)
    whole = await front.openai.chat.completions.create(
        model="upper", messages=[{"role": "user", "content": [{"type": "text", "text": "tell me more"}]}], stop="MORE"
    )
    assert whole.choices[0].message.content == "TELL ME "
    done = await front.openai.completions.create(model="upper", prompt="tell me more")
    assert done.choices[0].text == "TELL ME MORE "
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (3, 2)
    for content in ("", [], [{"type": "text", "text": ""}]):
        empty = await front.post({"model": "upper", "messages": [{"role": "user", "content": content}]})
        assert empty.json()["choices"][0]["message"]["content"] == ""
    body = {"model": "upper", "prompt": "tell me more", "stop": "ME", "min_tokens": 1}
    assert (await front.post(body, "/v1/completions")).json()["choices"][0]["text"] == "TELL "


async def test_a_worker_that_gives_tokens_and_text(mesh: Mesh, front: Front) -> None:
    async def handler(request: Any) -> AsyncIterator[Any]:
        yield {"token_ids": [300, 301], "text": "two "}
        yield {"token_ids": [302], "text": "three"}

    await mesh.serve("both.backend.generate", handler, load_model(FOLDER, "both"))
    await eventually(lambda: len(front.frontend.catalog.ready()) == 2)
    whole = await front.openai.completions.create(model="both", prompt="x")
    assert whole.choices[0].text == "two three"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 3


async def test_a_model_without_a_tokenizer_is_for_grpc(mesh: Mesh, front: Front) -> None:
    async def handler(request: Any) -> AsyncIterator[int]:
        yield 5

    await mesh.serve("ids.backend.generate", handler, load_model(None, "ids"))
    await eventually(lambda: len(front.frontend.catalog.ready()) == 2)
    error = await front.error({"model": "ids", "prompt": [1]}, 400, "/v1/completions")
    assert "brings no tokenizer" in error["message"]


@both_servers
async def test_metrics_and_documentation(front: Front) -> None:
    await front.post({**CHAT, "max_tokens": 5})
    await front.error({**CHAT, "model": "made-up-name"}, 404)
    metrics = (await front.http.get("/metrics")).text
    assert (
        'dynamo_frontend_output_tokens_total{dynamo_namespace="dynamo",endpoint="chat_completions",model="tiny"} 5.0'
        in metrics
    )
    assert (
        'dynamo_frontend_time_to_first_token_seconds_count{dynamo_namespace="dynamo",endpoint="chat_completions",model="tiny"} 1.0'
        in metrics
    )
    assert "made-up-name" not in metrics  # clients don't choose labels
    paths = (await front.http.get("/openapi.json")).json()["paths"]
    assert "/v1/chat/completions" in paths
    assert "requestBody" in paths["/v1/completions"]["post"]
    assert (await front.http.get("/docs")).headers["location"] == "/#api"


async def test_a_second_card_of_a_model_gets_no_traffic(mesh: Mesh, front: Front) -> None:
    model = load_model(FOLDER, "tiny", context_length=100)

    async def wrong(request: Any) -> AsyncIterator[int]:
        raise AssertionError("it was asked")
        yield 1

    await mesh.serve("other.backend.generate", wrong, model)
    for _ in range(6):
        assert (await front.post({**CHAT, "max_tokens": 1})).status_code == 200
