"""Prompts: what a client may send as one, and the token ids of text and chats."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from dynamo_frontend.catalog import Model
from dynamo_frontend.media import KINDS, check_media, check_part, for_template
from dynamo_frontend.offers import Offer, offer_of
from dynamo_frontend.parsers.families import Family
from dynamo_frontend.schemas import Message, Templated, TokenizeRequest
from dynamo_frontend.templates import ChatTemplate, Turn
from dynamo_frontend.tokens import PromptTokenizer
from dynamo_grpc import ContextLengthError, InvalidRequestError, UnsupportedError
from dynamo_grpc.v1 import model_card_pb2


async def prompt_tokens(request: TokenizeRequest, model: Model) -> list[int]:
    """The token ids of a prompt, or of a chat."""
    if request.prompt is None:
        return await chat_tokens(request.messages or (), request, model)
    _check_tokenizer(model)
    return await tokenize(model, request.prompt, add_special_tokens=request.add_special_tokens)


async def chat_tokens(messages: Sequence[Message], how: Templated, model: Model) -> list[int]:
    """The token ids of a chat."""
    _check_tokenizer(model)
    offer = offer_of(how)
    offer.check(model)
    turns = checked_turns(messages)
    check_media(turns, model.card)
    return (await chat_prompt(model, turns, how, offer)).token_ids


def text_of(token_ids: list[int], model: Model) -> str:
    """The text of token ids."""
    _check_tokenizer(model)
    assert model.preparation is not None
    assert model.preparation.tokenizer is not None
    limit = model.card.vocab_size or 2**32
    if wrong := [token_id for token_id in token_ids if not 0 <= token_id < limit]:
        raise InvalidRequestError(f"token id {wrong[0]}: ids go from 0 to {limit - 1}", param="tokens")
    return str(model.preparation.tokenizer.base.decode(token_ids, skip_special_tokens=False))


class Prompt(NamedTuple):
    """A chat as the model is given it.

    Attributes:
        text: as the template wrote it.
        is_thinking: it has begun the reasoning, and the answer goes on with it.
    """

    text: str
    is_thinking: bool
    token_ids: list[int]


async def chat_prompt(model: Model, turns: Sequence[Turn], how: Templated, offer: Offer) -> Prompt:
    """A chat as the model's template writes it, and its token ids."""
    started = time.perf_counter()
    template = _template(model, how, offer)
    if not template.takes_parts and any(_has_media(turn) for turn in turns):
        raise UnsupportedError(f"the chat template of model {model.card.name!r} knows no pictures", param="messages")
    text = template.render(
        for_template(turns),
        add_generation_prompt=how.add_generation_prompt and not how.continue_final_message,
        continue_final_message=how.continue_final_message,
        tools=offer.tools or None,
        documents=how.documents,
        variables=_variables(model, how),
    )
    if model.series is not None:
        model.series.template.observe(time.perf_counter() - started)
    family = model.preparation.family if model.preparation is not None else Family()
    if how.continue_final_message:
        is_thinking = family.is_thinking_within(str(turns[-1].get("content")))
    else:
        is_thinking = how.add_generation_prompt and family.is_thinking_after(text)
    return Prompt(text, is_thinking, await tokenize(model, text, add_special_tokens=False))


def _template(model: Model, how: Templated, offer: Offer) -> ChatTemplate:
    """The template that a request is written with."""
    preparation = model.preparation
    assert preparation is not None
    named = preparation.named
    if (name := how.chat_template) is not None and name != "default":
        if name not in named:
            there = ", ".join(["default", *sorted(named)])
            text = f"{name[:64]!r} is no template of model {model.card.name!r}: there are {there}, and none can be sent"
            raise InvalidRequestError(text, param="chat_template")
        return named[name]
    if offer.tools and name is None and "tool_use" in named:
        return named["tool_use"]
    if preparation.template is None:
        raise InvalidRequestError(f"model {model.card.name!r} has no chat template", param="model")
    return preparation.template


def _variables(model: Model, how: Templated) -> dict[str, Any]:
    """What the template is given beside the chat.

    Raises:
        UnsupportedError: reasoning_effort is asked for, and the template knows nothing of the kind.
    """
    given = dict(how.chat_template_kwargs or {})
    effort = how.reasoning_effort
    if effort is None:
        return given
    assert model.preparation is not None
    template = model.preparation.template
    known = template.variables if template is not None else frozenset()
    if "reasoning_effort" in known:
        return {"reasoning_effort": effort, **given}
    for name in ("enable_thinking", "thinking"):
        if name in known:
            return {name: effort != "none", **given}
    text = f"the chat template of model {model.card.name!r} knows no reasoning effort"
    raise UnsupportedError(text, param="reasoning_effort")


