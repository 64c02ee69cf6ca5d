"""What a servicer refuses, in the order in which a client's mistakes are made; and how an error is told."""

from typing import NoReturn

import grpc
from google.rpc import error_details_pb2, status_pb2

from dynamo_grpc.v1 import inference_pb2, model_card_pb2

Code = grpc.StatusCode
RANGES = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}


class RefusedError(Exception):
    def __init__(self, code: grpc.StatusCode, reason: str, message: str, field: str = "") -> None:
        super().__init__(message)
        self.code, self.reason, self.message, self.field = code, reason, message, field


async def refuse(context: grpc.aio.ServicerContext, error: RefusedError) -> NoReturn:
    """End the call with a status whose details say the same to programs."""
    status = status_pb2.Status(code=error.code.value[0], message=error.message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain="dynamo-grpc"))
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    await context.abort(error.code, error.message, (("grpc-status-details-bin", status.SerializeToString()),))
    raise AssertionError("abort raises")


def check(request: inference_pb2.PreprocessedRequest, card: model_card_pb2.ModelCard) -> None:
    if request.model not in ("", card.name, *card.aliases):
        raise RefusedError(Code.NOT_FOUND, "MODEL_NOT_FOUND", f"there is {card.name!r} alone", "model")
    if request.HasField("mdc_sum") and request.mdc_sum != card.checksum:
        raise RefusedError(Code.FAILED_PRECONDITION, "CARD_MISMATCH", f"the model card here is {card.checksum}")
    has_text = request.HasField("text") or bool(request.messages)
    if has_text and request.token_ids:
        raise _invalid("text", "give one prompt, not two")
    if has_text:
        raise RefusedError(Code.UNIMPLEMENTED, "UNSUPPORTED", "this model takes token_ids", "text")
    if not request.token_ids:
        raise _invalid("token_ids", "the prompt is empty: give token_ids")
    if max(request.token_ids) >= card.vocab_size:
        raise _invalid("token_ids", f"token ids go from 0 to {card.vocab_size - 1}")
    if len(request.token_ids) >= card.context_length:
        text = f"the context holds {card.context_length} tokens, with the answer"
        raise RefusedError(Code.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED", text, "token_ids")
    stop = request.stop_conditions
    if stop.HasField("max_tokens") and stop.max_tokens < max(1, stop.min_tokens):
        raise _invalid("max_tokens", "max_tokens must be at least 1, and min_tokens")
    for field, value in request.sampling_options.ListFields():
        low, high = RANGES.get(field.name, (value, value))
        if not low <= value <= high:
            raise _invalid(field.name, f"{field.name} must be from {low} to {high}")
    _check_capabilities(request, card)


def _check_capabilities(request: inference_pb2.PreprocessedRequest, card: model_card_pb2.ModelCard) -> None:
    options, output = request.sampling_options, request.output_options
    needed = {
        "n": options.n > 1,
        "best_of": options.best_of > 1,
        "beam_search": options.use_beam_search,
        "logprobs": output.HasField("logprobs"),
        "prompt_logprobs": output.HasField("prompt_logprobs"),
        "guided_decoding": request.HasField("guided_decoding"),
        "lora": bool(request.lora_name),
        "media": bool(request.media),
        "stop": bool(request.stop_conditions.stop),
        "text": output.text,
    }
    for name, is_needed in needed.items():
        if is_needed and name not in card.capabilities:
            raise RefusedError(Code.UNIMPLEMENTED, "UNSUPPORTED", f"this model can't do {name}", name)


def _invalid(field: str, text: str) -> RefusedError:
    return RefusedError(Code.INVALID_ARGUMENT, "INVALID_REQUEST", text, field)
