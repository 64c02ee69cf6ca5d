"""From an OpenAI request to a PreprocessedRequest: template, tokenize, defaults, limits."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynamo_frontend.catalog import Model
from dynamo_frontend.media import KINDS
from dynamo_frontend.offers import Reading, offer_of, reading_of
from dynamo_frontend.prompts import (
    chat_prompt,
    check_can_prepare,
    check_token_ids,
    checked_turns,
    prompts_of,
    tokenize,
)
from dynamo_frontend.schemas import (
    Calling,
    ChatRequest,
    CompletionRequest,
    Sampling,
    Templated,
    check_refused,
    json_of,
)
from dynamo_grpc import InvalidRequestError, MeshError, UnsupportedError
from dynamo_grpc.v1 import inference_pb2, model_card_pb2
from dynamo_grpc.validation import MAX_CHOICES, check_capability, check_length, check_request

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
_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
#: The client's options that a worker's are made from, where they have other names.
_ASKED_BY = {"output_options.prompt_logprobs": "echo"}
#: OpenAI's default for completions.
_COMPLETION_TOKENS = 16
#: Choices of a request, over all its prompts.
_MAX_CHOICES = 1024


@dataclass(slots=True)
class Part:
    """A request to a worker that answers a part of a client's: a prompt's choices, or one of them.

    Attributes:
        index: of its first choice in the answer.
        echo: what stands before each of its choices, if the client wants its prompt back.
        counts_prompt: whether its prompt counts in the usage: once for all choices of a prompt.
        reading: how its answer is read, where it may say more than text.
        is_silent: the client wants no answer, what its prompt is like alone: nothing that is generated is shown.
    """

    message: inference_pb2.PreprocessedRequest
    index: int = 0
    echo: str | None = None
    counts_prompt: bool = True
    is_silent: bool = False
    reading: Reading | None = None

    @property
    def has_prompt_logprobs(self) -> bool:
        """Whether the worker says how likely the prompt's tokens are: the echo comes with them."""
        return self.message.output_options.HasField("prompt_logprobs")

    @property
    def num_choices(self) -> int:
        """How many choices it gives."""
        return max(1, self.message.sampling_options.n)


@dataclass(frozen=True, slots=True)
class Shown:
    """What a client wants to see of an answer.

    Attributes:
        stops: strings that end it.
        keeps_stop: also the one that ended it.
        has_text: text, not token ids alone.
    """

    stops: Sequence[str] = ()
    keeps_stop: bool = False
    skip_special_tokens: bool = True
    has_text: bool = True


def shown_of(request: Sampling) -> Shown:
    """What an OpenAI request wants to see."""
    stops = [request.stop] if isinstance(request.stop, str) else list(request.stop or ())
    check_stops(stops)
    return Shown(stops, bool(request.include_stop_str_in_output), request.skip_special_tokens)


async def prepare_chat(request: ChatRequest, model: Model) -> list[Part]:
    """The requests to send for a chat; checked."""
    assert model.preparation is not None
    message, offer, is_thinking = _common(request, model), offer_of(request), False
    limit = request.max_completion_tokens or request.max_tokens
    offer.check(model)
    turns = checked_turns(request.messages)
    if model.media is not None:
        await model.media.take(turns, model.card, message.media)
    if model.card.model_input == model_card_pb2.MODEL_INPUT_TEXT:
        if given := sorted((Templated.model_fields.keys() - Calling.model_fields.keys()) & request.model_fields_set):
            text = f"{given[0]} is about a chat template, and model {model.card.name!r} brings its own"
            raise UnsupportedError(text, param=given[0])
        message.messages.extend(_to_message(turn) for turn in turns)
        offer.put_into(message)
    else:
        prompt = await chat_prompt(model, turns, request, offer)
        message.token_ids.extend(prompt.token_ids)
        is_thinking = prompt.is_thinking
    if request.logprobs:
        message.output_options.logprobs = request.top_logprobs or 0
    elif request.top_logprobs:
        raise InvalidRequestError("top_logprobs goes with logprobs: true", param="top_logprobs")
    reading = reading_of(model, offer, is_forced=offer.constrain(message, model), is_thinking=is_thinking)
    finish = functools.partial(_finish, model=model, limit=limit, default_limit=None)
    return split(message, model, finish, reading=reading)


