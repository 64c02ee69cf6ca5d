"""Workers that take text and give text, streamed or in one piece, through every endpoint."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest

from dynamo_grpc import Context, ModelInput, Worker, prompt_text
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import inference_pb2 as pb

from ..conftest import eventually
from .front import Front, front_of


class Streamed(Worker):
    """Says words back, one by one, and what they were."""

    model_name = "text"
    model_input = ModelInput.Text

    async def generate(self, request: pb.PreprocessedRequest, context: Context) -> AsyncIterator[Any]:
        words = prompt_text(request).split()
        for word in words:
            yield f"{word.upper()} "
        yield pb.GenerateResponse(
            usage={"prompt_tokens": len(words), "completion_tokens": len(words), "cached_tokens": 1}
        )


class Unary(Worker):
    """Says all at once."""

    model_name = "text"
    model_input = ModelInput.Text

    async def generate(self, request: pb.PreprocessedRequest, context: Context) -> pb.GenerateResponse:
        words = prompt_text(request).split()
        usage = {"prompt_tokens": len(words), "completion_tokens": len(words), "cached_tokens": 1}
        return pb.GenerateResponse(choices=[{"text": "".join(f"{word.upper()} " for word in words)}], usage=usage)


@pytest.mark.parametrize("worker", [Streamed, Unary])
async def test_through_every_endpoint(mesh: Mesh, worker: type[Worker]) -> None:
    await mesh.serve_worker(worker())
    async with front_of(mesh) as front, anthropic.AsyncAnthropic(base_url=front.url, api_key="x") as claude:
        await eventually(front.frontend.catalog.ready)
        for stop, told, reason in ((None, "A BIRD IN THE HAND ", "stop"), (["N T", "zz"], "A BIRD I", "stop")):
            await chats(front, stop, told, reason)
            await others(front, claude, stop, told)


async def chats(front: Front, stop: Any, told: str, reason: str) -> None:
    options: dict[str, Any] = {"model": "text", "messages": [{"role": "user", "content": "a bird in the hand"}]}
    options |= {"stop": stop} if stop else {}
    whole = await front.openai.chat.completions.create(**options)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (told, reason)
    chunks = [
        chunk
        async for chunk in await front.openai.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    ]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == told
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == reason
    if not stop:  # else the worker was left before it told
        for usage in (whole.usage, chunks[-1].usage):
            assert (usage.prompt_tokens, usage.completion_tokens, usage.prompt_tokens_details.cached_tokens) == (
                5,
                5,
                1,
            )


async def others(front: Front, claude: anthropic.AsyncAnthropic, stop: Any, told: str) -> None:
    options: dict[str, Any] = {"model": "text", "prompt": "a bird in the hand", **({"stop": stop} if stop else {})}
    whole = await front.openai.completions.create(**options)
    assert whole.choices[0].text == told
    streamed = await front.openai.completions.create(**options, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in streamed if chunk.choices]) == told
    messages: Any = [{"role": "user", "content": "a bird in the hand"}]
    more: Any = {"stop_sequences": stop} if stop else {}
    message = await claude.messages.create(model="text", max_tokens=50, messages=messages, **more)
    assert message.content[0].text == told  # type: ignore[union-attr]
    assert message.stop_reason == ("stop_sequence" if stop else "end_turn")
    if stop:
        return
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 5)  # type: ignore[union-attr]
    assert (message.usage.input_tokens, message.usage.output_tokens) == (5, 5)
    response = await front.openai.responses.create(model="text", input="a bird in the hand")
    assert (response.output_text, response.usage.output_tokens) == (told, 5)  # type: ignore[union-attr]
    events = [
        e async for e in await front.openai.responses.create(model="text", input="a bird in the hand", stream=True)
    ]
    assert events[-1].response.output_text == told  # type: ignore[union-attr]
    assert events[-1].response.usage.total_tokens == 10  # type: ignore[union-attr]
