import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_grpc import InvalidRequestError, set_fields
from dynamo_grpc.messages import from_dict, from_value, to_dict, to_value
from dynamo_grpc.v1 import inference_pb2 as pb

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_json_values_travel_as_they_are(value: object) -> None:
    assert from_value(to_value(value)) == value


def test_zero_is_set_and_unset_is_not() -> None:
    options = pb.SamplingOptions(temperature=0.0, seed=2**40, top_p=0.7)
    options.logit_bias[5] = -1.0
    assert set_fields(options) == {"temperature": 0.0, "seed": 2**40, "top_p": 0.7, "logit_bias": {5: -1.0}}
    assert set_fields(pb.SamplingOptions()) == {}


def test_dicts_have_only_what_was_set() -> None:
    request = pb.PreprocessedRequest(token_ids=[1, 2], stop_conditions=pb.StopConditions(max_tokens=3))
    request.kv_transfer_params["port"] = 7
    values = {"token_ids": [1, 2], "stop_conditions": {"max_tokens": 3}, "kv_transfer_params": {"port": 7}}
    assert to_dict(request) == values
    assert from_dict({**values, "lora_name": None}, pb.PreprocessedRequest()) == request


@pytest.mark.parametrize("values", [{"tokens": [1]}, {"token_ids": ["x"]}, {"stop_conditions": {"max_tokens": -1}}])
def test_wrong_dicts_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match="PreprocessedRequest"):
        from_dict(values, pb.PreprocessedRequest())


@pytest.mark.parametrize(
    ("value", "what"), [({"a": [1, {2}]}, r"\.a\[1\] is a set"), (2**60, "too large"), (object(), "object")]
)
def test_what_is_no_json_is_named(value: object, what: str) -> None:
    with pytest.raises(TypeError, match=what):
        to_value(value)
