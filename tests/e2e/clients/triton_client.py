"""Triton's client for Python against a frontend's gRPC port, HOST:PORT."""

import queue
import sys

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

client = triton.InferenceServerClient(sys.argv[1])


def inputs(text, streaming=None):
    tensors = [triton.InferInput("text_input", [1], "BYTES")]
    tensors[0].set_data_from_numpy(np.array([text.encode()], dtype=object))
    if streaming is not None:
        tensors.append(triton.InferInput("streaming", [1], "BOOL"))
        tensors[1].set_data_from_numpy(np.array([streaming]))
    return tensors


assert client.is_server_live()
assert client.is_server_ready()
assert client.is_model_ready("tiny")
assert not client.is_model_ready("nope")
assert [tensor.name for tensor in client.get_model_metadata("tiny").outputs] == ["text_output", "finish_reason"]
assert client.get_model_config("tiny").config.model_transaction_policy.decoupled
assert [model.state for model in client.get_model_repository_index().models] == ["READY"]

options = {"seed": 1, "max_tokens": 12}
whole = client.infer("tiny", inputs("The sea"), parameters=options, request_id="mine")
assert whole.get_response().id == "mine"
assert list(whole.as_numpy("finish_reason")) == [b"length"]
text = whole.as_numpy("text_output")[0].decode()
assert len(text) > 10
try:
    client.infer("nope", inputs("The sea"))
    said = ""
except InferenceServerException as error:
    said = str(error)
assert "NOT_FOUND" in said
assert "there is no model 'nope'; there is 'tiny'" in said

answers = queue.Queue()
client.start_stream(callback=lambda result, error: answers.put((result, error)))
client.async_stream_infer("tiny", inputs("The sea", True), parameters=options, enable_empty_final_response=True)
streamed, num_responses, is_final = "", 0, False
while not is_final:
    result, error = answers.get(timeout=20)
    assert error is None
    streamed += result.as_numpy("text_output")[0].decode()
    is_final = result.get_response().parameters["triton_final_response"].bool_param
    num_responses += 1
assert streamed == text
assert num_responses > 1
client.async_stream_infer("nope", inputs("The sea", True))
result, error = answers.get(timeout=20)
assert result is None
assert "there is no model 'nope'" in str(error)
client.async_stream_infer("tiny", inputs("The sea", True), parameters={"max_tokens": 8000, "ignore_eos": True})
answers.get(timeout=20)
client.stop_stream(cancel_requests=True)
print("all is well")
