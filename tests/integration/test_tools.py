"""Tools and reasoning through the whole frontend, as OpenAI's client sees them: every family, streamed and not."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from dynamo_grpc import ModelInput, ModelType, Worker
from dynamo_grpc.messages import to_struct
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import inference_pb2
from tests.corpora import TOOLS, Entry

from ..conftest import eventually
from .front import Front, front_of
from .scripted import OPENAI_TOOLS, SPECIAL, Scripted, entries_of, scripted
from .test_ingress import ask, opened
from .test_ingress import chat as ask_chat

FAMILIES = ["hermes", "llama3_json", "mistral", "pythonic", "qwen3_coder", "deepseek_v3", "deepseek_v3_2", "harmony"]


@contextlib.asynccontextmanager
async def talking(mesh: Mesh, worker: Scripted) -> AsyncIterator[Front]:
    await mesh.serve_worker(worker)
    async with front_of(mesh) as front:
        await eventually(lambda: len(front.frontend.catalog.ready()) == 1)
        yield front


def chat(name: str, entry: Entry | None = None, **more: Any) -> dict[str, Any]:
    """A request that is answered with an entry."""
    thinking = {"enable_thinking": True} if entry is not None and entry.is_thinking else {}
    extra = {**more.pop("extra_body", {}), "chat_template_kwargs": thinking}
    messages = [{"role": "user", "content": f"say {name};"}]
    return {"model": "scripted", "messages": messages, "tools": OPENAI_TOOLS, "extra_body": extra, **more}


def check(message: Any, finish: str, entry: Entry) -> None:
    """What the client put together is what the entry says."""
    assert (message.content or "", getattr(message, "reasoning_content", None) or "") == (entry.text, entry.reasoning)
    assert [call.function.name for call in message.tool_calls or ()] == [name for name, _ in entry.calls]
    for call, (_, wanted) in zip(message.tool_calls or (), entry.calls, strict=True):
        given = call.function.arguments
        assert given == wanted if isinstance(wanted, str) else json.loads(given) == wanted
        assert call.type == "function"
    ids = [call.id for call in message.tool_calls or ()]
    assert all(ids)
    assert len(set(ids)) == len(ids)
    assert finish == ("tool_calls" if entry.calls else "stop")


@pytest.mark.parametrize("family", FAMILIES)
async def test_every_entry_of_every_family(mesh: Mesh, family: str, tmp_path: Path) -> None:
    worker = scripted(tmp_path, family, reasoning="mistral" if family == "mistral" else "qwen3")
    async with talking(mesh, worker) as front:
        for name, entry in entries_of(family).items():
            if not entry.raw:
                continue
            for mark in SPECIAL.get(family, ()):  # special tokens are shown to nobody
                entry = replace(entry, text=entry.text.replace(mark, ""))  # noqa: PLW2901
            worker.step = 1
            async with front.openai.chat.completions.stream(**chat(name, entry)) as stream:
                streamed = (await stream.get_final_completion()).choices[0]
            check(streamed.message, streamed.finish_reason, entry)
            worker.step = 1000
            whole = await front.openai.chat.completions.create(**chat(name, entry))
            check(whole.choices[0].message, whole.choices[0].finish_reason, entry)
            assert (streamed.message.content or "") == (whole.choices[0].message.content or "")


async def test_the_stream_field_by_field(mesh: Mesh, tmp_path: Path) -> None:
    async with talking(mesh, scripted(tmp_path, "hermes")) as front:
        body = {**chat("reasoning and a call"), "stream": True, "stream_options": {"include_usage": True}}
        del body["extra_body"]
        lines = (await front.post(body)).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"]
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    first, *others = calls
    assert set(first) == {"index", "id", "type", "function"}
    assert (first["index"], first["type"]) == (0, "function")
    assert first["function"] == {"name": "get_weather", "arguments": ""}
    assert all(set(call) == {"index", "function"} and set(call["function"]) == {"arguments"} for call in others)
    assert len(others) > 2
    assert "".join(call["function"]["arguments"] for call in others) == '{"city": "Paris"}'
    thoughts = [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta]
    assert len(thoughts) > 1
    assert "".join(thoughts) == "I must look."
    assert [event["choices"][0]["finish_reason"] for event in events if event["choices"]][-1] == "tool_calls"
    details = events[-1]["usage"]["completion_tokens_details"]
    assert 0 < details["reasoning_tokens"] < events[-1]["usage"]["completion_tokens"]


async def test_a_call_cut_by_max_tokens(mesh: Mesh, tmp_path: Path) -> None:
    async with talking(mesh, scripted(tmp_path, "hermes")) as front:
        whole = await front.openai.chat.completions.create(**chat("one call"))
        num = whole.usage.completion_tokens
        for limit in range(1, num):
            cut = (await front.openai.chat.completions.create(**chat("one call", max_tokens=limit))).choices[0]
            assert cut.finish_reason == "length"
            told = cut.message.content or "".join(call.function.arguments for call in cut.message.tool_calls)
            assert told in (entries_of("hermes")["one call"].raw + '{"city": "Paris"}')


async def test_choices_and_stop_strings_and_logprobs(mesh: Mesh, tmp_path: Path) -> None:
    worker = scripted(tmp_path, "hermes", abilities=())
    async with talking(mesh, worker) as front:
        answer = await front.openai.chat.completions.create(**chat("text before and after", n=3))
        assert len(answer.choices) == 3
        ids = set()
        for choice in answer.choices:
            check(choice.message, choice.finish_reason, entries_of("hermes")["text before and after"])
            ids.add(choice.message.tool_calls[0].id)
        assert len(ids) == 3
        answer = await front.openai.chat.completions.create(**chat("text before and after", stop=["That"]))
        assert answer.choices[0].message.content == "Let me look."
        assert answer.choices[0].finish_reason == "tool_calls"
        answer = await front.openai.chat.completions.create(**chat("several", parallel_tool_calls=False))
        assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["get_weather"]


async def test_what_the_template_is_given(mesh: Mesh, tmp_path: Path) -> None:
    worker = scripted(tmp_path, "hermes")
    async with talking(mesh, worker) as front:

        async def prompt(**more: Any) -> str:
            body = {"model": "scripted", "tools": OPENAI_TOOLS, "max_tokens": 1, **more}
            tokens = (await front.post(body, "/tokenize")).json()["tokens"]
            assert (await front.post(body)).status_code == 200
            assert list(worker.asked.token_ids) == tokens
            return str(worker.tokenizer.decode(tokens, skip_special_tokens=False))

        user = {"role": "user", "content": "say plain;"}
        assert await prompt(messages=[user]) == (
            f"<tools>{json.dumps(OPENAI_TOOLS)}</tools><|user|>say plain;<|end|><|assistant|>"
        )
        assert await prompt(messages=[user], tool_choice="none") == "<|user|>say plain;<|end|><|assistant|>"
        named = {"type": "function", "function": {"name": "get_time"}}
        first = await prompt(messages=[user])
        body = {"model": "scripted", "messages": [user], "tools": OPENAI_TOOLS, "tool_choice": named, "max_tokens": 1}
        assert (await front.post(body)).status_code == 200  # it was cut: nothing is known
        alone = worker.tokenizer.decode(worker.asked.token_ids, skip_special_tokens=False)
        assert "get_time" in alone
        assert "get_weather" not in alone
        assert "get_weather" in first
        call = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": '{"a":  "é"}'}}
        turns = [user, {"role": "assistant", "content": None, "tool_calls": [call]}]
        turns += [{"role": "tool", "tool_call_id": "call_1", "content": "12:00"}]
        assert '<call id=call_1>get_time {"a": "é"}</call>' in await prompt(messages=turns)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tool_choice": "required", "tools": None}, "tool_choice", "no tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice", "'fly'"),
    ({"tools": [OPENAI_TOOLS[0], OPENAI_TOOLS[0]]}, "tools.1.function.name", "twice"),
    ({"tools": [{"type": "function"}]}, "tools.0.function", "Field required"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
    ({"tool_choice": "maybe"}, "tool_choice", "none"),
    ({"reasoning_effort": "extreme"}, "reasoning_effort", "low"),
    ({"chat_template": "fancy"}, "chat_template", "there are default"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]},
        "messages.0.tool_calls.0.function.name",
        "function",
    ),
    ({"functions": [{"name": "f"}]}, "functions", "not supported"),
]


@pytest.mark.parametrize(("change", "param", "said"), REFUSED)
async def test_wrong_requests(mesh: Mesh, tmp_path: Path, change: dict[str, Any], param: str, said: str) -> None:
    async with talking(mesh, scripted(tmp_path, "hermes")) as front:
        body = {key: value for key, value in {**chat("plain"), **change}.items() if key != "extra_body"}
        response = await front.post(body)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param
        assert said in error["message"]


async def test_schemas_that_are_nested_too_deeply(front: Front) -> None:
    deep: Any = {}
    for _ in range(900):
        deep = {"a": deep}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    for field, value in (
        ("guided_json", deep),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": deep}}),
        ("tools", [{"type": "function", "function": {"name": "f", "parameters": deep}}]),
    ):
        error = await front.error({**body, field: value}, 400)
        assert "nested too deeply" in error["message"]
        assert error["param"].startswith(field)


async def test_models_that_know_no_tools(mesh: Mesh, front: Front) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "tools": OPENAI_TOOLS}
    response = await front.post(body)
    assert response.status_code == 400
    assert "knows no tools" in response.json()["error"]["message"]
    assert (await front.post({**body, "tool_choice": "none", "max_tokens": 1})).status_code == 200
    assert (await front.post({**body, "tools": [], "max_tokens": 1})).status_code == 200
    response = await front.post({**body, "tools": None, "reasoning_effort": "low"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "reasoning_effort"


async def test_a_required_call(mesh: Mesh, tmp_path: Path) -> None:
    """Where the worker can't be held to it, the answer is looked at."""
    named = {"type": "function", "function": {"name": "get_weather"}}
    async with talking(mesh, scripted(tmp_path, "hermes")) as front:
        create = front.openai.chat.completions.create
        for choice, finish in (("required", "tool_calls"), (named, "stop")):
            answer = (await create(**chat("one call", tool_choice=choice))).choices[0]
            assert answer.finish_reason == finish
            assert answer.message.tool_calls[0].function.name == "get_weather"
            with pytest.raises(openai.InternalServerError, match="requires a call"):
                await create(**chat("plain", tool_choice=choice))
            with pytest.raises(openai.APIError, match="requires a call"):
                async for _ in await create(**chat("plain", tool_choice=choice, stream=True)):
                    pass
        with pytest.raises(openai.InternalServerError, match="called get_time"):
            await create(**chat("no arguments", tool_choice=named))


