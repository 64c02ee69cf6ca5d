"""The worker `openai`: a mesh whose model is another mesh's, over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import dynamo_workers.tiny as tiny
import openai
import pytest
from dynamo_workers.upstream import Registrar
from dynamo_workers.upstream.bodies import body_of
from dynamo_workers.upstream.server import Server, endpoint_name
from dynamo_workers.upstream.settings import Settings

from dynamo_grpc import ConfigurationError, Context, OverloadedError, Worker
from dynamo_grpc.messages import to_struct
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import inference_pb2 as pb

from ..conftest import eventually, metric
from .front import CHAT, FOLDER, Front, Watched, front_of
from .scripted import OPENAI_TOOLS, scripted


class Two:
    """A mesh, and one in front of it."""

    def __init__(self, inner: Mesh, inner_front: Front, outer: Mesh, front: Front, registrar: Registrar) -> None:
        self.inner, self.inner_front, self.outer, self.front, self.registrar = (
            inner,
            inner_front,
            outer,
            front,
            registrar,
        )

    async def sees(self, *names: str) -> None:
        """Wait until the outer frontend has these models."""
        await eventually(lambda: {m.card.name for m in self.front.frontend.catalog.ready()} == set(names))


@contextlib.asynccontextmanager
async def two_meshes(*workers: Worker, **settings: Any) -> AsyncIterator[Two]:
    async with Mesh() as inner, Mesh() as outer:
        for worker in workers:
            await inner.serve_worker(worker)
        async with front_of(inner, instance_wait_s=0.05) as inner_front, front_of(outer, instance_wait_s=0.2) as front:
            await eventually(lambda: len(inner_front.frontend.catalog.ready()) == len(workers))
            url = inner_front.url
            told = Settings(f"{url}/v1", key="none", poll_s=0.1, metrics_url=f"{url}/metrics", **settings)
            runtime = outer.runtime()
            async with Server(told) as server:
                registrar = Registrar(runtime, server, told)
                running = asyncio.ensure_future(registrar.run())
                try:
                    yield Two(inner, inner_front, outer, front, registrar)
                finally:
                    runtime.shutdown()
                    await running


async def test_answers_are_those_of_the_other_server() -> None:
    async with two_meshes(tiny.Tiny()) as two:
        await two.sees("tiny")
        options: dict[str, Any] = {**CHAT, "max_tokens": 20, "temperature": 0.7, "n": 2, "stop": ["zzz"]}
        there = await two.inner_front.openai.chat.completions.create(**options)
        here = await two.front.openai.chat.completions.create(**options)
        assert [c.message.content for c in here.choices] == [c.message.content for c in there.choices]
        assert [c.finish_reason for c in here.choices] == ["length", "length"]
        assert here.usage.completion_tokens == there.usage.completion_tokens == 40
        assert here.usage.prompt_tokens == there.usage.prompt_tokens
        stream = await two.front.openai.chat.completions.create(
            **{**options, "n": 1}, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert len(chunks) > 10
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == there.choices[0].message.content
        assert chunks[-1].usage.completion_tokens == 20
        completion: dict[str, Any] = {"model": "tiny", "prompt": "The sea", "max_tokens": 12, "seed": 3}
        there_too = await two.inner_front.openai.completions.create(**completion)
        assert (await two.front.openai.completions.create(**completion)).choices[0].text == there_too.choices[0].text
        response = await two.front.openai.responses.create(model="tiny", input="The sea", max_output_tokens=5)
        assert response.usage.output_tokens == 5


async def test_a_cancel_ends_the_innermost_handler() -> None:
    worker = Watched()
    async with two_meshes(worker) as two:
        await two.sees("watched")
        stream = await two.front.openai.chat.completions.create(**{**CHAT, "model": "watched"}, stream=True)
        async for _ in stream:
            break
        assert not worker.ended.is_set()
        await stream.close()
        await asyncio.wait_for(worker.ended.wait(), 10)
        worker.ended.clear()
        worker.is_silent = True
        worker.started.clear()
        for limit in "300ms", "3s", "30s":  # the deadline goes along; a slow machine needs more to come that far
            with pytest.raises(openai.InternalServerError) as caught:
                await two.front.openai.chat.completions.create(
                    **{**CHAT, "model": "watched"}, extra_headers={"x-request-timeout": limit}
                )
            assert caught.value.status_code == 504
            if worker.started.is_set():
                break
        await asyncio.wait_for(worker.ended.wait(), 10)


async def test_models_come_and_go() -> None:
    async with two_meshes(tiny.Tiny(), models=("ti*", "wat*")) as two:
        await two.sees("tiny")
        watched = await two.inner.serve_worker(Watched())
        await two.sees("tiny", "watched")
        await two.inner.serve("other.backend.generate", Watched().generate)
        await two.inner.stop(watched)
        await two.sees("tiny")
        assert set(two.registrar._served) == {"tiny"}


async def test_a_server_that_goes_takes_its_models_with_it() -> None:
    async with Mesh() as outer, front_of(outer, instance_wait_s=0.2) as front:
        told = Settings(base_url="http://127.0.0.1:1/v1", poll_s=0.05)
        async with Server(told) as server:
            registrar = Registrar(outer.runtime(), server, told)
            has_model = True

            async def answer() -> list[str]:
                if not has_model:
                    raise OSError("gone")
                return ["m/1"]

            server.models = answer  # type: ignore[method-assign]
            running = asyncio.ensure_future(registrar.run())
            await eventually(lambda: [m.card.name for m in front.frontend.catalog.ready()] == ["m/1"])
            error = await front.error({**CHAT, "model": "m/1"}, 503)  # nobody is there, and nothing was begun
            assert "can't be reached" in error["message"]
            has_model = False
            await eventually(lambda: not front.frontend.catalog.ready())
            has_model = True
            await eventually(lambda: [m.card.name for m in front.frontend.catalog.ready()] == ["m/1"])
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


class Wrong(Worker):
    """Fails as it is told."""

    model_path = FOLDER
    model_name = "wrong"
    error: Exception = ValueError("no good")

    async def generate(self, request: Any, context: Context) -> AsyncIterator[int]:
        raise self.error
        yield 1


async def test_errors_are_told_as_they_are() -> None:
    worker = Wrong()
    async with two_meshes(worker, num_retries=0) as two:
        await two.sees("wrong")
        body = {**CHAT, "model": "wrong"}
        assert "no good" in (await two.front.error(body, 400))["message"]
        assert (await two.front.error({**body, "temperature": 101}, 400))["param"] == "temperature"
        worker.error = RuntimeError("secret")
        error = await two.front.error(body, 500)
        assert "secret" not in error["message"]
        assert "the server failed (500)" in error["message"]
        worker.error = OverloadedError("full", retry_after_s=7)
        response = await two.front.post(body)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 1


async def test_tools_and_reasoning_go_through(tmp_path: Path) -> None:
    async with two_meshes(scripted(tmp_path, "hermes")) as two:
        await two.sees("scripted")
        options: dict[str, Any] = {
            "model": "scripted",
            "messages": [{"role": "user", "content": "say reasoning and a call;"}],
            "tools": OPENAI_TOOLS,
        }
        answer = await two.front.openai.chat.completions.create(**options)
        (call,) = answer.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
        assert answer.choices[0].message.reasoning_content == "I must look."
        assert answer.choices[0].finish_reason == "tool_calls"
        assert answer.usage.completion_tokens_details.reasoning_tokens > 0
        async with two.front.openai.chat.completions.stream(**options) as stream:
            streamed = (await stream.get_final_completion()).choices[0].message
        assert streamed.tool_calls[0].function.arguments == '{"city": "Paris"}'


async def test_its_metrics_are_told_with_the_workers() -> None:
    async with two_meshes(tiny.Tiny()) as two:
        await two.sees("tiny")
        await two.front.openai.chat.completions.create(**CHAT, max_tokens=3)

        async def told() -> str:
            return (await two.front.http.get("/metrics?workers=1")).text

        name = "dynamo_frontend_requests_total"
        async with asyncio.timeout(10):
            while metric(await told(), name, dynamo_component="upstream", exported_model="tiny") != 1:
                await asyncio.sleep(0.05)


def test_what_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://nim:8000/v1/")
    monkeypatch.setenv("DYN_UPSTREAM_MODELS", "llama-*, qwen")
    settings = Settings.from_environment()
    assert (settings.base_url, settings.metrics_url) == ("http://nim:8000/v1", "http://nim:8000/metrics")
    assert [settings.wants(name) for name in ("llama-3", "qwen", "qwen2")] == [True, True, False]
    key = tmp_path / "key"
    key.write_text("one\n")
    monkeypatch.setenv("OPENAI_API_KEY_FILE", str(key))
    settings = Settings.from_environment()
    key.write_text("two\n")
    assert settings.current_key() == "two"
    for name, value, said in (
        ("OPENAI_API_KEY_FILE", str(tmp_path / "none"), "can't be read"),
        ("OPENAI_BASE_URL", "nim:8000", "should be a URL"),
        ("DYN_UPSTREAM_POLL_S", "often", "should be a number"),
        ("DYN_UPSTREAM_POLL_S", "0", "from 0.05 on"),
    ):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            with pytest.raises(ConfigurationError, match=said):
                Settings.from_environment()


def test_every_option_is_passed_on() -> None:
    request = pb.PreprocessedRequest(
        messages=[
            {"role": "user", "content": [{"text": {"text": "x"}}, {"image_url": {"url": "u", "detail": "low"}}]},
            {"role": "assistant", "tool_calls": [{"id": "c", "name": "f", "arguments": "{}"}], "reasoning": "r"},
            {"role": "tool", "tool_call_id": "c", "content": [{"text": {"text": "y"}}]},
        ],
        sampling_options={"temperature": 0.7, "top_k": 5, "seed": 1, "logit_bias": {7: -1.5}},
        stop_conditions={"max_tokens": 9, "stop": ["a"], "min_tokens": 2, "stop_token_ids": [4]},
        guided_decoding={"json_schema": '{"type": "object"}'},
        tools=to_struct({"tools": OPENAI_TOOLS, "tool_choice": "auto"}),
        extensions=to_struct({"user": "u"}),
    )
    body = body_of(request, "m")
    assert body["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "u", "detail": "low"}}]},
        {"role": "assistant", "reasoning_content": "r", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "y"},
    ]  # fmt: skip
    assert (body["temperature"], body["seed"], body["max_tokens"], body["stop"]) == (0.7, 1, 9, ["a"])
    assert body["extra_body"] == {"top_k": 5, "min_tokens": 2, "stop_token_ids": [4]}
    assert (body["logit_bias"], body["user"], body["tools"]) == ({"7": -1.5}, "u", OPENAI_TOOLS)
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert endpoint_name("tiny") == "tiny"
    assert endpoint_name("a/b") != endpoint_name("a-b")
    assert len(endpoint_name("x" * 300)) < 63


class Fake:
    """A server that answers chats as it is told."""

    def __init__(self) -> None:
        self.answer, self.num_asked = b"", 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            if "/models" in head:
                body = b'{"object": "list", "data": [{"id": "fake", "object": "model"}]}'
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body)
            elif "/chat/" in head:
                self.num_asked += 1
                writer.write(self.answer)
            else:
                writer.write(b"HTTP/1.1 404 X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            await writer.drain()
            writer.close()


def stream_of(*chunks: Any) -> bytes:
    lines = b"".join(
        b"data: " + (chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode()) + b"\n\n" for chunk in chunks
    )
    return b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n" + lines


def chunk_of(**delta: Any) -> dict[str, Any]:
    finish = delta.pop("finish", None)
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "fake", "choices": [choice]}


async def test_servers_that_misbehave() -> None:
    fake = Fake()
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    told = Settings(url, poll_s=0.1, num_retries=2)
    async with server, Mesh() as outer, front_of(outer, instance_wait_s=0.1) as front, Server(told) as asking:
        running = asyncio.ensure_future(Registrar(outer.runtime(), asking, told).run())
        await eventually(lambda: [m.card.name for m in front.frontend.catalog.ready()] == ["fake"])
        body = {**CHAT, "model": "fake"}

        async def answer(data: bytes, status: int, said: str) -> None:
            fake.answer = data
            error = await front.error(body, status)
            assert said in error["message"], error

        fake.answer = stream_of(chunk_of(content="hello"), chunk_of(finish="stop"), b"[DONE]")
        assert (await front.post(body)).json()["choices"][0]["message"]["content"] == "hello"
        fake.answer = stream_of(chunk_of(refusal="no"), chunk_of(finish="strange"), b"[DONE]")
        whole = (await front.post(body)).json()["choices"][0]
        assert (whole["message"]["content"], whole["finish_reason"]) == ("no", "stop")
        await answer(stream_of(chunk_of(content="hello")), 503, "in the middle of an answer")
        await answer(stream_of(chunk_of(content="hello"), b"[DONE]"), 503, "in the middle of an answer")
        await answer(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\nconnection: close\r\n\r\n<p>", 503, "in the middle"
        )
        await answer(stream_of(b"{not json"), 502, "can't be read")
        await answer(
            stream_of({**chunk_of(), "choices": [{"index": -1, "delta": {"content": "x"}}]}), 502, "can't be read"
        )
        detail = b'{"detail": "no such thing"}'
        await answer(
            b"HTTP/1.1 404 X\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(detail) + detail,
            400, "no such thing",
        )  # fmt: skip
        for after in ("7", "nan", "inf"):
            fake.num_asked = 0
            fake.answer = (
                f"HTTP/1.1 429 X\r\nretry-after: {after}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode()
            )
            response = await front.post(body)
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
            assert fake.num_asked <= 1  # it was told when to come back
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_its_own_mesh_is_refused() -> None:
    async with Mesh() as mesh, front_of(mesh) as front:
        await mesh.serve_worker(tiny.Tiny())
        await eventually(front.frontend.catalog.ready)
        told = Settings(f"{front.url}/v1", poll_s=0.05)
        async with Server(told) as server:
            registrar = Registrar(mesh.runtime(), server, told)
            server.models = lambda: asyncio.sleep(0, ["mirror"])  # type: ignore[method-assign]
            with pytest.raises(ConfigurationError, match="is a frontend of this mesh"):
                await asyncio.wait_for(registrar.run(), 10)
