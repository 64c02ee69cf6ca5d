"""What prepares a model's requests: its files, fetched from a worker by hash, as tokenizer and template."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dynamo_frontend.parsers.families import Family, family_of
from dynamo_frontend.templates import ChatTemplate
from dynamo_frontend.tokens import PromptTokenizer
from dynamo_frontend.vocabularies import tokenizer_of
from dynamo_grpc import ConfigurationError, InstanceLostError
from dynamo_grpc.cancelling import is_being_cancelled
from dynamo_grpc.connections import Connection
from dynamo_grpc.v1 import control_pb2, model_card_pb2


@dataclass(slots=True)
class Preparation:
    """What turns a request's text into tokens and back; empty for models that take text.

    Attributes:
        template: the one that is taken if no other is named.
        named: other templates; `tool_use` is taken where tools are offered.
        family: how the model's answers are read.
    """

    tokenizer: PromptTokenizer | None = None
    template: ChatTemplate | None = None
    named: Mapping[str, ChatTemplate] = field(default_factory=dict)
    family: Family = field(default_factory=Family)


async def fetch_file(connection: Connection, file: model_card_pb2.ModelFile) -> bytes:
    """A file's bytes, checked.

    Raises:
        ConfigurationError: they have another hash than the card says.
        InstanceLostError, grpc.aio.AioRpcError: the worker went away.
    """
    request = control_pb2.GetFileRequest(sha256=file.sha256)
    try:
        data = b"".join([piece.data async for piece in connection.control.GetFile(request, timeout=60.0)])
    except asyncio.CancelledError:
        if is_being_cancelled():
            raise
        raise InstanceLostError(f"{connection.address} went away") from None  # the call was cancelled, not we
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise ConfigurationError(f"{file.name} of {connection.address} has another hash than its card says")
    return data


def prepare(card: model_card_pb2.ModelCard, files: Mapping[str, bytes]) -> Preparation:
    """Make tokenizer and template from a model's files.

    Raises:
        ConfigurationError: a file is broken; says which.
    """
    preparation = Preparation()
    try:
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
    except ValueError as error:
        raise ConfigurationError(f"tokenizer_config.json of model {card.name!r} is no JSON: {error}") from error
    try:
        tokenizer = tokenizer_of(files, config)
    except ConfigurationError as error:
        raise ConfigurationError(f"model {card.name!r}: {error}") from error
    if tokenizer is not None:
        preparation.tokenizer = PromptTokenizer(tokenizer)
    special = {
        key: _token(config[key]) for key in ("bos_token", "eos_token", "unk_token", "pad_token") if config.get(key)
    }
    if card.chat_template:
        preparation.template = ChatTemplate(card.chat_template, special)
    preparation.named = {name: ChatTemplate(source, special) for name, source in card.named_chat_templates.items()}
    sources = [card.chat_template, *card.named_chat_templates.values()]
    told = card.runtime_config
    preparation.family = family_of(told.tool_call_parser, told.reasoning_parser, "\n".join(sources))
    return preparation


def _token(value: Any) -> Any:
    return value.get("content", "") if isinstance(value, dict) else value