def checked_turns(turns: Sequence[Message]) -> list[dict[str, Any]]:
    """The turns of a chat, each with its content."""
    messages = [turn.model_dump(exclude_none=True) for turn in turns]
    for index, turn in enumerate(messages):
        _check_content(turn, f"messages.{index}.content")
        if (calls := turn.get("tool_calls")) is not None:
            _check_calls(calls, f"messages.{index}.tool_calls")
    return messages


def _check_tokenizer(model: Model) -> None:
    takes_text = model.card.model_input == model_card_pb2.MODEL_INPUT_TEXT
    if takes_text or model.preparation is None or model.preparation.tokenizer is None:
        raise UnsupportedError(f"model {model.card.name!r} brings no tokenizer", param="model")


async def tokenize(model: Model, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a text.

    Raises:
        ContextLengthError: the text can't fit into the context, whatever its tokens are: it isn't even looked at.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError("the prompt has half a character (a lone surrogate)", param="token_ids") from None
    tokenizer, started = _tokenizer_for(model, [text]), time.perf_counter()
    token_ids = await (tokenizer.encode_whole(text) if add_special_tokens else tokenizer.encode(text))
    if model.series is not None:
        model.series.tokenize.observe(time.perf_counter() - started)
    return token_ids


async def tokenize_all(model: Model, texts: Sequence[str]) -> list[list[int]]:
    """As `tokenize`, for several whole texts at once."""
    return await _tokenizer_for(model, texts).encode_all(texts)


def _tokenizer_for(model: Model, texts: Sequence[str]) -> PromptTokenizer:
    assert model.preparation is not None
    tokenizer = model.preparation.tokenizer
    assert tokenizer is not None
    longest = max(map(len, texts), default=0)
    least = longest // max(1, tokenizer.max_token_chars)
    if model.card.context_length and least > model.card.context_length:
        raise ContextLengthError(
            f"the prompt has {longest} characters, which are {least} tokens or more, and the context of "
            f"{model.card.name!r} holds {model.card.context_length} tokens: shorten the prompt",
            param="token_ids",
        )
    return tokenizer


def _has_media(turn: Turn) -> bool:
    content = turn.get("content")
    return isinstance(content, list) and any(part["type"] in KINDS for part in content)


def check_token_ids(token_ids: Sequence[int], param: str) -> None:
    """Refuse what can be nobody's token id."""
    if any(not 0 <= token_id < 2**32 for token_id in token_ids):
        raise InvalidRequestError(f"{param}: token ids are from 0 to 4294967295", param=param)


def prompts_of(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """The prompts, one or several."""
    if isinstance(prompt, str) or all(isinstance(part, int) for part in prompt):
        return [prompt]  # type: ignore[list-item]
    return list(prompt)  # type: ignore[arg-type]


def check_can_prepare(model: Model) -> None:
    """Refuse a model that takes token ids and doesn't say how to make them."""
    takes_tokens = model.card.model_input != model_card_pb2.MODEL_INPUT_TEXT
    if takes_tokens and (model.preparation is None or model.preparation.tokenizer is None):
        raise UnsupportedError(
            f"model {model.card.name!r} brings no tokenizer: it can be asked over gRPC alone, with token ids",
            param="model",
        )


def _check_calls(calls: Any, where: str) -> None:
    for number, call in enumerate(calls if isinstance(calls, list) else [None]):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRequestError("a call has a function with its name", param=f"{where}.{number}.function.name")
        if not isinstance(call.get("id") or "", str):
            raise InvalidRequestError("an id is a string", param=f"{where}.{number}.id")
        if not isinstance(function.get("arguments", ""), (str, dict)):
            raise InvalidRequestError("arguments are JSON, as a string", param=f"{where}.{number}.function.arguments")


def _check_content(turn: dict[str, Any], where: str) -> None:
    content = turn.get("content")
    if content is None and turn["role"] != "assistant":
        raise InvalidRequestError("the message has no content", param=where)
    for number, part in enumerate(content if isinstance(content, list) else ()):
        if part["type"] != "text":
            check_part(part, f"{where}.{number}")
        elif part.get("text") is None:
            raise InvalidRequestError("the part has no text", param=f"{where}.{number}.text")
