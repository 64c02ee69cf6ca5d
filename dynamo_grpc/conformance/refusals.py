"""Rules about requests that can't be served: the status says why, and its details say it to programs."""

from __future__ import annotations

import grpc
from google.rpc import error_details_pb2

from dynamo_grpc.conformance.rule import Broken, NotSeen, Rules
from dynamo_grpc.conformance.target import Request, Target
from dynamo_grpc.status import DOMAIN

rules = Rules()
INVALID, UNIMPLEMENTED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED
#: A trailer over 8 KiB loses the whole status.
_MAX_DETAILS = 6 * 1024
#: What a request needs for each capability.
_NEEDS = {
    "n": {"sampling_options": {"n": 2}},
    "logprobs": {"output_options": {"logprobs": 1}},
    "prompt_logprobs": {"output_options": {"prompt_logprobs": 1}},
    "beam_search": {"sampling_options": {"use_beam_search": True}},
    "guided_decoding": {"guided_decoding": {"regex": "a+"}},
    "lora": {"lora_name": "adapter"},
    "stop": {"stop_conditions": {"stop": ["x"]}},
    "media": {"media": [{"url": "data:image/png;base64,"}]},
}


@rules.rule()
async def empty_prompt(target: Target) -> None:
    """A request without a prompt is INVALID_ARGUMENT."""
    request = Request(model=target.model)
    request.stop_conditions.max_tokens = 4
    (await target.read(request)).need(INVALID, "a request without a prompt", "INVALID_REQUEST")


@rules.rule()
async def one_prompt(target: Target) -> None:
    """A request with token_ids and text is INVALID_ARGUMENT."""
    request = target.ask()
    request.text, request.token_ids[:] = "text", [5]
    (await target.read(request)).need(INVALID, "a request with token_ids and text", "INVALID_REQUEST")


@rules.rule()
async def kind_of_prompt(target: Target) -> None:
    """A prompt that the model doesn't take (text for token ids, say) is UNIMPLEMENTED."""
    request = target.ask()
    request.ClearField("text" if target.takes_text else "token_ids")
    if target.takes_text:
        request.token_ids.extend([5, 6])
    else:
        request.text = "text"
    (await target.read(request)).need(UNIMPLEMENTED, "token_ids" if target.takes_text else "text", "UNSUPPORTED")


@rules.rule()
async def zero_is_a_value(target: Target) -> None:
    """max_tokens = 0 is INVALID_ARGUMENT: zero is not unset."""
    request = target.ask()
    request.stop_conditions.max_tokens = 0
    (await target.read(request)).need(INVALID, "max_tokens = 0", "INVALID_REQUEST")


@rules.rule()
async def ranges(target: Target) -> None:
    """A sampling option outside its range is INVALID_ARGUMENT."""
    for name, value in (("temperature", -1.0), ("top_p", 2.0), ("presence_penalty", 3.0)):
        request = target.ask()
        setattr(request.sampling_options, name, value)
        (await target.read(request)).need(INVALID, f"{name} = {value:g}", "INVALID_REQUEST")


@rules.rule()
async def token_range(target: Target) -> None:
    """A token id outside the vocabulary is INVALID_ARGUMENT."""
    if target.takes_text or not target.card.vocab_size:
        raise NotSeen("it takes text, or the card says no vocab_size")
    request = target.ask()
    request.token_ids.append(target.card.vocab_size)
    (await target.read(request)).need(INVALID, f"token id {target.card.vocab_size}", "INVALID_REQUEST")


@rules.rule()
async def context_length(target: Target) -> None:
    """A prompt that leaves no room in the context is INVALID_ARGUMENT."""
    length = target.card.context_length
    if target.takes_text or not 0 < length <= 4_000_000:
        raise NotSeen("it takes text, or the card says no context_length (or one that is too large to try)")
    (await target.read(target.ask(4, length))).need(INVALID, f"a prompt of {length} tokens", "CONTEXT_LENGTH_EXCEEDED")


@rules.rule()
async def unknown_model(target: Target) -> None:
    """A model that isn't served is NOT_FOUND."""
    request = target.ask()
    request.model = "no-such-model-ü"
    (await target.read(request)).need(grpc.StatusCode.NOT_FOUND, "an unknown model", "MODEL_NOT_FOUND")


@rules.rule()
async def card(target: Target) -> None:
    """A request that was prepared for another model card (mdc_sum) is FAILED_PRECONDITION."""
    request = target.ask()
    request.mdc_sum = "0" * 16
    (await target.read(request)).need(grpc.StatusCode.FAILED_PRECONDITION, "mdc_sum of another card", "CARD_MISMATCH")
    if target.card.checksum:
        request.mdc_sum = target.card.checksum
        (await target.read(request)).need_ok()


@rules.rule()
async def capabilities(target: Target) -> None:
    """A request that needs a capability that the card hasn't is UNIMPLEMENTED, not served without."""
    for capability in sorted(_NEEDS.keys() - set(target.card.capabilities)):
        request = target.ask()
        request.MergeFrom(Request(**_NEEDS[capability]))  # type: ignore[arg-type]
        (await target.read(request)).need(UNIMPLEMENTED, f"a request that needs {capability!r}", "UNSUPPORTED")


@rules.rule()
async def details(target: Target) -> None:
    """An error has google.rpc details: ErrorInfo with domain 'dynamo-grpc' and its reason; BadRequest."""
    unknown, empty = target.ask(), Request(model=target.model)
    unknown.model = "no-such-model"
    empty.stop_conditions.max_tokens = 4
    for request, what, reason, field in (
        (unknown, "an unknown model", "MODEL_NOT_FOUND", ""),
        (empty, "an empty prompt", "INVALID_REQUEST", "token_ids"),
    ):
        seen = await target.read(request)
        if seen.code is grpc.StatusCode.OK:
            continue  # another rule says so
        info = seen.detail(error_details_pb2.ErrorInfo())
        if info is None:
            raise Broken(f"the error about {what} has no ErrorInfo in grpc-status-details-bin")
        if (info.domain, info.reason) != (DOMAIN, reason):
            raise Broken(f"the ErrorInfo about {what} says {info.domain} {info.reason}, not {DOMAIN} {reason}")
        bad = seen.detail(error_details_pb2.BadRequest())
        if field and (bad is None or not bad.field_violations or not bad.field_violations[0].field):
            raise Broken(f"the error about {what} has no BadRequest that names the field")
        if seen.details is not None and seen.details.ByteSize() > _MAX_DETAILS:
            raise Broken(f"the details about {what} have {seen.details.ByteSize()} bytes: a client may lose them")
