"""The tiny model: its probabilities, its sampling, and that a request can go on elsewhere."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import dynamo_workers.tiny as tiny
import pytest
from dynamo_workers.tiny import sampling, train

from dynamo_grpc import Context
from dynamo_grpc.v1 import inference_pb2 as pb

LOGITS = [math.log(p) for p in (0.5, 0.25, 0.15, 0.1)]


def draws(times: int = 2000, **options: Any) -> Counter[int]:
    made = pb.SamplingOptions(**{"temperature": 1.0, **options})
    return Counter(sampling.draw(LOGITS, made, sampling.chance(1, 0, i)) for i in range(times))


def test_sampling_follows_the_distribution() -> None:
    seen = draws()
    assert [round(seen[t] / 2000, 1) for t in range(4)] == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.06)


@pytest.mark.parametrize(
    ("options", "possible"),
    [
        ({"temperature": 0.0}, {0}),
        ({"temperature": 1e-6}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 0}, {0, 1, 2, 3}),
        ({"top_k": -1}, {0, 1, 2, 3}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.74}, {0, 1}),
        ({"min_p": 0.4}, {0, 1}),
        ({"min_p": 0.25}, {0, 1, 2}),
    ],
)
def test_cut_offs(options: dict[str, Any], possible: set[int]) -> None:
    assert set(draws(**options)) == possible


def test_temperature_flattens() -> None:
    assert draws(temperature=5.0)[3] > draws(temperature=1.0)[3] > draws(temperature=0.3)[3]


def test_bias_and_penalties() -> None:
    def adjusted(prompt: set[int] = frozenset(), answer: Any = (), **options: Any) -> list[float]:  # type: ignore[assignment]
        return sampling.adjust(LOGITS, pb.SamplingOptions(**options), set(prompt), Counter(answer))

    assert adjusted(logit_bias={2: 3.0})[2] == pytest.approx(LOGITS[2] + 3.0)
    assert adjusted(answer=[1, 1], presence_penalty=1.0)[1] == pytest.approx(LOGITS[1] - 1.0)
    assert adjusted(answer=[1, 1], frequency_penalty=1.0)[1] == pytest.approx(LOGITS[1] - 2.0)
    assert adjusted(prompt={1}, presence_penalty=1.0) == LOGITS
    assert adjusted(prompt={1}, repetition_penalty=2.0)[1] == pytest.approx(LOGITS[1] * 2.0)


def test_chance_depends_on_seed_choice_and_position_alone() -> None:
    values = {sampling.chance(s, c, p) for s in range(5) for c in range(5) for p in range(5)}
    assert len(values) == 125
    assert all(0 <= value < 1 for value in values)
    assert sampling.chance(1, 2, 3) == sampling.chance(1, 2, 3)


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    return tiny.load()


async def generate(model: tuple[Any, Any], request: pb.PreprocessedRequest, count: int) -> dict[int, list[int]]:
    worker = tiny.Tiny()
    worker._model, worker._tokenizer = model
    worker._end = worker._tokenizer.token_to_id("<|end|>")
    answers: dict[int, list[int]] = {}
    context = Context()
    async for response in worker.generate(request, context):
        for choice in response.choices:
            answers.setdefault(choice.index, []).extend(choice.token_ids)
        if len(answers[0]) >= count:
            context.stop_generating()
    return answers


def ask(model: tuple[Any, Any], text: str, **options: Any) -> pb.PreprocessedRequest:
    ids = model[1].encode(f"<|begin|><|user|>{text}<|end|><|assistant|>").ids
    return pb.PreprocessedRequest(token_ids=ids, sampling_options=pb.SamplingOptions(**options))


async def test_probabilities_are_probabilities(model: tuple[Any, Any]) -> None:
    ngram, tokenizer = model
    weights = ngram.topic_weights("the sea")
    for context in ([], [5], [999999], tokenizer.encode("The sea covers").ids):
        probabilities = ngram.probabilities(context, weights)
        assert sum(probabilities) == pytest.approx(1.0)
        assert min(probabilities) >= 0.0
        assert all(probabilities[tokenizer.token_to_id(name)] == 0.0 for name in ("<|user|>", "<|begin|>"))


async def test_it_speaks_of_what_it_is_asked(model: tuple[Any, Any]) -> None:
    topics = (Path(tiny.__file__).parent / "corpus.txt").read_text().splitlines()
    for subject in ("sea", "bread", "trains"):
        (keywords,) = [line[2:].split(", ") for line in topics if line.startswith(f"# {subject},")]
        answer = await generate(model, ask(model, f"Tell me about {subject}", temperature=0.5, seed=1), 60)
        text = model[1].decode(answer[0])
        assert any(word in text.lower() for word in keywords), text


async def test_equal_seeds_give_equal_answers(model: tuple[Any, Any]) -> None:
    first = await generate(model, ask(model, "sea", seed=7, temperature=1.0, n=2), 30)
    assert first == await generate(model, ask(model, "sea", seed=7, temperature=1.0, n=2), 30)
    assert first[0] != first[1]
    assert first != await generate(model, ask(model, "sea", seed=8, temperature=1.0, n=2), 30)


async def test_a_request_goes_on_elsewhere_as_if_nothing_had_happened(model: tuple[Any, Any]) -> None:
    options = {"seed": 7, "temperature": 1.0, "presence_penalty": 0.5, "repetition_penalty": 1.1}
    request = ask(model, "sea", **options)
    whole = (await generate(model, request, 40))[0]
    for cut in (1, 17, 39):
        resumed = ask(model, "sea", **options)
        resumed.resume.num_prompt_tokens = len(request.token_ids)
        resumed.token_ids.extend(whole[:cut])
        assert whole[:cut] + (await generate(model, resumed, 40 - cut))[0] == whole


async def test_logprobs_are_the_models_own(model: tuple[Any, Any]) -> None:
    request = ask(model, "sea", seed=1, temperature=2.0, logit_bias={300: 5.0})
    request.output_options.logprobs = 3
    worker = tiny.Tiny()
    worker._model, worker._tokenizer = model
    worker._end = 1
    response = await anext(worker.generate(request, Context()))  # type: ignore[arg-type]
    logprobs = response.choices[0].logprobs
    probabilities = model[0].probabilities(request.token_ids, model[0].topic_weights("sea"))
    probabilities[1] = 0.0
    expected = math.log(probabilities[response.choices[0].token_ids[0]] / sum(probabilities))
    assert logprobs.token_logprobs[0] == pytest.approx(expected, abs=1e-4)
    assert list(logprobs.top[0].logprobs) == sorted(logprobs.top[0].logprobs, reverse=True)


async def test_it_goes_on_for_64_tokens(model: tuple[Any, Any]) -> None:
    for seed in range(5):
        answer = await generate(model, ask(model, "bread", seed=seed), 1000)
        assert answer[0].index(1) >= 64


def test_the_committed_model_is_what_training_gives(tmp_path: Path) -> None:
    train.train(tmp_path)
    folder = Path(tiny.__file__).parent / "model"
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in folder.iterdir()}
    for path in tmp_path.iterdir():
        assert json.loads(path.read_text()) == json.loads((folder / path.name).read_text()), path.name


def test_the_corpus_is_within_its_bounds() -> None:
    size = (Path(tiny.__file__).parent / "corpus.txt").stat().st_size
    assert 40_000 <= size <= 80_000
