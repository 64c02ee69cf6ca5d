"""DeepSeek V3.2: a call is XML-like, and says of each parameter whether it is text.

<｜DSML｜function_calls>
<｜DSML｜invoke name="get_weather">
<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>
<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜function_calls>
"""

from __future__ import annotations

from dynamo_frontend.parsers.base import Steps
from dynamo_frontend.parsers.parameters import TaggedParser

_OPEN, _CLOSE = "<｜DSML｜function_calls>", "</｜DSML｜function_calls>"
_INVOKE, _INVOKE_END = '<｜DSML｜invoke name="', "</｜DSML｜invoke>"
_PARAMETER, _PARAMETER_END = '<｜DSML｜parameter name="', "</｜DSML｜parameter>"
_ENDS = (_PARAMETER_END, _INVOKE_END)


class DeepSeekV32(TaggedParser):
    """Reads calls in tags."""

    marks = ("｜DSML｜",)

    def answer(self) -> Steps[None]:
        while (yield from self.text_until(_OPEN)) is not None:
            yield from self.calls_between(_OPEN, _CLOSE, _INVOKE, self._call)

    def _call(self) -> Steps[bool]:
        name, end = yield from self.gather('">', "\n")
        if end != '">' or not name:
            return False
        self.begin_call(name)
        yield from self._parameters(name)
        return True

    def _parameters(self, name: str) -> Steps[None]:
        yield from self.skip_space()
        while (yield from self.match(_PARAMETER)):
            key, _ = yield from self.gather('"', "\n")
            attributes, end = yield from self.gather(">", "\n")
            if end != ">":
                break
            is_text = 'string="true"' in attributes or (None if "string" not in attributes else False)
            end = yield from self.parameter(name, key, _ENDS, is_text=is_text)
            if end is None:
                return
            if end == _INVOKE_END:
                self.put_back(len(end))
            yield from self.skip_space()
        yield from self.close_call(_INVOKE_END)
