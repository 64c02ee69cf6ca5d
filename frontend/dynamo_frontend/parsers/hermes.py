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
            self.attempt()
            yield from self.skip_space()
            if not (yield from self.call_object()):
                self.give_up(_OPEN)
                continue
            yield from self.skip_space("}")
            yield from self.match(_CLOSE)
