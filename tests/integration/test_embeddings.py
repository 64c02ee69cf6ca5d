"""Vectors: over HTTP as OpenAI's client asks for them, over gRPC, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from dynamo_workers.minilm import MiniLm
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from dynamo_grpc import Context, HttpError, ModelInput, ModelType, OverloadedError, UnsupportedError, Worker
from dynamo_grpc.cards import load_model
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import inference_pb2, inference_pb2_grpc

from ..conftest import eventually
from ..unit.test_minilm import VECTORS, make_folder
from .front import CHAT, FOLDER, Front, front_of

PATH = "/v1/embeddings"


def vector(token_ids: Any, length: int = 4) -> list[float]:
    return [len(token_ids), 0.1, token_ids[0] / 7, sum(token_ids) / 11][:length]


class Embedder(Worker):
    """Vectors that say what they are made from."""

    model_path = FOLDER
    model_name = "vectors"
    model_type = ModelType.Embedding
    capabilities = ("dimensions",)
    max_concurrent = 2
    max_queued = 0

    def __init__(self) -> None:
        self.go, self.num_asked, self.num_ended = asyncio.Event(), 0, 0
        self.go.set()
        self.gives: Any = None
        self.fails: Exception | None = None

    async def generate(self, request: inference_pb2.EmbedRequest, context: Context) -> Any:
        self.num_asked += 1
        try:
            await self.go.wait()
            if self.fails:
                raise self.fails
            if self.gives is not None:
                return self.gives
            return [vector(one.token_ids, request.dimensions or 4) for one in request.inputs]
        finally:
            self.num_ended += 1


@pytest.fixture
async def embedder() -> Embedder:
    return Embedder()


@pytest.fixture
async def served(embedder: Embedder) -> AsyncIterator[tuple[Front, Mesh]]:
    async with Mesh() as mesh:
        await mesh.serve_worker(embedder)
        async with front_of(mesh) as front:
            await eventually(front.frontend.catalog.ready)
            yield front, mesh


async def ids_of(front: Front, text: str) -> list[int]:
    return list((await front.post({"model": "vectors", "prompt": text}, "/tokenize")).json()["tokens"])


async def test_the_official_client_gets_the_vectors_of_its_inputs(served: tuple[Front, Mesh]) -> None:
    front, _ = served
    texts = ["The sea", "A friend of the morning"]
    ids = [await ids_of(front, text) for text in texts]
    wanted = [pytest.approx(vector(one)) for one in ids]
    packed = await front.openai.embeddings.create(model="vectors", input=texts)  # as base64, unless told otherwise
    plain = await front.openai.embeddings.create(model="vectors", input=texts, encoding_format="float")
    by_ids = await front.openai.embeddings.create(model="vectors", input=ids)
    for answer in (packed, plain, by_ids):
        assert [one.embedding for one in answer.data] == wanted
        assert [(one.index, one.object) for one in answer.data] == [(0, "embedding"), (1, "embedding")]
        assert answer.object == "list"
        assert answer.model == "vectors"
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
    one = await front.openai.embeddings.create(model="vectors", input=texts[0], dimensions=2)
    assert [len(item.embedding) for item in one.data] == [2]
    assert 'endpoint="embeddings",error_type="",model="vectors"' in (await front.http.get("/metrics")).text


async def test_more_texts_than_fit_on_the_loop_keep_their_order(served: tuple[Front, Mesh]) -> None:
    front, _ = served
    texts = [f"number {number} " + "sea " * (number % 7) for number in range(2048)]
    answer = (await front.post({"model": "vectors", "input": texts}, PATH)).json()
    assert [one["index"] for one in answer["data"]] == list(range(2048))
    for number in (0, 1, 700, 2047):
        assert answer["data"][number]["embedding"] == pytest.approx(vector(await ids_of(front, texts[number])))


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"input": ""}, "input.0", "is empty"),
    ({"input": []}, "input.0", "is empty"),
    ({"input": ["a", ""]}, "input.1", "is empty"),
    ({"input": [[1], [-1]]}, "input.1", "token ids are from 0"),
    ({"input": [[1], [10**6]]}, "input.1", "outside the vocabulary"),
    ({"input": ["a"] * 2049}, "input", "at most 2048"),
    ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
    ({"input": "a", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
    ({"input": "a", "stream": True}, "stream", "one piece"),
    ({"input": "a", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens", "not supported"),
    ({}, "input", "required"),
]


async def test_what_is_wrong_is_said(served: tuple[Front, Mesh]) -> None:
    for more, param, says in WRONG:
        error = await served[0].error({"model": "vectors", **more}, 400, PATH)
        assert says in error["message"]
        assert error["param"] == param


async def test_a_text_that_can_t_fit_is_not_even_tokenized(served: tuple[Front, Mesh]) -> None:
    error = await served[0].error({"model": "vectors", "input": ["a", "sea " * 200_000]}, 400, PATH)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "input"


async def test_models_are_asked_for_what_they_are_for_alone(served: tuple[Front, Mesh]) -> None:
    front, mesh = served
    error = await front.error({**CHAT, "model": "vectors"}, 400)
    assert error["message"] == "model 'vectors' does not serve chat completions: it is for 'embedding'"
    live = front.frontend.catalog.ready()[0].instances.routable()[0]
    async with grpc.aio.insecure_channel(live.instance.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="makes embeddings alone: call Embed"):
            await stub.GenerateOnce(inference_pb2.PreprocessedRequest(token_ids=[1]))
        inputs = [inference_pb2.EmbedInput(token_ids=[1, 2])]
        answer = await stub.Embed(inference_pb2.EmbedRequest(inputs=inputs))  # no model named: there is one alone
        assert list(answer.embeddings[0].values) == pytest.approx(vector([1, 2]))
        assert answer.usage.prompt_tokens == 2
    client = await mesh.client("dynamo.backend.generate")
    items = [item async for item in await client.generate(inference_pb2.EmbedRequest(inputs=inputs), annotated=False)]
    assert items == [pytest.approx(vector([1, 2]))]


async def test_a_model_of_text_is_given_text(mesh: Mesh) -> None:
    async def handler(request: dict[str, Any]) -> AsyncIterator[Any]:
        for one in request["inputs"]:
            yield [[float(len(one["text"]))]]  # some at a time

    model = load_model(None, "words", model_input=ModelInput.Text, model_type=ModelType.Embedding)
    await mesh.serve("dynamo.backend.words", handler, model)
    async with front_of(mesh) as front:
        await eventually(front.frontend.catalog.ready)
        answer = (await front.post({"model": "words", "input": ["a", "four"]}, PATH)).json()
        assert [one["embedding"] for one in answer["data"]] == [[1.0], [4.0]]
        error = await front.error({"model": "words", "input": [1, 2]}, 400, PATH)
        assert error["message"] == "model 'words' takes text, not token_ids"


NO_VECTORS: list[tuple[Any, str]] = [
    ([], "0 vectors for 1 inputs"),
    ([[1.0], [2.0]], "2 vectors for 1 inputs"),
    ([["x"]], "as a vector"),
    ([[float("nan")]], "no numbers"),
    ([[]], "of lengths 0"),
    ([[10**400]], "as a vector"),
    (7, "yielded 7 (int)"),
]


async def test_a_handler_that_gives_no_vectors_is_named(served: tuple[Front, Mesh], embedder: Embedder) -> None:
    for gives, says in NO_VECTORS:
        embedder.gives = gives
        error = await served[0].error({"model": "vectors", "input": "a"}, 500, PATH)
        assert "Embedder.generate yielded" in error["message"]
        assert says in error["message"]


async def test_counts_add_up_and_the_user_reaches_the_worker(mesh: Mesh) -> None:
    seen: list[dict[str, Any]] = []

    async def handler(request: dict[str, Any]) -> AsyncIterator[Any]:
        seen.append(request)
        for count, _ in enumerate(request["inputs"], start=3):
            usage = inference_pb2.Usage(prompt_tokens=count)
            yield inference_pb2.EmbedResponse(embeddings=[inference_pb2.Embedding(values=[1.0])], usage=usage)

    model = load_model(None, "words", model_input=ModelInput.Text, model_type=ModelType.Embedding)
    await mesh.serve("dynamo.backend.words", handler, model)
    async with front_of(mesh) as front:
        await eventually(front.frontend.catalog.ready)
        body = {"model": "words", "input": ["a", "b"], "user": "u1", "encoding_format": None, "stream": None}
        assert (await front.post(body, PATH)).json()["usage"]["prompt_tokens"] == 7
        assert seen[0]["extensions"] == {"user": "u1"}


async def test_one_that_hangs_after_its_wait_is_given_up(mesh: Mesh, embedder: Embedder) -> None:
    embedder.max_concurrent, embedder.max_queued = 1, 4  # type: ignore[misc]
    await mesh.serve_worker(embedder)
    async with front_of(mesh, first_output_timeout_s=0.3, instance_wait_s=0.1) as front:
        await eventually(front.frontend.catalog.ready)
        embedder.go.clear()
        asking = [asyncio.ensure_future(front.post({"model": "vectors", "input": "a"}, PATH)) for _ in range(2)]
        assert [answer.status_code for answer in await asyncio.wait_for(asyncio.gather(*asking), 10)] == [504, 504]


async def test_an_array_of_any_size_holds_nobody(served: tuple[Front, Mesh], embedder: Embedder) -> None:
    class Row:
        """As numpy's: numbers that come as a list when asked for it."""

        def tolist(self) -> list[float]:
            return [0.5] * 2000

    embedder.gives = [Row()] * 2048
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.ensure_future(count())
    body = {"model": "vectors", "input": ["a"] * 2048, "encoding_format": "base64"}
    assert len((await served[0].post(body, PATH)).json()["data"]) == 2048
    counting.cancel()
    assert turns > 50


