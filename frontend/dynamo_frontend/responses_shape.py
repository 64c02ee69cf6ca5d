"""What OpenAI's Responses API answers: typed and numbered events, and the whole answer again at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from dynamo_frontend.parsers.said import Arguments, Call, Reasoning, Text
from dynamo_frontend.pieces import Piece
from dynamo_frontend.response_items import CallItem, Item, Message, Thought, Told
from dynamo_frontend.responses import FunctionChoice, ResponsesRequest, TextOptions
from dynamo_frontend.shapes import ChatShape, typed_event
from dynamo_frontend.spelling import Spelling
from dynamo_grpc.v1 import inference_pb2 as pb


class ResponsesShape(ChatShape):
    """/v1/responses."""

    def __init__(self, request_id: str, asked: ResponsesRequest, spelling: Spelling | None) -> None:
        super().__init__(request_id, asked, spelling)
        self._asked, self._request_id = asked, request_id
        self._items: list[Item] = []
        self._calls: dict[int, CallItem] = {}
        self._logprobs_left: list[dict[str, Any]] = []  # of tokens whose text hasn't come yet
        self._reads = asked.tools is not None
        self._finish: str | None = None

    def begin(self, num_choices: int, usage: pb.Usage) -> bytes:
        snapshot = self._response("in_progress", None)
        told = [("response.created", {"response": snapshot}), ("response.in_progress", {"response": snapshot})]
        return self._events(told)

    def _events(self, told: Iterable[Told]) -> bytes:
        events = []
        for kind, values in told:
            events.append(typed_event(kind, sequence_number=self.num_events, **values))
            self.num_events += 1
        return b"".join(events)

    def event(self, piece: Piece) -> bytes:
        return self._events(self._take(piece))

    def _take(self, piece: Piece) -> Iterator[Told]:
        """What a piece adds to the items."""
        self._finish = piece.finish or self._finish
        if piece.logprobs is not None:
            self._logprobs_left += self._logprobs(piece)["content"]
        is_text = not piece.said and (piece.text or (self._logprobs_left and not self._reads))
        for one in piece.said or ([Text(piece.text)] if is_text else []):
            match one:
                case Call():
                    call = self._calls[one.index] = CallItem(f"fc_{self._request_id}_{one.index}", one.id, one.name)
                    yield from self._open(call)
                case Arguments(index, text):
                    yield from self._calls[index].more(text, [])
                case Reasoning(text):
                    if not (self._items and isinstance(self._items[-1], Thought)):
                        yield from self._open(Thought(f"rs_{self._request_id}_{len(self._items)}"))
                    yield from self._items[-1].more(text, [])
                case Text(text):
                    yield from self._message()
                    logprobs, self._logprobs_left = self._logprobs_left, []
                    yield from self._items[-1].more(text, logprobs)

    def _message(self) -> Iterator[Told]:
        if not (self._items and isinstance(self._items[-1], Message)):
            suffix = f"_{len(self._items)}" if self._items else ""
            yield from self._open(Message(f"msg_{self._request_id}{suffix}"))

    def _open(self, item: Item) -> Iterator[Told]:
        """Begin an item; the one before it is whole, but for a call: workers may tell several side by side."""
        if self._items and not isinstance(self._items[-1], CallItem):
            yield from self._items[-1].end("completed")
        item.index = len(self._items)
        self._items.append(item)
        yield from item.begin()

    def _close(self) -> Iterator[Told]:
        """End what is open; an answer without any item is an empty message."""
        if not self._items:
            yield from self._message()
        for item in self._items[:-1]:
            if item.status == "in_progress":
                yield from item.end("completed")
        yield from self._items[-1].end(self._status)

    def end(self, usage: pb.Usage, num_migrations: int) -> bytes:
        events = self._events(self._close())
        response = self._response(self._status, usage, num_migrations)
        return events + self._events([(f"response.{self._status}", {"response": response})])

    def body(self, pieces: Iterable[Piece], usage: pb.Usage, num_migrations: int = 0) -> bytes:
        for piece in pieces:
            for _ in self._take(piece):
                pass
        for _ in self._close():
            pass
        return orjson.dumps(self._response(self._status, usage, num_migrations))

    @property
    def _status(self) -> str:
        return "incomplete" if self._finish in ("length", "content_filter") else "completed"

    def _response(self, status: str, usage: pb.Usage | None, num_migrations: int = 0) -> dict[str, Any]:
        asked = self._asked
        reason = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(self._finish or "")
        choice = asked.tool_choice or "auto"
        return {
            "id": f"resp_{self._request_id}",
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
            "output": [item.value(item.status) for item in self._items],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": asked.reasoning and asked.reasoning.effort, "summary": None},
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": (asked.text or TextOptions()).format},
            "tool_choice": choice.model_dump() if isinstance(choice, FunctionChoice) else choice,
            "tools": [_TOOL | tool.model_dump(exclude_unset=True) for tool in asked.tools or ()],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage, num_migrations),
            "user": asked.user,
        }


#: What answers say of a tool beside what the client did.
_TOOL = {"parameters": None, "strict": None}


def _usage(usage: pb.Usage, num_migrations: int) -> dict[str, Any]:
    values: dict[str, Any] = {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    return values | ({"num_migrations": num_migrations} if num_migrations else {})
