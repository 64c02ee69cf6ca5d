"""The endpoints that generate: what each takes, how it is prepared, how it looks, how it fails."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dynamo_frontend import anthropic, envelope
from dynamo_frontend.anthropic import MessagesRequest, MessagesShape
from dynamo_frontend.catalog import Model
from dynamo_frontend.choices import select_completion
from dynamo_frontend.preprocess import Part, prepare_chat, prepare_completion
from dynamo_frontend.relay import Piece
from dynamo_frontend.responses import ResponsesRequest, ResponsesShape
from dynamo_frontend.schemas import Asked, ChatRequest, CompletionRequest, Sampling
from dynamo_frontend.shapes import ChatShape, CompletionShape, Shape
from dynamo_grpc.v1 import model_card_pb2

R = TypeVar("R", bound=Asked)


@dataclass(frozen=True, slots=True)
class Kind(Generic[R]):
    """One of the endpoints that generate.

    Attributes:
        label: in metrics and logs.
        what: in errors.
        prompt_field: of the body; errors about the prompt name it.
    """

    label: str
    what: str
    prompt_field: str
    model_type: model_card_pb2.ModelType.ValueType
    schema: type[R]
    prepare: Callable[[Any, Model], Awaitable[list[Part]]]
    shape: Callable[..., Shape]
    to_sampling: Callable[[R], Sampling]
    select: Callable[[Any, list[Piece], list[Part]], list[Piece]] = lambda _, pieces, __: pieces
    dialect: envelope.Dialect = envelope.OPENAI


CHAT = Kind(
    "chat_completions",
    "chat completions",
    "messages",
    model_card_pb2.MODEL_TYPE_CHAT,
    ChatRequest,
    prepare_chat,
    ChatShape,
    lambda asked: asked,
)
COMPLETION = Kind(
    "completions",
    "completions",
    "prompt",
    model_card_pb2.MODEL_TYPE_COMPLETIONS,
    CompletionRequest,
    prepare_completion,
    CompletionShape,
    lambda asked: asked,
    select_completion,
)
RESPONSES = Kind(
    "responses",
    "responses",
    "input",
    model_card_pb2.MODEL_TYPE_CHAT,
    ResponsesRequest,
    prepare_chat,
    ResponsesShape,
    ResponsesRequest.to_chat,
    dialect=envelope.RESPONSES,
)
MESSAGES = Kind(
    "messages",
    "messages",
    "messages",
    model_card_pb2.MODEL_TYPE_CHAT,
    MessagesRequest,
    prepare_chat,
    MessagesShape,
    MessagesRequest.to_chat,
    dialect=envelope.Dialect(anthropic.error_body, b"event: error\n", "request-id"),
)