async def prepare_completion(request: CompletionRequest, model: Model) -> list[Part]:
    """The requests to send for a completion, or several; checked."""
    parts: list[Part] = []
    prompts = prompts_of(request.prompt)
    per_prompt = max(request.best_of or 1, request.n or 1)
    if len(prompts) * per_prompt > _MAX_CHOICES:
        text = f"{len(prompts)} prompts with {per_prompt} choices each: at most {_MAX_CHOICES} choices in all"
        raise InvalidRequestError(text, param="prompt")
    if request.best_of and request.best_of < (request.n or 1):
        raise InvalidRequestError(f"best_of is {request.best_of}, less than n = {request.n}", param="best_of")
    if request.best_of and request.best_of > (request.n or 1) and request.stream:
        raise InvalidRequestError("best_of is known at the end alone: it can't be streamed", param="best_of")
    for number, prompt in enumerate(prompts):
        new = await _prepare_one(request, model, prompt)
        for part in new:
            part.index += number * per_prompt
        parts += new
    return parts


async def _prepare_one(request: CompletionRequest, model: Model, prompt: str | list[int]) -> list[Part]:
    assert model.preparation is not None
    message = _common(request, model)
    if request.best_of and request.best_of > (request.n or 1):
        check_capability("logprobs", "best_of", model.card)
        message.sampling_options.n = request.best_of
        message.output_options.logprobs = 0  # what the best ones are found by
    if not prompt:
        raise InvalidRequestError("the prompt is empty", param="prompt")
    if request.max_tokens == 0 and request.min_tokens:
        text = f"min_tokens is {request.min_tokens}, more than max_tokens = 0"
        raise InvalidRequestError(text, param="min_tokens")
    if isinstance(prompt, list):
        check_token_ids(prompt, "prompt")
        message.token_ids.extend(prompt)
    elif model.card.model_input == model_card_pb2.MODEL_INPUT_TEXT:
        message.text = prompt
    else:
        message.token_ids.extend(await tokenize(model, prompt, add_special_tokens=True))
    if request.logprobs is not None:
        message.output_options.logprobs = request.logprobs
        if request.echo:
            message.output_options.prompt_logprobs = request.logprobs
    echo = None
    if request.echo:
        if isinstance(prompt, str):
            echo = prompt
        elif (tokenizer := model.preparation.tokenizer) is not None:
            echo = tokenizer.base.decode(prompt, skip_special_tokens=request.skip_special_tokens)
        if request.max_tokens in (0, 1) and request.logprobs is not None:
            message.stop_conditions.ignore_eos = True  # whoever scores a prompt counts on one token behind it
    finish = functools.partial(_finish, model=model, limit=request.max_tokens or None, default_limit=_COMPLETION_TOKENS)
    parts = split(message, model, finish, echo)
    if request.max_tokens == 0:
        for part in parts:
            part.is_silent, part.message.stop_conditions.max_tokens = True, 1
    return parts


def split(
    message: inference_pb2.PreprocessedRequest,
    model: Model,
    finish: Callable[[inference_pb2.PreprocessedRequest], None],
    echo: str | None = None,
    reading: Reading | None = None,
) -> list[Part]:
    """The requests for a prompt's choices: one, where the worker makes several from one prefill; else one for each.

    Args:
        finish: completes the request, and checks it.
    """
    num = max(1, message.sampling_options.n)
    if num > MAX_CHOICES:
        raise InvalidRequestError(f"n is {num}: it must be at least 1 and at most {MAX_CHOICES}", param="n")
    if num == 1 or "n" in model.card.capabilities:
        finish(message)
        return [Part(message, echo=echo, reading=reading)]
    message.sampling_options.ClearField("n")
    finish(message)
    parts = []
    for index in range(num):
        one = inference_pb2.PreprocessedRequest()
        one.CopyFrom(message)
        if one.sampling_options.HasField("seed"):  # equal seeds would give equal choices
            one.sampling_options.seed = (one.sampling_options.seed + index + 2**63) % 2**64 - 2**63
        parts.append(Part(one, index, echo, counts_prompt=index == 0, reading=reading))
    return parts


