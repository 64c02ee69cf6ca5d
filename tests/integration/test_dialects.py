"""The Responses API by OpenAI's client, the Messages API by Anthropic's: their own types, streams, errors."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import openai
import pytest

from dynamo_grpc.testing import Mesh

from ..conftest import both_servers, eventually
from .front import CHAT, Front, Watched, front_of

INPUT = "Tell me about the sea"


async def test_a_response(front: Front) -> None:
    whole = await front.openai.responses.create(model="tiny", input=INPUT, max_output_tokens=12, temperature=0)
    chat = await front.openai.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": INPUT}], max_tokens=12, temperature=0
    )
    assert whole.output_text == chat.choices[0].message.content
    assert (whole.status, whole.incomplete_details and whole.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    assert whole.usage is not None
    assert chat.usage is not None
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (chat.usage.prompt_tokens, 12)
    assert (whole.object, whole.model, whole.store if hasattr(whole, "store") else False) == ("response", "tiny", False)
    turns: Any = [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": [{"type": "input_text", "text": INPUT}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It is wide."}]},
        {"role": "user", "content": "And?"},
    ]
    longer = await front.openai.responses.create(model="tiny", input=turns, instructions="Speak.", temperature=0)
    assert longer.status == "completed"
    assert longer.output_text


async def test_a_responses_stream_is_what_the_client_says_it_is(front: Front) -> None:
    options: dict[str, Any] = {"model": "tiny", "input": INPUT, "max_output_tokens": 10, "temperature": 0}
    whole = await front.openai.responses.create(**options)
    events = [event async for event in await front.openai.responses.create(**options, stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    last: Any = events[-1]
    assert last.response.output_text == whole.output_text
    assert last.response.usage == whole.usage
    del options["max_output_tokens"]  # the client's own accumulator takes whole answers alone
    async with front.openai.responses.stream(**options) as stream:
        final = await stream.get_final_response()
    assert final.status == "completed"
    assert final.output_text.startswith(whole.output_text)


async def test_a_response_with_log_probabilities(front: Front) -> None:
    options: dict[str, Any] = {
        "model": "tiny", "input": INPUT, "max_output_tokens": 5, "temperature": 0,
        "include": ["message.output_text.logprobs"], "top_logprobs": 2,
    }  # fmt: skip
    whole = await front.openai.responses.create(**options)
    content: Any = whole.output[0]
    logprobs = content.content[0].logprobs
    assert len(logprobs) == 5
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in logprobs)
    streamed = [event async for event in await front.openai.responses.create(**options, stream=True)]
    done: Any = next(event for event in streamed if event.type == "response.output_text.done")
    assert [entry.token for entry in done.logprobs] == [entry.token for entry in logprobs]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [{"type": "function", "name": "f"}]}, "tools"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"input": [{"type": "function_call_output", "output": "y"}]}, "input.0.call_id"),
        ({"input": []}, "input"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]}, "input.0.content.0"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
    ],
)
async def test_what_responses_refuses(front: Front, options: dict[str, Any], param: str) -> None:
    error = await front.error({"model": "tiny", "input": INPUT, **options}, 400, "/v1/responses")
    assert error["param"].startswith(param)
    with pytest.raises(openai.BadRequestError):
        await front.openai.responses.create(**{"model": "tiny", "input": INPUT, **options})


def client_of(front: Front) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=front.url, api_key="none", max_retries=0)


async def test_a_message(front: Front) -> None:
    async with client_of(front) as client:
        options: dict[str, Any] = {
            "model": "tiny", "max_tokens": 12, "system": "You are brief.",
            "messages": [{"role": "user", "content": [{"type": "text", "text": INPUT}]}], "extra_body": {"top_k": 1},
        }  # fmt: skip
        message = await client.messages.create(**options)
        block: Any = message.content[0]
        assert (message.type, message.role, message.stop_reason, block.type) == (
            "message", "assistant", "max_tokens", "text",
        )  # fmt: skip
        assert message.usage.output_tokens == 12
        counted = await client.messages.count_tokens(**{k: options[k] for k in ("model", "messages", "system")})
        assert counted.input_tokens == message.usage.input_tokens
        async with client.messages.stream(**options) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
        assert text == block.text
        assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 12)
        assert final.usage.input_tokens == message.usage.input_tokens
        word = block.text.split()[3]
        stopped = await client.messages.create(**options, stop_sequences=["§", word])
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)
        events = [e.type async for e in await client.messages.create(**options, stream=True)]
        assert events[:2] == ["message_start", "content_block_start"]
        assert set(events[2:-3]) == {"content_block_delta"}
        assert events[-3:] == ["content_block_stop", "message_delta", "message_stop"]


async def test_errors_of_messages_become_the_clients_exceptions(mesh: Mesh, front: Front) -> None:
    ask: dict[str, Any] = {"max_tokens": 5, "messages": [{"role": "user", "content": INPUT}]}
    async with client_of(front) as client:
        with pytest.raises(anthropic.NotFoundError) as missing:
            await client.messages.create(model="nobody", **ask)
        assert missing.value.request_id
        assert "there is no model 'nobody'" in missing.value.message
        for change in (
            {"tools": [{"name": "f", "input_schema": {"type": "object"}}]},
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            {"extra_body": {"temperature": -1.0}},
            {"messages": []},
        ):
            with pytest.raises(anthropic.BadRequestError) as wrong:
                await client.messages.create(**{"model": "tiny", **ask, **change})  # type: ignore[call-overload]
            body: Any = wrong.value.body
            assert body["error"]["type"] == "invalid_request_error"
    refused = await front.post({"model": "tiny", "messages": [{"role": "user", "content": "x"}]}, "/v1/messages")
    assert refused.json()["error"]["message"] == "max_tokens: Field required"
    assert refused.headers["request-id"] == refused.headers["x-request-id"]


@both_servers
async def test_an_error_in_the_middle_of_each_stream(mesh: Mesh, front: Front) -> None:
    from collections.abc import AsyncIterator

    from dynamo_grpc import Context
    from dynamo_grpc.v1 import inference_pb2

    from .front import serve_beside

    class Failing(Watched):
        model_name = "failing"

        async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[int]:
            yield 300
            raise ValueError("it broke")

    await serve_beside(mesh, front, Failing())
    with pytest.raises(openai.APIError, match="it broke"):
        async for _ in await front.openai.responses.create(model="failing", input="x", stream=True):
            pass
    with pytest.raises(openai.APIError, match="it broke"):
        async for _ in await front.openai.chat.completions.create(**{**CHAT, "model": "failing"}, stream=True):
            pass
    async with client_of(front) as client:
        with pytest.raises(anthropic.APIStatusError, match="it broke"):
            async with client.messages.stream(
                model="failing", max_tokens=9, messages=[{"role": "user", "content": "x"}]
            ) as stream:
                await stream.get_final_message()


@both_servers
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
async def test_a_client_that_goes_ends_the_handler(front: Front, watched: Watched, path: str) -> None:
    body = {"model": "watched", "stream": True}
    more = {"input": "x"} if path == "/v1/responses" else {"max_tokens": 9000, "messages": CHAT["messages"]}
    async with front.http.stream("POST", path, content=json.dumps({**body, **more})) as response:
        async for line in response.aiter_lines():
            if "delta" in line:
                break
    await eventually(watched.ended.is_set)


async def test_a_model_that_is_no_chat(mesh: Mesh) -> None:
    from dynamo_grpc import ModelType
    from dynamo_grpc.cards import load_model

    from .front import FOLDER
    from .handlers import NAME

    async def generate(request: Any) -> Any:
        yield 300

    async with front_of(mesh) as front:
        model = load_model(FOLDER, "plain", model_type=ModelType.Completions)
        await mesh.serve(NAME, generate, model)
        await eventually(front.frontend.catalog.ready)
        told = await front.error({"model": "plain", "input": "x"}, 400, "/v1/responses")
        assert told["message"] == "model 'plain' does not serve responses: it is for 'completions'"
