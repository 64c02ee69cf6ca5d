"""Llama 3: a call is a JSON object that begins a line, behind `<|python_tag|>` or nothing; `;` between several.

    <|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": …}

Nothing else marks a call, so it must name a tool that the request offers: other JSON is the answer.
"""

from __future__ import annotations

from dynamo_frontend.parsers.base import Steps
from dynamo_frontend.parsers.calls import JsonParser

_TAG, _LINES = "<|python_tag|>", ("\n{", "\n[")


class Llama3Json(JsonParser):
    """Reads calls at the beginning of lines."""

    marks = (_TAG,)

    def answer(self) -> Steps[None]:
        mark: str | None = ""
        while mark is not None:
            if mark in _LINES:
                self.put_back(1)
            yield from self._calls(mark.rstrip("{["))
            mark = yield from self.text_until(*_LINES, _TAG)

    def _calls(self, mark: str) -> Steps[None]:
        """The calls behind a mark."""
        before = self.num_calls
        self.attempt()
        yield from self.skip_space()
        is_list = yield from self.match("[")
        if is_list:
            yield from self.skip_space()
        if (yield from self.call_objects(";,")):
            self.give_up(mark if self.num_calls == before else "")
        elif self.num_calls > before:
            if is_list and (yield from self.match("]")):
                self.commit()
            else:
                self.rewind()
        elif mark or is_list:
            self.give_up(mark)
        else:
            self.rewind()

    def can_be_called(self, name: str) -> bool:
        return name in self.tools

    def allows_key(self, key: str) -> bool:
        return key == "type"