async def test_errors_of_the_handler_reach_the_client(served: tuple[Front, Mesh], embedder: Embedder) -> None:
    front, _ = served
    embedder.fails = HttpError(422, "not this one")
    assert "not this one" in (await front.error({"model": "vectors", "input": "a"}, 422, PATH))["message"]
    embedder.fails = UnsupportedError("no such thing")
    assert (await front.error({"model": "vectors", "input": "a"}, 400, PATH))["code"] == "unsupported_value"


async def test_a_client_that_leaves_ends_the_handler(served: tuple[Front, Mesh], embedder: Embedder) -> None:
    embedder.go.clear()
    asking = asyncio.ensure_future(served[0].post({"model": "vectors", "input": "a"}, PATH))
    await eventually(lambda: embedder.num_asked == 1)
    asking.cancel()
    await eventually(lambda: embedder.num_ended == 1)


async def test_a_full_worker_refuses_with_when_to_come_back(served: tuple[Front, Mesh], embedder: Embedder) -> None:
    front, _ = served
    embedder.go.clear()
    running = [asyncio.ensure_future(front.post({"model": "vectors", "input": "a"}, PATH)) for _ in range(2)]
    await eventually(lambda: embedder.num_asked == 2)
    with pytest.raises(openai.InternalServerError) as refused:
        await front.openai.embeddings.create(model="vectors", input="a")
    assert refused.value.status_code == OverloadedError.http_status == 503
    assert int(refused.value.response.headers["retry-after"]) >= 1
    embedder.go.set()
    assert [answer.status_code for answer in await asyncio.gather(*running)] == [200, 200]


