"""An answer that is cut anywhere and goes on elsewhere is the answer that was never cut."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_grpc.generation import Generation
from dynamo_grpc.migration import Answer
from dynamo_grpc.v1 import inference_pb2 as pb

PROMPT = [5, 6, 7]


def worker(request: pb.PreprocessedRequest, tokens: list[int], size: int) -> Iterator[pb.GenerateResponse | int]:
    """What a worker sends whose model says `tokens`, `size` of them in an output."""
    generation = Generation("test", request)
    start = len(request.token_ids) - (request.resume.num_prompt_tokens or len(request.token_ids))
    for at in range(start, len(tokens), size):
        part = tokens[at : at + size]
        if len(part) == 1 and generation.feed_token(part[0]):
            yield part[0]
        elif output := generation.feed(part):
            yield output
        if generation.is_finished:
            return
    if last := generation.end():
        yield last


def told(outputs: list[pb.GenerateResponse | int]) -> dict[str, Any]:
    """Tokens, finish reasons and usage of outputs."""
    tokens: list[int] = []
    finishes, usages = [], []
    for output in outputs:
        if isinstance(output, int):
            tokens.append(output)
            continue
        for delta in output.choices:
            tokens += delta.token_ids
            if delta.HasField("finish"):
                finishes.append((delta.finish.reason, delta.finish.stop_token_id))
        if output.HasField("usage"):
            usages.append((output.usage.prompt_tokens, output.usage.completion_tokens))
    return {"tokens": tokens, "finishes": finishes, "usages": usages}


@given(
    tokens=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    cuts=st.lists(st.integers(0, 12), max_size=3),
    size=st.integers(1, 4),
    max_tokens=st.one_of(st.none(), st.integers(1, 40)),
    min_tokens=st.one_of(st.none(), st.integers(0, 40)),
    stop=st.lists(st.integers(0, 9), max_size=2),
    eos=st.lists(st.integers(0, 9), max_size=1),
)
def test_cut_anywhere(
    tokens: list[int],
    cuts: list[int],
    size: int,
    max_tokens: int | None,
    min_tokens: int | None,
    stop: list[int],
    eos: list[int],
) -> None:
    request = pb.PreprocessedRequest(token_ids=PROMPT, eos_token_ids=eos)
    request.stop_conditions.stop_token_ids.extend(stop)
    if max_tokens is not None:
        request.stop_conditions.max_tokens = max_tokens
    if min_tokens is not None:
        request.stop_conditions.min_tokens = min(min_tokens, max_tokens or min_tokens)
    whole = told(list(worker(request, tokens, size)))
    answer, seen, sent = Answer(request, 3), [], request
    for cut in [*cuts, None]:
        outputs = list(worker(sent, tokens, size))
        part = outputs if cut is None else outputs[:cut]
        answer.add(part)
        seen += part
        if cut is None or len(part) == len(outputs):
            break
        if (ending := answer.ending()) is not None:
            seen.append(ending)
            break
        assert answer.refusal == ""
        sent = answer.resumed()
        assert list(sent.token_ids) == PROMPT + told(seen)["tokens"]
    result = told(seen)
    assert result["tokens"] == whole["tokens"]
    assert result["finishes"] == whole["finishes"]
    assert result["usages"] in (whole["usages"], [])  # lost with the end of a stream whose finish had come


@pytest.mark.parametrize(
    ("change", "outputs", "why"),
    [
        ({}, [1], ""),
        ({"sampling_options": pb.SamplingOptions(n=2)}, [1], "several choices"),
        ({"sampling_options": pb.SamplingOptions(best_of=2)}, [1], "several choices"),
        ({"guided_decoding": pb.GuidedDecoding(regex="a")}, [1], "guided decoding"),
        ({"token_ids": [], "text": "hi"}, [], "text"),
        ({}, [pb.GenerateResponse(choices=[pb.ChoiceDelta(text="hi")])], "text"),
    ],
)
def test_what_can_not_go_on(change: dict[str, Any], outputs: list[Any], why: str) -> None:
    answer = Answer(pb.PreprocessedRequest(**{"token_ids": PROMPT, **change}), 3)
    answer.add(outputs)
    assert why in answer.refusal
    assert bool(why) == bool(answer.refusal)


def test_the_limit() -> None:
    assert Answer(pb.PreprocessedRequest(token_ids=PROMPT), 0).refusal == "migration is off"
    answer = Answer(pb.PreprocessedRequest(token_ids=PROMPT), 2)
    for number in (1, 2):
        assert answer.refusal == ""
        assert answer.resumed().resume.num_attempts == number
    assert answer.refusal == "it has gone on elsewhere 2 times"
