"""From an OpenAI request to a PreprocessedRequest: template, tokenize, defaults, limits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from dynamo_frontend.catalog import Model
from dynamo_frontend.schemas import ChatRequest, CompletionRequest, Sampling
from dynamo_grpc import ContextLengthError, InvalidRequestError, MeshError, UnsupportedError
from dynamo_grpc.v1 import inference_pb2, model_card_pb2
from dynamo_grpc.validation import check_length, check_request

_SAMPLING = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)
#: OpenAI's default for completions.
_COMPLETION_TOKENS = 16


async def prepare_chat(request: ChatRequest, model: Model) -> inference_pb2.PreprocessedRequest:
    """The request to send for a chat; checked."""
    assert model.preparation is not None
    message = _common(request, model)
    limit = request.max_completion_tokens or request.max_tokens
    messages = [m.model_dump(exclude_none=True) for m in request.messages]
    for index, turn in enumerate(messages):
        _check_content(turn, f"messages.{index}.content")
    if model.card.model_input == model_card_pb2.MODEL_INPUT_TEXT:
        message.messages.extend(_to_message(turn) for turn in messages)
    else:
        if model.preparation.template is None:
            raise InvalidRequestError(f"model {model.card.name!r} has no chat template", param="model")
        text = model.preparation.template.render(messages)
        message.token_ids.extend(await tokenize(model, text, add_special_tokens=False))
    if request.logprobs:
        message.output_options.logprobs = request.top_logprobs or 0
    return _finish(message, model, limit, None)


async def prepare_completion(request: CompletionRequest, model: Model) -> inference_pb2.PreprocessedRequest:
    """The request to send for a completion; checked."""
    assert model.preparation is not None
    message = _common(request, model)
    prompt = _single(request.prompt)
    if not prompt:
        raise InvalidRequestError("the prompt is empty", param="prompt")
    if isinstance(prompt, list):
        if any(not 0 <= token_id < 2**32 for token_id in prompt):
            raise InvalidRequestError("token ids are from 0 to 4294967295", param="prompt")
        message.token_ids.extend(prompt)
    elif model.card.model_input == model_card_pb2.MODEL_INPUT_TEXT:
        message.text = prompt
    else:
        message.token_ids.extend(await tokenize(model, prompt, add_special_tokens=True))
    if request.logprobs is not None:
        message.output_options.logprobs = request.logprobs
    return _finish(message, model, request.max_tokens, _COMPLETION_TOKENS)


async def tokenize(model: Model, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a text.

    Raises:
        ContextLengthError: the text can't fit into the context, whatever its tokens are: it isn't even looked at.
    """
    assert model.preparation is not None
    tokenizer = model.preparation.tokenizer
    assert tokenizer is not None
    least = len(text) // max(1, tokenizer.max_token_chars)
    if model.card.context_length and least > model.card.context_length:
        raise ContextLengthError(
            f"the prompt has {len(text)} characters, which are {least} tokens or more, and the context of "
            f"{model.card.name!r} holds {model.card.context_length} tokens: shorten the prompt",
            param="token_ids",
        )
    return await (tokenizer.encode_whole(text) if add_special_tokens else tokenizer.encode(text))


def _single(prompt: str | list[int] | list[str] | list[list[int]]) -> str | list[int]:
    """The prompt, also when it is the only one of a list."""
    if isinstance(prompt, str) or all(isinstance(part, int) for part in prompt):
        return prompt  # type: ignore[return-value]
    if len(prompt) > 1:
        raise UnsupportedError(f"{len(prompt)} prompts in one request are not supported here: send one", param="prompt")
    return prompt[0]  # type: ignore[return-value]


@contextlib.contextmanager
def naming(param: str) -> Iterator[None]:
    """Errors about the token ids name the field that they were made from."""
    try:
        yield
    except MeshError as error:
        if error.param == "token_ids":
            error.param = param
        raise


def _common(request: Sampling, model: Model) -> inference_pb2.PreprocessedRequest:
    request.check_refused()
    takes_tokens = model.card.model_input != model_card_pb2.MODEL_INPUT_TEXT
    if takes_tokens and (model.preparation is None or model.preparation.tokenizer is None):
        raise UnsupportedError(
            f"model {model.card.name!r} brings no tokenizer: it can be asked over gRPC alone, with token ids",
            param="model",
        )
    message = inference_pb2.PreprocessedRequest()
    for name in _SAMPLING:
        value = getattr(request, name)
        if value is not None:
            try:
                setattr(message.sampling_options, name, value)
            except ValueError:
                raise InvalidRequestError(f"{name} is {value}: out of range", param=name) from None
    for token_id, bias in (request.logit_bias or {}).items():
        if not 0 <= token_id < 2**32:
            raise InvalidRequestError(f"logit_bias names token id {token_id}", param="logit_bias")
        message.sampling_options.logit_bias[token_id] = bias
    if request.min_tokens is not None:
        message.stop_conditions.min_tokens = request.min_tokens
    if request.ignore_eos is not None:
        message.stop_conditions.ignore_eos = request.ignore_eos
    if request.stop_token_ids:
        if any(not 0 <= token_id < 2**32 for token_id in request.stop_token_ids):
            raise InvalidRequestError("stop_token_ids are from 0 to 4294967295", param="stop_token_ids")
        message.stop_conditions.stop_token_ids.extend(request.stop_token_ids)
    if request.priority is not None:
        message.priority = request.priority
    return message


def stop_strings(request: Sampling) -> list[str]:
    """The request's stop strings; the frontend finds them, workers that take tokens never see them."""
    stops = [request.stop] if isinstance(request.stop, str) else list(request.stop or ())
    if any(not stop for stop in stops):
        raise InvalidRequestError("a stop string is empty", param="stop")
    if len(stops) > 16:
        raise InvalidRequestError(f"{len(stops)} stop strings are given: at most 16", param="stop")
    return stops


def _finish(
    message: inference_pb2.PreprocessedRequest, model: Model, limit: int | None, default_limit: int | None
) -> inference_pb2.PreprocessedRequest:
    card = model.card
    check_length(len(message.token_ids), card)
    room = card.context_length - len(message.token_ids) if card.context_length else None
    wanted = limit or default_limit or (card.default_max_tokens if card.HasField("default_max_tokens") else room)
    if wanted is not None:
        message.stop_conditions.max_tokens = min(wanted, room) if room else min(wanted, 2**32 - 1)
    message.model = card.name
    message.mdc_sum = card.checksum
    message.eos_token_ids.extend(card.eos_token_ids)
    check_request(message, card)
    return message


def _check_content(turn: dict[str, Any], where: str) -> None:
    content = turn.get("content")
    if content is None and turn["role"] != "assistant":
        raise InvalidRequestError("the message has no content", param=where)
    for number, part in enumerate(content if isinstance(content, list) else ()):
        if part["type"] != "text":
            raise UnsupportedError(f"content of type {part['type']!r} is not supported here", param=f"{where}.{number}")
        if part.get("text") is None:
            raise InvalidRequestError("the part has no text", param=f"{where}.{number}.text")


def _to_message(turn: dict[str, Any]) -> inference_pb2.ChatMessage:
    message = inference_pb2.ChatMessage(role=turn["role"], name=turn.get("name", ""))
    content = turn.get("content") or ()
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts:
        message.content.add(text=inference_pb2.TextContent(text=part["text"]))
    return message