async def test_a_worker_that_is_held_to_a_call(mesh: Mesh, tmp_path: Path) -> None:
    worker = scripted(tmp_path, "hermes", abilities=("n", "guided_decoding"))
    named = {"type": "function", "function": {"name": "get_weather"}}
    async with talking(mesh, worker) as front:
        create = front.openai.chat.completions.create
        answer = (await create(**chat(': {"city": "Rome"}', tool_choice=named))).choices[0]
        assert json.loads(worker.asked.guided_decoding.json_schema)["required"] == ["city"]
        assert (answer.message.content, answer.finish_reason) == (None, "stop")
        assert answer.message.tool_calls[0].function.arguments == '{"city": "Rome"}'
        said = ': [{"name": "get_time", "parameters": {}}, {"name": "get_weather", "parameters": {"city": "Rome"}}]'
        answer = (await create(**chat(said, tool_choice="required"))).choices[0]
        schema = json.loads(worker.asked.guided_decoding.json_schema)
        assert (schema["type"], schema["minItems"], len(schema["items"]["anyOf"])) == ("array", 1, 3)
        assert [call.function.name for call in answer.message.tool_calls] == ["get_time", "get_weather"]
        assert answer.finish_reason == "tool_calls"
        await create(**chat(said, tool_choice="required", parallel_tool_calls=False))
        assert json.loads(worker.asked.guided_decoding.json_schema)["maxItems"] == 1
        with pytest.raises(openai.BadRequestError, match="another constraint"):
            await create(**chat(said, tool_choice="required", response_format={"type": "json_object"}))
        await create(**chat("plain"))
        assert not worker.asked.HasField("guided_decoding")