def _guide(message: inference_pb2.PreprocessedRequest, request: Sampling, model: Model) -> None:
    """What the answer must look like, by OpenAI's `response_format` or by an extension."""
    wanted = request.response_format
    given = [name for name in _GUIDED if getattr(request, name) is not None]
    given += ["response_format"] if wanted is not None and wanted.type != "text" else []
    if not given:
        return
    if len(given) > 1:
        raise InvalidRequestError(f"give one of {' and '.join(given)}", param=given[1])
    guided = message.guided_decoding
    if (schema := request.guided_json) is not None:
        guided.json_schema = schema if isinstance(schema, str) else json_of(schema, "guided_json")
    elif request.guided_regex is not None:
        guided.regex = request.guided_regex
    elif request.guided_choice is not None:
        guided.choice.choices.extend(request.guided_choice)
    elif request.guided_grammar is not None:
        guided.grammar = request.guided_grammar
    elif wanted is not None and wanted.type == "json_object":
        guided.json_object = True
    elif wanted is None or wanted.json_schema is None:
        raise InvalidRequestError("json_schema is missing", param="response_format.json_schema")
    else:
        guided.json_schema = json_of(wanted.json_schema.schema_, "response_format.json_schema.schema")
    check_capability("guided_decoding", given[0], model.card)


@contextlib.contextmanager
def naming(
    param: str, renamed: Mapping[str, str] | None = None, places: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Errors name the field of the client's request that is meant.

    Args:
        param: the field that has the prompt.
        renamed: fields that have other names in the client's request.
        places: parts of messages that stand elsewhere there.
    """
    try:
        yield
    except MeshError as error:
        if error.param == "token_ids":
            error.param = param
        elif error.param.startswith("inputs"):
            error.param = param + error.param.removeprefix("inputs")
        elif error.param in _ASKED_BY:
            error.param = _ASKED_BY[error.param]
        else:
            error.param = error.param.removeprefix("sampling_options.").removeprefix("output_options.")
        error.param = (renamed or {}).get(error.param, error.param)
        for place, where in (places or {}).items():
            if error.param == place or error.param.startswith(f"{place}."):
                error.param = where
                break
        raise


def _common(request: Sampling, model: Model) -> inference_pb2.PreprocessedRequest:
    check_refused(request, request.refused)
    check_can_prepare(model)
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
        check_token_ids(request.stop_token_ids, "stop_token_ids")
        message.stop_conditions.stop_token_ids.extend(request.stop_token_ids)
    if request.priority is not None:
        message.priority = request.priority
    _guide(message, request, model)
    if request.metadata:
        message.extensions["metadata"] = request.metadata
    if request.user:
        message.extensions["user"] = request.user
    return message


def check_stops(stops: Sequence[str]) -> None:
    """Refuse stop strings that can't be looked for (here: workers that take tokens never see them)."""
    if any(not stop for stop in stops):
        raise InvalidRequestError("a stop string is empty", param="stop")
    if len(stops) > 16:
        raise InvalidRequestError(f"{len(stops)} stop strings are given: at most 16", param="stop")


def _finish(
    message: inference_pb2.PreprocessedRequest, model: Model, limit: int | None, default_limit: int | None
) -> None:
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


def _to_message(turn: dict[str, Any]) -> inference_pb2.ChatMessage:
    message = inference_pb2.ChatMessage(role=turn["role"], name=turn.get("name", ""))
    content = turn.get("content") or ()
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts:
        if part["type"] in KINDS:
            told = part[part["type"]]
            added = getattr(message.content.add(), part["type"])
            added.url = told["url"]
            if part["type"] == "image_url" and isinstance(told.get("detail"), str):
                added.detail = told["detail"]
        else:
            message.content.add(text=inference_pb2.TextContent(text=part["text"]))
    for call in turn.get("tool_calls") or ():
        function = call["function"]
        arguments = function.get("arguments", "")
        arguments = arguments if isinstance(arguments, str) else json_of(arguments, "messages")
        message.tool_calls.add(id=call.get("id") or "", name=function["name"], arguments=arguments)
    message.tool_call_id = turn.get("tool_call_id") or ""
    message.reasoning = turn.get("reasoning_content") or ""
    return message
