"""Qwen 3 Coder: a call is XML-like, with a tag for each parameter; the values are typed by the tool's schema.

<tool_call>
<function=get_weather>
<parameter=city>
Paris
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

from dynamo_frontend.parsers.base import Steps
from dynamo_frontend.parsers.parameters import TaggedParser

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
#: What ends a value; the tag is left out now and then, and a value may hold the other ones.
_ENDS = (f"\n{_PARAMETER_END}", _PARAMETER_END, f"\n{_PARAMETER}", f"\n{_FUNCTION_END}")


class Qwen3Coder(TaggedParser):
    """Reads calls in tags; some models leave out the outer ones."""

    marks = (_OPEN, _CLOSE)

    def answer(self) -> Steps[None]:
        while (mark := (yield from self.text_until(_OPEN, _FUNCTION))) is not None:
            self.attempt()
            if mark == _OPEN:
                yield from self.skip_space()
            if mark == _OPEN and not (yield from self.match(_FUNCTION)):
                self.give_up(mark)
                continue
            name, end = yield from self.gather(">", "\n", "<")
            if end != ">" or not name.strip():
                self.give_up(mark)
                continue
            self.begin_call(name.strip())
            yield from self._parameters(name.strip())

    def _parameters(self, name: str) -> Steps[None]:
        yield from self.skip_space()
        while (yield from self.match(_PARAMETER)):
            key, end = yield from self.gather(">", "\n")
            if end is None:
                break
            end = yield from self.parameter(name, key.strip(), _ENDS)
            if end is None:
                return
            if not end.endswith(_PARAMETER_END):
                self.put_back(len(end))
            yield from self.skip_space()
        yield from self.close_call(_FUNCTION_END)
        yield from self.skip_space()
        yield from self.match(_CLOSE)

    def _first_line(self) -> Steps[None]:
        yield from self.match("\n")
