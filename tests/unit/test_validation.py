import pytest

from dynamo_grpc import CardMismatchError, ContextLengthError, InvalidRequestError, MeshError, UnsupportedError
from dynamo_grpc.v1 import inference_pb2 as pb
from dynamo_grpc.v1 import model_card_pb2
from dynamo_grpc.validation import check_request, with_defaults


def card(**fields: object) -> model_card_pb2.ModelCard:
    base = {"name": "m", "vocab_size": 100, "context_length": 10, "checksum": "abc", "eos_token_ids": [9]}
    return model_card_pb2.ModelCard(**{**base, **fields})  # type: ignore[arg-type]


def request(
    sampling: dict[str, object] | None = None, stop: dict[str, object] | None = None, **fields: object
) -> pb.PreprocessedRequest:
    made = pb.PreprocessedRequest(**{"token_ids": [1, 2], **fields})  # type: ignore[arg-type]
    made.sampling_options.CopyFrom(pb.SamplingOptions(**(sampling or {})))  # type: ignore[arg-type]
    made.stop_conditions.CopyFrom(pb.StopConditions(**(stop or {})))  # type: ignore[arg-type]
    return made


BAD = [
    (request(token_ids=[]), InvalidRequestError, "token_ids", "empty"),
    (request(token_ids=[], text=""), InvalidRequestError, "text", "empty"),
    (request(text="hi"), InvalidRequestError, "text", "one prompt"),
    (request(token_ids=[], text="hi"), UnsupportedError, "text", "takes token_ids"),
    (request(token_ids=[1, 100]), InvalidRequestError, "token_ids", "from 0 to 99"),
    (request(token_ids=[1] * 10), ContextLengthError, "token_ids", "10 tokens.*10"),
    (request({"temperature": -1.0}), InvalidRequestError, "temperature", "-1"),
    (request({"temperature": float("nan")}), InvalidRequestError, "temperature", "nan"),
    (request({"top_p": 2.0}), InvalidRequestError, "top_p", "at most 1"),
    (request({"top_p": 0.0}), InvalidRequestError, "top_p", "above 0"),
    (request({"top_k": -2}), InvalidRequestError, "top_k", "at least -1"),
    (request({"min_p": 1.5}), InvalidRequestError, "min_p", "at most 1"),
    (request({"repetition_penalty": 0.0}), InvalidRequestError, "repetition_penalty", "above 0"),
    (request({"presence_penalty": 3.0}), InvalidRequestError, "presence_penalty", "at most 2"),
    (request({"n": 0}), InvalidRequestError, "n", "at least 1"),
    (request({"logit_bias": {1: 101.0}}), InvalidRequestError, "logit_bias", "100"),
    (request({"logit_bias": {100: 1.0}}), InvalidRequestError, "logit_bias", "vocabulary"),
    (request({"n": 3, "best_of": 2}), InvalidRequestError, "best_of", "less than n"),
    (request(stop={"max_tokens": 0}), InvalidRequestError, "max_tokens", "at least 1"),
    (request(stop={"max_tokens": 2, "min_tokens": 3}), InvalidRequestError, "min_tokens", "more than"),
    (request(stop={"stop": [""]}), InvalidRequestError, "stop", "empty"),
    (request(stop={"stop": ["x"]}), UnsupportedError, "stop_conditions.stop", "frontend"),
    (request({"n": 2}), UnsupportedError, "sampling_options.n", "capability 'n'"),
    (request(output_options=pb.OutputOptions(logprobs=0)), UnsupportedError, "output_options.logprobs", "logprobs"),
    (request(output_options=pb.OutputOptions(logprobs=21)), InvalidRequestError, "logprobs", "at most 20"),
    (request(guided_decoding=pb.GuidedDecoding(regex="a")), UnsupportedError, "guided_decoding", "guided"),
    (request(lora_name="x"), UnsupportedError, "lora_name", "lora"),
    (request(mdc_sum="other"), CardMismatchError, "", "other.*abc"),
    (request(resume=pb.ResumeState(num_prompt_tokens=3)), InvalidRequestError, "resume", "within"),
]


@pytest.mark.parametrize(("bad", "cls", "param", "text"), BAD, ids=[f"{row[2] or 'mdc_sum'}-{row[3]}" for row in BAD])
def test_bad_requests_are_refused_by_name(
    bad: pb.PreprocessedRequest, cls: type[MeshError], param: str, text: str
) -> None:
    with pytest.raises(cls, match=text) as caught:
        check_request(bad, card())
    assert type(caught.value) is cls
    assert caught.value.param == param


def test_good_requests_pass() -> None:
    check_request(request(), card())
    check_request(request({"temperature": 0.0, "top_k": -1, "top_p": 1.0}, mdc_sum="abc"), card())
    check_request(request({"n": 2}), card(capabilities=["n"]))
    check_request(request(token_ids=[], text="hi"), card(model_input=model_card_pb2.MODEL_INPUT_TEXT))
    check_request(request(token_ids=[10**6] * 50), card(vocab_size=0, context_length=0))


def test_what_is_unset_comes_from_the_card() -> None:
    defaults = pb.SamplingOptions(temperature=0.8, top_k=5)
    full = with_defaults(request({"temperature": 0.0}), card(default_sampling_options=defaults))
    assert full.sampling_options == pb.SamplingOptions(temperature=0.0, top_k=5)
    assert list(full.eos_token_ids) == [9]
    assert full.stop_conditions.max_tokens == 8
    assert with_defaults(request(stop={"max_tokens": 50}), card()).stop_conditions.max_tokens == 8
    assert with_defaults(request(), card(default_max_tokens=3)).stop_conditions.max_tokens == 3
    assert not with_defaults(request(), card(context_length=0)).stop_conditions.HasField("max_tokens")
