"""What the library does with the items of a model's handler."""

import pytest

from dynamo_grpc import HandlerOutputError
from dynamo_grpc.generation import Generation
from dynamo_grpc.v1 import inference_pb2 as pb

EOS = 9


def run(
    items: list[object], *, n: int | None = None, is_stopped: bool = False, **stop: object
) -> list[pb.GenerateResponse]:
    request = pb.PreprocessedRequest(token_ids=[1, 2, 3], eos_token_ids=[EOS])
    request.stop_conditions.CopyFrom(pb.StopConditions(**stop))  # type: ignore[arg-type]
    if n:
        request.sampling_options.n = n
    generation = Generation("Test.generate", request, vocab_size=100)
    responses = []
    for item in items:
        if response := generation.feed(item):
            responses.append(response)
        if generation.is_finished:
            break
    if last := generation.end(is_stopped=is_stopped):
        responses.append(last)
    assert [r.sequence for r in responses] == list(range(len(responses)))
    assert [r.HasField("usage") for r in responses] == [False] * (len(responses) - 1) + [True]
    return responses


def tokens(responses: list[pb.GenerateResponse], index: int = 0) -> list[int]:
    return [t for r in responses for c in r.choices if c.index == index for t in c.token_ids]


def finish(responses: list[pb.GenerateResponse], index: int = 0) -> pb.FinishInfo:
    (only,) = [c.finish for r in responses for c in r.choices if c.index == index and c.HasField("finish")]
    return only


def test_the_library_adds_finish_and_usage() -> None:
    responses = run([5, [6, 7]])
    assert tokens(responses) == [5, 6, 7]
    assert finish(responses).reason == pb.FINISH_REASON_STOP
    assert (responses[-1].usage.prompt_tokens, responses[-1].usage.completion_tokens) == (3, 3)


def test_max_tokens_cuts_in_the_middle_of_an_item() -> None:
    responses = run([[5, 6], [7, 8, 10]], max_tokens=3)
    assert tokens(responses) == [5, 6, 7]
    assert finish(responses).reason == pb.FINISH_REASON_LENGTH
    assert responses[-1].usage.completion_tokens == 3


def test_end_of_sequence_is_hidden() -> None:
    responses = run([5, [6, EOS, 7], 8])
    assert tokens(responses) == [5, 6]
    assert finish(responses).reason == pb.FINISH_REASON_STOP
    assert finish(responses).stop_token_id == EOS


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ({"stop_token_ids_hidden": [6]}, [5]),
        ({"stop_token_ids": [6]}, [5, 6]),
        ({"ignore_eos": True}, [5, 6, EOS, 7]),
        ({"min_tokens": 3}, [5, 6, EOS, 7]),
        ({"min_tokens": 2}, [5, 6]),
        ({"min_tokens": 3, "stop_token_ids": [6]}, [5, 6, EOS, 7]),
        ({"ignore_eos": True, "stop_token_ids_hidden": [EOS]}, [5, 6]),
    ],
)
def test_stop_conditions(stop: dict[str, object], shown: list[int]) -> None:
    for items in ([[5, 6, EOS, 7]], [5, 6, EOS, 7], [[5, 6], [EOS, 7]]):
        assert tokens(run(items, **stop)) == shown


def test_choices_end_on_their_own() -> None:
    def both(a: int, b: int) -> pb.GenerateResponse:
        choices = [pb.ChoiceDelta(index=0, token_ids=[a]), pb.ChoiceDelta(index=1, token_ids=[b])]
        return pb.GenerateResponse(choices=choices)

    responses = run([both(5, 6), both(EOS, 7), both(50, 8), both(51, 9)], n=2)
    assert (tokens(responses, 0), tokens(responses, 1)) == ([5], [6, 7, 8])
    assert responses[-1].usage.completion_tokens == 4


def test_a_gentle_stop_has_its_own_reason() -> None:
    assert finish(run([5], is_stopped=True)).reason == pb.FINISH_REASON_CANCELLED


def test_the_handlers_own_finish_and_usage_are_kept() -> None:
    delta = pb.ChoiceDelta(token_ids=[5], finish=pb.FinishInfo(reason=pb.FINISH_REASON_TOOL_CALLS))
    responses = run([pb.GenerateResponse(usage=pb.Usage(cached_tokens=2)), delta])
    assert finish(responses).reason == pb.FINISH_REASON_TOOL_CALLS
    assert responses[-1].usage == pb.Usage(prompt_tokens=3, completion_tokens=1, cached_tokens=2)


def test_dicts_as_dynamo_has_them() -> None:
    responses = run(
        [{"token_ids": [5], "index": 0}, {"token_ids": [6], "finish_reason": "length", "log_probs": [-0.5]}]
    )
    assert tokens(responses) == [5, 6]
    assert finish(responses).reason == pb.FINISH_REASON_LENGTH
    assert responses[-1].choices[0].logprobs.token_logprobs[0] == -0.5


def test_logprobs_are_cut_with_their_tokens() -> None:
    logprobs = pb.Logprobs(token_logprobs=[-1.0, -2.0, -3.0])
    responses = run([pb.ChoiceDelta(token_ids=[5, EOS, 6], logprobs=logprobs)])
    assert list(responses[0].choices[0].logprobs.token_logprobs) == [-1.0]


def test_a_resumed_request_counts_from_its_prompt() -> None:
    request = pb.PreprocessedRequest(token_ids=[1, 2, 3, 50, 51], resume=pb.ResumeState(num_prompt_tokens=3))
    generation = Generation("x", request)
    generation.feed(52)
    last = generation.end()
    assert last is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 3)


@pytest.mark.parametrize(
    "item",
    [1.5, None, True, {1}, [1, "a"], [True], b"x", {"tokens": [1]}, {"token_ids": "ab"}, {"finish_reason": "done"}, -1,
     2**32, 100, pb.ChoiceDelta(index=1, token_ids=[1])],
)  # fmt: skip
def test_wrong_items_name_the_handler_and_what_it_gave(item: object) -> None:
    with pytest.raises(HandlerOutputError, match=r"handler Test\.generate yielded"):
        run([item])