async def responses_of(front: Front, name: str, **more: Any) -> tuple[Any, Any]:
    """The answer of the Responses API, whole and as its client puts a stream together."""
    tools = [{"type": "function", **tool["function"]} for tool in OPENAI_TOOLS]
    options: dict[str, Any] = {"model": "scripted", "input": f"say {name};", "tools": tools, **more}
    whole = await front.openai.responses.create(**options)
    events = [event async for event in await front.openai.responses.create(**options, stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    streamed = events[-1].response
    added = [event.item for event in events if event.type == "response.output_item.added"]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.id for item in added] == [item.id for item in done] == [item.id for item in streamed.output]
    assert done == streamed.output
    for number, item in enumerate(done):
        deltas = [e.delta for e in events if e.type.endswith(".delta") and e.output_index == number]
        told = item.arguments if item.type == "function_call" else "".join(part.text for part in item.content)
        assert "".join(deltas) == told
    return whole, streamed


def shape_of(output: list[Any]) -> list[Any]:
    """What the items say, without their ids."""
    told = []
    for item in output:
        if item.type == "function_call":
            told.append((item.name, json.loads(item.arguments)))
        else:
            told.append((item.type, item.content[0].text))
    return told


async def test_the_responses_api(mesh: Mesh, tmp_path: Path) -> None:
    worker = scripted(tmp_path, "hermes")
    async with talking(mesh, worker) as front:
        wanted = {
            "text before and after": [
                ("message", "Let me look."), ("get_weather", {"city": "Paris"}), ("message", "\nThat was it.")
            ],
            "reasoning and a call": [("reasoning", "I must look."), ("get_weather", {"city": "Paris"})],
            "several": [("get_weather", {"city": "Paris"}), ("get_time", {})],
            "reasoning": [("reasoning", "Hm, <tool_call>?"), ("message", "Yes.")],
            "an empty call": [("message", "<tool_call>{}</tool_call>")],
        }  # fmt: skip
        for name, items in wanted.items():
            for worker.step in (1, 1000):
                for answer in await responses_of(front, name):
                    assert shape_of(answer.output) == items
                    assert answer.status == "completed"
        whole, _ = await responses_of(front, "reasoning and a call")
        assert whole.usage.output_tokens_details.reasoning_tokens > 0
        assert whole.tools[0].name == "get_weather"
        choice = {"type": "function", "name": "get_time"}
        whole, _ = await responses_of(front, "no arguments", tool_choice=choice, parallel_tool_calls=False)
        assert (whole.tool_choice.name, whole.parallel_tool_calls) == ("get_time", False)
        call = (await responses_of(front, "one call"))[0].output[0]
        turns = [
            {"role": "user", "content": "weather?"},
            {"type": "reasoning", "id": "r", "summary": [], "content": []},
        ]
        turns += [call.model_dump(exclude_none=True)]
        turns += [{"type": "function_call_output", "call_id": call.call_id, "output": "rain"}]
        turns += [{"role": "user", "content": "say plain;"}]
        answer = await front.openai.responses.create(model="scripted", input=turns)
        assert answer.output_text == entries_of("hermes")["plain"].text
        prompt = worker.tokenizer.decode(worker.asked.token_ids, skip_special_tokens=False)
        assert f'<call id={call.call_id}>get_weather {{"city": "Paris"}}</call><|end|><|tool|>rain<|end|>' in prompt


async def test_the_messages_api(mesh: Mesh, tmp_path: Path) -> None:
    import anthropic

    worker = scripted(tmp_path, "hermes")
    functions = [tool["function"] for tool in OPENAI_TOOLS]
    tools: Any = [{"name": one["name"], "input_schema": one["parameters"]} for one in functions]
    async with talking(mesh, worker) as front, anthropic.AsyncAnthropic(base_url=front.url, api_key="x") as client:

        async def both(name: str, **more: Any) -> list[Any]:
            messages: Any = [{"role": "user", "content": f"say {name};"}]
            options: Any = {"model": "scripted", "max_tokens": 500, "messages": messages, "tools": tools, **more}
            async with client.messages.stream(**options) as stream:
                streamed = await stream.get_final_message()
            return [await client.messages.create(**options), streamed]

        for worker.step in (1, 1000):
            for answer in await both("text before and after"):
                before, use, after = answer.content
                assert (before.text, use.name, use.input) == ("Let me look.", "get_weather", {"city": "Paris"})
                assert after.text == "\nThat was it."
                assert answer.stop_reason == "tool_use"
            for answer in await both("reasoning and a call", thinking={"type": "enabled", "budget_tokens": 1024}):
                thought, use = answer.content
                assert (thought.type, thought.thinking, use.id[:5]) == ("thinking", "I must look.", "call_")
        for answer in await both("several", tool_choice={"type": "any", "disable_parallel_tool_use": True}):
            assert [block.name for block in answer.content] == ["get_weather"]
        for answer in await both("no arguments", tool_choice={"type": "tool", "name": "get_time"}):
            assert (answer.content[0].input, answer.stop_reason) == ({}, "tool_use")
        for answer in await both("plain", tool_choice={"type": "none"}):
            assert answer.content[0].text == entries_of("hermes")["plain"].text
        use = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Rome"}}
        result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "rain"}]}
        messages: Any = [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, use]},
            {"role": "user", "content": [result, {"type": "text", "text": "say plain;"}]},
        ]
        await both("", messages=messages)
        prompt = worker.tokenizer.decode(worker.asked.token_ids, skip_special_tokens=False)
        told = '<call id=toolu_1>get_weather {"city": "Rome"}</call><|end|><|tool|>rain<|end|><|user|>say plain;<|end|>'
        assert told in prompt
        counted = await client.messages.count_tokens(model="scripted", messages=messages, tools=tools)
        assert counted.input_tokens == len(worker.asked.token_ids)
        begun: Any = [{"role": "user", "content": "say : it;"}, {"role": "assistant", "content": "The sea"}]
        await both("", messages=begun)
        assert worker.tokenizer.decode(worker.asked.token_ids, skip_special_tokens=False).endswith(
            "<|assistant|>The sea"
        )