async def test_a_worker_that_is_lost_costs_only_time(embedder: Embedder) -> None:
    other = Embedder()
    async with Mesh() as mesh:
        runtimes = [await mesh.serve_worker(worker) for worker in (embedder, other)]
        async with front_of(mesh) as front:
            await eventually(front.frontend.catalog.ready)
            model = front.frontend.catalog.ready()[0]
            await eventually(lambda: len(model.instances.routable()) == 2)
            for worker in (embedder, other):
                worker.go.clear()
            asking = asyncio.ensure_future(front.post({"model": "vectors", "input": "The sea"}, PATH))
            await eventually(lambda: embedder.num_asked + other.num_asked == 1)
            first = 0 if embedder.num_asked else 1
            (other, embedder)[first].go.set()
            await mesh.lose(runtimes[first])
            assert (await asking).json()["data"][0]["embedding"] == pytest.approx(
                vector(await ids_of(front, "The sea"))
            )
            assert embedder.num_asked + other.num_asked == 2


async def test_a_real_model(mesh: Mesh, tmp_path: Path) -> None:
    """The worker that computes: here of a small model, beside many others' requests."""
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3} | {f"w{n}": n for n in range(4, 50)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])  # type: ignore[assignment]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    worker = MiniLm()
    await mesh.serve_worker(worker, make_folder(tmp_path), "small")
    try:
        async with front_of(mesh) as front:
            await eventually(front.frontend.catalog.ready)
            wanted = json.loads((VECTORS / "small.json").read_text())["rows"]
            texts = [" ".join(f"w{n}" for n in row["token_ids"][1:-1]) or "" for row in wanted]
            create = front.openai.embeddings.create
            told = await create(model="small", input=[texts[0], texts[2]])
            for one, row in zip(told.data, (wanted[0], wanted[2]), strict=True):
                assert one.embedding == pytest.approx(row["vector"], abs=1e-4)
            assert told.usage.prompt_tokens == len(wanted[0]["token_ids"]) + len(wanted[2]["token_ids"])
            by_ids = await create(model="small", input=[row["token_ids"] for row in wanted], encoding_format="float")
            assert by_ids.data[1].embedding == pytest.approx(wanted[1]["vector"], abs=1e-4)
            many = await asyncio.gather(*(create(model="small", input=f"w{n} w5") for n in range(4, 44)))
            assert len({tuple(one.data[0].embedding) for one in many}) == 40
            assert worker._batches.num_batches < 40
            with pytest.raises(openai.BadRequestError, match="reads 64"):
                await create(model="small", input=[[5] * 65])
            with pytest.raises(openai.BadRequestError, match="dimensions"):
                await create(model="small", input="w5", dimensions=8)
            with pytest.raises(openai.BadRequestError, match="embedding"):
                await front.openai.chat.completions.create(model="small", messages=[{"role": "user", "content": "x"}])
    finally:
        await worker.close()
