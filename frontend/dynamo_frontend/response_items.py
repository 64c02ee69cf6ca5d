"""The items of a response: messages, calls and reasoning, as they grow and when they are whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

#: An event's type, and its values.
Told = tuple[str, dict[str, Any]]


class Item(ABC):
    """One item.

    Attributes:
        index: its place in the output.
        status: as the API calls it.
    """

    def __init__(self, item_id: str) -> None:
        self.id, self.index, self.status = item_id, 0, "in_progress"
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All that came."""
        return "".join(self._pieces)

    def begin(self) -> Iterator[Told]:
        """It is there."""
        yield "response.output_item.added", {"output_index": self.index, "item": self.value("in_progress")}

    def more(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Told]:
        """It grows."""
        self._pieces.append(text)
        yield self.delta(text, logprobs)

    def end(self, status: str) -> Iterator[Told]:
        """It is whole."""
        self.status = status
        yield from self.done()
        yield "response.output_item.done", {"output_index": self.index, "item": self.value(status)}

    @abstractmethod
    def delta(self, text: str, logprobs: list[dict[str, Any]]) -> Told:
        """What is new."""

    @abstractmethod
    def done(self) -> Iterator[Told]:
        """What is told before its end."""

    @abstractmethod
    def value(self, status: str) -> dict[str, Any]:
        """As it is told whole."""


class _WithPart(Item):
    """One whose text is in a part."""

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index, "content_index": 0}

    @abstractmethod
    def part(self) -> dict[str, Any]:
        """The part as it is by now."""

    def begin(self) -> Iterator[Told]:
        yield from super().begin()
        yield "response.content_part.added", {**self._place, "part": self.part()}

    def value(self, status: str) -> dict[str, Any]:
        return {"id": self.id, "status": status, "content": [] if status == "in_progress" else [self.part()]}


class Message(_WithPart):
    """What the model answers."""

    def __init__(self, item_id: str) -> None:
        super().__init__(item_id)
        self._logprobs: list[dict[str, Any]] = []

    def part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self._logprobs}

    def delta(self, text: str, logprobs: list[dict[str, Any]]) -> Told:
        self._logprobs += logprobs
        return "response.output_text.delta", {**self._place, "delta": text, "logprobs": logprobs}

    def done(self) -> Iterator[Told]:
        yield "response.output_text.done", {**self._place, "text": self.text, "logprobs": self._logprobs}
        yield "response.content_part.done", {**self._place, "part": self.part()}

    def value(self, status: str) -> dict[str, Any]:
        return {"type": "message", "role": "assistant", **super().value(status)}


class Thought(_WithPart):
    """What the model thought before."""

    def part(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": self.text}

    def delta(self, text: str, logprobs: list[dict[str, Any]]) -> Told:
        return "response.reasoning_text.delta", {**self._place, "delta": text}

    def done(self) -> Iterator[Told]:
        yield "response.reasoning_text.done", {**self._place, "text": self.text}
        yield "response.content_part.done", {**self._place, "part": self.part()}

    def value(self, status: str) -> dict[str, Any]:
        return {"type": "reasoning", "summary": [], **super().value(status)}


class CallItem(Item):
    """A call of a tool."""

    def __init__(self, item_id: str, call_id: str, name: str) -> None:
        super().__init__(item_id)
        self._call_id, self._name = call_id, name

    def delta(self, text: str, logprobs: list[dict[str, Any]]) -> Told:
        place = {"item_id": self.id, "output_index": self.index}
        return "response.function_call_arguments.delta", {**place, "delta": text}

    def done(self) -> Iterator[Told]:
        told = {"item_id": self.id, "output_index": self.index, "name": self._name, "arguments": self.text}
        yield "response.function_call_arguments.done", told

    def value(self, status: str) -> dict[str, Any]:
        told = {"type": "function_call", "id": self.id, "status": status, "call_id": self._call_id}
        return {**told, "name": self._name, "arguments": self.text}