class Reader(Worker):
    """A worker that takes messages and tools, and reads its answers itself."""

    model_name = "reader"
    model_input = ModelInput.Text
    model_type = ModelType.Chat
    capabilities = ("tools",)
    asked: Any = None

    async def generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        type(self).asked = request
        delta = inference_pb2.ChoiceDelta
        yield delta(reasoning="Hm")
        yield delta(reasoning=".", text="I ")
        yield "look."
        yield delta(tool_calls=[{"index": 0, "id": "c1", "name": "get_time"}])
        yield delta(tool_calls=[{"index": 0, "arguments": "{"}, {"index": 1, "id": "c2", "name": "get_weather"}])
        yield delta(tool_calls=[{"index": 0, "arguments": "}"}, {"index": 1, "arguments": '{"city": "x"}'}])


async def test_workers_that_read_their_answers_themselves(mesh: Mesh) -> None:
    await mesh.serve_worker(Reader())
    async with front_of(mesh, grpc_port=0) as front, opened(front) as client:
        await eventually(front.frontend.catalog.ready)
        turns: Any = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "tool_calls": [{"id": "c0", "type": "function", "function": {"name": "f"}}]},
            {"role": "tool", "tool_call_id": "c0", "content": "y"},
        ]
        options: dict[str, Any] = {"model": "reader", "messages": turns, "tools": OPENAI_TOOLS}
        async with front.openai.chat.completions.stream(**options) as stream:
            streamed = await stream.get_final_completion()
        whole = await front.openai.chat.completions.create(**options)
        for answer in (whole, streamed):
            choice = answer.choices[0]
            assert (choice.message.content, choice.message.reasoning_content) == ("I look.", "Hm.")
            told = [(call.id, call.function.name, call.function.arguments) for call in choice.message.tool_calls]
            assert told == [("c1", "get_time", "{}"), ("c2", "get_weather", '{"city": "x"}')]
            assert choice.finish_reason == "tool_calls"
        asked = Reader.asked
        assert asked.messages[1].tool_calls[0].name == "f"
        assert asked.messages[2].tool_call_id == "c0"
        assert dict(asked.tools)["tool_choice"] == "auto"
        assert [tool["function"]["name"] for tool in asked.tools["tools"]] == [*TOOLS]
        request = ask(messages=ask_chat("x"), tools=to_struct({"tools": OPENAI_TOOLS}))
        over_grpc = (await client.answer(request)).choices[0]
        once = (await client.inference.GenerateOnce(request)).choices[0]
        for answer in (over_grpc, once):
            assert (answer.text, answer.reasoning) == ("I look.", "Hm.")
            assert [(call.id, call.arguments) for call in answer.tool_calls] == [("c1", "{}"), ("c2", '{"city": "x"}')]
            assert answer.finish.reason == inference_pb2.FINISH_REASON_TOOL_CALLS


async def test_over_grpc(mesh: Mesh, tmp_path: Path) -> None:
    worker = scripted(tmp_path, "hermes")
    await mesh.serve_worker(worker)
    async with front_of(mesh, grpc_port=0) as front, opened(front) as client:
        await eventually(front.frontend.catalog.ready)
        for worker.step in (1, 1000):
            request = ask(
                messages=ask_chat("say reasoning and a call;"),
                tools=to_struct({"tools": OPENAI_TOOLS}),
                stop={"max_tokens": 200},
            )
            for answer in (await client.answer(request), await client.inference.GenerateOnce(request)):
                (choice,) = answer.choices
                (call,) = choice.tool_calls
                assert (choice.text, choice.reasoning) == ("", "I must look.")
                assert (call.name, call.arguments) == ("get_weather", '{"city": "Paris"}')
                assert choice.finish.reason == inference_pb2.FINISH_REASON_TOOL_CALLS
                assert 0 < answer.usage.reasoning_tokens < answer.usage.completion_tokens == len(choice.token_ids)
