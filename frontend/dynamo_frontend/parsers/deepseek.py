"""DeepSeek V3 and R1 (arguments in a fence), and V3.1 (plain).

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather
```json
{"city": "Paris"}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>
<｜tool▁calls▁end｜>
"""

from __future__ import annotations

from dynamo_frontend.parsers.base import Steps
from dynamo_frontend.parsers.calls import JsonParser

_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEP, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


class DeepSeek(JsonParser):
    """Reads calls with and without a fence around their arguments."""

    marks = (_CALLS, _CALL, _SEP, _CALL_END, _CALLS_END)

    def answer(self) -> Steps[None]:
        while (yield from self.text_until(_CALLS)) is not None:
            yield from self.calls_between(_CALLS, _CALLS_END, _CALL, self._call)

    def _call(self) -> Steps[bool]:
        name, mark = yield from self.gather(_SEP, _CALL_END)
        if mark != _SEP:
            return False
        yield from self.skip_space()
        char = yield from self.char()
        if name.strip() == "function" and char not in ("{", "`", "<"):  # the kind; the name comes now
            name, mark = yield from self.gather("\n", "{", "```", _CALL_END)
            if mark is None:
                return False
            self.put_back(len(mark))
        if not (name := name.strip()):
            return False
        self.begin_call(name)
        yield from self.skip_space("`jsonJSON")
        if (yield from self.char()) == "{":
            yield from self.json_value(self.arguments)
        else:  # nothing, null, an empty list
            yield from self.skip_space("null[]")
        yield from self.skip_space("`}")
        yield from self.close_call(_CALL_END)
        return True
