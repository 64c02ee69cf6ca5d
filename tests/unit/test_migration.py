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
    answer, seen, sent, ending = Answer(request, 3), [], request, None
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
        answer.num_migrations += 1
        assert list(sent.token_ids) == PROMPT + told(seen)["tokens"]
    result = told(seen)
    assert result["tokens"] == whole["tokens"]
    assert result["finishes"] == whole["finishes"]
    if ending is None:  # else it was lost with the end of a stream whose finish had come
        assert result["usages"] == whole["usages"]


@pytest.mark.parametrize(
    ("change", "outputs", "why"),
    [
        ({}, [1], ""),
        ({"sampling_options": pb.SamplingOptions(n=2)}, [1], "several choices"),
        ({"sampling_options": pb.SamplingOptions(best_of=2)}, [1], "several choices"),
        ({"guided_decoding": pb.GuidedDecoding(regex="a")}, [1], "guided decoding"),
        ({"token_ids": [], "text": "hi"}, [], "text"),
        ({}, [pb.GenerateResponse(choices=[pb.ChoiceDelta(text="hi")])], "text"),
        ({}, [pb.GenerateResponse(choices=[pb.ChoiceDelta(text="hi", token_ids=[4])])], "text"),
        ({}, [pb.GenerateResponse(choices=[pb.ChoiceDelta(index=1, token_ids=[4])])], "several choices"),
        ({"stop_conditions": pb.StopConditions(max_thinking_tokens=9)}, [1], "thinking"),
    ],
)
def test_what_can_not_go_on(change: dict[str, Any], outputs: list[Any], why: str) -> None:
    answer = Answer(pb.PreprocessedRequest(**{"token_ids": PROMPT, **change}), 3)
    answer.add(outputs)
    assert why in answer.refusal
    assert bool(why) == bool(answer.refusal)
    answer.add([pb.GenerateResponse(choices=[pb.ChoiceDelta(finish=pb.FinishInfo(reason=1))])])
    assert (answer.ending() is None) == bool(why)  # what is missing of the others isn't known


@pytest.mark.parametrize(
    ("stop", "eos", "reason"),
    [
        ({"max_tokens": 3}, [], pb.FINISH_REASON_LENGTH),
        ({"max_tokens": 4}, [], None),
        ({"max_tokens": 4}, [12], pb.FINISH_REASON_STOP),
        ({"max_tokens": 4, "ignore_eos": True}, [12], None),
        ({"stop_token_ids": [12]}, [], pb.FINISH_REASON_STOP),
        ({"stop_token_ids": [12], "min_tokens": 4}, [], None),
    ],
)
def test_an_answer_that_was_whole_without_saying_so(stop: dict[str, Any], eos: list[int], reason: int | None) -> None:
    """As with a plain servicer that tells the finish in an output of its own."""
    request = pb.PreprocessedRequest(token_ids=PROMPT, eos_token_ids=eos, stop_conditions=pb.StopConditions(**stop))
    answer = Answer(request, 3)
    answer.add([10, 11, 12])
    ending = answer.ending()
    assert (ending.choices[0].finish.reason if ending else None) == reason
    stopped = answer.ending(is_stopped=True)
    assert stopped
    assert stopped.choices[0].finish.reason == (reason or pb.FINISH_REASON_CANCELLED)


def test_what_belongs_to_the_first_worker_stays_there() -> None:
    request = pb.PreprocessedRequest(token_ids=PROMPT, output_options=pb.OutputOptions(prompt_logprobs=2, logprobs=1))
    request.prefill_result.instance_id = 7
    request.kv_transfer_params.update({"a": 1})
    answer = Answer(request, 3)
    answer.add([1])
    resumed = answer.resumed("the card")
    assert not resumed.HasField("prefill_result")
    assert not resumed.HasField("kv_transfer_params")
    assert not resumed.output_options.HasField("prompt_logprobs")
    assert resumed.output_options.logprobs == 1
    assert resumed.mdc_sum == "the card"
    request.mdc_sum = "asked for"
    assert answer.resumed("the card").mdc_sum == "asked for"


def test_the_limit() -> None:
    assert Answer(pb.PreprocessedRequest(token_ids=PROMPT), 0).refusal == "migration is off"
    answer = Answer(pb.PreprocessedRequest(token_ids=PROMPT), 2)
    for number in (1, 2):
        assert answer.refusal == ""
        assert answer.resumed().resume.num_attempts == number
        answer.num_migrations += 1
    assert answer.refusal == "it has gone on elsewhere 2 times"
