"""Anthropic's Messages API over the same chat: its body, its answer, its events, its errors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field

from dynamo_frontend.relay import Piece
from dynamo_frontend.schemas import Asked, ChatRequest, check_refused, text_of
from dynamo_frontend.shapes import typed_event
from dynamo_frontend.spelling import Spelling
from dynamo_grpc import MeshError
from dynamo_grpc.v1 import inference_pb2 as pb

_REASONS = {"length": "max_tokens", "content_filter": "refusal", "tool_calls": "tool_use"}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class Turn(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="allow")
    role: Literal["user", "assistant"]
    content: str | list[dict[str, Any]]


class Metadata(BaseModel):
    """What the client says of itself."""

    model_config = ConfigDict(extra="allow")
    user_id: str | None = None


class MessagesRequest(Asked):
    """Body of /v1/messages, and of /v1/messages/count_tokens without max_tokens."""

    messages: list[Turn] = Field(min_length=1, max_length=4096)
    system: str | list[dict[str, Any]] | None = None
    max_tokens: int = Field(ge=1, lt=2**32)
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: Metadata | None = None

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "tools": ([],),
        "tool_choice": ({"type": "auto"}, {"type": "none"}),
        "thinking": ({"type": "disabled"},),
        "service_tier": ("auto", "standard_only"),
        "mcp_servers": ([],),
        "container": (),
    }

    def to_chat(self) -> ChatRequest:
        """The chat that it asks for.

        Raises:
            UnsupportedError: content that isn't text.
        """
        check_refused(self, self.refused)
        turns = [{"role": "system", "content": text_of(self.system, "system")}] if self.system else []
        for number, turn in enumerate(self.messages):
            turns.append({"role": turn.role, "content": text_of(turn.content, f"messages.{number}.content")})
        return ChatRequest.of(
            model=self.model, messages=turns, stream=self.stream, stop=self.stop_sequences or None,
            max_completion_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p,
            top_k=self.top_k, user=(self.metadata or Metadata()).user_id,
        )  # fmt: skip


class CountRequest(MessagesRequest):
    """Body of /v1/messages/count_tokens."""

    max_tokens: int = Field(1, ge=1, lt=2**32)


class MessagesShape:
    """/v1/messages."""

    def __init__(self, request_id: str, asked: MessagesRequest, spelling: Spelling | None) -> None:
        self._id, self._model = f"msg_{request_id}", asked.model
        self._finish: str | None = None
        self._stop: str | None = None

    def begin(self, num_choices: int, usage: pb.Usage) -> bytes:
        message = self._message([], None, None, {"input_tokens": usage.prompt_tokens, "output_tokens": 0})
        block = {"type": "text", "text": ""}
        return typed_event("message_start", message=message) + typed_event(
            "content_block_start", index=0, content_block=block
        )

    def event(self, piece: Piece) -> bytes:
        if piece.finish:
            self._finish, self._stop = piece.finish, piece.stop
        if not piece.text:
            return b""
        return typed_event("content_block_delta", index=0, delta={"type": "text_delta", "text": piece.text})

    def end(self, usage: pb.Usage, num_migrations: int) -> bytes:
        delta = {"stop_reason": _reason(self._finish, self._stop), "stop_sequence": self._stop}
        return b"".join((
            typed_event("content_block_stop", index=0),
            typed_event("message_delta", delta=delta, usage=_usage(usage, num_migrations)),
            typed_event("message_stop"),
        ))  # fmt: skip

    def with_usage(self, events: bytes, usage: pb.Usage) -> bytes:
        return events

    def body(self, pieces: Iterable[Piece], usage: pb.Usage, num_migrations: int = 0) -> bytes:
        (piece,) = pieces
        content = [{"type": "text", "text": piece.text}]
        reason = _reason(piece.finish, piece.stop)
        return orjson.dumps(self._message(content, reason, piece.stop, _usage(usage, num_migrations)))

    def _message(
        self, content: list[dict[str, Any]], reason: str | None, stop: str | None, usage: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": usage,
        }


def _reason(finish: str | None, stop: str | None) -> str:
    return "stop_sequence" if stop is not None else _REASONS.get(finish or "", "end_turn")


def _usage(usage: pb.Usage, num_migrations: int) -> dict[str, Any]:
    values: dict[str, Any] = {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}
    if usage.HasField("cached_tokens"):
        values["cache_read_input_tokens"] = usage.cached_tokens
    return values | ({"num_migrations": num_migrations} if num_migrations else {})


def error_body(error: MeshError, request_id: str) -> bytes:
    """An error as Anthropic's clients expect it."""
    default = "api_error" if error.http_status >= 500 else "invalid_request_error"
    where = f"{error.param}: " if error.param and error.param not in error.message else ""
    told = {"type": _TYPES.get(error.http_status, default), "message": f"{where}{error.message}"}
    return orjson.dumps({"type": "error", "error": told, "request_id": request_id})
