"""A client from the stubs alone: models, a stream, a cancel, a deadline, and what an error says.

    python client.py HOST:PORT [TEXT]

HOST:PORT is a frontend's gRPC port, or a worker. Without TEXT token ids are sent, which both take.
"""

import sys

import grpc
from google.rpc import error_details_pb2, status_pb2

from dynamo_grpc.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc


def main(address: str, text: str = "") -> int:
    with grpc.insecure_channel(address) as channel:
        control, inference = control_pb2_grpc.ControlStub(channel), inference_pb2_grpc.InferenceStub(channel)
        try:
            model = list_models(control)
            stream(inference, ask(model, text, max_tokens=8))
            cancel(inference, ask(model, text, max_tokens=4000))
            deadline(inference, ask(model, text, max_tokens=4000))
        except grpc.RpcError as error:
            print_error(error)
            return 1
        try:
            inference.GenerateOnce(ask("no-such-model", text, max_tokens=1))
        except grpc.RpcError as error:
            print_error(error)
    return 0


def ask(model: str, text: str, max_tokens: int) -> inference_pb2.PreprocessedRequest:
    request = inference_pb2.PreprocessedRequest(model=model)
    request.sampling_options.temperature = 0
    request.stop_conditions.max_tokens = max_tokens
    request.stop_conditions.ignore_eos = True
    if text:
        request.text = text
    else:
        request.token_ids.extend([5, 6, 7])
    return request


def list_models(control: control_pb2_grpc.ControlStub) -> str:
    cards = control.Describe(control_pb2.DescribeRequest()).cards
    print("models:", " ".join(card.name for card in cards))
    return cards[0].name


def stream(inference: inference_pb2_grpc.InferenceStub, request: inference_pb2.PreprocessedRequest) -> None:
    token_ids, text, reason, usage = [], "", 0, inference_pb2.Usage()
    for output in inference.Generate(request):
        for delta in output.choices:
            token_ids += delta.token_ids
            text += delta.text
            if delta.HasField("finish"):
                reason = delta.finish.reason
        if output.HasField("usage"):
            usage = output.usage
    print("tokens:", *token_ids)
    if text:
        print("text:", text)
    name = inference_pb2.FinishReason.Name(reason)
    print(f"finished: {name}, {usage.prompt_tokens} prompt tokens, {usage.completion_tokens} generated")


def cancel(inference: inference_pb2_grpc.InferenceStub, request: inference_pb2.PreprocessedRequest) -> None:
    call, num_outputs = inference.Generate(request), 0
    try:
        for _ in call:
            num_outputs += 1
            if num_outputs == 3:
                call.cancel()
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.CANCELLED:
            raise
        print(f"cancelled after {num_outputs} outputs: {error.code().name}")


def deadline(inference: inference_pb2_grpc.InferenceStub, request: inference_pb2.PreprocessedRequest) -> None:
    try:
        for _ in inference.Generate(request, timeout=0.3):
            pass
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            raise
        print(f"deadline: {error.code().name}")


def print_error(error: grpc.RpcError) -> None:
    """The status, and of its details the reason, the field that is wrong and when to come back."""
    said = error.code().name
    packed = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    for detail in status_pb2.Status.FromString(packed).details:
        info, retry, bad = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            said += f" {info.reason}"
        elif detail.Unpack(retry):
            said += f", again after {retry.retry_delay.ToMilliseconds() / 1000:.1f} s"
        elif detail.Unpack(bad):
            said += f", field {bad.field_violations[0].field}"
    print(f"error: {said}: {error.details()}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
