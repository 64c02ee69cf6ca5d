"""Pythonic calls, as Llama 3.2 and 4 write them: a list of calls that begins a line.

    [get_weather(city="Paris", days=3), get_time(zone='CET')]

Nothing else marks a call, so it must name a tool that the request offers. Values are told as JSON as they come.
"""

from __future__ import annotations

import math
import re

from dynamo_frontend.parsers.base import Steps, quoted
from dynamo_frontend.parsers.calls import JsonParser, character

_OPEN, _CLOSE, _LINE = "<|python_start|>", "<|python_end|>", "\n["
_WORD, _NUMBER = re.compile(r"[\w.+-]"), re.compile(r"[+-]?[\d_]*\.?[\d_]*([eE][+-]?\d+)?")
_CONSTANTS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0", "\n": ""}
_QUIET = re.compile(r"[^\\'\"]+")
#: Values are not nested deeper.
_MAX_DEPTH = 64
_MAX_WORD = 256


class Pythonic(JsonParser):
    """Reads lists of calls."""

    marks = (_OPEN, _CLOSE)
    _before = ""  # what is told with the next arguments

    def answer(self) -> Steps[None]:
        mark: str | None = ""
        while mark is not None:
            if mark == _LINE:
                self.put_back(1)
            yield from self._calls(mark.removesuffix("["))
            mark = yield from self.text_until(_LINE, _OPEN)

    def _calls(self, mark: str) -> Steps[None]:
        """A list of calls, if there is one."""
        self.attempt()
        yield from self.skip_space()
        before = self.num_calls
        is_list = yield from self.match("[")
        if is_list or mark == _OPEN:
            yield from self.skip_space()
            while (yield from self._call()):
                mark = self.gap = ""
                self.attempt()
                yield from self.skip_space(",")
            if not self.is_tentative:
                return  # within a call: what is left of it is text
        if self.num_calls > before and (not is_list or (yield from self.match("]"))):
            self.attempt()
            yield from self.skip_space()
            if (yield from self.match(_CLOSE)):
                self.commit()
        elif mark or (is_list and self.num_calls == before):
            self.give_up(mark)
            return
        self.rewind()

    def _call(self) -> Steps[bool]:
        """One call; what is left of one that is broken is text."""
        name = yield from self._word()
        if name not in self.tools or not (yield from self.match("(")):
            return False
        self.begin_call(name)
        mark = "{"
        yield from self.skip_space()
        names = iter(self.tools.parameters(name))
        while not (yield from self.match(")")):
            self.attempt()
            key = yield from self._key()
            if key is None:
                self.commit()
                return False
            key = key or next(names, "")
            self._before = f'{mark}"{quoted(key)}": '
            is_whole = bool(key) and (yield from self._value(0))
            if self.is_tentative:
                self._before = ""
                if (yield from self.char()):  # that is no value: what was told is all, and the rest is text
                    self.arguments("{}" if mark == "{" else "}")
                    self.rewind()
                self.commit()
                return False
            if not is_whole:
                return False
            mark = ", "
            yield from self.skip_space(",")
        self.arguments("{}" if mark == "{" else "}")
        return True

    def _key(self) -> Steps[str | None]:
        """The name of an argument; empty for a positional one, None where it is cut."""
        key = yield from self._word()
        yield from self.skip_space()
        if key and not (yield from self.char()):
            return None
        if key and (yield from self.match("=")):
            yield from self.skip_space()
            return key
        self.rewind()
        self.attempt()
        return ""

    def _word(self) -> Steps[str]:
        word = ""
        while (char := (yield from self.char())) and _WORD.match(char) and len(word) < _MAX_WORD:
            word += self.take()
        return word

    def _value(self, depth: int) -> Steps[bool]:
        """Say a Python value as JSON; False where it is none."""
        char = yield from self.char()
        if char in ("'", '"'):
            return (yield from self._python_string())
        if char in ("[", "(", "{") and depth < _MAX_DEPTH:
            return (yield from self._values(depth + 1))
        word = yield from self._word()
        if not (yield from self.char()) and word:  # more of it may have come
            self.arguments(word)
            return False
        told = _CONSTANTS.get(word) or _number(word)
        if told is None:
            if not self.is_tentative:
                self.text(word)
            return False
        self.arguments(told)
        return True

    def arguments(self, text: str) -> None:
        if self._before:  # the key goes with the first of its value
            self.commit()
            text, self._before = self._before + text, ""
        super().arguments(text)

    def _values(self, depth: int) -> Steps[bool]:
        """A list, a tuple or a dictionary."""
        end = {"[": "]", "(": ")", "{": "}"}[opening := self.take()]
        self.arguments("{" if opening == "{" else "[")
        comma = ""
        yield from self.skip_space()
        while not (yield from self.match(end)):
            self.arguments(comma)
            comma = ", "
            if not (yield from (self._item(depth) if opening == "{" else self._value(depth))):
                return False
            yield from self.skip_space(",")
        self.arguments("}" if opening == "{" else "]")
        return True

    def _item(self, depth: int) -> Steps[bool]:
        is_string = (yield from self.char()) in ("'", '"')
        if is_string:
            if not (yield from self._python_string()):
                return False
        else:
            self.arguments(f'"{(yield from self._word())}"')
        yield from self.skip_space()
        if not (yield from self.match(":")):
            return False
        yield from self.skip_space()
        self.arguments(": ")
        return (yield from self._value(depth))

    def _python_string(self) -> Steps[bool]:
        quote = self.take()
        self.arguments('"')
        if (yield from self.match(quote * 2)):
            quote *= 3
        while (yield from self.char()):
            if run := _QUIET.match(self._held, self._pos):
                self.arguments(quoted(self.take(len(run[0]))))
            elif (yield from self.match(quote)):
                if not (quote := (yield from self._next_quote())):
                    self.arguments('"')
                    return True
            elif (char := self.take()) == "\\":
                self.arguments(quoted((yield from self.escaped())))
            else:
                self.arguments(quoted(char))
        return False

    def _next_quote(self) -> Steps[str]:
        """The quote that goes on with a string: two that stand beside each other, or with a plus between, are one."""
        yield from self.skip_space("+")
        if (yield from self.char()) not in ("'", '"'):
            return ""
        quote = self.take()
        return quote * 3 if (yield from self.match(quote * 2)) else quote

    def escaped(self) -> Steps[str]:
        kind = yield from self.char()
        if kind == "u":
            return (yield from super().escaped())
        self.take()
        if kind in ("x", "U"):
            return character((yield from self.hexadecimal(2 if kind == "x" else 8)))
        return _ESCAPED.get(kind, kind if kind in "'\"\\" else "\\" + kind)


def _number(word: str) -> str | None:
    """A number as JSON has it; None where it is none."""
    if not _NUMBER.fullmatch(word) or not any(map(str.isdigit, word)):
        return None
    for kind in (int, float):
        try:
            value = kind(word)
        except ValueError:
            continue
        return None if isinstance(value, float) and math.isinf(value) else repr(value)
    return None
