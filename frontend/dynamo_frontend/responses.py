"""OpenAI's Responses API over the same chat: its body, its answer, its events. Nothing is stored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field

from dynamo_frontend.relay import Piece
from dynamo_frontend.schemas import Asked, ChatRequest, check_refused, text_of
from dynamo_frontend.shapes import ChatShape, typed_event
from dynamo_frontend.spelling import Spelling
from dynamo_grpc import UnsupportedError
from dynamo_grpc.v1 import inference_pb2 as pb

_LOGPROBS = "message.output_text.logprobs"
_TEXTS = ("input_text", "output_text", "text")


class InputItem(BaseModel):
    """One turn of the input."""

    model_config = ConfigDict(extra="allow")
    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] = "user"
    content: str | list[dict[str, Any]] = ""


class TextOptions(BaseModel):
    """How the text is to be."""

    model_config = ConfigDict(extra="allow")
    format: dict[str, Any] = Field(default_factory=lambda: {"type": "text"})


class ResponsesRequest(Asked):
    """Body of /v1/responses."""

    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=2**32)
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[str] | None = None
    text: TextOptions | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    store: bool | None = None

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "previous_response_id": (),
        "conversation": (),
        "prompt": (),
        "background": (False,),
        "reasoning": ({}, {"effort": None}),
        "truncation": ("disabled",),
        "max_tool_calls": (),
        "parallel_tool_calls": (True, False),
        "service_tier": ("auto", "default"),
    }

    def to_chat(self) -> ChatRequest:
        """The chat that it asks for.

        Raises:
            UnsupportedError: a kind of input that isn't text.
        """
        check_refused(self, self.refused)
        turns = [{"role": "developer", "content": self.instructions}] if self.instructions else []
        items = [InputItem(content=self.input)] if isinstance(self.input, str) else self.input
        for number, item in enumerate(items):
            if item.type != "message":
                raise UnsupportedError(f"input of type {item.type!r} is not supported here", param=f"input.{number}")
            turns.append({"role": item.role, "content": text_of(item.content, f"input.{number}.content", _TEXTS)})
        wanted = (self.text or TextOptions()).format
        if wanted.get("type") == "json_schema":
            wanted = {"type": "json_schema", "json_schema": wanted}
        has_logprobs = _LOGPROBS in (self.include or ())
        return ChatRequest.of(
            model=self.model, messages=turns, stream=self.stream, response_format=wanted,
            max_completion_tokens=self.max_output_tokens, temperature=self.temperature, top_p=self.top_p,
            logprobs=has_logprobs or None, top_logprobs=self.top_logprobs if has_logprobs else None,
            user=self.user, metadata=self.metadata,
        )  # fmt: skip


class ResponsesShape(ChatShape):
    """/v1/responses: typed and numbered events, and the whole answer again at the end."""

    def __init__(self, request_id: str, asked: ResponsesRequest, spelling: Spelling | None) -> None:
        super().__init__(request_id, asked, spelling)
        self._asked = asked
        self._response_id, self._item_id = f"resp_{request_id}", f"msg_{request_id}"
        self._number = 0
        self._pieces: list[str] = []
        self._entries: list[dict[str, Any]] = []
        self._finish: str | None = None

    def begin(self, num_choices: int, usage: pb.Usage) -> bytes:
        snapshot = self._response("in_progress", [], None)
        return b"".join((
            self._event("response.created", response=snapshot),
            self._event("response.in_progress", response=snapshot),
            self._event("response.output_item.added", output_index=0, item=self._item("in_progress", None)),
            self._event("response.content_part.added", part=self._part("", []), **self._place),
        ))  # fmt: skip

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **values: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return typed_event(kind, sequence_number=number, **values)

    def event(self, piece: Piece) -> bytes:
        if piece.finish:
            self._finish = piece.finish
        if not piece.text and piece.logprobs is None:
            return b""
        self._pieces.append(piece.text)
        entries = self._logprobs(piece)["content"] if piece.logprobs is not None else []
        self._entries += entries
        return self._event("response.output_text.delta", **self._place, delta=piece.text, logprobs=entries)

    def end(self, usage: pb.Usage, num_migrations: int) -> bytes:
        text = "".join(self._pieces)
        status = self._status(self._finish)
        item = self._item(status, self._part(text, self._entries))
        return b"".join((
            self._event("response.output_text.done", **self._place, text=text, logprobs=self._entries),
            self._event("response.content_part.done", **self._place, part=self._part(text, self._entries)),
            self._event("response.output_item.done", output_index=0, item=item),
            self._event(f"response.{status}", response=self._response(status, [item], usage, num_migrations)),
        ))  # fmt: skip

    def body(self, pieces: Iterable[Piece], usage: pb.Usage, num_migrations: int = 0) -> bytes:
        (piece,) = pieces
        self._finish = piece.finish
        entries = self._logprobs(piece)["content"] if piece.logprobs is not None else []
        status = self._status(piece.finish)
        item = self._item(status, self._part(piece.text, entries))
        return orjson.dumps(self._response(status, [item], usage, num_migrations))

    @staticmethod
    def _status(finish: str | None) -> str:
        return "incomplete" if finish in ("length", "content_filter") else "completed"

    @staticmethod
    def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _item(self, status: str, part: dict[str, Any] | None) -> dict[str, Any]:
        content = [] if part is None else [part]
        return {"type": "message", "id": self._item_id, "status": status, "role": "assistant", "content": content}

    def _response(
        self, status: str, output: list[dict[str, Any]], usage: pb.Usage | None, num_migrations: int = 0
    ) -> dict[str, Any]:
        asked = self._asked
        reason = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(self._finish or "")
        return {
            "id": self._response_id,
            "object": "response",
            "created_at": self._base["created"],
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": reason} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": asked.model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": (asked.text or TextOptions()).format},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage, num_migrations),
            "user": asked.user,
        }


def _usage(usage: pb.Usage, num_migrations: int) -> dict[str, Any]:
    values: dict[str, Any] = {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    return values | ({"num_migrations": num_migrations} if num_migrations else {})
