"""Mistral: a list of JSON objects behind a token, or in newer models a token before each call.

[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": …}]
[TOOL_CALLS]get_weather{"city": "Paris"}[TOOL_CALLS]get_time[CALL_ID]a1B2c3D4e[ARGS]{}
"""

from __future__ import annotations

from dynamo_frontend.parsers.base import Steps
from dynamo_frontend.parsers.calls import JsonParser

_CALLS, _ID, _ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
#: A name can't be longer.
_MAX_NAME = 256


class Mistral(JsonParser):
    """Reads both forms."""

    marks = (_CALLS, _ID, _ARGS)

    def answer(self) -> Steps[None]:
        while (yield from self.text_until(_CALLS)) is not None:
            self.attempt()
            yield from self.skip_space()
            yield from (self._list() if (yield from self.char()) in ("[", "{") else self._call())

    def _list(self) -> Steps[None]:
        before = self.num_calls
        yield from self.match("[")
        yield from self.skip_space()
        if (yield from self.call_objects(",")) or self.num_calls == before:
            self.give_up(_CALLS if self.num_calls == before else "")
        elif (yield from self.match("]")):
            self.commit()
        else:
            self.rewind()

    def _call(self) -> Steps[None]:
        name, call_id = (yield from self._word()), ""
        if (yield from self.match(_ID)):
            call_id = yield from self._word()
        if not name or (not (yield from self.match(_ARGS)) and (yield from self.char()) != "{"):
            self.give_up(_CALLS)
            return
        self.begin_call(name, call_id)
        yield from self.skip_space()
        if (yield from self.char()) == "{":
            yield from self.json_value(self.arguments)
        yield from self.close_call()

    def _word(self) -> Steps[str]:
        """A name, or an id."""
        word = ""
        while (char := (yield from self.char())) and not char.isspace() and char not in "[{" and len(word) < _MAX_NAME:
            word += self.take()
        return word

    def make_id(self, name: str) -> str:
        return self.random_name(9)  # the model's templates refuse others
