"""Hermes and Qwen 2.5 and 3: each call a JSON object between tags.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

from __future__ import annotations

from dynamo_frontend.parsers.base import Steps
from dynamo_frontend.parsers.calls import JsonParser

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class Hermes(JsonParser):
    """Reads calls between tags."""

    marks = (_OPEN, _CLOSE)

    def answer(self) -> Steps[None]:
        while (yield from self.text_until(_OPEN)) is not None:
            before = self.num_calls
            self.attempt()
            yield from self.skip_space("[")
            is_broken = yield from self.call_objects(",")
            if is_broken or self.num_calls == before:
                self.give_up(_OPEN if self.num_calls == before else "")
                continue
            yield from self.skip_space("]}")
            if (yield from self.match(_CLOSE)):
                self.commit()
            else:
                self.rewind()
