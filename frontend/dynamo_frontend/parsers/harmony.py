"""gpt-oss (harmony): every message has a channel, and calls have a recipient. On text: its library loads a vocabulary.

<|channel|>analysis<|message|>They ask for …<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather
<|constrain|>json<|message|>{"city": "Paris"}<|call|>
<|channel|>final<|message|>It rains.<|return|>
"""

from __future__ import annotations

import re
from collections.abc import Callable

from dynamo_frontend.parsers.base import Parser, Steps
from dynamo_frontend.parsers.said import Reasoning, Text

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_RECIPIENT = re.compile(r"to=([^\s<]+)")
_FUNCTIONS = "functions."


class Harmony(Parser):
    """Reads messages; what the analysis says is reasoning, the rest is the answer."""

    _begins = False
    _kinds: frozenset[type] = frozenset()
    marks = (_START, _CHANNEL, _MESSAGE, "<|constrain|>", *_ENDS)

    def parse(self) -> Steps[None]:
        self.attempt()
        yield from self.skip_space()
        if (yield from self.match("to=")):  # the prompt has the beginning of the header
            self.rewind()
            yield from self._message("")
        else:
            self.rewind()
        yield from self.answer()

    def answer(self) -> Steps[None]:
        while (mark := (yield from self.text_until(_START, _CHANNEL, *_ENDS))) is not None:
            if mark not in _ENDS:
                yield from self._message(mark)

    def _message(self, mark: str) -> Steps[None]:
        self.attempt()
        header, end = yield from self.gather(_MESSAGE, *_ENDS)
        if end != _MESSAGE:
            self.give_up(mark)
            return
        self.commit()
        self._begins = True
        recipient = _RECIPIENT.search(header)
        name = recipient[1].removeprefix(_FUNCTIONS) if recipient else ""
        if name and recipient and (recipient[1].startswith(_FUNCTIONS) or name in self.tools):
            self.begin_call(name)
            end = yield from self._body(self.arguments)
            if end is not None:
                self.end_call()
        elif recipient or "analysis" in header:
            self.is_in_reasoning = True
            yield from self._body(self.reason)
            self.is_in_reasoning = False
        else:
            yield from self._body(self.text)

    def text(self, text: str) -> None:
        super().text(self._apart(text, Text))

    def reason(self, text: str) -> None:
        super().reason(self._apart(text, Reasoning))

    def _apart(self, text: str, kind: type) -> str:
        """Text of a message that begins, apart from that of the one before it."""
        is_first = self._begins and bool(text)
        self._begins = self._begins and not text
        is_apart = is_first and kind in self._kinds
        self._kinds |= {kind} if text else frozenset()
        return f"\n{text}" if is_apart else text

    def _body(self, say: Callable[[str], None]) -> Steps[str | None]:
        end = yield from self.until(*_ENDS, _START, _CHANNEL, say=say)
        if end in (_START, _CHANNEL):
            self.put_back(len(end))
        return end
