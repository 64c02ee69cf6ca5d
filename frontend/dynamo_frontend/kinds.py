"""The endpoints that ask a model: what each takes, how it is answered, how it fails."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from dynamo_frontend import anthropic, envelope
from dynamo_frontend.answer import Writer
from dynamo_frontend.anthropic import MessagesRequest
from dynamo_frontend.anthropic_shape import MessagesShape
from dynamo_frontend.asking import Asking
from dynamo_frontend.catalog import Model
from dynamo_frontend.choices import echoes, select_completion
from dynamo_frontend.embeddings import EmbeddingsRequest, ask, body_of, prepare_embeddings
from dynamo_frontend.pieces import Piece
from dynamo_frontend.preprocess import Part, naming, prepare_chat, prepare_completion, shown_of
from dynamo_frontend.record import Record
from dynamo_frontend.responses import ResponsesRequest
from dynamo_frontend.responses_shape import ResponsesShape
from dynamo_frontend.schemas import Asked, ChatRequest, CompletionRequest, Sampling, StreamOptions
from dynamo_frontend.shapes import ChatShape, CompletionShape, Shape
from dynamo_frontend.writing import stream, whole
from dynamo_grpc import Context, InvalidRequestError, RouterMode
from dynamo_grpc.v1 import model_card_pb2

R = TypeVar("R", bound=Asked)


@dataclass(frozen=True, slots=True)
class Exchange(Generic[R]):
    """A client's request that was read, and what it is answered with."""

    body: R
    request_id: str
    context: Context
    record: Record
    mode: RouterMode
    instance_id: int | None


@dataclass(frozen=True, slots=True)
class Kind(ABC, Generic[R]):
    """One of the endpoints.

    Attributes:
        summary: in the API's description.
        label: in metrics and logs.
        what: in errors.
        prompt_field: of the body; errors about the prompt name it.
        model_type: what a model must be for.
    """

    path: str
    summary: str
    label: str
    what: str
    prompt_field: str
    model_type: model_card_pb2.ModelType.ValueType
    schema: type[R]

    @property
    def dialect(self) -> envelope.Dialect:
        """How errors look."""
        return envelope.OPENAI

    @property
    def streams(self) -> bool:
        """Whether it can answer with a stream."""
        return True

    @property
    def operation(self) -> str:
        """What OpenTelemetry's GenAI conventions call it."""
        return "text_completion" if self.model_type == model_card_pb2.MODEL_TYPE_COMPLETIONS else "chat"

    @abstractmethod
    async def answer(self, exchange: Exchange[R], model: Model, writer: Writer) -> None:
        """Ask the model, and write its answer."""


@dataclass(frozen=True, slots=True)
class Generating(Kind[R]):
    """One whose answer is generated, token by token."""

    prepare: Callable[[Any, Model], Awaitable[list[Part]]]
    shape: Callable[..., Shape]
    to_sampling: Callable[[R], Sampling] = lambda asked: asked  # type: ignore[assignment,return-value]
    select: Callable[[Any, list[Piece], list[Part]], list[Piece]] = lambda _, pieces, __: pieces
    errors: envelope.Dialect = envelope.OPENAI
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def dialect(self) -> envelope.Dialect:
        return self.errors

    async def answer(self, exchange: Exchange[R], model: Model, writer: Writer) -> None:
        body, record = exchange.body, exchange.record
        try:
            with naming(self.prompt_field, self.renamed):
                sampling = self.to_sampling(body)
        except ValidationError as error:
            told, _ = envelope.to_mesh_error(error)
            told.param = self.renamed.get(told.param, told.param)
            raise told from None
        with naming(self.prompt_field, self.renamed, sampling.places):
            if sampling.stream_options and not body.stream:
                raise InvalidRequestError("stream_options go with stream: true", param="stream_options")
            parts = await self.prepare(sampling, model)
            shown = shown_of(sampling)
        body.forget()
        sampling.forget()
        assert model.preparation is not None
        options = (body.stream and sampling.stream_options) or StreamOptions()
        tokenizer = model.preparation.tokenizer
        shape = self.shape(exchange.request_id, body, tokenizer and tokenizer.spelling)
        with Asking(model, parts, shown, exchange.context, record, exchange.mode, exchange.instance_id) as asking:
            if body.stream:
                writer.next_number = lambda: shape.num_events
                relays = asking()
                begin = shape.begin(record.num_choices, relays.usage)
                begin += b"".join(shape.event(piece) for part in parts for piece in echoes(part))
                await stream(writer, relays, shape, begin, options)
            else:
                pieces = self.select(sampling, await whole(asking, record.begin_again), parts)
                usage, num = asking.made.usage, record.num_migrations
                moved = [(b"x-migrations", b"%d" % num)] if num else []
                await writer.json(200, shape.body(pieces, usage, num), moved)


@dataclass(frozen=True, slots=True)
class Embedding(Kind[EmbeddingsRequest]):
    """The one whose answer is vectors."""

    @property
    def streams(self) -> bool:
        return False

    @property
    def operation(self) -> str:
        return "embeddings"

    async def answer(self, exchange: Exchange[EmbeddingsRequest], model: Model, writer: Writer) -> None:
        body, record = exchange.body, exchange.record
        with naming(self.prompt_field):
            message = await prepare_embeddings(body, model)
        message.request_id = exchange.request_id
        answer = await ask(message, model, exchange.context, record, exchange.mode, exchange.instance_id)
        await writer.json(200, await body_of(answer, body))


CHAT = Generating(
    "/v1/chat/completions",
    "Answer a chat",
    "chat_completions",
    "chat completions",
    "messages",
    model_card_pb2.MODEL_TYPE_CHAT,
    ChatRequest,
    prepare_chat,
    ChatShape,
)
COMPLETION = Generating(
    "/v1/completions",
    "Continue a text",
    "completions",
    "completions",
    "prompt",
    model_card_pb2.MODEL_TYPE_COMPLETIONS,
    CompletionRequest,
    prepare_completion,
    CompletionShape,
    select=select_completion,
)
RESPONSES = Generating(
    "/v1/responses",
    "Answer as the Responses API does",
    "responses",
    "responses",
    "input",
    model_card_pb2.MODEL_TYPE_CHAT,
    ResponsesRequest,
    prepare_chat,
    ResponsesShape,
    ResponsesRequest.to_chat,
    errors=envelope.RESPONSES,
    renamed={
        "response_format": "text.format",
        "response_format.json_schema.schema": "text.format.schema",
        "reasoning_effort": "reasoning.effort",
        "max_tokens": "max_output_tokens",
        "messages": "input",
    },
)
MESSAGES = Generating(
    "/v1/messages",
    "Answer as Anthropic's Messages API does",
    "messages",
    "messages",
    "messages",
    model_card_pb2.MODEL_TYPE_CHAT,
    MessagesRequest,
    prepare_chat,
    MessagesShape,
    MessagesRequest.to_chat,
    errors=envelope.Dialect(anthropic.error_body, b"event: error\n", "request-id"),
    renamed={"stop": "stop_sequences"},
)
EMBEDDINGS = Embedding(
    "/v1/embeddings",
    "Vectors of texts or token lists",
    "embeddings",
    "embeddings",
    "input",
    model_card_pb2.MODEL_TYPE_EMBEDDING,
    EmbeddingsRequest,
)

KINDS: tuple[Kind[Any], ...] = (CHAT, COMPLETION, RESPONSES, MESSAGES, EMBEDDINGS)
