"""What Anthropic's Messages API answers: blocks of text, of thinking and of tool use, whole or as events."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from dynamo_frontend.anthropic import MessagesRequest
from dynamo_frontend.parsers.said import Arguments, Call, Reasoning, Said, Text
from dynamo_frontend.pieces import Piece
from dynamo_frontend.shapes import typed_event
from dynamo_frontend.spelling import Spelling
from dynamo_grpc.v1 import inference_pb2 as pb

_REASONS = {"length": "max_tokens", "content_filter": "refusal", "tool_calls": "tool_use"}


@dataclass(slots=True)
class _Use:
    """A block that is a call: its place, and the JSON of its input so far."""

    at: int
    block: dict[str, Any]
    pieces: list[str] = field(default_factory=list)


class MessagesShape:
    """/v1/messages."""

    num_events = 0

    def __init__(self, request_id: str, asked: MessagesRequest, spelling: Spelling | None) -> None:
        self._id, self._model = f"msg_{request_id}", asked.model
        self._finish: str | None = None
        self._stop: str | None = None
        self._blocks: list[dict[str, Any]] = []
        self._calls: dict[int, _Use] = {}

    def begin(self, num_choices: int, usage: pb.Usage) -> bytes:
        message = self._message([], None, None, {"input_tokens": usage.prompt_tokens, "output_tokens": 0})
        return typed_event("message_start", message=message)

    def event(self, piece: Piece) -> bytes:
        if piece.finish:
            self._finish, self._stop = piece.finish, piece.stop
        if not piece.said and not piece.text:
            return b""
        return b"".join(self._take(one) for one in piece.said or (Text(piece.text),))

    def _take(self, said: Said) -> bytes:
        """The events of one thing that is said."""
        events = b""
        match said:
            case Call(index, call_id, name):
                block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                self._calls[index] = _Use(len(self._blocks), block)
                return self._open(block)
            case Arguments(index, text):
                self._calls[index].pieces.append(text)
                delta = {"type": "input_json_delta", "partial_json": text}
                return typed_event("content_block_delta", index=self._calls[index].at, delta=delta)
            case Reasoning(text):
                if not self._is_in("thinking"):
                    events = self._open({"type": "thinking", "thinking": "", "signature": ""})
                self._blocks[-1]["thinking"] += text
                delta = {"type": "thinking_delta", "thinking": text}
            case Text(text):
                if not self._is_in("text"):
                    events = self._open({"type": "text", "text": ""})
                self._blocks[-1]["text"] += text
                delta = {"type": "text_delta", "text": text}
        return events + typed_event("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def _is_in(self, kind: str) -> bool:
        return bool(self._blocks) and self._blocks[-1]["type"] == kind

    def _open(self, block: dict[str, Any]) -> bytes:
        """Begin a block; the one before it is whole, but for a call: workers may tell several side by side."""
        before = b""
        if self._blocks and not self._is_in("tool_use"):
            before = typed_event("content_block_stop", index=len(self._blocks) - 1)
        self._blocks.append(block)
        return before + typed_event("content_block_start", index=len(self._blocks) - 1, content_block=block)

    def _close(self) -> bytes:
        """End the blocks that are open."""
        open_blocks = [use.at for use in self._calls.values()]
        for use in self._calls.values():
            use.block["input"] = _input_of("".join(use.pieces))
        if self._blocks and not self._is_in("tool_use"):
            open_blocks.append(len(self._blocks) - 1)
        return b"".join(typed_event("content_block_stop", index=index) for index in open_blocks)

    def end(self, usage: pb.Usage, num_migrations: int) -> bytes:
        delta = {"stop_reason": self._reason, "stop_sequence": self._stop}
        begun = b"" if self._blocks else self._open({"type": "text", "text": ""})
        return b"".join((
            begun,
            self._close(),
            typed_event("message_delta", delta=delta, usage=_usage(usage, num_migrations)),
            typed_event("message_stop"),
        ))  # fmt: skip

    def with_usage(self, events: bytes, usage: pb.Usage) -> bytes:
        return events

    def body(self, pieces: Iterable[Piece], usage: pb.Usage, num_migrations: int = 0) -> bytes:
        for piece in pieces:
            self.event(piece)
        self._close()
        content = self._blocks or [{"type": "text", "text": ""}]
        return orjson.dumps(self._message(content, self._reason, self._stop, _usage(usage, num_migrations)))

    @property
    def _reason(self) -> str:
        if self._stop is not None:
            return "stop_sequence"
        if self._finish == "stop" and any(block["type"] == "tool_use" for block in self._blocks):
            return "tool_use"
        return _REASONS.get(self._finish or "", "end_turn")

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


def _input_of(text: str) -> Any:
    """A call's arguments; empty where the model's are no JSON object, or were cut."""
    try:
        values = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return values if isinstance(values, dict) else {}


def _usage(usage: pb.Usage, num_migrations: int) -> dict[str, Any]:
    values: dict[str, Any] = {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}
    if usage.HasField("cached_tokens"):
        values["cache_read_input_tokens"] = usage.cached_tokens
    return values | ({"num_migrations": num_migrations} if num_migrations else {})
