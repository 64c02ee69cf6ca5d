"""Options of completions and chats that take more than one answer of a worker, and constraints that are handed on."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamo_grpc import Context, EngineShutdown, Worker
from dynamo_grpc.messages import to_dict
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import inference_pb2

from ..conftest import eventually
from .front import CHAT, FOLDER, Front, front_of, serve_beside

PATH = "/v1/completions"
ASK: dict[str, Any] = {"model": "tiny", "seed": 3, "max_tokens": 6}


async def complete(front: Front, **options: Any) -> dict[str, Any]:
    response = await front.post({**ASK, **options}, PATH)
    assert response.status_code == 200, response.text
    whole: dict[str, Any] = response.json()
    return whole


async def streamed(front: Front, body: dict[str, Any], path: str = PATH) -> dict[str, Any]:
    """The stream, folded to what the whole answer says: texts and ends by index, and the usage."""
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    response = await front.post(asked, path)
    assert response.text.endswith("data: [DONE]\n\n"), response.text
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    logprobs: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in event["choices"]:
            index = choice["index"]
            text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            texts[index] = texts.get(index, "") + text
            for name, values in (choice["logprobs"] or {}).items():
                told = logprobs.setdefault(index, {})
                told[name] = told.get(name, []) + (values or [])
            if choice["finish_reason"]:
                assert index not in ends
                ends[index] = choice["finish_reason"]
    return {"texts": texts, "ends": ends, "logprobs": logprobs, "usage": events[-1]["usage"]}


def folded(whole: dict[str, Any]) -> dict[str, Any]:
    return {
        "texts": {c["index"]: c["text"] if "text" in c else c["message"]["content"] for c in whole["choices"]},
        "ends": {c["index"]: c["finish_reason"] for c in whole["choices"]},
        "logprobs": {
            c["index"]: {name: values or [] for name, values in c["logprobs"].items()}
            for c in whole["choices"]
            if c["logprobs"]
        },
        "usage": whole["usage"],
    }


async def test_several_prompts_answer_as_each_alone(front: Front) -> None:
    prompts = ["The sea", "A friend", "In the morning"]
    alone = [await complete(front, prompt=prompt) for prompt in prompts]
    together = await complete(front, prompt=prompts)
    assert [c["index"] for c in together["choices"]] == [0, 1, 2]
    assert [c["text"] for c in together["choices"]] == [one["choices"][0]["text"] for one in alone]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert together["usage"][name] == sum(one["usage"][name] for one in alone)
    ids = [(await front.post({"model": "tiny", "prompt": p}, "/tokenize")).json()["tokens"] for p in prompts]
    assert folded(await complete(front, prompt=ids)) == folded(together)


async def test_the_folded_stream_is_the_whole_answer(front: Front) -> None:
    prompts = (["The sea"], ["The sea", "A friend 🌊"])
    options = itertools.product(prompts, (1, 3), (None, [" the", "a"]), (False, True), (None, 0, 2))
    for prompt, n, stop, echo, logprobs in options:
        body = {**ASK, "prompt": prompt, "n": n, "stop": stop, "echo": echo, "logprobs": logprobs}
        whole = folded(await complete(front, **body))
        assert await streamed(front, body) == whole, body
        assert len(whole["texts"]) == n * len(prompt)
        for index, text in whole["texts"].items():
            assert text.startswith(prompt[index // n]) or not echo
            if logprobs is None:
                assert whole["logprobs"] == {}
            else:
                check_logprobs(whole["logprobs"][index], text, logprobs, stop)


def check_logprobs(told: dict[str, Any], text: str, count: int, stop: Any) -> None:
    tokens = told["tokens"]
    assert len(tokens) == len(told["token_logprobs"]) == len(told["text_offset"])
    assert len(told["top_logprobs"]) == (len(tokens) if count else 0)
    for token, at in zip(tokens, told["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert text.startswith(token, at) or (stop and at + len(token) > len(text)), (token, at, text)
    for token, logprob, top in zip(tokens, told["token_logprobs"], told["top_logprobs"], strict=False):
        assert logprob is None or token not in top or top[token] == pytest.approx(logprob)


async def test_the_folded_stream_of_a_chat_is_the_whole_answer(front: Front) -> None:
    for n, stop, top in itertools.product((1, 3), (None, [" the"]), (None, 0, 3)):
        body = {**CHAT, "max_tokens": 6, "n": n, "stop": stop, "logprobs": top is not None, "top_logprobs": top}
        whole = folded((await front.post(body)).json())
        assert await streamed(front, body, "/v1/chat/completions") == whole
        for index, text in whole["texts"].items():
            if top is None:
                assert whole["logprobs"] == {}
                continue
            entries = whole["logprobs"][index]["content"]
            assert all(len(entry["top_logprobs"]) == top for entry in entries)
            said = b"".join(bytes(entry["bytes"]) for entry in entries).decode()
            assert said == text or (stop and said.startswith(text))


async def test_an_echo_says_how_likely_the_prompt_was(front: Front) -> None:
    prompt = "The sea covers most of the world"
    ids = (await front.post({"model": "tiny", "prompt": prompt}, "/tokenize")).json()["tokens"]
    for given in (prompt, ids):
        choice = (await complete(front, prompt=given, echo=True, logprobs=1, max_tokens=1))["choices"][0]
        told = choice["logprobs"]
        assert choice["text"].startswith(prompt)
        assert "".join(told["tokens"]) == choice["text"]
        assert len(told["tokens"]) == len(ids) + 1
        assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
        # as if it had been generated: the answer's first token is one more of the kind
        longer = (await complete(front, prompt=choice["text"], echo=True, logprobs=1, max_tokens=1))["choices"][0]
        assert longer["logprobs"]["token_logprobs"][len(ids)] == pytest.approx(told["token_logprobs"][-1], abs=1e-3)


class Plain(Worker):
    """Declares guided decoding, and not that it could make several choices; counts from its seed."""

    model_path = FOLDER
    model_name = "plain"
    capabilities = ("guided_decoding",)

    def __init__(self) -> None:
        self.requests: list[inference_pb2.PreprocessedRequest] = []

    async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[int]:
        self.requests.append(request)
        for count in range(3):
            yield 300 + request.sampling_options.seed * 3 + count


class Ending(Plain):
    """Ends at once, and tells of its prompt."""

    model_name = "ending"
    capabilities = ("logprobs", "prompt_logprobs")

    async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> Any:
        self.requests.append(request)
        count = len(request.token_ids)
        logprobs = inference_pb2.Logprobs(token_logprobs=[-float(n) for n in range(count)])
        delta = inference_pb2.ChoiceDelta(token_ids=[1], logprobs=inference_pb2.Logprobs(token_logprobs=[-9.0]))
        yield inference_pb2.GenerateResponse(prompt_info=inference_pb2.PromptInfo(logprobs=logprobs), choices=[delta])


async def test_who_scores_a_prompt_gets_one_token_behind_it_always(mesh: Mesh, front: Front) -> None:
    await serve_beside(mesh, front, Ending())
    body = {"model": "ending", "prompt": [316, 508, 271, 1026], "echo": True, "logprobs": 0}
    for max_tokens, told in ((1, [None, -1, -2, -3, -9]), (0, [None, -1, -2, -3])):
        whole = (await front.post({**body, "max_tokens": max_tokens}, PATH)).json()
        assert whole["choices"][0]["logprobs"]["token_logprobs"] == told
        assert whole["choices"][0]["finish_reason"] == "length"
        assert whole["usage"]["completion_tokens"] == max_tokens
        assert await streamed(front, {**body, "max_tokens": max_tokens}) == folded(whole)
    longer = (await front.post({**body, "max_tokens": 2}, PATH)).json()
    assert longer["choices"][0]["finish_reason"] == "stop"


async def test_offsets_are_places_in_the_text(front: Front) -> None:
    special = [3, 316, 508, 1, 271]
    broken = (await front.post({"model": "tiny", "prompt": " the wind is cold"}, "/tokenize")).json()["tokens"]
    for prompt in ("The sea", special, [316, 258, *broken]):
        choice = (await complete(front, prompt=prompt, echo=True, logprobs=1, max_tokens=4))["choices"][0]
        told, text = choice["logprobs"], choice["text"]
        for token, at in zip(told["tokens"], told["text_offset"], strict=True):
            if not token.startswith(("bytes:", "<|")):
                assert text.startswith(token, at), (prompt, token, at, text)
        for token, top in zip(told["tokens"], told["top_logprobs"], strict=True):
            assert top is None or token in top


async def test_nulls_are_as_good_as_nothing(front: Front) -> None:
    nothing = {"stream": None, "n": None, "stop": None, "logprobs": None, "temperature": None, "stream_options": None}
    assert (await front.post({**CHAT, "max_tokens": 1, **nothing})).status_code == 200
    assert (await front.post({**ASK, "prompt": "x", "echo": None, **nothing}, PATH)).status_code == 200
    body = {"model": "tiny", "input": "x", "max_output_tokens": 1, "stream": None, "temperature": None}
    assert (await front.post(body, "/v1/responses")).status_code == 200


async def test_a_whole_answer_is_tried_as_often_as_a_stream(mesh: Mesh, front: Front) -> None:
    asked = []

    class Leaving(Plain):
        model_name = "leaving"

        async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[int]:
            asked.append(self)
            raise EngineShutdown("elsewhere")
            yield 1

    for _ in range(5):
        await mesh.serve_worker(Leaving())
    await eventually(lambda: len(front.frontend.catalog.ready()) == 2)
    await eventually(lambda: len(front.frontend.catalog.ready()[0].instances.routable()) == 5)
    await front.error({**CHAT, "model": "leaving"}, 503)
    assert len(asked) == 4


async def test_a_worker_that_owes_log_probabilities_is_named(mesh: Mesh, front: Front) -> None:
    class Silent(Plain):
        model_name = "silent"
        capabilities = ("logprobs", "prompt_logprobs")

        async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> Any:
            yield 300

    await serve_beside(mesh, front, Silent())
    body = {"model": "silent", "prompt": "x", "echo": True, "logprobs": 0}
    assert "its first output has 0 of them" in (await front.error(body, 500, PATH))["message"]
    assert "tokens with 0 logprobs" in (await front.error({**body, "echo": False}, 500, PATH))["message"]


async def test_the_best_of_several(front: Front) -> None:
    eight = await complete(front, prompt="The sea", n=8, logprobs=0)

    def score(choice: dict[str, Any]) -> float:
        logprobs: list[float] = choice["logprobs"]["token_logprobs"]
        return sum(logprobs) / len(logprobs)

    ranked = sorted(eight["choices"], key=score, reverse=True)
    best = await complete(front, prompt="The sea", n=2, best_of=8)
    assert [c["text"] for c in best["choices"]] == [c["text"] for c in ranked[:2]]
    assert [(c["index"], c["logprobs"]) for c in best["choices"]] == [(0, None), (1, None)]
    assert best["usage"] == eight["usage"]  # all that was generated
    shown = await complete(front, prompt=["The sea", "The sea"], best_of=8, logprobs=1)
    assert [c["text"] for c in shown["choices"]] == [ranked[0]["text"]] * 2
    assert shown["choices"][0]["logprobs"]["token_logprobs"] == ranked[0]["logprobs"]["token_logprobs"]
    told = await front.error({**ASK, "prompt": "x", "best_of": 2, "stream": True}, 400, PATH)
    assert told["param"] == "best_of"
    assert (await front.error({**ASK, "prompt": "x", "best_of": 2, "n": 3}, 400, PATH))["param"] == "best_of"
    echoed = await complete(front, prompt="The sea", n=2, best_of=8, echo=True, logprobs=0)
    assert [c["text"] for c in echoed["choices"]] == ["The sea" + c["text"] for c in ranked[:2]]


async def test_choices_of_a_worker_that_makes_one_at_a_time(mesh: Mesh, front: Front) -> None:
    worker = Plain()
    await serve_beside(mesh, front, worker)
    body = {**CHAT, "model": "plain", "n": 3, "seed": 5}
    whole = (await front.post(body)).json()
    assert [(r.sampling_options.n, r.sampling_options.seed) for r in worker.requests] == [(0, 5), (0, 6), (0, 7)]
    assert len({c["message"]["content"] for c in whole["choices"]}) == 3
    one = (await front.post({**body, "n": 1})).json()
    assert one["choices"][0]["message"]["content"] == whole["choices"][0]["message"]["content"]
    assert whole["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
    assert whole["usage"]["completion_tokens"] == 3 * one["usage"]["completion_tokens"]
    assert await streamed(front, body, "/v1/chat/completions") == folded(whole)


async def test_what_the_client_says_of_itself_reaches_the_worker(mesh: Mesh, front: Front) -> None:
    worker = Plain()
    await serve_beside(mesh, front, worker)
    said = {"user": "u1", "metadata": {"team": "sea"}}
    await front.post({**CHAT, "model": "plain", **said})
    assert to_dict(worker.requests[-1])["extensions"] == said
    await front.post({"model": "plain", "input": "x", **said}, "/v1/responses")
    assert to_dict(worker.requests[-1])["extensions"] == said
    await front.post({**CHAT, "model": "plain"})
    assert "extensions" not in to_dict(worker.requests[-1])


async def test_when_one_choice_fails_the_answer_does(mesh: Mesh) -> None:
    ended = []

    class Failing(Plain):
        model_name = "failing"

        async def generate(self, request: inference_pb2.PreprocessedRequest, context: Context) -> AsyncIterator[int]:
            try:
                yield 300
                if request.sampling_options.seed == 6:
                    raise ValueError("an unlucky seed")
                while True:
                    yield 301
            finally:
                ended.append(request.sampling_options.seed)

    async with front_of(mesh) as front:
        runtime = await mesh.serve_worker(Failing())
        await eventually(front.frontend.catalog.ready)
        body = {**CHAT, "model": "failing", "n": 3, "seed": 5}
        assert (await front.error(body, 400))["message"] == "an unlucky seed"
        await eventually(lambda: sorted(ended) == [5, 6, 7])  # nobody goes on for nobody
        response = await front.post({**body, "stream": True})
        assert "an unlucky seed" in response.text
        assert "[DONE]" not in response.text
        await eventually(lambda: not runtime.server.requests)


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", True),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
            "json_schema",
            '{"type":"object"}',
        ),
        ({"guided_json": {"type": "array"}}, "json_schema", '{"type":"array"}'),
        ({"guided_json": '{"type":"array"}'}, "json_schema", '{"type":"array"}'),
        ({"guided_regex": "[a-z]+"}, "regex", "[a-z]+"),
        ({"guided_grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
        ({"guided_choice": ["yes", "no"]}, "choice", inference_pb2.GuidedChoice(choices=["yes", "no"])),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_constraints_are_handed_to_workers_that_declare_them(
    mesh: Mesh, options: dict[str, Any], field: str, value: Any
) -> None:
    import dynamo_workers.tiny as tiny

    worker = Plain()
    async with front_of(mesh) as front:
        await mesh.serve_worker(tiny.Tiny())
        await eventually(front.frontend.catalog.ready)
        await serve_beside(mesh, front, worker)
        assert (await front.post({**CHAT, "model": "plain", **options})).status_code == 200
        guided = worker.requests[-1].guided_decoding
        assert guided.WhichOneof("constraint") == field
        assert getattr(guided, field) == value
        assert (await front.error({**ASK, "model": "plain", "prompt": "x", "echo": True, "logprobs": 1}, 400, PATH))[
            "param"
        ] == "logprobs"
        told = await front.error({**CHAT, **options}, 400)
        assert told["param"] == next(iter(options))
        assert "does not declare the capability 'guided_decoding'" in told["message"]


async def test_constraints_that_can_not_be(front: Front) -> None:
    for change, param in (
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"guided_regex": "a", "guided_grammar": "b"}, "guided_grammar"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format"),
    ):
        assert (await front.error({**CHAT, **change}, 400))["param"] == param
    fine = await front.post({**CHAT, "max_tokens": 1, "response_format": {"type": "text"}})
    assert fine.status_code == 200


async def test_tokens_there_and_back(front: Front) -> None:
    text = "Größe: the sea 🌊 is wide"
    told = (await front.post({"model": "tiny", "prompt": text}, "/tokenize")).json()
    assert told["count"] == len(told["tokens"])
    assert told["max_model_len"] == 8192
    back = (await front.post({"model": "tiny", "tokens": told["tokens"]}, "/detokenize")).json()
    assert back == {"prompt": text}
    chat = (await front.post({"model": "tiny", "messages": CHAT["messages"]}, "/tokenize")).json()
    asked = (await front.post({**CHAT, "max_tokens": 1})).json()
    assert chat["count"] == asked["usage"]["prompt_tokens"]
    for body, path, param in (
        ({"model": "tiny"}, "/tokenize", "prompt"),
        ({"model": "tiny", "tokens": [999_999]}, "/detokenize", "tokens"),
        ({"model": "tiny", "tokens": "x"}, "/detokenize", "tokens"),
    ):
        assert (await front.error(body, 400, path))["param"] == param
    assert (await front.error({"model": "nobody", "prompt": "x"}, 404, "/tokenize"))["param"] == "model"


async def test_unknown_fields_can_be_refused(mesh: Mesh) -> None:
    import dynamo_workers.tiny as tiny

    async with front_of(mesh, is_strict=True) as front:
        await mesh.serve_worker(tiny.Tiny())
        await eventually(front.frontend.catalog.ready)
        assert (await front.post({**CHAT, "max_tokens": 1})).status_code == 200
        told = await front.error({**CHAT, "max_token": 1}, 400)
        assert (told["param"], told["message"]) == ("max_token", "unknown fields: max_token (--strict)")


async def test_the_usage_so_far_in_every_event(front: Front) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = await front.post({**CHAT, "max_tokens": 5, "stream": True, "stream_options": options})
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == [0, 1, 2, 3, 4, 5, 5, 5]  # the role, five tokens, the end, the usage of the whole
