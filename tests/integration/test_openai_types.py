"""Bodies and events field by field, by the types of the official clients: nothing missing, nothing of another type,
nothing that they don't know but what is ours on purpose.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
from anthropic.types import Message, RawMessageStreamEvent
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from dynamo_grpc import OverloadedError

from .front import CHAT, Front

#: Ours: how often an answer moved (only if it did), how long prompts may be. `store` is in the API, not in its types.
OURS = {"num_migrations", "max_model_len", "store"}


def strange(value: Any, where: str = "") -> Iterator[str]:
    """Fields that the client's types don't have."""
    if isinstance(value, BaseModel):
        yield from (f"{where}.{name}" for name in set(value.model_extra or ()) - OURS)
        for name in type(value).model_fields:
            yield from strange(getattr(value, name), f"{where}.{name}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from strange(item, f"{where}.{number}")


def read(kind: Any, value: Any) -> Any:
    """A body as the client's type, with all its fields checked."""
    made = TypeAdapter(kind).validate_python(value, strict=False)
    assert list(strange(made)) == [], value
    return made


def events_of(text: str) -> list[Any]:
    assert text.endswith("\n\n")
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


async def test_the_chunks_of_a_chat(front: Front) -> None:
    for logprobs, has_usage in ((False, False), (True, True)):
        options = {"logprobs": logprobs, "stream": True, "stream_options": {"include_usage": has_usage}}
        response = await front.post({**CHAT, "max_tokens": 4, "n": 2, "seed": 5, **options})
        assert response.text.endswith("data: [DONE]\n\n")
        raw = events_of(response.text)
        chunks = [read(ChatCompletionChunk, event) for event in raw]
        usage = [chunks.pop()] if has_usage else []
        assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in (*chunks, *usage)}) == 1
        assert all(set(event) == {*raw[0]} for event in raw)
        assert ("usage" in raw[0]) == has_usage
        for index in (0, 1):
            mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
            first, *middle, last = mine
            assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
            assert middle
            for choice in middle:
                assert choice.delta.role is None
                assert choice.delta.content
                assert choice.finish_reason is None
                assert (choice.logprobs is not None) == logprobs
            assert last.delta.model_dump(exclude_unset=True) == {}
            assert last.finish_reason == "length"
        assert all(chunk.usage is None for chunk in chunks)
        for chunk in usage:
            assert chunk.choices == []
            assert chunk.usage.completion_tokens == 8
            assert chunk.usage.total_tokens == chunk.usage.prompt_tokens + 8


async def test_whole_answers(front: Front) -> None:
    body = {**CHAT, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    chat = read(ChatCompletion, (await front.post(body)).json())
    assert chat.choices[0].message.refusal is None
    assert len(chat.choices[0].logprobs.content) == 4
    asked = {"model": "tiny", "prompt": "The sea", "max_tokens": 4, "logprobs": 2}
    completion = read(Completion, (await front.post(asked, "/v1/completions")).json())
    assert completion.choices[0].finish_reason == "length"
    streamed = await front.post({**asked, "stream": True}, "/v1/completions")
    # a chunk's finish reason is null before its end, as OpenAI sends it; the client's type doesn't say so
    for event in events_of(streamed.text):
        reason = event["choices"][0].pop("finish_reason")
        assert reason in (None, "length")
        read(Completion, {**event, "choices": [{**event["choices"][0], "finish_reason": reason or "stop"}]})
    assert streamed.text.endswith("data: [DONE]\n\n")
    for model in (await front.http.get("/v1/models")).json()["data"]:
        read(Model, model)


async def test_responses_and_their_events(front: Front) -> None:
    asked = {"model": "tiny", "input": "Tell me about the sea", "max_output_tokens": 4}
    read(Response, (await front.post(asked, "/v1/responses")).json())
    events = events_of((await front.post({**asked, "stream": True}, "/v1/responses")).text)
    for number, event in enumerate(events):
        assert read(ResponseStreamEvent, event).sequence_number == number


async def test_messages_and_their_events(front: Front) -> None:
    asked = {**CHAT, "max_tokens": 4}
    del asked["seed"]
    read(Message, (await front.post(asked, "/v1/messages")).json())
    for event in events_of((await front.post({**asked, "stream": True}, "/v1/messages")).text):
        read(RawMessageStreamEvent, event)


async def test_a_refusal_is_tried_again_when_it_says(front: Front) -> None:
    """Both clients come back by themselves after 503 with Retry-After."""
    tries = 0
    find = front.frontend.catalog.find

    async def refuse_first(name: str) -> Any:
        nonlocal tries
        tries += 1
        if tries % 2:
            raise OverloadedError("full", retry_after_s=0.01)
        return await find(name)

    front.frontend.catalog.find = refuse_first  # type: ignore[method-assign]
    client = openai.AsyncOpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=1)
    other = anthropic.AsyncAnthropic(base_url=front.url, api_key="none", max_retries=1)
    async with client, other:
        got = await client.chat.completions.create(**CHAT, max_tokens=3, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in got])
        assert tries == 2
        message = await other.messages.create(model="tiny", messages=CHAT["messages"], max_tokens=3)
        assert message.usage.output_tokens == 3
        assert tries == 4
