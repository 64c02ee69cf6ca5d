"""Llama 3: a call is a JSON object that begins a line, behind `<|python_tag|>` or nothing; `;` between several.

    <|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": …}

Nothing else marks a call, so it must name a tool that the request offers: other JSON is the answer.
"""

from __future__ import annotations

from dynamo_frontend.parsers.base import Steps
from dynamo_frontend.parsers.calls import JsonParser

_TAG, _LINE = "<|python_tag|>", "\n{"


class Llama3Json(JsonParser):
    """Reads calls at the beginning of lines."""

    marks = (_TAG,)

    def answer(self) -> Steps[None]:
        mark: str | None = ""
        while mark is not None:
            if mark == _LINE:
                self.put_back(1)
            yield from self._calls(mark.removesuffix("{"))
            mark = yield from self.text_until(_LINE, _TAG)

    def _calls(self, mark: str) -> Steps[None]:
        """The calls behind a mark."""
        self.attempt()
        yield from self.skip_space()
        while (yield from self.char()) == "{":
            if not (yield from self.call_object()):
                self.give_up(mark)
                return
            mark = self.gap = ""
            self.attempt()
            yield from self.skip_space(";,")
        if mark:
            self.give_up(mark)
        else:
            self.rewind()

    def can_be_called(self, name: str) -> bool:
        return name in self.tools

    def allows_key(self, key: str) -> bool:
        return key == "type"
